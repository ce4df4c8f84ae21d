"""Caches of the tiny preset's data, for the tests of writing, reading and training from them."""

from pathlib import Path

from training.cache_writer import CacheOptions, write_cache
from training.cached import CachedSource
from training.config import load_config

EXACT = CacheOptions("fp32", "fp32")


def config(*overrides: str):
    return load_config("pixels-tiny", overrides)


def made(out: Path, *overrides: str, options: CacheOptions = EXACT) -> CachedSource:
    """A whole cache of the tiny preset's data: 64 pictures of 32 x 32."""
    assert write_cache(config(*overrides), out, options, log=lambda line: None).missing == 0
    return CachedSource(out)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
