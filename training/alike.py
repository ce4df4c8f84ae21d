"""How the processes of a run know that they compute the same: by settings, data, weights, code and libraries."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from importlib.metadata import version
from operator import attrgetter
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mmdit.text import Tokenizer
from training.config import TrainConfig
from training.parallel import Ranks
from training.settings import keys

OURS = ("samplers", "mmdit", "training")


def check_alike(config: TrainConfig, data: Mapping[str, str], model: Any, autoencoder: nn.Module, ranks: Ranks) -> None:
    """Raises ConfigError, in all processes, which names what one has otherwise than process 0. data: `data_digests`."""
    settings = {key: repr(attrgetter(key)(config)) for key in keys(type(config))}
    parts = {"weights": weights_digest(model), "tokenizer": tokenizer_digest(model)}
    parts["weights of the autoencoder"] = weights_digest(autoencoder)
    ranks.agree(**versions(), **settings, data=data, **parts)


def weights_digest(model: nn.Module) -> str:
    """A digest of the first values of each weight, by which processes check that they start from the same ones."""
    found = hashlib.sha256()
    for name, p in model.named_parameters():
        found.update(f"{name} {tuple(p.shape)}".encode())
        if not p.is_meta:  # what will be loaded has no values yet
            found.update(first_values(p))
    return found.hexdigest()


def first_values(x: Tensor) -> bytes:
    """The first 256 values of a tensor, by which processes check that they have the same."""
    return x.detach().flatten()[:256].float().cpu().numpy().tobytes()


def tokenizer_digest(model: Any) -> str:
    """A digest of the tokenizer, which each process trains by itself; "" where captions are read by frozen encoders."""
    tokenizer = getattr(model.conditioner, "tokenizer", None)
    return hashlib.sha256(tokenizer.backend.to_str().encode()).hexdigest() if isinstance(tokenizer, Tokenizer) else ""


def versions() -> dict[str, str]:
    """The versions of what processes have to compute alike with, by which they check that they do."""
    found = {f"version of {name}": version(name) for name in ("torch", "numpy", "tokenizers")}
    code = hashlib.sha256()
    for path in (path for name in OURS for path in sorted((Path(__file__).parents[1] / name).glob("*.py"))):
        code.update(path.read_bytes())
    return found | {"code of mmdit": code.hexdigest()}
