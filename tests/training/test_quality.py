"""Scores of pictures from folder or model to number: the same as the libraries by hand on the same pictures."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import mmdit
import training
from mmdit_cli.main import app
from tests.training.pictures import shards_of
from tests.training.runs import assert_bit_equal, config_for, metrics
from tests.training.test_rows import parquet_of
from tests.training.tiny_networks import pictures, save_clip, save_dino, save_pictures
from training.cache_writer import write_cache
from training.config import EvaluationConfig, load_config
from training.data import split_by_key
from training.image_networks import open_clip_model, open_features
from training.quality import ModelJudge, as_tensor, evaluate_images, spread
from training.run import RunFolder
from training.setup import open_run_source
from training.stream import HeldOut

pytest.importorskip("torchmetrics")
ALL = ("fid", "kid", "precision-recall", "clip-score", "cmmd")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Networks, pictures to score, and others to hold them against."""
    root = tmp_path_factory.mktemp("quality")
    save_clip(root / "clip")
    save_dino(root / "dino")
    save_pictures(root / "made", 12, seed=1)
    save_pictures(root / "real", 15)
    return root


def config(place, *names, **changes):
    own = dict(features=str(place / "dino"), clip=str(place / "clip"), reference=str(place / "real"), batch_size=5)
    return EvaluationConfig(metrics=names, **{**own, "cache": str(place / "cache"), **changes})


def test_a_folder_has_the_scores_of_the_libraries_called_by_hand(place):
    """torchmetrics with the networks themselves, on the pictures themselves."""
    from torchmetrics.functional.multimodal import clip_score
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance
    from transformers import CLIPModel, CLIPProcessor

    scores = evaluate_images(str(place / "made"), config(place, *ALL))
    made, real, network = pictures(place / "made"), pictures(place / "real"), open_features(str(place / "dino"))
    by_hand = FrechetInceptionDistance(network), KernelInceptionDistance(network, subset_size=12)
    for metric in by_hand:
        metric.update(real, real=True)
        metric.update(made, real=False)
    assert scores["fid"] == pytest.approx(by_hand[0].compute().item(), rel=1e-3)
    torch.manual_seed(0)
    mean, deviation = by_hand[1].compute()
    assert (scores["kid"], scores["kid_deviation"]) == pytest.approx((mean.item(), deviation.item()), rel=1e-3)

    class Plain(CLIPModel):
        """As transformers 4 gives embeddings, which torchmetrics takes."""

        def get_image_features(self, *args, **kwargs):
            out = super().get_image_features(*args, **kwargs)
            return getattr(out, "pooler_output", out)

        def get_text_features(self, *args, **kwargs):
            out = super().get_text_features(*args, **kwargs)
            return getattr(out, "pooler_output", out)

    parts = Plain.from_pretrained(place / "clip").eval(), CLIPProcessor.from_pretrained(place / "clip")
    captions = [path.read_text() for path in sorted((place / "made").glob("*.txt"))]
    with torch.no_grad():
        expected = clip_score(list(made), captions, model_name_or_path=lambda: parts)
    assert scores["clip_score"] == pytest.approx(expected.item(), abs=1e-3)

    clip = open_clip_model(str(place / "clip"))
    x, y = (z / z.norm(dim=1, keepdim=True) for z in (clip(real).double(), clip(made).double()))
    kernel = [torch.exp(-torch.cdist(a, b).square() / 200).mean().item() for a, b in ((x, x), (y, y), (x, y))]
    assert scores["cmmd"] == pytest.approx(1000 * (kernel[0] + kernel[1] - 2 * kernel[2]), rel=1e-4)
    assert 0 <= scores["precision"] <= 1 and 0 <= scores["recall"] <= 1
    assert (scores["num_images"], scores["num_reference"], scores["kid_subset"]) == (12, 15, 12)
    assert scores["features_network"].startswith("dinov2 ") and scores["clip_network"].startswith("clip ")


def test_pictures_held_against_themselves_are_perfect(place):
    scores = evaluate_images(str(place / "real"), config(place, "fid", "precision-recall", "cmmd"))
    assert scores["fid"] == pytest.approx(0, abs=1e-3) and scores["cmmd"] == pytest.approx(0, abs=1e-6)
    assert (scores["precision"], scores["recall"]) == (1, 1)


