"""The optimiser, its learning-rate schedule, and the moving average of the weights.

AdamW (Loshchilov & Hutter 2019) with weight decay on matrices alone; the rate at a step is a pure function of the
step, so a resumed run needs no scheduler state.
"""

import math
from collections.abc import Callable

import torch
from torch import nn

from training.config import OptimizerConfig


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups: matrices of linear and convolution layers decay; biases, norms and embedding tables do not."""
    tables = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    decay: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            (decay if parameter.ndim >= 2 and id(parameter) not in tables else rest).append(parameter)
    return [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`, in the fused form (one kernel for all tensors, on CPU and CUDA)."""
    groups = parameter_groups(model, config.weight_decay)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def learning_rate(config: OptimizerConfig, num_steps: int) -> Callable[[int], float]:
    """The rate at step k (0-based): linear warm-up over `warmup_steps`, then the schedule down to lr *
    final_lr_fraction.
    """

    def rate(step: int) -> float:
        if step < config.warmup_steps:
            return config.lr * (step + 1) / config.warmup_steps
        progress = min(1.0, (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps))
        shape = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}
        return config.lr * (config.final_lr_fraction + (1 - config.final_lr_fraction) * shape[config.schedule])

    return rate


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """ema += (1 - d) (model - ema), with d = min(decay, (1 + step) / (10 + step)) so that early weights are forgotten
    fast.
    """
    d = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), [p.detach() for p in model.parameters()], 1 - d)
