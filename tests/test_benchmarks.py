"""What benchmarks say of a run is so: the comparison with a model of text alone."""

import math

import pytest
import torch

import training
from benchmarks import text_only
from mmdit import TextToImage
from training.config import load_config

TINY = ("training.sample_every=0", "training.validate_every=0", "evaluation.prompts_per_question=0")
MIXED = (*TINY, "transfusion.enabled=true", "model.positions=rope", "text.vocab_size=300", "training.precision=fp32")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text-only")
    (folder / "words.txt").write_text("\n\n".join(f"a star and {i} more of them" for i in range(30)))
    text = (f"transfusion.text={folder / 'words.txt'}", "transfusion.text_fraction=0.25")
    return training.train(load_config("pixels-tiny", [*MIXED, *text, f"training.out={folder / 'run'}"]))


@pytest.fixture(scope="module")
def pipe(run):
    return TextToImage.load(run, "cpu")


def test_captions_cost_what_they_cost_before_their_pictures(run, pipe):
    """The words and what begins the picture, one caption at a time, each with a picture after it."""
    _, held_out = text_only.captions(load_config(run), pipe)
    assert len(held_out) > 1
    total, count = 0.0, 0
    for caption in held_out:
        ids, mask = (x[0] for x in pipe.model.conditioner.tokenize([caption]))
        batch = pipe.model.pack([[ids[mask][:-1], torch.zeros(3, 32, 32), ids[mask][-1:]]])
        with torch.no_grad():
            logits = pipe.model(batch).logits
        num = int(mask.sum()) - 1  # words; after the last comes the picture
        targets = [*ids[1:num].tolist(), pipe.model.transformer.config.boi]
        total -= sum(logits[i].log_softmax(-1)[target].item() for i, target in enumerate(targets))
        count += num
    found = text_only.nats(pipe.model, held_out, pipe.model.transformer.config.boi, size=3)
    assert found == pytest.approx(total / count, rel=1e-5)


def test_a_model_of_text_alone_learns_the_captions(run, pipe):
    """From the run's own config: more steps teach more, equal ones the same; the run's model stays as it was."""
    before = [p.clone() for p in pipe.model.parameters()]
    config = load_config(run, ["training.num_steps=40", "optimizer.lr=0.01"])
    captions, held_out = text_only.captions(config, pipe)
    eos = pipe.model.transformer.config.eos
    long = text_only.nats(text_only.train(config, pipe, captions), held_out, eos, 8)
    found = text_only.compare(run)
    assert long < 0.8 * found["text alone"] and found["text alone"] < math.log(300)
    assert text_only.compare(run) == found and found["captions"] == len(held_out)
    assert all(map(torch.equal, before, pipe.model.parameters()))


def test_a_step_has_the_captions_and_the_text_of_the_runs_config(run, pipe):
    config = load_config(run)
    captions, _ = text_only.captions(config, pipe)
    steps = list(text_only.batches(config, pipe, captions))
    assert len(steps) == 6 and {len(documents) for documents in steps} == {8}
    own = {tuple(ids.tolist()) for ids in text_only.rows(pipe.model.conditioner.tokenize(captions))}
    for documents in steps:
        assert all(tuple(ids.tolist()) in own for [ids] in documents[:6])
        written = [pipe.model.conditioner.tokenizer.decode(ids) for [ids] in documents[6:]]
        assert all(text.startswith("a star and") and text.endswith("more of them") for text in written)


def test_a_run_of_images_alone_is_refused(tmp_path):
    out = training.train(
        load_config("pixels-tiny", [*TINY, "training.num_steps=1", f"training.out={tmp_path / 'run'}"])
    )
    with pytest.raises(ValueError, match="is a model of images alone"):
        text_only.compare(out)