def test_only_what_is_asked_for_is_scored_and_needed(place):
    alone = evaluate_images(str(place / "made"), config(place, "clip-score", features=None, reference=None))
    assert alone.keys() == {"clip_score", "num_images", "clip_network"}
    some = evaluate_images(str(place / "made"), config(place, "fid", clip=None, num_reference=7), num_images=6)
    assert (some["num_images"], some["num_reference"]) == (6, 7) and "clip_network" not in some


def test_a_part_is_evenly_spread():
    assert spread(10, None).tolist() == spread(10, 99).tolist() == list(range(10))
    assert spread(10, 4).tolist() == [0, 2, 5, 7] and spread(3, 3).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("names", "changes", "message"),
    [
        ((), {}, "which scores"),
        (("fid",), {"features": "nowhere"}, "no weights at nowhere"),
        (("cmmd",), {"clip": "nowhere"}, "no weights at nowhere"),
        (("kid",), {"reference": None}, "name those by evaluation.reference"),
        (("fid",), {"reference": "nowhere"}, "there is no folder or file nowhere"),
    ],
)
def test_what_is_missing_is_named(place, names, changes, message):
    with pytest.raises(ValueError, match=message):
        evaluate_images(str(place / "made"), config(place, *names, **changes))


def test_pictures_without_captions_have_no_clip_score(place, tmp_path):
    save_pictures(tmp_path / "bare", 4, captions=False)
    with pytest.raises(ValueError, match="clip-score needs a caption for each picture"):
        evaluate_images(str(tmp_path / "bare"), config(place, "clip-score"))
    assert evaluate_images(str(tmp_path / "bare"), config(place, "cmmd"))["num_images"] == 4


