"""Where to compute, in which precision, compiled or not, and how repeatably."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from mmdit.attention import attention_backend, in_one_call
from mmdit.blocks import allow_graphs
from training.config import TrainConfig

COMPILE_MIN_STEPS = 1000  # "auto" compiles runs of at least so many steps: compiling takes as long as 150 on a CPU


def pick_device(name: str) -> torch.device:
    """The device called "cpu", "cuda" or "mps" (the GPU of a Mac); "auto" is CUDA if present, else the CPU.

    Raises ValueError for one that is not there.
    """
    if name == "auto":
        name = "cuda" if available("cuda") else "cpu"
    if not available(name):
        raise ValueError(f"device {name} is asked for, but this torch sees no {name.upper()} device: use cpu or auto")
    return torch.device(name)


def available(name: str) -> bool:
    """Whether this torch sees a device of this kind."""
    return name == "cpu" or bool(torch.get_device_module(name).is_available())


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies matrices of bf16, and so quicker than those of fp32.

    On a CPU that is AMX, or AVX-512 with bf16: without them bf16 is emulated, several times slower than fp32.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(False)
    if device.type == "mps":
        return False
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """The type of matrix products that a config names; "auto" takes bf16 where the hardware multiplies it natively."""
    if name == "fp16":
        return torch.float16
    native = multiplies_bf16(device)
    return torch.bfloat16 if name == "bf16" or (name == "auto" and native) else torch.float32


def compiled(
    model: Any, config: TrainConfig, device: torch.device, log: Callable[[str], None], blocks_alone: bool = False
) -> Any:
    """The model, compiled where the config asks for it and there is a compiler. blocks_alone: compile each block by
    itself, as DDP and FSDP2 need it.
    """
    asked = config.training
    gains = asked.num_steps >= COMPILE_MIN_STEPS and device.type != "mps"  # for which torch's compiler is a prototype
    wanted = asked.compile == "on" or (asked.compile == "auto" and gains)
    if not wanted:
        return model
    if asked.compile == "auto" and device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        log("no C++ compiler found: the model runs uncompiled, a little slower")
        return model
    broken = asked.packing and not _packs_in_one_call(model, config, device)
    if broken and asked.recompute == "selective":
        log(
            'warning: blocks that are recomputed (training.recompute = "selective") run uncompiled with '
            'training.packing here, whose attention torch\'s compiler does not see into; "full" is compiled'
        )
        if asked.recompute_every == 1:
            return model
    in_rows = config.transfusion.enabled or asked.packing
    several = in_rows or bool(config.data.buckets)  # shapes of batches
    when = "steps, which may take some minutes" if several else "step, which takes a minute or two"
    log(f"compiling the model in the first {when}; meanwhile the progress stands still")
    allow_graphs()
    if in_rows or blocks_alone:
        inside = asked.packing and asked.recompute == "full"  # packed attention may break the graph, a checkpoint not
        for block in model.transformer.blocks:  # packed batches have any length, and packing cannot be traced
            compile_it = getattr(block.forward, "compile", block.compile) if inside else block.compile
            compile_it(dynamic=True if in_rows else None)
        return model
    if config.text.encoder != "learned":  # a frozen encoder is not compiled
        model.transformer.compile()
        return model
    return torch.compile(model)


def _packs_in_one_call(model: Any, config: TrainConfig, device: torch.device) -> bool:
    """Whether the attention of packed batches is one kernel's, and so part of a compiled graph."""
    precision = pick_precision(config.training.precision, device)
    with attention_backend(config.training.attention):
        return in_one_call(device.type, precision, model.transformer.config.head_dim)


@contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """On a CPU, the same bits from the same numbers, at no loss of speed: compiled code too then adds up an embedding's
    gradient in order, not as its threads come. CUDA is left as it is.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    if device.type == "cpu":
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
