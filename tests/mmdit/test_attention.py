"""Attention kernels: one number whichever computes it, and a clear word from those that cannot run here."""

import warnings

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

import mmdit
from mmdit.attention import (
    SHORT,
    WITHOUT_PLANS,
    Blocks,
    Pairs,
    _varlen,
    any_shape,
    attention,
    attention_backend,
    attention_backends,
    current_backend,
    in_one_call,
    key_mask,
    why_not,
)
from mmdit.cache import Cache
from mmdit.config import MMDiTConfig, TransfusionConfig
from mmdit.model import MMDiT
from mmdit.sequences import pack
from mmdit.transfusion import Transfusion

KEYS = key_mask(5, torch.tensor([[True, True, False], [True, False, False]]))
PAIRS = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(1)) < 0.6
PAIRS |= torch.eye(8, dtype=torch.bool)
MASKS = {"none": None, "keys": KEYS, "pairs": PAIRS, "heads": PAIRS.expand(2, 3, 8, 8).clone()}
MASKS["heads"][:, 1] |= True


def qkv(tokens=8, device="cpu", dtype=torch.float32, dim=16):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, tokens, dim, generator=generator).to(device, dtype) for _ in range(3)]


@pytest.mark.parametrize("mask", MASKS)
def test_the_formula_of_short_sequences_is_torchs(mask):
    q, k, v = qkv()
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=MASKS[mask]).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attention(q, k, v, MASKS[mask]), expected, rtol=1e-5, atol=1e-6)
    long = qkv(SHORT + 3)
    expected = F.scaled_dot_product_attention(*long).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attention(*long), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("tokens", "grad", "calls"), [(SHORT, True, 0), (SHORT + 1, True, 1), (SHORT, False, 1)])
def test_all_but_what_is_short_and_learns_is_torchs_kernel(monkeypatch, tokens, grad, calls):
    asked, real = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *x, **how: asked.append(how) or real(*x, **how))
    with torch.set_grad_enabled(grad):
        attention(*qkv(tokens))
    assert len(asked) == calls


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("tokens", [8, SHORT + 3])
def test_forward_mode_derivatives(tokens, grad):
    """The derivative along all three, beside a difference; torch's own kernel has none."""
    at, along = (tuple(x.double() for x in qkv(tokens)) for _ in range(2))
    along = tuple(x.roll(1, -1) for x in along)
    with torch.set_grad_enabled(grad):
        _, tangent = torch.func.jvp(attention, at, along)
        ahead, behind = (attention(*(x + s * dx for x, dx in zip(at, along, strict=True))) for s in (1e-5, -1e-5))
    torch.testing.assert_close(tangent, (ahead - behind) / 2e-5, rtol=1e-6, atol=1e-7)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@torch.no_grad()
def test_flex_gives_the_same():
    q, k, v = qkv()
    for mask in MASKS.values():
        with attention_backend("flex"):
            out = attention(q, k, v, mask)
        torch.testing.assert_close(out, attention(q, k, v, mask), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@torch.no_grad()
def test_flex_computes_the_trunks():
    torch.manual_seed(0)
    config = MMDiTConfig(in_channels=4, depth=1, num_heads=2, head_dim=16, context_dim=8, pooled_dim=8, sample_size=8)
    model = MMDiT(config)
    mixed = Transfusion(TransfusionConfig(vocab_size=40, in_channels=3, depth=1, num_heads=2, head_dim=16))
    for p in [*model.parameters(), *mixed.parameters()]:
        p.copy_(0.2 * torch.randn(p.shape))
    inputs = (torch.randn(2, 4, 8, 8), torch.tensor([0.3, 0.8]), torch.randn(2, 5, 8), torch.randn(2, 8))
    mask = torch.tensor([[True] * 5, [True] * 2 + [False] * 3])
    text = torch.tensor([5, 6, 7])
    batch = pack([[text, torch.randn(3, 4, 6)], [torch.randn(3, 4, 4), text], [text]])
    expected, said = model(*inputs, mask), mixed(batch, torch.tensor([0.5, 0.1]))
    with attention_backend("flex"):
        torch.testing.assert_close(model(*inputs, mask), expected, rtol=1e-4, atol=1e-5)
        out = mixed(batch, torch.tensor([0.5, 0.1]))
    torch.testing.assert_close(out.states, said.states, rtol=1e-4, atol=1e-5)
    for a, b in zip(out.v, said.v, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "why"), [("varlen", "needs a CUDA device"), ("xformers", "needs a CUDA device"), ("flex", "no backward")]
)
def test_a_kernel_that_cannot_run_says_why_and_what_can(name, why):
    with attention_backend(name), pytest.raises(ValueError, match=f"{why}.*here there are sdpa"):
        attention(*qkv())
    assert current_backend() == "sdpa"


