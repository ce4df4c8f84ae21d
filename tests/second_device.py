"""A second device where there is no GPU: it computes on the CPU, but its tensors mix with those of the CPU as little as
a GPU's do. `python -m tests.second_device FOLDER` trains and samples on both, and prints what each gave as JSON.

It takes the place that torch keeps for devices of other makers, and so has a process of its own.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

import mmdit
import training.evaluate
import training.trainer
from samplers import SOLVERS, Field, RectifiedFlow, SDESolver, sample
from tests.training.runs import TRANSFUSION, config_for, make_autoencoder, metrics

NAME = "second"
aten = torch.ops.aten
BETWEEN = {aten.copy_.default, aten._to_copy.default}
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}


class On(Tensor):
    """A tensor on the second device, whose values are those of `raw`."""

    raw: Tensor

    @staticmethod
    def __new__(cls, raw: Tensor) -> "On":
        form = {"strides": raw.stride(), "storage_offset": raw.storage_offset(), "dtype": raw.dtype}
        self = Tensor._make_wrapper_subclass(cls, raw.size(), device=torch.device(NAME, 0), **form)
        self.raw = raw
        return self

    __torch_dispatch__ = classmethod(lambda cls, op, types, args=(), kwargs=None: compute(op, args, kwargs or {}))

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        made = On(self.raw.clone())
        is_parameter = isinstance(self, torch.nn.Parameter)
        memo[id(self)] = torch.nn.Parameter(made, self.requires_grad) if is_parameter else made
        return memo[id(self)]

    def tolist(self) -> Any:
        return self.raw.tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError("a tensor of another device has no numpy array")

    __array__ = numpy


def compute(op: Any, args: Any, kwargs: Any) -> Any:
    """An operator by the CPU. Raises RuntimeError where a GPU would: for tensors or a generator of both devices."""
    leaves, device = tree_leaves((args, kwargs)), kwargs.get("device")
    there = [x for x in leaves if isinstance(x, On)]
    here = [x for x in leaves if isinstance(x, Tensor) and not isinstance(x, On) and x.ndim]
    indices = op in INDEXING and isinstance(args[0], On) and not any(x.is_floating_point() for x in here)
    if there and here and op not in BETWEEN and not indices:
        raise RuntimeError(f"{op}: tensors on both devices, {[tuple(x.shape) for x in here]} on the CPU")
    on = isinstance(args[0], On) if op is aten.copy_.default else bool(there) if device is None else is_second(device)
    if on and any(isinstance(x, torch.Generator) for x in leaves):
        raise RuntimeError(f"{op}: a generator of the CPU")
    result = op(*tree_map(onto_cpu, args), **tree_map(onto_cpu, kwargs))
    if not on:
        return result
    same = {id(x.raw): x for x in there}  # an operator in place returns what it was given
    return tree_map_only(Tensor, lambda x: same[id(x)] if id(x) in same else On(x), result)


def onto_cpu(x: Any) -> Any:
    return x.raw if isinstance(x, On) else torch.device("cpu") if isinstance(x, torch.device) and is_second(x) else x


def is_second(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


class Operators(TorchDispatchMode):
    """Operators that make tensors on the device, which have none among their arguments."""

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        concerned = is_second(kwargs.get("device")) or any(isinstance(x, On) for x in tree_leaves((args, kwargs)))
        return compute(op, args, kwargs) if concerned else op(*args, **kwargs)


class Functions(TorchFunctionMode):
    """`torch.tensor` on the device, which is no operator."""

    def __torch_function__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if f in (torch.tensor, torch.as_tensor) and is_second(kwargs.get("device")):
            return f(*args, **{**kwargs, "device": "cpu"}).to(NAME)
        return f(*args, **kwargs)


def register() -> torch.library.Library:
    """Make the device known to torch. Kept by the caller: what torch itself does to tensors that it makes."""

    class Module(backend_registration._DummyBackendModule):
        def get_amp_supported_dtype(self) -> list[torch.dtype]:
            return [torch.bfloat16, torch.float16]

        def synchronize(self) -> None:
            pass

    backend_registration._setup_privateuseone_for_python_backend(NAME, Module())
    library = torch.library.Library("aten", "IMPL")
    empty = lambda size, *more, dtype=None, **_: On(torch.empty(size, dtype=dtype))  # noqa: E731
    library.impl("empty.memory_format", empty, "PrivateUse1")
    library.impl("empty_strided", empty, "PrivateUse1")
    library.impl("_copy_from", lambda x, to, *_: (onto_cpu(to).copy_(onto_cpu(x)), to)[1], "PrivateUse1")
    return library


def trained(folder: Path, device: str, *settings: str) -> Path:
    """Two steps of a run."""
    short = ("training.num_steps=2", "sampling.num_steps=3", "training.compile=off", f"training.device={device}")
    return training.train(config_for(folder / f"{device}-{len(list(folder.iterdir()))}", *short, *settings))


def of_run(folder: Path, device: str, *settings: str) -> dict[str, Any]:
    """What a run measures that draws, validates and is scored after it was resumed."""
    out = trained(folder, device, "training.sample_every=2", "training.validate_every=2", *settings)
    training.resume(out, ["training.num_steps=3", "evaluation.prompts_per_question=1"])
    scores = json.loads((out / "scores.json").read_text())
    del scores["seconds_per_image"]
    found = {"loss": metrics(out, "loss"), "validation": metrics(out, "validation_loss"), "scores": scores}
    return {**found, "parts": written(out, device)} if TRANSFUSION[0] in settings else found


def written(run: Path, device: str) -> list[list[Any]]:
    """What a model of text and images writes, also of an image that it has drawn."""
    pipe = mmdit.TextToImage.load(run, torch.device(NAME, 0) if device == "auto" else torch.device("cpu"))
    image = pipe.generate([["a red"]], seed=3, begin="image", max_tokens=4)[0].parts[0]
    found = pipe.generate([["a red"], [image, "a blue"]], seed=[1, 2], max_tokens=12)
    return [[part if isinstance(part, str) else part.size for part in each.parts] for each in found]


def of_adapters(folder: Path, device: str) -> dict[str, Any]:
    """A run on an autoencoder's latents, and another that trains adapters of its weights."""
    latents = (f"autoencoder={make_autoencoder(folder / f'autoencoder-{device}')}", "model.patch_size=1")
    first = trained(folder, device, *latents)
    return of_run(folder, device, *latents, f"init={json.dumps(str(first))}", "lora.rank=2")


