"""From a config to the parts of a run: the data, the model that fits it, and the feeds of batches.

Sizes are (height, width), in pixels for the source, in latent pixels for the model.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext, suppress
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import mmdit.config
from mmdit.autoencoder import Autoencoder
from mmdit.config import LlamaConfig, MMDiTConfig
from mmdit.features import KnownText
from mmdit.init_from import needs
from mmdit.model import MMDiT
from mmdit.sd3_text import SD3Text
from mmdit.text import LearnedText, TextConfig, Tokenizer
from mmdit.text_and_images import CaptionedTransfusion, Words
from mmdit.text_encoders import TextEncoder, load_encoder, open_text_encoder
from mmdit.text_to_image import CaptionedMMDiT
from mmdit.transfusion import Transfusion
from training.cache_files import is_cache
from training.cached import CachedFeed, CachedSource, latent_feed
from training.captions import parse_weights
from training.config import ConfigError, TrainConfig
from training.corpus import Corpus, Pieces
from training.data import (
    Data,
    DataError,
    Source,
    SourceOptions,
    checked_size,
    is_mix,
    is_shapes,
    open_source,
    split_by_key,
)
from training.feed import Conditioner, Encoding, Feed, ImageFeed, LatentFeed, NothingUsable, RowFeed, StreamFeed
from training.images import LARGE
from training.mup import scale_start
from training.own import is_own
from training.own_data import captions_at
from training.parallel import ALONE, Ranks
from training.progress import Progress
from training.remote import Patience
from training.run import RunFolder
from training.sharding import is_sharded
from training.start import (
    language_model_in,
    shape_alone,
    start_mmdit,
    start_transfusion,
    text_form,
    tokenizer_to_start_from,
)
from training.stream import STREAM, HeldOut, StreamSource
from training.wanted import Wanted

MOST_PROMPTS = 32  # captions for grids that are taken from all samples, evenly spread
NAMED_SIZES = 20  # most buckets that the log names one by one


def open_data(config: TrainConfig, run: RunFolder, factor: int) -> Data:
    """The run's samples, fitted to sizes that the autoencoder's factor and the model's patches divide."""
    check_reference(config)
    source = open_run_source(config, factor * config.model.patch_size, run.index)
    sizes, (height, width) = source.layout.sizes, source.image_size
    number = f"{len(source)} samples" if isinstance(source, Source) else "a stream"
    fitted = f"{height} x {width}" if len(sizes) == 1 else bucket_text(source)
    run.log(f"data: {number} of {config.data.source}, fitted to {fitted}")
    if config.data.image_size is None and not is_own(config.data.source) and height * width > LARGE:
        tokens = height * width // (factor * config.model.patch_size) ** 2
        run.log(
            f"warning: pictures keep their commonest size, {height} x {width}, {tokens} image tokens: "
            "data.image_size=256 scales them down"
        )
    if config.autoencoder == "shapes" and not is_shapes(config.data.source):
        run.log(
            'warning: the autoencoder "shapes" has seen drawn shapes alone, and loses much of other pictures: '
            "train your own (mmdit autoencoder train) and name it by autoencoder=FOLDER"
        )
    tell_flaws(source, run.log, run.log_skipped)
    return source


def tell_flaws(source: Data, log: Callable[[str], None], skipped: Callable[[str, str], None]) -> None:
    """Report the samples that are left out, skipped, or have captions with broken characters."""
    for reason, count, key in source.left_out:
        log(f"left out: {count} samples with {reason}, such as {key}")
    for count, key in source.garbled:
        log(f"warning: {count} samples have captions that are no UTF-8, such as {key}: save these as UTF-8")
    for key, reason in source.skipped:
        skipped(key, reason)


