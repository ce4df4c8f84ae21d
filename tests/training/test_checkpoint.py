"""Checkpoints are whole or passed over, whatever happened to their files; and what was saved comes back bit for bit."""

import json
import shutil

import pytest
import torch
from torch import nn

from training.checkpoint import (
    CorruptCheckpoint,
    assign,
    list_checkpoints,
    load_checkpoint,
    load_latest,
    load_optimizer_tensors,
    optimizer_tensors,
    save_checkpoint,
)
from training.config import OptimizerConfig
from training.optim import make_optimizer


def save(run, step: int, keep: int = 9, **state):
    weights = {
        "model": {"w": torch.full((3,), float(step)), "b": torch.tensor(1.5, dtype=torch.float64)},
        "optimizer": {"w/step": torch.tensor(float(step))},
    }
    return save_checkpoint(run, {"step": step, "seed": 7, **state}, weights, keep)


def names(run) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_what_is_saved_comes_back(tmp_path):
    folder = save(tmp_path, 12, losses=[0.1, 1 / 3])
    assert folder == tmp_path / "checkpoints" / "step-00000012"
    assert sorted(path.name for path in folder.iterdir()) == [
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]
    state, weights = load_checkpoint(folder)
    assert (state["step"], state["seed"], state["losses"]) == (12, 7, [0.1, 1 / 3])
    assert torch.equal(weights["model"]["w"], torch.full((3,), 12.0))
    assert torch.equal(weights["model"]["b"], torch.tensor(1.5, dtype=torch.float64))
    assert torch.equal(weights["optimizer"]["w/step"], torch.tensor(12.0))


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_are_kept(tmp_path, keep):
    for step in (5, 10, 15, 20):
        save(tmp_path, step, keep)
    assert names(tmp_path) == [f"step-{step:08d}" for step in (5, 10, 15, 20)][-keep:]


def test_steps_of_more_digits_are_newer(tmp_path):
    for step in (99_999_999, 100_000_000):
        save(tmp_path, step, keep=2)
    assert len(names(tmp_path)) == 2 and load_latest(tmp_path, print)[0]["step"] == 100_000_000


def test_all_is_on_the_disk_before_it_has_its_name_and_before_another_goes(tmp_path, monkeypatch):
    """Files, what their folder lists, and then the new name: a power cut leaves one whole checkpoint or more."""
    save(tmp_path, 1)
    done, folder = [], tmp_path / "checkpoints" / "step-00000002"
    monkeypatch.setattr(
        "training.checkpoint.fsync", lambda path: done.append((path.name, folder.exists(), len(names(tmp_path))))
    )
    save(tmp_path, 2, keep=1)
    files = [(path.name, False, 2) for path in folder.iterdir()]
    assert sorted(done[:-2]) == sorted(files)
    assert done[-2:] == [(".step-00000002.part", False, 2), ("checkpoints", True, 2)]


def test_what_somebody_else_put_there_stays(tmp_path):
    """A copy by another name, notes, and what a link that takes a checkpoint's place leads to."""
    for step in (1, 2):
        save(tmp_path, step)
    kept = shutil.copytree(tmp_path / "checkpoints" / "step-00000001", tmp_path / "checkpoints" / "step-00000001-best")
    notes, number = (tmp_path / "checkpoints" / name for name in ("step-notes.txt", "step-00000000"))
    notes.write_text("mine"), number.write_text("mine")
    elsewhere = (tmp_path / "checkpoints" / "step-00000001").rename(tmp_path / "elsewhere")
    (tmp_path / "checkpoints" / "step-00000001").symlink_to(elsewhere)
    save(tmp_path, 3, keep=1)
    assert names(tmp_path) == ["step-00000000", "step-00000001-best", "step-00000003", "step-notes.txt"]
    assert all((folder / "state.json").exists() for folder in (kept, elsewhere)) and notes.read_text() == "mine"
    assert load_latest(tmp_path, print)[0]["step"] == 3


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path):
    save(tmp_path, 3, mark="old")
    save(tmp_path, 3, mark="new")
    assert names(tmp_path) == ["step-00000003"]
    assert load_latest(tmp_path, print)[0]["mark"] == "new"


