"""SD3 pipeline folders: our pictures are diffusers' for the same noise, there and back; what is ours runs there."""

import copy
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3Pipeline,
)
from PIL import Image

import mmdit
from mmdit.autoencoder import PatchAutoencoder, PatchAutoencoderConfig, PixelSpace, open_autoencoder
from mmdit.edit import Edit
from mmdit.sd3_pipeline import MaskedAttention, absent, diffusers_inputs
from mmdit.text_encoders import open_text_encoder
from mmdit.text_to_image import TextToImage
from mmdit.weights_io import read_weights
from tests.mmdit.test_text_to_image import make_model, pixels
from tests.mmdit.tiny_sd3 import PROMPTS, randomised, save_pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sd3")


@pytest.fixture(scope="module")
def theirs(folder):
    return save_pipeline(folder)


@pytest.fixture(scope="module")
def ours(theirs, folder):
    return TextToImage.load(folder, "cpu")


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def assert_same(images, others, most=2):
    """Within so many of 255 levels everywhere; of pictures that are neither flat nor saturated."""
    a, b = pixels(images), pixels(others)
    assert abs(a - b).max() <= most
    assert b.std() > 20 and ((b > 0) & (b < 255)).mean() > 0.5


# --- the same pictures --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(32, 32), (40, 24)], ids=str)
@pytest.mark.parametrize("guidance", [1.0, 7.0])
@pytest.mark.parametrize("num_steps", [1, 4, 28])
def test_pictures_are_diffusers(ours, theirs, num_steps, guidance, size):
    height, width = size
    shape = dict(height=height, width=width)
    expected = theirs(
        PROMPTS, num_inference_steps=num_steps, guidance_scale=guidance, generator=generators(5, 6), **shape
    )
    got = ours(PROMPTS, num_steps=num_steps, guidance=guidance, seed=5, **shape)
    assert (got[0].height, got[0].width) == size
    assert_same(got, expected.images)


def test_a_folder_is_drawn_as_diffusers_does_without_being_told(ours, theirs):
    assert_same(ours(PROMPTS, seed=1), theirs(PROMPTS, generator=generators(1, 2)).images)


def test_negative_prompts_are_diffusers(ours, theirs):
    negatives = ["a blue square", ""]
    how = dict(num_inference_steps=4, generator=generators(0, 1))
    got = ours(PROMPTS, negatives, num_steps=4)
    assert_same(got, theirs(PROMPTS, negative_prompt=negatives, **how).images)
    plain = pixels(ours(PROMPTS, num_steps=4))
    assert abs(pixels(got)[0] - plain[0]).max() > 2 and abs(pixels(got)[1] - plain[1]).max() <= 1


@pytest.mark.parametrize("layers", [[1], [0, 2]], ids=str)
def test_skip_layer_guidance_is_diffusers(ours, theirs, layers):
    skip = dict(skip_guidance_layers=layers, skip_layer_guidance_scale=1.5, skip_layer_guidance_stop=0.6)
    expected = theirs(PROMPTS, num_inference_steps=6, generator=generators(0, 1), **skip, guidance_scale=3.0).images
    skip = dict(skip_layers=layers, skip_scale=1.5, skip_steps=(0.01, 0.6))
    got = ours(PROMPTS, num_steps=6, guidance=3.0, **skip)
    assert_same(got, expected)
    assert abs(pixels(got) - pixels(ours(PROMPTS, num_steps=6, guidance=3.0))).max() > 5


