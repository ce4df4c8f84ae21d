"""A trunk to disk and from disk, in all three layouts, and what is said of files that hold none."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import mmdit
from mmdit.config import MMDiTConfig, TransfusionConfig
from mmdit.files import read_part
from mmdit.layouts import SD3
from mmdit.mapped import read_weights
from mmdit.transfusion import Transfusion
from mmdit.weights_io import save_weights

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


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
@pytest.mark.parametrize("others", [False, True])
def test_a_file_in_the_original_layout_is_read_under_any_prefix_and_beside_other_parts(model, tmp_path, prefix, others):
    state = {prefix + name: tensor for name, tensor in SD3.from_ours(model.state_dict(), TINY).items()}
    clip = {"text_encoders.clip_l.transformer.text_model.embeddings.weight": torch.ones(2)}
    vae = {"first_stage_model.decoder.conv_in.bias": torch.zeros(3)}
    save_file(
        state | (clip | vae if others else {}), tmp_path / "x.safetensors", {"mmdit": json.dumps({"sample_size": 8})}
    )
    assert_same(mmdit.load(tmp_path / "x.safetensors"), model)
    if others:
        assert read_part(tmp_path / "x.safetensors", "first_stage_model.").keys() == {"decoder.conv_in.bias"}
        found = read_part(tmp_path / "x.safetensors", "text_encoders.clip_l.")
        assert torch.equal(found["transformer.text_model.embeddings.weight"], torch.ones(2))


def test_the_original_layout_is_written_as_diffusers_reads_it(model, tmp_path):
    from diffusers import SD3Transformer2DModel

    mmdit.save(model, tmp_path / "x.safetensors", "sd3")
    assert_same(mmdit.load(tmp_path / "x.safetensors"), model)
    mmdit.save(model, tmp_path / "transformer", "diffusers")
    theirs = SD3Transformer2DModel.from_single_file(
        tmp_path / "x.safetensors", config=str(tmp_path), subfolder="transformer", local_files_only=True
    ).state_dict()
    expected = load_file(tmp_path / "transformer" / "diffusion_pytorch_model.safetensors")
    assert theirs.keys() == expected.keys()
    assert all(torch.equal(theirs[name], expected[name]) for name in expected)


def test_weights_go_through_all_layouts_bit_for_bit(model, tmp_path):
    """diffusers -> ours -> sd3 -> ours -> diffusers, in bfloat16, by way of files."""
    mmdit.save(model.bfloat16(), tmp_path / "a", "diffusers")
    mmdit.save(mmdit.load(tmp_path / "a"), tmp_path / "b", "mmdit")
    mmdit.save(mmdit.load(tmp_path / "b"), tmp_path / "c.safetensors", "sd3")
    mmdit.save(mmdit.load(tmp_path / "c.safetensors"), tmp_path / "d", "mmdit")
    mmdit.save(mmdit.load(tmp_path / "d"), tmp_path / "e", "diffusers")
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "e" / name).read_bytes()


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("max_shard_size", ["10GB", "5KB"])
def test_what_diffusers_saves_in_shards_and_variants_is_read(model, tmp_path, variant, max_shard_size):
    from diffusers import SD3Transformer2DModel

    mmdit.save(model, tmp_path / "whole", "diffusers")
    theirs = SD3Transformer2DModel.from_pretrained(tmp_path / "whole", low_cpu_mem_usage=False)
    folder = tmp_path / "pipeline" / "transformer"
    theirs.save_pretrained(folder, variant=variant, max_shard_size=max_shard_size)
    assert any(folder.glob("*.index*.json")) == (max_shard_size == "5KB") and any(folder.glob("*fp16*")) == (
        variant == "fp16"
    )
    assert_same(mmdit.load(tmp_path / "pipeline"), model)
    if max_shard_size == "5KB":
        sorted(folder.glob("*-00002-of-*"))[0].unlink()
        with pytest.raises(FileNotFoundError, match="no weights at .*-00002-of-"):
            mmdit.load(tmp_path / "pipeline")


def test_of_a_whole_file_and_variants_the_whole_is_taken_and_bf16_before_fp16(model, tmp_path):
    mmdit.save(model, tmp_path, "diffusers")
    files = [tmp_path / f"diffusion_pytorch_model{part}.safetensors" for part in ("", ".bf16", ".fp16")]
    state = load_file(files[0])
    for number, file in enumerate(files):
        save_file(state | {"proj_out.bias": torch.full_like(state["proj_out.bias"], number)}, file)
    for number, file in enumerate(files):
        assert (mmdit.load(tmp_path).patch_out.bias == number).all()
        file.unlink()


@pytest.mark.parametrize("layout", ["mmdit", "diffusers", "sd3"])
def test_weights_arrive_in_the_type_and_on_the_device_that_are_asked_for(model, tmp_path, layout):
    path = tmp_path / ("x.safetensors" if layout == "sd3" else "x")
    mmdit.save(model, path, layout)
    half = mmdit.load(path, dtype=torch.bfloat16, device="cpu").state_dict()
    expected = model.bfloat16().state_dict()
    assert all(torch.equal(half[name], expected[name]) and half[name].dtype == torch.bfloat16 for name in expected)
    assert mmdit.load(path).dtype == torch.float32
    assert {p.device.type for p in mmdit.load(path, device="meta").parameters()} == {"meta"}


def test_a_loaded_model_trains_and_its_file_stays(model, tmp_path):
    mmdit.save(model, tmp_path, "diffusers")
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    before, loaded = path.read_bytes(), mmdit.load(tmp_path)
    assert all(p.requires_grad for p in loaded.parameters())
    optimizer = torch.optim.SGD(loaded.parameters(), lr=0.1)
    x = torch.randn(2, 3, 8, 6), torch.rand(2), torch.randn(2, 5, 12), torch.randn(2, 10)
    loaded(*x).square().mean().backward()
    optimizer.step()
    assert not torch.equal(loaded.patch_out.weight, model.patch_out.weight)
    assert path.read_bytes() == before
    mmdit.save(loaded, tmp_path, "diffusers")  # over the file that it is mapped from
    assert_same(mmdit.load(tmp_path), loaded)


def test_eight_bit_weights_want_a_type(model, tmp_path):
    state = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in SD3.from_ours(model.state_dict(), TINY).items()}
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="holds torch.float8_e4m3fn, in which .* give a dtype"):
        mmdit.load(tmp_path / "x.safetensors")
    assert mmdit.load(tmp_path / "x.safetensors", dtype=torch.bfloat16).dtype == torch.bfloat16


def test_rope_goes_there_and_back_in_our_layout(tmp_path):
    model = mmdit.MMDiT(replace(TINY, positions="rope", mlp_ratio=2.5))
    mmdit.save(model, tmp_path)
    assert_same(mmdit.load(tmp_path), model)
    for layout, name in (("diffusers", "d"), ("sd3", "d.safetensors")):
        with pytest.raises(ValueError, match="sincos positions"):
            mmdit.save(model, tmp_path / name, layout)
        assert not (tmp_path / name).exists()


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
    with pytest.raises(ValueError, match="layout is 'onnx', expected 'mmdit', 'diffusers' or 'sd3'"):
        mmdit.save(model, tmp_path, "onnx")
    with pytest.raises(ValueError, match="'sd3' is one file: give a path that ends in .safetensors"):
        mmdit.save(model, tmp_path, "sd3")
    with pytest.raises(ValueError, match="'diffusers' is a folder, not a file"):
        mmdit.save(model, tmp_path / "x.safetensors", "diffusers")
    with pytest.raises(ValueError, match="got a Linear, expected an MMDiT or a Transfusion"):
        mmdit.save(torch.nn.Linear(2, 2), tmp_path / "x")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("layout", ["mmdit", "diffusers", "sd3"])
def test_a_save_that_fails_leaves_what_was_there(model, tmp_path, layout, monkeypatch):
    path = tmp_path / "new" / ("x.safetensors" if layout == "sd3" else "x")

    def half(tensor):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("mmdit.weights_io.whole", half)
        with pytest.raises(OSError, match="no space left"):
            mmdit.save(model, path, layout)
    assert not list(tmp_path.iterdir())
    mmdit.save(model, path, layout)
    with monkeypatch.context() as patch:
        patch.setattr("mmdit.weights_io.whole", half)
        with pytest.raises(OSError, match="no space left"):
            mmdit.save(mmdit.MMDiT(TINY), path, layout)
    assert_same(mmdit.load(path), model)
    assert not [file for file in tmp_path.rglob("*") if "part" in file.name]


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
        ("[1]", "config.json describes no model that is known, expected SD3Transformer2DModel or a model of mmdit's"),
        ("{}", "config.json describes no model that is known"),
        ('{"architectures": ["CLIPTextModel"], "hidden_size": 8}', "config.json describes CLIPTextModel, expected"),
        ('{"model_type": "t5"}', "config.json describes t5, expected"),
        ('{"act_fn": "silu", "in_channels": 4}', "no _class_name, so it would be .* mmdit's own, .* have no act_fn"),
        (
            '{"_class_name": "UNet2DModel", "sample_size": 8}',
            "config.json describes UNet2DModel, expected SD3Transformer",
        ),
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


def test_what_is_missing_extra_or_misshapen_in_a_file_is_named(model, tmp_path):
    path, state = tmp_path / "x.safetensors", SD3.from_ours(model.state_dict(), TINY)
    q_norm = "joint_blocks.1.x_block.attn.ln_q.weight"
    cases = {
        "1 missing: t_embedder.mlp.2.bias": {k: v for k, v in state.items() if k != "t_embedder.mlp.2.bias"},
        "2 extra: lora.up, ref_embedder": state | {"lora.up": torch.ones(1), "ref_embedder": torch.ones(1)},
        rf"1 of another shape: {q_norm} \(4,\) for \(8,\)": state | {q_norm: torch.ones(4)},
        "pos_embed missing": {k: v for k, v in state.items() if k != "pos_embed"},
        "none of its names holds joint_blocks: its tensors are those of another model": {
            "double_blocks.0": torch.ones(1)
        },
        "joint_blocks: load the folder": model.state_dict(),
    }
    for message, tensors in cases.items():
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
        with pytest.raises(ValueError, match=message) as error:
            mmdit.load(path)
        assert "x.safetensors" in str(error.value) and "\n" not in str(error.value)


def test_pickles_are_refused_with_the_reason(model, tmp_path):
    torch.save(model.state_dict(), tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match="model.ckpt is a pickle, which can run any program"):
        mmdit.load(tmp_path / "model.ckpt")
    mmdit.save(model, tmp_path / "x", "diffusers")
    (tmp_path / "x" / "diffusion_pytorch_model.safetensors").rename(tmp_path / "x" / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match="diffusion_pytorch_model.bin is a pickle"):
        mmdit.load(tmp_path / "x")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "has no weight_map"),
        ('{"weight_map": {"a": 5}}', "names 5, expected files in its own folder"),
        ('{"weight_map": {"a": ".."}}', "names '..', expected files in its own folder"),
        ('{"weight_map": {"a": "c.safetensors"}}', "no weights at .*c.safetensors"),
        ('{"weight_map": {"a": "b.bin"}}', "b.bin is a pickle"),
        ('{"weight_map": {"a": "../b.safetensors"}}', "expected files in its own folder"),
        ('{"weight_map": {"a": "b.safetensors"}}', "names 1 tensors that its files do not have: a"),
    ],
)
def test_an_index_that_is_none_is_named(model, tmp_path, text, message):
    mmdit.save(model, tmp_path, "diffusers")
    (tmp_path / "diffusion_pytorch_model.safetensors").rename(tmp_path / "b.safetensors")
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        mmdit.load(tmp_path)


def test_a_tensor_in_two_shards_is_refused_not_taken_from_the_last(model, tmp_path):
    mmdit.save(model, tmp_path, "diffusers")
    whole = tmp_path / "diffusion_pytorch_model.safetensors"
    name = sorted(read_weights(whole))[0]
    index = {"weight_map": {other: "1.safetensors" for other in read_weights(whole)} | {"extra": "2.safetensors"}}
    whole.rename(tmp_path / "1.safetensors")
    whole.with_name(f"{whole.name}.index.json").write_text(json.dumps(index))
    save_weights({name: torch.zeros(2), "extra": torch.zeros(2)}, tmp_path / "2.safetensors")
    with pytest.raises(ValueError, match=f"{name} is in 1.safetensors and in 2.safetensors, expected it in one"):
        mmdit.load(tmp_path)


def test_a_config_with_more_blocks_than_tensors_is_refused_before_they_are_made(model, tmp_path):
    mmdit.save(model, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(model.config.to_dict() | {"depth": 10**9}))
    with pytest.raises(ValueError, match="tensors, too few for 1000000000 blocks"):
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
    with pytest.raises(ValueError, match="'diffusers' has no model of text and images"):
        mmdit.save(model, tmp_path / "theirs", layout="diffusers")
    assert not (tmp_path / "theirs").exists()
