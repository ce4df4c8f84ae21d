"""Processes that would not compute the same are noticed before the first step."""

from importlib.metadata import version

import torch

from tests.training.runs import config_for, make_pictures
from training.alike import versions, weights_digest
from training.parallel import Ranks
from training.run import RunFolder
from training.trainer import Trainer


def test_processes_begin_alike_where_names_shapes_and_numbers_are_the_same():
    def digest(numbers, name="w"):
        return weights_digest(torch.nn.ParameterDict({name: torch.nn.Parameter(torch.tensor(numbers))}))

    found = [digest([1.0, 2.0]), digest([1.0, 3.0]), digest([[1.0, 2.0]]), digest([1.0, 2.0], "v")]
    assert len({*found}) == 4 and digest([1.0, 2.0]) == found[0]


def test_what_processes_have_alike_and_do_after_the_first(tmp_path, monkeypatch):
    """The index of the data is the first one's to make; tokenizers depend on captions, by which data are not known."""
    ranks, alike, order = Ranks(), [], []
    monkeypatch.setattr(ranks, "agree", lambda **values: alike.append(values))
    monkeypatch.setattr(ranks, "after_first", lambda make: order.append(type(found := make()).__name__) or found)
    for name, words in (("one", "red"), ("two", "blue")):
        folder = tmp_path / name
        make_pictures(folder, 12)
        for path in folder.glob("*.txt"):
            path.write_text(f"{words} picture of {words}")
        data = (f"data.source={folder}", "data.num_samples=none", "data.image_size=32", "training.out=run")
        config = config_for(tmp_path, *data)
        Trainer(config, RunFolder.create(tmp_path / f"{name}-run", config), ranks=ranks)
    assert order == ["FileSource"] * 2
    first, second = alike
    assert {name for name in first if first[name] != second[name]} == {"data.source", "tokenizer"}
    assert {"optimizer.lr", "weights", "weights of the autoencoder", "version of torch", "code of mmdit"} < first.keys()


def test_other_code_or_libraries_on_a_machine_are_noticed(tmp_path, monkeypatch):
    (tmp_path / "training").mkdir()
    monkeypatch.setattr("training.alike.__file__", str(tmp_path / "training" / "alike.py"))
    found = []
    for text in ("x = 1", "x = 2"):
        (tmp_path / "training" / "sharding.py").write_text(text)
        found.append(versions())
    assert {name for name in found[0] if found[0][name] != found[1][name]} == {"code of mmdit"}
    assert found[0]["version of torch"] == version("torch")
