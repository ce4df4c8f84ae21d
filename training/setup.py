"""What a run is made of, from its config: the data, the model that fits it, and the feeds.

Sides are (height, width), in pixels for the source, in latent pixels for the model.
"""

from __future__ import annotations

import hashlib
import time
from contextlib import suppress

import torch

import mmdit.config
from mmdit.autoencoder import Autoencoder
from mmdit.config import LlamaConfig, MMDiTConfig
from mmdit.files import find
from mmdit.init_from import init_from, needs, text_parameters
from mmdit.model import MMDiT
from mmdit.text import LearnedText, TextConfig, Tokenizer
from mmdit.text_and_images import CaptionedTransfusion, Words
from mmdit.text_to_image import CaptionedMMDiT
from mmdit.transfusion import Transfusion
from mmdit.weights_io import read_config
from training.config import ConfigError, TrainConfig
from training.data import DataError, Source, open_source, split_by_key
from training.feed import ImageFeed, LatentFeed, NothingUsable
from training.progress import Progress
from training.run import RunFolder


def open_data(config: TrainConfig, run: RunFolder, factor: int) -> Source:
    """The run's samples, of a size that an autoencoder of that factor and the model's patches divide."""
    data, step = config.data, factor * config.model.patch_size
    source = open_source(data.source, data.image_size, step, num_samples=data.num_samples, seed=config.seed)
    height, width = source.image_size
    run.log(f"data: {len(source)} samples of {data.source}, fitted to {height} x {width}")
    for key, reason in source.skipped:
        run.log_skipped(key, reason)
    return source


def fingerprint(source: Source) -> str:
    """SHA-256 of the samples' size and of their keys in order: what a resumed run must find again."""
    return hashlib.sha256("\n".join([str(tuple(source.image_size)), *source.keys]).encode()).hexdigest()


