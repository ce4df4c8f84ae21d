"""One kernel for a product and its GELU: where it is taken, and that it changes no number."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from mmdit import linear
from mmdit.linear import Linear, gelu, linear_gelu

LARGE = (256, 64, 128)  # tokens, in, out: enough work for the kernel


@pytest.fixture
def calls(monkeypatch):
    """What is asked of the kernel, for learning too where there is as much to do as here."""
    found = []
    monkeypatch.setattr(linear, "MIN_PRODUCTS_GRAD", linear.MIN_PRODUCTS)
    inner = linear._fused
    monkeypatch.setattr(linear, "_fused", lambda *args: found.append(args[-1]) or inner(*args))
    return found


def layer_and_input(shape=LARGE):
    torch.manual_seed(0)
    tokens, dim_in, dim_out = shape
    return Linear(dim_in, dim_out), torch.randn(2, tokens, dim_in)


@torch.no_grad()
def test_kernel_gives_torchs_numbers(calls):
    layer, x = layer_and_input()
    plain = F.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(layer(x), plain, rtol=0, atol=1e-5)
    torch.testing.assert_close(linear_gelu(layer, x), F.gelu(plain, approximate="tanh"), rtol=0, atol=1e-5)
    torch.testing.assert_close(layer(x.mT.contiguous().mT), plain, rtol=0, atol=1e-5)
    assert calls == ["none", "gelu", "none"]


@torch.no_grad()
def test_small_products_and_other_types_are_torchs_own(calls):
    layer, x = layer_and_input((4, 8, 8))
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    layer, x = layer_and_input()
    layer.double()(x.double())
    with torch.autocast("cpu", torch.bfloat16):
        assert linear_gelu(layer.float(), x).dtype == torch.bfloat16
    assert calls == []


@torch.no_grad()
def test_without_onednn_it_is_torchs_own(calls, monkeypatch):
    layer, x = layer_and_input()
    monkeypatch.setattr(type(torch.backends.mkldnn), "enabled", False)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    assert calls == []


@torch.no_grad()
@pytest.mark.parametrize("then", ["none", "gelu"])
def test_what_the_compiler_is_told_of_the_kernel_is_true(then):
    layer, x = layer_and_input((3, 8, 5))
    torch.library.opcheck(linear._opaque, (x, layer.weight, layer.bias, then))


LOSSES = {  # whose derivative lies in memory as one number, side by side, and with gaps
    "sum": lambda y: y.sum(),
    "square": lambda y: y.square().sum(),
    "part": lambda y: y[:, ::3].sin().sum(),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("bias", [True, False])
def test_what_is_learnt_are_torchs_derivatives(calls, loss, bias):
    layer, x = layer_and_input()
    layer.bias = layer.bias if bias else None
    given = [x.requires_grad_(), *layer.parameters()]
    own = torch.autograd.grad(LOSSES[loss](layer(x)), given)
    plain = torch.autograd.grad(LOSSES[loss](F.linear(x, layer.weight, layer.bias)), given)
    torch.testing.assert_close(own, plain, rtol=1e-5, atol=1e-4)
    assert calls == ["none", "none"]
    torch.autograd.grad(layer(x.detach()).sum(), layer.weight)
    assert calls == ["none"] * 3  # nothing asked for the derivative by x


def test_small_products_are_learnt_by_torchs_own(calls, monkeypatch):
    monkeypatch.setattr(linear, "MIN_PRODUCTS_GRAD", 2**26)
    layer, x = layer_and_input()
    layer(x).sum().backward()
    assert calls == []


def test_derivatives_have_derivatives(calls):
    layer, x = layer_and_input()

    def second(f):
        first = torch.autograd.grad(f(x.requires_grad_()).square().sum(), x, create_graph=True)[0]
        return torch.autograd.grad(first.square().sum(), [x, layer.weight])

    torch.testing.assert_close(second(layer), second(nn.Linear.forward.__get__(layer)), rtol=1e-4, atol=1e-2)


def test_what_looks_on_sees_torchs_own(calls):
    layer, x = layer_and_input()
    with FlopCounterMode(display=False) as counter:
        linear_gelu(layer, x).sum().backward()
    assert counter.get_total_flops() == 2 * 2 * x.numel() * len(layer.weight)  # nothing asks for the derivative by x
    with torch.no_grad():
        _, tangent = torch.func.jvp(lambda y: linear_gelu(layer, y), (x,), (torch.ones_like(x),))
    assert tangent.any()
    assert torch.func.vmap(layer)(x).shape == torch.func.grad(lambda y: layer(y).sum())(x).shape[:-1] + (128,)
    assert calls == []
    many = torch.autograd.grad(layer(x), layer.weight, torch.ones(3, *x.shape[:-1], 128), is_grads_batched=True)
    assert torch.equal(many[0][0], many[0][1]) and many[0].any()


@torch.no_grad()
def test_a_layer_that_is_wrapped_is_called(calls):
    class Doubled(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return 2 * self.inner(x)

    layer, x = layer_and_input()
    torch.testing.assert_close(linear_gelu(Doubled(layer), x), gelu(2 * layer(x)))
    assert "gelu" not in calls


@torch.no_grad()
def test_hooks_of_a_layer_see_its_product(calls):
    layer, x = layer_and_input()
    seen = []
    layer.register_forward_pre_hook(lambda layer, x: seen.append("before"))
    layer.register_forward_hook(lambda layer, x, y: seen.append(y))
    torch.testing.assert_close(linear_gelu(layer, x), gelu(seen[1]))
    assert seen[0] == "before" and "gelu" not in calls


@torch.no_grad()
def test_a_weight_that_is_part_of_a_wider_one_is_torchs_own(calls):
    """The kernel takes columns of a matrix a thousand times as long."""
    layer, x = layer_and_input()
    plain = layer(x)
    wide = torch.zeros(128, 100)
    wide[:, :64] = layer.weight
    layer.weight = nn.Parameter(wide[:, :64])
    torch.testing.assert_close(layer(x), plain, rtol=0, atol=1e-5)
    assert calls == ["none"]


@torch.no_grad()
def test_a_bias_that_lies_scattered_is_torchs_own(calls):
    layer, x = layer_and_input()
    layer.bias = nn.Parameter(torch.randn(2 * len(layer.bias))[::2])
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    assert calls == []


class Eighths(torch.Tensor):
    """Weights as libraries of quantisation have them: a few bits, which the product with them alone can read."""

    @staticmethod
    def __new__(cls, eighths):
        return torch.Tensor._make_wrapper_subclass(cls, eighths.shape, dtype=torch.float32)

    def __init__(self, eighths):
        self.eighths = eighths

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is F.linear:
            x, weight, bias = args
            return F.linear(x, weight.eighths / 8, bias)
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        assert function is torch.ops.aten.detach.default
        return cls(args[0].eighths)


@torch.no_grad()
def test_quantised_weights_are_multiplied_by_their_own(calls):
    layer, x = layer_and_input()
    eighths = torch.randint(-4, 5, layer.weight.shape).to(torch.int8)
    expected = F.linear(x, eighths / 8, layer.bias)
    layer.weight = nn.Parameter(Eighths(eighths), requires_grad=False)
    assert torch.equal(layer(x), expected)
    torch.testing.assert_close(linear_gelu(layer, x), gelu(expected))
    assert calls == []


@torch.no_grad()
def test_a_traced_layer_names_torchs_own_alone(calls):
    layer, x = layer_and_input()
    assert "mkldnn" not in str(torch.jit.trace(layer, (x,), check_trace=False).graph)
    assert calls == []


@torch.no_grad()
@pytest.mark.parametrize("inside", [True, False])
def test_compiled_forward_derivatives_are_torchs(inside):
    layer, x = layer_and_input()
    compiled = torch.compile(layer, backend="eager")
    compiled(x)  # without a derivative first

    def derivative(x, f=layer if inside else compiled):
        return torch.func.jvp(f, (x,), (x,))[1]

    tangent = (torch.compile(derivative, backend="eager") if inside else derivative)(x)
    torch.testing.assert_close(tangent, F.linear(x, layer.weight))


def test_compiled_gelu_is_torchs():
    x = torch.linspace(-6, 6, 1001, dtype=torch.float64)
    compiled = torch.compile(gelu, backend="eager")(x)
    torch.testing.assert_close(compiled, F.gelu(x, approximate="tanh"), rtol=0, atol=1e-12)
    assert not torch.equal(compiled, F.gelu(x, approximate="tanh"))


@torch.no_grad()
def test_compiled_it_is_taken_too(calls):
    layer, x = layer_and_input()
    compiled = torch.compile(lambda x: linear_gelu(layer, x), fullgraph=True)
    torch.testing.assert_close(compiled(x), linear_gelu(layer, x), rtol=0, atol=1e-5)
    assert calls == ["gelu", "gelu"]


def test_compiled_it_is_learnt_too(monkeypatch):
    monkeypatch.setattr(linear, "MIN_PRODUCTS_GRAD", linear.MIN_PRODUCTS)
    layer, x = layer_and_input()
    given = [x.requires_grad_(), *layer.parameters()]
    compiled = torch.compile(lambda x: linear_gelu(layer, x), fullgraph=True)
    with torch.profiler.profile() as seen:
        own = torch.autograd.grad(compiled(x).square().sum(), given)
    plain = torch.autograd.grad(gelu(F.linear(x, layer.weight, layer.bias)).square().sum(), given)
    torch.testing.assert_close(own, plain, rtol=1e-4, atol=1e-3)
    assert sum(event.name == "mkldnn::_linear_pointwise" for event in seen.events()) == 2


@torch.no_grad()
def test_an_exported_model_names_torchs_own_alone():
    layer, x = layer_and_input()
    program = torch.export.export(layer, (x,))
    assert not any("mmdit" in str(node.target) for node in program.graph.nodes)
