"""The MMDiT beside that of diffusers with the same weights: outputs, gradients, bfloat16; sizes of published models."""

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmdit.config import preset
from mmdit.formats import config_to_diffusers
from mmdit.layouts import DIFFUSERS
from mmdit.model import MMDiT
from tests.mmdit.tiny_mmdit import TINY, VARIANTS, alive, assert_close, inputs


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
