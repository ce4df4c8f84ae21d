"""Matrix products with weights, and the one kernel that a CPU has for a product with what follows it.

Where nothing has to be learnt, oneDNN multiplies and applies GELU in one pass over memory. torch's eager mode does not
use that, and its compiler only for weights that it may freeze (`python -m benchmarks.forward`).

Shape letters: S tokens, I and O the widths of a product.
"""

import math

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn import functional as F

WORTH = 2**20  # multiplications from which that kernel saves more than its own overhead
KERNEL = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class Linear(nn.Linear):
    """torch's own, x (..., I) to (..., O), with oneDNN's kernel where that can serve."""

    def forward(self, x: Tensor) -> Tensor:
        return _in_one(x, self, "none") if _serves(x, self) else super().forward(x)


def linear_gelu(layer: nn.Module, x: Tensor) -> Tensor:
    """gelu(layer(x)); in one kernel where that can serve. A layer with hooks is called: they see what it gives."""
    if type(layer) is Linear and not layer._forward_hooks and not layer._forward_pre_hooks and _serves(x, layer):
        return _in_one(x, layer, "gelu")
    return gelu(layer(x))


def gelu(x: Tensor) -> Tensor:
    """The tanh form of GELU (Hendrycks & Gimpel 2016), x (1 + tanh u) / 2 = x sigmoid(2 u).

    Compiled for a CPU it is the sigmoid, whose one exponential costs half of a tanh.
    """
    if x.device.type != "cpu" or not torch.compiler.is_compiling():
        return F.gelu(x, approximate="tanh")
    return x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * x * (1 + 0.044715 * x * x))


def _in_one(x: Tensor, layer: nn.Linear, then: str) -> Tensor:
    run = _opaque if torch.compiler.is_compiling() else _kernel
    return run(x, layer.weight, layer.bias, then)


def _kernel(x: Tensor, weight: Tensor, bias: Tensor | None, then: str) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, then, [], "tanh" if then == "gelu" else "")
    return out


# The same to the compiler, which knows the kernel by name and then asks for frozen weights.
_opaque = torch.library.custom_op("mmdit::linear_pointwise", _kernel, mutates_args=())


@_opaque.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, then: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _serves(x: Tensor, layer: nn.Linear) -> bool:
    """Whether the kernel gives what torch's eager product would: it knows neither gradients nor autocast."""
    w, b = layer.weight, layer.bias
    return bool(
        x.device.type == w.device.type == "cpu"
        and x.dtype == w.dtype == torch.float32
        and type(x) is Tensor
        and (b is None or (b.dtype == torch.float32 and b.is_contiguous()))  # it reads what lies there, as float32
        and not torch.is_grad_enabled()
        and not torch.compiler.is_exporting()
        and not torch.jit.is_tracing()
        and _worth(x.numel() // x.shape[-1] * w.numel())
        and not torch.is_autocast_enabled("cpu")
        and forward_ad._current_level < 0
        and KERNEL
        and (torch.compiler.is_compiling() or (torch.backends.mkldnn.enabled and not _transformed()))
    )


def _worth(products: int) -> bool:
    """Whether there is enough to multiply; of a graph for any number of tokens yes, so that it serves them all."""
    if torch.compiler.is_compiling():
        return not statically_known_true(products < WORTH)
    return products >= WORTH


def _transformed() -> bool:
    """Whether a transform of torch.func looks on; what is compiled knows them, but for forward-mode derivatives."""
    return torch._C._functorch.peek_interpreter_stack() is not None
