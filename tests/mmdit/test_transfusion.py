"""The trunk over text and images: what may change what, packed as alone, and its special cases."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmdit.config import LlamaConfig, MMDiTConfig, TransfusionConfig, preset
from mmdit.model import MMDiT
from mmdit.sequences import pack, sees
from mmdit.transfusion import Transfusion

TINY = TransfusionConfig(vocab_size=40, in_channels=3, patch_size=2, depth=2, num_heads=2, head_dim=16, sample_size=8)
LLAMA = LlamaConfig(hidden=40, num_kv_heads=1)
SETTINGS = {
    "shared, added": TINY,
    "shared, image": replace(TINY, time="image"),
    "separate, added": replace(TINY, weights="separate"),
    "separate, image": replace(TINY, weights="separate", time="image"),
    "llama, shared": replace(TINY, llama=LLAMA),
    "llama, separate": replace(TINY, weights="separate", llama=LLAMA),
    "llama, image": replace(TINY, weights="separate", time="image", llama=LLAMA),
    "causal": replace(TINY, attention="causal"),
    "table": replace(TINY, positions="sincos"),
    "unet": replace(TINY, codec="unet", codec_width=8),
}


def alive(config, seed=0):
    """A model whose every parameter matters."""
    model, generator = Transfusion(config).double(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return model


def text(*ids):
    return torch.tensor(ids)


def image(height, width, seed=0):
    return torch.randn(3, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


DOCUMENTS = [
    [text(5, 6, 7), image(4, 6, 1), text(8)],
    [image(2, 2, 2), text(9, 10), image(6, 4, 3)],
    [text(11, 12, 13, 14)],
    [image(4, 4, 4)],
]
T = torch.tensor([0.3, 0.0, 0.8, 0.6], dtype=torch.float64)


@pytest.fixture(params=SETTINGS, ids=str)
def model(request):
    return alive(SETTINGS[request.param])


def flat(document):
    return torch.cat([document.logits.flatten(), *(v.flatten() for v in document.v)])


def test_shapes(model):
    out = model(pack(DOCUMENTS), T).per_document()
    assert [document.logits.shape for document in out] == [(6, 40), (6, 40), (4, 40), (2, 40)]
    assert [[tuple(v.shape) for v in d.v] for d in out] == [[(3, 4, 6)], [(3, 2, 2), (3, 6, 4)], [], [(3, 4, 4)]]


def test_packed_is_alone_outputs_and_gradients(model):
    times = [T[:1], T[1:3], None, T[3:]]
    direction = [torch.randn_like(flat(d)) for d in model(pack(DOCUMENTS), T).per_document()]

    def gradients(outputs):
        model.zero_grad()
        sum((flat(out) * d).sum() for out, d in zip(outputs, direction, strict=True)).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    together = model(pack(DOCUMENTS), T).per_document()
    alone = [model(pack([d]), t).per_document()[0] for d, t in zip(DOCUMENTS, times, strict=True)]
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(flat(a), flat(b), rtol=1e-9, atol=1e-9)
    a, b = gradients(together), gradients(alone)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-8, atol=1e-8)


@given(st.data())
def test_a_token_changes_exactly_what_may_see_it(data):
    setting = data.draw(st.sampled_from(list(SETTINGS)))
    text_part = st.lists(st.integers(4, 39), min_size=1, max_size=3).map(torch.tensor)
    image_part = st.tuples(st.sampled_from([2, 4]), st.sampled_from([2, 4]), st.integers(0, 9)).map(lambda a: image(*a))
    document = st.lists(st.one_of(text_part, image_part), min_size=1, max_size=4)
    documents = data.draw(st.lists(document, min_size=1, max_size=3))
    config, model = SETTINGS[setting], alive(SETTINGS[setting])
    batch = pack(documents)
    layout = batch.layout(2)
    t = torch.linspace(0.1, 0.9, len(batch.latents), dtype=torch.float64)
    token = data.draw(st.integers(0, len(layout.document) - 1))
    ids, latents = batch.ids, list(batch.latents)
    if token < layout.num_patches:
        which = int(layout.span[token])
        inside = token - int((layout.span == which).nonzero()[0])
        row, column = divmod(inside, latents[which].shape[2] // 2)
        latents[which] = latents[which].clone()
        latents[which][:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] += 1.0
    else:
        place = token - layout.num_patches
        if int(ids[place]) in (batch.boi, batch.eoi):
            return
        ids = ids.clone()
        ids[place] = 4 + (ids[place] - 3) % 36
    changed = replace(batch, ids=ids, latents=tuple(latents))
    with torch.no_grad():
        before, after = model(batch, t), model(changed, t)
    moved = torch.zeros(len(layout.document), dtype=torch.bool)
    moved[layout.num_patches :] = (before.states - after.states).abs().amax(1) > 1e-12
    patches = [(a - b).abs().unflatten(1, (-1, 2)).unflatten(3, (-1, 2)).amax((0, 2, 4)).flatten() > 1e-12
               for a, b in zip(before.v, after.v, strict=True)]  # fmt: skip
    if patches:
        moved[: layout.num_patches] = torch.cat(patches)
    everyone = torch.arange(len(layout.document))
    assert torch.equal(moved, sees(layout, everyone, torch.tensor(token), config.attention))


def test_text_never_depends_on_a_later_images_time_and_its_own_modality_has_none(model):
    batch = pack([[text(5, 6), image(4, 4), text(7)]])
    a, b = (model(batch, torch.tensor([t], dtype=torch.float64)) for t in (0.2, 0.7))
    assert torch.equal(a.states[:3], b.states[:3])  # before and at BOI
    assert (a.states[3:] != b.states[3:]).any() and (a.v[0] != b.v[0]).any()


def test_each_image_has_its_own_time(model):
    documents = [[image(4, 4, 1)], [image(4, 4, 1)]]
    out = model(pack(documents), torch.tensor([0.2, 0.7], dtype=torch.float64))
    assert (out.v[0] - out.v[1]).abs().max() > 1e-3
    same = model(pack(documents), torch.tensor([0.7, 0.7], dtype=torch.float64))
    torch.testing.assert_close(same.v[1], out.v[1], rtol=1e-10, atol=1e-12)
    clean = model(pack(documents))
    torch.testing.assert_close(clean.v[0], model(pack(documents), torch.zeros(2, dtype=torch.float64)).v[0])


def test_all_text_is_a_causal_language_model():
    """The same blocks by hand: pre-norm, rotary attention that looks back, MLP."""
    from torch.nn import functional as F

    from mmdit.attention import attention
    from mmdit.embeddings import rotary_mixed

    model = alive(TINY)
    ids = torch.arange(4, 13)
    x = model.embed(ids)[None]
    coordinates = torch.stack([torch.arange(9.0), torch.zeros(9), torch.zeros(9)], 1)
    rotary = rotary_mixed(coordinates, 16)
    mask = torch.ones(9, 9, dtype=torch.bool).tril()[None, None]
    for block in model.blocks:
        stream = block.all
        (shift, shift2), (scale, scale2) = stream.modulation.shift, stream.modulation.scale
        q, k, v = stream.attn(F.layer_norm(x, (32,), 1 + scale, shift, 1e-6), rotary)
        x = x + stream.attn.out(attention(q, k, v, mask))
        x = x + stream.mlp(F.layer_norm(x, (32,), 1 + scale2, shift2, 1e-6))
    logits = model.head(model.norm_out(x))[0]
    torch.testing.assert_close(model(pack([[ids]])).logits, logits, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("qk_norm", [None, "rms_norm"])
def test_in_sd3s_setting_it_is_the_mmdit(qk_norm):
    """One image, all of the text seen, no mask: the same weights, the same velocity."""
    shape = dict(in_channels=3, patch_size=2, depth=3, num_heads=2, head_dim=16, qk_norm=qk_norm, sample_size=8)
    config = TransfusionConfig(vocab_size=40, weights="separate", time="all", attention="full", positions="sincos",
                               pos_embed_max_size=12, **shape)  # fmt: skip
    ours = alive(config)
    sd3 = MMDiT(MMDiTConfig(context_dim=32, pooled_dim=8, pos_embed_max_size=12, **shape)).double()
    with torch.no_grad():
        for p in sd3.parameters():
            p.zero_()
        sd3.context_in.weight.copy_(torch.eye(32))
        own, theirs = ours.state_dict(), sd3.state_dict()
        for name, value in theirs.items():
            if name.startswith(("pooled_in", "context_in")):
                continue  # an empty pooled vector, and words that are embedded already
            value.copy_(own[name][: len(value)])  # the last block's text has two of six modulations there
    x_t, t, ids = image(6, 8, 5), torch.tensor([0.4], dtype=torch.float64), torch.tensor([[5, 6, 7, 8]])
    batch = pack([[ids[0], x_t]])
    expected = sd3(x_t[None], t, ours.embed(batch.ids)[None], torch.zeros(1, 8, dtype=torch.float64))
    torch.testing.assert_close(ours(batch, t).v[0], expected[0], rtol=1e-6, atol=1e-9)
    assert expected.abs().max() > 1e-2


def test_an_image_batch_and_an_empty_one_train(model):
    """Gradients are finite and reach what they should; without images none of the image's weights has one."""
    model.zero_grad()
    out = model(pack([[image(4, 4)]]), torch.tensor([0.5], dtype=torch.float64))
    out.v[0].square().mean().backward()
    assert all(
        p.grad is not None and p.grad.isfinite().all()
        for p in [*model.patch_in.parameters(), *model.patch_out.parameters()]
    )
    model.zero_grad()
    model(pack([[text(5, 6, 7)]])).logits.sum().backward()
    assert model.embed.weight.grad.isfinite().all()