@pytest.mark.parametrize("name", ["fid", "clip-score"])
def test_pictures_of_which_none_can_be_read_have_no_scores(name, place, tmp_path):
    for path in save_pictures(tmp_path / "cut", 3).glob("*.png"):
        path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(ValueError, match="none of the pictures can be read"):
        evaluate_images(str(tmp_path / "cut"), config(place, name))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (['evaluation.metrics=["fid"]'], r"fid needs a network: name it by evaluation.features \(.*--features\)"),
        (['evaluation.metrics=["clip-score"]'], "name it by evaluation.clip"),
        (['evaluation.metrics=["fdi"]'], 'did you mean "fid"'),
        (["evaluation.metrics_every=10"], "evaluation.metrics names none"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        load_config("demo", settings)


# --- of a run ---------------------------------------------------------------------------------------------------------


def scored(place, *names):
    paths = {"features": place / "dino", "clip": place / "clip", "cache": place / "cache"}
    return [
        f"evaluation.metrics={list(names)}".replace("'", '"'),
        "evaluation.num_images=8",
        *(f"evaluation.{name}={path}" for name, path in paths.items()),
    ]


@pytest.fixture(scope="module")
def run(place, tmp_path_factory):
    """Trained with scores on the way and at the end."""
    out = tmp_path_factory.mktemp("runs") / "run"
    return training.train(config_for(out, *scored(place, *ALL), "evaluation.metrics_every=3"))


def test_a_run_scores_itself_on_the_way_and_at_the_end(run):
    for name in ("fid", "kid", "precision", "recall", "clip_score", "cmmd"):
        assert [step for step, _ in metrics(run, name)] == [3, 6]
    scores = json.loads((run / "scores.json").read_text())["quality"]
    assert scores["num_images"] == 8 and scores["num_reference"] == 64
    assert dict(metrics(run, "fid"))[6] == scores["fid"] != dict(metrics(run, "fid"))[3]
    assert "step 6: fid " in (run / "log.txt").read_text()


def test_a_run_that_had_ended_is_scored_again_in_the_place_of_its_scores(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "copy")
    training.resume(copy, ["evaluation.num_images=6"])
    found = [row for row in RunFolder(copy).metrics() if "fid" in row]
    assert [row["step"] for row in found] == [3, 6]
    assert found[1]["fid"] == json.loads((copy / "scores.json").read_text())["quality"]["fid"]
    without = [[row for row in RunFolder(path).metrics() if "fid" not in row] for path in (run, copy)]
    assert without[0] == without[1]


def test_a_runs_index_of_its_data_is_not_made_again_to_score_it(place, tmp_path, monkeypatch):
    shards_of(tmp_path / "data", (12, 12), ((16, 16),))
    data = (f"data.source={tmp_path / 'data'}", "data.image_size=16", "data.num_samples=none", "data.held_out=0.4")
    run = training.train(config_for(tmp_path / "run", *data, *scored(place, "fid"), "training.num_steps=1"))
    monkeypatch.setattr("training.sources.Index._read", None)
    assert "fid" in training.evaluate_run(run)["quality"]


def test_the_scores_are_of_the_models_pictures_of_held_out_captions(run, place):
    """Drawn by hand: picture i of the held-out captions in turn, from the noise of seed + i."""
    from training.data import open_source
    from training.metrics import fid

    pipe, network = mmdit.TextToImage.load(run, "cpu"), open_features(str(place / "dino"))
    source = open_source("shapes", 32, 8, 64, 0)
    held_out = [source.caption(i) for i in split_by_key(source, 0.125)[1]]
    captions = [held_out[i % len(held_out)] for i in range(8)]
    made = network(as_tensor(pipe(captions, seed=0)))
    real = network(torch.from_numpy(np.stack([source[i].image for i in range(64)])).permute(0, 3, 1, 2))
    expected = json.loads((run / "scores.json").read_text())["quality"]["fid"]
    assert fid(real, made) == pytest.approx(expected, rel=1e-3)


def test_pictures_come_batch_after_batch_and_each_score_begins_anew(run, place, tmp_path, monkeypatch):
    pipe = mmdit.TextToImage.load(run, "cpu")
    own = config_for(tmp_path, *scored(place, "clip-score"), "evaluation.batch_size=3")
    judge, given = ModelJudge(own, pipe), []
    source = open_run_source(own, 8)
    captions = [source.caption(int(i)) for i in split_by_key(source, own.data.held_out)[1]]
    assert judge.captions == captions
    add = judge.judge.add
    monkeypatch.setattr(judge.judge, "add", lambda *some: given.append(some) or add(*some))
    assert judge(pipe) == judge(pipe)
    prompts = [captions[i % len(captions)] for i in range(8)]
    assert [caption for _, some in given for caption in some] == 2 * prompts
    drawn, at_once = torch.cat([images for images, _ in given[:3]]), as_tensor(pipe(prompts, seed=0))
    assert (drawn.int() - at_once.int()).abs().max() <= 1


def test_a_reference_with_captions_says_what_is_drawn(run, place):
    given = {"metrics": ("fid", "clip-score"), "reference": str(place / "real"), "num_images": 4}
    one = training.evaluate_run(run, given)["quality"]
    assert one["num_reference"] == 15 and one["num_images"] == 4
    other = training.evaluate_run(run, given | {"metrics": ("clip-score",)})["quality"]
    assert other["clip_score"] == one["clip_score"] and "fid" not in other
    own = training.evaluate_run(run, {"num_images": 4, "metrics": ("clip-score",)})["quality"]
    with pytest.raises(ValueError, match="evaluation.num_images is for scores by networks: name some with --metrics"):
        training.evaluate_run(run, {"num_images": 4, "metrics": ()})
    assert own["clip_score"] != one["clip_score"]


def test_scores_on_the_way_change_nothing_of_the_training(run, tmp_path):
    assert_bit_equal(run, training.train(config_for(tmp_path / "plain")))


@pytest.mark.parametrize("kind", ["a stream", "a cache of latents"])
def test_data_without_pictures_to_hold_against_stops_a_run_before_it_begins(place, tmp_path, kind):
    source = "hf-stream:anything"
    if kind != "a stream":
        source = str(tmp_path / "cache")
        assert write_cache(load_config("pixels-tiny", ["data.num_samples=8"]), source, log=lambda line: None).samples
    how = (f"data.source={source}", "data.cache_latents=false", *scored(place, "clip-score", "fid"))
    with pytest.raises(ValueError, match=f"fid holds .* data.source is {kind}: name pictures by evaluation.reference"):
        training.train(config_for(tmp_path / "run", *how))
    assert not (tmp_path / "run").exists()


def test_what_the_filters_leave_out_is_held_against_nothing(run, place, tmp_path):
    save_pictures(tmp_path / "data", 9)
    save_pictures(tmp_path / "data" / "small", 4, size=16)
    own = config_for(tmp_path, f"data.source={tmp_path / 'data'}", *scored(place, "fid"), "data.num_samples=none")
    pipe = mmdit.TextToImage.load(run, "cpu")
    for least, count in ((0, 13), (20, 9)):
        data = replace(own.data, min_side=least, buckets=True)
        judge = ModelJudge(replace(own, data=data), pipe).judge
        assert len(judge.reference) == count and judge.reference.image_size == pipe.size


def test_the_captions_of_a_stream_are_its_held_out_ones(run, place, tmp_path):
    pytest.importorskip("datasets")
    parquet_of(tmp_path / "a.parquet", range(40))
    how = (f"data.source=hf-stream:{tmp_path}", "data.cache_latents=false", "data.num_samples=none")
    own = config_for(tmp_path, *how, "data.held_out=0.3", *scored(place, "clip-score"))
    judge = ModelJudge(own, mmdit.TextToImage.load(run, "cpu"))
    held_out = HeldOut(open_run_source(own, 8), 0.3, own.evaluation.validation_samples)
    assert judge.captions == [row.captions[0] for row in held_out.rows] and len(judge.captions) > 3


def test_weights_that_are_not_there_stop_a_run_before_it_begins(tmp_path):
    with pytest.raises(ValueError, match="no weights at nowhere"):
        training.train(config_for(tmp_path / "run", 'evaluation.metrics=["fid"]', "evaluation.features=nowhere"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "few", "message"),
    [
        ("precision-recall", "num_images=3", "num_images is 3: precision-recall needs at least 4 pictures"),
        ("fid", "num_reference=1", "num_reference is 1: fid needs at least 2 pictures"),
    ],
)
def test_too_few_pictures_for_a_score_stop_a_run_before_it_begins(place, tmp_path, name, few, message):
    with pytest.raises(ValueError, match=message):
        training.train(config_for(tmp_path / "run", *scored(place, name), f"evaluation.{few}"))
    assert not (tmp_path / "run").exists()


# --- the command line -------------------------------------------------------------------------------------------------


def call(*words, status=0):
    result = CliRunner().invoke(app, ["evaluate", *map(str, words)])
    assert result.exit_code == status, result.output + result.stderr
    return result.output if status == 0 else result.stderr


def test_the_command_scores_a_folder(place, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    how = ("--features", place / "dino", "--reference", place / "real")
    out = call("--images", place / "made", "--metrics", "fid,kid", *how, "--out", tmp_path / "scores.json")
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert f"fid               {scores['fid']:.4f}" in out and scores["num_images"] == 12
    assert scores["fid"] == pytest.approx(evaluate_images(str(place / "made"), config(place, "fid"))["fid"])
    assert len(list((tmp_path / "cache" / "mmdit" / "references").iterdir())) == 1
    few = call("--images", place / "made", "--metrics", "fid", *how, "--num-images", 4, "--num-reference", 5)
    assert "num_images        4" in few and "num_reference     5" in few


def test_the_command_scores_a_run(run, place):
    out = call(run, "--metrics", "clip-score", "--num-images", 3)
    assert "quality / num_images" in out and "quality / clip_score" in out and "validation_loss" in out
    assert RunFolder(run).config().evaluation.metrics == ALL, "the run's own settings stay"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name a run (mmdit evaluate RUN), or pictures with --images FOLDER"),
        (["run", "--images", "x"], "name a run (mmdit evaluate RUN), or pictures"),
        (["--images", "x", "--steps", "4"], "--steps is for a run"),
        (["run", "--checkpoint", "4", "--weights", "x"], "give one of them"),
        (["--images", "x"], "which scores? name some: fid"),
        (["--images", "x", "--metrics", "fid"], "--features"),
        (
            ["--images", "x", "--metrics", "psnr", "--features", "y"],
            'evaluation.metrics[0] is "psnr", expected one of "fid"',
        ),
        (["--images", "x", "--metrics", "fid", "--features", "y"], "no weights at y"),
    ],
)
def test_what_the_command_lacks_is_one_line(words, message):
    stderr = call(*words, status=2)
    assert message in stderr and stderr.count("\n") == 1
