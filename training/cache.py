"""A cache: latents and text features on disk, computed once (`mmdit cache`); and the checks that it fits a run.

    cache.json                 what it was made from: autoencoder, text encoders, fitting, types, data (`About`)
    empty.*                    the text features of the empty caption, as a shard of one sample
    shard-00000.json           its samples' keys, digests and captions, and the SHA-256 of both files
    shard-00000.safetensors    the autoencoder's statistics of each image (mean and log variance of a posterior, or the
                               latents), the text features, and a digest of each sample

Shard k has the samples from k * shard_samples on, in the order of the data: its bytes do not depend on who writes it
or when. Files are written under another name and renamed, a shard's .json last: where it exists, the shard is whole. A
sample's digest is checked the first time that it is read.

Shape letters: N samples with an image, M their captions, S channels and h w sides of the statistics, L tokens, D width
of a text state, P width of the pooled vector, T all tokens of a shard.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmdit.features import TextShape
from mmdit.mapped import read_weights
from mmdit.weights_io import weights_writer, write_aside
from training.errors import DataError
from training.signed import fsync, read_signed, sha256, write_signed

FORMAT = "mmdit cache 1"
FIT = "scaled to cover, centre-cropped"
"""How images are fitted to their size (`training.images.fit`)."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OPTIONS = ("buckets", "bucket_ratio", "captions", "min_side", "max_aspect", "min_caption", "max_caption")
_WORDS = {
    "autoencoder": "autoencoder",
    "text": "text encoder",
    "size": "image size",
    "sizes": "buckets",
    "fit": "fitting of images",
    "options": "choice of samples and captions (data.*)",
    "weights": "weights of data sets",
    "dtype": "type of latents (--dtype)",
    "text_dtype": "type of text features (--text-dtype)",
    "keys": "data",
    "seed": "seed",
    "shard_samples": "size of shards (--shard-mb)",
}
_AGAIN = "delete {0}.* and run `mmdit cache` again"


class CacheError(DataError):
    """A cache that is missing, not whole, changed, or made for another model; the message is one line."""


