"""Boards that show a run's metrics and pictures: tensorboard, and Weights & Biases where `training.wandb` asks for it.

The latter is an extra, `pip install 'mmdit[wandb]'`.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from mmdit.weights_io import write_aside
from training.config import TrainConfig, to_dict
from training.errors import named


class Board(Protocol):
    """A place to look at a run, beside its files. It is opened by what is first written."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """The metrics of a step, which may be one that was written before."""

    def show(self, step: int, name: str, image: Image.Image) -> None:
        """A picture; those of one name are shown together."""

    def rewind(self, step: int) -> None:
        """What was written past `step` will be written again."""

    def close(self) -> None:
        """Flush; the next `write` or `show` goes on."""


class Tensorboard:
    """A folder of tensorboard's files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writer: Any = None
        self._purge: int | None = None  # drop this step and later ones

    def write(self, step: int, values: Mapping[str, float]) -> None:
        with named(self.folder):
            for name, value in values.items():
                self._open().add_scalar(name, value, step)

    def show(self, step: int, name: str, image: Image.Image) -> None:
        with named(self.folder):
            self._open().add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def rewind(self, step: int) -> None:
        self._purge = step + 1

    def close(self) -> None:
        if self._writer is not None:
            with named(self.folder):
                self._writer.close()
            self._writer = None

    def _open(self) -> Any:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.folder), flush_secs=10, purge_step=self._purge)
            self._purge = None
        return self._writer


def open_boards(config: TrainConfig, folder: Path) -> list[Board]:
    """The boards that a config asks for, beside tensorboard. Raises ValueError where wandb is not installed or nobody
    is logged in.
    """
    if config.training.wandb is None:
        return []
    if find_spec("wandb") is None:
        raise ValueError(
            "training.wandb needs Weights & Biases: pip install 'mmdit[wandb]', or set training.wandb=none"
        )
    import wandb

    with _said():
        if wandb.setup().settings.mode == "online":
            wandb.login(verify=False)
    return [Wandb(config, folder)]


class Wandb:
    """A run of Weights & Biases for a run folder, which a resumed run continues.

    `write` and `show` raise ValueError where it cannot be started.
    """

    def __init__(self, config: TrainConfig, folder: Path) -> None:
        self.config, self.folder = config, folder.resolve()
        self._run: Any = None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._open().log({"step": step, **values})

    def show(self, step: int, name: str, image: Image.Image) -> None:
        import wandb

        self._open().log({"step": step, name: wandb.Image(image)})

    def rewind(self, step: int) -> None:
        """Nothing: the steps are an axis of the metrics, which may go back."""

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()
            self._run = None

    def _open(self) -> Any:
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
        return self._run


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
