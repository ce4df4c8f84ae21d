"""Training on frozen text encoders of a folder: recorded and not stored, resumed bit for bit, and exported."""

import json
import shutil

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

import mmdit
import training
from mmdit.sd3_pipeline import MaskedAttention, absent, diffusers_inputs
from mmdit.sd3_text import SD3Text
from mmdit.text_encoders import fingerprint
from tests.mmdit.test_text_to_image import pixels
from tests.mmdit.tiny_sd3 import save_encoders, t5, t5_tokenizer
from tests.training.runs import assert_bit_equal, config_for, last_weights


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """A T5 in a folder, and SD3's three."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("encoders")
    save_encoders(root)
    return root


def train(out, *overrides):
    return training.train(config_for(out, "training.num_steps=2", "training.checkpoint_every=1", *overrides))


@pytest.mark.parametrize("kind", ["t5", "sd3"])
def test_a_frozen_encoder_reads_the_captions_and_is_no_part_of_the_run(encoders, tmp_path, kind):
    source = encoders / kind
    run = train(tmp_path / "run", f"text.encoder={source}", "objective.caption_dropout=0.464", "optimizer.lr=0.05")
    assert not [name for name in last_weights(run) if "conditioner" in name]
    about = json.loads((run / "pipeline" / "text" / "config.json").read_text())
    assert (about["encoder"], about["sha256"], about["max_length"]) == (str(source), fingerprint(source), 32)
    pipe = mmdit.TextToImage.load(run, "cpu")
    assert isinstance(pipe.model.conditioner, SD3Text) == (kind == "sd3")
    config = pipe.model.transformer.config
    assert (config.context_dim, config.pooled_dim) == (32, 20 if kind == "sd3" else 32)
    none = pipe.conditions([None])
    assert none.pooled.any() == (kind == "t5")  # the empty caption, or zeros as SD3 drops
    assert (pixels(pipe(["a red circle"], num_steps=1)) != pixels(pipe(["star"], num_steps=1))).any()


def test_a_resumed_run_is_the_uninterrupted_one(encoders, tmp_path):
    how = (f"text.encoder={encoders / 't5'}", "training.num_steps=4", "training.checkpoint_every=2")
    whole = training.train(config_for(tmp_path / "whole", *how))
    part = training.train(config_for(tmp_path / "part", *how[:1], "training.num_steps=2", *how[2:]))
    training.resume(part, ["training.num_steps=4"])
    assert_bit_equal(whole, part)


def test_another_encoder_in_the_same_place_is_refused(encoders, tmp_path):
    source = tmp_path / "t5"
    shutil.copytree(encoders / "t5", source)
    run = train(tmp_path / "run", f"text.encoder={source}")
    t5(t5_tokenizer(), 32).save_pretrained(source)
    for again in (lambda: training.resume(run, ["training.num_steps=3"]), lambda: mmdit.TextToImage.load(run, "cpu")):
        with pytest.raises(ValueError, match="is not the one that this model was trained with"):
            again()
    shutil.rmtree(source)
    with pytest.raises(ValueError, match="is gone from .*t5: say where it is now in .*text/config.json"):
        mmdit.TextToImage.load(run, "cpu")
    path = run / "pipeline" / "text" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"encoder": str(encoders / "t5")}))
    mmdit.TextToImage.load(run, "cpu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["text.encoder=nowhere"], "no text encoder in .*nowhere"),
        (["text.encoder="], "text.encoder is empty"),
        (["text.encoder=nowhere", "transfusion.enabled=true", "model.positions=rope"], "reads words itself"),
    ],
    ids=str,
)
def test_encoders_that_cannot_be_are_refused_and_nothing_is_left(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        train(tmp_path / "run", *changes)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("text", ["learned", "sd3"])
def test_a_trained_model_runs_in_diffusers_and_gives_our_picture(encoders, tmp_path, text):
    """With a text encoder that was trained, and with SD3's three: ours make the inputs, theirs the latents."""
    source = "learned" if text == "learned" else encoders / text
    ours = mmdit.TextToImage.load(train(tmp_path / "run", f"text.encoder={source}", "optimizer.lr=0.02"), "cpu")
    ours.save(tmp_path / "out", layout="diffusers")
    theirs = StableDiffusion3Pipeline.from_pretrained(tmp_path / "out", **absent(tmp_path / "out"))
    theirs.set_progress_bar_config(disable=True)
    theirs.transformer.set_attn_processor(MaskedAttention())
    prompts, how = ["a red circle", "a star"], dict(num_steps=4, guidance=3.0)
    expected = ours(prompts, solver="euler", grid="diffusers", **how)
    inputs = diffusers_inputs(ours, prompts) | dict(latents=ours.noise([0, 1], *ours.size), output_type="latent")
    latents = theirs(**inputs, num_inference_steps=4, guidance_scale=3.0).images
    assert abs(pixels(ours.pictures(latents)) - pixels(expected)).max() <= 2
    assert pixels(expected).std() > 5