def test_blocks_may_be_narrower_than_what_they_read(model):
    """FSDP gathers them in half precision, learnt shifts and scales too, and autocast leaves states in fp32."""
    model, t = model.float(), T.float()
    batch = pack([[x if x.ndim == 1 else x.float() for x in document] for document in DOCUMENTS])
    with torch.autocast("cpu", torch.bfloat16):
        wide = torch.cat([flat(d).float() for d in model(batch, t).per_document()])
        model.blocks.bfloat16()
        narrow = torch.cat([flat(d).float() for d in model(batch, t).per_document()])
    assert (narrow - wide).norm() < 0.05 * wide.norm()
    narrow.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("weights", ["shared", "separate"])
def test_all_blocks_and_batches_share_one_compiled_graph(weights):
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    model = Transfusion(replace(TINY, weights=weights, depth=3))
    for block in model.blocks:
        block.compile(dynamic=True, backend="eager")
    for sides in [(4, 6), (6, 6, 8), (8, 4, 4, 6)]:
        model(
            pack([[text(5, 6, 7), torch.randn(3, side, 8)] for side in sides]), torch.rand(len(sides))
        ).states.sum().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_presets():
    model = Transfusion(preset("transfusion-tiny"))
    assert (model.config.vocab_size, model.config.in_channels, model.config.patch_size) == (512, 16, 1)
    out = model(pack([[text(7, 8), torch.randn(16, 8, 8)]]), torch.tensor([0.5]))
    assert out.logits.isfinite().all() and not out.v[0].any()  # the way out of patches starts at zero


