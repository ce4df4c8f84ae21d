"""The optimisers by name, and their learning-rate schedule.

AdamW (Loshchilov & Hutter 2019) with weight decay on matrices alone; Muon (Jordan et al. 2024) for the matrices of the
blocks and AdamW for the rest; schedule-free AdamW (Defazio et al. 2024, arXiv 2405.15682), by its authors' library;
AdamW with its moments in 8 bits (Dettmers et al. 2021, arXiv 2110.02861), by theirs. The rate at a step is a pure
function of the step, so a resumed run needs no scheduler state.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from training.config import OptimizerConfig
from training.devices import multiplies_bf16
from training.mup import rate_scales
from training.sharding import as_part, local, parted, whole

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Jordan's quintic: brings singular values of (0, 1] near 1 in 5 rounds
MATCH_RMS = 0.2  # of AdamW's usual updates (Liu et al. 2025, arXiv 2502.16982, section 2.2)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups: matrices of linear and convolution layers decay; biases, norms and embedding tables do not."""
    tables = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    decay: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            (decay if parameter.ndim >= 2 and id(parameter) not in tables else rest).append(parameter)
    return [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimiser that `config.name` says, over `parameter_groups`; AdamW in its fused form (CPU and CUDA).

    With `config.base_width`, rates are those of muP, see mup.py. Raises ValueError where the optimiser's library is not
    there, or cannot run on the model's device.
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
        return Muon(groups, **how, momentum=config.momentum)
    if config.name == "schedule-free":
        return _schedule_free(groups, how)
    if config.name == "adamw-8bit":
        return _adamw_8bit(groups, how, next(model.parameters()).device)
    return torch.optim.AdamW(groups, **how, fused=True)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The rate of the next step, for each group times its own scale."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)


def _by_scale(group: dict, scales: Mapping[int, float]) -> Iterable[dict]:
    """A group in parts of one scale; decay, which is multiplied by the rate, stays what it was in all.

    Muon's steps are of norm sqrt(width) where AdamW's grow as the width: the root of AdamW's scale makes up for it.
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
    optimizer: Any = AdamWScheduleFree(groups, **how)
    optimizer.train()  # and so it stays: ema.py computes the averages aside
    return optimizer  # type: ignore[no-any-return]


def _adamw_8bit(groups: list[dict], how: dict[str, Any], device: torch.device) -> torch.optim.Optimizer:
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ValueError(
            "optimizer.name is \"adamw-8bit\", which needs a library: pip install 'mmdit[bitsandbytes]'"
        ) from error
    probe = nn.Parameter(torch.zeros(4096, device=device))  # the least that it keeps in 8 bits
    probe.grad = torch.zeros_like(probe)
    try:
        AdamW8bit([probe]).step()
    except Exception as error:  # which one depends on the library's version and on how it was built
        raise ValueError(
            f'optimizer.name "adamw-8bit" cannot run here: bitsandbytes has no such step on {device.type} '
            f"({type(error).__name__}: {error}); take adamw, or a CUDA device"
        ) from error
    return AdamW8bit(groups, **how)  # type: ignore[no-any-return]


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """Weights of the linear layers inside stacks of blocks: not those that lead into the model or out of it."""
    stacks = [stack for stack in model.modules() if isinstance(stack, nn.ModuleList)]
    linear = {m: None for stack in stacks for m in stack.modules() if isinstance(m, nn.Linear)}
    return [m.weight for m in linear if m.weight.requires_grad]  # type: ignore[misc]


class Muon(torch.optim.AdamW):
    """AdamW, but for groups with `"muon": True`: there the step is the momentum, made orthogonal.

        m = b m + (1 - b) g       u = U V^T of the SVD of (1 - b) g + b m       w = (1 - lr wd) w - 0.2 lr sqrt(side) u

    with `side` the longer one (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon, with Nesterov's momentum;
    the scale of Liu et al. 2025, arXiv 2502.16982, which makes AdamW's rate fit). U V^T is found by five Newton-Schulz
    rounds, for all matrices of one shape at a time. A matrix that stacks several square ones (queries, keys and values;
    modulations) counts as those.
    """

    def __init__(
        self, groups: list[dict], lr: float, betas: tuple[float, float], eps: float, momentum: float = 0.95
    ) -> None:
        super().__init__(groups, lr=lr, betas=betas, eps=eps, fused=True)
        self.momentum = momentum

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        groups = self.param_groups
        try:
            self.param_groups = [group for group in groups if not group.get("muon")]
            super().step()
        finally:
            self.param_groups = groups
        for group in groups:
            if group.get("muon"):
                self._step([p for p in group["params"] if p.grad is not None], group["lr"], group["weight_decay"])

    def _step(self, weights: list[Tensor], lr: float, weight_decay: float) -> None:
        if not weights:
            return
        for w in weights:
            if not self.state[w]:
                self.state[w]["momentum"] = torch.zeros_like(w)
        momenta = [local(self.state[w]["momentum"]) for w in weights]
        gradients = [local(w.grad) for w in weights if w.grad is not None]
        torch._foreach_lerp_(momenta, gradients, 1 - self.momentum)
        updates = list(torch._foreach_lerp(gradients, momenta, self.momentum))
        own = [local(w) for w in weights]
        torch._foreach_mul_(own, 1 - lr * weight_decay)
        # Of a model in parts every process gathers the updates, makes them orthogonal and takes its part.
        updates = [whole(as_part(u, w)) for u, w in zip(updates, weights, strict=True)]
        by_shape: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
        for u in updates:
            for part in _parts(u):
                by_shape[part.shape].append(part)  # type: ignore[index]
        scales = [-lr * MATCH_RMS * math.sqrt(max(_parts(u)[0].shape)) for u in updates]
        for parts in by_shape.values():
            torch._foreach_copy_(parts, list(newton_schulz(torch.stack(parts)).to(parts[0].dtype)))
        torch._foreach_mul_(updates, scales)
        torch._foreach_add_(own, [local(parted(u, w)) for u, w in zip(updates, weights, strict=True)])


def _parts(matrix: Tensor) -> list[Tensor]:
    """The square matrices (views) that a tall one of whole multiples stacks, or itself; an MLP's 4 D x D is one."""
    rows, columns = matrix.shape
    return list(matrix.split(columns)) if rows in (2 * columns, 3 * columns, 6 * columns, 9 * columns) else [matrix]


def newton_schulz(matrices: Tensor, rounds: int = 5) -> Tensor:
    """Nearly U V^T of the singular value decompositions of matrices (n, rows, columns): singular values 0.7 to 1.2.

    Computed in bf16 where the hardware multiplies it; the rounding is far below that range.
    """
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    x = x.to(torch.bfloat16 if multiplies_bf16(x.device) else torch.float32).contiguous()
    for _ in range(rounds):
        s = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(s, s, s, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def learning_rate(config: OptimizerConfig, num_steps: int) -> Callable[[int], float]:
    """The rate at step k (0-based): linear warm-up over `warmup_steps`, then the schedule down to lr *
    final_lr_fraction.

    "wsd" (warm-up, stable, decay; MiniCPM, Hu et al. 2024, arXiv 2404.06395) holds lr, and in the last `decay_fraction`
    of the run, as far as it is after warm-up, falls in a straight line.
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
