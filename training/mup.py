"""Learning rates and initial weights that transfer across widths: muP (Yang et al. 2022, Tensor Programs V, arXiv
2203.03466, table 3).

A trunk of `base_width` is not changed by it. In a trunk r times as wide, with Adam,

    matrix from width to width:   rate / r,   initial variance as 1 / r
    matrix from width to a fixed size (output layers, the head):   rate / r,   initial variance as 1 / r^2
    matrix from a fixed size to width, biases, gains, embeddings:   as in the trunk of base_width

so that activations change by as much in a step, and the best rate of a narrow trunk is best in a wide one too. A wider
trunk has more heads of the same width, so the attention's scale stays. The learned text encoder keeps its width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from mmdit.weights_io import whole
from training.sharding import local


def fan_ratios(trunk: Any, base_width: int) -> dict[str, tuple[float, float]]:
    """(fan-in, fan-out) of each linear or convolution weight over those of a trunk of `base_width`, where they differ.

    Raises ValueError where heads do not divide `base_width`.
    """
    with torch.device("meta"):
        base = _of_width(trunk, base_width)
    found = {}
    for name, weight in _matrices(trunk).items():
        small = base.get_parameter(name)
        ratio = (weight.shape[1:].numel() / small.shape[1:].numel(), weight.shape[0] / small.shape[0])
        if ratio != (1, 1):
            found[name] = ratio
    return found


def rate_scales(trunk: Any, base_width: int) -> dict[int, float]:
    """The factor on the learning rate by id of the parameter; parameters that are missing keep their rate."""
    ratios = fan_ratios(trunk, base_width)
    return {id(trunk.get_parameter(name)): 1 / fan_in for name, (fan_in, _) in ratios.items() if fan_in != 1}


@torch.no_grad()
def scale_start(trunk: Any, base_width: int) -> None:
    """Scale initial weights from their size in a trunk of `base_width`, by the table above; zeros stay. The trunk
    may be sharded: then all processes call it.
    """
    with torch.random.fork_rng(devices=[]):
        base = _of_width(trunk, base_width)
    for name, (fan_in, fan_out) in fan_ratios(trunk, base_width).items():
        weight, size = trunk.get_parameter(name), base.get_parameter(name).square().mean().sqrt()
        wanted = size * (fan_in**-0.5 if fan_out != 1 else 1 / fan_in)
        if size:
            local(weight).mul_(wanted / whole(weight).cpu().square().mean().sqrt())


def _matrices(trunk: nn.Module) -> dict[str, nn.Parameter]:
    layers = {name: m for name, m in trunk.named_modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.ConvTranspose2d)}
    return {f"{name}.weight": m.weight for name, m in layers.items()}  # type: ignore[misc]


def _of_width(trunk: Any, base_width: int) -> Any:
    """A fresh trunk of the same config, but of that width."""
    heads, rest = divmod(base_width, trunk.config.head_dim)
    if rest or not heads:
        raise ValueError(
            f"optimizer.base_width is {base_width}, expected a multiple of model.head_dim = {trunk.config.head_dim}"
        )
    return type(trunk)(replace(trunk.config, num_heads=heads))
