"""`mmdit sample`: prompts to pictures, from a run folder, a diffusers SD3 pipeline, or SD3's single file."""

import re
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmdit_cli.convert import DType

if TYPE_CHECKING:
    from collections.abc import Mapping

    from PIL.Image import Image
    from torch import Tensor

    from mmdit import TextToImage


# Options of the sampler, here and in `mmdit generate`.
Solver = Annotated[str | None, typer.Option(metavar="NAME", help="Solver: euler, heun, dpmpp-2m, ...")]
Diffusion = Annotated[
    str | None, typer.Option(metavar="NAME", help="Noise of an SDE solver: kl, sigma, sin2, constant, or a number eta.")
]
Steps = Annotated[int | None, typer.Option(min=1, metavar="N", help="Steps of the solver.")]
Guidance = Annotated[float | None, typer.Option(metavar="SCALE", min=0, help="Classifier-free guidance; 1 is none.")]
Size = Annotated[str | None, typer.Option(metavar="HxW", help="Height and width in pixels, such as 64x96.")]

# Options of the pipeline to open, here and in `mmdit web`; of some in `mmdit evaluate` and `mmdit generate` too.
Run = Annotated[
    Path,
    typer.Argument(
        metavar="RUN",
        help="Run folder of `mmdit train`, diffusers SD3 pipeline, or SD3's single file.",
        show_default=False,
    ),
]
Checkpoint = Annotated[str | None, typer.Option(metavar="NAME", help="A folder in RUN/checkpoints, or its step.")]
Text = Annotated[
    str | None, typer.Option(metavar="FOLDER", help="Tokenizers of a single file, and encoders that it lacks.")
]
Autoencoder = Annotated[str | None, typer.Option(metavar="SPEC", help="Autoencoder of a single file that has none.")]
Without = Annotated[
    list[str] | None, typer.Option(metavar="NAME", help="Encoder of SD3 to leave out: clip_l, clip_g, t5.")
]
TrunkType = Annotated[DType | None, typer.Option(help="Type of the trunk's numbers, float32 by default.")]


class DeviceName(StrEnum):
    """Where to compute."""

    cpu = "cpu"
    cuda = "cuda"
    mps = "mps"


Device = Annotated[
    DeviceName | None, typer.Option(help="Where to compute, CUDA by default if there is one; mps is the GPU of a Mac.")
]


def sample(
    run: Run,
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT", help="One picture a prompt.", show_default=False)],
    out: Annotated[Path, typer.Option(metavar="FILE", help="Picture to write; several get -0, -1, ...")] = Path(
        "out.png"
    ),
    solver: Solver = None,
    diffusion: Diffusion = None,
    steps: Steps = None,
    guidance: Guidance = None,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Seed of the noise; prompt i takes seed + i.")] = 0,
    size: Size = None,
    negative: Annotated[str | None, typer.Option(metavar="TEXT", help="What guidance leads away from.")] = None,
    image: Annotated[Path | None, typer.Option(metavar="FILE", help="Picture to start from; --size fits it.")] = None,
    strength: Annotated[
        float | None, typer.Option(metavar="X", help="Part of the steps that a picture is drawn anew; default: 0.6.")
    ] = None,
    mask: Annotated[Path | None, typer.Option(metavar="FILE", help="White where the picture is drawn anew.")] = None,
    checkpoint: Checkpoint = None,
    text: Text = None,
    autoencoder: Autoencoder = None,
    without: Without = None,
    dtype: TrunkType = None,
    device: Device = None,
) -> None:
    """Draw pictures for prompts; what is not given is taken from the run's config.

    [bold]Examples[/bold]

      mmdit sample runs/demo "a red circle left of a blue square"

      mmdit sample runs/demo "a red circle" "two green stars" --out two.png

      mmdit sample runs/demo "a star" --solver heun --steps 20 --guidance 4 --seed 1

      mmdit sample runs/demo "a red circle" --checkpoint 600 --size 64x96

      mmdit sample runs/demo "a blue star" --image old.png --mask left.png --strength 1

      mmdit sample runs/demo "a blue star" --image photo.jpg --size 64x96

      mmdit sample sd3.5_medium.safetensors "a star" --text my_pipeline/ --without t5 --dtype bfloat16
    """
    sides = parse_size(size) if size is not None else None
    if image is None and mask is not None:
        raise ValueError("--mask says what of a picture is drawn anew: name the picture with --image")
    if image is None and strength is not None:
        raise ValueError("--strength says how far a picture is drawn anew: name the picture with --image")
    files = out_files(out, len(prompts))

    import mmdit

    pipe = open_pipe(run, checkpoint, text, autoencoder, without, dtype, device)
    edit = None
    if image is not None:
        given = {} if strength is None else {"strength": strength}
        old, drawn = (None if file is None else read_picture(file, sides) for file in (image, mask))
        edit = mmdit.Edit(old, mask=drawn, **given)
    how = dict(num_steps=steps, solver=solver, guidance=guidance, diffusion=parse_diffusion(diffusion))
    height, width = sides or (None, None)
    where = dict(height=height, width=width, seed=seed, edit=edit, progress=sys.stderr.isatty())
    pictures = pipe(prompts, negative_prompts=negative, **where, **how)  # type: ignore[arg-type]
    out.parent.mkdir(parents=True, exist_ok=True)
    for file, picture, prompt in zip(files, pictures, prompts, strict=True):
        picture.save(file)
        print(f"{file}  {picture.height}x{picture.width}  {prompt}")


