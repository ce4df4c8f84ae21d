"""The page of `mmdit web`: asked as a browser asks it, it gives what the pipeline gives; stopped, the work ends."""

import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("gradio")

import gradio as gr
from gradio_client import Client, handle_file

from mmdit.autoencoder import PixelSpace
from mmdit.generate import Written
from mmdit.text import Tokenizer
from mmdit.text_to_image import TextToImage
from mmdit_cli.page import make_page, while_made
from tests.mmdit.test_text_and_images import TINY, pipeline
from tests.mmdit.test_text_to_image import make_model
from tests.mmdit_cli.command import assert_one_line_error, run
from tests.training.processes import PATIENCE


@pytest.fixture(scope="module")
def pipe():
    return TextToImage(make_model(3, 4), PixelSpace(), (8, 12), sampling={"num_steps": 3, "guidance": 3.0})


@pytest.fixture(scope="module")
def both():
    return pipeline(TINY, Tokenizer.train(["a red circle", "two blue stars"], 280, 8, images=True))


@pytest.fixture(scope="module")
def client(pipe, tmp_path_factory):
    yield from served(make_page(pipe, "tiny"), tmp_path_factory)


@pytest.fixture(scope="module")
def writer(both, tmp_path_factory):
    yield from served(make_page(both, "both"), tmp_path_factory)


def served(page, tmp_path_factory):
    _, url, _ = page.launch(server_name="127.0.0.1", quiet=True, prevent_thread_lock=True)
    yield Client(url, verbose=False, download_files=tmp_path_factory.mktemp("got"))
    page.close()


def pixels(image) -> np.ndarray:
    return np.asarray(image.convert("RGB")).astype(int)


def asked(client, **how):
    """The last that the page shows of a drawing: pictures, their captions, and the line below."""
    given = dict(prompt="a red circle", negative="", pictures=2, seed=5, steps=3, guidance=3.0, solver="euler")
    given |= dict(height=8, width=12, picture=None, strength=0.6)
    assert how.keys() <= given.keys()
    shown, said = client.predict(*(given | how).values(), api_name="/draw")
    return [Image.open(one["image"]) for one in shown], [one["caption"] for one in shown], said


def test_the_page_draws_what_the_pipeline_draws(client, pipe):
    for page_says, how in (
        ({}, {}),
        ({"negative": "two blue stars"}, {"negative_prompts": "two blue stars"}),
        ({"steps": 2, "guidance": 1.0, "solver": "heun"}, {"num_steps": 2, "guidance": 1.0, "solver": "heun"}),
        ({"height": 16, "width": 8}, {"height": 16, "width": 8}),
    ):
        pictures, captions, said = asked(client, **page_says)
        own = pipe(["a red circle"] * 2, seed=5, **({"solver": "euler"} | how))
        assert all(np.array_equal(pixels(a), pixels(b)) for a, b in zip(pictures, own, strict=True))
        assert captions == ["seed 5", "seed 6"] and said.startswith(how.get("solver", "euler"))


def test_a_page_that_stays_open_keeps_no_component_of_past_drawings_and_knows_all_files(pipe, tmp_path_factory):
    """gradio deletes the files that it knows after an hour."""
    page = make_page(pipe, "tiny")
    for asker in served(page, tmp_path_factory):
        for seed in (0, 2, 4):
            asked(asker, seed=seed)
        assert sum(map(len, page.temp_file_sets)) >= 6
        sessions = page.app.state_holder.session_data.values()
        assert [len(session.blocks_config.blocks) for session in sessions] == [len(page.blocks)]


def test_a_picture_to_start_from_is_brought_to_the_size(client, tmp_path):
    red = tmp_path / "red.png"
    Image.new("RGB", (50, 50), "red").save(red)
    [near], _, _ = asked(client, picture=handle_file(red), strength=0.05, pictures=1, steps=20)
    assert near.size == (12, 8)
    assert np.abs(pixels(near) - [255, 0, 0]).mean() < 40


def test_what_cannot_be_drawn_is_said_on_the_page_and_the_next_is_drawn(client):
    with pytest.raises(Exception, match="both sides must be multiples of 4"):
        asked(client, height=9)
    assert len(asked(client)[0]) == 2


