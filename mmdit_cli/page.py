"""The page of `mmdit web`, and how pictures and words reach it while they are being made."""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import gradio as gr
from PIL import ImageOps
from PIL.Image import Image  # gradio reads the hints of what it calls

import samplers
from mmdit.edit import Edit
from mmdit.generate import TextSampling, Written
from mmdit.pictures import as_shown
from mmdit.sampling import Sampling
from mmdit.text_and_images import TransfusionPipeline

if TYPE_CHECKING:
    from mmdit.text_to_image import TextToImage

THEME = gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])  # no font is fetched
TALL = 660  # height of the pictures, in the page's pixels
MOST = 16  # pictures at once
EVERY = 0.5  # seconds between two previews of pictures that are being drawn
KEPT = 3600  # seconds that shown pictures stay in gradio's temporary folder

Tell = Callable[[Any], None]


def make_page(pipe: TextToImage, name: str) -> gr.Blocks:
    """A page that draws with a pipeline, and writes text if the model can. name: the page's name for the model."""
    with gr.Blocks(title=f"mmdit: {name}", delete_cache=(KEPT, KEPT), analytics_enabled=False) as page:
        gr.Markdown(f"## {name}")
        if isinstance(pipe, TransfusionPipeline):
            with gr.Tab("Draw"):
                _drawing(pipe)
            with gr.Tab("Write"):
                _writing(pipe)
        else:
            _drawing(pipe)
    return page


def _drawing(pipe: TextToImage) -> None:
    """The controls that draw pictures for a prompt."""
    own = Sampling.of(pipe.sampling, {})
    with gr.Row():
        with gr.Column(scale=2):
            prompt = gr.Textbox(label="Prompt", lines=2, autofocus=True)
            negative = gr.Textbox(label="Negative prompt", visible=not isinstance(pipe, TransfusionPipeline))
            with gr.Row():
                go = gr.Button("Draw", variant="primary", min_width=90)
                stop, other = gr.Button("Stop", min_width=90), gr.Button("New seed", min_width=90)
            with gr.Row():
                count = gr.Slider(1, MOST, 4, step=1, label="Pictures")
                seed = gr.Number(0, label="Seed of the first", precision=0, minimum=0)
            with gr.Row():
                steps = gr.Slider(1, max(100, own.num_steps), own.num_steps, step=1, label="Steps")
                guidance = gr.Slider(
                    min(0, own.guidance), max(15, own.guidance), own.guidance, step=0.1, label="Guidance"
                )
            solver = gr.Dropdown(list(samplers.solver_names()), value=own.solver, label="Solver")
            with gr.Accordion("Size, or a picture to start from", open=False):
                with gr.Row():
                    height = gr.Number(pipe.size[0], label="Height", precision=0, step=pipe.step, minimum=pipe.step)
                    width = gr.Number(pipe.size[1], label="Width", precision=0, step=pipe.step, minimum=pipe.step)
                start = gr.Image(label="Picture", type="pil", image_mode=None)
                strength = gr.Slider(0.05, 1, 0.6, step=0.05, label="Strength (1 forgets the picture)")
        with gr.Column(scale=3):
            gallery = gr.Gallery(label="Pictures", columns=2, format="png", object_fit="contain", height=TALL)
            said = gr.Markdown()

    def draw(given: dict[Any, Any]) -> Iterator[tuple[Any, str]]:
        seeds = [(given[seed] or 0) + i for i in range(given[count])]
        size = given[height] or pipe.size[0], given[width] or pipe.size[1]
        how: dict[str, Any] = {"solver": given[solver], "num_steps": given[steps], "guidance": given[guidance]}
        how |= {"height": size[0], "width": size[1], "diffusion": _noise(given[solver], own)}
        edit = None if given[start] is None else Edit(_fit(given[start], *size), given[strength])
        prompts, leave = [given[prompt]] * len(seeds), given[negative] or None

        begun = time.perf_counter()
        for pictures, step in while_made(lambda tell: _draw(pipe, tell, prompts, leave, seed=seeds, edit=edit, **how)):
            line = step or f"{given[solver]}, {given[steps]} steps, guidance {given[guidance]:g}"
            shown = list(zip(pictures, (f"seed {s}" for s in seeds), strict=True))
            yield shown, f"{line}, {time.perf_counter() - begun:.1f} s"

    given = {prompt, negative, count, seed, steps, guidance, solver, height, width, start, strength}
    drawn = gr.on([go.click, prompt.submit], draw, given, [gallery, said], show_progress="hidden", api_name="draw")
    stop.click(None, cancels=[drawn])
    other.click(lambda: random.randrange(2**31), None, seed, api_visibility="private")


