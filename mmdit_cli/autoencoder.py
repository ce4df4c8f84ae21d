"""`mmdit autoencoder`: train one on your own images, and measure one."""

from pathlib import Path
from typing import Annotated

import typer

HELP = """Train an autoencoder on your images, or measure one.

[bold]Examples[/bold]

  mmdit autoencoder train --data my_images/ --out runs/autoencoder

  mmdit autoencoder evaluate runs/autoencoder --data my_images/
"""
app = typer.Typer(no_args_is_help=True, help=HELP)


@app.command()
def train(
    data: Annotated[str, typer.Option(metavar="SPEC", help="Images, as for `mmdit train`; captions are not needed.")],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Folder to write; new or empty.")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Settings such as num_steps=2000.", show_default=False),
    ] = None,
) -> None:
    """Train an autoencoder, for `autoencoder=FOLDER` of `mmdit train`.

    [bold]Examples[/bold]

      mmdit autoencoder train --data my_images/ --out runs/autoencoder

      mmdit autoencoder train --data "shards/*.tar" --out runs/ae num_steps=20000
    """
    from training.autoencoder import AutoencoderTrainConfig, train_autoencoder
    from training.settings import overridden

    train_autoencoder(overridden(AutoencoderTrainConfig(), [*(settings or []), f"data={data}", f"out={out}"]))


@app.command()
def evaluate(
    folder: Annotated[
        str, typer.Argument(metavar="FOLDER", help='Folder of an autoencoder, or "shapes".', show_default=False)
    ],
    data: Annotated[str, typer.Option(metavar="SPEC", help="Images, as for train; the held-out ones are taken.")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Settings of the data, such as image_size=64.", show_default=False),
    ] = None,
) -> None:
    """Measure one on held-out images: PSNR in dB, statistics of the latents.

    [bold]Example[/bold]

      mmdit autoencoder evaluate runs/autoencoder --data my_images/
    """
    from mmdit.autoencoder import PixelSpace, open_autoencoder
    from mmdit_cli.evaluate import show
    from training.autoencoder import AutoencoderTrainConfig, channel_statistics, held_out_psnr, read_held_out
    from training.settings import overridden

    model = open_autoencoder(folder)
    if isinstance(model, PixelSpace):
        raise ValueError(f'"{folder}" is no autoencoder but pixels, which lose nothing; name a folder or "shapes"')
    config = overridden(AutoencoderTrainConfig(), [*(settings or []), f"data={data}"])
    images = read_held_out(config, model.factor)
    mean, std = channel_statistics(model, images)
    show(
        {
            "held-out images": len(images),
            "PSNR (dB)": held_out_psnr(model, images),
            "latent mean": mean.mean().item(),
            "latent std": std.square().mean().sqrt().item(),
        }
    )
