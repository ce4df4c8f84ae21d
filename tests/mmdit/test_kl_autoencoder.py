"""diffusers' AutoencoderKL behind our calls: its convention, its folders, and single files that have no config."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmdit.autoencoder import KLAutoencoder, open_autoencoder
from mmdit.kl_autoencoder import SCALES


def images(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def tiny_kl(**config):
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    levels = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    size = {
        "block_out_channels": (8, 8, 16),
        "latent_channels": 16,
        "norm_num_groups": 4,
        "mid_block_add_attention": False,
    }
    return AutoencoderKL(**levels, **size, use_quant_conv=False, use_post_quant_conv=False, **config).eval()


def test_a_diffusers_autoencoder_is_read_under_its_own_convention(tmp_path):
    vae = tiny_kl(scaling_factor=1.5305, shift_factor=0.0609)  # SD3's
    vae.save_pretrained(tmp_path / "pipeline" / "vae")
    ours, x = open_autoencoder(tmp_path / "pipeline"), images(2, 3, 16, 24)
    assert (ours.channels, ours.factor, ours.scaling_factor, ours.shift_factor) == (16, 4, 1.5305, 0.0609)
    with torch.no_grad():
        z = (vae.encode(x).latent_dist.mode() - 0.0609) * 1.5305
        torch.testing.assert_close(ours.encode(x), z)
        torch.testing.assert_close(ours.decode(z), vae.decode(z / 1.5305 + 0.0609).sample.clamp(-1, 1))


def test_what_a_kl_autoencoder_saves_is_read_by_diffusers(tmp_path):
    from diffusers import AutoencoderKL

    ours = KLAutoencoder(tiny_kl(scaling_factor=0.9)).requires_grad_(False)
    ours.save(tmp_path)
    theirs, x = AutoencoderKL.from_pretrained(tmp_path), images(1, 3, 16, 16)
    assert ours.shift_factor == 0.0  # SD's own have none
    with torch.no_grad():
        torch.testing.assert_close(ours.encode(x), theirs.encode(x).latent_dist.mode() * 0.9)


def test_a_posterior_sample_is_a_function_of_the_generator():
    vae, x = tiny_kl(scaling_factor=1.5305, shift_factor=0.0609), images(1, 3, 16, 16)
    ours = KLAutoencoder(vae).requires_grad_(False)
    draws = [ours.encode(x, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    theirs = vae.encode(x).latent_dist.sample(torch.Generator().manual_seed(1))
    torch.testing.assert_close(draws[0], (theirs - 0.0609) * 1.5305)
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2]) and not torch.equal(draws[0], ours.encode(x))


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards_and_variants_are_read(tmp_path, variant):
    vae = tiny_kl()
    vae.save_pretrained(tmp_path / "vae", variant=variant, max_shard_size="20KB")
    assert len(list((tmp_path / "vae").glob("*.safetensors"))) > 1
    ours = open_autoencoder(tmp_path)
    assert all(
        torch.equal(a, b) for a, b in zip(ours.vae.state_dict().values(), vae.state_dict().values(), strict=True)
    )


# --- single files -----------------------------------------------------------------------------------------------------

ORIGINAL = (  # diffusers' names to those of the original code
    (r"down_blocks\.(\d)\.resnets", r"down.\1.block"),
    (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
    (r"up_blocks\.0", "up_blocks.two"),
    (r"up_blocks\.2", "up_blocks.0"),
    (r"up_blocks\.two", "up_blocks.2"),
    (r"up_blocks\.(\d)\.resnets", r"up.\1.block"),
    (r"up_blocks\.(\d)\.upsamplers\.0", r"up.\1.upsample"),
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0", "mid.attn_1"),
    ("group_norm", "norm"),
    (r"to_out\.0", "proj_out"),
    (r"to_([qkv])\.", r"\1."),
    ("conv_norm_out", "norm_out"),
    ("conv_shortcut", "nin_shortcut"),
)


def published(kind):
    """A narrow network with the parts of a published one and random weights; and these under the original names."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    channels, scaling, shift = SCALES[kind]
    levels = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    size = {"block_out_channels": (32, 32, 64), "latent_channels": channels, "layers_per_block": 2}
    quant = {"use_quant_conv": channels == 4, "use_post_quant_conv": channels == 4}
    vae = AutoencoderKL(**levels, **size, **quant, scaling_factor=scaling, shift_factor=shift).eval()
    state = {}
    for name, tensor in vae.state_dict().items():
        if ".attentions." in name and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]
        for pattern, new in ORIGINAL:
            name = re.sub(pattern, new, name)
        state[name] = tensor
    return vae, state