def _draw(pipe: TextToImage, tell: Tell, *asked: Any, **how: Any) -> None:
    """Call `tell((pictures, step in words))` every so often, with a preview, and at the end.

    Never without pictures: after a `gr.skip()` gradio would forget the files of a gallery, and not delete them.
    """
    looked = time.perf_counter()

    def look(progress: samplers.Progress) -> None:
        nonlocal looked
        if time.perf_counter() - looked > EVERY:
            pictures, looked = pipe.preview(progress), time.perf_counter()
            tell((pictures, f"step {progress.index + 1} of {progress.num_steps}"))

    tell((pipe(*asked, callback=look, **how), ""))


def _noise(solver: str | None, own: Sampling) -> str | float | None:
    """The diffusion for a solver chosen on the page: the model's own if the solver takes one, "kl" if it needs one."""
    chosen = samplers.make_solver(solver or own.solver, samplers.RectifiedFlow())
    if not chosen.takes_diffusion:
        return None
    if own.diffusion is not None:
        return own.diffusion
    return "kl" if isinstance(chosen, samplers.SDESolver) else None


def _writing(pipe: TransfusionPipeline) -> None:
    """The controls that continue a picture and a text."""
    with gr.Row():
        with gr.Column(scale=2):
            picture = gr.Image(label="Picture", type="pil", image_mode=None)
            text = gr.Textbox(label="Text, after the picture if there is one", lines=2)
            with gr.Row():
                go, stop = gr.Button("Write", variant="primary"), gr.Button("Stop")
            temperature = gr.Slider(0, 2, 1, step=0.05, label="Temperature (0 takes the likeliest)")
            with gr.Row():
                words = gr.Slider(0, 1024, 64, step=1, label="Most tokens")
                images = gr.Slider(0, MOST, 1, step=1, label="Most pictures")
            seed = gr.Number(0, label="Seed", precision=0, minimum=0)
        with gr.Column(scale=3):
            written = gr.Textbox(label="Text", lines=6)
            drawn = gr.Gallery(label="Pictures", columns=2, format="png", object_fit="contain", height=TALL)
            said = gr.Markdown()

    def write(
        picture: Image | None, text: str, temperature: float, words: int, images: int, seed: int | None
    ) -> Iterator[tuple[str, list[Image], str]]:
        prompt = ([] if picture is None else [pipe.fitted(picture)]) + [text] * bool(text)
        how = {"max_tokens": words, "max_images": images, "text": TextSampling(temperature)}

        def work(tell: Tell) -> None:
            [written] = pipe.generate([prompt], seed or 0, lambda _, part: tell([part]), **how)
            tell(written)

        parts, line = list[Any](), ""
        for new in while_made(work):
            if isinstance(new, Written):
                parts, line = new.parts, "" if new.stopped == "end" else "Stopped at a limit, not at an end."
                text = " ".join(part for part in parts if isinstance(part, str))  # each without the space it began with
            else:
                parts += new
                text = "".join(part for part in parts if isinstance(part, str))
            yield text, [part for part in parts if not isinstance(part, str)], line

    given = [picture, text, temperature, words, images, seed]
    wrote = gr.on(
        [go.click, text.submit], write, given, [written, drawn, said], show_progress="hidden", api_name="write"
    )
    stop.click(None, cancels=[wrote])


def _fit(picture: Image, height: int, width: int) -> Image:
    """A picture cut and scaled to a size."""
    return ImageOps.fit(as_shown(picture), (width, height))


class _Stopped(Exception):
    """Raised in the thread of the work when its result is no longer wanted."""


def while_made(work: Callable[[Tell], None]) -> Iterator[Any]:
    """The values that `work` passes to `tell`, as they come. The work runs in a thread, which ends at its next `tell`
    once this iterator is closed. Its ValueError is raised as the page's own error, which the page shows.
    """
    messages: queue.SimpleQueue[tuple[Any, BaseException | None] | None] = queue.SimpleQueue()
    closed = threading.Event()

    def tell(part: Any) -> None:
        if closed.is_set():
            raise _Stopped
        messages.put((part, None))

    def run() -> None:
        try:
            work(tell)
        except BaseException as error:  # raised again below
            messages.put((None, error))
        messages.put(None)

    thread = threading.Thread(target=run, name="work of the page", daemon=True)
    thread.start()
    try:
        while (item := messages.get()) is not None:
            part, error = item
            if isinstance(error, ValueError):
                raise gr.Error(str(error), print_exception=False) from error
            if error is not None:
                raise error
            yield part
    finally:
        closed.set()
        thread.join()