def test_flex_says_the_same_of_packed_documents():
    model = Transfusion(TransfusionConfig(vocab_size=40, in_channels=3, depth=1, num_heads=2, head_dim=16))
    with attention_backend("flex"), pytest.raises(ValueError, match="no backward.*here there are sdpa"):
        model(pack([[torch.tensor([5, 6])]]))


@torch.no_grad()
def test_flex_is_compiled_without_a_warning():
    from torch.nn.attention.flex_attention import create_block_mask

    mask = Blocks(create_block_mask(lambda b, h, query, key: key <= query, None, None, 9, 9, device="cpu"))
    torch.compiler.reset()
    attend = torch.compile(attention, fullgraph=True, backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attend(*qkv(9), mask)


def test_documents_are_padded_with_zeros_and_their_gradient_adds_nothing_up():
    """Sums over equal indices, of which padding would have many, are slow on a GPU."""
    packed = pack([[torch.arange(5, 7), torch.zeros(1, 2, 2)], [torch.arange(4, 8)]]).layout(1).attending()
    x = torch.randn(1, 2, len(packed.places), 8, requires_grad=True)
    padded = packed.unpack(x)
    assert padded.shape == (2, 2, 8, 8) and not packed.ordered
    assert torch.equal(packed.pack(padded.transpose(1, 2).flatten(2)), x.transpose(1, 2).flatten(2))
    assert not padded[1, :, 4:].any()
    with Operators() as used:
        (padded * torch.randn(padded.shape)).sum().backward()
    assert not any(name in op for op in used.names for name in ("index_put", "index_add", "scatter", "sort"))


class Operators(TorchDispatchMode):
    """The names of the operators that run within."""

    def __enter__(self):
        self.names = []
        return super().__enter__()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.names.append(str(op))
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("kind", "dtype", "width", "name", "serves"),
    [
        ("cuda", torch.bfloat16, 64, "sdpa", True),
        ("cuda", torch.float16, 256, "varlen", True),
        ("cuda", torch.float32, 64, "sdpa", False),  # a validation loss, or training.precision = "fp32"
        ("cuda", torch.bfloat16, 20, "sdpa", False),
        ("cuda", torch.bfloat16, 264, "sdpa", False),
        ("cuda", torch.bfloat16, 64, "xformers", False),
        ("cpu", torch.bfloat16, 64, "sdpa", False),
    ],
)
def test_samples_in_one_row_take_one_kernel_only_where_it_can_serve(kind, dtype, width, name, serves):
    with attention_backend(name):
        assert in_one_call(kind, dtype, width) == serves


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_samples_in_one_row_are_as_one_by_one_on_cuda(dtype):
    pairs = Pairs((4, 6, 3), (2, 0, 5), torch.device("cuda"))
    q, k, v = (x[:1] for x in qkv(20, "cuda", dtype, 64))
    sample = torch.tensor([*[0] * 4, *[1] * 6, *[2] * 3, *[0] * 2, *[2] * 5], device="cuda")
    expected = attention(q.float(), k.float(), v.float(), (sample[:, None] == sample[None])[None, None])
    torch.testing.assert_close(attention(q, k, v, pairs).float(), expected, rtol=2e-2, atol=2e-2)


@pytest.fixture
def varlen(monkeypatch):
    """The kernel of sequences of any length, written out on the CPU and in float64."""

    def one_by_one(q, k, v, q_ends, k_ends, most_queries, most_keys, window_size):
        assert min(window_size) >= max(most_queries, most_keys)  # none is hidden, and cuDNN takes no window
        assert q_ends.dtype == k_ends.dtype == torch.int32 and q_ends[-1] == len(q) and k_ends[-1] == len(k) == len(v)
        assert q_ends.diff().max() <= most_queries and k_ends.diff().max() <= most_keys
        parts = [(x[start:end] for x, start, end in zip((q, k, v), (a, c, c), (b, d, d), strict=True))
                 for a, b, c, d in zip(q_ends, q_ends[1:], k_ends, k_ends[1:], strict=False)]  # fmt: skip
        heads = [F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in part)) for part in parts]
        return torch.cat([x.transpose(0, 1) for x in heads])

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", one_by_one)
    monkeypatch.setattr("mmdit.attention.HALF_DTYPES", (torch.float64,))


