"""Starting from other weights: the MMDiT in SD3's setting, both at once, new tokens, and what does not fit."""

from dataclasses import replace

import pytest
import torch

from mmdit.config import MMDiTConfig, TransfusionConfig
from mmdit.files import save
from mmdit.init_from import init_from, text_parameters
from mmdit.model import MMDiT
from mmdit.transfusion import Transfusion

SHAPE = dict(in_channels=3, patch_size=2, depth=3, num_heads=2, head_dim=16, qk_norm="rms_norm", sample_size=8)
SD3 = MMDiTConfig(context_dim=32, pooled_dim=8, pos_embed_max_size=12, **SHAPE)
TRUNK = TransfusionConfig(vocab_size=40, weights="separate", time="image", pos_embed_max_size=12, **SHAPE)


def random(model, seed=0):
    """A model whose every parameter matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    return model


@torch.no_grad()
@pytest.mark.parametrize("layout", ["mmdit", "diffusers"])
def test_in_sd3s_setting_an_mmdit_comes_over_whole(layout, tmp_path):
    """The same velocity where its words are embedded as the MMDiT's context, and its pooled text adds nothing."""
    theirs = random(MMDiT(SD3))
    for p in (*theirs.pooled_in.parameters(), *theirs.context_in.parameters()):
        p.zero_()
    theirs.context_in.weight.copy_(torch.eye(32))
    save(theirs, tmp_path, layout)
    ours = Transfusion(replace(TRUNK, time="all", attention="full", positions="sincos"))
    started = init_from(ours, [tmp_path])
    x_t, t, ids = torch.randn(3, 6, 8), torch.tensor([0.4]), torch.tensor([5, 6, 7, 8])
    batch = ours.pack([[ids, x_t]])
    expected = theirs(x_t[None], t, ours.embed(batch.ids)[None], torch.zeros(1, 8))[0]
    assert expected.std() > 0.1
    torch.testing.assert_close(ours(batch, t).v[0], expected, rtol=1e-4, atol=1e-4)
    last = [f"blocks.2.txt.{name}" for name in ("attn.out", "mlp.fc1", "mlp.fc2")]  # an MMDiT's text ends before these
    leaves = [f"{name}.{leaf}" for name in (*last, "norm_out") for leaf in ("bias", "weight")]
    assert started.fresh == sorted([*leaves, "embed.weight", "head.weight"])


@pytest.mark.parametrize("weights", ["separate", "shared"])
def test_the_image_side_of_an_mmdit_comes_over_and_the_rest_is_named(weights, tmp_path):
    theirs = random(MMDiT(SD3))
    save(theirs, tmp_path)
    ours = Transfusion(replace(TRUNK, weights=weights, positions="rope"))
    started = init_from(ours, [tmp_path])
    stream = "img" if weights == "separate" else "all"
    state = ours.state_dict()
    image_side = {n: x for n, x in theirs.state_dict().items() if not n.startswith(("context", "pooled", "pos_"))}
    for name, value in image_side.items():
        if ".txt." not in name:
            assert torch.equal(state[name.replace(".img.", f".{stream}.")], value), name
        elif weights == "separate" and ".modulation." not in name:
            assert torch.equal(state[name], value), name
    [taken, fresh] = started.lines
    assert "left behind: pos_embed, context_in, pooled_in.fc1, pooled_in.fc2, blocks.*.txt.modulation" in taken
    assert f"(MMDiT): blocks.*.{stream}" in taken
    assert "embed" in fresh and "img" not in fresh and "patch_in" not in fresh
    placed = Transfusion(replace(TRUNK, weights=weights, positions="both", pos_embed_max_size=SD3.pos_embed_max_size))
    init_from(placed, [tmp_path])
    assert torch.equal(placed.pos_embed, theirs.pos_embed)


def test_another_trunk_comes_over_whole_with_more_tokens(tmp_path):
    theirs = random(Transfusion(replace(TRUNK, vocab_size=30)))
    save(theirs, tmp_path)
    ours = Transfusion(TRUNK)
    assert init_from(ours, [tmp_path]).fresh == []
    state = ours.state_dict()
    for name, value in theirs.state_dict().items():
        assert torch.equal(state[name][: len(value)], value), name
    embed, head = theirs.embed.weight.detach(), theirs.head.weight.detach()
    torch.testing.assert_close(ours.head.weight.detach()[30:], head.mean(0).expand(10, -1))
    new = ours.embed.weight.detach()[30:]
    distance = (new - embed.mean(0)) / embed.std(0)
    assert 0.8 < distance.std() < 1.2 and distance.abs().max() < 5  # like the others, and no two the same


def test_the_first_path_wins(tmp_path):
    models = [random(Transfusion(TRUNK), seed) for seed in (1, 2)]
    for name, model in zip("ab", models, strict=True):
        save(model, tmp_path / name)
    ours = Transfusion(TRUNK)
    started = init_from(ours, [tmp_path / "a", tmp_path / "b"])
    assert all(torch.equal(x, models[0].state_dict()[name]) for name, x in ours.state_dict().items())
    assert list(map(len, started.taken.values())) == [len(models[0].state_dict()), 0]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (dict(depth=2, num_heads=1), "depth is 2, there 3; num_heads is 1, there 2"),
        (dict(num_heads=4, head_dim=8), "num_heads is 4, there 2"),  # the same shapes of other heads
        (dict(qk_norm=None), "qk_norm is None, there 'rms_norm'"),
        (dict(patch_size=1), "patch_size is 1, there 2"),
        (dict(time="added"), 'take time = "image"'),
    ],
)
def test_an_mmdit_of_another_shape_is_refused(change, what, tmp_path):
    save(MMDiT(SD3), tmp_path)
    ours = random(Transfusion(replace(TRUNK, **change)))
    before = {name: x.clone() for name, x in ours.state_dict().items()}
    with pytest.raises(ValueError, match=what):
        init_from(ours, [tmp_path])
    assert all(torch.equal(x, before[name]) for name, x in ours.state_dict().items())


def test_what_has_no_place_is_refused(tmp_path):
    save(MMDiT(replace(SD3, dual_attention_layers=(1,))), tmp_path / "dual")
    with pytest.raises(ValueError, match="no place of their shape in the trunk: blocks.1.img.attn2"):
        init_from(Transfusion(TRUNK), [tmp_path / "dual"])
    save(Transfusion(replace(TRUNK, vocab_size=50)), tmp_path / "wide")
    with pytest.raises(ValueError, match="vocab_size is 40, but there are 50 tokens"):
        init_from(Transfusion(TRUNK), [tmp_path / "wide"])
    with pytest.raises(FileNotFoundError, match="holds no model"):
        init_from(Transfusion(TRUNK), [tmp_path / "nothing"])


def test_shared_weights_have_no_text_of_their_own():
    with pytest.raises(ValueError, match='must be "separate"'):
        text_parameters(Transfusion(replace(TRUNK, weights="shared")))
