"""Initialising a `Transfusion` from pretrained weights: of a language model, an MMDiT, or another `Transfusion`.

Streams map by name. A language model becomes the text stream, with embedding and head. An MMDiT's image stream becomes
the image stream, with its input and output layers, and its text stream the text stream. With shared weights, either
becomes the one stream. With the text frozen this is LMFusion (Shi et al. 2024, arXiv 2412.15188), whose image stream
starts as a copy of the text's.

Shape letters: V vocabulary, D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmdit.config import TransfusionConfig
from mmdit.files import find, load
from mmdit.language_models import language_needs, read_language_model
from mmdit.model import MMDiT
from mmdit.transfusion import Transfusion
from mmdit.weights_io import read_config, read_json

TABLES = ("embed.weight", "head.weight")  # one row per token of the vocabulary
TEXT = ("embed.", "norm_out.", "head.")  # parameters outside the blocks that only text uses
_SAME_MMDIT = ("in_channels", "patch_size", "depth", "num_heads", "head_dim", "mlp_ratio", "qk_norm")
_SAME = (*_SAME_MMDIT, "weights", "time", "positions", "llama", "codec", "codec_width", "pos_embed_max_size")


@dataclass
class Source:
    """The weights of one path, by the trunk's names; `left`: the source's tensors that the trunk has no place for."""

    name: str
    tensors: dict[str, Tensor]
    left: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Started:
    """Where a trunk's tensors come from: `taken`, names by source; `fresh`, names in no source; `lines`, a summary; and
    `tensors` by the trunk's names, of which tables may still have fewer rows than the trunk's (`extend_tables`).
    """

    taken: dict[str, list[str]]
    fresh: list[str]
    lines: list[str]
    tensors: dict[str, Tensor]


def is_language_model(path: str | Path) -> bool:
    """Whether a folder holds a language model in Hugging Face's format."""
    config = Path(path) / "config.json"
    found = read_json(config) if config.exists() else None
    return isinstance(found, dict) and "model_type" in found


def needs(paths: Sequence[str | Path]) -> dict[str, Any]:
    """The config fields that a trunk must have for the language model or `Transfusion` among `paths`; empty without.

    Raises ValueError for a language model that our blocks cannot represent, FileNotFoundError if a path has no model.
    """
    for path in _language_models_first(paths):
        if is_language_model(path):
            return language_needs(path)
        config = find(path) / "config.json"
        if "vocab_size" in read_json(config):
            found = read_config(TransfusionConfig, config)
            return {name: getattr(found, name) for name in ("vocab_size", *_SAME)}
    return {}


@torch.no_grad()
def init_from(model: Transfusion, paths: Sequence[str | Path]) -> Started:
    """Initialise a trunk from folders: a run, a diffusers SD3 transformer, a causal language model of Hugging Face.

    A tensor that is in several sources is taken from a language model, else from the first. If the trunk's vocabulary
    is larger than the source's, `extend_tables` adds rows. Raises ValueError if a config does not fit the trunk's,
    naming what differs, FileNotFoundError if a folder holds no model; the trunk is then unchanged.
    """
    own, started = model.state_dict(), weights_for(model, paths)
    model.load_state_dict(own | extend_tables(started.tensors, own))
    return started


def weights_for(model: Transfusion, paths: Sequence[str | Path]) -> Started:
    """What `init_from` gives to a trunk, which may be without memory; raises as that does."""
    own = model.state_dict()
    taken: dict[str, Tensor] = {}
    by_source: dict[str, list[str]] = {}
    sources = [_source(path, model.config) for path in _language_models_first(paths)]
    for source in sources:
        names = sorted(source.tensors.keys() - taken.keys())
        taken |= {name: source.tensors[name] for name in names}
        by_source[source.name] = names
    copied = _text_for_images(taken, own)
    taken |= copied
    _check(taken, own)
    fresh = sorted(own.keys() - taken.keys())
    lines = [f"from {s.name}: {_layers(by_source[s.name], 3) or 'nothing'}{_left_behind(s.left)}" for s in sources]
    lines += [f"copied from the text's stream: {_layers(copied, 3)}"] if copied else []
    return Started(by_source, fresh, [*lines, f"starts fresh: {_layers(fresh) or 'nothing'}"], taken)


