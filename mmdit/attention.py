"""The one place where attention is computed, with a kernel that can be chosen: `with attention_backend("flex"): ...`.

Shape letters: B batch, H heads, S queries, T keys, d head width.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

SHORT = 256  # up to so many tokens, training on a CPU computes the formula: torch's fused backward is far slower there
HALF_DTYPES = (torch.float16, torch.bfloat16)
WITHOUT_PLANS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass(frozen=True)
class Packed:
    """The attention mask of n documents packed into one row of S tokens. They are unpacked into a batch, padded to the
    longest (L), so that each attends to itself alone.

    mask (n, 1, L or 1, L): True where a query may see a key; places (S,) int64: the place of each token in the
    flattened batch, n * L. ordered: token s is at place s, so that unpacking is a view.
    """

    mask: Tensor
    places: Tensor
    ordered: bool = False

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v (1, H, S, d) to (1, S, H*d)."""
        with any_shape(q.device):
            return self.pack(attention(self.unpack(q), self.unpack(k), self.unpack(v), self.mask))

    def unpack(self, x: Tensor) -> Tensor:
        """Packed tokens (1, H, S, d) to a padded batch of documents (n, H, L, d)."""
        n, longest = self.mask.shape[0], self.mask.shape[-1]
        padded = x[0] if self.ordered else _scatter_rows(x[0], self.places, n * longest, dim=1)
        return padded.unflatten(1, (n, longest)).transpose(0, 1)

    def pack(self, x: Tensor) -> Tensor:
        """A padded batch (n, L, H*d) to packed tokens (1, S, H*d)."""
        flat = x.flatten(0, 1)
        return (flat if self.ordered else flat[self.places])[None]


class BySample(NamedTuple):
    """The S tokens of a row in the order of samples, as torch's variable-length kernel wants them.

    order (S,): the tokens sample by sample; places (S,): its inverse, the place of each token; ends (B + 1,) int32: the
    cumulative lengths of the samples; longest: the length of the longest.
    """

    order: Tensor
    places: Tensor
    ends: Tensor
    longest: int


