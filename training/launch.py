"""How a run begins and goes on: a new folder, or the one that is there, in one process or several.

A resumed run keeps what its weights and its order of samples hang on; the rest of its config may change.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import fields, is_dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

from mmdit.memory import keeping_memory
from training.checkpoint import list_checkpoints
from training.config import ConfigError, TrainConfig, apply_overrides, load_config, read_config
from training.devices import pick_device
from training.interrupts import Interrupted, Interrupts
from training.lock import LOCK, NotShared, only_run_in
from training.parallel import Ranks, ranks_of
from training.resuming import other_setting
from training.run import OWN, UNLINKED, QuietRun, RunFolder, taken
from training.settings import keys
from training.trainer import Trainer

# What a resumed run keeps; of data.source it keeps the samples, wherever they are now.
KEPT = (
    "model",
    "text",
    "transfusion",
    "lora",
    "autoencoder",
    "seed",
    "init",
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
KEPT_IN_BUCKETS = ("training.batch_size", "training.packing")
"""Which images are too few for a bucket of their own, and whose turn it is, hangs on it too."""
KEPT_SCHEDULE_FREE = ("optimizer.betas",)
"""What is trained lies between two others by the first of these, of which one alone is kept."""


def train(config: TrainConfig | str | Path, resume: bool = False, restart: bool = False) -> Path:
    """Train a model as `config` says, from scratch, or continue the run in its folder; returns the run folder.

    config: a config, or what `load_config` takes: a preset's name, a file.

    restart: continue the run where it has a checkpoint, else begin; so it is too where torchrun starts its processes
    again after a failure. An interrupt (Ctrl-C, SIGTERM, SIGHUP) saves a checkpoint and returns; before the first step
    there is nothing to save, and the folder of a new run is removed. Raises ValueError for settings and data that do
    not work, FileExistsError where the run folder is taken, RunTaken where another run still writes in it, NotShared
    where a process on another machine does not see it, Diverged, and ProcessLost where another process of it ends.
    """
    config = config if isinstance(config, TrainConfig) else load_config(config)
    restart = restart or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    with Interrupts() as interrupts, ranks_of(config) as ranks, ExitStack() as held:
        held.enter_context(keeping_memory(pick_device(config.training.device)))
        if resume or restart:
            held.enter_context(only_run_in(config.run_folder, ranks))
        if resume or (restart and ranks.from_first(lambda: _begun(config.run_folder))):
            run = _known(RunFolder.open(config.run_folder), ranks)
            return _continue(run, config, ranks, interrupts)
        run = _known(ranks.from_first(lambda: RunFolder.create(config.run_folder, config)), ranks)
        try:
            held.enter_context(only_run_in(run.path, ranks))
        except NotShared:
            if ranks.first:  # it has just made the folder: leave the name free
                _check_new(run.path)
                _freed(run.path)
            raise
        ranks.from_first(lambda: _check_new(run.path))
        try:
            Trainer(config, run, ranks=ranks).fit(interrupts)
        except BaseException as error:
            if list_checkpoints(run.path) or run.metrics() or not ranks.first:
                raise
            _freed(run.path)  # nothing was trained
            if not isinstance(error, Interrupted):
                raise
            print(f"stopped before the first step: nothing had been trained yet, {run.path} is removed", flush=True)
    return run.path


def _begun(folder: Path) -> bool:
    """Whether a folder has a run with a checkpoint; one that got to none is removed, since nothing of it can be used.

    One that was scored got to its end, and has weights to sample from: it stays, whatever became of its checkpoints. So
    does what a person has put there, in a folder that is no run's or beside one, and all with it.
    """
    if list_checkpoints(folder):
        return True
    config = folder / "config.toml"
    found = {*folder.iterdir()} if folder.is_dir() else set()
    barely = bool(found) and all(map(_of_beginning, found))
    if barely or (all(map(_of_run, found)) and folder / "scores.json" not in found and _written(config)):
        last = {config, folder / LOCK}  # a kill in the middle leaves what can be removed again
        for path in sorted(found - last):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        config.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)  # what stays is UNLINKED, or keeps the next run from beginning
    return False


def _freed(folder: Path) -> None:
    """Leave the name free for another run; where it is a link, the folder that it leads to stays, and is empty."""
    with suppress(OSError):
        for path in folder.iterdir() if folder.is_symlink() else ():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.rmtree(folder, ignore_errors=True)


def _of_run(path: Path) -> bool:
    """Whether it is named as what a run writes."""
    return path.name in OWN or path.match(".*.part") or _of_beginning(path)


def _written(config: Path) -> bool:
    """Whether there is such a config, and a run wrote it: it says every key, as a person's hardly does."""
    with suppress(ConfigError, FileNotFoundError):
        return not {*keys(TrainConfig)} - {*read_config(config)[1]}
    return False