@pytest.mark.parametrize("mask", ["none", "keys"])
def test_varlen_leaves_out_the_padding(varlen, mask):
    (q, _, _), (_, k, v) = qkv(5, dtype=torch.float64), qkv(8, dtype=torch.float64)
    given = [x.requires_grad_() for x in (q, k, v)]
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=MASKS[mask])
    without, upon = _varlen(q, k, v, MASKS[mask]), torch.randn_like(expected)
    torch.testing.assert_close(without, expected)
    of_sequences, of_a_mask = (torch.autograd.grad(x, given, upon) for x in (without, expected))
    torch.testing.assert_close(of_sequences, of_a_mask)


def test_varlen_takes_samples_that_stand_in_one_row(varlen, monkeypatch):
    monkeypatch.setattr(
        "mmdit.attention.in_one_call", lambda *asked: asked == ("cpu", torch.float64, 16) or pytest.fail(str(asked))
    )
    pairs = Pairs((4, 6, 3), (2, 0, 5))
    q, k, v = (x[:1].requires_grad_() for x in qkv(20, dtype=torch.float64))
    sample = torch.tensor([*[0] * 4, *[1] * 6, *[2] * 3, *[0] * 2, *[2] * 5])
    expected = attention(q, k, v, (sample[:, None] == sample)[None, None])
    together, upon = pairs.attend(q, k, v), torch.randn_like(expected)
    torch.testing.assert_close(together, expected)
    for of_one_row, of_a_mask in zip(
        *(torch.autograd.grad(x, (q, k, v), upon) for x in (together, expected)), strict=True
    ):
        torch.testing.assert_close(of_one_row, of_a_mask)
    torch.testing.assert_close(pairs.attend(q[:, :, :13], k, v), expected[:, :13])  # of images alone


def packed_documents():
    """A block's mask of two documents, and of their next tokens after a cache, and what attends."""
    model = Transfusion(TransfusionConfig(vocab_size=40, in_channels=3, depth=1, num_heads=2, head_dim=16))
    batch = model.pack([[torch.arange(5, 9)], [torch.arange(5, 7)]])
    cache = Cache(2, 1, 2, 16, torch.zeros(()))
    layout = batch.layout(2)
    return [layout.attending(), *cache.reading([0, 1]).attending(layout.attending(), layout)]


@torch.no_grad()
def test_shapes_that_differ_from_call_to_call_are_not_for_cudnn(monkeypatch):
    """On CUDA; what is done there is done here."""
    asked, real = [], F.scaled_dot_product_attention
    for module in ("mmdit.attention", "mmdit.cache"):
        monkeypatch.setattr(f"{module}.any_shape", lambda device: sdpa_kernel(WITHOUT_PLANS))
    monkeypatch.setattr(
        F,
        "scaled_dot_product_attention",
        lambda *x, **how: asked.append(torch.backends.cuda.cudnn_sdp_enabled()) or real(*x, **how),
    )
    x = torch.randn(1, 2, 6, 16)
    for mask in (*packed_documents(), Pairs((400, 2), (1, 1))):
        row = x if not isinstance(mask, Pairs) else torch.randn(1, 2, 404, 16)
        attention(row, row, row, mask)
    attention(*qkv())
    assert asked == [False, False, False, False, True]  # `Pairs` calls the kernel for each sample
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_only_on_cuda_is_a_kernel_left_out():
    with any_shape(torch.device("cuda")):
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert torch.backends.cuda.flash_sdp_enabled() and torch.backends.cuda.mem_efficient_sdp_enabled()
    with any_shape(torch.device("cpu")):
        assert torch.backends.cuda.cudnn_sdp_enabled()


@torch.no_grad()  # so that torch's kernel computes it
def test_leaving_out_a_kernel_does_not_break_a_compiled_graph():
    def attend(x):
        with sdpa_kernel(WITHOUT_PLANS):
            return attention(x, x, x)

    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend="aot_eager")
    for x in (qkv(9)[0], qkv(12)[0]):
        torch.testing.assert_close(compiled(x), attend(x))


@pytest.mark.gpu
@pytest.mark.parametrize("documents", [False, True])
def test_rows_of_any_length_make_no_plans_on_cuda(documents):
    model = Transfusion(TransfusionConfig(vocab_size=40, in_channels=3, depth=1, num_heads=2, head_dim=64)).cuda()
    with torch.profiler.profile() as profile, torch.autocast("cuda", torch.bfloat16):
        for n in (200, 300, 413):
            if documents:
                model(
                    model.pack([[torch.arange(5, 30)], [5 + torch.arange(n) % 30]]).to("cuda")
                ).states.sum().backward()
            else:
                q, k, v = (x[:1].requires_grad_() for x in qkv(n + 40, "cuda", torch.bfloat16, 64))
                attention(q, k, v, Pairs((n - 150, 150), (10, 30), q.device)).sum().backward()
    used = {event.key for event in profile.key_averages() if "attention" in event.key}
    assert used and not {name for name in used if "cudnn" in name.lower()}


