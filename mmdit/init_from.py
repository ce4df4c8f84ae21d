"""A `Transfusion` that starts from weights that are there: of a language model, of an MMDiT, of another `Transfusion`.

Streams map by name: a language model becomes the text's, with the embedding and the head; an MMDiT's image stream the
patches', with all that leads into it and out of it, and its text stream the text's; where weights are shared, either
becomes the one that all tokens share. With the text frozen this is LMFusion (Shi et al. 2024, arXiv 2412.15188), whose
image stream starts as a copy of the text's.

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

TABLES = ("embed.weight", "head.weight")  # a row a token
TEXT = ("embed.", "norm_out.", "head.")  # of the text alone, beside its stream
_SAME_MMDIT = ("in_channels", "patch_size", "depth", "num_heads", "head_dim", "mlp_ratio", "qk_norm")
_SAME = (*_SAME_MMDIT, "weights", "time", "positions", "llama", "codec", "codec_width", "pos_embed_max_size")


@dataclass
class Source:
    """What one path offers: tensors by the trunk's names; `left`, those of its own that the trunk has no place for."""

    name: str
    tensors: dict[str, Tensor]
    left: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Started:
    """What became of a trunk's tensors: `taken`, names by source; `fresh`, names that no source gave; all in lines."""

    taken: dict[str, list[str]]
    fresh: list[str]
    lines: list[str]


def is_language_model(path: str | Path) -> bool:
    """Whether a folder holds a language model in Hugging Face's format."""
    config = Path(path) / "config.json"
    found = read_json(config) if config.exists() else None
    return isinstance(found, dict) and "model_type" in found


def needs(paths: Sequence[str | Path]) -> dict[str, Any]:
    """What a trunk's config has to say to take the language model or trunk among `paths`; empty where there is none.

    Raises ValueError for a language model that our blocks cannot represent, FileNotFoundError for a path of no model.
    """
    for path in _ordered(paths):
        if is_language_model(path):
            return language_needs(path)
        config = find(path) / "config.json"
        if "vocab_size" in read_json(config):
            found = read_config(TransfusionConfig, config)
            return {name: getattr(found, name) for name in ("vocab_size", *_SAME)}
    return {}


@torch.no_grad()
def init_from(model: Transfusion, paths: Sequence[str | Path]) -> Started:
    """Start a trunk from folders: a run, a diffusers SD3 transformer, a causal language model in Hugging Face's format.

    Of a tensor that several give a language model's is taken, else the first one's. A vocabulary that is larger than
    the source's gets new rows: of the embedding drawn from the normal distribution of the rows that are there, channel
    by channel; of the head their mean, so that a new token has at most an even share of the probability (Hewitt 2021).
    Raises ValueError where a config does not fit the trunk's, naming what differs, FileNotFoundError where a folder
    holds no model. A trunk that is refused is left as it was.
    """
    own = model.state_dict()
    taken: dict[str, Tensor] = {}
    by_source: dict[str, list[str]] = {}
    sources = [_source(path, model.config) for path in _ordered(paths)]
    for source in sources:
        names = sorted(source.tensors.keys() - taken.keys())
        taken |= {name: source.tensors[name] for name in names}
        by_source[source.name] = names
    copied = _copied(taken, own)
    taken |= copied
    for name in TABLES:
        if name in taken:
            taken[name] = _grown(taken[name], model.config.vocab_size, spread=name == "embed.weight")
    _check(taken, own)
    model.load_state_dict(own | taken)
    fresh = sorted(own.keys() - taken.keys())
    lines = [f"from {s.name}: {_brief(by_source[s.name], 3) or 'nothing'}{_but(s.left)}" for s in sources]
    lines += [f"copied from the text's stream: {_brief(copied, 3)}"] if copied else []
    return Started(by_source, fresh, [*lines, f"starts fresh: {_brief(fresh) or 'nothing'}"])


def text_parameters(model: Transfusion) -> dict[str, nn.Parameter]:
    """The parameters that act on text alone, by name: its stream in each block, embedding, last norm and head.

    Raises ValueError where text and images share weights.
    """
    if model.config.weights != "separate":
        raise ValueError('text and images share their weights: to freeze the text, weights must be "separate"')
    return {name: p for name, p in model.named_parameters() if name.startswith(TEXT) or ".txt." in name}


# --- sources ------------------------------------------------------------------------------------------------------


