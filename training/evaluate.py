"""Evaluating a model: the validation loss at fixed times, and ShapesEval's six questions for the drawn world.

SD3 (arXiv 2403.03206, section 5.1) found the validation loss at evenly spaced times to correlate with human preference.
"""

from __future__ import annotations

import errno
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

import samplers
from mmdit.generate import TextSampling
from mmdit.text_and_images import TransfusionPipeline
from mmdit.text_to_image import TextToImage
from mmdit.weights_io import read_json, write_json
from training.cached import latent_feed
from training.checkpoint import list_checkpoints
from training.config import TrainConfig, apply_overrides
from training.corpus import Corpus, Pieces
from training.data import Data, is_shapes
from training.devices import available, pick_device
from training.errors import named
from training.feed import Encoding, NothingUsable, RowFeed, chunks_of
from training.objectives import FlowMatching, TextAndImages, documents, next_token_loss, seeds_for
from training.plots import caption_grid, loss_plot
from training.progress import drawing
from training.quality import ModelJudge, check_metrics, with_evaluation
from training.run import RunFolder
from training.seeds import generator_for
from training.setup import grid_prompts, held_out_pieces, held_out_samples, open_run_source
from training.shapes import ShapesWorld
from training.shapes_eval import ShapesEval, describes
from training.time_density import Uniform

GRID = 32  # pictures in samples.png
MOST_SIZES = 50  # most image sizes that get a validation loss of their own


def fixed_times(n: int) -> list[float]:
    """n evenly spaced times in (0, 1): the middles of n equal intervals."""
    return [(2 * i + 1) / (2 * n) for i in range(n)]


@torch.no_grad()
def validation_loss(model: nn.Module, feed: RowFeed, config: TrainConfig) -> dict[str, float]:
    """Mean squared error of the velocity over held-out samples, at each fixed time, and the mean over times.

    Each sample has its own noise. Where there are several image sizes, but no more than MOST_SIZES, each also gets its
    loss. For a model of text and images also the nats per token of captions alone ("validation_text"), and of captions
    after their clean image ("validation_caption").
    """
    times, size = fixed_times(config.evaluation.validation_times), config.evaluation.batch_size
    objective: Any = TextAndImages(Uniform()) if config.transfusion.enabled else FlowMatching(Uniform())
    sums = dict.fromkeys(times, 0.0)
    text_losses = ("validation_text", "validation_caption") if config.transfusion.enabled else ()
    nats: dict[str, list[tuple[float, int]]] = {name: [] for name in text_losses}
    by_size: dict[str, list[tuple[float, int]]] = {}
    seeds = seeds_for(len(feed), generator_for(config.evaluation.seed))
    for rows in chunks_of(feed, size):
        batch, own_seeds = feed.at(rows), seeds[rows.start : rows.stop]
        for t in times:  # with the same noise at every time, for a smooth curve over t
            loss = objective(model, batch, own_seeds, t)
            error = loss.parts.get("image", loss.total).item()
            sums[t] += error * len(batch.latents)
            for row, own in zip(rows, loss.errors.tolist(), strict=True):
                height, width = feed.layout.sizes[feed.layout.bucket_of(row)]
                by_size.setdefault(f"{height}x{width}", []).append((own, 1))
        for name in nats:
            image_first = torch.full((len(batch.latents),), name == "validation_caption")
            captions = documents(batch, image_first, pack=model.pack)  # type: ignore[arg-type]
            loss = objective(model, captions, own_seeds, 0.0)
            nats[name].append((loss.parts["text"].item(), len(captions.predicting)))
    losses = {f"validation_loss_t{t:.4f}": total / len(feed) for t, total in sums.items()}
    text = {name: _mean(rows) for name, rows in nats.items()}
    sizes = {f"validation_loss_{name}": _mean(rows) for name, rows in by_size.items()}
    sizes = sizes if 1 < len(sizes) <= MOST_SIZES else {}
    return {"validation_loss": float(np.mean(list(losses.values()))), **losses, **sizes, **text}


