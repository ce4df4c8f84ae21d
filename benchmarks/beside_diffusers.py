"""Our MMDiT and diffusers' transformer with the same weights, for benchmarks."""

import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from mmdit.config import MMDiTConfig
from mmdit.formats import config_to_diffusers, to_diffusers
from mmdit.model import MMDiT


def ours(config: MMDiTConfig, device: str = "cpu") -> MMDiT:
    """A model in which every part matters: modulations start at zero, and there a block would be the identity."""
    model = MMDiT(config).to(device)
    for parameter in model.parameters():
        if parameter.ndim == 1 or not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return model


def theirs(model: MMDiT) -> nn.Module:
    """diffusers' `SD3Transformer2DModel` with the weights of ours."""
    from diffusers import SD3Transformer2DModel

    with torch.device(model.device):
        other = SD3Transformer2DModel(**config_to_diffusers(model.config))
    other.load_state_dict(to_diffusers(model.state_dict(), model.config))
    return other


def inputs(c: MMDiTConfig, side: int, batch: int, num_text: int, device: str = "cpu") -> tuple[Tensor, ...]:
    """x_t of side x side tokens, t, context and pooled."""
    x = torch.randn(batch, c.in_channels, side * c.patch_size, side * c.patch_size, device=device)
    t = torch.rand(batch, device=device)
    context = torch.randn(batch, num_text, c.context_dim, device=device)
    return x, t, context, torch.randn(batch, c.pooled_dim, device=device)


def call_ours(model: nn.Module, x: Tensor, t: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
    return model(x, t, context, pooled)


def call_theirs(model: nn.Module, x: Tensor, t: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
    return model(x, context, pooled, t * 1000, return_dict=False)[0]


def medians(runs: dict[str, Callable[[], object]], repeats: int = 7, warm: int = 2) -> dict[str, float]:
    """Median seconds of each, run in turn, on the CPU."""
    for run in runs.values():
        for _ in range(warm):
            run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(each) for name, each in times.items()}


def machine() -> str:
    """The processor and torch, in words."""
    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            model = next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{model}, {torch.get_num_threads()} threads, torch {torch.__version__}"