# --- what a cache was made from --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class About:
    """What a cache was made from, as cache.json has it."""

    autoencoder: str
    """SHA-256 of the autoencoder's kind, settings and weights."""
    text: dict[str, Any] | None
    """What the frozen text encoders say of themselves (`about()`); None where the text encoder is learned."""
    text_shape: TextShape | None
    """Shape of the text features."""
    size: tuple[int, int]
    """Height and width in pixels that images were fitted to; with buckets, the size whose area they keep to."""
    sizes: tuple[tuple[int, int], ...]
    """All sizes of images: one, or those of the buckets."""
    fit: str
    """How images were fitted: `FIT`."""
    options: dict[str, Any]
    """The settings of [data] that choose samples and captions, named in `OPTIONS`."""
    weights: tuple[float, ...]
    """Weights of the data sets, where several are mixed."""
    dtype: str
    """Type of the latents, a name of `DTYPES`."""
    text_dtype: str
    """Type of the text features."""
    source: str
    """The data, as data.source names it."""
    step: int
    """Pixels that all sides are multiples of."""
    min_bucket: int
    """Fewest samples in a bucket: those of a batch."""
    num_samples: int | None
    """Number of samples taken of each data set; None: all."""
    seed: int | None
    """Seed of drawn data; None for files."""
    samples: int
    """Number of samples, bad ones included."""
    keys: str
    """SHA-256 of the image size and the samples' keys in order."""
    shard_samples: int
    """Samples in a shard."""
    autoencoder_name: str = ""
    """The autoencoder as the config named it; "" in caches of earlier versions."""

    def differences(self, other: About) -> list[str]:
        """What differs, in words; paths of data and text encoders do not count."""
        found = [name for name in _WORDS if self._of(name) != other._of(name)]
        implied = {"sizes": "size" in found, "shard_samples": len(found) > 1}  # differ because others do
        words = _WORDS | {"autoencoder": self.its_autoencoder}
        return [words[name] for name in found if not implied.get(name)]

    @property
    def its_autoencoder(self) -> str:
        """The autoencoder in words, with its name where it is known."""
        return f'autoencoder ("{self.autoencoder_name}")' if self.autoencoder_name else "autoencoder"

    def _of(self, name: str) -> Any:
        value = getattr(self, name)
        return same_text(value) if name == "text" else value

    @property
    def num_shards(self) -> int:
        """The number of shards of the whole cache."""
        return -(-self.samples // self.shard_samples)

    def places(self, shard: int) -> range:
        """The numbers of the samples in a shard."""
        first = shard * self.shard_samples
        return range(first, min(first + self.shard_samples, self.samples))

    def write(self, folder: Path) -> None:
        """Write it as cache.json."""
        write_signed(folder / "cache.json", {"format": FORMAT, **asdict(self)})

    @classmethod
    def read(cls, folder: Path) -> About:
        """Raises CacheError where the folder is no cache."""
        if not is_cache(folder):
            raise CacheError(f"{folder} is no cache: it has no cache.json, which `mmdit cache` writes")
        table = _read(folder / "cache.json")
        if table.pop("format", None) != FORMAT:
            raise CacheError(f"{folder / 'cache.json'} is of another version of mmdit: make the cache anew")
        shape = table["text_shape"]
        sizes = {"size": tuple(table["size"]), "sizes": tuple(map(tuple, table["sizes"]))}
        lists = {"weights": tuple(table["weights"]), "text_shape": shape and TextShape.read(shape)}
        return cls(**table | sizes | lists)


def is_cache(folder: str | Path) -> bool:
    """Whether a folder has a cache.json, which `mmdit cache` writes first."""
    return os.path.isfile(Path(folder) / "cache.json")  # also of a spec that is too long for a name


def same_text(about: dict[str, Any] | None) -> dict[str, Any] | None:
    """A description of text encoders without their path."""
    return None if about is None else {name: value for name, value in about.items() if name != "encoder"}


# --- samples and shards ----------------------------------------------------------------------------------------------


class CachedSample(NamedTuple):
    """A sample in a shard's .json. content: SHA-256 of its pixels and captions; error: why it has no image; shares: the
    weights of its captions (none: equal ones); bucket, part, block: as in `order.Layout`.
    """

    key: str
    content: str
    captions: list[str]
    error: str | None = None
    shares: Sequence[float] = ()
    bucket: int = 0
    part: int = 0
    block: int = -1


class Known(NamedTuple):
    """What a cache holds of a sample. statistics (S, h, w): what the autoencoder gives of its image; text[caption][k]:
    states (L, D) of the real tokens and pooled vector (P,) by encoder k.
    """

    statistics: Tensor
    text: list[list[tuple[Tensor, Tensor]]]

    def digest(self) -> bytes:
        """SHA-256 of all its tensors, and of the statistics' shape."""
        digest = hashlib.sha256(str(tuple(self.statistics.shape)).encode())
        digest.update(_bytes(self.statistics))
        for states, pooled in (pair for caption in self.text for pair in caption):
            digest.update(_bytes(states))
            digest.update(_bytes(pooled))
        return digest.digest()


def content_of(pixels: np.ndarray, captions: Sequence[str]) -> str:
    """SHA-256 of a sample's image, uint8 (h, w, 3), and its captions, by which a change of the data is noticed."""
    digest = hashlib.sha256(str(pixels.shape).encode() + np.ascontiguousarray(pixels).tobytes())
    for caption in captions:
        digest.update(b"\0" + caption.encode())
    return digest.hexdigest()


def _bytes(x: Tensor) -> Any:
    return x.contiguous().view(torch.uint8).numpy().data if x.numel() else b""


class Shard:
    """Samples in two files, `stem`.json and `stem`.safetensors; the latter is opened when a sample is read."""

    def __init__(self, stem: Path) -> None:
        """Raises CacheError where a file is missing, cut or changed."""
        self.stem, self.file = stem, stem.with_name(stem.name + ".safetensors")
        table = _read(stem.with_name(stem.name + ".json"))
        self._sha256, self._size = table["file"], table["bytes"]
        self.samples = [CachedSample(*row) for row in table["samples"]]
        if not self.file.is_file() or self.file.stat().st_size != self._size:
            raise CacheError(f"{self.file} is not as it was written: {_AGAIN.format(stem.name)}")
        good = [sample.error is None for sample in self.samples]
        self._rows = np.cumsum([0, *good[:-1]])  # of each sample: its row in the tensors
        self._captions = np.cumsum(
            [0, *(len(sample.captions) * ok for sample, ok in zip(self.samples, good, strict=True))]
        )
        self._checked: set[int] = set()

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """latents (flat), shapes (N, 3), digests (N, 32); of each encoder text.i.states (T, D), .lengths (M,), .pooled
        (M, P); all memory-mapped. Raises CacheError where their sizes do not fit each other.
        """
        try:
            tensors = read_weights(self.file)
            self._check_tables(tensors)
        except (ValueError, KeyError, OSError) as error:
            raise CacheError(f"{self.file} is no shard: {error}; {_AGAIN.format(self.stem.name)}") from error
        return tensors

    def _check_tables(self, tensors: dict[str, Tensor]) -> None:
        shapes, rows = tensors["shapes"], sum(sample.error is None for sample in self.samples)
        fits = shapes.shape == (rows, 3) and tensors["digests"].shape == (rows, 32) and bool((shapes >= 0).all())
        fits = fits and int(shapes.long().prod(1).sum()) == len(tensors["latents"])
        for i in range(num_encoders(tensors)):
            states, lengths, pooled = (tensors[f"text.{i}.{name}"] for name in ("states", "lengths", "pooled"))
            fits = fits and len(lengths) == len(pooled) == self._captions[-1] and bool((lengths >= 0).all())
            fits = fits and int(lengths.sum()) == len(states)
        if not fits:
            raise ValueError("its tables have changed")

    @cached_property
    def _starts(self) -> list[np.ndarray]:
        """The offsets of the samples in the latents; then, for each encoder, those of the captions in its states."""
        counts = [self.tensors["shapes"].long().prod(1)]
        counts += [self.tensors[f"text.{i}.lengths"].long() for i in range(num_encoders(self.tensors))]
        return [np.concatenate([[0], count.cumsum(0).numpy()]) for count in counts]

    def read(self, place: int) -> Known:
        """The tensors of a good sample, mapped from the file; its digest is checked the first time.

        Raises CacheError, which names the sample, where they have changed.
        """
        row, tensors = int(self._rows[place]), self.tensors
        first, last = self._starts[0][row : row + 2]
        statistics = tensors["latents"][first:last].view(*tensors["shapes"][row].tolist())
        known = Known(statistics, [self._text(m) for m in range(*self._captions[place : place + 2])])
        if place not in self._checked:
            if known.digest() != tensors["digests"][row].numpy().tobytes():
                key = self.samples[place].key
                raise CacheError(f"{self.file}: sample {key} has changed; {_AGAIN.format(self.stem.name)}")
            self._checked.add(place)
        return known

    def _text(self, m: int) -> list[tuple[Tensor, Tensor]]:
        """(states, pooled) of caption m of the shard by each encoder."""
        text = []
        for i, starts in enumerate(self._starts[1:]):
            states, pooled = self.tensors[f"text.{i}.states"], self.tensors[f"text.{i}.pooled"]
            text.append((states[starts[m] : starts[m + 1]], pooled[m]))
        return text

    def good(self) -> Iterator[int]:
        """The places of the samples that have an image."""
        return (place for place, sample in enumerate(self.samples) if sample.error is None)

    def problems(self) -> list[str]:
        """What has changed since the shard was written, one line for each sample; every byte is read."""
        if sha256(self.file) == self._sha256:
            return []
        found = []
        self._checked.clear()
        for place in self.good():
            try:
                self.read(place)
            except CacheError as error:
                found.append(str(error))
        return list(dict.fromkeys(found)) or [f"{self.file} has changed; {_AGAIN.format(self.stem.name)}"]


def num_encoders(tensors: dict[str, Tensor]) -> int:
    """The number of text encoders that have features among a shard's tensors."""
    return sum(name.endswith(".pooled") for name in tensors)


def write_shard(stem: Path, samples: Sequence[CachedSample], tensors: dict[str, Tensor]) -> None:
    """Write a shard's two files and sync them to disk, the .json last."""
    file = stem.with_name(stem.name + ".safetensors")
    write = weights_writer(tensors)

    def to_disk(aside: Path) -> None:
        write(aside)
        fsync(aside)

    write_aside(file, to_disk)
    table = {"file": sha256(file), "bytes": file.stat().st_size, "samples": [list(sample) for sample in samples]}
    write_signed(stem.with_name(stem.name + ".json"), table)
    fsync(stem.parent)


def as_tensors(known: Sequence[Known], empty: Known) -> dict[str, Tensor]:
    """The tensors of a shard. empty: the empty caption, which gives types and widths where there is no sample."""
    kind = empty.statistics.dtype
    tensors = {
        "latents": torch.cat([torch.empty(0, dtype=kind), *(one.statistics.flatten() for one in known)]),
        "shapes": torch.tensor([one.statistics.shape for one in known], dtype=torch.int32).view(-1, 3),
        "digests": torch.tensor([list(one.digest()) for one in known], dtype=torch.uint8).view(-1, 32),
    }
    for i, (states, pooled) in enumerate(empty.text[0] if empty.text else []):
        rows = [caption[i] for one in known for caption in one.text]
        tensors[f"text.{i}.states"] = torch.cat([states[:0], *(row[0] for row in rows)])
        tensors[f"text.{i}.lengths"] = torch.tensor([len(row[0]) for row in rows], dtype=torch.int32)
        tensors[f"text.{i}.pooled"] = torch.cat([pooled[None][:0], *(row[1][None] for row in rows)])
    return tensors


def merged(parts: Sequence[Shard]) -> tuple[list[CachedSample], dict[str, Tensor]]:
    """The samples and tensors of consecutive shards, joined into one."""
    samples = [sample for part in parts for sample in part.samples]
    return samples, {name: torch.cat([part.tensors[name] for part in parts]) for name in parts[0].tensors}


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_signed(path)
    except FileNotFoundError:
        raise CacheError(f"{path} is missing: run `mmdit cache` again") from None
    except (ValueError, OSError) as error:
        raise CacheError(f"{error}; delete it and run `mmdit cache` again") from error


# --- the whole cache -------------------------------------------------------------------------------------------------


class Cache:
    """A whole cache, open for reading: samples by their number in the data."""

    def __init__(self, folder: str | Path) -> None:
        """Raises CacheError where the folder is no cache, or shards are missing, cut or changed."""
        self.folder = Path(folder)
        self.about = About.read(self.folder)
        missing = [k for k in range(self.about.num_shards) if not is_there(self.folder, k)]
        if missing:
            raise CacheError(
                f"{folder} is not whole: {len(missing)} of {self.about.num_shards} shards are missing, the first is "
                f"{stem_of(self.folder, missing[0]).name}; go on with `mmdit cache`"
            )
        self.shards = [Shard(stem_of(self.folder, k)) for k in range(self.about.num_shards)]
        for k, shard in enumerate(self.shards):
            if len(shard.samples) != len(self.about.places(k)):
                raise CacheError(f"{shard.stem} is of another cache: it has {len(shard.samples)} samples")
        self.samples = [sample for shard in self.shards for sample in shard.samples]
        self.empty = Shard(self.folder / "empty") if self.about.text else None

    def read(self, i: int) -> Known:
        """The tensors of sample i, which has to be a good one. Raises CacheError where they have changed."""
        shard, place = divmod(i, self.about.shard_samples)
        return self.shards[shard].read(place)

    def problems(self, progress: Any = lambda done: None) -> list[str]:
        """What has changed since the cache was written; every byte is read. progress: called after each shard."""
        found = []
        for done, shard in enumerate([*self.shards, *([self.empty] if self.empty else [])], start=1):
            found += shard.problems()
            progress(done)
        return found


def stem_of(folder: Path, shard: int) -> Path:
    """The path of a shard's files, without their suffix."""
    return folder / f"shard-{shard:05d}"


def is_there(folder: Path, shard: int) -> bool:
    """Whether a shard has been written."""
    return stem_of(folder, shard).with_suffix(".json").is_file()
