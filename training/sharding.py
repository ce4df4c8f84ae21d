"""One model on several processes: replicated (DDP) or sharded (FSDP2), by torch's own engines; and recomputation.

Of a sharded model every process holds 1 / n of the weights, the gradients, the optimiser's state and the average. Each
block is a unit: its weights are gathered before it runs, in the type of the matrix products, and freed after; all that
is outside of the blocks is one more unit, gathered in fp32. Gradients are reduced in fp32. Inputs are not cast, so that
autocast does what it does in one process, and all strategies compute the same up to the rounding of sums.

"hsdp" shards within groups of `shard_size` processes, and replicates from group to group.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
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
    """A model with its objective as one module whose forward is the loss, since DDP and FSDP2 want each use of a weight
    within the forward of the module that they wrap.
    """

    def __init__(self, model: nn.Module, objective: Any) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, batch: Any, generator: torch.Generator, counts: Tensor | None = None) -> Loss:
        """The objective's `Loss` of a batch; counts: see `TextAndImages.__call__`. Raises ValueError for another."""
        how = {} if counts is None else {"counts": counts}
        loss = self.objective(self.model, batch, generator, **how)
        total, name = getattr(loss, "total", None), type(self.objective).__name__
        if not isinstance(loss, Loss) or not isinstance(total, Tensor):
            raise ValueError(f"{name} gave a {type(loss).__name__}, expected a training.Loss with a total")
        if total.ndim or not total.requires_grad:
            raise ValueError(f"{name} gave a total that is no scalar, or from which no gradient comes")
        return loss


def strategy(config: ParallelConfig, ranks: Ranks) -> str:
    """ "none", "ddp", "fsdp" or "hsdp": what the config asks for, or "none" where there is one process, unless its
    weights stay in the CPU's memory.
    """
    if ranks.world == 1 and not config.cpu_offload:
        return "none"
    return "ddp" if config.strategy == "auto" else config.strategy


def is_sharded(config: ParallelConfig, ranks: Ranks) -> bool:
    """Whether each process holds a part of the weights."""
    return strategy(config, ranks) in ("fsdp", "hsdp")


def strategy_text(config: ParallelConfig, ranks: Ranks) -> str:
    """The strategy in words, to follow the device in a line of the log; "" where there is nothing to say."""
    kind = strategy(config, ranks)
    if ranks.world > 1:
        return f", {ranks.world} processes, {kind}"
    if config.cpu_offload:
        return ", weights in the CPU's memory"
    idle = config.strategy not in ("auto", "none")
    return f"; parallel.strategy is {config.strategy}: it takes effect under torchrun" if idle else ""


class Parallelized(NamedTuple):
    """What `parallelize` makes: the learner and the average, whether both are sharded, and the average's `skeleton`."""

    learner: Learner
    average: Any
    sharded: bool
    skeleton: Any


def parallelize(
    model: Any,
    objective: Any,
    config: TrainConfig,
    ranks: Ranks,
    device: torch.device,
    precision: torch.dtype,
    fill: Callable[[Any], object] | None = None,
) -> Parallelized:
    """Move a fresh model to the device, copy it for the average, and shard both where the strategy says so.

    A trunk on the meta device gets memory here; `fill` then gives it its weights, without it they will be loaded.
    Weights that are not trained have no copy: the average has the model's own, or shards of its own.
    """
    sharded, empty = is_sharded(config.parallel, ranks), model.transformer.device.type == "meta"
    form = skeleton(model).eval().requires_grad_(False)
    learner = Learner(model, objective)
    if sharded:
        if not _has_parameters(model.conditioner):  # a frozen encoder is not sharded
            model.conditioner.to(device)
        average = copy.deepcopy(form)
        recompute(model, config.training.recompute, config.training.recompute_every)
        shard(learner, average, config.parallel, mesh_of(config.parallel, ranks, device), precision)
        for part in (model, average):
            _take_memory(part, device, torch.device("cpu") if config.parallel.cpu_offload else device)
        if empty and fill is not None:
            fill(model.transformer)
        copy_tensors(average.state_dict(), model.state_dict())
    else:  # FSDP2 moves each unit when it shards it
        _take_memory(model, device, device)
        model.to(device)
        frozen = {id(p): p for p in model.parameters() if not p.requires_grad}
        average = copy.deepcopy(model, frozen).eval().requires_grad_(False)
        recompute(model, config.training.recompute, config.training.recompute_every)
    return Parallelized(learner, average, sharded, form)


def _take_memory(model: nn.Module, device: torch.device, home: torch.device) -> None:
    """Give what is on the meta device memory without values: buffers on `device`, weights at `home`."""
    for module in model.modules():
        if any(x.is_meta for x in (*module.parameters(recurse=False), *module.buffers(recurse=False))):
            module.to_empty(device=home, recurse=False)
            for name, x in module.named_buffers(recurse=False):
                setattr(module, name, x.to(device))


