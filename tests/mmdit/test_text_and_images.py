"""The pipeline of text and images: saved and read again, drawn from prompts, and written on in both."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

from mmdit import TextToImage
from mmdit.autoencoder import PixelSpace
from mmdit.config import TransfusionConfig
from mmdit.generate import TextSampling, Written
from mmdit.text import TextConfig, Tokenizer
from mmdit.text_and_images import CaptionedTransfusion, TransfusionPipeline, Words, _StreamDecoder
from mmdit.transfusion import Transfusion

PROMPTS = ["a red circle", "two blue stars", ""]


TINY = TransfusionConfig(vocab_size=280, in_channels=3, patch_size=4, depth=2, num_heads=2, head_dim=8)


@pytest.fixture(scope="module")
def pipe():
    return pipeline(TINY, Tokenizer.train(PROMPTS, 280, 8, images=True))


def pipeline(config, tokenizer):
    torch.manual_seed(0)
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
    out = [one.parts for one in pipe.generate([["a red circle"], [picture, "two"], []], **how)]
    assert len(out) == 3 and all(isinstance(part, str | Image.Image) for parts in out for part in parts)
    assert isinstance(out[2][0], Image.Image) and out[2][0].size == (12, 8)
    [drawn] = pipe.generate([["a red circle"]], seed=5, begin="image", max_tokens=0)
    assert (
        drawn.stopped == "length" and np.abs(pixels(drawn.parts) - pixels(pipe(["a red circle"], seed=5))).max() <= 1
    )  # what a call draws
    [alone] = pipe.generate([[picture, "two"]], seed=1, **how)
    assert [p for p in alone.parts if isinstance(p, str)] == [p for p in out[1] if isinstance(p, str)]


def test_it_tells_what_it_writes_as_it_comes(pipe):
    heard = []
    [written] = pipe.generate([["a red"]], 3, lambda i, part: heard.append(part), max_tokens=12, max_images=1)
    texts = [p for p in heard if isinstance(p, str)]
    assert len(texts) > 1 and [type(p) for p in heard if not isinstance(p, str)] == [
        type(p) for p in written.parts if not isinstance(p, str)
    ]
    first = next(p for p in written.parts if isinstance(p, str))
    assert "".join(texts).strip().startswith(first[:3])


def test_pictures_are_told_as_they_are_written_and_nothing_that_is_empty(pipe):
    heard = []
    how = dict(begin="image", max_tokens=6, max_images=1)
    [written] = pipe.generate([["a red"]], 3, lambda i, part: heard.append(part), **how)
    assert np.array_equal(pixels(heard[:1]), pixels(written.parts[:1]))
    assert all(isinstance(part, str) and part for part in heard[1:]) and len(heard) > 1


def test_a_picture_that_is_read_is_in_the_models_range(pipe):
    picture = Image.fromarray(np.arange(8 * 12 * 3, dtype=np.uint8).reshape(8, 12, 3))
    [latent] = pipe._parts([picture])
    expected = torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255 * 2 - 1
    torch.testing.assert_close(latent, expected)
    assert pipe._parts([picture])[0].dtype == pipe.model.transformer.dtype
    assert np.array_equal(pixels([pipe._shown(latent)]), pixels([picture]))


@pytest.mark.parametrize(
    "how",
    [{"negative_prompts": "blue"}, {"rescale": 0.5}, {"skip_layers": [0]}, {"rule": "apg"}],
    ids=lambda how: next(iter(how)),
)
def test_guidance_that_it_does_not_know_is_refused(pipe, how):
    with pytest.raises(ValueError, match="is guided away from no prompt, by rule 'cfg'"):
        pipe(["a red circle"], **how)


def test_a_character_of_several_tokens_is_told_whole():
    tokenizer = Tokenizer.train(["plain words"], 280, 32, images=True)
    ids = tokenizer(["café ☃ ok"]).ids[0]
    stream = _StreamDecoder(tokenizer)
    pieces = [stream.add(i[None]) for i in ids[: tokenizer(["café ☃ ok"]).mask.sum() - 1]]
    assert "".join(pieces) == "café ☃ ok" and "\ufffd" not in "".join(pieces) and "" in pieces


def test_half_a_character_at_the_end_is_told_last():
    tokenizer = Tokenizer.train(["plain words"], 280, 32, images=True)
    stream = _StreamDecoder(tokenizer)
    [ids] = tokenizer.encode(["ok ☃"])
    assert [stream.add(torch.tensor(ids[:-1])), stream.rest(), stream.rest()] == ["", "ok \ufffd", ""]


@pytest.mark.parametrize(("text", "end"), [("a red", " red"), ("ared", "ed")])
def test_what_continues_a_text_begins_with_its_space(text, end, pipe, monkeypatch):
    """The tokens that a model writes after a text, after a picture and after nothing, as strings and as they come."""
    tokenizer = pipe.model.conditioner.tokenizer
    new = torch.tensor(tokenizer.encode([text])[0][-1:])
    assert tokenizer.backend.decode(new.tolist()) == end

    def write(trunk, parts, told, **_):
        for i in range(len(parts)):
            told(i, new)
        return [Written([new], "end") for _ in parts]

    def tell(i, part):
        told[i] += part

    monkeypatch.setattr("mmdit.text_and_images.generate", write)
    told = [""] * 3
    prompts = [["a"], ["a", Image.new("RGB", pipe.size[::-1])], []]
    written = [one.parts[0] for one in pipe.generate(prompts, told=tell)]
    assert written == told == [end, end.strip(), end.strip()]


def test_a_model_with_sizes_is_saved_with_them_and_chooses(tmp_path):
    tokenizer = Tokenizer.train(PROMPTS, 280, 8, images=True, sizes=4)
    assert tokenizer.sizes == range(4, 8)
    assert not set(tokenizer.sizes) & set(tokenizer(["<size 1>"]).ids[0].tolist())
    config = replace(TINY, size_tokens=4)
    pipe = pipeline(config, tokenizer)
    pipe.save(tmp_path)
    again = TextToImage.load(tmp_path, "cpu")
    [drawn] = again.generate([["a red circle"]], begin="image", max_tokens=0)
    width, height = drawn.parts[0].size
    assert width % again.step == height % again.step == 0 and max(width, height) <= 4 * again.step
    assert again.image_sampling(free=True).size is None and again.image_sampling().size == (8, 12)
    assert again.image_sampling(height=16, free=True).size[0] == 16
    assert again.image_sampling(width=16, free=True).size[1] == 16
    assert again.generate([[""]], max_tokens=0)[0].parts[0].size == (12, 8)  # nothing before it says a size
    with pytest.raises(ValueError, match="they are not of one model"):
        CaptionedTransfusion(Transfusion(TINY), Words(TextConfig(280, 8), tokenizer))


@pytest.mark.parametrize(
    ("size_tokens", "size", "expected"),
    [
        (0, (30, 20), (12, 8)),  # the trained one
        (0, (12, 8), (12, 8)),
        (4, (8, 8), (8, 8)),  # its own
        (4, (7, 3), (8, 4)),
        (4, (400, 800), (8, 12)),  # of at most the trained area
        (3, (2, 900), (4, 12)),  # of at most three steps
    ],
)
def test_a_photograph_is_fitted_to_a_size_that_the_model_has_learnt(size_tokens, size, expected):
    tokenizer = Tokenizer.train(PROMPTS, 280, 8, images=True, sizes=size_tokens)
    pipe = pipeline(replace(TINY, size_tokens=size_tokens), tokenizer)
    picture = Image.new("RGB", (size[0] + 2, size[1]), "red")
    picture.paste((0, 0, 255), (1, 0, size[0] + 1, size[1]))
    fitted = pipe.fitted(picture)
    assert fitted.size == expected and fitted.getpixel((expected[0] // 2, expected[1] // 2)) == (0, 0, 255)
    assert pipe.generate([[fitted]], max_tokens=1, max_images=0)


def test_it_writes_with_the_models_own_noise_and_times():
    """As it draws."""
    pipe = pipeline(TINY, Tokenizer.train(PROMPTS, 280, 8, images=True))
    pipe.sampling |= {"solver": "euler-maruyama", "diffusion": "kl", "grid": "cosine"}
    [drawn], [written] = pipe(["two"], seed=3), pipe.generate([["two"]], 3, begin="image", max_tokens=0)
    assert np.abs(pixels([drawn]) - pixels(written.parts)).max() <= 1
    assert pipe.image_sampling(solver="heun").diffusion is None
    pipe.sampling |= {"rescale": 0.5}
    with pytest.raises(ValueError, match="by rule 'cfg'"):
        pipe.generate([["two"]])


@pytest.mark.slow
def test_compiled_it_writes_and_draws_the_same():
    tokenizer = Tokenizer.train(PROMPTS, 280, 8, images=True)
    plain, fast = pipeline(TINY, tokenizer), pipeline(TINY, tokenizer).compile()
    how = dict(max_tokens=4, max_images=1, text=TextSampling(temperature=0))
    for a, b in zip(*(pipe.generate([["a red"], []], 2, **how) for pipe in (plain, fast)), strict=True):
        assert [type(p) for p in a.parts] == [type(p) for p in b.parts] and a.stopped == b.stopped
        for x, y in zip(a.parts, b.parts, strict=True):
            assert x == y if isinstance(x, str) else np.abs(pixels([x]) - pixels([y])).max() <= 1


def test_all_that_it_writes_and_draws_stays_compiled():
    """A block has more graphs than torch's 8: of its readings of a cache, with and without a mask, of some rows, ..."""
    torch.compiler.reset()
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=True):
        pipe = pipeline(TINY, Tokenizer.train(PROMPTS, 280, 8, images=True)).compile(backend="eager")
        for size in ({}, {"height": 16, "width": 8}):
            pipe(PROMPTS, **size)
        picture = Image.new("RGB", (8, 8))
        for prompts in ([["a red"]], [["a red"], ["two"]], [["a red circle", picture, "two"]]):
            pipe.generate(prompts, max_tokens=12, max_images=1)


