"""A cache: latents and text features on disk, computed once (`mmdit cache`); and the checks that it fits a run.

    cache.json                 what it was made from: autoencoder, text encoders, fitting, types, data (`About`)
    empty.*                    the text features of the empty caption, as a shard of one sample
    shard-00000.json           its samples' keys, digests and captions, and the SHA-256 of both files
    shard-00000.safetensors    the autoencoder's statistics of each image (mean and log variance of a posterior, or the
                               latents), the text features, and a digest of each sample

Shard k has the samples from k * shard_samples on, in the order of the data: its bytes do not depend on who writes it
or when. Files are written under another name and renamed, a shard's .json last: where it exists, the shard is whole. A
sample's digest is checked the first time that it is read; from a server, to which a cache may be copied, each time.

Shape letters: N samples with an image, M their captions, S channels and h w sides of the statistics, L tokens, D width
of a text state, P width of the pooled vector, T all tokens of a shard.
"""

from __future__ import annotations

import hashlib
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmdit.features import TextShape
from mmdit.weights_io import weights_writer, write_aside
from training.cache_files import (
    CACHE_JSON,
    CacheError,
    RemoteTensor,
    anew,
    file_of,
    is_cache,
    read_table,
    read_tensors,
    sha256_of_file,
)
from training.cache_samples import AllSamples, CachedSample, ShardSamples
from training.errors import DataError
from training.remote import PATIENT, Patience, is_url, read_each
from training.signed import fsync, sha256, signed, write_signed

