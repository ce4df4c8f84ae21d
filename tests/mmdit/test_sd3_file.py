"""One file in SD3's original layout as a whole pipeline: its parts are those of the diffusers folder that it is of."""

import shutil

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from safetensors.torch import load_file, save_file

import mmdit
from mmdit.layouts import SD3
from mmdit.text_to_image import TextToImage
from tests.mmdit.test_kl_autoencoder import published
from tests.mmdit.test_text_to_image import pixels
from tests.mmdit.tiny_sd3 import PROMPTS, clip, clip_tokenizer, randomised, t5, t5_tokenizer

PARTS = ("text_encoders.clip_l.", "text_encoders.clip_g.", "text_encoders.t5xxl.", "first_stage_model.")


def make_pipeline(vae):
    """Of SD3's form in what no shape tells: heads of CLIP 64 wide, 16 latent channels, CLIP-L's projection the
    identity.
    """
    torch.manual_seed(0)
    words = clip_tokenizer("<|endoftext|>"), clip_tokenizer("!"), t5_tokenizer()
    transformer = SD3Transformer2DModel(
        sample_size=16,
        num_layers=2,
        attention_head_dim=64,
        num_attention_heads=1,
        caption_projection_dim=64,
        joint_attention_dim=200,
        pooled_projection_dim=64 + 24,
        pos_embed_max_size=24,
    )
    clip_l = clip(words[0], 64, 64, "quick_gelu", heads=1)
    torch.nn.init.eye_(clip_l.text_projection.weight)
    return StableDiffusion3Pipeline(
        transformer=randomised(transformer, 0.1),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=clip_l,
        tokenizer=words[0],
        text_encoder_2=clip(words[1], 128, 24, "gelu"),
        tokenizer_2=words[1],
        text_encoder_3=t5(words[2], 200),
        tokenizer_3=words[2],
    )


def save_folder_and_tensors(folder):
    """A pipeline's folder, and by name what Stability's file with everything inside holds of it."""
    vae, vae_tensors = published("sd3")
    randomised(vae, 0.05)  # its tensors too, they are the same
    make_pipeline(vae).save_pretrained(folder)
    trunk = mmdit.load(folder)
    out = {f"model.diffusion_model.{name}": x for name, x in SD3.from_ours(trunk.state_dict(), trunk.config).items()}
    for name, prefix in (("text_encoder", PARTS[0]), ("text_encoder_2", PARTS[1]), ("text_encoder_3", PARTS[2])):
        part = load_file(folder / name / "model.safetensors")
        out |= {f"{prefix}transformer.{key}": tensor for key, tensor in part.items()}
        out[f"{prefix}logit_scale"] = torch.tensor(4.6)
    out[f"{PARTS[2]}transformer.encoder.embed_tokens.weight"] = part["shared.weight"].clone()
    out[f"{PARTS[0]}transformer.text_projection.weight"] = torch.randn(64, 64)  # there, and not for use
    return out | {f"{PARTS[3]}{name}": tensor.detach() for name, tensor in vae_tensors.items()}


def save_one_file(tensors, path):
    save_file(tensors, path, {"mmdit": '{"sample_size": 16}'})


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd3")
    return folder, save_folder_and_tensors(folder)


@pytest.fixture(scope="module")
def folder(made):
    return made[0]


@pytest.fixture(scope="module")
def tensors(made):
    return made[1]


@pytest.fixture(scope="module")
def file(tensors, tmp_path_factory):
    path = tmp_path_factory.mktemp("file") / "sd3_medium_incl_clips_t5xxl.safetensors"
    save_one_file(tensors, path)
    return path


@pytest.fixture(scope="module")
def words(folder, tmp_path_factory):
    """The tokenizers alone."""
    out = tmp_path_factory.mktemp("words")
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        shutil.copytree(folder / name, out / name)
    return out


@pytest.fixture(scope="module")
def expected(folder):
    return TextToImage.load(folder, "cpu")


def without(tensors, path, *prefixes):
    """The file without some of its parts."""
    save_file({name: x for name, x in tensors.items() if not name.startswith(prefixes)}, path)
    return path