def test_any_solver_draws_whatever_the_model_s_own_needs(tmp_path_factory):
    own = {"num_steps": 150, "guidance": 20.0, "solver": "sa-solver", "diffusion": "sigma"}
    pipe = TextToImage(make_model(3, 4), PixelSpace(), (8, 12), sampling=own)
    for asker in served(make_page(pipe, "own"), tmp_path_factory):
        few = {"pictures": 1, "steps": 2}
        for said, how in (
            ({"steps": 150, "guidance": 20.0, "solver": "sa-solver"}, {}),
            ({"solver": "euler"} | few, {"solver": "euler"}),
            ({"solver": "euler-maruyama"} | few, {"solver": "euler-maruyama"}),
        ):
            picture = asked(asker, **said)[0][0]
            how |= {"num_steps": said["steps"], "guidance": said.get("guidance", 3.0)}
            assert np.array_equal(pixels(picture), pixels(pipe("a red circle", seed=5, **how)[0]))


def test_an_sde_solver_takes_kl_where_the_model_has_no_diffusion(client, pipe):
    [picture], _, _ = asked(client, pictures=1, solver="euler-maruyama")
    [own] = pipe("a red circle", seed=5, solver="euler-maruyama", diffusion="kl")
    assert np.array_equal(pixels(picture), pixels(own))


@pytest.mark.slow
def test_ctrl_c_ends_the_command_also_while_it_draws(pipe, tmp_path):
    pipe.save(tmp_path)
    command = [sys.executable, "-m", "mmdit_cli.main", "web", str(tmp_path)]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored, as in background jobs
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            url = process.stdout.readline().split()[0]
            asker = Client(url, verbose=False)
            drawing = asker.submit("x", "", 16, 0, 100, 3.0, "rk4", 32, 32, None, 0.6, api_name="/draw")
            while not drawing.outputs():
                assert not drawing.done()
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            said, _ = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()
            signal.signal(signal.SIGINT, before)
    assert process.returncode == 0, said
    assert not said


def test_a_model_of_both_writes_what_it_writes_alone(writer, both, tmp_path):
    own = both.generate([["a red"]], seed=3, max_tokens=6, max_images=1)[0].parts
    text, shown, said = writer.predict(None, "a red", 1.0, 6, 1, 3, api_name="/write")
    assert text == words(own) and len(shown) == len(own) - sum(isinstance(part, str) for part in own)
    assert said == "Stopped at a limit, not at an end."
    blue = tmp_path / "blue.png"
    Image.new("RGB", (30, 20), "blue").save(blue)
    text, _, _ = writer.predict(handle_file(blue), "", 1.0, 6, 1, 3, api_name="/write")
    own = both.generate([[Image.new("RGB", (12, 8), "blue")]], seed=3, max_tokens=6, max_images=1)[0].parts
    assert text == words(own)


def test_words_around_a_picture_stay_apart(writer, both, monkeypatch):
    parts = ["a red", Image.new("RGB", (12, 8)), "circle"]
    monkeypatch.setattr(both, "generate", lambda *asked, **how: [Written(parts, "end")])
    assert writer.predict(None, "a", 1.0, 6, 1, 3, api_name="/write")[0] == "a red circle"


def words(parts) -> str:
    return " ".join(part for part in parts if isinstance(part, str))


def test_parts_come_while_the_work_goes_on_and_closing_ends_it():
    more, ended = threading.Semaphore(1), threading.Event()

    def work(tell):
        try:
            for i in range(1000):
                more.acquire()
                tell(i)
        finally:
            ended.set()

    parts = while_made(work)
    assert next(parts) == 0
    more.release()
    assert next(parts) == 1
    assert not ended.is_set()
    more.release(1000)
    parts.close()
    assert ended.is_set()
    assert not any(thread.name == "work of the page" for thread in threading.enumerate())


def test_what_is_wrong_with_the_input_is_the_page_s_error_and_a_mistake_stays_itself():
    def fail(error):
        def work(tell):
            tell(1)
            raise error

        return work

    assert next(while_made(fail(ValueError("too long")))) == 1
    with pytest.raises(gr.Error, match="too long"):
        list(while_made(fail(ValueError("too long"))))
    with pytest.raises(KeyError):
        list(while_made(fail(KeyError("x"))))


def test_few_pages_are_remembered(monkeypatch, pipe, tmp_path):
    """gradio keeps the components of 10,000 past pages by default, and of each those of its previews."""
    pipe.save(tmp_path)
    asked = {}

    def launch(page, **how):
        asked.update(how)
        raise OSError

    monkeypatch.setattr(gr.Blocks, "launch", launch)
    assert_one_line_error(run("web", tmp_path), "cannot listen")
    assert asked["state_session_capacity"] <= 1000


def test_the_command_says_what_stands_in_its_way(monkeypatch, pipe, tmp_path):
    pipe.save(tmp_path)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert_one_line_error(run("web", tmp_path, "--port", port), f"cannot listen at 127.0.0.1, port {port}")
    assert_one_line_error(run("web", tmp_path / "none"), "none")
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert_one_line_error(run("web", tmp_path), "pip install 'mmdit[web]'")
