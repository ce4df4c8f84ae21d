"""A trunk to disk and from disk, in our layout and in diffusers', and what is said of folders that hold none."""

import json
from dataclasses import replace

import pytest
import torch

import mmdit
from mmdit.config import MMDiTConfig, TransfusionConfig
from mmdit.transfusion import Transfusion

TINY = MMDiTConfig(
    in_channels=3,
    depth=2,
    num_heads=2,
    head_dim=8,
    context_dim=12,
    pooled_dim=10,
    qk_norm="rms_norm",
    dual_attention_layers=(0,),
    sample_size=8,
    pos_embed_max_size=6,
)


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = mmdit.MMDiT(TINY)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model


def assert_same(a: mmdit.MMDiT, b: mmdit.MMDiT) -> None:
    assert a.config == b.config
    state, other = a.state_dict(), b.state_dict()
    assert state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in state)


@pytest.mark.parametrize("layout", ["mmdit", "diffusers"])
@pytest.mark.parametrize("place", ["", "transformer", "pipeline/transformer"])
def test_saved_and_loaded_is_the_same(model, tmp_path, layout, place):
    mmdit.save(model, tmp_path / place, layout)
    assert_same(mmdit.load(tmp_path), model)


def test_rope_goes_there_and_back_in_our_layout(tmp_path):
    model = mmdit.MMDiT(replace(TINY, positions="rope", mlp_ratio=2.5))
    mmdit.save(model, tmp_path)
    assert_same(mmdit.load(tmp_path), model)
    with pytest.raises(ValueError, match="sincos positions"):
        mmdit.save(model, tmp_path / "d", "diffusers")
    assert not (tmp_path / "d").exists()


def test_diffusers_reads_what_we_write_and_we_what_it_writes(model, tmp_path):
    from diffusers import SD3Transformer2DModel

    mmdit.save(model, tmp_path / "ours", "diffusers")
    theirs, info = SD3Transformer2DModel.from_pretrained(
        tmp_path / "ours", low_cpu_mem_usage=False, output_loading_info=True
    )
    assert not any(info.values())
    generator = torch.Generator().manual_seed(1)
    shapes = ((2, 3, 8, 6), (2, 5, 12), (2, 10))
    x_t, context, pooled = (torch.randn(*shape, generator=generator) for shape in shapes)
    t = torch.tensor([0.2, 0.9])
    with torch.no_grad():
        v, expected = model(x_t, t, context, pooled), theirs(x_t, context, pooled, t * 1000).sample
    assert (v - expected).abs().max() < 1e-5 * expected.abs().max()
    theirs.save_pretrained(tmp_path / "theirs")
    assert_same(mmdit.load(tmp_path / "theirs"), model)


def test_an_unknown_layout_is_refused(model, tmp_path):
    with pytest.raises(ValueError, match="layout is 'onnx', expected 'mmdit' or 'diffusers'"):
        mmdit.save(model, tmp_path, "onnx")


def test_folders_that_hold_no_model_are_named(model, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no model"):
        mmdit.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no model"):
        mmdit.load(tmp_path / "nowhere")
    mmdit.save(model, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no weights at"):
        mmdit.load(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "config.json is not JSON"),
        ("[1]", "config.json does not fit: .* mapping"),
        ('{"_class_name": "UNet2DModel", "sample_size": 8}', "config.json does not fit: .*_class_name"),
        ('{"depht": 3}', "config.json does not fit: .*depht"),
        ('{"depth": 0}', "depth is 0"),
        ('{"_class_name": "SD3Transformer2DModel"}', "lacks in_channels"),
    ],
)
def test_configs_that_are_none_are_named(model, tmp_path, text, message):
    mmdit.save(model, tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        mmdit.load(tmp_path)


@pytest.mark.parametrize("layout", ["mmdit", "diffusers"])
def test_weights_of_another_model_are_named(model, tmp_path, layout):
    mmdit.save(model, tmp_path, layout)
    config = json.loads((tmp_path / "config.json").read_text())
    config["num_layers" if layout == "diffusers" else "depth"] = 3
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"the weights of .* do not fit the model: .* missing: "):
        mmdit.load(tmp_path)


def test_weights_cut_short_are_named(model, tmp_path):
    mmdit.save(model, tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="model.safetensors is no readable safetensors file"):
        mmdit.load(tmp_path)


def test_a_model_of_text_and_images_is_written_and_read(tmp_path):
    config = TransfusionConfig(vocab_size=20, in_channels=3, depth=1, num_heads=2, head_dim=8, weights="separate")
    model = Transfusion(config)
    mmdit.save(model, tmp_path / "ours")
    again = mmdit.load(tmp_path / "ours")
    assert isinstance(again, Transfusion) and again.config == config
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    with pytest.raises(ValueError, match="diffusers has no model of text and images"):
        mmdit.save(model, tmp_path / "theirs", layout="diffusers")
    assert not (tmp_path / "theirs").exists()
