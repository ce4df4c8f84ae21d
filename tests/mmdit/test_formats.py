"""Names and tensors between our layout and diffusers': bit for bit there and back, and nothing lost unseen."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmdit.config import MMDiTConfig
from mmdit.formats import config_from_diffusers, config_to_diffusers, from_diffusers, to_diffusers
from mmdit.model import MMDiT

TINY = MMDiTConfig(
    in_channels=3, depth=2, num_heads=2, head_dim=8, context_dim=12, pooled_dim=10, sample_size=8, pos_embed_max_size=8
)


def random_state(config: MMDiTConfig) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn_like(value) for name, value in MMDiT(config).state_dict().items()}


@given(
    depth=st.integers(1, 3),
    qk_norm=st.sampled_from([None, "rms_norm"]),
    dual=st.sets(st.integers(0, 2)),
    patch_size=st.integers(1, 3),
)
def test_state_dict_goes_there_and_back_bit_for_bit(depth, qk_norm, dual, patch_size):
    layers = tuple(sorted(i for i in dual if i < depth))
    config = replace(TINY, depth=depth, qk_norm=qk_norm, dual_attention_layers=layers, patch_size=patch_size)
    ours = random_state(config)
    again = from_diffusers(to_diffusers(ours, config), config)
    assert again.keys() == ours.keys()
    assert all(torch.equal(again[name], ours[name]) for name in ours)


@pytest.mark.parametrize("change", [{}, dict(qk_norm="rms_norm", dual_attention_layers=(0,))], ids=str)
def test_diffusers_state_dict_goes_there_and_back_bit_for_bit(change):
    from diffusers import SD3Transformer2DModel

    config = replace(TINY, **change)
    theirs = SD3Transformer2DModel(**config_to_diffusers(config)).state_dict()
    theirs = {name: torch.randn_like(value) for name, value in theirs.items()}
    again = to_diffusers(from_diffusers(theirs, config), config)
    assert again.keys() == theirs.keys()
    assert all(torch.equal(again[name], theirs[name]) for name in theirs)


def test_order_within_fused_and_swapped_tensors():
    """Queries, keys, values; and (shift, scale) here is (scale, shift) there, in the last modulations alone."""
    ours = random_state(TINY)
    theirs = to_diffusers(ours, TINY)
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
    theirs = to_diffusers(random_state(TINY), TINY)
    with pytest.raises(ValueError, match="1 tensors are not those .* lora.up.weight"):
        from_diffusers(theirs | {"lora.up.weight": torch.zeros(1)}, TINY)
    del theirs["transformer_blocks.0.attn.to_k.bias"], theirs["pos_embed.pos_embed"]
    lost = MMDiT(TINY).state_dict().keys() - from_diffusers(theirs, TINY).keys()
    assert lost == {"blocks.0.img.attn.qkv.bias", "pos_embed"}


@given(
    depth=st.integers(1, 4),
    num_heads=st.integers(1, 3),
    qk_norm=st.sampled_from([None, "rms_norm"]),
    dual=st.booleans(),
    sample_size=st.integers(2, 12),
)
def test_configs_go_there_and_back(depth, num_heads, qk_norm, dual, sample_size):
    layers = (0,) if dual else ()
    config = replace(
        TINY,
        depth=depth,
        num_heads=num_heads,
        qk_norm=qk_norm,
        dual_attention_layers=layers,
        sample_size=sample_size,
    )
    assert config_from_diffusers(config_to_diffusers(config)) == config


@pytest.mark.parametrize("change", [dict(positions="rope"), dict(mlp_ratio=2.0)], ids=str)
def test_what_diffusers_cannot_express_is_refused(change):
    config = replace(TINY, **change)
    with pytest.raises(ValueError, match="sincos positions and mlp_ratio 4"):
        config_to_diffusers(config)


def test_rope_weights_are_refused():
    config = replace(TINY, positions="rope")
    with pytest.raises(ValueError, match="this model has rope"):
        to_diffusers(random_state(config), config)


def test_a_config_that_lacks_keys_is_named():
    config = config_to_diffusers(TINY)
    del config["num_layers"]
    with pytest.raises(ValueError, match="lacks num_layers"):
        config_from_diffusers(config)
