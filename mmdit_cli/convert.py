"""`mmdit convert`: a model's weights from one layout to another."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Layout(StrEnum):
    """What `mmdit.save` can write."""

    mmdit = "mmdit"
    diffusers = "diffusers"
    sd3 = "sd3"


class DType(StrEnum):
    """Types of the numbers written."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def convert(
    source: Annotated[
        Path, typer.Argument(metavar="IN", help="Run folder, model folder, or .safetensors file.", show_default=False)
    ],
    out: Annotated[
        Path,
        typer.Argument(
            metavar="OUT", help="Folder to write, new or empty; for sd3 a .safetensors file.", show_default=False
        ),
    ],
    layout: Annotated[Layout, typer.Option(help="diffusers' transformer folder, SD3's single file, or our folder.")],
    dtype: Annotated[DType | None, typer.Option(help="Type of the numbers; as they are if not given.")] = None,
) -> None:
    """Write a model's weights in another layout. Text encoders and autoencoders stay where they are.

    [bold]Examples[/bold]

      mmdit convert runs/demo exported/ --layout diffusers

      mmdit convert sd3.5_medium.safetensors sd35/ --layout mmdit --dtype bfloat16

      mmdit convert my_pipeline/ fine_tuned.safetensors --layout sd3
    """
    check_new(out)

    import torch

    import mmdit

    model = mmdit.load(source, dtype=getattr(torch, dtype.value) if dtype is not None else None)
    mmdit.save(model, out, layout=layout.value)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{out}  {layout.value}, {millions:.1f} M parameters, {str(next(model.parameters()).dtype).split('.')[-1]}")


def check_new(out: Path) -> None:
    """Raises ValueError where something exists that would be overwritten."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists already: name another place to write, or remove it")