def flip(path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def cut(path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def another_step(path) -> None:
    """One digit of the state has changed; it is good JSON still."""
    path.write_text(path.read_text().replace('"step": 6', '"step": 7'))


DAMAGE = {
    "flipped bit": ("model.safetensors", flip),
    "cut weights": ("model.safetensors", cut),
    "cut optimiser": ("optimizer.safetensors", cut),
    "empty weights": ("model.safetensors", lambda path: path.write_bytes(b"")),
    "no weights": ("model.safetensors", lambda path: path.unlink()),
    "no state": ("state.json", lambda path: path.unlink()),
    "cut state": ("state.json", cut),
    "empty state": ("state.json", lambda path: path.write_text("")),
    "state of another form": ("state.json", lambda path: path.write_text("[1, 2]")),
    "state without files": ("state.json", lambda path: path.write_text('{"step": 6, "seed": 7}')),
    "changed state": ("state.json", another_step),
    "binary state": ("state.json", lambda path: path.write_bytes(b"\xff\xfe\x00")),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_bad_checkpoint_is_passed_over_and_named(tmp_path, damage):
    save(tmp_path, 3)
    folder = save(tmp_path, 6)
    name, harm = DAMAGE[damage]
    harm(folder / name)
    with pytest.raises(CorruptCheckpoint, match="step-00000006"):
        load_checkpoint(folder)
    said = []
    state, weights = load_latest(tmp_path, said.append)
    assert state["step"] == 3 and torch.equal(weights["model"]["w"], torch.full((3,), 3.0))
    [line] = said
    assert "passed over" in line and "step-00000006" in line and "\n" not in line


def test_none_left_is_an_error_that_says_what_to_do(tmp_path):
    said = []
    with pytest.raises(FileNotFoundError, match="no whole checkpoint.*train afresh"):
        load_latest(tmp_path, said.append)
    for step in (3, 6):
        shutil.rmtree(save(tmp_path, step))
        (tmp_path / "checkpoints" / f"step-{step:08d}").mkdir()
    with pytest.raises(FileNotFoundError, match="no whole checkpoint"):
        load_latest(tmp_path, said.append)
    assert len(said) == 2


@pytest.mark.parametrize("step", [3, 2])
def test_a_kill_while_old_ones_are_removed_leaves_whole_ones_alone(tmp_path, monkeypatch, step):
    """Also of one that is written again."""
    for old in (1, 2):
        save(tmp_path, old)

    def killed(path):
        next(path.iterdir()).unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, step, keep=1)
    monkeypatch.undo()
    [left] = list_checkpoints(tmp_path)
    assert load_checkpoint(left)[0]["step"] == step
    save(tmp_path, 4, keep=1)
    assert names(tmp_path) == ["step-00000004"]


@pytest.mark.parametrize("keep", [1, 2])
def test_after_a_fall_back_the_new_checkpoint_stays_and_the_bad_one_goes(tmp_path, keep):
    """The bad one has the higher number: it must not count as the newest."""
    save(tmp_path, 3)
    flip(save(tmp_path, 6) / "model.safetensors")
    assert load_latest(tmp_path, print)[0]["step"] == 3
    save(tmp_path, 4, keep)
    assert names(tmp_path) == ["step-00000003", "step-00000004"][-keep:]
    assert load_latest(tmp_path, print)[0]["step"] == 4


def test_what_a_kill_left_is_ignored_and_removed(tmp_path):
    save(tmp_path, 3)
    part = tmp_path / "checkpoints" / ".step-00000006.part"
    part.mkdir()
    (part / "model.safetensors").write_bytes(b"half")
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000003"]
    assert load_latest(tmp_path, print)[0]["step"] == 3
    save(tmp_path, 9)
    assert names(tmp_path) == ["step-00000003", "step-00000009"]


def test_a_write_that_fails_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    save(tmp_path, 3, keep=1)
    monkeypatch.setattr("training.checkpoint.write_json", lambda *args: (_ for _ in ()).throw(OSError("no room")))
    with pytest.raises(OSError, match="no room"):
        save(tmp_path, 6, keep=1)
    assert load_latest(tmp_path, print)[0]["step"] == 3
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000003"]


def test_state_is_json_that_people_can_read(tmp_path):
    state = json.loads((save(tmp_path, 3) / "state.json").read_text())
    assert state["step"] == 3 and set(state["files"]) == {"model.safetensors", "optimizer.safetensors"}


# --- the optimiser's tensors --------------------------------------------------------------------------------------


def trained(steps: int, net: nn.Module | None = None, optimizer=None):
    if net is None:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        optimizer = make_optimizer(net, OptimizerConfig(lr=0.1))
    for k in range(steps):
        optimizer.zero_grad()
        net(torch.full((3,), float(k + 1))).square().sum().backward()
        optimizer.step()
    return net, optimizer


def test_optimizer_goes_there_and_back_and_steps_on_alike(tmp_path):
    net, optimizer = trained(4)
    tensors = optimizer_tensors(optimizer, net)
    assert {name.rpartition("/")[2] for name in tensors} == {"step", "exp_avg", "exp_avg_sq"}
    save_checkpoint(tmp_path, {"step": 4}, {"model": net.state_dict(), "optimizer": tensors}, 1)
    _, weights = load_latest(tmp_path, print)
    other, fresh = trained(0)
    other.load_state_dict(weights["model"])
    load_optimizer_tensors(fresh, other, weights["optimizer"])
    trained(3, net, optimizer), trained(3, other, fresh)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))


