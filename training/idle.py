"""Idle settings: those that take no effect because of another setting.

`load_config` refuses an idle key that a person has set, since it is likely a mistake. One that a preset sets, or a file
whose other keys are overridden on the command line, is allowed, and the run warns of it in its log.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from operator import attrgetter
from typing import TYPE_CHECKING, NamedTuple

from training import settings
from training.settings import ConfigError, shown

if TYPE_CHECKING:
    from training.config import TrainConfig


class Rule(NamedTuple):
    """Keys that take effect only where `works(config)`, which depends on the key `by`.

    wants: the value of `by` that they are for, in words for the message. off: whether 0, false or "none" is idle too;
    usually such a value turns something off that is off anyway, and is fine.
    """

    keys: tuple[str, ...]
    by: str
    works: Callable[[TrainConfig], bool]
    wants: str
    off: bool = False


def _keys(section: str, names: str) -> tuple[str, ...]:
    return tuple(f"{section}.{name}" for name in names.split())


OF_THE_DATA = ("data.num_workers", "evaluation.prompts_per_question")
MIXED = _keys(
    "transfusion",
    "weights time attention codec codec_width size_tokens max_tokens image_weight caption_first image_first_cap z_loss "
    "text_length freeze_text",
)

RULES = (
    # data
    Rule(
        ("data.num_samples",), "data.source", lambda c: not c.data.source.startswith("shapes:"), '"shapes" without one'
    ),
    Rule(
        ("data.num_workers",),
        "data.source",
        lambda c: not _is_cache(c.data.source),
        "images, and a cache has none",
    ),
    Rule(
        ("data.bucket_ratio",),
        "data.buckets",
        lambda c: bool(c.data.buckets) or _is_cache(c.data.source),  # a cache has buckets of its own
        "true",
    ),
    Rule(("data.shuffle_buffer",), "data.source", lambda c: c.data.source.startswith("hf-stream:"), '"hf-stream:NAME"'),
    Rule(_keys("data", "timeout retries"), "data.source", lambda c: "://" in c.data.source, "a URL"),
    # model and text
    Rule(("model.pos_embed_max_size",), "model.positions", lambda c: c.model.positions != "rope", '"sincos" or "both"'),
    Rule(
        _keys("text", "vocab_size tokenizer width depth num_heads"),
        "text.encoder",
        lambda c: c.text.encoder == "learned",
        '"learned"',
    ),
    Rule(
        _keys("text", "width depth num_heads"),
        "transfusion.enabled",
        lambda c: not c.transfusion.enabled,
        "false, where an encoder reads the text",
    ),
    # objective
    Rule(
        ("objective.m",),
        "objective.time_density",
        lambda c: c.objective.time_density == "logit-normal",
        '"logit-normal"',
    ),
    Rule(
        ("objective.s",),
        "objective.time_density",
        lambda c: c.objective.time_density in ("logit-normal", "mode"),
        '"logit-normal" or "mode"',
    ),
    Rule(
        ("objective.caption_dropout",),
        "transfusion.caption_first",
        lambda c: not (c.transfusion.enabled and c.transfusion.caption_first == 0),
        "a chance above 0, at which captions come first",
    ),
    # text and images
    Rule(MIXED, "transfusion.enabled", lambda c: c.transfusion.enabled, "true"),
    Rule(("transfusion.codec_width",), "transfusion.codec", lambda c: c.transfusion.codec == "unet", '"unet"'),
    Rule(
        ("transfusion.image_first_cap",),
        "transfusion.caption_first",
        lambda c: c.transfusion.caption_first < 1,
        "a chance below 1, at which pictures come first",
    ),
    Rule(
        ("transfusion.text_length",),
        "transfusion.text",
        lambda c: c.transfusion.text is not None,
        "text without pictures",
    ),
    # adapters and optimiser
    Rule(_keys("lora", "alpha targets"), "lora.rank", lambda c: c.lora.rank > 0, "a number above 0"),
    Rule(("optimizer.momentum",), "optimizer.name", lambda c: c.optimizer.name == "muon", '"muon"'),
    Rule(("optimizer.decay_fraction",), "optimizer.schedule", lambda c: c.optimizer.schedule == "wsd", '"wsd"'),
    Rule(
        ("optimizer.final_lr_fraction",),
        "optimizer.schedule",
        lambda c: c.optimizer.schedule != "constant",
        "one that falls",
    ),
    # the loop
    Rule(("training.ema_decay",), "training.ema", lambda c: c.training.ema == "exponential", '"exponential"', True),
    Rule(
        _keys("training", "ema_sigma_rel ema_snapshot_every ema_snapshot_dtype"),
        "training.ema",
        lambda c: c.training.ema == "power",
        '"power"',
    ),
    Rule(
        ("training.ema_snapshot_dtype",),
        "training.ema_snapshot_every",
        lambda c: c.training.ema_snapshot_every > 0,
        "a number above 0",
    ),
    Rule(
        ("training.recompute_every",),
        "training.recompute",
        lambda c: c.training.recompute != "none",
        '"full" or "selective"',
    ),
    Rule(
        ("training.profile",),
        "training.num_steps",
        lambda c: c.training.profiled is None or c.training.profiled[0] <= c.training.num_steps,
        "a run that gets there",
    ),
    Rule(("training.validate_every",), "data.held_out", lambda c: c.data.held_out > 0, "a number above 0"),
    # processes
    Rule(("parallel.shard_size",), "parallel.strategy", lambda c: c.parallel.strategy == "hsdp", '"hsdp"'),
    Rule(
        ("parallel.cpu_offload",),
        "parallel.strategy",
        lambda c: c.parallel.strategy in ("fsdp", "hsdp"),
        '"fsdp" or "hsdp"',
    ),
    Rule(
        ("parallel.reshard",),
        "parallel.strategy",
        lambda c: c.parallel.strategy in ("fsdp", "hsdp"),
        '"fsdp" or "hsdp"',
        True,
    ),
    Rule(("parallel.timeout",), "parallel.strategy", lambda c: c.parallel.strategy != "none", "several processes"),
    # pictures and scores
    Rule(("evaluation.prompts_per_question",), "data.source", lambda c: _is_shapes(c.data.source), '"shapes"'),
    Rule(
        _keys("evaluation", "validation_samples validation_times"),
        "data.held_out",
        lambda c: c.data.held_out > 0,
        "a number above 0",
    ),
)


def _is_cache(source: str) -> bool:
    from training.cache_files import is_cache

    return is_cache(source)


def _is_shapes(source: str) -> bool:
    from training.data import is_shapes

    with suppress(OSError, ValueError):  # a cache that cannot be read: opening it will raise the error
        return is_shapes(source)
    return True


def idle_settings(config: TrainConfig, keys: Iterable[str] | None = None) -> dict[str, str]:
    """The keys, out of some (None: all), that are not at their default and take no effect, each with the reason."""
    asked = set(settings.keys(type(config)) if keys is None else keys)
    default, found = type(config)(), dict[str, str]()
    for rule in RULES:
        for key in rule.keys:
            if key not in asked or key in found:
                continue
            value = attrgetter(key)(config)
            if value != attrgetter(key)(default) and (value or rule.off) and not rule.works(config):
                by = f"{rule.by} = {shown(attrgetter(rule.by)(config))}"
                found[key] = f"{key} = {shown(value)} takes no effect with {by}: it is for {rule.wants}"
    return found


def idle_warnings(config: TrainConfig) -> list[str]:
    """The warnings of a run about its config, except for keys that depend on the data, which is often exchanged."""
    return [line for key, line in idle_settings(config).items() if key not in OF_THE_DATA]


def refuse_idle(config: TrainConfig, keys: Iterable[str], where: str = "") -> None:
    """Raises ConfigError for the first of some keys that takes no effect; where: put before the message."""
    for line in idle_settings(config, keys).values():
        raise ConfigError(f"{where}{line}; leave the one out, or change the other")
