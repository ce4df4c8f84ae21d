"""Starting and resuming a run in its folder, in one process or several.

A resumed run keeps the settings that its weights and its order of samples depend on (`KEPT`); others may change.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from operator import attrgetter
from pathlib import Path

import torch

from mmdit.memory import keeping_memory
from training.checkpoint import list_checkpoints
from training.config import CONFIG_FILE, ConfigError, TrainConfig, apply_overrides, load_config, read_config
from training.devices import pick_device
from training.interrupts import Interrupted, Interrupts
from training.lock import LOCK, NotShared, only_run_in
from training.parallel import Ranks, ranks_of
from training.resuming import other_setting
from training.run import OWN, UNLINKED, RunFolder, taken
from training.settings import differences, keys
from training.trainer import Trainer

# Settings, or whole sections, that a resumed run keeps. Samples and text may move, and are known by their digests.
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
"""With buckets, which of them are merged, and which one each batch is of, depends on these."""
KEPT_SCHEDULE_FREE = ("optimizer.betas",)
"""The optimiser keeps y and z, and x, its average, follows from these by the first beta."""


def train(config: TrainConfig | str | Path, resume: bool = False, restart: bool = False) -> Path:
    """Train a model as `config` says, from scratch, or continue the run in its folder; returns the run folder.

    config: a config, or what `load_config` takes (a preset's name, a file). resume: continue the run in its folder.
    restart: continue it where it has a checkpoint, else begin; implied where torchrun restarts failed processes.

    An interrupt (Ctrl-C, SIGTERM, SIGHUP) saves a checkpoint and returns; before the first step there is nothing to
    save, and the folder of a new run is removed. Raises ValueError for settings and data that do not work,
    FileExistsError where the run folder is in use, RunTaken where another run still writes in it, NotShared where a
    process on another machine does not see it, Diverged, and ProcessLost where another process of the run ends.
    """
    config = config if isinstance(config, TrainConfig) else load_config(config)
    restart = restart or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    with _processes(config) as (interrupts, ranks), ExitStack() as held:
        if resume or restart:
            held.enter_context(only_run_in(config.run_folder, ranks))
        if resume or (restart and ranks.from_first(lambda: _can_continue(config.run_folder))):
            return _continue(RunFolder.open(config.run_folder, ranks.rank), config, ranks, interrupts)
        run = RunFolder(ranks.from_first(lambda: RunFolder.create(config.run_folder, config).path), ranks.rank)
        try:
            held.enter_context(only_run_in(run.path, ranks))
        except NotShared:
            if ranks.first:  # it has just made the folder
                _check_new(run.path)
                _remove_new(run.path)
            raise
        ranks.from_first(lambda: _check_new(run.path))
        try:
            Trainer(config, run, ranks=ranks).fit(interrupts)
        except BaseException as error:
            if list_checkpoints(run.path) or any(run.rows()) or not ranks.first:
                raise
            _remove_new(run.path)  # nothing was trained
            if not isinstance(error, Interrupted):
                raise
            print(f"stopped before the first step: nothing had been trained yet, {run.path} is removed", flush=True)
    return run.path


@contextmanager
def _processes(config: TrainConfig) -> Iterator[tuple[Interrupts, Ranks]]:
    """What stops a run, and its processes; afterwards memory and torch's random numbers are the caller's again."""
    with (
        Interrupts() as interrupts,
        ranks_of(config) as ranks,
        torch.random.fork_rng(devices=[]),
        keeping_memory(pick_device(config.training.device)),
    ):
        yield interrupts, ranks


def _can_continue(folder: Path) -> bool:
    """Whether a folder holds a run with a checkpoint. Removes a run that has none, so that it can begin again.

    Two things stay: a run that was scored, for it has weights to sample from; and a folder that holds anything which a
    run does not write, for that is a person's.
    """
    if list_checkpoints(folder):
        return True
    config = folder / CONFIG_FILE
    found = {*folder.iterdir()} if folder.is_dir() else set()
    no_config_yet = bool(found) and all(map(_precedes_config, found))
    unscored_run = all(map(_of_run, found)) and folder / "scores.json" not in found and _is_written_config(config)
    if no_config_yet or unscored_run:
        last = {config, folder / LOCK}  # by these a folder that a kill left half removed is known again
        for path in sorted(found - last):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        config.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)  # what stays is UNLINKED, or keeps the next run from beginning
    return False


def _remove_new(folder: Path) -> None:
    """Remove the folder of a run that has just begun; where it is a link, empty the folder that it leads to."""
    with suppress(OSError):
        for path in folder.iterdir() if folder.is_symlink() else ():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.rmtree(folder, ignore_errors=True)


def _of_run(path: Path) -> bool:
    """Whether a file or folder is named as one that a run writes."""
    return path.name in OWN or path.match(".*.part") or _precedes_config(path)


def _is_written_config(config: Path) -> bool:
    """Whether a run wrote this config: it has every key, which a person's hardly has."""
    with suppress(ConfigError, FileNotFoundError):
        return not {*keys(TrainConfig)} - {*read_config(config)[1]}
    return False


def _precedes_config(path: Path) -> bool:
    """Whether a file is one that a run folder may hold before its config is written."""
    return path.name == LOCK or any(map(path.match, (".config.toml.*.part", UNLINKED)))


def _check_new(folder: Path) -> None:
    """Raises FileExistsError where another run, which began at the same moment, has locked the folder first."""
    if any(path.name != CONFIG_FILE and not _precedes_config(path) for path in folder.iterdir()):
        raise taken(folder)


def resume(path: str | Path, overrides: Sequence[str] = ()) -> Path:
    """Continue the run in a folder from its newest whole checkpoint, to the same bits as if it had never stopped.

    overrides: settings that change, such as "training.num_steps=20000". Raises ValueError where one of them would
    change the model, the text encoder or the samples, FileNotFoundError where there is no run or no checkpoint.
    """
    path = Path(path)
    with _processes(_config_of(path, overrides)) as (interrupts, ranks):
        ranks.from_first(lambda: RunFolder.open(path))
        with only_run_in(path, ranks):
            run = RunFolder.open(path, ranks.rank)
            old = run.config()
            config = apply_overrides(old, overrides)
            if config.training.out != old.training.out:
                raise ConfigError(
                    f"training.out = {config.training.out} is the folder of a new run: a resumed one stays in {path}; "
                    "move it, and resume it there"
                )
            return _continue(run, config, ranks, interrupts)


def _config_of(path: Path, overrides: Sequence[str]) -> TrainConfig:
    """The config of the run in a folder. Where this machine does not see it, a default one: with it the processes can
    connect, and process 0, which may see the run, says what is wrong.
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
        for changed in differences(attrgetter(key)(old), attrgetter(key)(config), key):
            if changed[0] != "transfusion.text":
                raise other_setting(run, *changed)
    try:
        Trainer(config, run, resumed=True, ranks=ranks).fit(interrupts)
    except Interrupted:
        run.log(f"stopped before the first step, nothing is lost; go on with: mmdit train --resume {run.path}")
    return run.path
