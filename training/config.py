"""The config of a training run: a frozen dataclass of the sections in `sections.py`.

It comes from a preset (`training/presets.py`) or a TOML file with the same section names, and overrides on top:

    config = load_config("my.toml", ["training.num_steps=20000", "optimizer.lr=3e-4"])

A file may begin with `preset = "demo"` and then say only what differs.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from training import settings
from training.idle import idle_settings, refuse_idle
from training.sections import (
    DataConfig,
    EvaluationConfig,
    LoraConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ParallelConfig,
    SamplingConfig,
    TextConfig,
    TrainingConfig,
    TransfusionConfig,
)
from training.settings import ConfigError, CountOrZero, Settings, to_dict, to_toml

__all__ = [
    "ConfigError",
    "DataConfig",
    "EvaluationConfig",
    "LoraConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "SamplingConfig",
    "TextConfig",
    "TrainConfig",
    "TrainingConfig",
    "TransfusionConfig",
    "apply_overrides",
    "load_config",
    "to_dict",
    "to_toml",
]

CONFIG_FILE = "config.toml"
"""The config as used, in a run's folder."""
MAX_CHARACTERS = 1_000_000  # of a config file
MAX_DOTS = 1_000  # of a line in it: the time to parse a key grows with the square of its parts


@dataclass(frozen=True)
class TrainConfig(Settings):
    """A whole run."""

    name: str = "run"
    """One word for the run; its folder is runs/NAME unless training.out says another."""
    seed: CountOrZero = 0
    """Seed of the initial weights, the order of the data, the times and the noise."""
    autoencoder: str = "none"
    """What makes the latents: "none" (pixels), "shapes" (in the package), or an autoencoder's folder or file."""
    init: str | tuple[str, ...] | None = None
    """Weights to start from: a run's folder, a diffusers SD3 transformer's, a file in SD3's layout; with transfusion a
    language model's in Hugging Face's format too, or a list, of which a language model is taken first."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    text: TextConfig = field(default_factory=TextConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    transfusion: TransfusionConfig = field(default_factory=TransfusionConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def check(self) -> None:
        if not self.name or any(c in self.name for c in "/\\\0") or self.name in (".", ".."):
            raise ConfigError(f'name is "{self.name}", expected one word that can name a folder')
        if not self.autoencoder:
            raise ConfigError('autoencoder is empty, expected "none", "shapes" or a folder')
        if self.transfusion.enabled:
            self._check_transfusion()
        elif self.transfusion.text is not None:
            raise ConfigError("transfusion.text is for models of text and images: set transfusion.enabled=true too")
        elif isinstance(self.init, tuple):
            raise ConfigError(f"init names {len(self.init)} folders: an MMDiT starts from one")
        if self.data.buckets == "own" and not self.mixes_sizes:
            raise ConfigError(
                'data.buckets is "own": a batch then holds images of many sizes, set training.packing=true'
            )
        if self.transfusion.freeze_text and not self.init:
            raise ConfigError("transfusion.freeze_text needs a language model in init, which is none")
        if self.lora.rank and (self.transfusion.enabled or not self.init):
            raise ConfigError("lora.rank needs an MMDiT's weights to adapt: name them in init, without transfusion")
        self._check_optimizer()
        self._check_sampling()

    def _check_transfusion(self) -> None:
        if self.text.encoder != "learned":
            raise ConfigError(
                f'text.encoder is "{self.text.encoder}": a transfusion trunk reads words itself, expected "learned"'
            )
        if self.model.dual_attention_layers:
            raise ConfigError(
                "model.dual_attention_layers is for the MMDiT: a transfusion trunk has no second attention"
            )
        if self.model.positions == "sincos" or self.model.head_dim % 8:
            raise ConfigError(
                f'model.positions is "{self.model.positions}" and model.head_dim {self.model.head_dim}: '
                'a transfusion trunk needs "rope" or "both", which give text its positions too, and a multiple of 8'
            )
        if self.training.packing:
            raise ConfigError("training.packing is for the MMDiT: text and images are always packed in a transfusion")
        if self.transfusion.text is not None and not 0 < self.text_documents < self.training.batch_size:
            raise ConfigError(
                f"transfusion.text_fraction is {self.transfusion.text_fraction:g}: of training.batch_size = "
                f"{self.training.batch_size} that is {self.text_documents} documents of text; at least one, and one "
                "picture, have to be in each of training.grad_accumulation's parts"
            )

    def _check_optimizer(self) -> None:
        if self.optimizer.name == "schedule-free" and (self.training.ema_decay or self.training.ema != "exponential"):
            raise ConfigError(
                'optimizer.name "schedule-free" averages its weights itself: set training.ema_decay=0 and '
                'training.ema="exponential"'
            )
        base = self.optimizer.base_width
        if base is not None and base % self.model.head_dim:
            raise ConfigError(
                f"optimizer.base_width is {base}, expected a multiple of model.head_dim = {self.model.head_dim}: "
                "widths grow by their number of heads"
            )
        if base is not None and self.lora.rank:
            raise ConfigError(
                f"optimizer.base_width is {base} and lora.rank {self.lora.rank}: adapters have no width to scale by; "
                "leave out one of the two"
            )

    def _check_sampling(self) -> None:
        """Refuse a solver that cannot take sampling.num_steps steps now, not at the run's first grid of samples."""
        from mmdit.sampling import check_solver
        from samplers import time_grid

        how = self.sampling
        try:
            check_solver(how.solver, time_grid("uniform", how.num_steps, self.objective.shift))
        except ValueError as error:
            raise ConfigError(
                f'sampling.solver = "{how.solver}" with sampling.num_steps = {how.num_steps}: {error}'
            ) from error

    @property
    def mixes_sizes(self) -> bool:
        """Whether a batch may hold images of several sizes, which it can where its samples are packed."""
        return self.training.packing or self.transfusion.enabled

    @property
    def text_documents(self) -> int:
        """How many of a batch's samples are documents of text alone; each part of the batch has as many."""
        parts = self.training.grad_accumulation
        return parts * round(self.training.batch_size // parts * self.transfusion.text_fraction)

    @property
    def init_paths(self) -> tuple[str, ...]:
        """The paths that `init` names, none or several."""
        return (self.init,) if isinstance(self.init, str) else self.init or ()

    @property
    def run_folder(self) -> Path:
        """The folder of the run."""
        return Path(self.training.out) if self.training.out is not None else Path("runs") / self.name


def load_config(source: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """The config of a preset's name, a TOML file or a run folder, with "section.key=value" overrides applied.

    A file is checked together with the overrides, which may give what its settings need. Raises ConfigError for a file
    that is missing or not TOML, an unknown key, a wrong type, a value out of range, and a key that takes no effect
    (idle.py), if the overrides or a file set it that a person wrote.
    """
    from training.presets import preset, preset_names

    if str(source) in preset_names():  # a folder of the same name is written ./demo
        return apply_overrides(preset(str(source)), overrides)
    path = Path(source) / CONFIG_FILE if os.path.isdir(source) else Path(source)
    if os.path.isdir(source) and not path.exists():
        raise ConfigError(
            f"{source} is no run folder, it has no {CONFIG_FILE}; pictures are named beside a config: --data {source}"
        )
    if not os.path.isfile(path):
        near = get_close_matches(str(source), preset_names(), n=1)
        hint = f'; did you mean the preset "{near[0]}"?' if near else f"; the presets are {', '.join(preset_names())}"
        raise ConfigError(f'there is no config file "{path}"{hint}')
    default, table = _read_toml(path)
    changes = settings.table_of(TrainConfig, overrides)
    alone: TrainConfig | ConfigError
    try:
        alone = settings.merged(default, table)
    except ConfigError as error:
        alone = error
    try:
        final = settings.merged(default, settings.updated(table, changes))
    except ConfigError as error:
        raise (_in_file(path, error) if str(error) == str(alone) else error) from error
    refuse_idle(final, settings.keys_in(changes))
    set_keys = settings.keys_in(table)
    whole = not {*settings.keys(TrainConfig)} - {*set_keys}  # as a run's file, which has every key
    if path.name != CONFIG_FILE and not whole and isinstance(alone, TrainConfig):
        refuse_idle(final, idle_settings(alone, set_keys), f"{path}: ")
    return final


def read_config(path: str | Path) -> tuple[TrainConfig, list[str]]:
    """(the config in a TOML file, on top of the preset that it names, if any; the keys that the file sets)."""
    default, table = _read_toml(path)
    try:
        return settings.merged(default, table), settings.keys_in(table)
    except ConfigError as error:
        raise _in_file(path, error) from error


def _read_toml(path: str | Path) -> tuple[TrainConfig, dict[str, Any]]:
    """(the preset that a TOML file names, or the defaults; the table of what the file sets)."""
    from training.presets import preset

    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        if len(text) > MAX_CHARACTERS or any(line.count(".") > MAX_DOTS for line in text.split("\n")):
            raise ValueError(f"it has over {MAX_CHARACTERS:,} characters, or a line with over {MAX_DOTS:,} dots")
        table = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is no valid TOML: {error}") from error
    base = table.pop("preset", None)
    if base is not None and not isinstance(base, str):
        raise ConfigError(f"{path}: preset is {base!r}, expected a preset's name")
    try:
        return TrainConfig() if base is None else preset(base), {"name": path.stem, **table}
    except ConfigError as error:
        raise _in_file(path, error) from error


def _in_file(path: str | Path, error: ConfigError) -> ConfigError:
    return ConfigError(f"{path}: {error}")


def apply_overrides(config: TrainConfig, overrides: Sequence[str]) -> TrainConfig:
    """The config with "section.key=value" assignments; values are TOML, or bare strings where that needs no quotes.

    Raises ConfigError for a key that is unknown or takes no effect with the others, and for a value that does not fit.
    """
    table = settings.table_of(TrainConfig, overrides)
    config = settings.merged(config, table)
    refuse_idle(config, settings.keys_in(table))
    return config