@pytest.mark.parametrize("strength", [0.25, 0.75, 1.0])
def test_image_to_image_is_diffusers(ours, theirs, strength):
    """Given as latents, for diffusers draws them from the posterior with the generator of the noise."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (24, 40, 3), dtype=np.uint8))
    known = ours.autoencoder.encode(Edit(image).images(1))
    pipe = StableDiffusion3Img2ImgPipeline(**theirs.components)
    pipe.set_progress_bar_config(disable=True)
    how = dict(height=24, width=40, generator=generators(3), guidance_scale=4.0)
    expected = pipe(PROMPTS[:1], image=known, strength=strength, num_inference_steps=8, **how).images
    assert_same(ours(PROMPTS[:1], seed=3, edit=Edit(image, strength), num_steps=8, guidance=4.0), expected)


def test_half_precision_is_near(ours, folder):
    half = TextToImage.load(folder, "cpu", torch.bfloat16)
    assert half.model.transformer.dtype == next(half.model.conditioner.t5.network.parameters()).dtype == torch.bfloat16
    a, b = (pixels(pipe(PROMPTS, num_steps=4, guidance=2)) for pipe in (ours, half))
    assert 0 < abs(a - b).mean() < 10


def test_an_encoder_is_left_out_of_the_folder_as_diffusers_does(folder, theirs):
    less = StableDiffusion3Pipeline(**{**theirs.components, "text_encoder_3": None, "tokenizer_3": None})
    less.set_progress_bar_config(disable=True)
    expected = less(PROMPTS, num_inference_steps=3, generator=generators(0, 1)).images
    assert_same(TextToImage.load(folder, "cpu", without=["t5"])(PROMPTS, num_steps=3), expected)


def test_the_shift_is_the_schedulers(folder, tmp_path, theirs):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    FlowMatchEulerDiscreteScheduler(shift=1.0).save_pretrained(tmp_path / "scheduler")
    pipe = TextToImage.load(tmp_path, "cpu")
    assert pipe.shift == 1.0
    seen = []
    pipe(PROMPTS[:1], num_steps=4, callback=lambda p: seen.append(p.t_next), height=16)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    scheduler.set_timesteps(4)
    assert seen == pytest.approx(scheduler.sigmas[1:].tolist())


# --- there and back -----------------------------------------------------------------------------------------------


def test_there_and_back_is_the_same_to_the_bit(ours, folder, theirs, tmp_path):
    ours.save(tmp_path, layout="diffusers")
    for name in ("transformer/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder_3/model"):
        before, after = (read_weights(root / f"{name}.safetensors") for root in (folder, tmp_path))
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    pipe = StableDiffusion3Pipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    again = TextToImage.load(tmp_path, "cpu")
    expected = pixels(theirs(PROMPTS, num_inference_steps=3, generator=generators(0, 1)).images)
    assert (pixels(pipe(PROMPTS, num_inference_steps=3, generator=generators(0, 1)).images) == expected).all()
    assert (pixels(again(PROMPTS, num_steps=3)) == pixels(ours(PROMPTS, num_steps=3))).all()


def test_in_our_own_layout_the_encoders_stay_where_they_are(ours, folder, tmp_path):
    ours.save(tmp_path)
    again = mmdit.TextToImage.load(tmp_path, "cpu")
    assert again.model.conditioner.source == folder
    assert (pixels(again(PROMPTS, num_steps=3)) == pixels(ours(PROMPTS, num_steps=3))).all()


@pytest.mark.parametrize("kind", ["pixels", "patches"])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_a_learnt_text_encoder_and_autoencoder_go_along(tmp_path, kind, guidance):
    """diffusers has no place for them: it is given what they make of prompts, and gives latents."""
    torch.manual_seed(0)
    if kind == "pixels":
        autoencoder, model, size = PixelSpace(), make_model(3, 4), (8, 12)
    else:
        PatchAutoencoder(PatchAutoencoderConfig(channels=4, widths=(8, 8), depth=1)).save(tmp_path / "autoencoder")
        autoencoder, model, size = open_autoencoder(tmp_path / "autoencoder"), make_model(4, 2), (32, 48)
    ours = TextToImage(model, autoencoder, size, 2.0)
    ours.save(tmp_path / "out", layout="diffusers")

    pipe = StableDiffusion3Pipeline.from_pretrained(tmp_path / "out", **absent(tmp_path / "out"))
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer.set_attn_processor(MaskedAttention())
    prompts = ["a red circle", "two blue stars"]
    inputs = diffusers_inputs(ours, prompts) | dict(generator=generators(0, 1), guidance_scale=guidance)
    latents = pipe(**inputs, num_inference_steps=5, output_type="latent").images

    how = dict(num_steps=5, solver="euler", grid="diffusers", guidance=guidance)
    expected = ours(prompts, **how)
    assert abs(pixels(ours.pictures(latents)) - pixels(expected)).max() <= 2
    assert pixels(expected).std() > 5
    again = TextToImage.load(tmp_path / "out", "cpu")
    assert again.size == size
    assert (pixels(again(prompts, **how)) == pixels(expected)).all()


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_3"])
def test_one_frozen_encoder_goes_along_as_the_folder_it_lies_in(folder, tmp_path, part):
    """A CLIP or a T5 alone, which masks padding: diffusers is given what it makes of prompts, as of a learnt one."""
    shutil.copytree(folder / part, tmp_path / "encoder")
    shutil.copytree(folder / part.replace("text_encoder", "tokenizer"), tmp_path / "encoder", dirs_exist_ok=True)
    frozen = open_text_encoder(tmp_path / "encoder")
    torch.manual_seed(0)
    shape = dict(depth=2, num_heads=2, head_dim=8, in_channels=3, patch_size=4, sample_size=8)
    trunk = mmdit.MMDiT(mmdit.MMDiTConfig(context_dim=frozen.context_dim, pooled_dim=frozen.pooled_dim, **shape))
    ours = TextToImage(mmdit.CaptionedMMDiT(randomised(trunk), frozen), PixelSpace(), (8, 8))
    ours.save(tmp_path / "out", layout="diffusers")

    pipe = StableDiffusion3Pipeline.from_pretrained(tmp_path / "out", **absent(tmp_path / "out"))
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer.set_attn_processor(MaskedAttention())
    how = dict(num_inference_steps=3, guidance_scale=2.0, output_type="latent", latents=ours.noise([0, 1], 8, 8))
    latents = pipe(**diffusers_inputs(ours, PROMPTS), **how).images
    same = dict(num_steps=3, solver="euler", grid="diffusers", guidance=2.0)
    expected = pixels(ours(PROMPTS, **same))
    assert abs(pixels(ours.pictures(latents)) - expected).max() <= 2 and expected.std() > 5
    assert (pixels(TextToImage.load(tmp_path / "out", "cpu")(PROMPTS, **same)) == expected).all()


def test_what_a_folder_held_before_is_no_part_of_what_is_saved_over_it(ours, folder, tmp_path):
    """Parts that diffusers' index does not name count for nothing, as there."""
    autoencoder = PatchAutoencoder(PatchAutoencoderConfig(channels=4, widths=(8, 8), depth=1))
    learnt = TextToImage(make_model(4, 2), autoencoder, (32, 48)), TextToImage(make_model(3, 4), PixelSpace(), (8, 12))
    bare = TextToImage.load(folder, "cpu", without=["t5"])
    how = dict(num_steps=2, solver="euler", grid="uniform", guidance=2.0)
    for pipe in (ours, *learnt, bare, ours, learnt[1]):
        pipe.save(tmp_path, layout="diffusers")
        again = TextToImage.load(tmp_path, "cpu")
        assert type(again.autoencoder) is type(pipe.autoencoder)
        assert abs(pixels(again(PROMPTS, **how)) - pixels(pipe(PROMPTS, **how))).max() <= 2  # ours are stored in half


