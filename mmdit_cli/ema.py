"""`mmdit ema`: a run's weights, averaged over another width than in training."""

from pathlib import Path
from typing import Annotated

import typer

from mmdit_cli.convert import check_new


def ema(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder of `mmdit train`.", show_default=False)],
    sigma_rel: Annotated[
        float, typer.Option(metavar="X", help="Width of the average over the steps done.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Folder to write, as in RUN/pipeline.")],
    step: Annotated[int | None, typer.Option(metavar="N", help="Step of a snapshot to end at; the last.")] = None,
) -> None:
    """Write a pipeline with the average of any width (EDM2), of a run with training.ema=power.

    [bold]Example[/bold]

      mmdit ema runs/mine --sigma-rel 0.12 --out wider/

      mmdit sample wider/ "a red circle"
    """
    check_new(out)

    import mmdit
    from mmdit_cli.sample import load_state_into
    from training.ema import reconstruct
    from training.run import RunFolder

    state = reconstruct(RunFolder.open(run).path, sigma_rel, step)
    pipe = mmdit.TextToImage.load(run, "cpu")
    load_state_into(pipe, run, state, str(run))
    pipe.save(out)
    print(f"{out}  the average of width {sigma_rel:g} of {run}")
