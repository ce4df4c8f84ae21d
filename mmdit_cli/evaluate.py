"""`mmdit evaluate`: validation loss and scores of a run, or scores of a folder of pictures."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmdit_cli.sample import (
    Checkpoint,
    Device,
    DeviceName,
    Diffusion,
    Guidance,
    Solver,
    Steps,
    load_checkpoint_into,
    parse_diffusion,
)

if TYPE_CHECKING:
    from mmdit import TextToImage


def evaluate(
    run: Annotated[
        Path | None, typer.Argument(metavar="RUN", help="Run folder of `mmdit train`.", show_default=False)
    ] = None,
    data: Annotated[str | None, typer.Option(metavar="SPEC", help="The run's samples, if they were moved.")] = None,
    text: Annotated[
        str | None, typer.Option(metavar="FILES", help="Text to score: nats per token, by a model of text and images.")
    ] = None,
    images: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Score these pictures instead of a run's.")
    ] = None,
    metrics: Annotated[
        str | None, typer.Option(metavar="NAMES", help="Of fid,kid,precision-recall,clip-score,cmmd.")
    ] = None,
    features: Annotated[
        str | None, typer.Option(metavar="PATH", help="Network of fid, kid and precision-recall.")
    ] = None,
    clip: Annotated[str | None, typer.Option(metavar="PATH", help="Network of clip-score and cmmd.")] = None,
    reference: Annotated[
        str | None, typer.Option(metavar="SPEC", help="Pictures to compare with, named as in data.source.")
    ] = None,
    num_images: Annotated[int | None, typer.Option(min=1, metavar="N", help="Number of pictures to score.")] = None,
    num_reference: Annotated[int | None, typer.Option(min=1, metavar="N", help="Use only N of the reference.")] = None,
    checkpoint: Checkpoint = None,
    weights: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Score these weights of the run, as `mmdit ema` writes them.")
    ] = None,
    solver: Solver = None,
    diffusion: Diffusion = None,
    steps: Steps = None,
    guidance: Guidance = None,
    device: Device = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the scores there, as JSON, and nothing into the run.")
    ] = None,
) -> None:
    """Measure a run: held-out loss, on drawn data ShapesEval's six questions, and with --metrics scores by networks.

    What is not given is taken from the run's config (\\[evaluation]). Scores of a --checkpoint, of --weights or with
    another --text are printed, and written to --out alone.

    [bold]Examples[/bold]

      mmdit evaluate runs/demo

      mmdit evaluate runs/mine --metrics fid,clip-score --features inception.safetensors --clip clip-vit-large-patch14/

      mmdit evaluate runs/mine --weights wider/ --guidance 2 --out wider.json

      mmdit evaluate runs/mine --text wikitext/test.txt --out text.json

      mmdit evaluate --images samples/ --reference photos/ --metrics kid,precision-recall --features dinov2-large/
    """
    if (run is None) == (images is None):
        raise ValueError("what is to be scored? name a run (mmdit evaluate RUN), or pictures with --images FOLDER")
    if run is None and data is not None:
        raise ValueError(
            "--data is for a run; pictures are named by --images, and those to compare with by --reference"
        )
    how = {"solver": solver, "diffusion": parse_diffusion(diffusion), "num_steps": steps, "guidance": guidance}
    of_run = {"text": text, "checkpoint": checkpoint, "weights": weights} | how
    if run is None and (idle := [name for name, value in of_run.items() if value is not None]):
        option = {"num_steps": "steps"}.get(idle[0], idle[0])
        raise ValueError(f"--{option} is for a run: the pictures of --images are drawn already")
    if checkpoint is not None and weights is not None:
        raise ValueError("--checkpoint and --weights each say what to score: give one of them")
    given = {
        "metrics": None if metrics is None else tuple(name.strip() for name in metrics.split(",")),
        "features": features,
        "clip": clip,
        "reference": reference,
        "num_images": num_images,
        "num_reference": num_reference,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if run is not None:
        import training

        pipe, own = _pipe(run, checkpoint, weights, device), {"out": out, "device": device, "text": text}
        show(training.evaluate_run(run, given, data, progress=True, pipe=pipe, **own, **how))
    else:
        from training.config import EvaluationConfig
        from training.quality import evaluate_images

        scored = EvaluationConfig(**given)  # type: ignore[arg-type]
        show(evaluate_images(str(images), scored, num_images, out, device=device or "auto"))


def _pipe(run: Path, checkpoint: str | None, weights: Path | None, device: DeviceName | None) -> "TextToImage | None":
    """The model to score; None for that of the run."""
    if checkpoint is None and weights is None:
        return None
    import mmdit
    from training.devices import pick_device

    pipe = mmdit.TextToImage.load(weights or run, None if device is None else pick_device(device))
    if checkpoint is not None:
        load_checkpoint_into(pipe, run, checkpoint)
    return pipe


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