@torch.no_grad()
def copy_tensors(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    """Copy the tensors in `given` into those of their names and shapes, of which either may be sharded."""
    for name, x in given.items():
        local(own[name]).copy_(local(shard_like(x, own[name])))


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def check_parallel(config: TrainConfig, ranks: Ranks, device: torch.device) -> None:
    """Raises ConfigError for settings that cannot work on these processes and this device."""
    parallel, kind = config.parallel, strategy(config.parallel, ranks)
    if parallel.cpu_offload and (kind not in ("fsdp", "hsdp") or device.type != "cuda"):
        raise ConfigError(
            f'parallel.cpu_offload moves the shards of "fsdp" and "hsdp" from a GPU to the CPU: here is "{kind}" on '
            f"{device.type}"
        )
    if kind in ("fsdp", "hsdp") and config.optimizer.name not in ("adamw", "muon"):
        raise ConfigError(
            f'optimizer.name is "{config.optimizer.name}", whose state cannot be sharded: take "adamw" or "muon", or '
            'parallel.strategy = "ddp"'
        )
    size = parallel.shard_size or ranks.per_node
    if kind == "hsdp" and ranks.world % size:
        raise ConfigError(f"parallel.shard_size is {size}, expected a divisor of the {ranks.world} processes")


def mesh_of(config: ParallelConfig, ranks: Ranks, device: torch.device) -> Any:
    """The device mesh for FSDP2: ("shard",), or ("replicate", "shard") for "hsdp"."""
    from torch.distributed.device_mesh import DeviceMesh

    everyone: Any = dist.group.WORLD
    if config.strategy == "fsdp":
        return DeviceMesh.from_group(everyone, device.type, mesh_dim_names=("shard",))
    table = torch.arange(ranks.world).view(-1, config.shard_size or ranks.per_node)
    groups = [ranks.group_among(parts.tolist()) for parts in (table.T, table)]
    return DeviceMesh.from_group(groups, device.type, table, mesh_dim_names=("replicate", "shard"))


def shard(learner: Learner, average: Any, config: ParallelConfig, mesh: Any, precision: torch.dtype) -> None:
    """Shard the learner's weights and the average's, in place.

    Of the average, trunk and text encoder are sharded each by itself, since sampling calls them separately; its weights
    are gathered in fp32.
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
        if _has_parameters(part):
            fully_shard(part, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False), **how)


def replicated(learner: Learner, device: torch.device) -> nn.Module:
    """The learner in DistributedDataParallel, which averages its gradients over all processes."""
    from torch.nn.parallel import DistributedDataParallel

    devices = [torch.cuda.current_device()] if device.type == "cuda" else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer versions rename the option
        return DistributedDataParallel(learner, devices, broadcast_buffers=False, gradient_as_bucket_view=True)


@contextmanager
def gradient_sync(learner: nn.Module, last: bool) -> Iterator[None]:
    """Around the backward pass of one part of a batch: processes reduce their gradients after the last part only."""
    if hasattr(learner, "set_requires_gradient_sync"):
        learner.set_requires_gradient_sync(last)  # type: ignore[operator]
        yield
    elif hasattr(learner, "no_sync") and not last:
        with learner.no_sync():  # type: ignore[operator]
            yield
    else:
        yield


@contextmanager
def unsharded(average: Any) -> Iterator[None]:
    """Around calls of a sharded average: weights outside of its blocks stay gathered, and are freed at the end."""
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
    """A copy with its state on the meta device, to be filled with the full tensors; it shares a frozen encoder, which
    has none.
    """
    state = model.state_dict(keep_vars=True).values()
    empty = {id(x): nn.Parameter(x.to("meta")) if isinstance(x, nn.Parameter) else x.to("meta") for x in state}
    return copy.deepcopy(model, empty)  # type: ignore[arg-type]


# --- sharded tensors ----------------------------------------------------------------------------------------------


def local(x: Tensor) -> Tensor:
    """This process's shard of a tensor; the tensor itself where it is not sharded."""
    return x.to_local() if hasattr(x, "to_local") else x


def shard_like(x: Tensor, like: Tensor) -> Tensor:
    """A tensor that every process has in full, sharded as `like` is."""
    if hasattr(x, "to_local") or not hasattr(like, "device_mesh"):
        return x
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(x, like.device_mesh, like.placements, src_data_rank=None)  # type: ignore[attr-defined]


# --- recomputation (activation checkpointing) ---------------------------------------------------------------------


def recompute(model: Any, how: str, every: int) -> None:
    """Checkpoint every `every`-th block in place: it keeps its inputs alone ("full"), or also the results of its matrix
    products and attention ("selective"); the backward pass recomputes the rest (Chen et al. 2016, arXiv 1604.06174).
    """
    if how == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if how == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, partial(_keep, kept_ops()))
        # Compiled, it warns of operations in place in general, of which blocks have none.
        logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
    for block in list(model.transformer.blocks)[::every]:
        block.forward = Recomputed(block.forward, options)


class Recomputed:
    """The forward of a block that is computed again in the backward pass."""

    def __init__(self, forward: Callable[..., Any], options: dict[str, Any]) -> None:
        self.forward, self.options = forward, options

    def __call__(self, *args: Any) -> Any:
        return checkpoint(self.forward, *args, **self.options) if torch.is_grad_enabled() else self.forward(*args)

    def compile(self, **how: Any) -> None:
        """Compile what is within the checkpoint, which then may break the graph: a compiled checkpoint may not."""
        self.forward = torch.compile(self.forward, **how)


def kept_ops() -> frozenset[Any]:
    """The operators whose results "selective" keeps: `MATRIX_PRODUCTS`, and the attention of packed batches.

    Other attention kernels are recomputed, for torch does not see them as operators: FlexAttention is compiled, and
    those of xformers are not torch's own.
    """
    try:
        import torch.nn.attention.varlen
    except ImportError:  # an older torch has none
        return frozenset(MATRIX_PRODUCTS)
    return frozenset((*MATRIX_PRODUCTS, torch.ops.torch_attn._varlen_attn.default))


def _keep(kept: frozenset[Any], context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in kept else CheckpointPolicy.PREFER_RECOMPUTE