def check_reference(config: TrainConfig) -> None:
    """Raises ConfigError where a score needs reference pictures, and the run's data has no pictures to read."""
    wanting = [name for name in config.evaluation.metrics if name != "clip-score"]
    source = config.data.source
    kind = "a stream" if source.startswith(STREAM) else "a cache of latents" if is_cache(source) else None
    if wanting and kind and config.evaluation.reference is None:
        raise ConfigError(
            f"{wanting[0]} holds pictures against others, and data.source is {kind}: name pictures by "
            "evaluation.reference (mmdit evaluate --reference)"
        )


def open_run_source(config: TrainConfig, step: int, index: Path | None = None, need_captions: bool = True) -> Data:
    """The data that a config names, a `Source` or a `StreamSource`. step: what sides are multiples of, in pixels;
    index: the folder in which an index that is slow to make is kept.
    """
    data = config.data
    wanted = Wanted(
        captions=parse_weights(data.captions, "data.captions") if data.captions else (),
        sizes=bool(data.buckets),
        min_side=data.min_side,
        max_aspect=data.max_aspect,
        min_caption=data.min_caption,
        max_caption=data.max_caption,
        patience=Patience(data.timeout, data.retries),
        cache=index,
    )
    options = SourceOptions(
        buckets=data.buckets,
        max_ratio=data.bucket_ratio,
        min_bucket=smallest_bucket(config),
        mixed=config.mixes_sizes,
        crop=data.crop,
        flip=data.flip,
        wanted=wanted,
    )
    if data.source.startswith(STREAM) and not is_mix(data.source):
        size = checked_size(data.image_size)
        return StreamSource(data.source, size, step, data.num_samples, options, data.shuffle_buffer)
    source = open_source(data.source, data.image_size, step, data.num_samples, config.seed, need_captions, options)
    if isinstance(source, CachedSource):
        source.check_data(data)
    if is_own(data.source) and data.cache_latents and type(source).draw is not Source.draw:
        raise ConfigError(
            f"{data.source} draws its samples anew each time, and kept latents are of one draw: set "
            "data.cache_latents=false (to draw captions alone, define `captions` instead of `draw`)"
        )
    return source


def smallest_bucket(config: TrainConfig) -> int:
    """The fewest samples that a bucket may have: a batch of pictures, or 1 where batches hold several sizes."""
    return 1 if config.mixes_sizes else config.training.batch_size - config.text_documents


def bucket_text(source: Data) -> str:
    """The buckets for the log: "3 buckets: 32 x 128 (20.0%), ...", or of many "120 sizes from 32 x 48 to 256 x 256".

    Of a stream all sizes that images may be fitted to, without shares.
    """
    layout = source.layout
    if len(layout.sizes) > NAMED_SIZES:
        low, high = min(layout.sizes, key=math.prod), max(layout.sizes, key=math.prod)
        return f"{len(layout.sizes)} sizes from {low[0]} x {low[1]} to {high[0]} x {high[1]}"
    if layout.bucket is None:
        return f"{len(layout.sizes)} buckets: {', '.join(f'{h} x {w}' for h, w in layout.sizes)}"
    shares = np.bincount(layout.bucket, minlength=len(layout.sizes)) / len(layout.bucket)
    texts = [f"{h} x {w} ({share:.1%})" for (h, w), share in zip(layout.sizes, shares, strict=True)]
    return f"{len(texts)} buckets: {', '.join(texts)}"


def fingerprint(source: Data) -> str:
    """SHA-256 of the image sizes and of all keys in order, by which a resumed run knows its data again."""
    sizes = source.layout.sizes
    found = hashlib.sha256(str(tuple(source.image_size) if len(sizes) == 1 else sizes).encode())
    for key in source.keys:
        found.update(b"\n" + key.encode())
    return found.hexdigest()


def open_corpus(config: TrainConfig, run: RunFolder) -> Corpus | None:
    """The run's text without pictures, if it has any."""
    if config.transfusion.text is None:
        return None
    corpus = Corpus(config.transfusion.text, run.log_skipped)
    run.log(f"text: {corpus.num_documents} documents of {config.transfusion.text}")
    return corpus


