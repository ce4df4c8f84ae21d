"""Linear layers with oneDNN's fused kernel on a CPU: product, bias and activation in one pass over memory.

torch's eager mode first writes the bias and then adds the product to it, and never fuses the activation; its compiler
uses the fused kernel only for frozen weights. GELU is fused where no gradient is needed (measured by `python -m
benchmarks.forward`, `benchmarks.train_step`).

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

MIN_PRODUCTS = 2**20  # multiplications from which the fused kernel saves more than its overhead
MIN_PRODUCTS_GRAD = 2**26  # the same with gradients: an autograd function in Python costs 50 to 80 us
KERNEL = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class Linear(nn.Linear):
    """`nn.Linear`, x (..., I) to (..., O), with the fused kernel where it applies."""

    def forward(self, x: Tensor) -> Tensor:
        if not _can_fuse(x, self):
            return super().forward(x)
        if torch.is_grad_enabled():
            return _fused_with_grad(x, self.weight, self.bias)
        return _fused(x, self.weight, self.bias, "none")


def linear_gelu(layer: nn.Module, x: Tensor) -> Tensor:
    """gelu(layer(x)), in one kernel where it applies; not for a layer with hooks, which need the layer's output."""
    if type(layer) is not Linear or layer._forward_hooks or layer._forward_pre_hooks:
        return gelu(layer(x))
    if torch.is_grad_enabled() or not _can_fuse(x, layer):
        return gelu(layer(x))
    return _fused(x, layer.weight, layer.bias, "gelu")


def gelu(x: Tensor) -> Tensor:
    """The tanh form of GELU (Hendrycks & Gimpel 2016), x (1 + tanh u) / 2 = x sigmoid(2 u).

    Compiled for a CPU it is computed by the sigmoid, whose exponential costs half as much as a tanh.
    """
    if x.device.type != "cpu" or not torch.compiler.is_compiling():
        return F.gelu(x, approximate="tanh")
    return x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * x * (1 + 0.044715 * x * x))


class _FusedLinear(torch.autograd.Function):
    """x (..., I), weight (O, I) and bias (O,) or None to (..., O). The gradient by x uses the fused kernel too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _fused(x, weight, bias, "none")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows, (wants_x, wants_weight, wants_bias) = grad.reshape(-1, len(weight)), ctx.needs_input_grad
        # The fused kernel has no derivative of its own: not for a backward pass that is itself differentiated.
        fused = torch.compiler.is_compiling() or not (torch.is_grad_enabled() or _is_intercepted())
        by_x = None if not wants_x else _fused(grad, weight.mT, None, "none") if fused else grad @ weight
        by_weight = rows.mT @ x.reshape(-1, x.shape[-1]) if wants_weight else None
        return by_x, by_weight, rows.sum(0) if wants_bias else None


_fused_with_grad: Callable[[Tensor, Tensor, Tensor | None], Tensor] = _FusedLinear.apply


def _fused(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    run = _opaque if torch.compiler.is_compiling() else _kernel
    return run(x, weight, bias, activation)


def _kernel(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    form = "tanh" if activation == "gelu" else ""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], form)
    return out


# For the compiler, as an op of our own: it knows oneDNN's by name and would require frozen weights.
_opaque = torch.library.custom_op("mmdit::linear_pointwise", _kernel, mutates_args=())


@_opaque.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _can_fuse(x: Tensor, layer: nn.Linear) -> bool:
    """Whether the fused kernel applies: it must give what torch's eager product does, and be faster."""
    w, b = layer.weight, layer.bias
    return bool(
        x.device.type == w.device.type == "cpu"
        and x.dtype == w.dtype == torch.float32
        and type(x) is Tensor
        and type(w) in (Tensor, nn.Parameter)  # not a subclass, such as quantised weights
        and w.is_contiguous()  # for a slice of a wider matrix it is a thousand times slower
        and (b is None or (b.dtype == torch.float32 and b.is_contiguous()))  # it reads the memory as dense float32
        and not torch.compiler.is_exporting()
        and not torch.jit.is_tracing()
        and _is_large_enough(x.numel() // x.shape[-1] * w.numel())
        and not torch.is_autocast_enabled("cpu")
        and forward_ad._current_level < 0
        and KERNEL
        and (torch.compiler.is_compiling() or (torch.backends.mkldnn.enabled and not _is_intercepted()))
    )


def _is_large_enough(products: int) -> bool:
    """Whether the product is large enough to be faster fused; in a compiled graph for any number of tokens, True."""
    least = MIN_PRODUCTS_GRAD if torch.is_grad_enabled() else MIN_PRODUCTS
    if torch.compiler.is_compiling():
        return not statically_known_true(products < least)
    return products >= least


def _is_intercepted() -> bool:
    """Whether a torch.func transform or a dispatch mode is active, such as the FLOP counter, for torch's own ops."""
    return torch._C._functorch.peek_interpreter_stack() is not None or torch._C._len_torch_dispatch_stack() > 0