def _mean(rows: list[tuple[float, int]]) -> float:
    """The mean of (value, weight) pairs."""
    return sum(x * n for x, n in rows) / sum(n for _, n in rows)


@torch.no_grad()
def corpus_loss(model: nn.Module, text: Pieces, config: TrainConfig) -> dict[str, float]:
    """Nats per token of held-out text without pictures ("validation_corpus"), a mean over all its tokens."""
    total, count = 0.0, 0
    for first in range(0, len(text), config.evaluation.batch_size):
        ids, mask = text.at(range(first, min(first + config.evaluation.batch_size, len(text))))
        batch = model.pack([[row[real]] for row, real in zip(ids, mask, strict=True)])  # type: ignore[operator]
        out = model(batch)
        total += next_token_loss(out.states, out.head, batch).item() * len(batch.predicting)
        count += len(batch.predicting)
    return {"validation_corpus": total / count}


def _pieces_to_score(
    run: RunFolder, config: TrainConfig, corpus: Corpus, given: bool, pipe: TextToImage
) -> Pieces | None:
    """All of a given text that is not the run's own; of its own what is held out, None where that is nothing."""
    tokenizer, device = pipe.model.conditioner.tokenizer, pipe.model.transformer.device
    checkpoints = list_checkpoints(run.path)
    own = read_json(checkpoints[-1] / "state.json").get("text") if given and checkpoints else None
    if given and own != corpus.digest:
        return Pieces(corpus, tokenizer, config.transfusion.text_length, device)
    return held_out_pieces(config, corpus, tokenizer, device)


def held_out_feed(config: TrainConfig, pipe: TextToImage, data: Data) -> RowFeed | None:
    """The held-out samples of a run's data, encoded; None where there are none, or none can be read."""
    source, held_out = held_out_samples(config, data)
    held_out, device = held_out[: config.evaluation.validation_samples], pipe.model.transformer.device
    with suppress(NothingUsable):
        return latent_feed(source, held_out, Encoding(pipe.autoencoder, pipe.model.conditioner, device))
    return None


def caption_score(pipe: TransfusionPipeline, config: TrainConfig) -> float:
    """Share of pictures of held-out captions that the model, decoding greedily, describes correctly (`describes`)."""
    world = ShapesWorld(pipe.size, config.evaluation.seed, split="held-out")
    samples = [world[i] for i in range(6 * config.evaluation.prompts_per_question)]
    right = 0
    for first in range(0, len(samples), config.evaluation.batch_size):
        some = samples[first : first + config.evaluation.batch_size]
        prompts = [[Image.fromarray(image)] for image, _, _ in some]
        how: dict[str, Any] = dict(max_tokens=config.text.max_length, max_images=0, text=TextSampling(temperature=0))
        for written, (_, _, scene) in zip(pipe.generate(prompts, **how), some, strict=True):
            right += describes(" ".join(str(part) for part in written.parts), scene)
    return right / len(samples)


def _draw(
    pipe: TextToImage, config: TrainConfig, prompts: list[str], progress: bool
) -> tuple[dict[str, Any], list[Image.Image], list[str]]:
    """(scores of drawn pictures, GRID pictures, their captions): ShapesEval's in the drawn world, else the prompts'."""
    counted: list[int] = []  # network evaluations of a picture; a guided one is two

    def count(step: samplers.Progress) -> None:
        counted.append(step.num_evals)

    if not (is_shapes(config.data.source) and config.evaluation.prompts_per_question):
        prompts = (prompts * GRID)[:GRID]
        with drawing(len(prompts), progress, count) as callback:
            images = pipe(prompts, seed=config.sampling.seed, callback=callback)
        return {"network_evaluations": counted[-1]}, images, prompts
    evaluation = config.evaluation
    judge = ShapesEval(pipe.size, evaluation.prompts_per_question, evaluation.seed)
    captions = [prompt.caption for prompt in judge.prompts]
    start = time.perf_counter()
    with drawing(len(captions), progress, count) as callback:
        images = pipe(captions, seed=evaluation.seed, batch_size=evaluation.batch_size, callback=callback)
    scores: dict[str, Any] = {"shapes_eval": judge.score([np.asarray(image) for image in images])}
    scores["seconds_per_image"] = (time.perf_counter() - start) / len(images)
    if isinstance(pipe, TransfusionPipeline):
        scores["captions_right"] = caption_score(pipe, config)
    scores["network_evaluations"] = counted[-1]
    pick = np.linspace(0, len(images) - 1, GRID).astype(int)  # some of each question
    return scores, [images[i] for i in pick], [captions[i] for i in pick]