def build_model(
    config: TrainConfig, run: RunFolder, source: Source, autoencoder: Autoencoder, resumed: bool
) -> CaptionedMMDiT | CaptionedTransfusion:
    """A fresh model for the source's latents, and captions: a resumed run has its tokenizer, else one is trained."""
    text = TextConfig(**{name: getattr(config.text, name) for name in TextConfig.__dataclass_fields__})
    if resumed:
        tokenizer = Tokenizer.load(run.path / "pipeline" / "text" / "tokenizer.json", text.max_length)
    else:
        captions = (source.caption(i) for i in range(len(source)))
        tokenizer = Tokenizer.train(captions, text.vocab_size, text.max_length, images=config.transfusion.enabled)
    patch = config.model.patch_size
    height, width = (side // autoencoder.factor for side in source.image_size)
    model: CaptionedMMDiT | CaptionedTransfusion
    if config.transfusion.enabled:
        model = _transfusion(config, text, tokenizer, autoencoder, _llama(config, run, resumed))
    else:
        model = _mmdit(config, text, tokenizer, autoencoder, height, width)
    if isinstance(model, CaptionedTransfusion):
        _start(config, run, model.transformer, resumed)
    count = sum(p.numel() for p in model.parameters()) / 1e6
    run.log(
        f"model: {count:.1f} M parameters, {config.model.depth} blocks of width {model.transformer.config.width}, "
        f"{height * width // patch**2} image tokens, up to {text.max_length} text tokens"
    )
    return model


def _mmdit(
    config: TrainConfig, text: TextConfig, tokenizer: Tokenizer, autoencoder: Autoencoder, height: int, width: int
) -> CaptionedMMDiT:
    patch = config.model.patch_size
    own = {name: getattr(config.model, name) for name in config.model.__dataclass_fields__ if name != "section"}
    own["pos_embed_max_size"] = max(own["pos_embed_max_size"], height // patch, width // patch)
    shape = MMDiTConfig(
        in_channels=autoencoder.channels,
        context_dim=text.width,
        pooled_dim=text.width,
        sample_size=max(patch, round((height * width) ** 0.5)),
        **own,
    )
    return CaptionedMMDiT(MMDiT(shape), LearnedText(text, tokenizer))


def _transfusion(
    config: TrainConfig, text: TextConfig, tokenizer: Tokenizer, autoencoder: Autoencoder, llama: LlamaConfig | None
) -> CaptionedTransfusion:
    model, mixed = config.model, config.transfusion
    names = ("patch_size", "depth", "num_heads", "head_dim", "mlp_ratio", "qk_norm", "positions")
    shape = mmdit.config.TransfusionConfig(
        vocab_size=text.vocab_size,
        in_channels=autoencoder.channels,
        weights=mixed.weights,
        time=mixed.time,
        attention=mixed.attention,
        llama=llama,
        **{name: getattr(model, name) for name in names},
    )
    return CaptionedTransfusion(Transfusion(shape), Words(text, tokenizer))


def _llama(config: TrainConfig, run: RunFolder, resumed: bool) -> LlamaConfig | None:
    """The form of the streams of text, which follows from what the run starts from; a resumed run has it written."""
    if resumed:
        return read_config(mmdit.config.TransfusionConfig, find(run.path) / "config.json").llama
    paths = config.transfusion.init_paths
    wanted, model = needs(paths), config.model
    wrong = [
        f"model.{name}={'none' if value is None else value}"
        for name, value in wanted.items()
        if name in model.__dataclass_fields__ and getattr(model, name) != value
    ]
    if config.text.vocab_size < wanted.get("vocab_size", 0):
        wrong.append(f"text.vocab_size={wanted['vocab_size']}")
    if wrong:
        raise ConfigError(f"to start from {' and '.join(paths)} set {' '.join(wrong)}")
    return wanted.get("llama")


def _start(config: TrainConfig, run: RunFolder, trunk: Transfusion, resumed: bool) -> None:
    """Weights that are there already, but where the run has its own; and none to learn for text that is frozen."""
    mixed = config.transfusion
    if mixed.init_paths and not resumed:
        started = init_from(trunk, mixed.init_paths)
        for line in started.lines:
            run.log(f"weights {line}")
        own = sorted(text_parameters(trunk).keys() & set(started.fresh)) if mixed.freeze_text else []
        if own:
            raise ConfigError(
                f"transfusion.freeze_text is set, but {' and '.join(mixed.init_paths)} did not give, {own[0]} for one, "
                "what is to be frozen: name a language model in transfusion.init"
            )
    if mixed.freeze_text:
        for parameter in text_parameters(trunk).values():
            parameter.requires_grad_(False)


def open_feeds(
    config: TrainConfig,
    run: RunFolder,
    source: Source,
    autoencoder: Autoencoder,
    text: LearnedText | Words,
    device: torch.device,
) -> tuple[ImageFeed | LatentFeed, LatentFeed | None]:
    """(training feed, validation feed); the latter is None where no held-out sample can be used.

    Raises DataError where no sample is left to train on.
    """
    training, held_out = split_by_key(source, config.data.held_out)
    if not len(training):
        raise DataError(f"all {len(source)} samples are held out: lower data.held_out ({config.data.held_out})")
    held_out = held_out[: config.evaluation.validation_samples]
    common = (autoencoder, text, device, config.data.num_workers, run.log_skipped)
    validation = None
    with suppress(NothingUsable):
        validation = LatentFeed(source, held_out, *common)
    if validation is None:
        run.log("warning: no sample is held out, so there is no validation loss: raise data.held_out or add data")
    if not config.data.cache_latents:
        return ImageFeed(source, training, *common), validation
    run.log(f"encoding {len(training)} images, once: their latents stay in memory")
    start = time.perf_counter()
    with Progress("encoding", len(training)) as progress:
        feed = LatentFeed(source, training, *common, progress=lambda done, _: progress.show(done))
    run.log(f"latents of {len(feed)} images in memory after {time.perf_counter() - start:.0f} s")
    return feed, validation
