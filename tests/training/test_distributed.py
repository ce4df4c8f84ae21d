"""Two processes (gloo, CPU) compute what one does, to rounding; and what either saved, the other goes on from."""

import json
import shutil
import socket
from pathlib import Path

import pytest
import torch

import mmdit
import training
from mmdit.weights_io import read_weights
from tests.mmdit.test_language_models import language_model
from tests.mmdit.tiny_sd3 import t5, t5_tokenizer
from tests.training.pictures import folder_of, members
from tests.training.processes import free_port, together
from tests.training.runs import TRANSFUSION, config_for, metrics
from tests.training.test_mixed_sizes import SIZES
from tests.training.tiny_networks import save_dino
from training.checkpoint import list_checkpoints, read_checkpoint, verify
from training.config import load_config
from training.ema import snapshots
from training.run import RunFolder
from training.trainer import Trainer

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent
SAME = ("training.num_steps=4", "training.checkpoint_every=2", "training.grad_accumulation=2", "training.batch_size=8")
MUON = ("optimizer.name=muon", "optimizer.grad_clip=0.1")
FSDP, DDP = "parallel.strategy=fsdp", "parallel.strategy=ddp"


TOLD = """
import os, threading, time, torch
from pathlib import Path
from training.config import load_config
from training.parallel import ToldByFirst, ranks_of

def fail():
    raise KeyboardInterrupt("no room")

with ranks_of(load_config("pixels-tiny", ["training.device=cpu"])) as ranks:
    own = torch.tensor([1.0, ranks.rank])
    print([ranks.any(ranks.rank == 1), ranks.any(False), ranks.mean(own).tolist(), ranks.sum(own).tolist()])
    print(own[1].item() == ranks.rank, ranks.gather(ranks.rank), ranks.from_first(lambda: f"made by {ranks.rank}"))
    beside, heard = ranks.with_own_group(), []
    tell = lambda group: heard.append(group.gather(group is beside))
    calls = [threading.Thread(target=tell, args=[group]) for group in (ranks, beside)]
    for call in calls[:: 1 if ranks.first else -1]:  # the other way round in the other process
        call.start()
        time.sleep(1)
    for call in calls:
        call.join()
    print(sorted(heard))
    here = Path(f"kept-{os.environ['MASTER_PORT']}")
    def look():
        return here.exists(), here.touch()
    print("Kept", ranks.after_first(look)[0] != ranks.first)
    alone, both = ranks.group_among([[0], [1]]), torch.distributed.group.WORLD
    groups = [group._get_backend(torch.device("cpu")) for group in (both, ranks.group, beside.group, alone)]
    print("Timeouts", alone.size(), {int(group.options._timeout.total_seconds()) for group in groups})
    disagree = lambda: ranks.agree(seed=3, data=ranks.rank)
    for wrong in (lambda: ranks.from_first(fail), lambda: ranks.after_first(fail), disagree):
        try:
            wrong()
        except (KeyboardInterrupt, ToldByFirst, ValueError) as error:
            print(repr(error))
"""


BEGUN = """
import json, os, sys, torch
from training.config import ConfigError, load_config
from training.parallel import ranks_of
from training.run import RunFolder
from training.start import fill_weights
from training.trainer import Trainer

for port, settings in json.loads(sys.argv[1]):
    os.environ["MASTER_PORT"] = str(port)
    config = load_config("pixels-tiny", settings)
    with ranks_of(config) as ranks:
        run = RunFolder(ranks.from_first(lambda: RunFolder.create(config.run_folder, config).path), ranks.rank)
        trunk = Trainer(config, run, ranks=ranks).model.transformer
        print("then", torch.rand(2).tolist(), flush=True)
        torch.manual_seed(ranks.rank)
        name, x = next(iter(trunk.state_dict().items()))
        for given in ({}, {name: torch.full(x.shape, 1.0 * ranks.rank)}):
            try:
                fill_weights(trunk, given, None, ranks)
            except ConfigError as error:
                print(error)
            torch.manual_seed(0)
"""


def begun(world: int, *settings: list[str]) -> tuple[list[list[str]], list[str]]:
    """Runs that `world` processes begin one after another: of each process two random numbers after each, and all that
    it says.
    """
    said = together(world, "-c", BEGUN, json.dumps([[free_port(), own] for own in settings]))
    return [[part.splitlines()[0] for part in text.split("then ")[1:]] for text in said], said


