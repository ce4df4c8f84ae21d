"""`mmdit train`: a new run from a preset or a TOML file, or an old one continued."""

import os
from pathlib import Path
from typing import Annotated

import typer


def train(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="CONFIG KEY=VALUE",
            help="A preset's name or a TOML file, then settings such as training.num_steps=20000.",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="SPEC",
            help="Images: a folder, .tar shards, Parquet, hf:NAME, a cache, shapes (docs/data.md).",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Folder to write; default: runs/ and the run's name.")
    ] = None,
    init: Annotated[
        str | None, typer.Option(metavar="WEIGHTS", help="Start from these: a run, a diffusers folder, an SD3 file.")
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE", help="Train adapters alone: rank=16, alpha=16, targets=all.", show_default=False
        ),
    ] = None,
    resume: Annotated[Path | None, typer.Option(metavar="RUN", help="Continue this run where it stopped.")] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Continue the run if its folder has a checkpoint, else start it.")
    ] = False,
) -> None:
    """Train a model; Ctrl-C saves, --resume goes on.

    [bold]Examples[/bold]

      mmdit train demo

      mmdit train my.toml --data my_images/ training.num_steps=20000

      mmdit train latent --data "shards/*.tar" --out runs/mine optimizer.lr=2e-4

      mmdit train --resume runs/mine

      mmdit train my.toml --init runs/demo --lora rank=16 --data my_images/

      torchrun --nproc-per-node 8 -m mmdit_cli train my.toml parallel.strategy=fsdp

    All keys with their meanings: docs/config.md. Presets: demo, transfusion-demo, latent, pixels-tiny.
    """
    config_name, settings = split_words(words or [])
    if resume is not None and out is not None:
        raise ValueError("--resume names the run folder already; leave out --out")
    if restart and (resume is not None or config_name is None):
        raise ValueError("--restart goes with a config, which it begins or continues; --resume RUN only continues")
    if resume is None and config_name is None:
        raise ValueError("which config? name a preset or a TOML file (mmdit train demo), or --resume RUN")
    if data is not None:
        settings.append(f"data.source={data}")
    if init is not None:
        settings.append(f"init={init}")
    for word in lora or []:
        if "=" not in word:
            raise ValueError(f'--lora is "{word}", expected KEY=VALUE, such as rank=16')
        settings.append(f"lora.{word}")
    if out is not None or (resume is not None and config_name is not None):
        settings.append(f"training.out={out or resume}")

    import training
    from training.config import load_config

    if config_name is not None:
        config = load_config(config_name, settings)
        training.train(config, resume is not None, restart)
    else:
        training.resume(resume, settings)


def split_words(words: list[str]) -> tuple[str | None, list[str]]:
    """The config's name (or None) and the key=value settings. Raises ValueError for a second name."""
    settings = [word for word in words if "=" in word and not os.path.isfile(word)]
    names = [word for word in words if word not in settings]
    if len(names) > 1:
        raise ValueError(f'"{names[1]}" is no setting; expected key=value after the config "{names[0]}"')
    return (names[0] if names else None), settings