def extend_tables(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors with as many rows in their tables as a trunk's `own` have.

    New rows of the embedding are drawn from the normal distribution of its rows, per channel; new rows of the head are
    the mean of its rows, which bounds the probability of a new token (Hewitt 2021).
    """
    tables = [name for name in TABLES if name in tensors]
    return {**tensors} | {name: _extended(tensors[name], own[name].shape[0], name == "embed.weight") for name in tables}


def text_parameters(model: Transfusion) -> dict[str, nn.Parameter]:
    """The parameters that act on text alone, by name: its stream in each block, embedding, last norm and head.

    Raises ValueError if text and images share weights.
    """
    if model.config.weights != "separate":
        raise ValueError('text and images share their weights: to freeze the text, weights must be "separate"')
    return {name: p for name, p in model.named_parameters() if name.startswith(TEXT) or ".txt." in name}


# --- sources ------------------------------------------------------------------------------------------------------


def _language_models_first(paths: Sequence[str | Path]) -> list[Path]:
    """The paths with language models first, so that no other source replaces a part of one."""
    return sorted(map(Path, paths), key=lambda path: not is_language_model(path))


def _source(path: Path, config: TransfusionConfig) -> Source:
    if is_language_model(path):
        return _of_language_model(path, config)
    found = load(path)
    if isinstance(found, MMDiT):
        return _of_mmdit(path, found, config)
    _check_same(path, found.config, config, _SAME)
    return Source(str(path), dict(found.state_dict()))


def _of_language_model(path: Path, config: TransfusionConfig) -> Source:
    found = read_language_model(path)
    if config.attention == "full" or config.time == "all" or (config.time == "image" and config.weights == "shared"):
        raise ValueError(
            f"{path} is a language model: its text sees nothing that follows and is not modulated by a time, "
            f'but the trunk has attention = "{config.attention}", weights = "{config.weights}", time = "{config.time}"'
        )
    wanted = {name: value for name, value in found.needs.items() if name != "vocab_size"}
    _check_equal(path, wanted, {name: getattr(config, name) for name in wanted})
    stream = "txt" if config.weights == "separate" else "all"
    blocks = {f"blocks.{i}.{stream}.{name}": x for i, block in enumerate(found.blocks) for name, x in block.items()}
    return Source(f"{path} ({found.kind})", found.ends | blocks)


def _of_mmdit(path: Path, found: MMDiT, config: TransfusionConfig) -> Source:
    """The whole image stream, and of the text stream the tensors that the trunk has a place for."""
    _check_same(path, found.config, config, _SAME_MMDIT)
    if config.time == "added":
        raise ValueError(
            f'{path} modulates its patches by their time, the trunk has time = "added": take time = "image"'
        )
    out = Source(f"{path} (MMDiT)", {})
    for name, tensor in found.state_dict().items():
        ours = name.replace(".img.", ".all.") if config.weights == "shared" else name
        other = config.weights == "shared" or config.llama is not None
        text = ".txt." in name and (other or (".modulation." in name and config.time != "all"))
        table = name == "pos_embed" and (config.positions == "rope" or tensor.shape[1] != config.pos_embed_max_size**2)
        if text or table or name.startswith(("context_in.", "pooled_in.")):
            out.left.append(name)
        elif ".txt.modulation." in name:  # pre-only in the last block: zeros for the gates
            out.tensors[ours] = torch.cat([tensor, tensor.new_zeros(6 * config.width - len(tensor), *tensor.shape[1:])])
        else:
            out.tensors[ours] = tensor
    return out


def _check_same(path: Path, found: Any, config: TransfusionConfig, names: Sequence[str]) -> None:
    _check_equal(path, {name: getattr(found, name) for name in names}, {name: getattr(config, name) for name in names})


def _check_equal(path: Path, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    wrong = [f"{name} is {ours[name]!r}, there {value!r}" for name, value in theirs.items() if ours[name] != value]
    if wrong:
        raise ValueError(f"{path} does not fit the trunk: {'; '.join(wrong)}")


# --- tensors ------------------------------------------------------------------------------------------------------


def _text_for_images(taken: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A copy of the text stream for the image stream, if no source has one and the shapes are the same."""
    of_text = {name.replace(".txt.", ".img."): x for name, x in taken.items() if ".txt." in name}
    images = {name for name in own if ".img." in name}
    fits = images == of_text.keys() and all(own[name].shape == x.shape for name, x in of_text.items())
    return of_text if fits and not images & taken.keys() else {}


def _extended(rows: Tensor, num: int, spread: bool) -> Tensor:
    """A table extended to `num` rows; spread: new rows have the distribution of the others, else they are the mean."""
    more = num - len(rows)
    if not more:
        return rows
    rows = rows.float()
    mean, std = rows.mean(0, keepdim=True), rows.std(0, keepdim=True)
    new = mean + std * torch.randn(more, rows.shape[1]) if spread else mean.expand(more, -1)
    return torch.cat([rows, new])


def _check(taken: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    rows = max((len(taken[name]) for name in TABLES if name in taken), default=0)
    if rows > (num := len(own[TABLES[0]])):
        raise ValueError(f"vocab_size is {num}, but there are {rows} tokens to take: set it to at least that")
    unknown = [name for name in taken if name not in own]
    shapes = [
        f"{name} {tuple(x.shape)} for {tuple(own[name].shape)}"
        for name, x in taken.items()
        if name in own and x.shape[name in TABLES :] != own[name].shape[name in TABLES :]
    ]
    if unknown or shapes:
        listed = ", ".join([*unknown, *shapes][:4])
        raise ValueError(f"{len(unknown) + len(shapes)} tensors have no place of their shape in the trunk: {listed}")


def _layers(names: Iterable[str], parts: int = 9) -> str:
    """A summary of tensors' names: their layers, up to `parts` levels deep, with numbers as "*"."""
    layers = [["*" if part.isdigit() else part for part in name.split(".")[:-1] or [name]] for name in names]
    return ", ".join(dict.fromkeys(".".join(layer[:parts]) for layer in layers))


def _left_behind(left: Sequence[str]) -> str:
    return f"; left behind: {_layers(left)}" if left else ""