def begin(*settings: str) -> str:
    """A run that one process begins, here: two random numbers after it."""
    config = load_config("pixels-tiny", [*settings])
    Trainer(config, RunFolder.create(config.run_folder, config))
    return str(torch.rand(2).tolist())


def assert_same_pipeline(run: Path, other: Path) -> None:
    one, parts = ({path.relative_to(folder): path.read_bytes() for path in (folder / "pipeline").rglob("*.*")}
                  for folder in (run, other))  # fmt: skip
    assert len(one) > 3 and [str(file) for file, data in one.items() if parts.get(file) != data] == []


def trained(*jobs: tuple[Path | None, list[str]], world: int = 2) -> None:
    """Do (run to resume or None, settings) after each other on `world` processes; all have to succeed."""
    told = json.dumps([[free_port(), str(resume) if resume else None, list(settings)] for resume, settings in jobs])
    together(world, HERE / "two_processes.py", told)


def settings(out: Path, *overrides: str) -> list[str]:
    quiet = ("training.sample_every=0", "training.validate_every=0", "evaluation.prompts_per_question=0")
    return [*quiet, "training.precision=fp32", f"training.out={out}", *overrides]


def test_what_processes_tell_each_other():
    """Each its own, all alike, or the first alone; beside each other where two threads do so; and what is wrong."""
    said = [[line for line in text.splitlines() if line[:1] in "[TKC"] for text in together(2, "-c", TOLD)]
    told = [
        "Kept True",
        "Timeouts 1 {1800}",
        "[True, False, [1.0, 0.5], [2.0, 1.0]]",
        "True [0, 1] made by 0",
        "[[False, False], [True, True]]",
    ]
    host = socket.gethostname()
    disagree = f"ConfigError('process 1 on {host} has other data than process 0 on {host}: start all alike')"
    for lines, error in zip(said, ("KeyboardInterrupt('no room')", "ToldByFirst(2)"), strict=True):
        assert sorted(lines) == sorted([*told, error, error, disagree])


@pytest.mark.parametrize("way", [(FSDP,), ("parallel.strategy=hsdp", "parallel.shard_size=2")], ids=["fsdp", "hsdp"])
def test_processes_draw_the_parts_of_what_one_draws(way, tmp_path):
    """Bit for bit, in the first pipeline, where their number does not divide that of rows; and all that comes after."""
    own = ("model.num_heads=4", "optimizer.base_width=16", "training.batch_size=12")
    world = 3 if way == (FSDP,) else 4
    then, said = begun(world, settings(tmp_path / "parts", *own, *way))
    assert then == [[begin(*settings(tmp_path / "one", *own))]] * world
    assert all(text.count("has other weights than process 0") == 2 for text in said)
    assert_same_pipeline(tmp_path / "one", tmp_path / "parts")


def test_processes_begin_with_the_parts_of_the_weights_that_one_begins_with(tmp_path):
    """Of another run with norms added, with layers drawn for another text encoder, or with adapters; in half precision
    and diffusers' form; of a language model with fewer words, and of an image model beside it.
    """
    tokenizer = t5_tokenizer()
    t5(tokenizer, 32).save_pretrained(tmp_path / "t5")
    tokenizer.save_pretrained(tmp_path / "t5")
    language_model("llama", tmp_path / "words", hidden_size=32, num_attention_heads=2)
    begin(*settings(tmp_path / "base", "model.qk_norm=none"))
    mmdit.save(mmdit.load(tmp_path / "base").bfloat16(), tmp_path / "half", "diffusers")
    base, mixed = f"init={tmp_path / 'base'}", (*TRANSFUSION, "transfusion.weights=separate", "transfusion.time=image")
    both = f"init=['{tmp_path / 'words'}', '{tmp_path / 'base'}']"
    starts = {
        "drawn": (base, f"text.encoder={tmp_path / 't5'}"),
        "adapters": (base, "lora.rank=2"),
        "diffusers": (f"init={tmp_path / 'half'}", "seed=1"),
        "mixed": (both, *mixed, "model.qk_norm=none"),
    }
    ways = [settings(tmp_path / f"{name}-parts", *own, FSDP) for name, own in starts.items()]
    expected = [begin(*settings(tmp_path / name, *own)) for name, own in starts.items()]
    then, said = begun(2, *ways)
    assert then == [expected] * 2
    for name in starts:
        assert_same_pipeline(tmp_path / name, tmp_path / f"{name}-parts")


