"""The trunk against diffusers' SD3Transformer2DModel with the same weights; each option against its effect.

Random weights are drawn wide (std 0.2): a fresh model predicts 0, and a modulation that is 0 hides whatever it gates.
"""

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmdit.attention import attention
from mmdit.blocks import Modulation, PerToken
from mmdit.config import MMDiTConfig, preset, preset_names
from mmdit.embeddings import (
    crop_positions,
    extended_positions,
    patchify,
    position_table,
    rotary_2d,
    rotary_mixed,
    rotate,
    unpatchify,
)
from mmdit.formats import config_to_diffusers
from mmdit.layouts import DIFFUSERS
from mmdit.model import MMDiT

TINY = MMDiTConfig(
    in_channels=4,
    depth=3,
    num_heads=2,
    head_dim=16,
    context_dim=24,
    pooled_dim=20,
    sample_size=16,
    pos_embed_max_size=12,
)
VARIANTS = {
    "sd3": TINY,
    "qk-norm": replace(TINY, qk_norm="rms_norm"),
    "dual attention": replace(TINY, qk_norm="rms_norm", dual_attention_layers=(0, 1)),
    "dual attention in all blocks, no qk-norm": replace(TINY, dual_attention_layers=(0, 1, 2)),
    "one block": replace(TINY, depth=1, qk_norm="rms_norm"),
}


def alive(config: MMDiTConfig, seed: int = 0) -> MMDiT:
    """A model whose every parameter matters."""
    model, generator = MMDiT(config), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.2 * torch.randn(p.shape, generator=generator))
    return model


def inputs(config: MMDiTConfig, batch: int = 3, height: int = 10, width: int = 16, tokens: int = 7, seed: int = 1):
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(batch, config.in_channels, height, width, generator=g),
        torch.rand(batch, generator=g),
        torch.randn(batch, tokens, config.context_dim, generator=g),
        torch.randn(batch, config.pooled_dim, generator=g),
    )


def assert_close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> None:
    """The largest difference, over the largest value."""
    assert a.shape == b.shape
    assert (a - b).abs().max() <= tolerance * b.abs().max()


# --- parity -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=VARIANTS, ids=str)
def pair(request):
    """(diffusers' model, ours with its weights)."""
    from diffusers import SD3Transformer2DModel

    config = VARIANTS[request.param]
    torch.manual_seed(0)
    reference = SD3Transformer2DModel(**config_to_diffusers(config))
    for p in reference.parameters():
        torch.nn.init.normal_(p, std=0.2)
    ours = MMDiT(config)
    ours.load_state_dict(DIFFUSERS.to_ours(reference.state_dict(), config))
    return reference, ours


@pytest.mark.parametrize(("batch", "height", "width"), [(3, 10, 16), (1, 24, 4), (2, 16, 16)])
def test_output_is_that_of_diffusers(pair, batch, height, width):
    reference, ours = pair
    x_t, t, context, pooled = inputs(ours.config, batch, height, width)
    with torch.no_grad():
        v = ours(x_t, t, context, pooled)
        assert_close(v, reference(x_t, context, pooled, t * 1000).sample)
    assert v.abs().max() > 0.1


@settings(max_examples=12)
@given(
    depth=st.integers(1, 3),
    heads=st.sampled_from([(1, 12), (2, 8), (3, 4)]),
    qk_norm=st.sampled_from([None, "rms_norm"]),
    dual=st.sets(st.integers(0, 2)),
    patch_size=st.integers(1, 3),
    rows=st.integers(1, 5),
    columns=st.integers(1, 5),
    tokens=st.integers(1, 9),
    small=st.sampled_from([1.0, 1e-3]),  # so small that what keeps norms from dividing by zero counts
)
def test_output_is_that_of_diffusers_at_any_shape(
    depth, heads, qk_norm, dual, patch_size, rows, columns, tokens, small
):
    from diffusers import SD3Transformer2DModel

    config = replace(
        TINY,
        depth=depth,
        num_heads=heads[0],
        head_dim=heads[1],
        qk_norm=qk_norm,
        dual_attention_layers=tuple(sorted(i for i in dual if i < depth)),
        patch_size=patch_size,
        sample_size=8,
    )
    ours, reference = alive(config), SD3Transformer2DModel(**config_to_diffusers(config))
    with torch.no_grad():
        for qkv in (p for name, p in ours.named_parameters() if ".qkv." in name):
            qkv[: 2 * config.width] *= small
    reference.load_state_dict(DIFFUSERS.from_ours(ours.state_dict(), config))
    x_t, t, context, pooled = inputs(config, 2, rows * patch_size, columns * patch_size, tokens)
    with torch.no_grad():
        assert_close(ours(x_t, t, context, pooled), reference(x_t, context, pooled, t * 1000).sample)