def _load(run: RunFolder, config: TrainConfig, device: str | None) -> TextToImage:
    """A run's own model, on this device; by default on the one it was trained on, if that is there."""
    asked = config.training.device
    if device is None and asked != "auto" and available(asked):  # a run on a GPU is scored anywhere
        device = asked
    return TextToImage.load(run.path, None if device is None else pick_device(device))


def evaluate_run(
    path: str | Path,
    evaluation: dict[str, Any] | None = None,
    data: str | None = None,
    progress: bool = False,
    pipe: TextToImage | None = None,
    out: str | Path | None = None,
    text: str | None = None,
    device: str | None = None,
    **sampling: Any,
) -> dict[str, Any]:
    """Score a run folder's model; writes scores.json, samples.png and loss.png there and returns the scores.

    evaluation: settings that replace the run's [evaluation]; sampling: its solver, num_steps or guidance. data: where
    the run's samples are, if they were moved; of other data, the samples that the same rule holds out are scored.
    progress: show on standard error how many pictures are drawn. pipe: score this model with the run's data and
    settings, another average or checkpoint for example, instead of the run's own; its scores are not written into the
    run. out: a JSON file to write the scores to, instead of the run. text: a file, a folder or a glob of text to score
    instead of the run's, all of it; of the run's own text, if it was moved, what is held out; these scores are not
    written into the run either. device: where the run's own model computes; None is its training.device, if that is
    there. Raises FileNotFoundError where the folder is not a run, PermissionError where it cannot be written,
    ValueError where the device or a network for evaluation.metrics is missing.
    """
    run = RunFolder.open(path)
    if not os.access(run.path, os.W_OK):
        raise PermissionError(errno.EACCES, "scores cannot be written here", str(run.path))
    config = run.config() if data is None else apply_overrides(run.config(), [f"data.source={data}"])
    config = with_evaluation(config, evaluation or {})
    if text is not None and not config.transfusion.enabled:
        raise ValueError(f"{path} is a model of images alone, which has no likelihood of a text")
    check_metrics(config.evaluation)
    own = pipe is None and out is None and text is None
    if pipe is None:
        pipe = _load(run, config, device)
    elif isinstance(pipe, TransfusionPipeline) != config.transfusion.enabled:
        raise ValueError(f"{path} and the model to score differ: one is of text and images, the other of images alone")
    pipe.sampling |= {name: value for name, value in sampling.items() if value is not None}
    scores: dict[str, Any] = {"sampling": dict(pipe.sampling)}
    feed = held_out_feed(config, pipe, source := open_run_source(config, pipe.step, run.index))
    if feed is not None:
        scores |= validation_loss(pipe.model, feed, config)
    if (words := text or config.transfusion.text) is not None:
        pieces = _pieces_to_score(run, config, Corpus(words), text is not None, pipe)
        scores |= corpus_loss(pipe.model, pieces, config) if pieces is not None else {}
    drawn, images, prompts = _draw(pipe, config, grid_prompts(config, source, feed), progress)
    scores |= drawn
    if config.evaluation.metrics:
        scores["quality"] = ModelJudge(config, pipe, run)(pipe, progress)
    if own:
        with named(run.path / "samples.png"):
            caption_grid(images, prompts).save(run.path / "samples.png")
        with named(run.path / "loss.png"):
            loss_plot(run, run.path / "loss.png")
    if own or out is not None:
        write_json(Path(out or run.path / "scores.json"), scores)
    return scores
