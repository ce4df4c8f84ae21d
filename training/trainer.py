"""The trainer: one loop, one run folder, and a resume that continues bit for bit.

    batch number k -> objective -> gradients -> clip -> AdamW -> EMA -> (metrics, validation, samples, checkpoint)

Every draw of step k (order, times, noise, dropped captions) is a function of (seed, k), so a run that was stopped and
resumed computes what the uninterrupted one would have.
"""

from __future__ import annotations

import copy
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from mmdit.autoencoder import open_autoencoder
from mmdit.config import MMDiTConfig
from mmdit.model import MMDiT
from mmdit.text import LearnedText, TextConfig, Tokenizer
from mmdit.text_to_image import CaptionedMMDiT, TextToImage
from mmdit.weights_io import assign_weights
from training.checkpoint import (
    list_checkpoints,
    load_latest,
    load_optimizer_tensors,
    optimizer_tensors,
    save_checkpoint,
)
from training.config import TrainConfig, apply_overrides
from training.data import DataError, Source, open_source, split_by_key
from training.devices import pick_device, pick_precision
from training.evaluate import evaluate_run, validation_loss
from training.feed import ImageFeed, LatentFeed, NothingUsable
from training.objectives import FlowMatching
from training.optim import learning_rate, make_optimizer, update_ema
from training.plots import caption_grid
from training.progress import Progress
from training.run import RunFolder
from training.seeds import generator_for
from training.time_density import Shifted, make_time_density

GRID = 16  # pictures in the grids during training
COMPILE_MIN_STEPS = 1000  # "auto" compiles runs at least this long: compiling takes about as long as 150 steps on a CPU


def train(config: TrainConfig, resume: bool = False) -> Path:
    """Train a model as `config` says, from scratch, or continue the run in its folder; returns the run folder.

    Raises ValueError for settings and data that do not work, FileExistsError where the run folder is taken. An
    interrupt (Ctrl-C, SIGTERM) saves a checkpoint and returns.
    """
    if resume:
        return _continue(RunFolder.open(config.run_folder), config)
    run = RunFolder.create(config.run_folder, config)
    try:
        return Trainer(config, run).fit()
    except BaseException:  # Ctrl-C during set-up too
        if not list_checkpoints(run.path) and not run.metrics():  # nothing was trained: leave the name free
            shutil.rmtree(run.path)
        raise


def resume(path: str | Path, overrides: Sequence[str] = ()) -> Path:
    """Continue the run in a folder from its newest whole checkpoint, to the same bits as if it had never stopped.

    `overrides`: changed settings, such as "training.num_steps=20000". Raises ValueError where the model or the text
    encoder is another, FileNotFoundError where there is no run or no checkpoint.
    """
    run = RunFolder.open(path)
    return _continue(run, apply_overrides(run.config(), overrides))


def _continue(run: RunFolder, config: TrainConfig) -> Path:
    old = run.config()
    for part in ("model", "text", "autoencoder", "seed"):
        if getattr(config, part) != getattr(old, part):
            raise ValueError(
                f"{run.path} was trained with another {part}: {getattr(old, part)}, not {getattr(config, part)}; "
                "a resumed run keeps it, train afresh into another folder to change it"
            )
    trainer = Trainer(config, run, resumed=True)
    run.write_config(config)
    return trainer.fit()