def test_a_chosen_size_is_drawn_with_the_shift_of_that_size(pipe):
    """As one that is asked for; and a text of no tokens is no prompt."""
    assert pipe.image_sampling(free=True).size == (8, 12)  # it has no tokens to say one
    asked = pipe.image_sampling(height=16, width=24, num_steps=3)
    assert (asked.size, asked.shift, asked.shift_of) == ((16, 24), 1.5, (8, 12))
    [drawn] = pipe.generate([["two"]], 4, image=asked, begin="image", max_tokens=0)
    [same] = pipe.generate([["two"]], 4, image=replace(asked, shift=3.0, shift_of=None), begin="image", max_tokens=0)
    assert np.abs(pixels(drawn.parts) - pixels(same.parts)).max() <= 1
    [empty], [none] = (pipe.generate([prompt], 1, max_tokens=0) for prompt in ([""], []))
    assert np.array_equal(pixels(empty.parts), pixels(none.parts))


def test_a_picture_that_does_not_fit_is_refused(pipe):
    with pytest.raises(ValueError, match="8 x 10 does not fit: both sides must be multiples of 4, as 8 x 8$"):
        pipe.generate([[Image.new("RGB", (10, 8)), "two"]])


def test_a_tokenizer_of_another_model_is_refused(pipe):
    plain = Tokenizer.train(PROMPTS, 280, 8)
    with pytest.raises(ValueError, match="no tokens for images"):
        Words(TextConfig(280, 8), plain)
    large = Tokenizer.train([" ".join(f"word{i}" for i in range(99))], 400, 8, images=True)
    with pytest.raises(ValueError, match="they are not of one model"):
        CaptionedTransfusion(pipe.model.transformer, Words(TextConfig(400, 8), large))


