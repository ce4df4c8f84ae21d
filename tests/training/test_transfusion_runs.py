"""Runs of text and images in one trunk, with text alone beside them, and with other tokenizers."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import mmdit
import training
from tests.training.runs import LONG, TRANSFUSION, assert_bit_equal, config_for, contents, metrics, stop_after
from training.config import ConfigError
from training.data import place_of
from training.run import RunFolder
from training.trainer import Trainer


def test_text_and_images_in_one_trunk(mixed, tmp_path):
    """Trained, stopped and resumed to the same bits, scored, drawn from and asked, as any other run."""
    losses = [loss for _, loss in metrics(mixed, "loss")]
    assert len(losses) == 6 and losses[-1] < losses[0]
    part = training.train(config_for(tmp_path / "part", *TRANSFUSION, "training.num_steps=3"))
    training.resume(part, ["training.num_steps=6"])
    assert_bit_equal(part, mixed)
    training.resume(part, ["training.num_steps=7", "evaluation.prompts_per_question=1"])
    scores = json.loads((part / "scores.json").read_text())
    assert {
        "validation_loss",
        "validation_text",
        "validation_caption",
        "shapes_eval",
        "captions_right",
    } <= scores.keys()
    assert 0 < scores["validation_text"] < 10 and 0 <= scores["captions_right"] <= 1
    pipe = mmdit.TextToImage.load(part, "cpu")
    [picture] = pipe(["a red circle"])
    assert picture.size == (32, 32)
    [written] = pipe.generate([[picture]], max_tokens=3, max_images=0)
    assert all(isinstance(text, str) for text in written.parts)
    with pytest.raises(ValueError, match="was trained with another transfusion"):
        training.resume(part, ["transfusion.weights=separate"])


def test_the_u_net_is_as_wide_as_asked(tmp_path):
    settings = (*TRANSFUSION, "transfusion.codec=unet", "transfusion.codec_width=8", "training.num_steps=1")
    run = training.train(config_for(tmp_path / "run", *settings))
    trunk = mmdit.load(run)
    assert trunk.patch_in.conv.out_channels == 8 and trunk.config.codec_width == 8


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        (["model.positions=sincos"], 'a transfusion trunk needs "rope"'),
        (["model.head_dim=12"], "a multiple of 8"),
        (["model.dual_attention_layers=[0]"], "no second attention"),
        (["transfusion.image_first_cap=0"], "image_first_cap"),
        (["transfusion.text=words.txt"], "text_fraction 0: text alone needs both"),
        (["transfusion.text_fraction=0.5"], "text is none and transfusion.text_fraction 0.5"),
        (["transfusion.text=", "transfusion.text_fraction=0.5"], "transfusion.text is empty"),
        (["transfusion.text=a", "transfusion.text_fraction=0.5", "transfusion.enabled=false"], "enabled=true too"),
        (["transfusion.text=a", "transfusion.text_fraction=0.05"], "= 8 that is 0 documents of text"),
        (["transfusion.text=a", "transfusion.text_fraction=0.99"], "= 8 that is 8 documents of text"),
        (["transfusion.text=a", "transfusion.text_fraction=0.1", "training.grad_accumulation=2"], "is 0 documents"),
    ],
)
def test_settings_that_do_not_go_with_transfusion_are_refused(tmp_path, changes, what):
    with pytest.raises(ValueError, match=what):
        config_for(tmp_path, *TRANSFUSION, *changes)


def with_words(words: Path, *overrides: str) -> tuple[str, ...]:
    return (*TRANSFUSION, f"transfusion.text={words}", "transfusion.text_fraction=0.25", *overrides)


@pytest.fixture(scope="module")
def beside(words, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("beside") / "run"
    return training.train(config_for(out, *with_words(words, "training.validate_every=3")))


def test_text_alone_is_trained_together_with_images(beside, words, mixed, tmp_path):
    """Read, held out in part, scored; each setting of it counts; and a batch has as many pictures less."""
    log = (beside / "log.txt").read_text()
    assert f"text: 40 documents of {words}" in log and "words.jsonl:41: no JSON" in log and " pieces to train on" in log
    losses = metrics(beside, "validation_corpus")
    assert [step for step, _ in losses] == [3, 6] and losses[1][1] < losses[0][1] < 8
    assert json.loads((beside / "scores.json").read_text())["validation_corpus"] == losses[1][1]
    others = [
        with_words(words, "transfusion.text_length=8"),
        with_words(words, "transfusion.text_fraction=0.5"),
        with_words(words, "training.grad_accumulation=2"),
    ]
    runs = [training.train(config_for(tmp_path / str(i), *other)) for i, other in enumerate(others)]
    assert len({tuple(metrics(run, "loss")) for run in (mixed, beside, *runs)}) == 5
    config = config_for(tmp_path / "batch", *others[2])
    trainer = Trainer(config, RunFolder.create(config.run_folder, config))
    batch = next(trainer.feed.batches(8, 0))
    assert len(batch.latents) == len(batch.tokens.ids) == 6 and len(batch.text.ids) == 2
    assert [(len(part.latents), len(part.text.ids)) for part in batch.split(2)] == [(3, 1), (3, 1)]


def test_a_run_with_text_goes_on_to_the_same_bits(words, beside, tmp_path, monkeypatch):
    """Over the end of the text's epoch; and only with the text as it was, wherever it is now."""
    text = Path(shutil.copy(words, tmp_path / "words.jsonl"))
    settings = with_words(text, *LONG, "transfusion.text_fraction=0.5", "transfusion.text_length=32")
    whole = training.train(config_for(tmp_path / "whole", *settings))
    with monkeypatch.context() as patch:
        stop_after(4, patch)
        out = training.train(config_for(tmp_path / "run", *settings))
    before, good = contents(out), text.read_text()
    for content, what in ((good.replace("after", "past"), "words.jsonl has changed since"), ("", "no text found")):
        text.write_text(content)
        with pytest.raises(ValueError, match=what):
            training.resume(out)
    other, moved = tmp_path / "other.txt", text.with_name("moved.jsonl")
    other.write_text("other words")
    with pytest.raises(ValueError, match="was trained with another transfusion.text"):
        training.resume(out, [f"transfusion.text={other}"])
    assert contents(out) == before
    text.unlink()
    moved.write_text(good)
    training.resume(out, [f"transfusion.text={moved}"])
    assert metrics(out, "loss") == metrics(whole, "loss")
    assert_bit_equal(out, whole)