def of_solvers(folder: Path, device: str) -> dict[str, list[float]]:
    """Where each solver ends."""
    weight = torch.linspace(-1, 1, 64).view(8, 8) / 8
    x = torch.linspace(-2, 2, 16).view(2, 8)
    if device == "auto":
        weight, x = weight.to(NAME), x.to(NAME)
    field = Field(lambda x_t, t: torch.tanh(x_t @ weight) * (1 + t[:, None]), RectifiedFlow())

    def end(solver: Any) -> list[float]:
        diffusion = "kl" if isinstance(solver, SDESolver) else None
        return sample(field, x, solver, 6, diffusion=diffusion, generator=[1, 2]).x.flatten().tolist()

    return {name: end(solver) for name, solver in SOLVERS.items()}


MANY = ("optimizer.name=muon", "training.packing=true", "training.recompute=full", "training.grad_accumulation=2")
AVERAGE = ("training.ema=power", "training.async_checkpoint=true")
COMPARED: dict[str, Callable[[Path, str], dict[str, Any]]] = {
    "run": of_run,
    "packed run": lambda folder, device: of_run(folder, device, *MANY, *AVERAGE),
    "run of text and images": lambda folder, device: of_run(folder, device, *TRANSFUSION),
    "adapters": of_adapters,
    "solvers": of_solvers,
}


def main() -> None:
    folder, library = Path(sys.argv[1]), register()
    for name, module in list(sys.modules.items()):
        if name.startswith(("training.", "mmdit")) and hasattr(module, "pick_device"):
            module.pick_device = lambda name: torch.device(NAME, 0) if name == "auto" else torch.device(name)
    for name, compared in COMPARED.items():
        here = compared(folder, "cpu")
        with Operators(), Functions():
            print(json.dumps({name: [here, compared(folder, "auto")]}))
    del library


if __name__ == "__main__":
    main()
