"""Names and tensors between our layout, diffusers' and the original one: bit for bit there and back, and nothing lost
unseen. diffusers' own conversion of the original layout is the oracle.
"""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmdit.config import MMDiTConfig, preset
from mmdit.formats import config_to_diffusers
from mmdit.layouts import DIFFUSERS, SD3
from mmdit.model import MMDiT

TINY = MMDiTConfig(
    in_channels=3, depth=2, num_heads=2, head_dim=8, context_dim=12, pooled_dim=10, sample_size=8, pos_embed_max_size=8
)


def assert_same(a, b) -> None:
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def random_state(config: MMDiTConfig) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn_like(value) for name, value in MMDiT(config).state_dict().items()}


@given(
    depth=st.integers(1, 3),
    qk_norm=st.sampled_from([None, "rms_norm"]),
    dual=st.sets(st.integers(0, 2)),
    patch_size=st.integers(1, 3),
)
def test_state_dict_goes_to_diffusers_to_the_original_and_back_bit_for_bit(depth, qk_norm, dual, patch_size):
    layers = tuple(sorted(i for i in dual if i < depth))
    config = replace(TINY, depth=depth, qk_norm=qk_norm, dual_attention_layers=layers, patch_size=patch_size)
    ours = random_state(config)
    theirs = DIFFUSERS.from_ours(ours, config)
    again = SD3.to_ours(SD3.from_ours(DIFFUSERS.to_ours(theirs, config), config), config)
    assert_same(again, ours)
    assert_same(DIFFUSERS.from_ours(again, config), theirs)


@pytest.mark.parametrize("change", [{}, dict(qk_norm="rms_norm", dual_attention_layers=(0,))], ids=str)
def test_diffusers_state_dict_goes_there_and_back_bit_for_bit(change):
    from diffusers import SD3Transformer2DModel

    config = replace(TINY, **change)
    theirs = SD3Transformer2DModel(**config_to_diffusers(config)).state_dict()
    theirs = {name: torch.randn_like(value) for name, value in theirs.items()}
    assert_same(DIFFUSERS.from_ours(DIFFUSERS.to_ours(theirs, config), config), theirs)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("change", [{}, dict(qk_norm="rms_norm", dual_attention_layers=(0,))], ids=str)
def test_the_original_layout_is_the_one_that_diffusers_converts(change, prefix):
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

    config = replace(TINY, **change)
    ours = random_state(config)
    theirs = {prefix + name: tensor for name, tensor in SD3.from_ours(ours, config).items()}
    assert_same(convert_sd3_transformer_checkpoint_to_diffusers(theirs), DIFFUSERS.from_ours(ours, config))


@pytest.mark.parametrize("name", ["sd3-medium", "sd3.5-medium", "sd3.5-large"])
def test_published_models_have_the_original_tensors_and_no_others(name):
    """Names and shapes without their memory; diffusers' conversion takes out of its argument what it knows."""
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

    config = preset(name)
    with torch.device("meta"):
        ours = MMDiT(config).state_dict()
    theirs = SD3.from_ours(ours, config)
    converted = convert_sd3_transformer_checkpoint_to_diffusers(theirs)
    assert not theirs
    expected = {name: tensor.shape for name, tensor in DIFFUSERS.from_ours(ours, config).items()}
    assert {name: tensor.shape for name, tensor in converted.items()} == expected


def test_taking_empties_the_state_as_it_goes():
    """What has been given is held by nobody else, so that a large model is never there twice."""
    theirs = DIFFUSERS.from_ours(random_state(TINY), TINY)
    left = [len(theirs) for _ in DIFFUSERS.take(theirs, TINY)]
    assert left == sorted(left, reverse=True) and left[-1] == 0


def test_order_within_fused_and_swapped_tensors():
    """Queries, keys, values; and (shift, scale) here is (scale, shift) there, in the last modulations alone."""
    ours = random_state(TINY)
    theirs = DIFFUSERS.from_ours(ours, TINY)
    q, k, v = ours["blocks.0.txt.attn.qkv.weight"].chunk(3)
    for part, name in ((q, "q"), (k, "k"), (v, "v")):
        assert torch.equal(theirs[f"transformer_blocks.0.attn.add_{name}_proj.weight"], part)
    for here, there in (
        ("modulation_out.bias", "norm_out.linear.bias"),
        ("blocks.1.txt.modulation.bias", "transformer_blocks.1.norm1_context.linear.bias"),
    ):
        shift, scale = ours[here].chunk(2)
        assert torch.equal(theirs[there], torch.cat([scale, shift]))
    assert torch.equal(theirs["transformer_blocks.0.norm1_context.linear.bias"], ours["blocks.0.txt.modulation.bias"])
    assert torch.equal(theirs["transformer_blocks.1.norm1.linear.bias"], ours["blocks.1.img.modulation.bias"])


def test_unknown_tensors_are_named_and_missing_ones_are_left_out():
    theirs = DIFFUSERS.from_ours(random_state(TINY), TINY)
    with pytest.raises(ValueError, match="1 tensors are not those .* lora.up.weight"):
        DIFFUSERS.to_ours(theirs | {"lora.up.weight": torch.zeros(1)}, TINY)
    del theirs["transformer_blocks.0.attn.to_k.bias"], theirs["pos_embed.pos_embed"]
    lost = MMDiT(TINY).state_dict().keys() - DIFFUSERS.to_ours(theirs, TINY).keys()
    assert lost == {"blocks.0.img.attn.qkv.bias", "pos_embed"}


def test_rope_weights_are_refused():
    config = replace(TINY, positions="rope")
    for layout in (DIFFUSERS, SD3):
        with pytest.raises(ValueError, match="this model has rope"):
            layout.from_ours(random_state(config), config)