class Trainer:
    """All that one training run holds: data, model, average, optimiser, and the step it has reached."""

    def __init__(self, config: TrainConfig, run: RunFolder, resumed: bool = False) -> None:
        self.config, self.run, self.step = config, run, 0
        self.device = pick_device(config.training.device)
        self.precision = pick_precision(config.training.precision, self.device)
        self._skipped: set[str] = set()
        self._losses: list[torch.Tensor] = []  # of the steps since the last line of metrics
        torch.manual_seed(config.seed)
        own = run.path / "pipeline" / "autoencoder"  # a resumed run has its own, whatever became of the folder named
        self.autoencoder = open_autoencoder(own if resumed and own.exists() else config.autoencoder).to(self.device)
        source = self._open_source()
        self.model = self._build_model(source, resumed).to(self.device)
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.optimizer = make_optimizer(self.model, config.optimizer)
        self.rate = learning_rate(config.optimizer, config.training.num_steps)
        density = make_time_density(config.objective.time_density, m=config.objective.m, s=config.objective.s)
        self.objective = FlowMatching(
            Shifted(density, config.objective.shift), config.objective.caption_dropout, config.objective.stratified
        )
        self.pipe = TextToImage(
            self.ema, self.autoencoder, source.image_size, config.objective.shift, self._sampling_defaults()
        )
        if resumed:
            self._load()
            self.pipe.save_defaults(run.path / "pipeline")
        else:
            self.pipe.save(run.path / "pipeline")
        self._open_feeds(source)

    # --- set-up ---------------------------------------------------------------------------------------------------

    def _open_source(self) -> Source:
        data, step = self.config.data, self.autoencoder.factor * self.config.model.patch_size
        source = open_source(
            data.source,
            data.image_size,
            step,
            num_samples=data.num_samples,
            seed=self.config.seed,
        )
        height, width = source.image_size
        self.run.log(f"data: {len(source)} samples of {data.source}, fitted to {height} x {width}")
        for key, reason in source.skipped:
            self._skip(key, reason)
        return source

    def _build_model(self, source: Source, resumed: bool) -> CaptionedMMDiT:
        text = TextConfig(**{name: getattr(self.config.text, name) for name in TextConfig.__dataclass_fields__})
        tokenizer_file = self.run.path / "pipeline" / "text" / "tokenizer.json"
        if resumed:
            tokenizer = Tokenizer.load(tokenizer_file, text.max_length)
        else:
            captions = (source.caption(i) for i in range(len(source)))
            tokenizer = Tokenizer.train(captions, text.vocab_size, text.max_length)
        sides = [side // self.autoencoder.factor for side in source.image_size]
        own = {
            name: getattr(self.config.model, name)
            for name in self.config.model.__dataclass_fields__
            if name != "section"
        }
        own["pos_embed_max_size"] = max(own["pos_embed_max_size"], *(s // self.config.model.patch_size for s in sides))
        shape = MMDiTConfig(
            in_channels=self.autoencoder.channels,
            context_dim=text.width,
            pooled_dim=text.width,
            sample_size=max(self.config.model.patch_size, round((sides[0] * sides[1]) ** 0.5)),
            **own,
        )
        model = CaptionedMMDiT(MMDiT(shape), LearnedText(text, tokenizer))
        count = sum(p.numel() for p in model.parameters()) / 1e6
        tokens = sides[0] * sides[1] // shape.patch_size**2
        self.run.log(
            f"model: {count:.1f} M parameters, {shape.depth} blocks of width {shape.width}, {tokens} image tokens, "
            f"up to {text.max_length} text tokens, on {self.device} in {str(self.precision).removeprefix('torch.')}"
        )
        return model

    def _sampling_defaults(self) -> dict[str, Any]:
        s = self.config.sampling
        return {"solver": s.solver, "num_steps": s.num_steps, "guidance": s.guidance, "interval": list(s.interval)}

    def _open_feeds(self, source: Source) -> None:
        config, text = self.config, self.model.conditioner
        training, held_out = split_by_key(source, config.data.held_out)
        if not len(training):
            raise DataError(f"all {len(source)} samples are held out: lower data.held_out ({config.data.held_out})")
        held_out = held_out[: config.evaluation.validation_samples]
        common = (self.autoencoder, text, self.device, config.data.num_workers, self._skip)
        self.validation: LatentFeed | None = None
        with suppress(NothingUsable):
            self.validation = LatentFeed(source, held_out, *common)
        if self.validation is None:
            self.run.log(
                "warning: no sample is held out, so there is no validation loss: raise data.held_out or add data"
            )
        self.feed: ImageFeed | LatentFeed
        if config.data.cache_latents:
            start = time.perf_counter()
            with Progress("encoding", len(training)) as progress:
                self.feed = LatentFeed(source, training, *common, progress=lambda done, _: progress.show(done))
            self.run.log(f"latents of {len(self.feed)} images in memory after {time.perf_counter() - start:.0f} s")
        else:
            self.feed = ImageFeed(source, training, *common)

    def _skip(self, key: str, reason: str) -> None:
        if key not in self._skipped:
            self._skipped.add(key)
            self.run.log(f"skipped ({len(self._skipped)} so far): {key}: {reason}")

    # --- the loop -------------------------------------------------------------------------------------------------

    def fit(self) -> Path:
        """Train to the last step, then score; on an interrupt save and return early."""
        config, run = self.config.training, self.run
        batches = self.feed.batches(config.batch_size, self.config.seed, self.step)
        model = self._compiled()
        try:
            with _Interrupts() as interrupts, Progress("training", config.num_steps, self.step) as progress:
                while self.step < config.num_steps and not interrupts.caught:
                    loss, norm = self._train_step(model, next(batches))
                    self._losses.append(loss)
                    self.step += 1
                    if self._due(config.log_every):
                        mean = torch.stack(self._losses).mean().item()
                        self._losses.clear()
                        run.write_metrics(
                            self.step,
                            loss=mean,
                            grad_norm=float(norm),
                            lr=self.rate(self.step - 1),
                            images_per_second=progress.rate * config.batch_size,
                        )
                        progress.show(self.step, loss=mean, images_per_second=progress.rate * config.batch_size)
                    else:
                        progress.show(self.step)
                    self._report(progress)
        finally:
            batches.close()  # type: ignore[attr-defined]
            run.close()
        if interrupts.caught:
            self._checkpoint()
            run.log(f"stopped at step {self.step}, all saved; go on with: mmdit train --resume {run.path}")
            return run.path
        self._finish()
        return run.path

    def _train_step(self, model: torch.nn.Module, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        parts = self.config.training.grad_accumulation
        total = torch.zeros((), device=self.device)
        for i, part in enumerate(_split(batch, parts)):
            with torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32):
                loss = self.objective(model, part, generator_for(self.config.seed, self.step, i))
            (loss.total / parts).backward()
            total += loss.total.detach() / parts
        clip = self.config.optimizer.grad_clip
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), clip if clip else float("inf"))
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(self.step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        update_ema(self.ema, self.model, self.config.training.ema_decay, self.step)
        return total, norm

    def _due(self, every: int) -> bool:
        return self.step == self.config.training.num_steps or bool(every and self.step % every == 0)

    def _report(self, progress: Progress) -> None:
        """What is written at this step besides the metrics: validation, pictures, a checkpoint."""
        config = self.config.training
        if self._due(config.validate_every) and self.validation is not None:
            losses = validation_loss(self.ema, self.validation, self.config)
            self.run.write_metrics(self.step, **losses)
            progress.note(f"step {self.step}: validation loss {losses['validation_loss']:.4f}")
        if config.sample_every and self.step % config.sample_every == 0:
            self._sample()
        if self._due(config.checkpoint_every):
            self._checkpoint()

    def _sample(self) -> None:
        prompts = list(self.config.sampling.prompts) or (self.validation.captions if self.validation else [""])
        prompts = (prompts * GRID)[:GRID]
        images = self.pipe(prompts, seed=self.config.sampling.seed)
        folder = self.run.path / "samples"
        folder.mkdir(exist_ok=True)
        caption_grid(images, prompts, columns=8).save(folder / f"step-{self.step:08d}.png")

    def _finish(self) -> None:
        run = self.run
        scores = evaluate_run(run.path)
        if "validation_loss" in scores:
            run.log(f"validation loss {scores['validation_loss']:.4f} (mean over fixed times)")
        for question, score in scores.get("shapes_eval", {}).items():
            run.log(f"  ShapesEval {question:20s} {score:.3f}")
        run.log(
            f"done. Pictures: {run.path}/samples.png   loss: {run.path}/loss.png   scores: {run.path}/scores.json\n"
            f'Try: mmdit sample {run.path} "{_example(self.validation)}" --out out.png'
        )

    # --- checkpoints ----------------------------------------------------------------------------------------------

    def _checkpoint(self) -> None:
        weights = {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": optimizer_tensors(self.optimizer, self.model),
        }
        state = {"step": self.step, "seed": self.config.seed, "losses": [loss.item() for loss in self._losses]}
        save_checkpoint(self.run.path, state, weights, self.config.training.keep_checkpoints)
        self.pipe.save_weights(self.run.path / "pipeline")

    def _load(self) -> None:
        state, weights = load_latest(self.run.path, self.run.log)
        if state["seed"] != self.config.seed:
            raise ValueError(f"the checkpoint was made with seed {state['seed']}, the config says {self.config.seed}")
        assign_weights(self.model, weights["model"], str(self.run.path))
        assign_weights(self.ema, weights["ema"], str(self.run.path))
        load_optimizer_tensors(self.optimizer, self.model, weights["optimizer"])
        self.step = state["step"]
        self._losses = [torch.tensor(loss, device=self.device) for loss in state["losses"]]
        self.run.rewind_metrics(self.step)
        self.run.log(f"resumed at step {self.step}")

    def _compiled(self) -> torch.nn.Module:
        config = self.config.training
        wanted = config.compile == "on" or (config.compile == "auto" and config.num_steps >= COMPILE_MIN_STEPS)
        if not wanted:
            return self.model
        if (
            config.compile == "auto"
            and self.device.type == "cpu"
            and not any(map(shutil.which, ("g++", "clang++", "c++")))
        ):
            self.run.log("no C++ compiler found: the model runs uncompiled, a little slower")
            return self.model
        self.run.log("compiling the model (under a minute)")
        compiled: Any = torch.compile(self.model)
        return compiled


def _split(batch: Any, parts: int) -> Iterator[Any]:
    """A batch in equal parts."""
    size = len(batch.latents) // parts
    for i in range(parts):
        rows = slice(i * size, (i + 1) * size)
        yield batch._replace(latents=batch.latents[rows], tokens=type(batch.tokens)(*(x[rows] for x in batch.tokens)))


def _example(validation: LatentFeed | None) -> str:
    return validation.captions[0] if validation is not None else "a caption like yours"


class _Interrupts:
    """While entered, SIGINT and SIGTERM only leave a mark, so that the step in progress ends; a second one acts at
    once.
    """

    def __enter__(self) -> _Interrupts:
        self.caught = False
        self._old: dict[int, Any] = {}
        for sig in (signal.SIGINT, signal.SIGTERM):
            try:
                self._old[sig] = signal.signal(sig, self._catch)
            except ValueError:  # not in the main thread, where Python delivers no signals
                continue
        return self

    def _catch(self, sig: int, frame: Any) -> None:
        self.caught = True
        signal.signal(sig, self._old[sig])

    def __exit__(self, *error: Any) -> None:
        for sig, handler in self._old.items():
            signal.signal(sig, handler)