FORMAT = "mmdit cache 1"
FIT = "scaled to cover, centre-cropped"
"""How images are fitted to their size (`training.images.fit`)."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OPTIONS = ("buckets", "bucket_ratio", "captions", "min_side", "max_aspect", "min_caption", "max_caption")
MOST_OPEN = 20_000
"""Shards whose files are mapped at the same time, of which each has two: Linux may allow 65,530 maps."""
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
    "keys": "data set",
    "seed": "seed",
    "shard_samples": "size of shards (--shard-mb)",
}


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
        write_signed(folder / CACHE_JSON, {"format": FORMAT, **asdict(self)})

    @classmethod
    def read(cls, cache: str | Path, patience: Patience = PATIENT) -> About:
        """cache: as `Cache` takes it. Raises CacheError where that is no cache."""
        if not is_cache(cache):
            raise CacheError(f"{cache} is no cache: it has no cache.json, which `mmdit cache` writes")
        table = read_table(file := file_of(cache, CACHE_JSON), patience, signed)
        if table.pop("format", None) != FORMAT:
            raise CacheError(f"{file} is of another version of mmdit: make the cache anew")
        shape = table["text_shape"]
        sizes = {"size": tuple(table["size"]), "sizes": tuple(map(tuple, table["sizes"]))}
        lists = {"weights": tuple(table["weights"]), "text_shape": shape and TextShape.read(shape)}
        return cls(**table | sizes | lists)


def same_text(about: dict[str, Any] | None) -> dict[str, Any] | None:
    """A description of text encoders without their path."""
    return None if about is None else {name: value for name, value in about.items() if name != "encoder"}


# --- samples and shards ----------------------------------------------------------------------------------------------


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


def _bytes(x: Tensor) -> Any:
    return x.contiguous().view(torch.uint8).numpy().data if x.numel() else b""


class Shard:
    """Samples in two files, `stem`.json and `stem`.safetensors; the latter is opened when a sample is read."""

    def __init__(self, stem: str | Path, patience: Patience = PATIENT) -> None:
        """stem: a path or URL without suffix. Raises CacheError where a file is missing, cut or changed."""
        self.file, self.is_remote, self._patience = f"{stem}.safetensors", is_url(str(stem)), patience
        self._sha256, self._size, self.samples = read_table(f"{stem}.json", patience, _parsed)
        if type(self._size) is not int or self._size < 0:
            raise CacheError(f"{stem}.json says that {self.file} has {self._size} bytes; {anew(self.file)}")
        if not self.is_remote and not (Path(self.file).is_file() and Path(self.file).stat().st_size == self._size):
            raise CacheError(f"{self.file} is not as it was written: {anew(self.file)}")
        self._good = self.samples.columns["good"]
        self._rows = self._good.cumsum(dtype=np.int32) - self._good  # of each good sample: its row in the tensors
        self._captions = np.zeros(len(self._good) + 1, dtype=np.int32)  # of each sample: its first one in the tensors
        np.cumsum(self.samples.columns["captions"] * self._good, out=self._captions[1:])
        self._checked = np.zeros(len(self._good), dtype=bool)
        self._tensors: Mapping[str, Any] | None = None
        self._opening = threading.Lock()  # a shard's own: that of a cached_property is one for all in Python 3.11

    @property
    def is_open(self) -> bool:
        """Whether its files are mapped, or on a server their headers read."""
        return self._tensors is not None

    def close(self) -> None:
        """Unmap its files, until a sample is read again."""
        self._tensors = None
        self.__dict__.pop("_starts", None)
        self.samples.close()

    @property
    def tensors(self) -> Mapping[str, Any]:
        """latents (flat), shapes (N, 3), digests (N, 32); of each encoder text.i.states (T, D), .lengths (M,), .pooled
        (M, P). On a disk all are mapped; on a server shapes, digests and lengths are read, the others `RemoteTensor`s.
        Raises CacheError where their sizes do not fit each other.
        """
        with self._opening:
            if self._tensors is None:
                self._tensors = self._open()
            return self._tensors

    def _open(self) -> Mapping[str, Any]:
        try:
            found = read_tensors(self.file, self._size, self._patience)
            tensors = {
                name: x[:] if x.shape and name.endswith(("shapes", "digests", "lengths")) else x
                for name, x in found.items()
            }
            self._check_tables(tensors)
        except (ValueError, KeyError, OSError) as error:
            if type(error) is DataError:  # of a server
                raise
            reason = f"it has no {error}" if isinstance(error, KeyError) else error
            raise CacheError(f"{self.file} is no shard: {reason}; {anew(self.file)}") from error
        return tensors

    def _check_tables(self, tensors: Mapping[str, Any]) -> None:
        shapes, rows = tensors["shapes"], int(self._good.sum())
        fits = shapes.shape == (rows, 3) and tensors["digests"].shape == (rows, 32) and shapes.dtype == torch.int32
        fits = fits and bool((shapes >= 0).all())
        fits = fits and tensors["latents"].shape == (int(shapes.long().prod(1).sum()),)
        for i in range(num_encoders(tensors)):
            states, lengths, pooled = (tensors[f"text.{i}.{name}"] for name in ("states", "lengths", "pooled"))
            fits = fits and lengths.shape == pooled.shape[:1] == (self._captions[-1],) and bool((lengths >= 0).all())
            fits = fits and states.shape[:1] == (int(lengths.sum()),)
        if not fits:
            raise ValueError("its tables have changed")

    @cached_property
    def _starts(self) -> list[np.ndarray]:
        """The offsets of the samples in the latents; then, for each encoder, those of the captions in its states."""
        counts = [self.tensors["shapes"].long().prod(1)]
        counts += [self.tensors[f"text.{i}.lengths"].long() for i in range(num_encoders(self.tensors))]
        return [np.concatenate([[0], count.cumsum(0).numpy()]) for count in counts]

    def read(self, place: int) -> Known:
        """The tensors of a good sample; its digest is checked the first time, and whenever a server sent them.

        Raises CacheError, which names the sample, where they have changed, DataError where the server fails.
        """
        row, tensors = int(self._rows[place]), self.tensors
        first, last = self._starts[0][row : row + 2]
        statistics = tensors["latents"][first:last].view(*tensors["shapes"][row].tolist())
        known = Known(statistics, self._text(*self._captions[place : place + 2]))
        if self.is_remote or not self._checked[place]:
            if known.digest() != tensors["digests"][row].numpy().tobytes():
                raise CacheError(f"{self.file}: sample {self.samples[place].key} has changed; {anew(self.file)}")
            self._checked[place] = True
        return known

    def _text(self, first: int, last: int) -> list[list[tuple[Tensor, Tensor]]]:
        """For captions first ... last - 1 of the shard, (states, pooled) by each encoder."""
        by_encoder = []
        for i, starts in enumerate(self._starts[1:]):
            states = self.tensors[f"text.{i}.states"][starts[first] : starts[last]]
            pooled = self.tensors[f"text.{i}.pooled"][first:last]
            by_encoder.append(list(zip(states.split(np.diff(starts[first : last + 1]).tolist()), pooled, strict=True)))
        return [list(pairs) for pairs in zip(*by_encoder, strict=True)]

    def good(self) -> Iterator[int]:
        """The places of the samples that have an image."""
        return iter(self._good.nonzero()[0].tolist())

    def problems(self) -> list[str]:
        """What has changed since the shard was written, one line for each sample; every byte is read."""
        if sha256_of_file(self.file, self._size, self._patience) == self._sha256:
            return []
        found = []
        self._checked[:] = False
        for place in self.good():
            try:
                self.read(place)
            except CacheError as error:
                found.append(str(error))
        return list(dict.fromkeys(found)) or [f"{self.file} has changed; {anew(self.file)}"]


def _parsed(data: bytes, file: str) -> tuple[str, int, ShardSamples]:
    """SHA-256 and size of a shard's tensors, and its samples, from the bytes of its .json. Raises ValueError."""
    table = signed(data, file)
    try:
        return table["file"], table["bytes"], ShardSamples(file, data)
    except (LookupError, TypeError, ValueError, OverflowError, StopIteration) as error:
        raise ValueError(f"{file} is not the table of a shard") from error