def test_bfloat16_is_as_near_to_float32_as_that_of_diffusers(pair):
    reference, ours = pair
    x_t, t, context, pooled = inputs(ours.config, batch=16)
    with torch.no_grad():
        expected = reference(x_t, context, pooled, t * 1000).sample
        half = [x.bfloat16() for x in (x_t, context, pooled)]
        theirs = copy.deepcopy(reference).bfloat16()(*half, t * 1000).sample.float() - expected
        own = copy.deepcopy(ours).bfloat16()(half[0], t, *half[1:]).float() - expected
    assert 0 < own.square().mean() <= 1.2 * theirs.square().mean()


def test_gradients_are_those_of_diffusers(pair):
    reference, ours = pair
    x_t, t, context, pooled = inputs(ours.config)
    direction = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(2))
    reference.zero_grad(), ours.zero_grad()
    x_1, x_2 = x_t.clone().requires_grad_(), x_t.clone().requires_grad_()
    (ours(x_1, t, context, pooled) * direction).sum().backward()
    (reference(x_2, context, pooled, t * 1000).sample * direction).sum().backward()
    gradients = {name: p.grad for name, p in ours.named_parameters()} | {"pos_embed": ours.pos_embed}
    translated = DIFFUSERS.from_ours(gradients, ours.config)
    theirs = {name: p.grad for name, p in reference.named_parameters()}
    assert translated.keys() == theirs.keys() | {"pos_embed.pos_embed"}
    for name, gradient in theirs.items():
        if gradient.abs().max() < 1e-3:  # a key's bias shifts a row of scores by one number, which softmax forgets
            assert translated[name].abs().max() < 1e-3, name
        else:
            assert_close(translated[name], gradient, 1e-4)
    assert_close(x_1.grad, x_2.grad)


@pytest.mark.parametrize(("name", "num_tensors"), [("sd3-medium", 683), ("sd3.5-medium", 909), ("sd3.5-large", 1227)])
def test_published_models_have_diffusers_tensors(name, num_tensors):
    """Names and shapes of the real checkpoints (number of tensors as published), without their memory."""
    from diffusers import SD3Transformer2DModel

    config = preset(name)
    with torch.device("meta"):
        ours = MMDiT(config).state_dict()
        theirs = SD3Transformer2DModel(**config_to_diffusers(config)).state_dict()
    translated = DIFFUSERS.from_ours(ours, config)
    assert len(translated) == num_tensors
    assert {k: v.shape for k, v in translated.items()} == {k: v.shape for k, v in theirs.items()}


@pytest.mark.parametrize(("name", "billions"), [("sd3-medium", 2.028), ("sd3.5-medium", 2.243), ("sd3.5-large", 8.057)])
def test_parameters_of_published_models(name, billions):
    """As the model cards count them, without the table of positions."""
    with torch.device("meta"):
        assert round(sum(p.numel() for p in MMDiT(preset(name)).parameters()) / 1e9, 3) == billions


# --- positions ----------------------------------------------------------------------------------------------------


def test_position_table_is_that_of_diffusers_where_both_count_tokens():
    """With s = 16 tokens in a table of 16 both formulas are the token's number; rows and columns are not exchanged."""
    from diffusers.models.embeddings import get_2d_sincos_pos_embed

    theirs = get_2d_sincos_pos_embed(32, 16, base_size=16, output_type="pt").float()
    torch.testing.assert_close(position_table(32, 16, 16)[0], theirs, rtol=0, atol=2e-6)


