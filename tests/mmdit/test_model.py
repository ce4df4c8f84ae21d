"""The MMDiT: each option against its effect, masks, samples packed into one row, and what is refused."""

from dataclasses import replace

import pytest
import torch

from mmdit.attention import attention
from mmdit.blocks import Modulation, PerToken
from mmdit.config import MMDiTConfig, preset, preset_names
from mmdit.model import MMDiT
from tests.mmdit.tiny_mmdit import TINY, VARIANTS, alive, assert_close, in_one_call, inputs

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


def test_samples_of_a_batch_are_independent():
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


def test_text_has_no_queries_in_the_last_block(monkeypatch):
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
def test_forward_on_the_meta_device_gives_shapes(side):
    """Also of a picture beyond the position table; and numbers are as they were afterwards."""
    x_t, t, context, pooled = inputs(TINY, 2, side, 8)
    with torch.device("meta"):
        out = MMDiT(TINY)(*(x.to("meta") for x in (x_t, t, context, pooled)))
    assert out.shape == x_t.shape and out.is_meta
    assert alive(TINY)(x_t, t, context, pooled).isfinite().all()


@pytest.mark.parametrize("mask", [None, torch.ones(2, 7, dtype=torch.bool)])
def test_packed_forward_on_the_meta_device_gives_shapes(mask):
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


def test_packed_blocks_are_one_graph_for_all_lengths(monkeypatch):
    """Where one kernel attends: without a break, and none anew for other lengths, sizes or numbers of samples."""
    torch.manual_seed(0)
    config = replace(TINY, qk_norm="rms_norm", positions="both", dual_attention_layers=(0,))
    model, graphs = alive(config), []
    batches = []
    for batch, tokens in ((3, 7), (5, 9), (2, 8), (4, 30)):
        x = [torch.randn(4, 4 + 2 * (i % 3), 8 + 2 * batch) for i in range(batch)]
        real = torch.arange(tokens) < torch.randint(1, tokens, (batch, 1))
        batches.append((x, torch.rand(batch), torch.randn(batch, tokens, 24), torch.randn(batch, 20), real))
    expected = [model(*batch) for batch in batches]
    in_one_call(monkeypatch)
    torch.compiler.reset()
    for block in model.blocks:
        block.compile(backend=lambda graph, _: graphs.append(graph) or graph, dynamic=True, fullgraph=True)
    num_graphs = []
    for batch, right in zip(batches, expected, strict=True):
        for x, y in zip(model(*batch), right, strict=True):
            assert_close(x, y)
        num_graphs.append(len(graphs))
    assert num_graphs == [3] * 4  # a block with dual attention, a plain one and the last


def test_all_blocks_but_the_last_share_one_compiled_graph():
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    model = MMDiT(replace(TINY, positions="rope", depth=4))  # without a table that is added, tokens are a view at first
    for block in model.blocks:
        block.compile(dynamic=True, backend="eager")
    for height in (10, 14):
        model(*inputs(TINY, height=height)).sum().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


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
