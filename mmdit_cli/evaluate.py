"""`mmdit evaluate`: validation loss and score of a run."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer


def evaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder of `mmdit train`.", show_default=False)],
) -> None:
    """Measure a run: held-out loss and, on drawn data, ShapesEval's six questions.

    [bold]Example[/bold]

      mmdit evaluate runs/demo
    """
    import training

    show(training.evaluate_run(run))


def show(scores: Mapping[str, Any]) -> None:
    """Print a (nested) table of numbers, one line each."""
    rows = list(_flat(scores))
    width = max((len(name) for name, _ in rows), default=0)
    for name, value in rows:
        print(f"{name:<{width}}  {value:.4f}" if isinstance(value, float) else f"{name:<{width}}  {value}")


def _flat(scores: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in scores.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name} / ")
        else:
            yield f"{prefix}{name}", value