def assert_same_network(ours, vae):
    assert (ours.scaling_factor, ours.shift_factor) == (vae.config.scaling_factor, vae.config.shift_factor or 0.0)
    state, expected = ours.vae.state_dict(), vae.state_dict()
    assert state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in expected)
    x = images(1, 3, 16, 24)
    with torch.no_grad():
        shift, scale = vae.config.shift_factor or 0.0, vae.config.scaling_factor
        torch.testing.assert_close(ours.encode(x), (vae.encode(x).latent_dist.mode() - shift) * scale)


@pytest.mark.parametrize("kind", SCALES)
def test_a_file_with_the_original_names_is_read_with_the_scale_of_its_model(tmp_path, kind):
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    vae, state = published(kind)
    theirs = convert_ldm_vae_checkpoint(dict(state), vae.config)  # says that the names are the original ones
    assert all(torch.equal(theirs[name], tensor) for name, tensor in vae.state_dict().items())
    save_file(state, tmp_path / "ae.safetensors")
    assert_same_network(open_autoencoder(f"{kind}:{tmp_path / 'ae.safetensors'}"), vae)
    save_file(vae.state_dict(), tmp_path / "ae.safetensors")  # and with diffusers' names
    assert_same_network(KLAutoencoder.load(tmp_path / "ae.safetensors", kind), vae)


@pytest.mark.parametrize(
    ("kind", "beside"),
    [
        ("sd3", "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"),
        ("flux", "model.diffusion_model.double_blocks.0.img_attn.qkv.weight"),
        ("sdxl", "conditioner.embedders.1.model.logit_scale"),
        ("sd", "cond_stage_model.transformer.text_model.embeddings.weight"),
    ],
)
def test_a_whole_model_in_one_file_tells_the_scale(tmp_path, kind, beside):
    vae, state = published(kind)
    whole = {f"first_stage_model.{name}": tensor for name, tensor in state.items()} | {beside: torch.ones(1)}
    save_file(whole, tmp_path / "x.safetensors")
    assert_same_network(open_autoencoder(tmp_path / "x.safetensors"), vae)


def test_a_file_of_a_folder_takes_its_config_and_old_names_are_known(tmp_path):
    vae, _ = published("flux")
    KLAutoencoder(vae).save(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    assert_same_network(open_autoencoder(path), vae)
    state = load_file(path)
    for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        state = {name.replace(f".{new}.", f".{old}."): tensor for name, tensor in state.items()}
    save_file(state, path)
    assert_same_network(open_autoencoder(tmp_path), vae)


def test_what_a_file_lacks_is_named(tmp_path):
    _, state = published("sd3")
    path, short = tmp_path / "x.safetensors", {k: v for k, v in state.items() if k != "decoder.conv_out.bias"}
    cases = {
        "does not say how its latents are scaled; write sd3:FILE, flux:FILE": (state, path),
        "16 latent channels, sdxl's autoencoder has 4": (state, f"sdxl:{path}"),
        "no AutoencoderKL: encoder.conv_in.weight, decoder": ({"encoder.a": torch.ones(1)}, f"sd3:{path}"),
        "1 missing: decoder.conv_out.bias": (short, f"sd3:{path}"),
        "1 extra: loss.logvar": (state | {"loss.logvar": torch.ones(1)}, f"sd3:{path}"),
    }
    for message, (tensors, spec) in cases.items():
        save_file(tensors, path)
        with pytest.raises(ValueError, match=f"cannot read the autoencoder in .*x.safetensors: .*{message}"):
            open_autoencoder(spec)
    path.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match="cannot read .* Git LFS pointer"):
        open_autoencoder(f"sd3:{path}")
    with pytest.raises(ValueError, match="no autoencoder is known as 'vq'"):
        save_file(state, path)
        KLAutoencoder.load(path, "vq")


@pytest.mark.parametrize(
    "wrong",
    [dict(act_fn=None), dict(block_out_channels=[]), dict(in_channels=-1), dict(norm_num_groups=0)]
    + [dict(scaling_factor=None), dict(scaling_factor=0), dict(shift_factor="x"), dict(_class_name=["AutoencoderKL"])],
    ids=str,
)
def test_a_config_that_is_none_is_refused_in_one_line(tmp_path, wrong):
    KLAutoencoder(tiny_kl()).save(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | wrong))
    with pytest.raises(ValueError, match="cannot read the autoencoder in|describes") as error:
        open_autoencoder(tmp_path)
    assert "\n" not in str(error.value)


def test_a_save_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    model = KLAutoencoder(tiny_kl())
    model.save(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def half(tensor):
        raise OSError("no space left on device")

    monkeypatch.setattr("mmdit.weights_io.whole", half)
    with pytest.raises(OSError, match="no space left"):
        model.save(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