def test_its_parts_are_those_of_the_folder_and_so_are_its_pictures(file, words, expected):
    pipe = TextToImage.load(file, "cpu", text=words)
    text, theirs = pipe.model.conditioner, expected.model.conditioner
    for ours, other in zip(text.encoders, theirs.encoders, strict=True):
        a, b = ours.network.state_dict(), other.network.state_dict()
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    got, wanted = (part(part.tokenize([*PROMPTS, ""])) for part in (text, theirs))
    assert torch.equal(got.context, wanted.context) and torch.equal(got.pooled, wanted.pooled)
    assert (pipe.size, pipe.shift, pipe.sampling) == (expected.size, 3.0, expected.sampling)
    assert (pixels(pipe(PROMPTS, num_steps=3)) == pixels(expected(PROMPTS, num_steps=3))).all()


@pytest.mark.parametrize("lacking", PARTS[:3])
def test_an_encoder_that_the_file_lacks_comes_from_the_folder(tensors, folder, words, expected, tmp_path, lacking):
    file = without(tensors, tmp_path / "file.safetensors", lacking)
    pipe = TextToImage.load(file, "cpu", text=folder)
    got, wanted = (p.conditions(PROMPTS) for p in (pipe, expected))
    assert torch.equal(got.context, wanted.context) and torch.equal(got.pooled, wanted.pooled)
    with pytest.raises(ValueError, match="does not hold the text encoder .*, and .* has no text_encoder.*text=FOLDER"):
        TextToImage.load(file, "cpu", text=words)


def test_encoders_that_are_left_out_are_neither_read_nor_asked_for(tensors, folder, words, tmp_path):
    file = without(tensors, tmp_path / "file.safetensors", PARTS[2])
    pipe = TextToImage.load(file, "cpu", text=words, without=["t5"])
    wanted = TextToImage.load(folder, "cpu", without=["t5"])
    assert torch.equal(pipe.conditions(PROMPTS).context, wanted.conditions(PROMPTS).context)
    bare = without(tensors, tmp_path / "bare.safetensors", "text_encoders.")
    assert not TextToImage.load(bare, "cpu", without=["clip_l", "clip_g", "t5"]).conditions(PROMPTS).context.any()


def test_the_folder_may_be_a_name_on_the_hub(tensors, folder, expected, tmp_path, monkeypatch):
    """Of which only what is needed is fetched."""
    import huggingface_hub

    asked = []
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda name, allow_patterns: asked.append((name, allow_patterns)) or str(folder),
    )
    file = without(tensors, tmp_path / "file.safetensors", PARTS[2])
    pipe = TextToImage.load(file, "cpu", text="stabilityai/sd3")
    wanted = ["text_encoder_3/*", "tokenizer/*", "tokenizer_2/*", "tokenizer_3/*"]
    assert asked == [("stabilityai/sd3", wanted)]
    assert torch.equal(pipe.conditions(PROMPTS).context, expected.conditions(PROMPTS).context)


def test_a_name_that_is_nowhere_is_named(file, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="text=no-one/nothing is neither a folder nor read from the hub") as error:
        TextToImage.load(file, "cpu", text="no-one/nothing")
    assert "\n" not in str(error.value)


def test_an_autoencoder_that_the_file_lacks_is_asked_for(tensors, folder, words, expected, tmp_path):
    file = without(tensors, tmp_path / "file.safetensors", PARTS[3])
    with pytest.raises(ValueError, match="holds no autoencoder: give autoencoder=FOLDER"):
        TextToImage.load(file, "cpu", text=words)
    pipe = TextToImage.load(file, "cpu", text=words, autoencoder=folder)
    assert torch.equal(
        pipe.autoencoder.decode(torch.ones(1, 16, 4, 4)), expected.autoencoder.decode(torch.ones(1, 16, 4, 4))
    )
    with pytest.raises(ValueError, match="has latents of 3 channels, the transformer takes 16"):
        TextToImage.load(file, "cpu", text=words, autoencoder="none")


def test_eight_bit_numbers_become_what_is_asked_for(tensors, words, tmp_path):
    """As in Stability's file with T5 in fp8."""
    names = [name for name in tensors if name.startswith(PARTS[2]) and tensors[name].ndim == 2]
    save_file(tensors | {name: tensors[name].to(torch.float8_e4m3fn) for name in names}, tmp_path / "fp8.safetensors")
    pipe = TextToImage.load(tmp_path / "fp8.safetensors", "cpu", torch.bfloat16, text=words)
    network = pipe.model.conditioner.t5.network
    assert {p.dtype for p in network.parameters()} == {torch.bfloat16}
    name = "encoder.block.0.layer.0.SelfAttention.q.weight"
    stored = tensors[f"{PARTS[2]}transformer.{name}"].to(torch.float8_e4m3fn)
    assert torch.equal(network.state_dict()[name], stored.to(torch.bfloat16))