@pytest.mark.parametrize("absent", ["xformers", "torch.nn.attention.varlen"])
def test_what_cuda_has_is_what_is_installed(monkeypatch, absent):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == absent else object())
    monkeypatch.setattr("mmdit.attention._has_varlen", mmdit.attention._has_varlen.__wrapped__)
    there, name = {"xformers": ("varlen", "xformers"), "torch.nn.attention.varlen": ("xformers", "varlen")}[absent]
    assert attention_backends("cuda") == ["sdpa", "flex", there]
    assert "here there are sdpa, flex, " + there in why_not(name, "cuda") and why_not(there, "cuda") is None


@pytest.mark.parametrize("mask", ["none", "keys"])
def test_in_fp32_varlen_is_torchs_choice(mask):
    q, k, v = qkv(SHORT + 3) if mask == "none" else qkv()
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=MASKS[mask])
    torch.testing.assert_close(_varlen(q, k, v, MASKS[mask]), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="takes masks of keys"):
        _varlen(*qkv(), PAIRS)


def test_names():
    assert attention_backends() == ["sdpa"]
    with torch.no_grad():
        assert mmdit.attention_backends("cpu") == ["sdpa", "flex"]
    with pytest.raises(ValueError, match="no attention backend 'flash', there are sdpa"), attention_backend("flash"):
        pass


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["sdpa", "flex", "varlen", "xformers"])
@pytest.mark.parametrize("mask", MASKS)
def test_kernels_agree_on_cuda_and_so_do_their_gradients(name, mask):
    if name not in attention_backends("cuda"):
        pytest.skip(f"{name} is not installed")
    given = None if MASKS[mask] is None else MASKS[mask].cuda()
    ours, reference = (qkv(device="cuda", dtype=torch.bfloat16, dim=64) for _ in range(2))
    with attention_backend(name):
        if name == "varlen" and mask in ("pairs", "heads"):
            with pytest.raises(ValueError, match="takes masks of keys"):
                attention(*ours, given)
            return
        out = attention(*[x.requires_grad_() for x in ours], given)
    exact = [x.float().requires_grad_() for x in reference]
    expected = attention(*exact, given)
    torch.testing.assert_close(out.float(), expected, rtol=2e-2, atol=2e-2)
    weight = torch.randn_like(expected)
    (out.float() * weight).sum().backward()
    (expected * weight).sum().backward()
    for x, y in zip(ours, exact, strict=True):
        torch.testing.assert_close(x.grad.float(), y.grad, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize(
    ("images", "texts", "padded"),
    [((4, 6, 2), (3, 0, 5), True), ((9,), (0,), True), ((40, 2, 2), (1, 1, 1), False), ((300, 290), (9, 9), False)],
)
def test_samples_in_one_row_are_attended_alone(monkeypatch, images, texts, padded):
    """Short ones of about one length side by side, others one after the other: to the same numbers."""
    torch.manual_seed(0)
    calls, pairs, total = [], Pairs(images, texts), sum(images) + sum(texts)
    monkeypatch.setattr("mmdit.attention.attention", lambda q, *rest: calls.append(len(q)) or attention(q, *rest))
    q, k, v = (torch.randn(1, 2, total, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    sample = torch.tensor([i for part in (images, texts) for i, count in enumerate(part) for _ in range(count)])
    expected = attention(q, k, v, (sample[:, None] == sample)[None, None])
    out = pairs.attend(q, k, v)
    assert calls == ([len(images)] if padded else [1] * len(images))
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    for ours, theirs in zip(*(torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (out, expected)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    asked = sum(images)
    torch.testing.assert_close(pairs.attend(q[:, :, :asked], k, v), expected[:, :asked], rtol=0, atol=1e-12)


def test_what_is_kept_of_a_row_in_inference_serves_training():
    pairs = Pairs((3, 5), (2, 1))
    q, k, v = (torch.randn(1, 2, 11, 8, requires_grad=True) for _ in range(3))
    with torch.inference_mode():
        expected = pairs.attend(q, k, v)
    out = pairs.attend(q, k, v)
    out.sum().backward()
    torch.testing.assert_close(out, expected)
    assert q.grad is not None