def _of_beginning(path: Path) -> bool:
    """Whether it is there before a run has its config."""
    return path.name == LOCK or any(map(path.match, (".config.toml.*.part", UNLINKED)))


def _check_new(folder: Path) -> None:
    """Raises FileExistsError where a run that began at the same moment was the first to lock the folder."""
    if any(path.name != "config.toml" and not _of_beginning(path) for path in folder.iterdir()):
        raise taken(folder)


def _known(run: RunFolder, ranks: Ranks) -> RunFolder:
    return run if ranks.first else QuietRun(run.path, ranks.rank)


def resume(path: str | Path, overrides: Sequence[str] = ()) -> Path:
    """Continue the run in a folder from its newest whole checkpoint, to the same bits as if it had never stopped.

    `overrides`: changed settings, such as "training.num_steps=20000". Raises ValueError where the model, the text
    encoder or the samples are others, FileNotFoundError where there is no run or no checkpoint.
    """
    path = Path(path)
    with Interrupts() as interrupts, ranks_of(_config_of(path, overrides)) as ranks:
        ranks.from_first(lambda: RunFolder.open(path))
        with only_run_in(path, ranks):
            run = _known(RunFolder.open(path), ranks)
            old = run.config()
            config = apply_overrides(old, overrides)
            if config.training.out != old.training.out:
                raise ValueError(
                    f"training.out = {config.training.out} is the folder of a new run: a resumed one stays in {path}; "
                    "move it, and resume it there"
                )
            return _continue(run, config, ranks, interrupts)


def _config_of(path: Path, overrides: Sequence[str]) -> TrainConfig:
    """The config of a run, where it is now; any where no run is here, with which processes can connect: on another
    machine there may be one, and they have to tell each other.
    """
    try:
        config = apply_overrides(RunFolder.open(path).config(), overrides)
    except FileNotFoundError:
        config = TrainConfig()
    return replace(config, training=replace(config.training, out=str(path)))


def _continue(run: RunFolder, config: TrainConfig, ranks: Ranks, interrupts: Interrupts) -> Path:
    old = run.config()
    own = KEPT_SCHEDULE_FREE if old.optimizer.name == "schedule-free" else ()
    for key in (*KEPT, *(KEPT_IN_BUCKETS if old.data.buckets else ()), *own):
        _check_same(run, key, attrgetter(key)(old), attrgetter(key)(config))
    try:
        Trainer(config, run, resumed=True, ranks=ranks).fit(interrupts)
    except Interrupted:
        run.log(f"stopped before the first step, nothing is lost; go on with: mmdit train --resume {run.path}")
    return run.path


def _check_same(run: RunFolder, key: str, old: Any, new: Any) -> None:
    """Raises ValueError where a setting, or one of a section's, is another than the run's."""
    if is_dataclass(old):
        for part in fields(old):
            _check_same(run, f"{key}.{part.name}", getattr(old, part.name), getattr(new, part.name))
    elif old != new:
        raise other_setting(run, key, old, new)