def test_saved_for_diffusers_it_is_the_folder_again(file, words, folder, expected, tmp_path):
    TextToImage.load(file, "cpu", text=words).save(tmp_path, layout="diffusers")
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        a, b = (load_file(root / name / "model.safetensors") for root in (tmp_path, folder))
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    again = StableDiffusion3Pipeline.from_pretrained(tmp_path)
    with torch.no_grad():
        context, _, pooled, _ = again.encode_prompt(PROMPTS, None, None, max_sequence_length=256)
    wanted = expected.conditions(PROMPTS)
    torch.testing.assert_close(context, wanted.context, rtol=0, atol=1e-5)
    torch.testing.assert_close(pooled, wanted.pooled, rtol=0, atol=1e-5)


def test_diffusers_reads_the_same_file_to_the_same_pictures(file, folder, words):
    theirs = StableDiffusion3Pipeline.from_single_file(str(file), config=str(folder), local_files_only=True)
    theirs.text_encoder_3.eval()  # where it leaves dropout on
    theirs.set_progress_bar_config(disable=True)
    ours, noise = TextToImage.load(file, "cpu", text=words), [torch.Generator().manual_seed(i) for i in (0, 1)]
    a, b = pixels(ours(PROMPTS, num_steps=4)), pixels(theirs(PROMPTS, num_inference_steps=4, generator=noise).images)
    assert abs(a - b).max() <= 2 and a.std() > 20


# --- bad input ----------------------------------------------------------------------------------------------------


def test_without_tokenizers_it_says_what_to_give(file):
    with pytest.raises(ValueError, match=r"clip_l of .* needs its tokenizer, no file holds one: give text=FOLDER"):
        TextToImage.load(file, "cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{PARTS[0]}transformer.text_model.encoder.layers.1.mlp.fc2.bias"), "clip_l.*fc2.bias"),
        (lambda t: t.pop(f"{PARTS[1]}transformer.text_projection.weight"), "clip_g.*no matrix text_projection.weight"),
        (lambda t: t.pop(f"{PARTS[2]}transformer.shared.weight"), "t5.*no matrix shared.weight"),
        (lambda t: t.update({f"{PARTS[2]}transformer.odd": torch.ones(2)}), "t5.*extra.* odd"),
    ],
)
def test_tensors_that_are_missing_or_extra_are_named(tensors, words, tmp_path, change, message):
    other = dict(tensors)
    change(other)
    save_file(other, tmp_path / "file.safetensors")
    with pytest.raises(ValueError, match=message) as error:
        TextToImage.load(tmp_path / "file.safetensors", "cpu", text=words)
    assert "\n" not in str(error.value)


def test_parts_of_two_models_are_refused(tensors, words, tmp_path):
    t5_width = {f"{PARTS[2]}transformer.{name}": x for name, x in t5(t5_tokenizer(), 64).state_dict().items()}
    save_file(tensors | {name: x.clone() for name, x in t5_width.items()}, tmp_path / "file.safetensors")
    with pytest.raises(ValueError, match="T5's states are 64 wide, the context 200"):
        TextToImage.load(tmp_path / "file.safetensors", "cpu", text=words)


def test_text_and_autoencoder_go_with_a_file(folder, file, words):
    with pytest.raises(ValueError, match="go with a single file"):
        TextToImage.load(folder, "cpu", text=words)
    with pytest.raises(ValueError, match="without names t5xxl, expected a list of some of clip_l, clip_g, t5"):
        TextToImage.load(file, "cpu", text=words, without=["t5xxl"])
    with pytest.raises(ValueError, match="is a pickle"):
        TextToImage.load(file.with_suffix(".ckpt"), "cpu")
    with pytest.raises(FileNotFoundError, match="gone.safetensors holds no model"):
        TextToImage.load(file.with_name("gone.safetensors"), "cpu")
