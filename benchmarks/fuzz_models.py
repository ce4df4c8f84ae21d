"""Readers of models, runs and caches for `fuzz_readers`: of a valid folder, one file is damaged.

JSON, also that in front of a safetensors file, is mostly damaged as a value, not as bytes: keys are lost, numbers
become other numbers or texts. What is read is then still JSON, and a reader that trusts it is found.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import struct
import tempfile
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

STEPS = ("training.num_steps=2", "training.checkpoint_every=1", "training.validate_every=0", "training.sample_every=0")
SMALL = (*STEPS, "data.num_samples=40", "evaluation.prompts_per_question=0", "training.device=cpu")
VALUES = (
    *(None, True, -1, 0, 1, 2, 10**6, 1e9, 2**63, 10**30, -0.5, float("nan"), float("inf")),
    *("", "x", "../..", "/etc/passwd", "\ud800", "9" * 400, [], {}, [1] * 5, [[[]]], {"a": 1}),
)


class Damaged(NamedTuple):
    """A file of a valid folder, and how the folder is read."""

    kind: str
    file: str
    read: Callable[[Path], object]


def _draw(folder: Path) -> None:
    from mmdit.text_to_image import TextToImage

    TextToImage.load(folder)(["a red circle"], num_steps=1)


def _generate(folder: Path) -> None:
    from mmdit.text_and_images import TransfusionPipeline

    TransfusionPipeline.load(folder).generate([["a"]], max_tokens=2, max_images=0)


def _resume(folder: Path) -> None:
    from training.launch import resume

    resume(folder, ["training.num_steps=3"])


def _train(cache: Path) -> None:
    import training

    own = ("data.num_samples=none", f"data.source={cache}", f"training.out={cache.parent / 'run'}")
    training.train(training.load_config("pixels-tiny", [*SMALL, *own]))


def _open_autoencoder(folder: Path) -> None:
    from mmdit.autoencoder import open_autoencoder

    open_autoencoder(folder)


def _add_lora(folder: Path) -> None:
    from mmdit.files import load
    from mmdit.lora import load_lora

    load_lora(load(folder), folder / "pipeline" / "transformer" / "lora.safetensors")  # type: ignore[arg-type]


MODELS = {
    "model (config.json)": Damaged("run", "pipeline/transformer/config.json", _draw),
    "model (.safetensors)": Damaged("run", "pipeline/transformer/model.safetensors", _draw),
    "model (pipeline.json)": Damaged("run", "pipeline/pipeline.json", _draw),
    "text encoder (config.json)": Damaged("run", "pipeline/text/config.json", _draw),
    "tokenizer.json": Damaged("run", "pipeline/text/tokenizer.json", _draw),
    "LoRA (.safetensors)": Damaged("run", "pipeline/transformer/lora.safetensors", _add_lora),
    "text and images (config.json)": Damaged("transfusion", "pipeline/transformer/config.json", _generate),
    "autoencoder (config.json)": Damaged("autoencoder", "config.json", _open_autoencoder),
    "autoencoder (.safetensors)": Damaged("autoencoder", "model.safetensors", _open_autoencoder),
    "checkpoint (state.json)": Damaged("run", "checkpoints/step-00000002/state.json", _resume),
    "checkpoint (.safetensors)": Damaged("run", "checkpoints/step-00000002/optimizer.safetensors", _resume),
    "metrics.jsonl": Damaged("run", "metrics.jsonl", _resume),
    "cache (cache.json)": Damaged("cache", "cache.json", _train),
    "cache (.safetensors)": Damaged("cache", "shard-00000.safetensors", _train),
}


@cache
def made(kind: str) -> dict[str, bytes]:
    """The files of a valid folder, by their names within it; all of a small model."""
    import matplotlib.font_manager  # noqa: F401 - it reads a list of fonts, before files are watched

    import training
    from mmdit.patch_autoencoder import PatchAutoencoder, PatchAutoencoderConfig
    from training.cache_writer import write_cache

    with tempfile.TemporaryDirectory() as temporary, contextlib.redirect_stdout(io.StringIO()):
        folder = Path(temporary) / kind
        match kind:
            case "autoencoder":
                PatchAutoencoder(PatchAutoencoderConfig(widths=(8, 8), depth=1)).save(folder)
            case "cache":
                write_cache(training.load_config("pixels-tiny", ["data.num_samples=40"]), folder)
            case "transfusion":
                own = ("transfusion.enabled=true", "model.positions=rope", "text.vocab_size=400")
                training.train(training.load_config("pixels-tiny", [*SMALL, *own, f"training.out={folder}"]))
            case _:
                base = Path(temporary) / "base"
                training.train(training.load_config("pixels-tiny", [*SMALL, f"training.out={base}"]))
                own = (f"init={base}", "lora.rank=2", f"training.out={folder}")
                training.train(training.load_config("pixels-tiny", [*SMALL, *own]))
        files = [path for path in folder.rglob("*") if path.is_file() and path.parent.name != "tensorboard"]
        return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def reader(damaged: Damaged) -> Callable[[Path, bytes], None]:
    """The check of a reader: it reads a valid folder in which one file holds these bytes."""

    def check(folder: Path, data: bytes) -> None:
        for name, content in made(damaged.kind).items():
            path = folder / "model" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data if name == damaged.file else content)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            damaged.read(folder / "model")

    return check


def damage(rng: random.Random, file: str, data: bytes) -> bytes | None:
    """The file with some values of its JSON changed; None where it holds none."""
    if file.endswith(".safetensors"):
        length = struct.unpack("<Q", data[:8])[0]
        head = _changed(rng, data[8 : 8 + length])
        return struct.pack("<Q", len(head)) + head + data[8 + length :]
    return _changed(rng, data) if file.endswith(".json") else None


def _changed(rng: random.Random, text: bytes) -> bytes:
    value = {"top": json.loads(text)}
    for _ in range(rng.randint(1, 3)):
        paths = sorted(_paths(value), key=len)[:60]  # not the thousands of a vocabulary alone
        *parents, last = rng.choice(paths)
        place: Any = value
        for key in parents:
            place = place[key]
        old, other = place[last], deepcopy(rng.choice(VALUES))
        match rng.randrange(5):
            case 0 if len(paths) > 1 and parents:
                del place[last]
            case 1 if isinstance(place, dict):
                place[f"new{rng.randrange(9)}"] = other
            case 2 if type(old) in (int, float):
                place[last] = rng.choice((old + 1, old - 1, 2 * old, -old, float(old), str(old)))
            case _:
                place[last] = other
    return json.dumps(value.get("top")).encode()


def _paths(value: Any, path: tuple = ()) -> Iterator[tuple]:
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in items:
        yield from _paths(one, (*path, key))
