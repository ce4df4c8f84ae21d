"""Matrix products with weights, and the one kernel that a CPU has for a product with what follows it.

oneDNN multiplies and adds the bias in one pass over memory, where torch first writes the bias and then adds to it; and
where nothing has to be learnt it applies GELU in the same pass. torch's eager mode does not use that, and its compiler
only for weights that it may freeze (`python -m benchmarks.forward`, `benchmarks.train_step`).

Shape letters: S tokens, I and O the widths of a product.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn import functional as F

WORTH = 2**20  # multiplications from which that kernel saves more than its own overhead
LEARNT = 2**26  # and where there is a derivative, whose way through Python costs 50 to 80 us
KERNEL = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class Linear(nn.Linear):
    """torch's own, x (..., I) to (..., O), with oneDNN's kernel where that can serve."""

    def forward(self, x: Tensor) -> Tensor:
        if not _serves(x, self):
            return super().forward(x)
        given = x, self.weight, self.bias
        return _learnt(*given) if torch.is_grad_enabled() else _in_one(*given, "none")


def linear_gelu(layer: nn.Module, x: Tensor) -> Tensor:
    """gelu(layer(x)); in one kernel where that can serve. A layer with hooks is called: they see what it gives."""
    if type(layer) is not Linear or layer._forward_hooks or layer._forward_pre_hooks:
        return gelu(layer(x))
    if torch.is_grad_enabled() or not _serves(x, layer):
        return gelu(layer(x))
    return _in_one(x, layer.weight, layer.bias, "gelu")


def gelu(x: Tensor) -> Tensor:
    """The tanh form of GELU (Hendrycks & Gimpel 2016), x (1 + tanh u) / 2 = x sigmoid(2 u).

    Compiled for a CPU it is the sigmoid, whose one exponential costs half of a tanh.
    """
    if x.device.type != "cpu" or not torch.compiler.is_compiling():
        return F.gelu(x, approximate="tanh")
    return x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * x * (1 + 0.044715 * x * x))


class _Learnt(torch.autograd.Function):
    """x (..., I), weight (O, I) and bias (O,) or None to (..., O); by x it is a product of that kind too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _in_one(x, weight, bias, "none")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows, (wants_x, wants_weight, wants_bias) = grad.reshape(-1, len(weight)), ctx.needs_input_grad
        alone = torch.compiler.is_compiling() or not (torch.is_grad_enabled() or _watched())  # not differentiated
        by_x = None if not wants_x else _in_one(grad, weight.mT, None, "none") if alone else grad @ weight
        by_weight = rows.mT @ x.reshape(-1, x.shape[-1]) if wants_weight else None
        return by_x, by_weight, rows.sum(0) if wants_bias else None


_learnt: Callable[[Tensor, Tensor, Tensor | None], Tensor] = _Learnt.apply


def _in_one(x: Tensor, weight: Tensor, bias: Tensor | None, then: str) -> Tensor:
    run = _opaque if torch.compiler.is_compiling() else _kernel
    return run(x, weight, bias, then)


def _kernel(x: Tensor, weight: Tensor, bias: Tensor | None, then: str) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, then, [], "tanh" if then == "gelu" else "")
    return out


# The same to the compiler, which knows the kernel by name and then asks for frozen weights.
_opaque = torch.library.custom_op("mmdit::linear_pointwise", _kernel, mutates_args=())


@_opaque.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, then: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _serves(x: Tensor, layer: nn.Linear) -> bool:
    """Whether the kernel gives what torch's eager product would: it knows no autocast."""
    w, b = layer.weight, layer.bias
    return bool(
        x.device.type == w.device.type == "cpu"
        and x.dtype == w.dtype == torch.float32
        and type(x) is Tensor
        and w.is_contiguous()  # columns of a wider matrix take it a thousand times as long
        and (b is None or (b.dtype == torch.float32 and b.is_contiguous()))  # it reads what lies there, as float32
        and not torch.compiler.is_exporting()
        and not torch.jit.is_tracing()
        and _worth(x.numel() // x.shape[-1] * w.numel())
        and not torch.is_autocast_enabled("cpu")
        and forward_ad._current_level < 0
        and KERNEL
        and (torch.compiler.is_compiling() or (torch.backends.mkldnn.enabled and not _watched()))
    )


def _worth(products: int) -> bool:
    """Whether there is enough to multiply; of a graph for any number of tokens yes, so that it serves them all."""
    least = LEARNT if torch.is_grad_enabled() else WORTH
    if torch.compiler.is_compiling():
        return not statically_known_true(products < least)
    return products >= least


def _watched() -> bool:
    """Whether a transform of torch.func, or a mode such as torch's counter of FLOPs looks on: they know torch's own."""
    return torch._C._functorch.peek_interpreter_stack() is not None or torch._C._len_torch_dispatch_stack() > 0
