"""Shapes of models as the files of others say them: diffusers' configs, and tensors without one."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmdit.config import MMDiTConfig, preset
from mmdit.formats import config_from_diffusers, config_from_sd3, config_to_diffusers, metadata_for_sd3
from mmdit.layouts import SD3
from mmdit.model import MMDiT

TINY = MMDiTConfig(
    in_channels=3, depth=2, num_heads=2, head_dim=8, context_dim=12, pooled_dim=10, sample_size=8, pos_embed_max_size=8
)


def shapes(config: MMDiTConfig) -> dict[str, torch.Tensor]:
    """The tensors of a model in the original layout, without their memory."""
    with torch.device("meta"):
        return SD3.from_ours(MMDiT(config).state_dict(), config)


# --- diffusers' ---------------------------------------------------------------------------------------------------


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
    whole = replace(config, sample_size=sample_size - sample_size % 2)  # of patches, or a pipeline could not draw it
    assert config_from_diffusers(config_to_diffusers(config)) == whole


@pytest.mark.parametrize("change", [dict(positions="rope"), dict(mlp_ratio=2.0)], ids=str)
def test_what_diffusers_cannot_express_is_refused(change):
    config = replace(TINY, **change)
    with pytest.raises(ValueError, match="sincos positions and mlp_ratio 4"):
        config_to_diffusers(config)


def test_a_config_that_lacks_keys_is_named():
    config = config_to_diffusers(TINY)
    del config["num_layers"]
    with pytest.raises(ValueError, match="lacks num_layers"):
        config_from_diffusers(config)


# --- the original layout ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd3-medium", "sd3.5-medium", "sd3.5-large"])
def test_published_models_are_told_from_their_shapes(name):
    assert config_from_sd3(shapes(preset(name)), {}) == preset(name)


@given(
    depth=st.integers(1, 3),
    num_heads=st.integers(1, 3),
    head_dim=st.sampled_from([8, 64]),
    mlp_ratio=st.sampled_from([4.0, 2.5, 1 / 3]),
    qk_norm=st.sampled_from([None, "rms_norm"]),
    dual=st.sets(st.integers(0, 2)),
    patch_size=st.integers(1, 3),
    sample_size=st.integers(3, 8),
)
def test_models_of_ours_are_told_from_shapes_and_metadata(dual, mlp_ratio, **change):
    layers = tuple(sorted(i for i in dual if i < change["depth"]))
    config = replace(TINY, dual_attention_layers=layers, mlp_ratio=mlp_ratio, **change)
    told = config_from_sd3(shapes(config), metadata_for_sd3(config))
    assert replace(told, mlp_ratio=mlp_ratio) == config
    assert int(told.width * told.mlp_ratio) == int(config.width * mlp_ratio)  # all that is left of the ratio


@pytest.mark.parametrize("said", ["[1]", '{"head_dim": "x"}', '{"sample_size": -4}', '{"sample_size": 1e9}', "{"])
def test_metadata_that_lie_are_refused(said):
    with pytest.raises(ValueError, match="metadata say|Expecting"):
        config_from_sd3(shapes(TINY), {"mmdit": said})


def test_without_metadata_heads_and_training_size_are_sd3s():
    config = replace(TINY, num_heads=1, head_dim=64, sample_size=16, pos_embed_max_size=8)
    assert config_from_sd3(shapes(config), {}) == config  # the table's side bounds the 128
    with pytest.raises(ValueError, match="the width 16 is no multiple of the head width 64"):
        config_from_sd3(shapes(TINY), {})


def test_what_tells_the_shape_is_named_where_it_is_missing_or_odd():
    state = shapes(preset("sd3-medium"))
    del state["pos_embed"], state["y_embedder.mlp.0.weight"]
    with pytest.raises(ValueError, match="pos_embed, y_embedder.mlp.0.weight missing"):
        config_from_sd3(state, {})
    state = shapes(preset("sd3-medium")) | {"x_embedder.proj.weight": torch.empty(1536, 64, device="meta")}
    with pytest.raises(ValueError, match=r"x_embedder.proj.weight has shape \(1536, 64\)"):
        config_from_sd3(state, {})
