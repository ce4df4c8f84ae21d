"""Checks that a checkpoint fits the config and the data of a run that resumes from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from training.config import ConfigError, TrainConfig
from training.corpus import Corpus
from training.data import Data
from training.run import RunFolder
from training.settings import as_override
from training.setup import fingerprint


def data_digests(source: Data, corpus: Corpus | None) -> dict[str, str]:
    """The digests by which a checkpoint recognises its data: of the samples, of a stream's files and filters, and of
    the documents of text alone.
    """
    digests = {"samples": fingerprint(source)} | ({"version": source.version} if source.version else {})
    return digests | ({"text": corpus.digest} if corpus else {})


def other_setting(run: RunFolder, key: str, old: Any, new: Any) -> ConfigError:
    """The error for a resumed run that would change a setting which it has to keep."""
    return ConfigError(
        f"{run.path} was trained with another {key}: {as_override(old)}, not {as_override(new)}; "
        "a resumed run keeps it, train afresh into another folder to change it"
    )


def check_state(run: RunFolder, config: TrainConfig, state: Mapping[str, Any], data: Mapping[str, str]) -> None:
    """Raises ConfigError where a checkpoint does not fit the config; warns where the samples or the size of a batch
    have changed. data: the `data_digests` of now.
    """
    if state["seed"] != config.seed:
        raise ConfigError(f"the checkpoint was made with seed {state['seed']}, the config says {config.seed}")
    if state["step"] > (steps := config.training.num_steps):
        raise ConfigError(
            f"{run.path} is at step {state['step']}, past training.num_steps = {steps}: give a larger number, "
            "or train afresh into another folder"
        )
    before, batch = run.config().training.batch_size, config.training.batch_size
    if moved := (batch - before) * state["step"]:
        what = f"{moved} samples are passed over" if moved > 0 else f"{-moved} samples come once more"
        run.log(f"warning: training.batch_size was {before}: batches are those of a run of {batch} now, so that {what}")
    version, now = state.get("version"), data.get("version")
    alike = version is not None and version == now  # of a stream, whose "samples" are its name alone
    if state.get("samples", data["samples"]) != data["samples"] and not alike:
        old, new = run.config().data.source, config.data.source
        if new != old:
            raise other_setting(run, "data.source", old, new)
        run.log(f"warning: {new} has changed since it was trained on: the order of samples is another now")
    if version is not None and version != now:
        what = "has other files, or another version of them, or other filters than when it was trained on"
        run.log(f"warning: {config.data.source} {what}: the order of samples may be another now")
    if state.get("text") != data.get("text"):
        old_text, new_text = run.config().transfusion.text, config.transfusion.text
        if new_text != old_text:
            raise other_setting(run, "transfusion.text", old_text, new_text)
        raise ConfigError(
            f"{config.transfusion.text} has changed since {run.path} was trained on it: put the text "
            "back as it was, or train afresh into another folder"
        )