def test_tokens_stand_where_the_tokenizer_has_them(tmp_path):
    """The ids of padding, the end and images need not be 0 to 3; a trunk that has them elsewhere is refused."""
    special, vocabulary = ["<image>", "<eos>", "</image>", "<pad>"], {"red": 0, "circle": 1, "?": 2}
    backend = Backend(models.WordLevel(vocabulary, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(special)
    backend.save(str(tmp_path / "tokenizer.json"))
    words = Words(TextConfig(9, 8), Tokenizer.adopt(tmp_path, 8, images=True))
    assert words.tokenizer.special == (6, 4, 3, 5)
    shape = dict(vocab_size=9, in_channels=3, patch_size=4, depth=1, num_heads=2, head_dim=8)
    config = TransfusionConfig(**shape, pad=6, eos=4, boi=3, eoi=5)
    torch.manual_seed(0)
    pipe = TransfusionPipeline(CaptionedTransfusion(Transfusion(config), words).eval(), PixelSpace(), (8, 8))
    picture, [written] = Image.new("RGB", (8, 8)), pipe.generate([["red circle"]], max_tokens=5, max_images=0)
    assert set(" ".join(written.parts).split()) <= {"red", "circle"}
    assert pipe.generate([[picture, "red"]], max_tokens=0)[0].parts == []
    nothing, empty = (pixels(pipe([prompt, "red"], num_steps=2, seed=1)) for prompt in (" ", ""))
    assert np.array_equal(nothing, empty)
    pipe.save(tmp_path / "saved")
    again = TextToImage.load(tmp_path / "saved", "cpu")
    assert again.generate([["red circle"]], max_tokens=5, max_images=0) == [written]
    with pytest.raises(ValueError, match=r"sizes are \(6, 4, 3, 5\), the trunk's \(0, 1, 2, 3\)"):
        CaptionedTransfusion(Transfusion(TransfusionConfig(**shape)), words)


def test_a_saved_model_with_another_tokenizer_is_refused(pipe, tmp_path):
    """Larger, of other special tokens, or without tokens for images."""
    pipe.save(tmp_path)
    many = [" ".join(f"word{i}" for i in range(99))]
    for other, what in (
        (Tokenizer.train(many, 400, 8, images=True), "the tokenizer has 353 tokens, the trunk only 280"),
        (Tokenizer.train(PROMPTS, 270, 8), "no tokens for images"),
    ):
        other.save(tmp_path / "text" / "tokenizer.json")
        with pytest.raises(ValueError, match=what):
            TextToImage.load(tmp_path, "cpu")


def test_a_prompt_that_is_a_string_is_no_list_of_its_letters(pipe):
    with pytest.raises(ValueError, match="prompt 1 is a str, expected a list of strings and pictures"):
        pipe.generate([["a"], "a red circle"])
    with pytest.raises(ValueError, match="prompts is a NoneType, expected a list of prompts"):
        pipe.generate(None)
    with pytest.raises(ValueError, match="prompt 0 is a NoneType, expected a list of strings and pictures"):
        pipe.generate([None])
    with pytest.raises(ValueError, match="got a ndarray for a picture"):
        pipe.generate([["a", np.zeros((8, 12, 3), np.uint8)]])


def test_image_tokens_are_reserved():
    tokenizer = Tokenizer.train(PROMPTS, 280, 8, images=True)
    assert tokenizer.special == (0, 1, 2, 3) and Tokenizer.train(PROMPTS, 280, 8).special == (0, 1, None, None)
    assert not {2, 3} & set(tokenizer(["<image></image>"]).ids[0].tolist())  # written in a caption they are text
    with pytest.raises(ValueError, match="at least 260"):
        Tokenizer.train(PROMPTS, 259, 8, images=True)
