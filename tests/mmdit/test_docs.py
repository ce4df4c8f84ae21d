"""The page on text and images: its examples run, and its picture of the mask is the mask."""

import re
from pathlib import Path

import torch

from mmdit import pack

PAGE = (Path(__file__).parents[2] / "docs" / "transfusion.md").read_text()


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