def test_a_size_that_is_no_square_is_kept_beside_and_diffusers_is_told(ours, tmp_path):
    """Its own default is the square of as many latent pixels, of whole patches."""
    wide = TextToImage(copy.deepcopy(ours.model), ours.autoencoder, (24, 40), 3.0, ours.sampling)
    config = wide.model.transformer.config
    wide.model.transformer.config = replace(config, sample_size=round((12 * 20) ** 0.5))
    wide.save(tmp_path, layout="diffusers")
    pipe = StableDiffusion3Pipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.default_sample_size == 14  # 15.5, rounded, and a patch has 2
    inputs = diffusers_inputs(wide, PROMPTS)
    assert len(diffusers_inputs(wide, PROMPTS[0], "a star")["prompt_embeds"]) == 1
    with pytest.raises(ValueError, match="1 negative prompts for 2 prompts"):
        diffusers_inputs(wide, PROMPTS, ["a star"])
    assert (inputs["height"], inputs["width"]) == (24, 40)
    theirs = pipe(**inputs, num_inference_steps=2, generator=generators(0, 1)).images
    again = TextToImage.load(tmp_path, "cpu")
    assert again.size == (24, 40)
    assert_same(again(PROMPTS, num_steps=2), theirs)
    square = pipe(PROMPTS, num_inference_steps=2, generator=generators(0, 1)).images
    assert_same(again(PROMPTS, num_steps=2, height=28, width=28), square)
    for said, message in (
        ([24], "has no .size. of two numbers"),
        ([24, 41], "24 x 41, but both sides must be multiples of 4"),
    ):
        (tmp_path / "mmdit.json").write_text(json.dumps({"size": said}))
        with pytest.raises(ValueError, match=message):
            TextToImage.load(tmp_path, "cpu")


def test_without_the_mask_diffusers_would_see_padding(tmp_path):
    """The processor is needed: diffusers' own ignores the mask that it is given."""
    ours = TextToImage(make_model(3, 4), PixelSpace(), (8, 12))
    ours.save(tmp_path, layout="diffusers")
    pipe = StableDiffusion3Pipeline.from_pretrained(tmp_path, **absent(tmp_path))
    pipe.set_progress_bar_config(disable=True)
    inputs = diffusers_inputs(ours, ["a red circle"])
    how = dict(num_inference_steps=2, output_type="latent", latents=ours.noise([0], 8, 12))
    seen = pipe(**inputs, **how).images
    pipe.transformer.set_attn_processor(MaskedAttention())
    assert abs(pipe(**inputs, **how).images - seen).max() > 1e-3


