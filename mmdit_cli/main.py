"""The `mmdit` command: its options, its subcommands, and the way it ends on bad input.

mmdit train demo                                  mmdit evaluate RUN
mmdit sample RUN "a red circle" --out out.png     mmdit generate RUN picture.png
mmdit autoencoder train --data FOLDER --out FOLDER  mmdit convert IN OUT --layout diffusers
mmdit ema RUN --sigma-rel 0.1 --out FOLDER
mmdit cache my.toml --data FOLDER --out FOLDER    mmdit cache --verify FOLDER
mmdit web RUN
"""

import io
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from mmdit_cli import autoencoder, errors
from mmdit_cli.cache import cache
from mmdit_cli.convert import convert
from mmdit_cli.ema import ema
from mmdit_cli.evaluate import evaluate
from mmdit_cli.generate import generate
from mmdit_cli.sample import sample
from mmdit_cli.train import train
from mmdit_cli.web import web


class _Group(TyperGroup):
    """Ends expected errors, also those of the argument parser, with one line and exit status 2."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        with _one_line():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        with _one_line():
            return super().invoke(ctx)


@contextmanager
def _one_line() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if type(error).__name__ == "NoArgsIsHelpError" or _reader_left(error):  # not an error: shows the help page
            raise
        if hasattr(error, "format_message"):  # a usage error of the parser, with the context of its subcommand
            place = getattr(getattr(error, "ctx", None), "command_path", "mmdit")
            text = errors.line(ValueError(error.format_message())).rstrip(".")
            errors.complain(f"{text}; see `{place} --help`", alike=True)
        elif errors.is_expected(error):
            errors.complain(errors.line(error), error)
        else:
            raise
        sys.exit(2)


def _reader_left(error: Exception) -> bool:
    """Whether the reader of our output has ended, as with `| head`: click then exits silently, with status 1."""
    if not isinstance(error, BrokenPipeError):
        return False
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        return True
    return False


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(train)
app.command()(sample)
app.command()(generate)
app.command()(evaluate)
app.command()(convert)
app.command()(ema)
app.command()(cache)
app.command()(web)
app.add_typer(autoencoder.app, name="autoencoder")


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            print(f"mmdit {version('mmdit')}")
        except PackageNotFoundError:
            print("mmdit, not installed")
        raise typer.Exit()


@app.callback()
def options(
    ctx: typer.Context,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error, as MMDIT_DEBUG=1 does.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Train a text-to-image MMDiT from scratch on captioned images, sample it and score it."""
    if debug:
        os.environ[errors.DEBUG] = "1"
    command = ctx.invoked_subcommand
    if command != "train" and "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1":
        shares = "; several of it share the work by --part (mmdit cache --help)" if command == "cache" else ""
        raise ValueError(f"`mmdit {command}` is one process, and torchrun started several: start it alone{shares}")


def _spin_less() -> None:
    """Let OpenMP threads that wait for others give up their core sooner.

    torch's OpenMP on Linux (GCC's libgomp) reads this when torch is loaded. By default they spin 300 times as long, and
    where other programs want the cores, the thread that all wait for then gets none.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def _one_progress_bar() -> None:
    """Let process 0 alone show the progress bars of Hugging Face's libraries, which read this when they are loaded."""
    if os.environ.get("RANK", "0") != "0":
        for library in ("HF_HUB", "HF_DATASETS"):  # transformers follows the first
            os.environ.setdefault(f"{library}_DISABLE_PROGRESS_BARS", "1")


def _compile_quietly() -> None:
    """Compile for a CPU without a warning of torch that there is no GPU, where a CUDA toolkit is installed.

    torch and the processes in which it compiles read this when they start; "-" leaves errors.
    """
    os.environ.setdefault("TORCH_LOGS", "-torch.utils.cpp_extension")


def main() -> None:
    """Entry point of the `mmdit` script. Ctrl-C outside of training ends with status 130, as in a shell."""
    _spin_less()
    _one_progress_bar()
    _compile_quietly()
    threading.excepthook = errors.of_thread
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # so that no caption fails to print
    try:
        app()
    except KeyboardInterrupt:
        errors.complain("stopped")
        sys.exit(130)
    except SystemExit as end:
        if end.code and "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
            errors.end_at_once(end.code)
        raise


if __name__ == "__main__":
    main()
