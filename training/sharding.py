"""One model on several processes, by torch's own engines: copies (DDP) or parts (FSDP2), and what is computed again.

With parts, every process holds 1 / n of the weights, the gradients, the optimiser's state and the average. Each block
is a unit: its weights are gathered, in the type of the matrix products, before it works, and dropped after; what lies
outside of the blocks is one more unit, gathered in fp32. Gradients are summed in fp32. Inputs are not cast: autocast
does what it does in one process, so that all ways compute the same but for the rounding of sums.

"hsdp" holds parts within groups of `shard_size` processes, and copies from group to group.
"""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from training.config import ConfigError, ParallelConfig, TrainConfig
from training.objectives import Loss
from training.parallel import Ranks

MATRIX_PRODUCTS = (
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.linear.default,
    torch.ops.mmdit.linear_pointwise.default,  # mmdit/linear.py
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
)


class Learner(nn.Module):
    """A model with its objective: what is called is the loss, so that every use of a weight is within one call."""

    def __init__(self, model: nn.Module, objective: Any) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, batch: Any, generator: torch.Generator, counts: Tensor | None = None) -> Loss:
        """The objective's `Loss` of a batch; counts as `TextAndImages` takes them."""
        how = {} if counts is None else {"counts": counts}
        return self.objective(self.model, batch, generator, **how)


def strategy(config: ParallelConfig, ranks: Ranks) -> str:
    """ "none", "ddp", "fsdp" or "hsdp": what the config asks for, of the processes that are there."""
    if ranks.world == 1:
        return "none"
    return "ddp" if config.strategy == "auto" else config.strategy


def spread_text(config: ParallelConfig, ranks: Ranks) -> str:
    """What a log says of it, after the device."""
    kind = strategy(config, ranks)
    if kind != "none":
        return f", {ranks.world} processes, {kind}"
    idle = config.strategy not in ("auto", "none")
    return f"; parallel.strategy is {config.strategy}: it takes effect under torchrun" if idle else ""


class Held(NamedTuple):
    """What a process holds: the learner and the average, whether both are in parts, and if so the average's form."""

    learner: Learner
    average: Any
    in_parts: bool
    skeleton: Any


def hold(
    model: Any, objective: Any, config: TrainConfig, ranks: Ranks, device: torch.device, precision: torch.dtype
) -> Held:
    """A fresh model, its average and its objective, on the device, as the config wants them shared out."""
    in_parts = strategy(config.parallel, ranks) in ("fsdp", "hsdp")
    if not in_parts:  # else each unit moves there when it is cut
        model.to(device)
    average = copy.deepcopy(model).eval().requires_grad_(False)
    form = skeleton(average) if in_parts and ranks.first else None
    recompute(model, config.training.recompute, config.training.recompute_every)
    learner = Learner(model, objective)
    if in_parts:
        if not any(True for _ in model.conditioner.parameters()):  # frozen: every process has it whole
            model.conditioner.to(device)
        shard(learner, average, config.parallel, mesh_of(config.parallel, ranks, device), precision)
    return Held(learner, average, in_parts, form)


def check_parallel(config: TrainConfig, ranks: Ranks, device: torch.device) -> None:
    """Raises ConfigError for settings that cannot work on these processes and this device."""
    parallel, kind = config.parallel, strategy(config.parallel, ranks)
    if parallel.cpu_offload and (kind not in ("fsdp", "hsdp") or device.type != "cuda"):
        raise ConfigError(
            f'parallel.cpu_offload moves the parts of "fsdp" and "hsdp" from a GPU to the CPU: here is "{kind}" on '
            f"{device.type}"
        )
    if kind in ("fsdp", "hsdp") and config.optimizer.name not in ("adamw", "muon"):
        raise ConfigError(
            f'optimizer.name is "{config.optimizer.name}", whose state cannot be in parts: take "adamw" or "muon", or '
            'parallel.strategy = "ddp"'
        )
    size = parallel.shard_size or ranks.per_node
    if kind == "hsdp" and ranks.world % size:
        raise ConfigError(f"parallel.shard_size is {size}, expected a divisor of the {ranks.world} processes")