def test_optimizer_tensors_of_another_model_are_refused():
    net, optimizer = trained(1)
    tensors = optimizer_tensors(optimizer, net)
    with pytest.raises(CorruptCheckpoint, match="2.weight/exp_avg does not fit"):
        load_optimizer_tensors(optimizer, net, {"2.weight/exp_avg": torch.zeros(2, 4)})
    tensors["0.weight/exp_avg"] = torch.zeros(3, 4)  # as many numbers
    with pytest.raises(CorruptCheckpoint, match="0.weight/exp_avg does not fit"):
        load_optimizer_tensors(optimizer, net, tensors)


@pytest.mark.parametrize("change", [{"b": torch.zeros(2)}, {"weight": torch.zeros(1, 3)}, {"weight": None}])
def test_weights_of_another_form_are_refused_and_change_nothing(change):
    """More, of a shape that would spread, or fewer."""
    net = nn.Linear(3, 2)
    before = {name: x.clone() for name, x in net.state_dict().items()}
    other = {name: x for name, x in ({name: x + 1 for name, x in before.items()} | change).items() if x is not None}
    with pytest.raises(ValueError, match="of run do not fit the model: 1"):
        assign(net, other, "run")
    assert all(torch.equal(x, before[name]) for name, x in net.state_dict().items())


def test_what_an_optimiser_keeps_beside_a_weight_has_a_shape_of_its_own():
    """Of moments in 8 bits the map of their codes and the largest of each block, of any type; and whole numbers."""
    net, optimizer = trained(1)
    beside = {
        "0.weight/qmap1": torch.rand(256),
        "0.weight/absmax1": torch.rand(2, dtype=torch.float64),
        "0.weight/step": torch.tensor(7),
    }
    load_optimizer_tensors(optimizer, net, dict(beside))
    state = optimizer.state[net[0].weight]
    assert all(torch.equal(state[key], beside[f"0.weight/{key}"]) for key in ("qmap1", "absmax1"))
    assert state["step"] == 7 and isinstance(state["step"], int)