@pytest.mark.parametrize("trained", [4, 16, 40])
def test_position_table_spans_0_to_16_where_it_was_trained(trained):
    """SD3, section 5.3.2: the trained grid is 0, 16/s, 2 * 16/s, ... at the centre of the table, at any s."""
    dim, side = 16, trained + 8
    table = position_table(dim, side, trained).view(side, side, dim)
    for token in (0, 1, trained - 1):
        p = torch.tensor(token * 16 / trained, dtype=torch.float64)
        omega = 10_000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
        expected = torch.cat([(p * omega).sin(), (p * omega).cos()]).float()
        torch.testing.assert_close(table[7, token + 4, : dim // 2], expected)
        torch.testing.assert_close(table[token + 4, 7, dim // 2 :], expected)


def test_crop_is_the_centre_of_the_table():
    table = torch.arange(36.0).view(1, 36, 1)
    assert crop_positions(table, 2, 4).flatten().tolist() == [13, 14, 15, 16, 19, 20, 21, 22]
    assert crop_positions(table, 6, 6).flatten().tolist() == list(range(36))
    with pytest.raises(ValueError, match="8 x 4 tokens does not fit the position table of 6 x 6"):
        crop_positions(table, 8, 4)


def test_patches_go_there_and_back():
    x = torch.randn(2, 3, 4, 6)
    patches = patchify(x, 2)
    assert patches.shape == (2, 6, 12)
    torch.testing.assert_close(patches[1, 4], x[1, :, 2:4, 2:4].flatten(), rtol=0, atol=0)  # channels first, going in
    channels_last = patches.unflatten(2, (3, 4)).transpose(2, 3).flatten(2)
    torch.testing.assert_close(unpatchify(channels_last, 2, 4, 6), x, rtol=0, atol=0)


def test_rotary_scores_depend_on_the_displacement_alone():
    """q . k of rotated vectors is a function of the rows and columns between them; and not a constant one."""
    height, width, dim = 5, 7, 8
    q, k = torch.randn(2, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rotary = rotary_2d(height, width, dim, torch.device("cpu"))
    here = [rotate(x.expand(1, 1, height * width, dim), rotary)[0, 0] for x in (q, k)]
    scores = (here[0] @ here[1].T).view(height, width, height, width)
    torch.testing.assert_close(scores[1:, 2:, 1:, 2:], scores[:-1, :-2, :-1, :-2], atol=1e-5, rtol=0)
    assert (scores[0, 0, 0, 1] - scores[0, 0, 1, 0]).abs() > 1e-3  # rows are not columns
    assert (scores[0, 0, 0, 0] - scores[0, 0, 0, 1]).abs() > 1e-3
    torch.testing.assert_close(scores[2, 3, 2, 3], q @ k, atol=1e-5, rtol=0)


def test_rotary_angles_are_the_formula():
    """Rows before columns, from the centre; in a sequence the step of the text first, with a base of its own."""

    def angle(at, num, base):
        return [at * base ** (-k / num) for k in range(num)]

    expected = [angle(row - 1, 4, 100) + angle(column - 1.5, 4, 100) for row in range(3) for column in range(4)]
    for of_angle, got in zip((torch.cos, torch.sin), rotary_2d(3, 4, 16, torch.device("cpu")), strict=True):
        torch.testing.assert_close(got, of_angle(torch.tensor(expected)))
    places = [(7, 0, 0), (8, -1.5, 2), (9, 0.5, -3)]
    expected = [angle(step, 4, 10_000) + angle(row, 2, 100) + angle(column, 2, 100) for step, row, column in places]
    for of_angle, got in zip((torch.cos, torch.sin), rotary_mixed(torch.tensor(places), 16), strict=True):
        torch.testing.assert_close(got, of_angle(torch.tensor(expected)))


def test_a_table_is_continued_about_its_centre_and_no_other_is():
    table = position_table(16, 6, 4)
    assert extended_positions(table, 6, 4) is table
    for side, longer in ((7, 8), (8, 8), (9, 10)):
        torch.testing.assert_close(extended_positions(table, side, 4), position_table(16, longer, 4))
    half = extended_positions(table.bfloat16(), 8, 4)  # a table as it is rounded
    torch.testing.assert_close(half, position_table(16, 8, 4).bfloat16())
    with pytest.raises(ValueError, match="cannot be continued"):
        extended_positions(table + 5e-3, 8, 4)


def test_rotary_of_a_larger_picture_agrees_where_they_overlap():
    small, large = (rotary_2d(n, n, 8, torch.device("cpu"))[0].view(n, n, -1) for n in (4, 6))
    torch.testing.assert_close(large[1:5, 1:5], small)


# --- what each option changes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["sincos", "rope"])
def test_positions_tell_patches_apart(positions):
    """Exchanging two patches is not just exchanging the answers; the model without positions would do that."""
    config = replace(TINY, positions=positions)
    model = alive(config)
    x_t, t, context, pooled = inputs(config, 1, 8, 8)
    swapped = torch.cat([x_t[..., 4:], x_t[..., :4]], dim=-1)
    with torch.no_grad():
        v, v_swapped = model(x_t, t, context, pooled), model(swapped, t, context, pooled)
    assert (torch.cat([v_swapped[..., 4:], v_swapped[..., :4]], dim=-1) - v).abs().max() > 1e-3 * v.abs().max()
    assert hasattr(model, "pos_embed") == (positions == "sincos")


def test_rope_differs_from_no_positions_only_by_attention():
    """With one token there is nothing to turn against the image; with the position table there is still its entry."""
    config = replace(TINY, positions="rope")
    model, table = alive(config), alive(TINY)
    table.load_state_dict(model.state_dict() | {"pos_embed": torch.zeros_like(table.pos_embed)})
    one, many = inputs(config, 1, 2, 2, tokens=1), inputs(config, 1, 8, 8)
    # The text keys are not turned, so even one patch, at the centre and thus at angle 0, is seen as without rotation.
    torch.testing.assert_close(model(*one), table(*one))
    assert (model(*many) - table(*many)).abs().max() > 1e-3


@pytest.mark.parametrize(
    "change",
    [
        dict(qk_norm="rms_norm"),
        dict(dual_attention_layers=(1,)),
        dict(mlp_ratio=2.0),
        dict(patch_size=4),
        dict(depth=2),
        dict(head_dim=8, num_heads=4),
        dict(sample_size=8),
    ],
    ids=str,
)
def test_each_option_changes_the_prediction(change):
    base, other = alive(TINY), alive(replace(TINY, **change))
    own = base.state_dict()
    common = {k: v for k, v in other.state_dict().items() if k in own and own[k].shape == v.shape}
    base.load_state_dict(own | {k: v for k, v in common.items() if k != "pos_embed"})
    x = inputs(TINY, 2, 8, 8)
    with torch.no_grad():
        assert (base(*x) - other(*x)).abs().max() > 1e-3


def test_sizes_of_weights_follow_the_config():
    model = MMDiT(replace(TINY, mlp_ratio=2.5, dual_attention_layers=(1,)))
    assert model.blocks[0].img.mlp.fc1.out_features == 80
    assert [block.img.modulation.num for block in model.blocks] == [6, 9, 6]
    assert [block.txt.modulation.num for block in model.blocks] == [6, 6, 2]
    assert [block.img.attn2 is not None for block in model.blocks] == [False, True, False]
    assert model.blocks[2].txt.mlp is None and model.blocks[2].txt.attn.out is None


def test_a_fresh_model_predicts_zero_and_every_weight_soon_learns():
    """Zero output and zero modulations at first; after a step on them, gradients reach every parameter.

    But one: the last block's text asks nothing, and the scale of its queries is there because the checkpoints have it.
    """
    torch.manual_seed(0)
    config = replace(TINY, dual_attention_layers=(0,), qk_norm="rms_norm")
    model = MMDiT(config)
    x = inputs(config)
    assert model(*x).abs().max() == 0
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "modulation" in name or "patch_out" in name:
                p.add_(0.05 * torch.randn(p.shape))
    model(*x).square().sum().backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == ["blocks.2.txt.attn.q_norm.weight"]


def test_a_fresh_block_is_the_identity_and_its_matrices_are_xaviers():
    torch.manual_seed(0)
    config = replace(TINY, dual_attention_layers=(0,))
    model = MMDiT(config)
    xs, c = [torch.randn(2, n, 32) for n in (5, 3)], torch.randn(2, 32)
    for ours, x in zip(model.blocks[0](xs, c), xs, strict=True):
        assert torch.equal(ours, x)
    for w in (p.detach() for name, p in model.blocks.named_parameters() if p.ndim == 2 and "modulation" not in name):
        bound = (6 / sum(w.shape)) ** 0.5  # of a uniform draw, whose mean square is a third of its bound's
        assert w.abs().max() <= bound and w.std() == pytest.approx(bound / 3**0.5, rel=0.1)
    assert not any(p.any() for name, p in model.named_parameters() if name.endswith("bias"))


def test_time_pooled_and_context_reach_the_prediction():
    model = alive(TINY)
    x_t, t, context, pooled = inputs(TINY)
    with torch.no_grad():
        v = model(x_t, t, context, pooled)
        for other in ((t / 2, context, pooled), (t, context * 2, pooled), (t, context, pooled * 2)):
            difference = (model(x_t, *other) - v).abs().amax(dim=(1, 2, 3))
            assert (difference > 1e-3).all()


def test_samples_of_a_batch_do_not_touch():
    model, (x_t, t, context, pooled) = alive(TINY), inputs(TINY)
    with torch.no_grad():
        v = model(x_t, t, context, pooled)
        for i in range(len(t)):
            rows = slice(i, i + 1)
            assert_close(model(x_t[rows], t[rows], context[rows], pooled[rows]), v[rows])


@pytest.mark.parametrize("how", ["autocast", "weights"])
def test_bfloat16_is_near_float32_and_warns_of_nothing(how, recwarn):
    config = replace(TINY, qk_norm="rms_norm", dual_attention_layers=(0,))
    model, (x_t, t, context, pooled) = alive(config), inputs(config)
    with torch.no_grad():
        expected = model(x_t, t, context, pooled)
        if how == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                v = model(x_t, t, context, pooled)
        else:
            model.bfloat16()
            v = model(x_t.bfloat16(), t, context.bfloat16(), pooled.bfloat16())
    assert v.dtype == torch.bfloat16
    assert (v.float() - expected).abs().max() < 0.1 * expected.abs().max()
    assert [str(w.message) for w in recwarn if issubclass(w.category, UserWarning)] == []


# --- padding ------------------------------------------------------------------------------------------------------


def test_text_asks_nothing_in_the_last_block(monkeypatch):
    """What its queries would bring is read by nobody; of a mask only the rows of the image count."""
    asked = []
    monkeypatch.setattr("mmdit.blocks.attention", lambda q, *rest: asked.append(q.shape[2]) or attention(q, *rest))
    torch.manual_seed(0)
    model, (x_t, t, context, pooled) = alive(VARIANTS["qk-norm"]), inputs(TINY)
    model(x_t, t, context, pooled).sum().backward()
    assert asked == [47, 47, 40]
    assert all(p.grad is not None for p in model.parameters())  # processes exchange the gradients of all
    xs, c, keys = [torch.randn(2, n, 32) for n in (5, 3)], torch.randn(2, 32), torch.rand(2, 1, 1, 8) > 0.3
    of_each = keys.repeat(1, 1, 8, 1)
    of_each[:, :, 5:] = False
    torch.testing.assert_close(model.blocks[-1](xs, c, of_each), model.blocks[-1](xs, c, keys))
    torch.testing.assert_close(model.blocks[0](xs, c, keys.repeat(1, 1, 8, 1)), model.blocks[0](xs, c, keys))


@pytest.mark.parametrize(
    "change",
    [{}, dict(positions="rope", qk_norm="rms_norm", dual_attention_layers=(0, 2), patch_size=1, sample_size=8)],
)
def test_masked_text_changes_nothing(change):
    """Each sample with padding, whatever stands there, as the same sample alone without it."""
    config = replace(TINY, **change)
    model = alive(config)
    x_t, t, context, pooled = inputs(config, tokens=9)
    mask = torch.arange(9) < torch.tensor([9, 4, 1])[:, None]
    context = torch.where(mask[..., None], context, 100.0)
    with torch.no_grad():
        v = model(x_t, t, context, pooled, mask)
        for i, length in enumerate((9, 4, 1)):
            rows = slice(i, i + 1)
            assert_close(v[rows], model(x_t[rows], t[rows], context[rows, :length], pooled[rows]))
        assert (model(x_t, t, context, pooled) - v)[1:].abs().max() > 1e-2  # the mask did matter


def test_a_mask_of_ones_is_no_mask_and_text_may_be_masked_wholly():
    model, (x_t, t, context, pooled) = alive(TINY), inputs(TINY)
    with torch.no_grad():
        all_real = torch.ones(context.shape[:2], dtype=torch.bool)
        assert_close(model(x_t, t, context, pooled, all_real), model(x_t, t, context, pooled))
        assert_close(model(x_t, t, context, pooled, ~all_real), model(x_t, t, context[:, :0], pooled))


@pytest.mark.parametrize("kind", [torch.float32, torch.int64])
def test_a_mask_may_hold_numbers(kind):
    model, (x_t, t, context, pooled) = alive(TINY), inputs(TINY)
    real = torch.arange(context.shape[1]) < 3
    mask = real.expand(len(context), -1)
    expected = model(x_t, t, context, pooled, mask)
    for numbers in (mask.to(kind), 2 * mask.to(kind)):
        assert torch.equal(model(x_t, t, context, pooled, numbers), expected)
        assert_close(torch.stack(model(list(x_t), t, context, pooled, numbers)), expected)


@pytest.mark.parametrize("side", [8, 40])
def test_shapes_alone_on_the_meta_device(side):
    """Also of a picture beyond the position table; and numbers are as they were afterwards."""
    x_t, t, context, pooled = inputs(TINY, 2, side, 8)
    with torch.device("meta"):
        out = MMDiT(TINY)(*(x.to("meta") for x in (x_t, t, context, pooled)))
    assert out.shape == x_t.shape and out.is_meta
    assert alive(TINY)(x_t, t, context, pooled).isfinite().all()


@pytest.mark.parametrize("mask", [None, torch.ones(2, 7, dtype=torch.bool)])
def test_shapes_alone_of_samples_in_one_row(mask):
    x_t, t, context, pooled = (x.to("meta") for x in inputs(TINY, 2, 8, 8))
    with torch.device("meta"):
        out = MMDiT(TINY)([x_t[0], x_t[1, :, :4]], t, context, pooled, None if mask is None else mask.to("meta"))
    assert [x.shape for x in out] == [(4, 8, 8), (4, 4, 8)] and out[0].is_meta


def test_a_picture_beyond_the_table_is_not_exported():
    """And does not spoil what follows."""
    model, given = alive(TINY), inputs(TINY, 2, 40, 8)
    with pytest.raises(ValueError, match="a picture of 20 tokens is beyond .* cannot be exported"):
        torch.export.export(model, given)
    assert model(*given).isfinite().all()


# --- errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x_t=torch.zeros(2, 5, 8, 8)), r"x_t has shape \(2, 5, 8, 8\), expected \(B, 4, h, w\)"),
        (dict(x_t=torch.zeros(4, 8, 8)), "x_t has shape"),
        (dict(x_t=torch.zeros(2, 4, 8, 7)), "both sides must be multiples of the patch"),
        (dict(t=torch.zeros(2, 1)), r"t has shape \(2, 1\), expected \(2,\)"),
        (dict(x_t=torch.zeros(2, 4, 8, 0)), "both sides must be multiples of the patch"),
        (dict(x_t=torch.zeros(2, 4, 0, 8)), "both sides must be multiples of the patch"),
        (dict(t=torch.tensor(0.5)), "t has shape"),
        (dict(context=torch.zeros(2, 24)), "context has shape"),
        (dict(t=0.5), "t is a float, expected a tensor"),
        (dict(context=None), "context is a NoneType, expected a tensor"),
        (dict(x_t=None), "x_t is a NoneType, expected a tensor"),
        (dict(x_t=[torch.zeros(4, 8, 8), None]), r"x_t\[1\] is a NoneType, expected a tensor"),
        (dict(context_mask=[[1] * 7] * 2), "context_mask is a list, expected a tensor"),
        (dict(skip_layers=(1, 3)), r"skip_layers names blocks \[3\], but there are blocks 0 to 2"),
        (dict(skip_layers=(-1,)), r"skip_layers names blocks \[-1\]"),
        (dict(context=torch.zeros(2, 7, 25)), r"context has shape .* expected \(2, L, 24\)"),
        (dict(context=torch.zeros(1, 7, 24)), "context has shape"),
        (dict(pooled=torch.zeros(2, 24)), "pooled has shape"),
        (dict(context_mask=torch.ones(2, 6, dtype=torch.bool)), "context_mask has shape"),
    ],
)
def test_shapes_that_do_not_fit_are_named(change, message):
    x_t, t, context, pooled = inputs(TINY, 2, 8, 8)
    with pytest.raises(ValueError, match=message):
        MMDiT(TINY)(**(dict(x_t=x_t, t=t, context=context, pooled=pooled) | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(depth=0), "depth is 0"),
        (dict(mlp_ratio=0), "mlp_ratio"),
        (dict(mlp_ratio=0.001), "that leaves the MLPs a width"),
        (dict(qk_norm="layer_norm"), "qk_norm"),
        (dict(positions="alibi"), "positions"),
        (dict(positions="rope", head_dim=6), "multiple of 4"),
        (dict(num_heads=1, head_dim=6), "multiple of 4"),
        (dict(dual_attention_layers=(0, 3)), r"names blocks \[3\], but there are blocks 0 to 2"),
        (dict(sample_size=1), "smaller than one patch"),
        (dict(depth="3"), "depth is '3', expected a whole number"),
        (dict(sample_size=None), "sample_size is None, expected a whole number"),
        (dict(patch_size=True), "patch_size is True"),
        (dict(mlp_ratio=float("nan")), "mlp_ratio is nan, expected a finite number"),
        (dict(dual_attention_layers=1), "dual_attention_layers is 1, expected a list of blocks"),
        (dict(sample_size=64), "pos_embed_max_size 12 is smaller"),
    ],
)
def test_configs_that_do_not_work_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **change)


def test_presets():
    assert {"sd3-medium", "sd3.5-medium", "sd3.5-large"} <= set(preset_names())
    assert preset("sd3.5-medium").dual_attention_layers == tuple(range(13))
    assert preset("sd3-medium").width == 1536 and preset("sd3.5-large").width == 2432
    with pytest.raises(ValueError, match="did you mean 'sd3-medium'"):
        preset("sd3-medum")


@pytest.mark.parametrize("positions", ["sincos", "rope", "both"])
@pytest.mark.parametrize("one_size", [True, False])
def test_packed_is_one_by_one(positions, one_size):
    """In one row, without padding, each sample has the numbers, and each weight the gradient, that it has alone."""
    torch.manual_seed(0)
    config = MMDiTConfig(
        depth=2,
        num_heads=2,
        head_dim=16,
        context_dim=12,
        pooled_dim=8,
        sample_size=8,
        qk_norm="rms_norm",
        positions=positions,
        dual_attention_layers=(0,),
    )
    model = alive(config).double()
    sizes = [(8, 8)] * 3 if one_size else [(8, 8), (4, 12), (8, 4)]
    latents = [torch.randn(config.in_channels, *size, dtype=torch.float64) for size in sizes]
    t, context, pooled = torch.rand(3).double(), torch.randn(3, 5, 12).double(), torch.randn(3, 8).double()
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 1, 0, 0]]).bool()

    def gradients(loss):
        return torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True)

    together = model(latents, t, context, pooled, mask)
    alone = [
        model(x[None], t[i : i + 1], context[i : i + 1, mask[i]], pooled[i : i + 1])[0] for i, x in enumerate(latents)
    ]
    for x, y in zip(together, alone, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-10)
    sums = [sum(x.square().mean() for x in parts) for parts in (together, alone)]
    for x, y in zip(gradients(sums[0]), gradients(sums[1]), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-9)


