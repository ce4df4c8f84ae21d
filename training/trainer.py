"""The trainer: one loop, one run folder, and a resume that continues bit for bit.

    batch number k -> objective -> gradients -> clip -> AdamW -> EMA -> (metrics, validation, samples, checkpoint)

Every draw of step k (order, times, noise, dropped captions) is a function of (seed, k), so a run that was stopped and
resumed computes what the uninterrupted one would have. Started by torchrun, several processes compute each step
together (parallel.py, sharding.py); the first one writes, and evaluates.
"""

from __future__ import annotations

import copy
import math
import shlex
from collections.abc import Callable
from contextlib import ExitStack, closing
from textwrap import shorten
from typing import Any

import torch
from PIL import Image

from mmdit.attention import attention_backend, why_not
from mmdit.autoencoder import open_autoencoder
from mmdit.pipeline_files import gather_pipeline_weights
from mmdit.text_and_images import TransfusionPipeline
from mmdit.text_to_image import TextToImage
from mmdit.weights_io import whole
from training.alike import check_alike
from training.boards import open_boards
from training.checkpoint import (
    assign,
    averaged,
    load_optimizer_tensors,
    newest_whole,
    optimizer_tensors,
    read_checkpoint,
)
from training.config import ConfigError, TrainConfig
from training.corpus import Corpus, Pieces
from training.data import Data
from training.devices import compiled, pick_device, pick_precision, repeatable
from training.ema import make_average, remove_snapshots
from training.errors import named
from training.evaluate import corpus_loss, evaluate_run, validation_loss
from training.feed import Feed, WithText
from training.idle import idle_warnings
from training.interrupts import Interrupted, Interrupts
from training.objectives import make_objective
from training.optim import learning_rate, make_optimizer, set_rate, warmup_warning
from training.parallel import ALONE, ProcessLost, Ranks
from training.plots import caption_grid
from training.precision import LossScaler, autocast
from training.progress import Progress
from training.quality import ModelJudge, check_metrics
from training.resuming import check_state, data_digests
from training.run import RunFolder
from training.seeds import generator_for
from training.settings import as_override, differences
from training.setup import build_model, grid_prompts, open_corpus, open_data, open_feeds, open_pieces
from training.sharding import (
    Learner,
    check_parallel,
    gradient_sync,
    parallelize,
    replicated,
    strategy_text,
    unsharded,
)
from training.share import Share
from training.start import fill_weights
from training.telemetry import Profiler, Telemetry, shared_state
from training.workers import naming_dead_workers
from training.writing import Writer

GRID = 16  # pictures in the grids during training


class Diverged(ValueError):
    """The gradient was not finite in too many steps in a row."""

    alike = True  # in all processes


