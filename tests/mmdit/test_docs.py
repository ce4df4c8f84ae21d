"""Pages on text and images, and on weights: their examples run, and the picture of the mask is the mask."""

import re
from pathlib import Path

import torch

from mmdit import pack

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "transfusion.md").read_text()


def test_the_examples_run():
    names: dict = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(block, names)
    assert names["first"].logits.shape == (8, 512) and names["first"].v[0].shape == (16, 8, 8)
    assert names["written"].parts[0].shape == (16, 8, 8)


def test_the_picture_is_the_mask():
    [picture] = re.findall(r"```\n(  t.*?)\n```", PAGE, re.DOTALL)
    batch = pack([[torch.tensor([7, 8]), torch.zeros(1, 2, 2), torch.tensor([9])]])
    assert batch.layout(1).picture() == picture


def test_the_example_on_weights_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    [block] = re.findall(r"```python\n(.*?)```", (DOCS / "formats.md").read_text(), re.DOTALL)
    exec(block, names)
    assert names["half"].dtype == torch.bfloat16 and names["half"].config == names["model"].config
