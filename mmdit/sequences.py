"""Text and images in one sequence: how documents are packed, and which token sees which.

A document is text and images in any order. Every image stands between two text tokens, BOI and EOI. Tokens are packed
without padding as two runs, one per modality, so that each can have its own weights. Their order is not that of memory:
each token carries its document, its position in it, and the span (the image) that it belongs to.

    a query sees a key of its own document   if the key's position is not later, or both are of one span

That is Transfusion's mask, causal for text and bidirectional within an image (Zhou et al. 2024, arXiv 2408.11039,
section 3.2), and it is written once: `sees`.

Shape letters: T text tokens, I images, N patches of all images, S = N + T tokens, D documents, C h w a latent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from mmdit.attention import Blocks, Packed
from mmdit.embeddings import patch_grid

BOI, EOI = 2, 3  # ids of the tokens around an image, after <pad> and <eos>
Part = Tensor  # of a document: int64 (n,) token ids, or a float (C, h, w) latent
Rule = Literal["transfusion", "causal", "full"]
RULES = ("transfusion", "causal", "full")
BLOCK = 128  # tokens in a block of FlexAttention's mask
PAIRS = 4096  # pairs of blocks looked at together: 64 MiB for each mask


@dataclass(frozen=True)
class MixedBatch:
    """A batch of documents of text and images, made by `pack`. Raises ValueError for documents that are not complete.

    ids (T,) int64: the text of all documents in reading order, with BOI and EOI. document (T,) int64: the index of the
    document of each token. latents: I tensors (C, h, w), the k-th between the k-th BOI and the EOI that follows it.
    """

    ids: Tensor
    document: Tensor
    latents: tuple[Tensor, ...]
    boi: int = BOI
    eoi: int = EOI
    lead: int = 0
    """Number of tokens before BOI that state the image's size."""

    def __post_init__(self) -> None:
        ids, document = self.ids, self.document
        if ids.ndim != 1 or ids.dtype != torch.int64 or document.shape != ids.shape or document.dtype != torch.int64:
            raise ValueError(f"ids and document are {ids.dtype} {tuple(ids.shape)} and {document.dtype} "
                             f"{tuple(document.shape)}, expected int64 (T,) both")  # fmt: skip
        steps = document.diff()
        if not len(ids) or document[0] != 0 or ((steps < 0) | (steps > 1)).any():
            raise ValueError("document must count 0, 1, 2, ... over the tokens, each document with at least one")
        opened = self.opened
        if len(opened) != len(self.latents) or int((ids == self.eoi).sum()) != len(opened):
            raise ValueError(
                f"{len(self.latents)} images for {len(opened)} BOI and {int((ids == self.eoi).sum())} EOI tokens: "
                "each image needs one of each"
            )
        if len(opened) and (opened[-1] + 1 >= len(ids) or (ids[opened + 1] != self.eoi).any()):
            raise ValueError("an image must be closed: EOI has to follow its BOI in the text")
        if len(opened) and (document[opened] != document[opened + 1]).any():
            raise ValueError("a document ends inside an image")
        for i, latent in enumerate(self.latents):
            if latent.ndim != 3 or latent.shape[0] != self.latents[0].shape[0] or not latent.is_floating_point():
                raise ValueError(f"image {i} is {latent.dtype} {tuple(latent.shape)}, expected float (C, h, w), one C")

    @cached_property
    def opened(self) -> Tensor:
        """The indices of BOI in `ids`, (I,): where images begin."""
        return (self.ids == self.boi).nonzero()[:, 0]

    @cached_property
    def predicting(self) -> Tensor:
        """The indices in `ids` of tokens from which the next one is predicted: those followed by a token of the same
        document, except BOI, which is followed by an image."""
        place = (self.document[1:] == self.document[:-1]) & (self.ids[:-1] != self.boi)
        return place.nonzero()[:, 0]

    @property
    def num_documents(self) -> int:
        return int(self.document[-1]) + 1

    def to(self, device: torch.device | str) -> MixedBatch:
        latents = tuple(latent.to(device) for latent in self.latents)
        return replace(self, ids=self.ids.to(device), document=self.document.to(device), latents=latents)

    def with_latents(self, latents: Sequence[Tensor]) -> MixedBatch:
        """The same documents with these images in place of theirs, such as noised ones."""
        return replace(self, latents=tuple(latents))

    def layout(self, patch_size: int, steps: Tensor | None = None) -> Layout:
        """Position, span and coordinates of every token. steps (D,): the text steps before each document, if it
        continues a cached one (None: 0).

        Raises ValueError for sides that the patch does not divide.
        """
        device = self.ids.device
        shapes = [patch_grid(f"image {i}", x.shape[1:], patch_size) for i, x in enumerate(self.latents)]
        sizes = torch.tensor([h * w for h, w in shapes], dtype=torch.int64, device=device)
        span = torch.repeat_interleave(torch.arange(len(shapes), device=device), sizes)
        # In reading order every patch comes after the BOI of its image and before the next token of the text.
        tokens = torch.arange(len(self.ids), device=device)
        before = torch.zeros(len(self.ids) + 1, dtype=torch.int64, device=device)
        before[self.opened + 1] = sizes
        before = before[:-1].cumsum(0)  # patches before each text token
        first = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])[:-1]
        inside = torch.arange(len(span), device=device) - first[span]
        position = torch.cat([(self.opened + before[self.opened])[span] + 1 + inside, tokens + before])
        document = torch.cat([self.document[self.opened][span], self.document])
        # A whole image is one step of the text; its patches differ in row and column, counted from its centre.
        step = torch.zeros(len(self.ids) + 1, dtype=torch.int64, device=device)
        step[self.opened + 1] = 1
        step = tokens + step[:-1].cumsum(0)
        start = torch.zeros(self.num_documents, dtype=torch.int64, device=device)
        start[self.document.flip(0)] = step.flip(0)  # the last write is that of the document's first token
        step = step - (start if steps is None else start - steps)[self.document]
        origin = step.new_zeros(len(step)).float()  # text has row and column 0
        rows = [torch.arange(h, device=device).repeat_interleave(w) - (h - 1) / 2 for h, w in shapes]
        columns = [torch.arange(w, device=device).repeat(h) - (w - 1) / 2 for h, w in shapes]
        coordinates = torch.stack(
            [
                torch.cat([(step[self.opened] + 1)[span], step]).float(),
                torch.cat([*rows, origin]),
                torch.cat([*columns, origin]),
            ],
            dim=1,
        )
        spans = torch.cat([span, span.new_full((len(self.ids),), -1)])
        return Layout(document, position, spans, coordinates, shapes)


