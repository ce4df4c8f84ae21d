"""Packing, and the mask rule: written once, the same in its three faces, and never across documents."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmdit.sequences import BOI, EOI, RULES, MixedBatch, pack, sees

TEXT, IMAGE = torch.tensor([5, 6, 7]), torch.zeros(4, 4, 6)


@st.composite
def documents(draw, patch=2):
    """Documents of text and images in any order, with at least one part each."""
    text = st.integers(1, 4).map(lambda n: torch.arange(5, 5 + n))
    image = st.tuples(st.integers(1, 3), st.integers(1, 3)).map(lambda s: torch.zeros(3, s[0] * patch, s[1] * patch))
    document = st.lists(st.one_of(text, image), min_size=1, max_size=4)
    return draw(st.lists(document, min_size=1, max_size=3))


def reading_order(document, patch=2):
    """(modality, image) of every token of a document, as it is read."""
    out, images = [], 0
    for part in document:
        if part.is_floating_point():
            num = part.shape[1] * part.shape[2] // patch**2
            out += [("t", -1)] + [("p", images)] * num + [("t", -1)]
            images += 1
        else:
            out += [("t", -1)] * len(part)
    return out


@given(documents())
def test_the_mask_is_the_rule_in_words(given_documents):
    batch = pack(given_documents)
    layout = batch.layout(2)
    tokens = [
        (d, k, *token) for d, document in enumerate(given_documents) for k, token in enumerate(reading_order(document))
    ]
    order = layout.rows[layout.rows >= 0]
    assert sorted(order.tolist()) == list(range(len(tokens)))
    assert [of == "p" for _, _, of, _ in tokens] == (layout.span[order] >= 0).tolist()
    seen = sees(layout, order[:, None], order[None, :])
    for q, (doc, at, of, image) in enumerate(tokens):
        for k, (other, place, kind, whose) in enumerate(tokens):
            one_image = of == kind == "p" and image == whose
            assert seen[q, k] == (doc == other and (place <= at or one_image))


@given(documents())
def test_what_predicts_is_followed_by_text_of_its_document(given_documents):
    batch = pack(given_documents)
    expected = [
        k
        for k, (token, document) in enumerate(zip(batch.ids.tolist(), batch.document.tolist(), strict=True))
        if token != BOI and k + 1 < len(batch.ids) and batch.document[k + 1] == document
    ]
    assert batch.predicting.tolist() == expected


@given(documents(), st.sampled_from(["transfusion", "causal", "full"]))
def test_its_three_faces_agree(given_documents, rule):
    layout = pack(given_documents).layout(2)
    size = len(layout.document)
    index = torch.arange(size)
    dense = sees(layout, index[:, None], index[None, :], rule)
    zero = torch.zeros((), dtype=torch.int64)
    assert torch.equal(dense, layout.mask_mod(rule)(zero, zero, index[:, None], index[None, :]))
    packed = layout.attending(rule)
    for d, row in enumerate(layout.rows):
        real = row >= 0
        assert torch.equal(packed.mask[d, 0][real][:, real], dense[row[real]][:, row[real]])
        assert not packed.mask[d, 0][real][:, ~real].any() and packed.mask[d, 0].any(-1).all()
    assert torch.equal(layout.rows.flatten()[packed.places], index)
    order = layout.rows[layout.rows >= 0]
    drawn = [line[2:] for line in layout.picture(rule).splitlines()[1:]]
    assert drawn == ["".join(".#"[s] for s in line) for line in dense[order][:, order].tolist()]


def test_the_picture():
    layout = pack([[TEXT[:1], torch.zeros(1, 1, 2), TEXT[:1]]]).layout(1)
    assert layout.picture() == "\n".join(
        ["  tt00tt", "t #.....", "t ##....", "0 ####..", "0 ####..", "t #####.", "t ######"]
    )


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("lengths", [[300, 7, 90], [5], [128], [64] * 9, [1000]])
def test_its_blocks_are_those_that_flex_attention_would_find(rule, lengths, monkeypatch):
    from torch.nn.attention.flex_attention import create_block_mask

    monkeypatch.setattr("mmdit.sequences.PAIRS", 5)
    texts = [torch.full((n,), 7) for n in lengths]
    layout = pack([[text, torch.zeros(1, 12, 8 + 2 * (i % 3))] for i, text in enumerate(texts)]).layout(1)
    n = len(layout.document)
    found, expected = layout.blocks(rule).mask, create_block_mask(layout.mask_mod(rule), 1, 1, n, n, device="cpu")
    assert found.seq_lengths == expected.seq_lengths and found.BLOCK_SIZE == expected.BLOCK_SIZE
    for name in ("kv_num_blocks", "kv_indices", "q_num_blocks", "q_indices"):
        for one in (name, f"full_{name}"):
            a, b = getattr(found, one), getattr(expected, one)
            assert a.dtype == b.dtype and torch.equal(a, b), one


def test_the_mask_of_many_documents_is_never_whole():
    """What is computed at a time is far smaller than tokens x tokens."""
    layout = pack([[torch.full((40,), 7), torch.zeros(1, 8, 8)] for _ in range(64)]).layout(1)
    with Sizes() as sizes:
        layout.blocks()
    assert sizes.largest < len(layout.document) ** 2 / 4


class Sizes(TorchDispatchMode):
    """The number of elements of the largest tensor that is made within."""

    largest = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        made = op(*args, **(kwargs or {}))
        self.largest = max([self.largest, *(x.numel() for x in tree_leaves(made) if isinstance(x, torch.Tensor))])
        return made


def test_flex_attention_takes_the_rule():
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    layout = pack([[TEXT, IMAGE], [IMAGE, TEXT, IMAGE]]).layout(2)
    size = len(layout.document)
    q, k, v = torch.randn(3, 1, 2, size, 16, generator=torch.Generator().manual_seed(0)).unbind(0)
    block_mask = create_block_mask(layout.mask_mod(), None, None, size, size, device="cpu")
    theirs = flex_attention(q, k, v, block_mask=block_mask).transpose(1, 2).flatten(2)
    torch.testing.assert_close(layout.attending().attend(q, k, v), theirs, rtol=1e-4, atol=1e-5)


def test_positions_count_an_image_as_one_step_and_documents_anew():
    layout = pack([[TEXT, IMAGE, TEXT[:2]], [IMAGE, TEXT[:1]]]).layout(2)
    step, row, column = layout.coordinates.T
    first, second = layout.document == 0, layout.document == 1
    assert step[first & (layout.span < 0)].tolist() == [0, 1, 2, 3, 5, 6, 7]  # a b c BOI (image) EOI a b
    assert step[second & (layout.span < 0)].tolist() == [0, 2, 3]
    assert set(step[layout.span == 0].tolist()) == {4} and set(step[layout.span == 1].tolist()) == {1}
    assert row[layout.span == 0].tolist() == [-0.5] * 3 + [0.5] * 3
    assert column[layout.span == 0].tolist() == [-1, 0, 1] * 2
    assert not row[layout.span < 0].any() and not column[layout.span < 0].any()


def test_pack_puts_every_image_between_its_two_tokens():
    batch = pack([[TEXT, IMAGE, TEXT[:1]], [IMAGE]], boi=100, eoi=101)
    assert batch.ids.tolist() == [5, 6, 7, 100, 101, 5, 100, 101]
    assert batch.document.tolist() == [0, 0, 0, 0, 0, 0, 1, 1]
    assert batch.opened.tolist() == [3, 6] and batch.num_documents == 2
    assert [latent is IMAGE for latent in batch.latents] == [True, True]
    assert batch.lead == 0 and pack([[IMAGE]], sizes=range(10, 16)).lead == 2  # tokens of the size
    other = batch.with_latents([IMAGE + 1, IMAGE + 2])
    assert [float(latent.mean()) for latent in other.latents] == [1, 2] and other.ids is batch.ids


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        ([], "no document"),
        ([[TEXT], []], "document 1 is empty"),
        ([[torch.zeros(0, dtype=torch.int64)]], "document 0 is empty"),
        ([[torch.tensor([5, BOI])]], "image token .* inside its text"),
        ([[TEXT], [torch.tensor([EOI])]], "document 1 has an image token"),
        ([[TEXT.int()]], "torch.int32"),
        ([[TEXT], ["a star"]], "document 1 holds a str, expected a list of ids"),
        (["a star"], "document 0 holds a str"),
        ([TEXT], "document 0 holds a Tensor, expected a list"),
        ([[TEXT[None]]], r"\(1, 3\): text is int64"),
        ([[torch.zeros(4, 4)]], r"expected float \(C, h, w\)"),
        ([[IMAGE, torch.zeros(3, 4, 4)]], "one C"),
    ],
)
def test_what_is_no_document_is_refused(wrong, what):
    with pytest.raises(ValueError, match=what):
        pack(wrong)


@pytest.mark.parametrize(
    ("ids", "document", "images", "what"),
    [
        ([5, BOI], [0, 0], 1, "1 BOI and 0 EOI"),
        ([5, BOI, EOI], [0, 0, 0], 2, "2 images for 1 BOI"),
        ([BOI, 5, EOI], [0, 0, 0], 1, "EOI has to follow its BOI"),
        ([EOI, BOI], [0, 0], 1, "EOI has to follow its BOI"),
        ([BOI, EOI], [0, 1], 1, "ends inside an image"),
        ([5, 6], [1, 1], 0, "must count 0, 1, 2"),
        ([5, 6], [0, 2], 0, "must count 0, 1, 2"),
        ([5, 6, 7], [0, 1, 0], 0, "must count 0, 1, 2"),
    ],
)
def test_broken_batches_are_refused(ids, document, images, what):
    with pytest.raises(ValueError, match=what):
        MixedBatch(torch.tensor(ids), torch.tensor(document), (IMAGE,) * images)


def test_an_image_of_less_than_a_patch_has_no_size():
    with pytest.raises(ValueError, match="0 x 1 patches: there are tokens for sizes of 1 to 6"):
        pack([[IMAGE]], sizes=range(10, 16), patch_size=5)


@pytest.mark.parametrize("size", [(3, 4), (4, 5), (0, 4)])
def test_sides_that_the_patch_does_not_divide_are_refused(size):
    with pytest.raises(ValueError, match="image 1 is .* must be multiples of the patch"):
        pack([[IMAGE], [torch.zeros(4, *size)]]).layout(2)