def open_pieces(
    config: TrainConfig, run: RunFolder, corpus: Corpus, tokenizer: Tokenizer, device: torch.device
) -> tuple[Pieces, Pieces | None]:
    """(pieces to train on, held-out pieces or None). Raises DataError where no document is left to train on."""
    length = config.transfusion.text_length
    training = Pieces(corpus.part(False, config.data.held_out), tokenizer, length, device)
    run.log(f"text: {training.num_tokens} tokens in {len(training)} pieces to train on")
    held_out = held_out_pieces(config, corpus, tokenizer, device)
    if held_out is None:
        run.log("warning: no text is held out, so it has no validation loss: raise data.held_out or add documents")
    return training, held_out


def held_out_pieces(config: TrainConfig, corpus: Corpus, tokenizer: Tokenizer, device: torch.device) -> Pieces | None:
    """The held-out part of the text, up to evaluation.validation_samples pieces; None where there is none."""
    documents = corpus.part(True, config.data.held_out)
    with suppress(DataError):
        return Pieces(
            documents, tokenizer, config.transfusion.text_length, device, config.evaluation.validation_samples
        )
    return None


def build_model(
    config: TrainConfig,
    run: RunFolder,
    source: Data,
    autoencoder: Autoencoder,
    resumed: bool,
    corpus: Iterable[str] | None = None,
    ranks: Ranks = ALONE,
) -> tuple[CaptionedMMDiT | CaptionedTransfusion, dict[str, Tensor]]:
    """A fresh model for the latents and captions of a source; its tokenizer is made for it, or a resumed run's own.

    The trunk of a resumed run, whose weights will be loaded, is on the meta device; so is a new one that will be
    sharded: it comes with the tensors that it begins with, for `fill_weights`.
    """
    base_width, sharded = config.optimizer.base_width, is_sharded(config.parallel, ranks)
    later = resumed or sharded or bool(config.init_paths)
    height, width = (side // autoencoder.factor for side in source.image_size)
    largest = max(side for size in source.layout.sizes for side in size) // autoencoder.factor
    if isinstance(source, CachedSource):
        source.check(autoencoder)
    text = _text(config, run, source, chain(source.some_captions(), corpus or ()), resumed)
    model: CaptionedMMDiT | CaptionedTransfusion
    if isinstance(text, Words):
        form = text_form(config, run, resumed)
        with shape_alone() if later else nullcontext():
            trunk = _transfusion(config, text, autoencoder, (height, width), largest, form)
        trunk, given = start_transfusion(config, run, trunk, resumed, sharded)
        model = CaptionedTransfusion(trunk, text)
    else:
        with shape_alone() if later else nullcontext():
            fresh = _mmdit(config, text, autoencoder, (height, width), largest)
        model = CaptionedMMDiT(fresh, text)
        model.packed = config.training.packing
        model.transformer, given = start_mmdit(config, run, model, resumed, sharded)
    if base_width is not None and not later:
        scale_start(model.transformer, base_width)
    count = sum(p.numel() for p in model.parameters()) / 1e6
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
    some = f" ({trained:.2f} M of them trained)" if trained < count else ""
    run.log(
        f"model: {count:.1f} M parameters{some}, {config.model.depth} blocks "
        f"of width {model.transformer.config.width}, {height * width // config.model.patch_size**2} image tokens, "
        f"up to {config.text.max_length} text tokens"
    )
    return model, given


def _text(config: TrainConfig, run: RunFolder, source: Data, texts: Iterable[str], resumed: bool) -> Conditioner:
    """The conditioner: a frozen one (from its folder or the cache), or a learned one with a tokenizer for the texts."""
    here = run.path / "pipeline" / "text"
    if config.text.encoder != "learned" and isinstance(source, CachedSource):
        run.log(f"what {config.text.encoder} says of captions is read from {config.data.source}")
        return source.text(config.text.encoder, config.text.max_length, here if resumed else None)
    if config.text.encoder != "learned":
        frozen = load_encoder(here) if resumed else open_text_encoder(config.text.encoder, config.text.max_length)
        run.log(f"captions are read by {frozen.source}, frozen")
        return frozen
    shape = TextConfig(**{name: getattr(config.text, name) for name in TextConfig.__dataclass_fields__})
    path = here / "tokenizer.json" if resumed else tokenizer_to_start_from(config)
    tokenizer = Tokenizer.load(path, shape.max_length) if path else make_tokenizer(config, texts, run.log)
    return (Words if config.transfusion.enabled else LearnedText)(shape, tokenizer)


def make_tokenizer(config: TrainConfig, texts: Iterable[str], log: Callable[[str], None]) -> Tokenizer:
    """The tokenizer that text.tokenizer names, or that of the language model in `init`, or one trained on the texts.

    Raises ConfigError for one that has more tokens than text.vocab_size.
    """
    text, mixed = config.text, config.transfusion
    sizes, folder = mixed.size_tokens if mixed.enabled else 0, text.tokenizer
    model = language_model_in(config)
    if folder == "train" and model is not None and (Path(model) / "tokenizer.json").is_file():
        folder = model
        log(f"tokenizer from {model}")
    elif folder == "train" and mixed.enabled and "vocab_size" in needs(config.init_paths):
        log(
            f"warning: {' and '.join(config.init_paths)} came without a tokenizer.json, so a new tokenizer is trained, "
            "whose ids do not mean what they mean to the weights: name their own tokenizer in text.tokenizer"
        )
    if folder == "train":
        return Tokenizer.train(texts, text.vocab_size, text.max_length, mixed.enabled, sizes)
    tokenizer = Tokenizer.adopt(folder, text.max_length, mixed.enabled, sizes)
    if tokenizer.vocab_size > text.vocab_size:
        raise ConfigError(
            f"the tokenizer of {folder} has {tokenizer.vocab_size} tokens, the added ones counted, and "
            f"text.vocab_size is {text.vocab_size}: set text.vocab_size={tokenizer.vocab_size} or more"
        )
    return tokenizer


def _mmdit(
    config: TrainConfig,
    text: LearnedText | TextEncoder | SD3Text | KnownText,
    autoencoder: Autoencoder,
    size: tuple[int, int],
    largest: int,
) -> MMDiT:
    """largest: the longest side of a latent that is trained on."""
    patch, (height, width) = config.model.patch_size, size
    own = {name: getattr(config.model, name) for name in config.model.__dataclass_fields__ if name != "section"}
    own["pos_embed_max_size"] = max(own["pos_embed_max_size"], largest // patch)
    shape = MMDiTConfig(
        in_channels=autoencoder.channels,
        context_dim=text.context_dim,
        pooled_dim=text.pooled_dim,
        sample_size=max(patch, round((height * width) ** 0.5)),
        **own,
    )
    return MMDiT(shape)


def _transfusion(
    config: TrainConfig,
    text: Words,
    autoencoder: Autoencoder,
    size: tuple[int, int],
    largest: int,
    llama: LlamaConfig | None,
) -> Transfusion:
    model, mixed = config.model, config.transfusion
    own = ("weights", "time", "attention", "codec", "codec_width", "size_tokens", "max_tokens")
    names = ("patch_size", "depth", "num_heads", "head_dim", "mlp_ratio", "qk_norm", "positions")
    shape = mmdit.config.TransfusionConfig(
        vocab_size=text.config.vocab_size,
        in_channels=autoencoder.channels,
        sample_size=max(model.patch_size, round((size[0] * size[1]) ** 0.5)),
        pos_embed_max_size=max(model.pos_embed_max_size, largest // model.patch_size),
        **{name: getattr(mixed, name) for name in own},
        first_size=text.tokenizer.sizes.start,
        **dict(zip(("pad", "eos", "boi", "eoi"), text.tokenizer.special, strict=True)),  # type: ignore[arg-type]
        llama=llama,
        **{name: getattr(model, name) for name in names},
    )
    if (most := shape.image_tokens(size)) > shape.max_tokens:
        raise ConfigError(
            f"a picture of latents {size[0]} x {size[1]} takes {most} tokens, and transfusion.max_tokens is "
            f"{shape.max_tokens}: raise it, by the longest caption too"
        )
    return Transfusion(shape)


def open_feeds(
    config: TrainConfig,
    run: RunFolder,
    source: Data,
    autoencoder: Autoencoder,
    text: Conditioner,
    device: torch.device,
) -> tuple[Feed, RowFeed | None]:
    """(training feed, validation feed); the latter is None where no held-out sample can be used.

    Raises DataError where no sample is left to train on.
    """
    data, sampled = config.data, config.data.posterior == "sample"
    if sampled and not autoencoder.has_posterior:
        raise ConfigError('data.posterior is "sample": the autoencoder has none to sample from, expected "mode"')
    encoding = Encoding(autoencoder, text, device, data.num_workers, run.log_skipped, sampled)
    if isinstance(source, StreamSource):
        in_memory, held_out = held_out_samples(config, source)
        validation = _validation_feed(config, run, in_memory, held_out, replace(encoding, num_workers=0))
        return StreamFeed(source, data.held_out, encoding), validation
    assert isinstance(source, Source)
    training, held_out = split_by_key(source, data.held_out)
    if not len(training):
        more = "add some" if data.num_samples is None else "raise data.num_samples"
        raise DataError(f"all {len(source)} samples are held out: {more}, or lower data.held_out ({data.held_out})")
    validation = _validation_feed(config, run, source, held_out, encoding)
    if isinstance(source, CachedSource):
        return CachedFeed(source, training, encoding), validation
    if not data.cache_latents:
        return ImageFeed(source, training, encoding), validation
    run.log(f"encoding {len(training)} images, once: their latents stay in memory")
    start = time.perf_counter()
    with Progress("encoding", len(training), quiet=run.quiet) as progress:
        feed = LatentFeed(source, training, encoding, progress=lambda done, _: progress.show(done))
    run.log(f"latents of {len(feed)} images in memory after {time.perf_counter() - start:.0f} s")
    return feed, validation


def grid_prompts(config: TrainConfig, source: Data, validation: RowFeed | None) -> list[str]:
    """Prompts for grids: the config's, or held-out captions, or where none is held out some that are trained on."""
    if config.sampling.prompts:
        return list(config.sampling.prompts)
    if validation is not None:
        return validation.captions
    if not isinstance(source, Source):
        return [""]
    spread = range(0, len(source), -(-len(source) // MOST_PROMPTS))
    return [texts[0] for i in spread if (texts := captions_at(source, i)[0]) and texts[0]] or [""]


def held_out_samples(config: TrainConfig, source: Data) -> tuple[Source, np.ndarray]:
    """(source, indices) of the samples kept from training; of a stream the first ones, which are read into memory."""
    if isinstance(source, StreamSource):
        in_memory = HeldOut(source, config.data.held_out, config.evaluation.validation_samples)
        return in_memory, np.arange(len(in_memory))
    assert isinstance(source, Source)
    return source, split_by_key(source, config.data.held_out)[1]


def _validation_feed(
    config: TrainConfig, run: RunFolder, source: Source, held_out: np.ndarray, encoding: Encoding
) -> RowFeed | None:
    """The first evaluation.validation_samples of the held-out samples, encoded; with a warning where there are none."""
    some = held_out[: config.evaluation.validation_samples]
    with suppress(NothingUsable):
        return latent_feed(source, some, replace(encoding, sampled=False))
    run.log("warning: no sample is held out, so there is no validation loss: raise data.held_out or add data")
    return None