@pytest.fixture(scope="module", autouse=True)
def exact():
    """Muon's rounds in fp32, as two_processes.py has them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.muon.multiplies_bf16", lambda device: False)
        yield


@pytest.fixture(scope="module")
def runs(exact, tmp_path_factory, words):
    """Each model trained by one process, and by two in the ways there are."""
    root = tmp_path_factory.mktemp("runs")
    text = (*TRANSFUSION, f"transfusion.text={words}", "transfusion.text_fraction=0.5", "transfusion.caption_first=0.5")
    tokenizer = t5_tokenizer()
    t5(tokenizer, 32).save_pretrained(root / "t5")
    tokenizer.save_pretrained(root / "t5")
    network, count = f"evaluation.features={save_dino(root / 'dino')}", "evaluation.num_images=8"
    scores = ('evaluation.metrics=["fid", "kid"]', "evaluation.metrics_every=2", network, count)
    models = {
        "image": (*SAME, *MUON, *scores, f"evaluation.cache={root / 'cache'}"),
        "mixed": (*SAME, *text),
        "silent": (*SAME, *TRANSFUSION, "transfusion.caption_first=1", "objective.caption_dropout=0.9"),
        "frozen": (*SAME, f"text.encoder={root / 't5'}"),
        "half": (*SAME, "training.precision=bf16"),
        "mixedhalf": (*SAME, *TRANSFUSION, "training.precision=bf16"),
        "sizes": (*SAME, "training.packing=true", "data.buckets=own", "data.image_size=32", "data.num_samples=none",
                  f"data.source={folder_of(root / 'pictures', members(range(40), SIZES))}"),
    }  # fmt: skip
    ways = {
        "image-ddp": (DDP,),
        "image-fsdp": (FSDP, "training.recompute=selective", "training.validate_every=2", "training.sample_every=2"),
        "image-hsdp": ("parallel.strategy=hsdp", "parallel.shard_size=1", "parallel.reshard=false"),
        "mixed-ddp": ("parallel.strategy=auto",),
        "mixed-fsdp": (FSDP, "training.sample_every=4", "training.async_checkpoint=true"),
        "silent-ddp": (DDP,),
        "silent-fsdp": (FSDP,),
        "frozen-fsdp": (FSDP, "training.recompute=full", "training.recompute_every=2", "training.packing=true"),
        "half-fsdp": (FSDP,),
        "mixedhalf-fsdp": (FSDP,),
        "sizes-ddp": (DDP,),
        "sizes-fsdp": (FSDP, "training.recompute=selective"),
    }
    for name, own in models.items():
        training.train(config_for(root / name, *own, "training.validate_every=2"))
    trained(*((None, settings(root / name, *models[name.split("-")[0]], *own)) for name, own in ways.items()))
    return root


def close(run: Path, other: Path, rtol: float = 1e-4, atol: float = 1e-5) -> None:
    """Alike in the losses and gradients of all steps, in the last checkpoint and in the pipeline."""
    for name in ("loss", "grad_norm", "lr"):
        assert dict(metrics(run, name)) == pytest.approx(dict(metrics(other, name)), rel=rtol)
    (_, a), (_, b) = (read_checkpoint(list_checkpoints(path)[-1]) for path in (run, other))
    assert {group: x.keys() for group, x in a.items()} == {group: x.keys() for group, x in b.items()}
    for group, tensors in a.items():
        assert [name for name, x in tensors.items() if not torch.allclose(x, b[group][name], rtol, atol)] == [], group
    weights = [read_weights(path / "pipeline" / "transformer" / "model.safetensors") for path in (run, other)]
    assert all(torch.allclose(x, weights[1][name], rtol, atol) for name, x in weights[0].items())


WAYS = ["image-ddp", "image-fsdp", "image-hsdp", "mixed-ddp", "mixed-fsdp", "silent-ddp", "silent-fsdp", "frozen-fsdp"]
WAYS += ["sizes-ddp", "sizes-fsdp"]


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_train_what_one_does(runs, way):
    close(runs / way, runs / way.split("-")[0])


@pytest.mark.parametrize("model", ["half", "mixedhalf"])
def test_in_bf16_parts_differ_from_the_whole_in_rounding_alone(runs, model):
    """Blocks are gathered in bf16, biases and norms too, which autocast leaves for the most part."""
    parts, whole = (dict(metrics(runs / name, "loss")) for name in (f"{model}-fsdp", model))
    assert parts == pytest.approx(whole, rel=2e-3)


def test_the_first_process_writes_for_all(runs):
    for way in ("image-ddp", "image-fsdp"):
        steps = [step for step, _ in metrics(runs / way, "loss")]
        assert steps == [1, 2, 3, 4]
        assert (runs / way / "log.txt").read_text().count("computing on cpu") == 1
    assert metrics(runs / "image-fsdp", "validation_loss") == [
        (step, pytest.approx(value, rel=1e-4)) for step, value in metrics(runs / "image", "validation_loss")
    ]
    assert sorted(path.name for path in (runs / "image-fsdp" / "samples").iterdir()) == [
        "step-00000002.png",
        "step-00000004.png",
    ]


@pytest.mark.parametrize("way", ["image-ddp", "image-fsdp", "image-hsdp"])
def test_pictures_are_scored_on_the_way_as_by_one_process(runs, way):
    for name in ("fid", "kid"):
        several, alone = (metrics(runs / path, name) for path in (way, "image"))
        assert several == [(2, pytest.approx(alone[0][1], rel=1e-3))] and len(alone) == 2  # the last when all is done


@pytest.mark.parametrize("way", ["image-fsdp", "mixed-fsdp"])
def test_parts_are_plain_weights_for_everyone_else(runs, way):
    folder = list_checkpoints(runs / way)[-1]
    assert sorted(path.name.split("-model-")[0] for path in folder.glob("*.safetensors")) == [
        "shard-00001",
        "shard-00002",
    ]
    assert not [path for path in folder.iterdir() if path.suffix not in (".safetensors", ".json")]
    assert {*verify(folder)["files"]} == {path.name for path in folder.glob("*.safetensors")}
    pipe = mmdit.TextToImage.load(runs / way, "cpu")
    assert pipe("a red circle")[0].size == (32, 32)


def test_each_process_holds_half(runs):
    """Bytes of weights, average and optimiser's state in the files that each process wrote of what it holds."""
    parts = [path.stat().st_size for path in list_checkpoints(runs / "image-fsdp")[-1].glob("shard-*.safetensors")]
    whole = sum(path.stat().st_size for path in list_checkpoints(runs / "image-ddp")[-1].glob("*.safetensors"))
    assert all(0.45 * whole < size < 0.65 * whole for size in parts)