def test_gradients_of_the_tokens_of_a_sample_add_up_in_fp32():
    """One after the other in bf16 their sum would stand still: from 256 on a one no longer counts."""
    layer = Modulation(4, 2).bfloat16()
    rows = torch.arange(4).repeat_interleave(1024)
    sum(x.sum() for x in layer(PerToken(torch.randn(4, 4).bfloat16(), rows))).backward()
    assert torch.equal(layer.bias.grad, torch.full((8,), 4096.0, dtype=torch.bfloat16))


@torch.no_grad()
@torch._dynamo.config.patch(error_on_recompile=True)
def test_one_graph_serves_all_shapes():
    # No size is equal to another or to a width, for the compiler takes sizes that are equal at first for one.
    config = replace(TINY, depth=2, in_channels=4, context_dim=32, pooled_dim=16, pos_embed_max_size=64)
    model = alive(config)
    compiled = torch.compile(model, backend="eager", dynamic=True)
    for batch, height, width, length in [(3, 12, 20, 7), (5, 64, 48, 9), (2, 100, 80, 300)]:
        x, context = torch.randn(batch, 4, height, width), torch.randn(batch, length, 32)
        inputs = (x, torch.rand(batch), context, torch.randn(batch, 16))
        torch.testing.assert_close(compiled(*inputs), model(*inputs), rtol=1e-4, atol=1e-4)