class Trainer:
    """All that one training run holds: data, model, average, optimiser, and the step it has reached."""

    def __init__(self, config: TrainConfig, run: RunFolder, resumed: bool = False, ranks: Ranks = ALONE) -> None:
        self.config, self.run, self.ranks, self.step = config, run, ranks, 0
        self.device = pick_device(config.training.device)
        self.precision = pick_precision(config.training.precision, self.device)
        self.share = Share(ranks.rank, ranks.world, config.training.grad_accumulation)
        self.objective = make_objective(config, self.share)
        self._check()
        self._losses: list[torch.Tensor] = []  # of the steps since the last line of metrics
        self.scaler = LossScaler.for_precision(self.precision)
        self.updates = 0  # updates of the weights, which a skipped step does not make
        self.skipped = self._bad = 0  # steps skipped because their gradient was not finite, in all and in a row
        self._left_out = False  # whether the last step was skipped, for that or because the loss's scale overflowed
        self._saved: int | None = None  # the step of the newest checkpoint
        self._ordered: int | None = None  # number of samples in the training order, as the checkpoint has it
        self._judge: ModelJudge | None = None
        if ranks.first:
            run.boards += open_boards(config, run.path)
        torch.default_generator.manual_seed(config.seed)  # fresh weights are drawn on the CPU
        own = run.path / "pipeline" / "autoencoder"  # a resumed run has kept a copy
        self.autoencoder = open_autoencoder(own if own.exists() else config.autoencoder).to(self.device)
        source = ranks.after_first(lambda: open_data(config, run, self.autoencoder.factor))
        corpus = open_corpus(config, run)
        self.data = data_digests(source, corpus)
        self.model, given = build_model(config, run, source, self.autoencoder, resumed, corpus, ranks)
        self._build(source.image_size, resumed, given)
        del given
        if resumed:
            self._load()
        self._open_feeds(source, corpus)
        if resumed:
            self._rewind_folder()
        else:
            self._save_pipe(lambda pipe: pipe.save(run.path / "pipeline"))

    def _check(self) -> None:
        """Raises ConfigError where batch, processes and device do not fit, or a kernel or library is missing; warns of
        settings that take no effect, and of a warm-up that does not end.
        """
        if why := why_not(self.config.training.attention, self.device):
            raise ConfigError(why)
        check_parallel(self.config, self.ranks, self.device)
        documents = self.config.text_documents
        self.share.check("training.batch_size" + (", less documents of text," if documents else ""), self._pictures)
        self.share.check("the number of documents of text in a batch", documents)
        check_metrics(self.config.evaluation)
        warming = warmup_warning(self.config.optimizer.warmup_steps, self.config.training.num_steps)
        for line in [*idle_warnings(self.config), *filter(None, [warming])]:
            self.run.log(f"warning: {line}")

    def _build(self, image_size: tuple[int, int], resumed: bool, given: dict[str, torch.Tensor]) -> None:
        """Place the fresh model on its devices; make the optimiser, the average and the pipeline that samples it."""
        config, run, ranks = self.config, self.run, self.ranks
        check_alike(config, self.data, self.model, self.autoencoder, ranks)
        precision = str(self.precision).removeprefix("torch.")
        run.log(f"computing on {self.device} in {precision}{strategy_text(config.parallel, ranks)}")
        fill = None if resumed else lambda trunk: fill_weights(trunk, given, config.optimizer.base_width, ranks)
        made = parallelize(self.model, self.objective, config, ranks, self.device, self.precision, fill)
        self.learner, self.ema, self.sharded, self._skeleton = made
        self.optimizer = make_optimizer(self.model, config.optimizer, None if self.sharded else ranks.device_group)
        self.average = make_average(self.ema, self.model, self.optimizer, config.training)
        self.rate = learning_rate(config.optimizer, config.training.num_steps)
        self.writer = Writer(
            run.path, config.training.keep_checkpoints, ranks, self.sharded, config.training.async_checkpoint
        )
        self.telemetry = Telemetry(config, self.model, self.device, self.precision, run.log, ranks.sum)
        self.pipe = (TransfusionPipeline if config.transfusion.enabled else TextToImage)(
            self.ema, self.autoencoder, image_size, config.objective.shift, self._sampling_defaults()
        )

    def _open_feeds(self, source: Data, corpus: Corpus | None) -> None:
        """Open the training and validation data; encoding captions needs the conditioner on the device."""
        config, run, words = self.config, self.run, self.model.conditioner
        self.feed: Feed
        self.feed, self.validation = open_feeds(config, run, source, self.autoencoder, words, self.device)
        self.prompts = grid_prompts(config, source, self.validation)
        self.held_out_text: Pieces | None = None
        if corpus is not None:
            tokenizer: Any = words.tokenizer
            pieces, self.held_out_text = open_pieces(config, run, corpus, tokenizer, self.device)
            self.feed = WithText(self.feed, pieces, config.text_documents)
        before, self._ordered = self._ordered, self.feed.num_ordered
        if before not in (None, self._ordered):
            made = f"of {self._ordered} samples, not of {before} as before, batches are made"
            run.log(f"warning: {made}: the order of samples is another now")

    def _rewind_folder(self) -> None:
        """Bring the folder of a resumed run to the step of its checkpoint. Called last, when nothing else can fail."""
        self.ranks.barrier()
        self.run.remove_leftovers()
        if self.step == self.config.training.num_steps:  # no checkpoint will follow, which would write the weights
            self._save_pipe(self._save_weights)
        if self.ranks.first:
            self.pipe.save_defaults(self.run.path / "pipeline")
            for key, old, new in differences(self.run.config(), self.config):
                self.run.log(f"{key} = {as_override(new)} from here on, was {as_override(old)}")
        self.run.write_config(self.config)
        self.run.rewind_metrics(self.step)
        if self.ranks.first:
            remove_snapshots(self.run.path, self.step)

    @property
    def _pictures(self) -> int:
        """Captioned pictures in a batch."""
        return self.config.training.batch_size - self.config.text_documents

    def _sampling_defaults(self) -> dict[str, Any]:
        s = self.config.sampling
        return {"solver": s.solver, "num_steps": s.num_steps, "guidance": s.guidance, "interval": list(s.interval)}

    # --- the loop -------------------------------------------------------------------------------------------------

    def fit(self, interrupts: Interrupts) -> None:
        """Train to the last step, then score; on an interrupt save and return early."""
        with closing(self.run):
            self._fit(interrupts)

    def _fit(self, interrupts: Interrupts) -> None:
        run = self.run
        learner = self._compiled_learner()
        with interrupts.deferred():
            self._steps(learner, interrupts)
            stopped = self.ranks.any(interrupts.caught)
            if stopped and self._saved != self.step:
                self._checkpoint()
            self.writer.wait()
        if stopped:
            run.log(f"stopped at step {self.step}, all saved; go on with: mmdit train --resume {run.path}")
            if self.ranks.any(interrupts.orphaned):
                raise ProcessLost(f"process {self.ranks.rank} stops: the torchrun that had started it has ended")
            return
        try:
            if interrupts.caught:  # just now
                raise Interrupted
            if self.ranks.first:
                self._finish()
        except Interrupted:
            run.log(f"stopped before the scores; all is trained and saved, score it with: mmdit evaluate {run.path}")

    def _steps(self, learner: torch.nn.Module, interrupts: Interrupts) -> None:
        """Train to the last step, or to the one in which an interrupt comes."""
        config, run = self.config.training, self.run
        batches = self.feed.batches(config.batch_size, self.config.seed, self.step, self.share)
        shown = Progress("training", config.num_steps, self.step, self._pictures, quiet=run.quiet)
        recorded = config.profiled if self.ranks.first else None
        profiler = Profiler(recorded, run.path / "profile", run.log, done=self.step)
        with ExitStack() as ending:  # called in reverse order, each of them even where another fails
            ending.callback(self.writer.join)  # a run that has stopped, for whatever reason, writes no longer
            ending.callback(batches.close)  # type: ignore[attr-defined]
            ending.callback(profiler.close)
            ending.push(lambda failed, *_: self.writer.tell(run.log) if failed else None)
            with repeatable(self.device), attention_backend(config.attention), naming_dead_workers(), shown as progress:
                while self.step < config.num_steps and not self.ranks.any(interrupts.caught):
                    profiler.before(self.step + 1)
                    loss, norm = self._train_step(learner, self.telemetry.next(batches))
                    if not self._left_out:
                        self._losses.append(loss)
                    self.step += 1
                    profiler.after(self.step)
                    self._report(progress, norm)

    def _compiled_learner(self) -> torch.nn.Module:
        """The learner that is called in each step: compiled where asked for, and replicated where not sharded."""
        several = self.ranks.world > 1
        model = compiled(self.model, self.config, self.device, self.run.log, blocks_alone=several)
        learner = self.learner if model is self.model else Learner(model, self.objective)
        return replicated(learner, self.device) if several and not self.sharded else learner

    def _train_step(self, learner: torch.nn.Module, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """One step: the loss of this process's share of the batch, and the gradient's norm over the whole batch."""
        parts, losses, total = self._prepared(batch), [], torch.zeros((), device=self.device)
        for i, part in enumerate(parts, start=1):
            with gradient_sync(learner, last=i == len(parts)):
                with autocast(self.device, self.precision):
                    loss = learner(*part)
                (loss.total / len(parts) * self.scaler.scale).backward()
            total += loss.total.detach() / len(parts)
            losses.append(loss._replace(total=loss.total.detach()))
        self.scaler.unscale(self.model.parameters())
        if self._due(self.config.training.log_every, self.step + 1):
            self.telemetry.gradients(self.model)
        clip = self.config.optimizer.grad_clip
        norm = whole(torch.nn.utils.clip_grad_norm_(self.model.parameters(), clip if clip else float("inf")))
        set_rate(self.optimizer, self.rate(self.step))
        if self._accepted(norm):
            self.optimizer.step()
            self.average.update(self.model, self.updates)
            self.updates += 1
            for loss in losses:
                self.telemetry.add(loss)
        self.optimizer.zero_grad()
        return total, norm

    def _prepared(self, batch: Any) -> list[tuple[Any, torch.Generator, torch.Tensor | None]]:
        """The learner's arguments for each part of a batch: (batch, generator, what its means are taken over).

        The last is the mean over all parts of all processes, so that the mean of the parts' losses is the batch's loss.
        """
        seed, prepared = self.config.seed, []
        for i, part in enumerate(batch.split(self.share.parts)):
            generator = generator_for(seed, self.step, i)
            prepared.append((*self.objective.prepared(self.model, part, generator), generator))
        counts = [own for _, own, _ in prepared if own is not None]
        mean = self.ranks.mean(torch.stack(counts).mean(0)) if counts else None
        return [(part, generator, mean) for part, _, generator in prepared]

    def _accepted(self, norm: torch.Tensor) -> bool:
        """Whether the step is made: its gradient is finite, or nothing checks it.

        Skipped steps are counted, but for those whose scaled loss overflowed. Raises Diverged after too many in a row.
        """
        most = self.config.training.max_bad_steps
        if not most and not self.scaler.enabled:
            return True
        self._left_out = not norm.isfinite()
        if self.scaler.update(not self._left_out):
            return False
        if not self._left_out:
            self._bad = 0
            return True
        self._bad += 1
        self.skipped += 1
        self.run.log(f"step {self.step + 1} is left out: its gradient is no finite number ({self.skipped} so far)")
        if most and self._bad >= most:
            raise Diverged(
                f"stopped at step {self.step + 1}: the gradient was no finite number in {self._bad} steps in a row "
                "(training.max_bad_steps); checkpoints are as they were: lower optimizer.lr, or look at the data"
            )
        return False

    def _due(self, every: int, step: int | None = None) -> bool:
        """Whether something that happens every so many steps happens at this one; the last step always counts."""
        step = self.step if step is None else step
        return step == self.config.training.num_steps or bool(every and step % every == 0)

    def _report(self, progress: Progress, norm: torch.Tensor) -> None:
        """After a step: metrics where they are due, then validation, pictures, scores and a checkpoint."""
        if self._due(self.config.training.log_every):
            self._write_metrics(progress, norm)
        else:
            progress.show(self.step)
        with self.telemetry.paused(), progress.paused():
            self._evaluate_and_save()

    def _write_metrics(self, progress: Progress, norm: torch.Tensor) -> None:
        values = {}
        if self._losses:
            values["loss"] = torch.tensor(self._mean_losses()).mean().item()
            self._losses.clear()
        if not self._left_out:
            values["grad_norm"] = float(norm)
        progress.show(self.step, **values)
        values["lr"] = self.rate(self.step - 1)
        if progress.rate:
            values["images_per_second"] = progress.images_per_second
        if self.scaler.enabled:
            values["loss_scale"] = self.scaler.scale
        if self.skipped:
            values["skipped_steps"] = self.skipped
        telemetry = {name: x for name, x in self.telemetry.line().items() if math.isfinite(x)}
        self.run.write_metrics(self.step, **values, **telemetry)

    def _evaluate_and_save(self) -> None:
        """What is due at this step besides training."""
        config = self.config.training
        if self._due(config.validate_every):
            self._validate()
        if config.sample_every and self.step % config.sample_every == 0:
            self._sample()
        if self._due(config.ema_snapshot_every):
            self.average.snapshot(self.run.path, self.step, self.updates, write=self.ranks.first)
        every = self.config.evaluation.metrics_every
        if every and self.step % every == 0 and self.step < config.num_steps:  # `_finish` scores the last
            self._score()
        if self._due(config.checkpoint_every):
            self._checkpoint()

    def _mean_losses(self) -> list[float]:
        """The loss of the whole batch at each step since the last line of metrics."""
        return self.ranks.mean(torch.stack(self._losses)).tolist() if self._losses else []

    def _validate(self) -> None:
        if not (self.ranks.first or self.sharded):  # a sharded model computes in all processes
            return
        with unsharded(self.ema):
            if self.held_out_text is not None:
                self.run.write_metrics(self.step, **corpus_loss(self.ema, self.held_out_text, self.config))
            if self.validation is not None:
                losses = validation_loss(self.ema, self.validation, self.config)
                self.run.write_metrics(self.step, **losses)
                if self.step < self.config.training.num_steps:  # the last one is logged with the scores
                    self.run.log(f"step {self.step}: validation loss {losses['validation_loss']:.4f}")

    def _sample(self) -> None:
        if not (self.ranks.first or self.sharded):
            return
        prompts = (self.prompts * GRID)[:GRID]
        with unsharded(self.ema):
            images = self.pipe(prompts, seed=self.config.sampling.seed)
        if not self.ranks.first:
            return
        folder = self.run.path / "samples"
        folder.mkdir(exist_ok=True)
        grid = caption_grid(images, prompts)
        with named(path := folder / f"step-{self.step:08d}.png"):
            grid.save(path)
        self.run.show(self.step, "samples", grid)

    def _score(self) -> None:
        if not (self.ranks.first or self.sharded):
            return
        with unsharded(self.ema):
            self._judge = self._judge or ModelJudge(self.config, self.pipe, self.run)
            self._write_quality(self._judge(self.pipe))

    def _write_quality(self, scores: dict[str, Any]) -> None:
        self.run.write_metrics(self.step, **{name: x for name, x in scores.items() if isinstance(x, float)})
        shown = "  ".join(f"{name} {x:.4g}" for name, x in scores.items() if isinstance(x, float))
        self.run.log(f"step {self.step}: {shown} ({scores['num_images']} pictures)")

    def _finish(self) -> None:
        self.optimizer.state.clear()  # room for the whole model that is scored
        run, scores = self.run, evaluate_run(self.run.path, progress=True)
        if "quality" in scores:
            run.rewind_metrics(self.step, scores["quality"])  # where this run had ended before
            self._write_quality(scores["quality"])
        if (file := run.path / "samples.png").exists():
            with Image.open(file) as grid:
                run.show(self.step, "samples_at_the_end", grid)
        if "validation_loss" in scores:
            run.log(f"validation loss {scores['validation_loss']:.4f} (mean over fixed times)")
        for question, score in scores.get("shapes_eval", {}).items():
            run.log(f"  ShapesEval {question:20s} {score:.3f}")
        if "captions_right" in scores:
            run.log(f"  captions that name every object {scores['captions_right']:.3f}")
        caption, path = shorten(self.prompts[0], 100, placeholder="") or "a caption", shlex.quote(str(run.path))
        run.log(
            f"done. Pictures: {run.path}/samples.png   loss: {run.path}/loss.png   scores: {run.path}/scores.json\n"
            f"Try: mmdit sample {path} {shlex.quote(caption)} --out out.png   or in the browser: mmdit web {path}"
        )

    # --- checkpoints ----------------------------------------------------------------------------------------------

    def _checkpoint(self) -> None:
        state: dict[str, Any] = {
            "step": self.step,
            "seed": self.config.seed,
            "losses": self._mean_losses(),
            **self.data,
            "ordered": self._ordered,
            "updates": self.updates,
            "skipped": self.skipped,
            "bad": self._bad,
            "telemetry": shared_state(self.ranks.gather(self.telemetry.state())),
        }
        if self.scaler.enabled:
            state["loss_scale"] = [self.scaler.scale, self.scaler.good]
        self.writer.wait()  # so that memory holds the copies of one checkpoint, not of two
        if self.config.training.async_checkpoint:
            self.writer.write(
                state, self._tensors(), lambda written: self._save_weights(self._pipe_of(averaged(written)))
            )
        else:
            self.writer.write(state, self._tensors())
            self._save_pipe(self._save_weights)
        self._saved = self.step

    def _save_weights(self, pipe: TextToImage) -> None:
        pipe.save_weights(self.run.path / "pipeline")

    def _tensors(self) -> dict[str, dict[str, torch.Tensor]]:
        return {
            "model": self.model.state_dict(),
            **self.average.tensors(),
            "optimizer": optimizer_tensors(self.optimizer, self.model),
        }

    def _save_pipe(self, save: Callable[[TextToImage], object]) -> None:
        """Call `save` with the pipeline in process 0. All processes call this: a sharded average is gathered tensor by
        tensor as they are written.
        """
        if self.ranks.first:
            save(self.pipe)
        elif self.sharded:
            gather_pipeline_weights(self.pipe)

    def _pipe_of(self, state: dict[str, torch.Tensor]) -> TextToImage:
        """A pipeline with these tensors, which it does not copy."""
        pipe = copy.copy(self.pipe)
        pipe.model = copy.deepcopy(self._skeleton)
        pipe.model.load_state_dict(state, assign=True)
        return pipe

    def _load(self) -> None:
        folder = self.ranks.from_first(lambda: newest_whole(self.run.path, self.run.log))
        state, weights = read_checkpoint(folder, self._tensors(), self.ranks)
        check_state(self.run, self.config, state, self.data)
        assign(self.model, weights["model"], str(self.run.path))
        self.average.load(weights, str(self.run.path))
        load_optimizer_tensors(self.optimizer, self.model, weights.pop("optimizer", {}))  # {} before the first update
        self.step = self._saved = state["step"]
        self._losses = [torch.tensor(loss, device=self.device) for loss in state["losses"]]
        self._ordered = state.get("ordered")
        self.updates = state.get("updates", self.step)
        self.skipped, self._bad = state.get("skipped", 0), state.get("bad", 0)
        if "telemetry" in state:
            self.telemetry.load(state["telemetry"], self.ranks.world)
        if self.scaler.enabled and "loss_scale" in state:
            self.scaler.scale, self.scaler.good = state["loss_scale"]
        self.run.log(f"resumed at step {self.step}")
