"""`mmdit cache`: compute latents and text features once, to train on; and verify that they are whole."""

import re
import shlex
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmdit_cli.train import split_words

if TYPE_CHECKING:
    from training.cache_writer import Written


class Number(StrEnum):
    """Types of the numbers stored."""

    fp16 = "fp16"
    bf16 = "bf16"
    fp32 = "fp32"


def cache(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="CONFIG KEY=VALUE",
            help="The config to be trained, as for `mmdit train`: a preset's name or a TOML file, then settings.",
            show_default=False,
        ),
    ] = None,
    data: Annotated[str | None, typer.Option(metavar="SPEC", help="Images and captions, as for `mmdit train`.")] = None,
    out: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Folder to write; an unfinished one is continued.")
    ] = None,
    part: Annotated[
        str, typer.Option(metavar="I/N", help="Write only part I of N, from 0, while others write the rest.")
    ] = "0/1",
    dtype: Annotated[Number, typer.Option(help="Type of the latents.")] = Number.fp16,
    text_dtype: Annotated[Number, typer.Option(help="Type of a frozen text encoder's features.")] = Number.fp16,
    shard_mb: Annotated[float, typer.Option(metavar="MB", help="Size of a shard at most.")] = 256,
    verify: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER", help="Check every byte of a cache; with --data also whether the data is unchanged."
        ),
    ] = None,
) -> None:
    """Compute latents and text features once; train with `--data FOLDER`. Ctrl-C keeps what is there.

    Images are read by data.num_workers processes. Text features are those of a frozen text.encoder.

    [bold]Examples[/bold]

      mmdit cache my.toml --data my_images/ --out cache/

      mmdit cache latent --data "shards/*.tar" --out cache/ --part 0/4 data.num_workers=8

      mmdit cache --verify cache/

      mmdit cache --verify s3://bucket/cache/cache.json

      mmdit train my.toml --data cache/
    """
    config_name, settings = split_words(words or [])
    if verify is not None:
        if config_name is not None or settings or out is not None:
            raise ValueError("--verify takes a cache alone, and --data where that is to be compared")
        return _verify(verify, data)
    if config_name is None or out is None:
        raise ValueError("which config, and where to? mmdit cache CONFIG --data SPEC --out FOLDER")
    if data is not None:
        settings.append(f"data.source={data}")
    numbers = re.fullmatch(r"(\d+)/(\d+)", part)
    if not numbers:
        raise ValueError(f'--part is "{part}", expected I/N, such as 0/4')

    from training.cache_writer import CacheOptions, write_cache
    from training.config import load_config

    options = CacheOptions(dtype.value, text_dtype.value, shard_mb, (int(numbers[1]), int(numbers[2])))
    _report(Path(out), options.part, write_cache(load_config(config_name, settings), out, options), words or [])


def _report(folder: Path, part: tuple[int, int], written: "Written", words: list[str]) -> None:
    if written.samples:
        bad = f", {written.bad} of them bad" if written.bad else ""
        rate = written.samples / max(written.seconds, 1e-9)
        print(f"{folder}: {written.samples} samples{bad}, {written.seconds:.0f} s, {rate:.0f} a second")
    if written.missing_here:
        print("stopped, all is kept; go on with the same command")
    elif written.missing:
        print(f"part {part[0]}/{part[1]} is whole; {written.missing} shards of other parts are missing")
        if written.shards < part[1]:
            print(f"there are fewer shards ({written.shards}) than parts: make them smaller by --shard-mb")
    else:
        if not written.samples:
            print(f"nothing was missing; is the data what it was? mmdit cache --verify {folder} --data SPEC")
        size = sum(file.stat().st_size for file in folder.glob("shard-*"))
        print(f"whole, {size / 1e6:.1f} MB; train with: mmdit train {shlex.join(words)} --data {folder}")


def _verify(spec: str, data: str | None) -> None:
    from training.cache import Cache, CacheError
    from training.cache_writer import changed, data_of
    from training.progress import Progress

    found = Cache(spec)
    with Progress("verifying", len(found.shards) + (found.empty is not None), images=0) as progress:
        problems = found.problems(progress.show)
    if data is not None and not problems:
        with Progress("comparing", len(found.samples)) as progress:
            problems = changed(found, data_of(found, data), progress.show)
    for problem in problems[:20]:
        print(problem)
    if problems:
        count = f"{len(problems)} problems" if len(problems) > 1 else "1 problem"
        raise CacheError(f"{spec} does not verify: {count}, the first: {problems[0]}")
    shards = f"{len(found.shards)} shards" if len(found.shards) > 1 else "1 shard"
    print(f"{spec}: {len(found.samples)} samples in {shards}, all as they were written")
