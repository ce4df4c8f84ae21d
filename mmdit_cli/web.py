"""`mmdit web`: a page in the browser that draws with a model, and shows pictures while they are being drawn."""

import os
import threading
from contextlib import suppress
from typing import Annotated

import typer

from mmdit_cli.errors import end_at_once
from mmdit_cli.sample import Autoencoder, Checkpoint, Device, Run, Text, TrunkType, Without, open_pipe


def web(
    run: Run,
    host: Annotated[
        str, typer.Option(metavar="NAME", help="Address to listen at; 0.0.0.0 lets other machines in.")
    ] = "127.0.0.1",
    port: Annotated[
        int | None,
        typer.Option(min=1, max=65535, metavar="N", help="Port to listen at; default: the first free from 7860 on."),
    ] = None,
    browser: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
    checkpoint: Checkpoint = None,
    text: Text = None,
    autoencoder: Autoencoder = None,
    without: Without = None,
    dtype: TrunkType = None,
    device: Device = None,
) -> None:
    """Draw in the browser; with a model of text and images, write too. Needs pip install 'mmdit\\[web]'.

    Nothing leaves the machine. Anyone who reaches the address may draw: there is no password.

    [bold]Examples[/bold]

      mmdit web runs/demo --open

      mmdit web runs/mine --checkpoint 20000 --host 0.0.0.0 --port 8000

      mmdit web sd3.5_medium.safetensors --text my_pipeline/ --dtype bfloat16
    """
    check_gradio()
    from mmdit_cli.page import THEME, make_page

    pipe = open_pipe(run, checkpoint, text, autoencoder, without, dtype, device)
    page = make_page(pipe, str(run))
    try:
        page.queue(default_concurrency_limit=1)  # one thing is drawn at a time, the others wait
        _, url, _ = page.launch(
            server_name=host,
            server_port=port,
            inbrowser=browser,
            share=False,
            quiet=True,
            show_error=True,  # also an unexpected one, which is printed here too
            prevent_thread_lock=True,
            footer_links=[],
            state_session_capacity=100,  # past pages, of which each keeps half a megabyte or more
            theme=THEME,
        )
    except OSError as error:  # gradio's own message names its own parameters
        raise ValueError(
            f"cannot listen at {host}, port {port or '7860 to 7959'}: taken, or no address here"
        ) from error
    print(f"{url}  draws with {run}; Ctrl-C ends it", flush=True)
    with suppress(KeyboardInterrupt):
        threading.Event().wait()
    end_at_once(0)  # else a drawing thread may abort the process, and an open page delay it for seconds


def check_gradio() -> None:
    """Turn gradio's analytics off. Raises ValueError where gradio is not installed."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise ValueError("the page needs a library: pip install 'mmdit[web]'") from error
