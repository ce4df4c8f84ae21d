"""The trainer: one loop, one run folder, and a resume that continues bit for bit.

    batch number k -> objective -> gradients -> clip -> AdamW -> EMA -> (metrics, validation, samples, checkpoint)

Every draw of step k (order, times, noise, dropped captions) is a function of (seed, k), so a run that was stopped and
resumed computes what the uninterrupted one would have.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch

from mmdit.attention import attention_backend, why_not
from mmdit.autoencoder import open_autoencoder
from mmdit.text_and_images import TransfusionPipeline
from mmdit.text_to_image import TextToImage
from mmdit.weights_io import assign_weights
from training.boards import open_board
from training.cached import CachedFeed
from training.checkpoint import (
    list_checkpoints,
    load_latest,
    load_optimizer_tensors,
    optimizer_tensors,
    save_checkpoint,
)
from training.config import TrainConfig, apply_overrides
from training.corpus import Pieces
from training.devices import pick_device, pick_precision, repeatable
from training.ema import make_average, remove_snapshots
from training.evaluate import corpus_loss, evaluate_run, validation_loss
from training.feed import ImageFeed, LatentFeed, WithText
from training.interrupts import Interrupted, Interrupts
from training.objectives import make_objective
from training.optim import learning_rate, make_optimizer, set_rate
from training.plots import caption_grid
from training.progress import Progress
from training.quality import ModelJudge, check_metrics
from training.run import RunFolder
from training.seeds import generator_for
from training.setup import build_model, fingerprint, open_corpus, open_data, open_feeds, open_pieces
from training.telemetry import Profiler, Telemetry

GRID = 16  # pictures in the grids during training
COMPILE_MIN_STEPS = 1000  # "auto" compiles runs at least this long: compiling takes about as long as 150 steps on a CPU

# What a resumed run keeps; of data.source it keeps the samples, wherever they are now.
KEPT = (
    "model",
    "text",
    "transfusion",
    "lora",
    "autoencoder",
    "seed",
    "data.num_samples",
    "data.image_size",
    "data.held_out",
    "optimizer.name",
    "optimizer.base_width",
    "training.ema",
    "training.ema_sigma_rel",
    "data.buckets",
    "data.bucket_ratio",
    "data.captions",
    "data.shuffle_buffer",
)


def train(config: TrainConfig, resume: bool = False) -> Path:
    """Train a model as `config` says, from scratch, or continue the run in its folder; returns the run folder.

    An interrupt (Ctrl-C, SIGTERM) saves a checkpoint and returns; before the first step there is nothing to save, and
    the folder of a new run is removed. Raises ValueError for settings and data that do not work, FileExistsError where
    the run folder is taken.
    """
    if resume:
        return _continue(RunFolder.open(config.run_folder), config)
    with Interrupts() as interrupts:
        run = RunFolder.create(config.run_folder, config)
        try:
            Trainer(config, run).fit(interrupts)
        except BaseException as error:
            if list_checkpoints(run.path) or run.metrics():
                raise
            shutil.rmtree(run.path)  # nothing was trained: leave the name free
            if not isinstance(error, Interrupted):
                raise
            print(f"stopped before the first step: nothing had been trained yet, {run.path} is removed", flush=True)
    return run.path


def resume(path: str | Path, overrides: Sequence[str] = ()) -> Path:
    """Continue the run in a folder from its newest whole checkpoint, to the same bits as if it had never stopped.

    `overrides`: changed settings, such as "training.num_steps=20000". Raises ValueError where the model, the text
    encoder or the samples are others, FileNotFoundError where there is no run or no checkpoint.
    """
    run = RunFolder.open(path)
    return _continue(run, apply_overrides(run.config(), overrides))


def _continue(run: RunFolder, config: TrainConfig) -> Path:
    old = run.config()
    for key in KEPT:
        if attrgetter(key)(config) != attrgetter(key)(old):
            raise _other(run, key, attrgetter(key)(old), attrgetter(key)(config))
    with Interrupts() as interrupts:
        try:
            Trainer(config, run, resumed=True).fit(interrupts)
        except Interrupted:
            run.log(f"stopped before the first step, nothing is lost; go on with: mmdit train --resume {run.path}")
    return run.path


def _other(run: RunFolder, key: str, old: Any, new: Any) -> ValueError:
    return ValueError(
        f"{run.path} was trained with another {key}: {old}, not {new}; "
        "a resumed run keeps it, train afresh into another folder to change it"
    )


class Trainer:
    """All that one training run holds: data, model, average, optimiser, and the step it has reached."""

    def __init__(self, config: TrainConfig, run: RunFolder, resumed: bool = False) -> None:
        self.config, self.run, self.step = config, run, 0
        self.device = pick_device(config.training.device)
        self.precision = pick_precision(config.training.precision, self.device)
        if why := why_not(config.training.attention, self.device):
            raise ValueError(why)
        self._losses: list[torch.Tensor] = []  # of the steps since the last line of metrics
        run.board = open_board(config, run)
        check_metrics(config.evaluation)
        self._judge: ModelJudge | None = None
        torch.manual_seed(config.seed)
        own = run.path / "pipeline" / "autoencoder"  # a resumed run has its own, whatever became of the folder named
        self.autoencoder = open_autoencoder(own if resumed and own.exists() else config.autoencoder).to(self.device)
        source = open_data(config, run, self.autoencoder.factor)
        corpus = open_corpus(config, run)
        self.samples, self.text = fingerprint(source), corpus and corpus.digest
        self.model = build_model(config, run, source, self.autoencoder, resumed, corpus).to(self.device)
        run.log(f"computing on {self.device} in {str(self.precision).removeprefix('torch.')}")
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.optimizer = make_optimizer(self.model, config.optimizer)
        self.average = make_average(self.ema, self.model, self.optimizer, config.training)
        self.rate = learning_rate(config.optimizer, config.training.num_steps)
        self.objective = make_objective(config)
        self.telemetry = Telemetry(config, self.model, self.device, self.precision, run.log)
        self.pipe = (TransfusionPipeline if config.transfusion.enabled else TextToImage)(
            self.ema, self.autoencoder, source.image_size, config.objective.shift, self._sampling_defaults()
        )
        if resumed:
            self._load()
        self.feed: ImageFeed | LatentFeed | CachedFeed | WithText
        self.feed, self.validation = open_feeds(
            config, run, source, self.autoencoder, self.model.conditioner, self.device
        )
        self.held_out_text: Pieces | None = None
        if corpus is not None:
            words: Any = self.model.conditioner.tokenizer
            pieces, self.held_out_text = open_pieces(config, run, corpus, words, self.device)
            self.feed = WithText(self.feed, pieces, config.text_documents)
        if resumed:  # only now, when nothing can fail any more, is anything of the run replaced
            self.pipe.save_defaults(run.path / "pipeline")
            run.write_config(config)
            run.rewind_metrics(self.step)
            remove_snapshots(run.path, self.step)
        else:
            self.pipe.save(run.path / "pipeline")

    def _sampling_defaults(self) -> dict[str, Any]:
        s = self.config.sampling
        return {"solver": s.solver, "num_steps": s.num_steps, "guidance": s.guidance, "interval": list(s.interval)}

    # --- the loop -------------------------------------------------------------------------------------------------

    def fit(self, interrupts: Interrupts) -> None:
        """Train to the last step, then score; on an interrupt save and return early."""
        config, run = self.config.training, self.run
        pictures = config.batch_size - self.config.text_documents
        batches = self.feed.batches(config.batch_size, self.config.seed, self.step)
        model = compiled(self.model, self.config, self.device, run.log)
        profiler = Profiler(config.profiled, run.path / "profile", run.log)
        try:
            with (
                repeatable(self.device),
                attention_backend(config.attention),
                interrupts.deferred(),
                Progress("training", config.num_steps, self.step, pictures) as progress,
            ):
                while self.step < config.num_steps and not interrupts.caught:
                    profiler.before(self.step + 1)
                    loss, norm = self._train_step(model, self.telemetry.next(batches))
                    self._losses.append(loss)
                    self.step += 1
                    profiler.after(self.step)
                    self._report(progress, norm)
        finally:
            profiler.close()
            batches.close()  # type: ignore[attr-defined]
            run.close()
        if interrupts.caught:
            self._checkpoint()
            run.log(f"stopped at step {self.step}, all saved; go on with: mmdit train --resume {run.path}")
            return
        try:
            self._finish()
        except Interrupted:
            run.log(f"stopped before the scores; all is trained and saved, score it with: mmdit evaluate {run.path}")

    def _train_step(self, model: torch.nn.Module, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        parts = self.config.training.grad_accumulation
        total = torch.zeros((), device=self.device)
        for i, part in enumerate(batch.split(parts)):
            with torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32):
                loss = self.objective(model, part, generator_for(self.config.seed, self.step, i))
            (loss.total / parts).backward()
            total += loss.total.detach() / parts
            self.telemetry.add(loss)
        if self._due(self.config.training.log_every, self.step + 1):
            self.telemetry.gradients(self.model)
        clip = self.config.optimizer.grad_clip
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), clip if clip else float("inf"))
        set_rate(self.optimizer, self.rate(self.step))
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.update(self.model, self.step)
        return total, norm

    def _due(self, every: int, step: int | None = None) -> bool:
        step = self.step if step is None else step
        return step == self.config.training.num_steps or bool(every and step % every == 0)

    def _report(self, progress: Progress, norm: torch.Tensor) -> None:
        """What is shown and written at this step: metrics, validation, pictures, a checkpoint."""
        config = self.config.training
        if self._due(config.log_every):
            loss = torch.stack(self._losses).mean().item()
            self._losses.clear()
            progress.show(self.step, loss=loss)
            rates = {"lr": self.rate(self.step - 1), "images_per_second": progress.images_per_second}
            self.run.write_metrics(self.step, loss=loss, grad_norm=float(norm), **rates, **self.telemetry.line())
        else:
            progress.show(self.step)
        if self._due(config.validate_every):
            self._validate(progress)
        if config.sample_every and self.step % config.sample_every == 0:
            self._sample()
        if self._due(config.ema_snapshot_every):
            self.average.snapshot(self.run.path, self.step)
        every = self.config.evaluation.metrics_every
        if every and self.step % every == 0 and self.step < config.num_steps:  # the last is scored when all is done
            self._judge = self._judge or ModelJudge(self.config, self.pipe, self.run.log)
            self._write_quality(self._judge(self.pipe))
        if self._due(config.checkpoint_every):
            self._checkpoint()

    def _validate(self, progress: Progress) -> None:
        if self.held_out_text is not None:
            self.run.write_metrics(self.step, **corpus_loss(self.ema, self.held_out_text, self.config))
        if self.validation is not None:
            losses = validation_loss(self.ema, self.validation, self.config)
            self.run.write_metrics(self.step, **losses)
            progress.note(f"step {self.step}: validation loss {losses['validation_loss']:.4f}")

    def _sample(self) -> None:
        prompts = list(self.config.sampling.prompts) or (self.validation.captions if self.validation else [""])
        prompts = (prompts * GRID)[:GRID]
        images = self.pipe(prompts, seed=self.config.sampling.seed)
        folder = self.run.path / "samples"
        folder.mkdir(exist_ok=True)
        caption_grid(images, prompts).save(folder / f"step-{self.step:08d}.png")

    def _write_quality(self, scores: dict[str, Any]) -> None:
        self.run.write_metrics(self.step, **{name: x for name, x in scores.items() if isinstance(x, float)})
        shown = "  ".join(f"{name} {x:.4g}" for name, x in scores.items() if isinstance(x, float))
        self.run.log(f"step {self.step}: {shown} ({scores['num_images']} pictures)")

    def _finish(self) -> None:
        run = self.run
        scores = evaluate_run(run.path)
        if "quality" in scores:
            self._write_quality(scores["quality"])
            run.close()
        if "validation_loss" in scores:
            run.log(f"validation loss {scores['validation_loss']:.4f} (mean over fixed times)")
        for question, score in scores.get("shapes_eval", {}).items():
            run.log(f"  ShapesEval {question:20s} {score:.3f}")
        if "captions_right" in scores:
            run.log(f"  captions that name every object {scores['captions_right']:.3f}")
        run.log(
            f"done. Pictures: {run.path}/samples.png   loss: {run.path}/loss.png   scores: {run.path}/scores.json\n"
            f'Try: mmdit sample {run.path} "{_example(self.validation)}" --out out.png'
        )

    # --- checkpoints ----------------------------------------------------------------------------------------------

    def _checkpoint(self) -> None:
        weights = {
            "model": self.model.state_dict(),
            **self.average.tensors(),
            "optimizer": optimizer_tensors(self.optimizer, self.model),
        }
        losses = [loss.item() for loss in self._losses]
        state = {"step": self.step, "seed": self.config.seed, "samples": self.samples, "losses": losses}
        state |= {"telemetry": self.telemetry.state()}
        state |= {"text": self.text} if self.text else {}
        save_checkpoint(self.run.path, state, weights, self.config.training.keep_checkpoints)
        self.pipe.save_weights(self.run.path / "pipeline")

    def _load(self) -> None:
        state, weights = load_latest(self.run.path, self.run.log)
        if state["seed"] != self.config.seed:
            raise ValueError(f"the checkpoint was made with seed {state['seed']}, the config says {self.config.seed}")
        if state.get("samples", self.samples) != self.samples:
            old, new = self.run.config().data.source, self.config.data.source
            if new != old:
                raise _other(self.run, "data.source", old, new)
            self.run.log(f"warning: {new} has changed since it was trained on: the order of samples is another now")
        if state.get("text") != self.text:
            raise ValueError(
                f"{self.config.transfusion.text} has changed since {self.run.path} was trained on it: put the text "
                "back as it was, or train afresh into another folder"
            )
        assign_weights(self.model, weights["model"], str(self.run.path))
        self.average.load(weights, str(self.run.path))
        load_optimizer_tensors(self.optimizer, self.model, weights["optimizer"])
        self.step = state["step"]
        self._losses = [torch.tensor(loss, device=self.device) for loss in state["losses"]]
        if "telemetry" in state:
            self.telemetry.load(state["telemetry"])
        self.run.log(f"resumed at step {self.step}")


def compiled(model: Any, config: TrainConfig, device: torch.device, log: Callable[[str], None]) -> torch.nn.Module:
    """The model as it is trained: compiled where the config asks for it and the machine can."""
    asked = config.training
    wanted = asked.compile == "on" or (asked.compile == "auto" and asked.num_steps >= COMPILE_MIN_STEPS)
    if not wanted:
        return model
    if asked.compile == "auto" and device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        log("no C++ compiler found: the model runs uncompiled, a little slower")
        return model
    log("compiling the model (under a minute)")
    if config.transfusion.enabled or asked.packing:  # packed batches are of any length, and what packs is no graph
        for block in model.transformer.blocks:
            block.compile(dynamic=True)
        return model
    if config.text.encoder != "learned":  # what is frozen is no part of the graph
        model.transformer.compile()
        return model
    whole: Any = torch.compile(model)
    return whole


def _example(validation: LatentFeed | CachedFeed | None) -> str:
    return validation.captions[0] if validation is not None else "a caption like yours"