def num_encoders(tensors: Mapping[str, Tensor | RemoteTensor]) -> int:
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


# --- the whole cache -------------------------------------------------------------------------------------------------


class Cache:
    """A whole cache, open for reading: samples by their number in the data."""

    def __init__(self, spec: str | Path, patience: Patience = PATIENT) -> None:
        """spec: a folder, or the URL of a cache.json. Raises CacheError where that is no cache, or shards are missing,
        cut or changed, DataError where the server fails.
        """
        self.spec, self.is_remote = str(spec), is_url(str(spec))
        self.about = About.read(spec, patience)
        shards = range(self.about.num_shards)
        missing = [] if self.is_remote else [k for k in shards if not is_there(Path(spec), k)]
        if missing:
            raise CacheError(
                f"{spec} is not whole: {len(missing)} of {len(shards)} shards are missing, the first is "
                f"{shard_name(missing[0])}; go on with `mmdit cache`"
            )

        def shard(name: str) -> Shard:
            return Shard(file_of(spec, name), patience)

        self.shards = list(read_each(shard, map(shard_name, shards), self.is_remote))
        for k, one in enumerate(self.shards):
            if len(one.samples) != len(self.about.places(k)):
                raise CacheError(f"{one.file} is of another cache: it has {len(one.samples)} samples")
        self.samples = AllSamples([one.samples for one in self.shards], self.about.shard_samples)
        self.empty = shard("empty") if self.about.text else None
        self._open: deque[Shard] = deque()

    def read(self, i: int) -> Known:
        """The tensors of sample i, which has to be a good one. Raises CacheError where they have changed."""
        number, place = divmod(i, self.about.shard_samples)
        shard = self.shards[number]
        if not shard.is_open:
            self._open.append(shard)
            while len(self._open) > MOST_OPEN:
                self._open.popleft().close()
        return shard.read(place)

    def problems(self, progress: Any = lambda done: None) -> list[str]:
        """What has changed since the cache was written; every byte is read. progress: called after each shard."""
        found = []
        for done, shard in enumerate([*self.shards, *([self.empty] if self.empty else [])], start=1):
            found += shard.problems()
            progress(done)
        return found


def shard_name(shard: int) -> str:
    """The name of a shard's files, without their suffix."""
    return f"shard-{shard:05d}"


def is_there(folder: Path, shard: int) -> bool:
    """Whether a shard has been written."""
    return (folder / f"{shard_name(shard)}.json").is_file()
