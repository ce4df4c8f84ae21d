"""The pipeline of text and images: saved and read again, drawn from prompts, and written on in both."""

import numpy as np
import pytest
import torch
from PIL import Image

from mmdit import TextToImage
from mmdit.autoencoder import PixelSpace
from mmdit.config import TransfusionConfig
from mmdit.generate import TextSampling
from mmdit.text import TextConfig, Tokenizer
from mmdit.text_and_images import CaptionedTransfusion, TransfusionPipeline, Words
from mmdit.transfusion import Transfusion

PROMPTS = ["a red circle", "two blue stars", ""]


@pytest.fixture(scope="module")
def pipe():
    torch.manual_seed(0)
    tokenizer = Tokenizer.train(PROMPTS, 280, 8, images=True)
    config = TransfusionConfig(vocab_size=280, in_channels=3, patch_size=4, depth=2, num_heads=2, head_dim=8)
    model = CaptionedTransfusion(Transfusion(config), Words(TextConfig(280, 8), tokenizer)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.3 * torch.randn(p.shape))
    return TransfusionPipeline(model, PixelSpace(), (8, 12), 1.5, {"num_steps": 3, "guidance": 2.0})


def pixels(images):
    return np.stack([np.asarray(image) for image in images]).astype(int)


def test_it_draws_each_prompt_the_same_alone(pipe):
    together = pixels(pipe(PROMPTS, seed=[5, 6, 7]))
    assert together.shape == (3, 8, 12, 3)
    for prompt, seed, image in zip(PROMPTS, [5, 6, 7], together, strict=True):
        assert np.abs(pixels(pipe([prompt], seed=[seed])) - image).max() <= 1
    assert (pixels(pipe(["a red circle"], seed=6)) != together[1]).any()  # another caption, another picture
    assert pixels(pipe(["a red circle"], height=16, width=8)).shape == (1, 16, 8, 3)


def test_saved_and_read_again_it_is_the_same(pipe, tmp_path):
    pipe.save(tmp_path)
    again = TextToImage.load(tmp_path, "cpu")
    assert type(again) is TransfusionPipeline and again.sampling == pipe.sampling and again.shift == 1.5
    assert np.array_equal(pixels(again(PROMPTS, seed=1)), pixels(pipe(PROMPTS, seed=1)))


def test_it_writes_on_from_words_and_pictures(pipe):
    picture = Image.fromarray(np.full((8, 12, 3), 200, np.uint8))
    how = dict(max_tokens=3, max_images=1, text=TextSampling(temperature=0))
    out = pipe.generate([["a red circle"], [picture, "two"], []], **how)
    assert len(out) == 3 and all(isinstance(part, str | Image.Image) for parts in out for part in parts)
    assert isinstance(out[2][0], Image.Image) and out[2][0].size == (12, 8)
    [drawn] = pipe.generate([["a red circle"]], seed=5, begin="image", max_tokens=0)
    assert np.abs(pixels(drawn) - pixels(pipe(["a red circle"], seed=5))).max() <= 1  # what a call draws
    [alone] = pipe.generate([[picture, "two"]], seed=1, **how)
    assert [p for p in alone if isinstance(p, str)] == [p for p in out[1] if isinstance(p, str)]


def test_a_picture_that_does_not_fit_is_refused(pipe):
    with pytest.raises(ValueError, match="must divide by the patch"):
        pipe.generate([[Image.new("RGB", (10, 8)), "two"]])


def test_a_tokenizer_of_another_model_is_refused(pipe):
    plain = Tokenizer.train(PROMPTS, 280, 8)
    with pytest.raises(ValueError, match="no tokens for images"):
        Words(TextConfig(280, 8), plain)
    large = Tokenizer.train([" ".join(f"word{i}" for i in range(99))], 400, 8, images=True)
    with pytest.raises(ValueError, match="they are not of one model"):
        CaptionedTransfusion(pipe.model.transformer, Words(TextConfig(400, 8), large))


def test_image_tokens_are_reserved():
    tokenizer = Tokenizer.train(PROMPTS, 280, 8, images=True)
    assert tokenizer.special == (0, 1, 2, 3) and Tokenizer.train(PROMPTS, 280, 8).special == (0, 1, None, None)
    assert not {2, 3} & set(tokenizer(["<image></image>"]).ids[0].tolist())  # written in a caption they are text
    with pytest.raises(ValueError, match="at least 260"):
        Tokenizer.train(PROMPTS, 259, 8, images=True)