def test_snapshots_of_averages_are_those_of_one_process(tmp_path):
    own = (*SAME, "training.ema=power", "training.ema_snapshot_every=2", "training.ema_snapshot_dtype=bf16")
    training.train(config_for(tmp_path / "one", *own))
    ways = {"ddp": DDP, "fsdp": FSDP}
    trained(*((None, settings(tmp_path / name, *own, way)) for name, way in ways.items()))
    for step, width, path in snapshots(tmp_path / "one"):
        alone = read_weights(path)
        for name in ways:
            parts = read_weights(tmp_path / name / "ema" / path.name)
            assert parts.keys() == alone.keys() and len(snapshots(tmp_path / name)) == 4, (name, step, width)
            for key, x in alone.items():
                torch.testing.assert_close(parts[key], x, rtol=1e-2, atol=1e-5)


def test_runs_go_on_with_another_number_of_processes(runs, tmp_path):
    """From parts and from a whole, to parts and to one process: the losses that follow are those of the whole run."""
    starts = {name: tmp_path / name for name in ("one-to-fsdp", "ddp-to-fsdp", "fsdp-to-ddp", "fsdp-to-one")}
    sources = {"one": "image", "ddp": "image-ddp", "fsdp": "image-fsdp"}
    for name, path in starts.items():
        shutil.copytree(runs / sources[name.split("-")[0]], path)
        shutil.rmtree(list_checkpoints(path)[-1])  # of step 4: that of step 2 is left
    how = {"fsdp": [FSDP, "training.sample_every=0"], "ddp": [DDP, "training.sample_every=0"]}
    trained(*((path, how[name.split("-")[2]]) for name, path in starts.items() if not name.endswith("one")))
    training.resume(starts["fsdp-to-one"], ["parallel.strategy=auto", "training.sample_every=0"])
    for path in starts.values():
        assert "resumed at step 2" in (path / "log.txt").read_text()
        close(path, runs / "image")
