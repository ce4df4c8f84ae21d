"""Metrics in Weights & Biases, beside metrics.jsonl and tensorboard: an extra, `pip install 'mmdit[wandb]'`."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mmdit.weights_io import write_aside
from training.config import TrainConfig, to_dict
from training.run import Board, RunFolder


def open_board(config: TrainConfig, run: RunFolder) -> Board | None:
    """The board that `training.wandb` asks for, or None. Raises ValueError where wandb is not installed or nobody is
    logged in.
    """
    if config.training.wandb is None:
        return None
    if find_spec("wandb") is None:
        raise ValueError(
            "training.wandb needs Weights & Biases: pip install 'mmdit[wandb]', or set training.wandb=none"
        )
    import wandb

    with _said():
        if wandb.setup().settings.mode == "online":
            wandb.login(verify=False)
    return Wandb(config, run)


class Wandb:
    """A run of Weights & Biases for a run folder, which a resumed run continues. It starts with the first metrics."""

    def __init__(self, config: TrainConfig, run: RunFolder) -> None:
        self.config, self.folder = config, run.path.resolve()
        self._run: Any = None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Send the values of a step, which may be one that was sent before. Raises ValueError where the run cannot be
        started.
        """
        if self._run is None:
            import wandb

            with _said():
                self._run = wandb.init(
                    project=self.config.training.wandb,
                    name=self.config.name,
                    id=_identity(self.folder),
                    resume="allow",
                    dir=self.folder,
                    config=to_dict(self.config),
                )
            self._run.define_metric("*", step_metric="step")  # so that a resumed run may go back some steps
        self._run.log({"step": step, **values})

    def close(self) -> None:
        """Finish the run; the next `write` continues it."""
        if self._run is not None:
            self._run.finish()
            self._run = None


def _identity(folder: Path) -> str:
    """The id of a folder's run. A folder that was moved keeps it; a copy, whose original is in place, gets its own."""
    own, place = _noted(folder)
    if own and place == folder:
        return own
    if not own or _noted(place)[0] == own:
        own = uuid.uuid4().hex[:16]
    (folder / "wandb").mkdir(exist_ok=True)
    write_aside(folder / "wandb" / "id", lambda aside: aside.write_text(f"{own}\n{folder}\n", encoding="utf-8"))
    return own


def _noted(folder: Path) -> tuple[str, Path]:
    """(the id in a folder, the path that the folder had then); ("", folder) where it has none."""
    try:
        own, place = (folder / "wandb" / "id").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return "", folder
    return own, Path(place)


@contextmanager
def _said() -> Iterator[None]:
    """Errors of wandb become ValueError of one line."""
    import wandb

    try:
        yield
    except wandb.Error as error:
        raise ValueError(
            f"training.wandb: {str(error).rstrip('.')}; or keep the metrics here, by WANDB_MODE=offline"
        ) from error