def mesh_of(config: ParallelConfig, ranks: Ranks, device: torch.device) -> Any:
    """The processes as FSDP2 takes them: (n,) parts, or (copies, parts)."""
    from torch.distributed.device_mesh import init_device_mesh

    if config.strategy == "fsdp":
        return init_device_mesh(device.type, (ranks.world,), mesh_dim_names=("shard",))
    size = config.shard_size or ranks.per_node
    return init_device_mesh(device.type, (ranks.world // size, size), mesh_dim_names=("replicate", "shard"))


def shard(learner: Learner, average: Any, config: ParallelConfig, mesh: Any, precision: torch.dtype) -> None:
    """Cut the learner's weights and the average's into parts, in place.

    The average is cut into two trees, trunk and text encoder, since pictures are drawn with each on its own; it is
    gathered in fp32.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    half = precision if precision != torch.float32 else None
    offload = CPUOffloadPolicy() if config.cpu_offload else OffloadPolicy()
    how = {"mesh": mesh, "offload_policy": offload}
    model: Any = learner.model
    for block in model.transformer.blocks:
        policy = MixedPrecisionPolicy(half, torch.float32, cast_forward_inputs=False)
        fully_shard(block, mp_policy=policy, reshard_after_forward=config.reshard, **how)
    fully_shard(learner, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False), **how)
    for part in (*average.transformer.blocks, average.transformer, average.conditioner):
        if any(True for _ in part.parameters()):
            fully_shard(part, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False), **how)


def copied(learner: Learner, device: torch.device) -> nn.Module:
    """The learner whose gradients are averaged over all processes (DDP)."""
    from torch.nn.parallel import DistributedDataParallel

    devices = [torch.cuda.current_device()] if device.type == "cuda" else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the option has another name of late
        return DistributedDataParallel(learner, devices, broadcast_buffers=False, gradient_as_bucket_view=True)


@contextmanager
def accumulating(learner: nn.Module, last: bool) -> Iterator[None]:
    """One part of a batch: gradients are exchanged with the last one alone."""
    if hasattr(learner, "set_requires_gradient_sync"):
        learner.set_requires_gradient_sync(last)  # type: ignore[operator]
        yield
    elif hasattr(learner, "no_sync") and not last:
        with learner.no_sync():  # type: ignore[operator]
            yield
    else:
        yield


@contextmanager
def gathering(average: Any) -> Iterator[None]:
    """Calls of a sharded average: what lies outside of its blocks is whole within, and dropped at the end."""
    try:
        for part in (average.transformer, average.conditioner):
            if hasattr(part, "unshard"):
                part.unshard()
        yield
    finally:
        for module in average.modules():
            if hasattr(module, "reshard"):
                module.reshard()


def skeleton(model: Any) -> Any:
    """A copy without numbers, to be given those of all parts; what is frozen outside of the parameters is shared."""
    empty = copy.deepcopy(model)
    for part in (empty.transformer, empty.conditioner):
        if any(True for _ in part.parameters()):
            part.to("meta")
    return empty


# --- tensors in parts ---------------------------------------------------------------------------------------------


def local(x: Tensor) -> Tensor:
    """The part of a tensor that is here: itself, where it is in one piece."""
    return x.to_local() if hasattr(x, "to_local") else x


def whole(x: Tensor) -> Tensor:
    """A tensor in one piece; where it is in parts all processes have to ask."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def parted(x: Tensor, like: Tensor) -> Tensor:
    """A tensor that every process has whole, in parts as `like` is."""
    if hasattr(x, "to_local") or not hasattr(like, "device_mesh"):
        return x
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(x, like.device_mesh, like.placements, src_data_rank=None)  # type: ignore[attr-defined]


def weights_digest(model: nn.Module) -> str:
    """A digest of some numbers of each weight: what processes that begin alike have in common."""
    found = hashlib.sha256()
    for name, p in model.named_parameters():
        found.update(f"{name} {tuple(p.shape)}".encode() + p.detach().flatten()[:256].float().cpu().numpy().tobytes())
    return found.hexdigest()


# --- what is computed again ---------------------------------------------------------------------------------------


def recompute(model: Any, how: str, every: int) -> None:
    """Let every how many-th block keep its inputs alone ("full"), or these and matrix products ("selective"), in place.

    The rest is computed again in the backward pass (Chen et al. 2016, arXiv 1604.06174).
    """
    if how == "none":
        return
    for block in list(model.transformer.blocks)[::every]:
        block.forward = _again(block.forward, how)


def _again(forward: Callable[..., Any], how: str) -> Callable[..., Any]:
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if how == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, partial(_keep, kept_ops()))
    return partial(_checkpointed, forward, options)


def _checkpointed(forward: Callable[..., Any], options: dict[str, Any], *args: Any) -> Any:
    return checkpoint(forward, *args, **options) if torch.is_grad_enabled() else forward(*args)


def kept_ops() -> frozenset[Any]:
    """What "selective" does not compute again: `MATRIX_PRODUCTS`, and the attention of samples in one row.

    Of other kernels torch sees nothing to keep: FlexAttention is compiled, and xformers' are not torch's own.
    """
    try:
        import torch.nn.attention.varlen
    except ImportError:  # an older torch has none
        return frozenset(MATRIX_PRODUCTS)
    return frozenset((*MATRIX_PRODUCTS, torch.ops.torch_attn._varlen_attn.default))


def _keep(kept: frozenset[Any], context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in kept else CheckpointPolicy.PREFER_RECOMPUTE