def _ordered(paths: Sequence[str | Path]) -> list[Path]:
    """Language models first, so that none is taken by half."""
    return sorted(map(Path, paths), key=lambda path: not is_language_model(path))


def _source(path: Path, config: TransfusionConfig) -> Source:
    if is_language_model(path):
        return _of_language_model(path, config)
    found = load(path)
    if isinstance(found, MMDiT):
        return _of_mmdit(path, found, config)
    _same(path, found.config, config, _SAME)
    return Source(str(path), dict(found.state_dict()))


def _of_language_model(path: Path, config: TransfusionConfig) -> Source:
    found = read_language_model(path)
    if config.attention == "full" or config.time == "all" or (config.time == "image" and config.weights == "shared"):
        raise ValueError(
            f"{path} is a language model: its text sees nothing that follows and is not modulated by a time, "
            f'but the trunk has attention = "{config.attention}", weights = "{config.weights}", time = "{config.time}"'
        )
    wanted = {name: value for name, value in found.needs.items() if name != "vocab_size"}
    _differ(path, wanted, {name: getattr(config, name) for name in wanted})
    stream = "txt" if config.weights == "separate" else "all"
    blocks = {f"blocks.{i}.{stream}.{name}": x for i, block in enumerate(found.blocks) for name, x in block.items()}
    return Source(f"{path} ({found.kind})", found.ends | blocks)


def _of_mmdit(path: Path, found: MMDiT, config: TransfusionConfig) -> Source:
    """The image side whole, or an error; of the text side what has a place: no pooled text, no last block's end."""
    _same(path, found.config, config, _SAME_MMDIT)
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
        elif ".txt.modulation." in name:  # of six in the last block it has the first two: the others are shut gates
            out.tensors[ours] = torch.cat([tensor, tensor.new_zeros(6 * config.width - len(tensor), *tensor.shape[1:])])
        else:
            out.tensors[ours] = tensor
    return out


def _same(path: Path, found: Any, config: TransfusionConfig, names: Sequence[str]) -> None:
    _differ(path, {name: getattr(found, name) for name in names}, {name: getattr(config, name) for name in names})


def _differ(path: Path, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    wrong = [f"{name} is {ours[name]!r}, there {value!r}" for name, value in theirs.items() if ours[name] != value]
    if wrong:
        raise ValueError(f"{path} does not fit the trunk: {'; '.join(wrong)}")


# --- tensors ------------------------------------------------------------------------------------------------------


def _copied(taken: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The text's stream for the patches too, where they have none yet and theirs is of the same form."""
    of_text = {name.replace(".txt.", ".img."): x for name, x in taken.items() if ".txt." in name}
    images = {name for name in own if ".img." in name}
    fits = images == of_text.keys() and all(own[name].shape == x.shape for name, x in of_text.items())
    return of_text if fits and not images & taken.keys() else {}


def _grown(rows: Tensor, num: int, spread: bool) -> Tensor:
    """A table of at least `num` rows from one of fewer; `spread`: new rows as the old ones are, else at their mean."""
    if len(rows) > num:
        raise ValueError(f"vocab_size is {num}, but there are {len(rows)} tokens to take: set it to at least that")
    more = num - len(rows)
    rows = rows.float()
    mean, std = rows.mean(0, keepdim=True), rows.std(0, keepdim=True)
    new = mean + std * torch.randn(more, rows.shape[1]) if spread else mean.expand(more, -1)
    return torch.cat([rows, new])


def _check(taken: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    unknown = [name for name in taken if name not in own]
    shapes = [
        f"{name} {tuple(x.shape)} for {tuple(own[name].shape)}"
        for name, x in taken.items()
        if name in own and x.shape != own[name].shape
    ]
    if unknown or shapes:
        listed = ", ".join([*unknown, *shapes][:4])
        raise ValueError(f"{len(unknown) + len(shapes)} tensors have no place of their shape in the trunk: {listed}")


def _brief(names: Iterable[str], parts: int = 9) -> str:
    """Names in a line: the layers, those of all blocks as one, by so many of their parts."""
    layers = [["*" if part.isdigit() else part for part in name.split(".")[:-1] or [name]] for name in names]
    return ", ".join(dict.fromkeys(".".join(layer[:parts]) for layer in layers))


def _but(left: Sequence[str]) -> str:
    return f"; left behind: {_brief(left)}" if left else ""
