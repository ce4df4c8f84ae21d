"""The optimisers by name, and their learning-rate schedule.

AdamW (Loshchilov & Hutter 2019) with weight decay on matrices alone; Muon (muon.py) for the matrices of the blocks and
AdamW for the rest; schedule-free AdamW (Defazio et al. 2024, arXiv 2405.15682), by its authors' library;
AdamW with its moments in 8 bits (Dettmers et al. 2021, arXiv 2110.02861), by theirs. The rate at a step is a pure
function of the step, so a resumed run needs no scheduler state.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from training.config import OptimizerConfig
from training.muon import Muon
from training.mup import rate_scales


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups: matrices of linear and convolution layers decay; biases, norms and embedding tables do not."""
    tables = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    decay: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            (decay if parameter.ndim >= 2 and id(parameter) not in tables else rest).append(parameter)
    return [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]


def make_optimizer(model: nn.Module, config: OptimizerConfig, replicas: Any = None) -> torch.optim.Optimizer:
    """The optimiser that `config.name` says, over `parameter_groups`; AdamW in its fused form (CPU and CUDA).

    With `config.base_width`, rates are those of muP, see mup.py. replicas: the process group that holds the same model,
    for Muon to share its work. Raises ValueError where the optimiser's library is missing, or cannot run on the model's
    device.
    """
    groups = parameter_groups(model, config.weight_decay)
    if config.name == "muon":
        inner = {id(p) for p in hidden_matrices(model)}
        decay = groups[0]["params"]
        groups[0]["params"] = [p for p in decay if id(p) not in inner]
        muon = {"params": [p for p in decay if id(p) in inner], "weight_decay": config.weight_decay, "muon": True}
        groups = [muon, *groups]
    if config.base_width is not None:
        scales = rate_scales(model.transformer, config.base_width)
        groups = [part for group in groups for part in _by_scale(group, scales)]
    how: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    if config.name == "muon":
        return Muon(groups, **how, momentum=config.momentum, replicas=replicas)
    if config.name == "schedule-free":
        return _schedule_free(groups, how)
    if config.name == "adamw-8bit":
        return _adamw_8bit(groups, how, next(model.parameters()).device)
    return torch.optim.AdamW(groups, **how, fused=True)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of the next step: `rate` times each group's own scale."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)


def _by_scale(group: dict, scales: Mapping[int, float]) -> Iterable[dict]:
    """A group divided by muP's scales. Weight decay, which is multiplied by the rate, is divided by the scale.

    Muon's steps have a norm of sqrt(width), AdamW's grow as the width: for Muon the scale is the root of AdamW's.
    """
    parts: dict[float, list[nn.Parameter]] = defaultdict(list)
    for p in group["params"]:
        scale = scales.get(id(p), 1.0)
        parts[math.sqrt(scale) if group.get("muon") else scale].append(p)
    for scale, params in parts.items():
        yield {**group, "params": params, "lr_scale": scale, "weight_decay": group["weight_decay"] / scale}


def _schedule_free(groups: list[dict], how: dict[str, Any]) -> torch.optim.Optimizer:
    try:
        from schedulefree import AdamWScheduleFree
    except ImportError as error:
        raise ValueError(
            "optimizer.name is \"schedule-free\", which needs a library: pip install 'mmdit[schedulefree]'"
        ) from error
    optimizer = AdamWScheduleFree(groups, **how)
    optimizer.train()  # for good: ema.py computes the average by itself
    return optimizer


def _adamw_8bit(groups: list[dict], how: dict[str, Any], device: torch.device) -> torch.optim.Optimizer:
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ValueError(
            "optimizer.name is \"adamw-8bit\", which needs a library: pip install 'mmdit[bitsandbytes]'"
        ) from error
    probe = nn.Parameter(torch.zeros(4096, device=device))  # the smallest that has 8-bit moments
    probe.grad = torch.zeros_like(probe)
    try:
        AdamW8bit([probe]).step()
    except Exception as error:  # which one depends on the library's version and on how it was built
        raise ValueError(
            f'optimizer.name "adamw-8bit" cannot run here: bitsandbytes has no such step on {device.type} '
            f"({type(error).__name__}: {error}); take adamw, or a CUDA device"
        ) from error
    return AdamW8bit(groups, **how)


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """Weights of the linear layers within blocks, not of those at the model's input and output."""
    stacks = [stack for stack in model.modules() if isinstance(stack, nn.ModuleList)]
    linear = {m: None for stack in stacks for m in stack.modules() if isinstance(m, nn.Linear)}
    return [m.weight for m in linear if m.weight.requires_grad]  # type: ignore[misc]


def learning_rate(config: OptimizerConfig, num_steps: int) -> Callable[[int], float]:
    """The rate at step k (0-based): linear warm-up over `warmup_steps`, then the schedule down to lr *
    final_lr_fraction.

    "wsd" (warm-up, stable, decay; MiniCPM, Hu et al. 2024, arXiv 2404.06395) holds lr, and falls linearly in the last
    `decay_fraction` of the run, or from the end of warm-up if that is later.
    """

    def rate(step: int) -> float:
        if step < config.warmup_steps:
            return config.lr * (step + 1) / config.warmup_steps
        left = max(0, num_steps - step)
        progress = 1 - left / max(1, num_steps - config.warmup_steps) if left else 1.0
        decaying = min(num_steps - config.warmup_steps, round(config.decay_fraction * num_steps))
        shape = {
            "constant": 1.0,
            "linear": 1 - progress,
            "cosine": (1 + math.cos(math.pi * progress)) / 2,
            "wsd": min(1.0, left / max(1, decaying)),
        }
        return config.lr * (config.final_lr_fraction + (1 - config.final_lr_fraction) * shape[config.schedule])

    return rate


def warmup_warning(warmup_steps: int, num_steps: int) -> str | None:
    """A warning of a run that ends within its warm-up; None for one that does not."""
    if warmup_steps < num_steps:
        return None
    return f"the learning rate warms up for the whole run: warmup_steps = {warmup_steps}, num_steps = {num_steps}"