@pytest.mark.parametrize(
    ("documents", "t", "what"),
    [
        ([[text(5), image(4, 4)]], torch.rand(2), r"t has shape \(2,\), expected a tensor \(1,\)"),
        ([[text(5), image(4, 4)]], [0.5], r"t is a list, expected a tensor \(1,\)"),
        ([[torch.tensor([7, -1])]], None, "token -1 is beyond the vocabulary"),
        ([[text(5, 40)]], None, "token 40 is beyond the vocabulary of 40"),
        ([[torch.randn(4, 4, 4)]], None, "images have 4 channels, expected 3"),
        ([[image(4, 5)]], None, "must be multiples of the patch"),
    ],
)
def test_bad_input_is_refused(documents, t, what):
    with pytest.raises(ValueError, match=what):
        alive(TINY)(pack(documents), t)


def test_sd3s_setting_wants_one_image_a_document():
    model = alive(replace(TINY, weights="separate", time="all", attention="full"))
    with pytest.raises(ValueError, match="every document has one image"):
        model(pack([[text(5)]]))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (dict(weights="both"), "weights is 'both', expected one of"),
        (dict(head_dim=12), "multiple of 8"),
        (dict(vocab_size=3), "at least 5"),
        (dict(depth=0), "depth is 0"),
        (dict(llama=LLAMA, time="image"), 'weights = "separate" or time = "added"'),
        (dict(llama=LLAMA, weights="separate", time="all"), "nothing modulates"),
        (dict(llama=LlamaConfig(40, 3)), "not 'both', 16, 2 and 3"),
        (dict(llama=LLAMA, positions="sincos"), "not 'sincos', 16, 2 and 1"),
        (dict(llama=dict(hidden=0, num_kv_heads=1)), "hidden is 0"),
        (dict(llama=dict(hidden=8, num_kv_heads=1, rope_theta=-1.0)), "expected positive numbers"),
        (dict(llama=dict(hidden=8, num_kv_heads=1, eps=float("nan"))), "eps is nan"),
        (dict(llama=dict(hiden=8)), "no config of Llama's block"),
        (dict(mlp_ratio=-1.0), "mlp_ratio is -1"),
        (dict(size_tokens=-3), "size_tokens is -3"),
        (dict(size_tokens=10**30), "size_tokens is 1000"),
        (dict(pos_embed_max_size=0), "pos_embed_max_size is 0"),
        (dict(codec="unet", patch_size=1), "patch_size is 1, a U-Net halves to patches of 2, 4, 8"),
        (dict(codec="unet", patch_size=6), "patch_size is 6, a U-Net halves"),
        (dict(codec="unet", codec_width=132), "above 128 of 32"),
        (dict(positions="both", size_tokens=3, pos_embed_max_size=2), "an image that has no places"),
    ],
)
def test_bad_configs_are_refused(change, what):
    with pytest.raises(ValueError, match=what):
        replace(TINY, **change)


def test_an_image_may_be_larger_than_a_table_that_is_not_there():
    assert replace(TINY, positions="rope", size_tokens=3, pos_embed_max_size=2).size_tokens == 3


@pytest.mark.parametrize("words", ["a red circle", ["a red circle"], torch.zeros(1, 3)])
def test_what_is_not_packed_is_refused_in_one_line(words):
    model = Transfusion(TINY)
    with pytest.raises(ValueError, match=r"the batch is a \w+, expected documents packed by model.pack"):
        model(words, None)
    with pytest.raises(ValueError, match="0 holds a (str|Tensor), expected a list of ids"):
        model.pack(words)
