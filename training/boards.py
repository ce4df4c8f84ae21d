"""Metrics in Weights & Biases, beside metrics.jsonl and tensorboard: an extra, `pip install 'mmdit[wandb]'`."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from training.config import TrainConfig, to_dict
from training.run import Board, RunFolder


def open_board(config: TrainConfig, run: RunFolder) -> Board | None:
    """What `training.wandb` asks for, None where that is nothing. Raises ValueError where wandb is not installed."""
    if config.training.wandb is None:
        return None
    if find_spec("wandb") is None:
        raise ValueError(
            "training.wandb needs Weights & Biases: pip install 'mmdit[wandb]', or set training.wandb=none"
        )
    return Wandb(config, run)


class Wandb:
    """One run there for one run folder: a resumed run goes on in it. Begins with the first metrics."""

    def __init__(self, config: TrainConfig, run: RunFolder) -> None:
        self.config, self.folder = config, run.path.resolve()
        self._run: Any = None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Send numbers of a step; those of a step that was there before are drawn over it."""
        if self._run is None:
            import wandb

            self._run = wandb.init(
                project=self.config.training.wandb,
                name=self.config.name,
                id=hashlib.sha256(str(self.folder).encode()).hexdigest()[:16],
                resume="allow",
                dir=self.folder,
                config=to_dict(self.config),
            )
            self._run.define_metric("*", step_metric="step")  # a resumed run may go back some steps
        self._run.log({"step": step, **values})

    def close(self) -> None:
        """Send what is left; the next `write` goes on."""
        if self._run is not None:
            self._run.finish()
            self._run = None
