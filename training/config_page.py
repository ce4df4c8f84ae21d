"""The page of all config keys, docs/config.md, from the words of the fields: `python -m training.config_page FILE`."""

import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from training import settings
from training.config import TrainConfig
from training.settings import Settings


def describe() -> str:
    """The page of all keys (Markdown), from the fields' own words: docs/config.md."""
    from training.autoencoder import AutoencoderTrainConfig
    from training.presets import PRESETS

    lines = [
        "# Config keys",
        "",
        "<!-- Written by `make docs` from training/sections.py and presets.py: change those, not this page. -->",
        "",
        "A config is a TOML file with the sections below, or a preset's name. A file may begin with",
        '`preset = "demo"` and then say only what differs.',
        "On the command line any key is set by `section.key=value`, for example",
        "`mmdit train my.toml training.num_steps=20000 optimizer.lr=3e-4`; values are TOML, and strings need no quotes",
        'there. TOML has no null: the string `"none"` stands for it.',
        "A run folder keeps the config as used in `config.toml`.",
        "",
        "A key of yours that has no effect beside the others is refused, and the deciding one is named. Where the key",
        "comes from a preset, or from a file whose setting the command line overrides, the run only warns; so it does",
        "for a run's `config.toml` and copies of it, which give every key.",
        "",
        "## Presets",
        "",
        *(f"- `{name}`: {' '.join((make.__doc__ or '').split())}" for name, make in PRESETS.items()),
    ]
    docs = settings.field_docs(TrainConfig)
    sections = (getattr(TrainConfig(), field.name) for field in fields(TrainConfig))
    hints: dict[str, Any] = {type(part).section: type(part) for part in sections if isinstance(part, Settings)}
    for section in ["", *hints]:
        if section:
            lines += ["", f"## [{section}]", "", " ".join((hints[section].__doc__ or "").split())]
        else:
            lines += ["", "## At the top", "", "Before any section."]
        lines += _table([doc for doc in docs if doc.key.rpartition(".")[0] == section])
    lines += ["", "## `mmdit autoencoder train`", "", " ".join((AutoencoderTrainConfig.__doc__ or "").split())]
    lines += ["These keys have no section: `mmdit autoencoder train --data SPEC --out FOLDER num_steps=20000`."]
    lines += _table(settings.field_docs(AutoencoderTrainConfig))
    return "\n".join(lines) + "\n"


def _table(docs: Sequence[settings.FieldDoc]) -> list[str]:
    lines = ["", "| key | type | default | meaning |", "|---|---|---|---|"]
    for doc in docs:
        cells = (f"`{doc.key.rpartition('.')[2]}`", doc.type, f"`{doc.default}`", doc.meaning)
        lines.append(f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |")
    return lines


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(describe(), encoding="utf-8") if len(sys.argv) > 1 else print(describe(), end="")