@dataclass(frozen=True)
class Pairs:
    """The mask of image-text pairs packed without padding into one row, first the image tokens of all samples and then
    their text tokens: each sample attends to its own image and text.

    images, texts: the number of image and of text tokens of each sample. On CUDA compiled blocks take the tensors of
    `by_sample` instead: for other numbers they would be compiled anew.
    """

    images: tuple[int, ...]
    texts: tuple[int, ...]
    device: torch.device = torch.device("cpu")
    by_sample: BySample = field(init=False, compare=False, repr=False)
    images_alone: Pairs | None = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        alone = Pairs(self.images, (0,) * len(self.images), self.device) if any(self.texts) else None
        object.__setattr__(self, "by_sample", _by_sample(self.images, self.texts, self.device))
        object.__setattr__(self, "images_alone", alone)

    def without_text(self) -> Pairs:
        """The mask of a row of the image tokens alone."""
        return self.images_alone or self

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v (1, H, S, d) to (1, S, H*d); q may hold the queries of the images alone."""
        if in_one_call(q.device.type, q.dtype, q.shape[-1]):
            return self._together(q, k, v)
        return self._one_by_one(q, k, v)

    def _of_queries(self, q: Tensor, k: Tensor) -> Pairs:
        return self if q.shape[2] == k.shape[2] else self.without_text()

    def _together(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """All samples in one call of torch's variable-length kernel."""
        to_q, to_kv = self._of_queries(q, k).by_sample, self.by_sample
        q, k, v = (_scatter_rows(x[0].transpose(0, 1), to.places) for x, to in ((q, to_q), (k, to_kv), (v, to_kv)))
        out = _of_any_length(q, k, v, to_q.ends, to_kv.ends, to_q.longest, to_kv.longest)
        return _scatter_rows(out, to_q.order).flatten(1)[None]

    @torch.compiler.disable  # the lengths differ from batch to batch
    def _one_by_one(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Each sample by itself, or on a CPU side by side where they are short."""
        queries = self._of_queries(q, k)
        if q.device.type == "cpu" and self._is_short:
            to_q, to_kv = _as_documents(queries), _as_documents(self)
            return to_q.pack(attention(to_q.unpack(q), to_kv.unpack(k), to_kv.unpack(v), to_kv.mask))
        n = len(self.images)
        sizes = [[*pairs.images, *pairs.texts] for pairs in (queries, self, self)]
        parts = [x.split(size, dim=2) for x, size in zip((q, k, v), sizes, strict=True)]
        with any_shape(q.device):
            samples = [attention(*(torch.cat([x[i], x[n + i]], dim=2) for x in parts)) for i in range(n)]
        lengths = zip(queries.images, queries.texts, strict=True)
        pairs = [x.split(length, dim=1) for x, length in zip(samples, lengths, strict=True)]
        return torch.cat([image for image, _ in pairs] + [text for _, text in pairs], dim=1)

    @property
    def _is_short(self) -> bool:
        """Whether samples are so short, and so alike in length, that padding costs less than a call for each sample."""
        lengths = [image + text for image, text in zip(self.images, self.texts, strict=True)]
        return max(lengths) <= SHORT and len(lengths) * max(lengths) ** 2 <= 2 * sum(n * n for n in lengths)


def in_one_call(kind: str, dtype: torch.dtype, width: int) -> bool:
    """Whether torch's variable-length kernel can compute the attention of `Pairs`: on CUDA, in half precision, where no
    other kernel has been chosen. Where it cannot, the chosen kernel is called for each sample, which torch's compiler
    does not see into. width: of a head.
    """
    fits = kind == "cuda" and dtype in HALF_DTYPES and width % 8 == 0 and width <= 256
    return fits and _current in ("sdpa", "varlen") and _has_varlen()


@torch.compiler.assume_constant_result
@cache
def _has_varlen() -> bool:
    return importlib.util.find_spec("torch.nn.attention.varlen") is not None


def _scatter_rows(x: Tensor, places: Tensor, num: int | None = None, dim: int = 0) -> Tensor:
    """Row i of x along `dim` becomes row places[i] of `num`, of which others are 0; None: as many as x has. The
    gradient is a gather; that of indexing, `x[rows]`, is slower: it sorts the indices and accumulates.
    """
    if num is None:
        return x.new_empty(x.shape).index_copy_(dim, places, x)
    return x.new_zeros(*x.shape[:dim], num, *x.shape[dim + 1 :]).index_copy_(dim, places, x)


@lru_cache(maxsize=4)  # in sampling all steps ask for the same: of images with their texts, and alone
@torch.inference_mode(False)  # cached tensors are used in training too
def _by_sample(images: tuple[int, ...], texts: tuple[int, ...], device: torch.device) -> BySample:
    image, text = (torch.tensor(counts, device="cpu") for counts in (images, texts))  # else, in a context, on "meta"
    sample = torch.arange(len(images), device="cpu").repeat(2).repeat_interleave(torch.cat([image, text]))
    lengths = image + text
    ends = F.pad(lengths.cumsum(0), (1, 0)).int()
    order = sample.argsort(stable=True)
    return BySample(order.to(device), order.argsort().to(device), ends.to(device), int(lengths.max()))


@lru_cache(maxsize=4)
@torch.inference_mode(False)
def _as_documents(pairs: Pairs) -> Packed:
    """The same packing as a `Packed` mask, on the CPU, with each sample one document."""
    order, _, ends, longest = pairs.by_sample
    sample = torch.repeat_interleave(torch.arange(len(pairs.images)), ends.diff().long())
    at = sample * longest + torch.arange(len(order)) - ends[sample]
    real = torch.arange(longest) < ends.diff()[:, None]
    places = torch.empty_like(order).index_copy(0, order, at)
    return Packed(real[:, None, None], places)


@dataclass(frozen=True)
class Blocks:
    """A `BlockMask` of FlexAttention, which skips the blocks of the mask that are empty."""

    mask: Any

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v (B, H, S, d) to (B, S, H*d)."""
        if why := why_not("flex", q.device):
            raise ValueError(why)
        return _flex_kernel(q.device.type)(q, k, v, block_mask=self.mask).transpose(1, 2).flatten(2)


class Mask(Protocol):
    """A mask that computes the attention itself: `Packed`, `Pairs`, `Blocks`, and those of a cache (cache.py)."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...


def any_shape(device: torch.device) -> AbstractContextManager[None]:
    """Around attention whose shapes differ from call to call: on CUDA without cuDNN's kernel, which is torch's first
    choice on Hopper and Blackwell. For each new shape it builds a plan, which takes tens of milliseconds, and keeps it
    in GPU memory for good.
    """
    return sdpa_kernel(WITHOUT_PLANS) if device.type == "cuda" else nullcontext()


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | Mask | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, heads concatenated: q (B, H, S, d), k and v (B, H, T, d) to (B, S, H*d).

    `mask` is boolean, broadcastable to (B, H, S, T), True where a query may see a key, or a `Mask`; None is no mask.
    Raises ValueError where the chosen kernel cannot run on this device.
    """
    if not (mask is None or isinstance(mask, Tensor)):
        return mask.attend(q, k, v)
    if _current != "sdpa" and (why := why_not(_current, q.device)):
        raise ValueError(why)
    return _KERNELS[_current](q, k, v, mask).transpose(1, 2).flatten(2)


@contextmanager
def attention_backend(name: str) -> Iterator[None]:
    """Compute attention in this block with a kernel of `attention_backends()`; "sdpa" is the default.

    Raises ValueError for an unknown name; `attention` raises it where the kernel cannot run.
    """
    global _current
    if name not in _KERNELS:
        raise ValueError(f"no attention backend {name!r}, there are {', '.join(_KERNELS)}")
    before, _current = _current, name
    try:
        yield
    finally:
        _current = before


def current_backend() -> str:
    """The name of the kernel in use."""
    return _current


def attention_backends(device: torch.device | str = "cpu") -> list[str]:
    """Names of the kernels that can run on a device."""
    return [name for name in _KERNELS if _obstacle(name, torch.device(device).type) is None]


def why_not(name: str, device: torch.device | str) -> str | None:
    """Why a kernel cannot run on a device, and what can; None where it can."""
    reason = _obstacle(name, torch.device(device).type)
    if reason is None:
        return None
    return (
        f"attention backend {name!r} cannot run here: {reason}; here there are {', '.join(attention_backends(device))}"
    )


def _obstacle(name: str, kind: str) -> str | None:
    if name in ("varlen", "xformers") and kind != "cuda":
        return f"it needs a CUDA device, this is {kind}"
    if name == "varlen" and not _has_varlen():
        return "this version of torch has no variable-length attention"
    if name == "xformers" and importlib.util.find_spec("xformers") is None:
        return "xformers is not installed (pip install 'mmdit[xformers]')"
    if name == "flex" and kind == "cpu" and torch.is_grad_enabled():
        return "FlexAttention has no backward pass on a CPU (under torch.no_grad it runs)"
    return None


# --- kernels: q (B, H, S, d), k and v (B, H, T, d), a boolean mask or None, to (B, H, S, d) ---------------------------


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    short = torch.is_grad_enabled() and q.device.type == "cpu" and max(q.shape[-2], k.shape[-2]) <= SHORT
    if not short and forward_ad._current_level < 0:  # torch's kernel has no forward-mode derivatives
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    scores = (q @ k.mT).to(torch.promote_types(q.dtype, torch.float32)) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores.softmax(-1).to(v.dtype) @ v


def _flex(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return _flex_kernel(q.device.type)(q, k, v)
    from torch.nn.attention.flex_attention import create_block_mask

    (batch, _, queries, _), keys = q.shape, k.shape[-2]
    full = mask.expand(batch, mask.shape[1], queries, keys)
    heads = full.shape[1]

    def sees(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return full[b, h % heads, query, key]

    blocks = create_block_mask(sees, batch, heads if heads > 1 else None, queries, keys, device=str(q.device))
    return _flex_kernel(q.device.type)(q, k, v, block_mask=blocks)


def _flex_kernel(kind: str) -> Callable[..., Any]:
    """FlexAttention, compiled on CUDA, where uncompiled it would write out all scores; on a CPU that does no harm."""
    from torch.nn.attention.flex_attention import flex_attention

    if torch.compiler.is_compiling() or kind != "cuda":
        return flex_attention
    return _compiled_flex()


@cache
def _compiled_flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    flex: Any = flex_attention
    return torch.compile(flex, dynamic=True)


def _varlen(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """torch's variable-length kernel, given the keys without their padding; the mask must be one of keys.

    The kernel has half precision only: other dtypes, such as the fp32 of a run's validation, go to SDPA.
    """
    batch, _, queries, _ = q.shape
    real = _real_keys(mask, "varlen", batch, k.shape[-2])
    if q.dtype not in HALF_DTYPES:
        return _sdpa(q, k, v, mask)
    packed = [x.transpose(1, 2) for x in (q, k, v)]
    if real is None:
        counts = torch.full((batch,), k.shape[-2], device=q.device)
        keys, values = (x.flatten(0, 1) for x in packed[1:])
    else:
        counts, rows = real.sum(1), real.flatten().nonzero()[:, 0]
        keys, values = (x.flatten(0, 1).index_select(0, rows) for x in packed[1:])
    ends = F.pad(counts.cumsum(0), (1, 0)).int()
    starts = torch.arange(0, (batch + 1) * queries, queries, device=q.device, dtype=torch.int32)
    out = _of_any_length(packed[0].flatten(0, 1), keys, values, starts, ends, queries, k.shape[-2])
    return out.unflatten(0, (batch, queries)).transpose(1, 2)


def _of_any_length(
    q: Tensor, k: Tensor, v: Tensor, q_ends: Tensor, k_ends: Tensor, most_queries: int, most_keys: int
) -> Tensor:
    """FlashAttention of sequences that stand one after the other: q (S, H, d), k and v (T, H, d) to (S, H, d); ends
    (B + 1,) int32: cumulative lengths; most: the longest.

    The window hides no key. It keeps torch from cuDNN, which it calls since 2.14 where it can: see `any_shape`.
    """
    from torch.nn.attention.varlen import varlen_attn

    window = max(most_queries, most_keys)
    out = varlen_attn(q, k, v, q_ends, k_ends, most_queries, most_keys, window_size=(window, window))
    assert isinstance(out, Tensor)
    return out


def _xformers(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    from xformers.ops import memory_efficient_attention

    bias = None
    if mask is not None:
        full = mask.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
        bias = torch.zeros_like(full, dtype=q.dtype).masked_fill(~full, -torch.inf)
    out: Tensor = memory_efficient_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_bias=bias)
    return out.transpose(1, 2)


def _real_keys(mask: Tensor | None, name: str, batch: int, keys: int) -> Tensor | None:
    """A mask of keys (B or 1, 1, 1, T) as (B, T). Raises ValueError for a mask that differs between queries."""
    if mask is None:
        return None
    if mask.shape[-2] != 1 or mask.shape[-3] != 1:
        raise ValueError(f"attention backend {name!r} takes masks of keys, (B, 1, 1, T), not {tuple(mask.shape)}")
    return mask[:, 0, 0].expand(batch, keys)


_KERNELS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]] = {
    "sdpa": _sdpa,
    "flex": _flex,
    "varlen": _varlen,
    "xformers": _xformers,
}
_current = "sdpa"


def key_mask(num_img: int, context_mask: Tensor | None) -> Tensor | None:
    """Mask (B, 1, 1, N + L) of the real keys: every image token, and the text tokens of `context_mask` (B, L)."""
    if context_mask is None:
        return None
    img = torch.ones(context_mask.shape[0], num_img, dtype=torch.bool, device=context_mask.device)
    return torch.cat([img, context_mask.bool()], dim=1)[:, None, None, :]