def open_pipe(
    run: Path,
    checkpoint: str | None,
    text: str | None,
    autoencoder: str | None,
    without: list[str] | None,
    dtype: DType | None,
    device: DeviceName | None,
) -> "TextToImage":
    """The pipeline that the options describe."""
    import torch

    import mmdit
    from training.devices import pick_device

    parts: dict[str, Any] = dict(text=text, autoencoder=autoencoder, without=without)
    parts["dtype"] = None if dtype is None else getattr(torch, dtype.value)
    parts["device"] = None if device is None else pick_device(device.value)
    pipe = mmdit.TextToImage.load(run, **{name: value for name, value in parts.items() if value is not None})
    if checkpoint is not None:
        load_checkpoint_into(pipe, run, checkpoint)
    return pipe


def read_picture(file: Path, size: tuple[int, int] | None = None) -> "Image":
    """The picture in a file, as a viewer shows it, or scaled and cropped to (height, width) as training fits pictures.
    Raises ValueError, which names the file, if it cannot be read.
    """
    from PIL import Image

    from training.images import BadImage, read_fitted, read_image

    try:
        return Image.fromarray(read_image(file) if size is None else read_fitted(file, size).image)
    except BadImage as error:
        raise ValueError(f"{file}: {error}") from error


def parse_diffusion(text: str | None) -> str | float | None:
    """A number from "0.5"; a name as it is."""
    try:
        return text if text is None else float(text)
    except ValueError:
        return text


def parse_size(text: str) -> tuple[int, int]:
    """(height, width) in pixels from "64x96", or from one side "64". Raises ValueError for anything else."""
    match = re.fullmatch(r"(\d+)(?:[xX×](\d+))?", text.strip())
    sides = [int(side) for side in match.groups() if side is not None] if match else []
    if not sides or min(sides) < 1:
        raise ValueError(f'--size is "{text}", expected HEIGHTxWIDTH in pixels, such as 64x96')
    return sides[0], sides[-1]


def out_files(out: Path, count: int) -> list[Path]:
    """The files of `count` pictures: out.png, or out-0.png, out-1.png, ... ValueError for an unknown picture format."""
    from PIL import Image

    if out.suffix.lower() not in Image.registered_extensions():
        raise ValueError(f'--out is "{out}", expected the name of a picture, such as {out.stem or "out"}.png')
    if count == 1:
        return [out]
    return [out.with_stem(f"{out.stem}-{i}") for i in range(count)]


def load_checkpoint_into(pipe: "TextToImage", run: Path, name: str) -> None:
    """Replace the pipeline's weights by a checkpoint's, by its average if it has one. ValueError if it is missing."""
    from training.checkpoint import averaged, list_checkpoints, load_checkpoint

    known = {folder.name: folder for folder in list_checkpoints(run)}
    wanted = f"step-{int(name):08d}" if name.isdecimal() else name
    if wanted not in known:
        raise ValueError(f'{run} has no checkpoint "{name}"; it has {", ".join(known) or "none"}')
    _, weights = load_checkpoint(known[wanted])
    load_state_into(pipe, run, averaged(weights), str(known[wanted]))


def load_state_into(pipe: "TextToImage", run: Path, state: "Mapping[str, Tensor]", source: str) -> None:
    """Replace the pipeline's weights by the state of a run's whole model; LoRA adapters are merged into the weights."""
    from mmdit.weights_io import assign_weights

    if any(".lora_A." in key for key in state):
        from mmdit.lora import add_lora, merge_lora
        from training.config import CONFIG_FILE, load_config

        lora = load_config(run / CONFIG_FILE).lora
        add_lora(pipe.model.transformer, lora.rank, lora.alpha, lora.targets)
        assign_weights(pipe.model, state, source)
        merge_lora(pipe.model.transformer)
    else:
        assign_weights(pipe.model, state, source)
