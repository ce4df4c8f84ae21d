"""Features of reference pictures, computed once and kept in a folder.

A file is named by a digest of what went into it: the bytes of the pictures in their order, their size, the network's
weights and the libraries that ran it. It is used only where all of these are the same and its content is whole.

Shape letters: N pictures, D features.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mmdit.mapped import read_metadata, read_weights
from mmdit.weights_io import save_weights
from training.data import DataError, Source, one_pass
from training.image_networks import ImageNetwork

Log = Callable[[str], None]
FIT = 1  # increased when `images.fit` changes the pixels that it makes of a file


def cache_folder(asked: str | None) -> Path:
    """The folder of kept features: the one asked for, or mmdit/references in XDG_CACHE_HOME or ~/.cache."""
    if asked is not None:
        return Path(asked).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmdit" / "references"


def reference_features(
    source: Source,
    indices: np.ndarray,
    network: ImageNetwork,
    cache: Path,
    batch_size: int = 64,
    log: Log = lambda text: None,
) -> Tensor:
    """Features (N, D) of a source's pictures, read from `cache` if they were computed before. Raises DataError where no
    picture can be read.
    """
    key = {"pictures": content(source, indices), "size": list(source.image_size), "fit": FIT, "network": network.digest}
    path = cache / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}.safetensors"
    kept = _read(path, key)
    if kept is not None:
        return kept
    log(f"reference: {network.name} looks at {len(indices)} pictures, once; what it sees is kept in {cache}")
    features, skipped = [], []
    for batch in one_pass(source, indices, batch_size):
        skipped += batch.skipped
        if len(batch.captions):
            features.append(network(batch.images).cpu())
    if not features:
        raise DataError(f"none of the reference's {len(indices)} pictures can be read")
    found = torch.cat(features)
    if skipped:
        log(f"reference: {len(skipped)} pictures cannot be read and are left out; one is {': '.join(skipped[0])}")
    save_weights({"features": found}, path, {"key": json.dumps(key), "sha256": _sum(found)})
    return found


def content(source: Source, indices: np.ndarray) -> str:
    """SHA-256 of pictures in their order, by `Source.raw`."""
    digest = hashlib.sha256()
    for i in map(int, indices):
        digest.update(hashlib.sha256(source.raw(i)).digest())
    return digest.hexdigest()


def _read(path: Path, key: dict) -> Tensor | None:
    """The features in a file; None where it does not exist, was made from another key, or is not whole."""
    if not path.is_file():
        return None
    try:
        about, features = read_metadata(path), read_weights(path)["features"]
    except (ValueError, KeyError, OSError):
        return None
    whole = about.get("key") == json.dumps(key) and about.get("sha256") == _sum(features)
    return features if whole else None


def _sum(features: Tensor) -> str:
    return hashlib.sha256(features.contiguous().numpy().tobytes()).hexdigest()
