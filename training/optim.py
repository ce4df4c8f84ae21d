"""The optimisers, their learning-rate schedule, and the moving average of the weights.

AdamW (Loshchilov & Hutter 2019) with weight decay on matrices alone, or Muon (Jordan et al. 2024) for the matrices of
the blocks and AdamW for the rest. The rate at a step is a pure function of the step, so a resumed run needs no
scheduler state.
"""

import math
from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor, nn

from training.config import OptimizerConfig
from training.devices import pick_precision
from training.sharding import local, part_of, parted, whole

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


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """The optimiser that `config.name` says, over `parameter_groups`; AdamW in its fused form (CPU and CUDA)."""
    groups = parameter_groups(model, config.weight_decay)
    if config.name == "muon":
        inner = {id(p) for p in hidden_matrices(model)}
        decay = groups[0]["params"]
        groups[0]["params"] = [p for p in decay if id(p) not in inner]
        muon = {"params": [p for p in decay if id(p) in inner], "weight_decay": config.weight_decay, "muon": True}
        return Muon([muon, *groups], lr=config.lr, betas=config.betas, eps=config.eps, momentum=config.momentum)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


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
        updates = [whole(part_of(u, w)) for u, w in zip(updates, weights, strict=True)]
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

    Computed in bf16 where the hardware multiplies it natively; the rounding is far below that range.
    """
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    x = x.to(pick_precision("auto", x.device)).contiguous()
    for _ in range(rounds):
        s = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(s, s, s, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


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
    fast. Frozen parameters are left alone.
    """
    d = min(decay, (1 + step) / (10 + step))
    pairs = [(e, p) for e, p in zip(ema.parameters(), model.parameters(), strict=True) if p.requires_grad]
    averages = [local(e) for e, _ in pairs]
    torch._foreach_lerp_(averages, [local(p).to(e.device) for e, p in pairs], 1 - d)