@dataclass(frozen=True)
class Layout:
    """What each of S = N + T tokens carries, patches first.

    document, position (S,) int64; span (S,) int64, the index of a patch's image, -1 for text; coordinates (S, 3): step
    of the text, and row and column from the image's centre, 0 for text. shapes: rows and columns of each image.
    """

    document: Tensor
    position: Tensor
    span: Tensor
    coordinates: Tensor
    shapes: list[tuple[int, int]]

    @property
    def num_patches(self) -> int:
        return sum(h * w for h, w in self.shapes)

    @cached_property
    def rows(self) -> Tensor:
        """Token indices of each document in reading order, (D, longest), padded with -1."""
        order = (self.document * (self.position.max() + 1) + self.position).argsort()
        counts = torch.bincount(self.document)
        rows = torch.full((len(counts), int(counts.max())), -1, dtype=torch.int64, device=order.device)
        rows[torch.arange(rows.shape[1], device=order.device) < counts[:, None]] = order
        return rows

    def attending(self, rule: Rule = "transfusion") -> Packed:
        """The mask for `attention`, dense within each document."""
        rows = self.rows
        mask = sees(self, rows.clamp(min=0)[:, :, None], rows.clamp(min=0)[:, None, :], rule)
        mask = mask & (rows >= 0)[:, None, :]
        mask[..., 0] |= rows < 0  # a padding query must see some key, or its softmax is NaN
        places = torch.empty_like(self.document)
        places[rows[rows >= 0]] = (rows >= 0).flatten().nonzero()[:, 0]
        ordered = torch.equal(places, torch.arange(rows.numel(), device=rows.device))
        return Packed(mask[:, None], places, ordered)

    def mask_mod(self, rule: Rule = "transfusion") -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """The same rule as a mask_mod of FlexAttention, over all documents."""
        return lambda b, h, query, key: sees(self, query, key, rule)

    def blocks(self, rule: Rule = "transfusion") -> Blocks:
        """The same rule as a block mask of FlexAttention, equal to that of torch's `create_block_mask`, which computes
        the mask of all pairs of tokens, S x S: here it is of those pairs of blocks that may share a document.
        """
        from torch.nn.attention.flex_attention import BlockMask

        n, device = len(self.document), self.document.device
        index = torch.arange(-(-n // BLOCK) * BLOCK, device=device).view(-1, BLOCK)
        tokens, real = index.clamp(max=n - 1), index < n
        first, last = self.document[tokens].aminmax(dim=1)
        pairs = ((first[:, None] <= last) & (first <= last[:, None])).nonzero()
        found = []
        for query, key in (some.unbind(1) for some in pairs.split(PAIRS)):
            seen = sees(self, tokens[query][:, :, None], tokens[key][:, None, :], rule)
            seen = seen & real[query][:, :, None] & real[key][:, None, :]
            found.append(torch.stack([seen.flatten(1).any(1), seen.flatten(1).all(1)]))
        some, full = torch.zeros(2, len(index), len(index), dtype=torch.bool, device=device)
        some[pairs[:, 0], pairs[:, 1]], full[pairs[:, 0], pairs[:, 1]] = torch.cat(found, dim=1)
        how = {"BLOCK_SIZE": BLOCK, "mask_mod": self.mask_mod(rule), "seq_lengths": (n, n)}
        return Blocks(BlockMask.from_kv_blocks(*_listed(some & ~full), *_listed(full), **how))  # type: ignore[arg-type]

    def picture(self, rule: Rule = "transfusion") -> str:
        """The mask as text, a row per query in reading order: `#` is a key that it sees, `.` one that it does not."""
        order = self.rows[self.rows >= 0]
        mask = sees(self, order[:, None], order[None, :], rule).tolist()
        names = ["t" if s < 0 else str(s % 10) for s in self.span[order].tolist()]
        lines = ["  " + "".join(names)]
        return "\n".join(lines + [f"{n} " + "".join(".#"[k] for k in row) for n, row in zip(names, mask, strict=True)])


def _listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """(how many, which) columns are chosen in each row of a matrix, the chosen ones first, in FlexAttention's form."""
    which = chosen.int().argsort(dim=1, descending=True, stable=True)
    return chosen.sum(1).int()[None, None], which.int()[None, None]


def sees(layout: Layout, query: Tensor, key: Tensor, rule: Rule = "transfusion") -> Tensor:
    """Whether the tokens `query` see the tokens `key`: indices into the layout, of shapes that broadcast.

    rule: "transfusion", that of this file; "causal", without the bidirectional spans; "full", the whole document.
    """
    same = layout.document[query] == layout.document[key]
    if rule == "full":
        return same
    seen = layout.position[key] <= layout.position[query]
    if rule == "transfusion":
        seen = seen | ((layout.span[query] == layout.span[key]) & (layout.span[key] >= 0))
    return same & seen


def pack(
    documents: Sequence[Sequence[Part]], boi: int = BOI, eoi: int = EOI, sizes: range = range(0), patch_size: int = 1
) -> MixedBatch:
    """Documents as one batch: each is a list of token ids, int64 (n,), and latents, float (C, h, w), in reading order.

    BOI and EOI are put around every image. sizes: the ids of tokens for sizes 1, 2, ...; if there are any, those of the
    image's rows and columns of patches are put before BOI. Raises ValueError for an empty document, for a part that is
    neither text nor image, for ids that contain an image token already, and for an image larger than the largest size.
    """
    if not len(documents):  # it may be a tensor, which has no truth value
        raise ValueError("no document to pack")
    check_parts(documents, "document")
    ids: list[Tensor] = []
    latents: list[Tensor] = []
    lengths: list[int] = []
    around: dict[tuple[int, ...], Tensor] = {}  # copied to the device once
    for d, document in enumerate(documents):
        length = 0
        for part in document:
            if part.is_floating_point():
                latents.append(part)
                tokens = (*_size_tokens(part, sizes, patch_size), boi, eoi)
                if tokens not in around:
                    around[tokens] = torch.tensor(tokens, device=part.device)
                part = around[tokens]
            elif part.dtype != torch.int64 or part.ndim != 1:
                raise ValueError(
                    f"document {d} holds {part.dtype} {tuple(part.shape)}: text is int64 (n,), an image float (C, h, w)"
                )
            ids.append(part)
            length += len(part)
        if not length:
            raise ValueError(f"document {d} is empty")
        lengths.append(length)
    _check_text(documents, [boi, eoi, *sizes])
    device = ids[0].device
    document_of = torch.repeat_interleave(torch.arange(len(documents)), torch.tensor(lengths)).to(device)
    return MixedBatch(torch.cat(ids), document_of, tuple(latents), boi, eoi, 2 if sizes else 0)


def _check_text(documents: Sequence[Sequence[Part]], own: list[int]) -> None:
    """Raises ValueError for text that holds one of our own tokens. All text is looked at together: on a GPU every look
    waits for it.
    """
    texts = [(d, part) for d, document in enumerate(documents) for part in document if not part.is_floating_point()]
    if not texts:
        return
    wrong = torch.isin(torch.cat([part for _, part in texts]), torch.tensor(own, device=texts[0][1].device))
    if wrong.any():
        numbers = torch.repeat_interleave(torch.tensor([d for d, _ in texts]), torch.tensor([len(x) for _, x in texts]))
        raise ValueError(
            f"document {int(numbers[wrong.cpu()][0])} has an image token ({own[0]} or {own[1]}) inside its text: "
            "pack adds them"
        )


def check_parts(documents: Sequence[Sequence[Part]], what: str) -> None:
    """Raises ValueError for documents that are not lists of tensors, such as strings or PIL images."""
    if not isinstance(documents, Sequence | Tensor):
        raise ValueError(f"{what}s are a {type(documents).__name__}, expected a list of lists")
    for i, document in enumerate(documents):
        parts = [document] if isinstance(document, Tensor | str) else document
        wrong = next((part for part in parts if not isinstance(part, Tensor)), None)
        if wrong is not None or parts is not document:
            found = type(document if wrong is None else wrong).__name__
            raise ValueError(f"{what} {i} holds a {found}, expected a list of ids, int64 (n,), and latents (C, h, w)")


def _size_tokens(latent: Tensor, sizes: range, patch_size: int) -> list[int]:
    """The two tokens that state an image's size, or none."""
    if not sizes:
        return []
    rows, columns = (side // patch_size for side in latent.shape[1:])
    if min(rows, columns) < 1 or max(rows, columns) > len(sizes):
        raise ValueError(f"an image of {rows} x {columns} patches: there are tokens for sizes of 1 to {len(sizes)}")
    return [sizes[rows - 1], sizes[columns - 1]]