# --- bad input ----------------------------------------------------------------------------------------------------


def edited(folder, out, name, **changes):
    shutil.copytree(folder, out, dirs_exist_ok=True)
    path = out / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return out


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("model_index.json", dict(_class_name="FluxPipeline"), "holds FluxPipeline, expected a StableDiffusion3Pipel"),
        ("scheduler/scheduler_config.json", dict(_class_name="DDIMScheduler"), "is of DDIMScheduler, expected a Flow"),
        ("scheduler/scheduler_config.json", dict(use_dynamic_shifting=True), "with use_dynamic_shifting, expected"),
        ("scheduler/scheduler_config.json", dict(shift=-1), "shift of -1, expected a number above 0"),
        ("scheduler/scheduler_config.json", dict(num_train_timesteps=500), "num_train_timesteps of 500, expected 1000"),
        ("text_encoder_3/config.json", dict(model_type="vit", architectures=["ViTModel"]), "text_encoder_3"),
        ("vae/config.json", dict(_class_name="VQModel"), "VQModel"),
    ],
    ids=str,
)
def test_folders_of_another_architecture_are_refused(theirs, folder, tmp_path, name, changes, message):
    with pytest.raises(ValueError, match=message) as error:
        TextToImage.load(edited(folder, tmp_path, name, **changes), "cpu")
    assert "\n" not in str(error.value)


def test_an_encoder_that_is_lost_is_not_left_out_unasked(folder, tmp_path):
    edited(folder, tmp_path, "model_index.json")
    shutil.rmtree(tmp_path / "text_encoder_3")
    with pytest.raises(ValueError, match=r"no text_encoder_3, which its .* names.*\(without=\['t5'\], or null there\)"):
        TextToImage.load(tmp_path, "cpu")
    assert TextToImage.load(tmp_path, "cpu", without=["t5"]).model.conditioner.t5 is None
    edited(folder, tmp_path, "model_index.json", text_encoder_3=[None, None])
    shutil.rmtree(tmp_path / "text_encoder_3")
    assert TextToImage.load(tmp_path, "cpu").model.conditioner.t5 is None
    edited(folder, tmp_path, "model_index.json", text_encoder=3)  # no pair of names, but the encoder is there
    assert TextToImage.load(tmp_path, "cpu").model.conditioner.clip_l is not None


def test_a_scheduler_that_is_no_table_is_refused(folder, tmp_path):
    edited(folder, tmp_path, "model_index.json")
    (tmp_path / "scheduler" / "scheduler_config.json").write_text("[]")
    with pytest.raises(ValueError, match="is of no known scheduler"):
        TextToImage.load(tmp_path, "cpu")


def test_a_variant_is_read_where_there_is_nothing_else(ours, theirs, tmp_path):
    theirs.save_pretrained(tmp_path, variant="fp16", max_shard_size="20KB")
    assert list(tmp_path.glob("*/*.fp16-*")) and not list(tmp_path.glob("*/*model.safetensors"))
    a, b = (pipe(PROMPTS, num_steps=2, seed=0) for pipe in (ours, TextToImage.load(tmp_path, "cpu")))
    assert [x.tobytes() for x in a] == [x.tobytes() for x in b]


def test_parts_of_two_models_are_refused(theirs, folder, tmp_path):
    edited(folder, tmp_path, "model_index.json")
    shutil.rmtree(tmp_path / "transformer")
    other = mmdit.MMDiT(mmdit.preset("tiny"))
    mmdit.save(other, tmp_path / "transformer", layout="diffusers")
    with pytest.raises(ValueError, match="T5's states are 32 wide, the context 256"):
        TextToImage.load(tmp_path, "cpu")


def test_what_diffusers_cannot_hold_is_refused(ours, tmp_path):
    with pytest.raises(ValueError, match="layout is 'sd3', expected 'mmdit' or 'diffusers'"):
        ours.save(tmp_path, layout="sd3")
    with pytest.raises(ValueError, match="nothing can be left out"):
        TextToImage(make_model(3, 4), PixelSpace(), (8, 12)).save(tmp_path / "own")
        TextToImage.load(tmp_path / "own", without=["t5"])
