"""`mmdit generate`: text and pictures that go on from text and pictures, from a run of a model of both."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmdit_cli.sample import (
    Device,
    Diffusion,
    Guidance,
    Size,
    Solver,
    Steps,
    out_files,
    parse_diffusion,
    parse_size,
    read_picture,
)

if TYPE_CHECKING:
    from PIL.Image import Image


def generate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder of `mmdit train`.", show_default=False)],
    parts: Annotated[
        list[str], typer.Argument(metavar="PART", help="Text, or a picture's file, in order.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(metavar="FILE", help="Picture to write; several get -0, -1, ...")] = Path(
        "out.png"
    ),
    draw: Annotated[
        bool, typer.Option("--draw", help="Begin with a picture, whatever the text would say next.")
    ] = False,
    max_tokens: Annotated[int, typer.Option(min=0, metavar="N", help="Most tokens of text.")] = 64,
    max_images: Annotated[int, typer.Option(min=0, metavar="N", help="Most pictures.")] = 1,
    temperature: Annotated[float, typer.Option(min=0, metavar="X", help="0 takes the likeliest token always.")] = 1.0,
    top_k: Annotated[int | None, typer.Option(min=1, metavar="N", help="Draw from the N likeliest tokens.")] = None,
    top_p: Annotated[
        float, typer.Option(min=0, max=1, metavar="P", help="Draw from the likeliest tokens that have P together.")
    ] = 1.0,
    min_p: Annotated[
        float, typer.Option(min=0, max=1, metavar="P", help="Draw from tokens at least P times as likely as the first.")
    ] = 0.0,
    solver: Solver = None,
    diffusion: Diffusion = None,
    steps: Steps = None,
    guidance: Guidance = None,
    size: Size = None,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Seed of words and noise.")] = 0,
    device: Device = None,
) -> None:
    """Go on from text and pictures: describe a picture, draw a text, or let the model choose.

    [bold]Examples[/bold]

      mmdit generate runs/transfusion-demo "a red circle" --draw --max-tokens 0

      mmdit generate runs/transfusion-demo picture.png --temperature 0
    """
    drawing = dict(solver=solver, diffusion=diffusion, steps=steps, guidance=guidance, size=size)
    if not max_images and (given := [name for name, value in drawing.items() if value is not None]):
        raise ValueError(f"--{given[0]} says how pictures are drawn, and --max-images 0 that none is")
    if top_p == 0:
        raise ValueError("--top-p 0 leaves no token: give a number above 0; --temperature 0 takes the likeliest always")
    prompt = [_part(part) for part in parts]
    height, width = parse_size(size) if size is not None else (None, None)
    files = out_files(out, max(1, max_images))

    import mmdit
    from mmdit.generate import TextSampling
    from mmdit.text_and_images import TransfusionPipeline
    from training.devices import pick_device

    pipe = mmdit.TextToImage.load(run, device=None if device is None else pick_device(device.value))
    if not isinstance(pipe, TransfusionPipeline):
        raise ValueError(f"{run} is a text-to-image model, which writes no text: draw with `mmdit sample {run} PROMPT`")
    text = TextSampling(temperature, top_k, top_p, min_p)
    free, noise = bool(prompt) and prompt != [""], parse_diffusion(diffusion)
    image = pipe.image_sampling(steps, solver, guidance, height, width, noise, free=free)
    out.parent.mkdir(parents=True, exist_ok=True)
    output = _Output(files)
    limits = dict(max_tokens=max_tokens, max_images=max_images)
    begin = "image" if draw else "text"
    prompt = [part if isinstance(part, str) else pipe.fitted(part) for part in prompt]
    [written] = pipe.generate([prompt], seed, output, text=text, image=image, begin=begin, **limits)
    output.end_line()
    if not any(written.parts):
        print("the model wrote nothing: it ended at once", file=sys.stderr)
    elif written.stopped == "length" and max_tokens:
        print(f"stopped at a limit, not at an end: {max_tokens} tokens (--max-tokens), or the longest the model takes")


class _Output:
    """Prints words as they come, and writes each picture into the next of some files."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files, self.in_line = iter(files), False  # whether a line of text is not ended

    def __call__(self, _: int, part: "str | Image") -> None:
        if isinstance(part, str):
            print(part, end="", flush=True)
            self.in_line = True
        else:
            self.end_line()
            file = next(self.files)
            part.save(file)
            print(f"{file}  {part.height}x{part.width}", flush=True)

    def end_line(self) -> None:
        """End the line of text, if there is one."""
        if self.in_line:
            print(flush=True)
        self.in_line = False


def _part(part: str) -> "str | Image":
    """The picture, if the part names a picture's file, else the text itself. ValueError if that file is missing."""
    from PIL import Image

    suffix = Path(part).suffix.lower()
    if suffix and os.path.isfile(part):  # unlike Path.is_file, it takes a text of any length
        return read_picture(Path(part))
    if suffix in Image.registered_extensions() and len(part.split()) == 1:
        raise ValueError(f"there is no picture {part}")
    return part