def test_any_text_can_be_scored(beside, mixed, words, run, tmp_path):
    """All of another text; of the run's own, wherever it is, what is held out."""

    def corpus(run, text=None):
        return training.evaluate_run(run, {"prompts_per_question": 0}, text=text, out=tmp_path / "s.json").get(
            "validation_corpus"
        )

    pipe, one = mmdit.TextToImage.load(beside, "cpu"), tmp_path / "one.txt"
    one.write_text("number 17 comes after\n\nnumber 16")
    documents = [pipe._parts([text]) + [torch.tensor([1])] for text in ("number 17 comes after", "number 16")]
    batch = pipe.model.pack(documents)
    predicting = batch.predicting
    logits = pipe.model(batch).logits[predicting]
    expected = torch.nn.functional.cross_entropy(logits, batch.ids[predicting + 1]).item()
    assert corpus(beside, str(one)) == pytest.approx(expected)
    assert corpus(beside, str(shutil.copy(words, tmp_path))) == corpus(beside) != corpus(beside, str(one))
    assert corpus(mixed) is None and corpus(mixed, str(one)) > 0
    before = contents(beside)
    training.evaluate_run(beside, {"prompts_per_question": 0}, text=str(one))
    assert contents(beside) == before
    with pytest.raises(ValueError, match="a model of images alone, which has no likelihood of a text"):
        corpus(run, str(one))


def test_the_tokenizer_learns_from_the_text_too(beside, mixed):
    text = "number 17 comes after"
    lengths = [
        len(mmdit.TextToImage.load(run, "cpu").model.conditioner.tokenizer.encode([text])[0]) for run in (beside, mixed)
    ]
    assert lengths[0] < lengths[1]


def test_text_that_cannot_be_learnt_from_leaves_the_name_free(tmp_path):
    one = tmp_path / "one.txt"
    one.write_text(next(text for text in map(str, range(99)) if place_of(text) < 0.1))  # held out
    for path, message in ((one, "no text to learn from: .* lower data.held_out"), ("nowhere", "no file or folder")):
        with pytest.raises(ValueError, match=message):
            training.train(config_for(tmp_path / "run", *with_words(path)))
        assert not (tmp_path / "run").exists()


def test_text_of_which_nothing_is_held_out_is_said(words, tmp_path):
    out = training.train(config_for(tmp_path / "run", *with_words(words, "data.held_out=0", "training.num_steps=1")))
    assert "warning: no text is held out" in (out / "log.txt").read_text()
    assert metrics(out, "validation_corpus") == []


def test_a_run_with_another_tokenizer_holds_all_of_it(material, tmp_path):
    """Trained, resumed, sampled and asked when the tokenizer's own folder is gone."""
    folder = Path(shutil.copytree(material["tokenizer"], tmp_path / "tokenizer"))
    settings = (*TRANSFUSION, f"text.tokenizer={folder}")
    whole = training.train(config_for(tmp_path / "whole", *settings))
    part = training.train(config_for(tmp_path / "run", *settings, "training.num_steps=3"))
    shutil.rmtree(folder)
    training.resume(part, ["training.num_steps=6"])
    assert_bit_equal(part, whole)
    pipe = mmdit.TextToImage.load(part, "cpu")
    config = pipe.model.transformer.config
    assert (config.pad, config.eos, config.vocab_size) == (0, 1, 400) and {config.boi, config.eoi} == {280, 281}
    [picture] = pipe(["a red circle"])
    assert all(isinstance(text, str) for text in pipe.generate([[picture]], max_tokens=3, max_images=0)[0].parts)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["text.tokenizer={tokenizer}", "text.vocab_size=281"], "has 282 tokens, .*: set text.vocab_size=282 or more"),
        (["text.tokenizer={pictures}"], "pictures is no tokenizer's folder: it has no tokenizer.json"),
    ],
)
def test_tokenizers_that_do_not_work_leave_the_name_free(material, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        training.train(config_for(tmp_path / "run", *TRANSFUSION, *(change.format(**material) for change in changes)))
    assert not (tmp_path / "run").exists()


def test_a_picture_that_no_document_can_hold_is_refused_before_training(tmp_path):
    with pytest.raises(ConfigError, match="takes 18 tokens, and transfusion.max_tokens is 17: raise it"):
        training.train(config_for(tmp_path / "run", *TRANSFUSION, "transfusion.max_tokens=17"))
