"""Scores of pictures by networks: FID, KID, precision and recall, CLIPScore, CMMD; of a model's pictures or any others.

    pictures (, captions) -> networks -> features -> metrics <- features <- networks <- reference

Pictures are added in batches, and only their features are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmdit.text_to_image import TextToImage
from mmdit.weights_io import write_json
from training.config import EvaluationConfig, TrainConfig
from training.data import DataError, Source, one_pass, open_source
from training.devices import pick_device
from training.image_networks import find_weights, open_clip_model, open_features
from training.metrics import LEAST, clip_score, cmmd, fid, kid, need, precision_recall
from training.progress import drawing
from training.reference import Log, cache_folder, reference_features
from training.run import RunFolder
from training.sections import BY_CLIP, BY_FEATURES
from training.setup import check_reference, held_out_samples, open_run_source

KID_SUBSET = 1000
OF_NETWORKS = ("features", "clip", "reference", "num_reference", "num_images", "cache")  # settings for these scores
AGAINST = (*BY_FEATURES, "cmmd")  # scores that compare with a reference


def check_metrics(config: EvaluationConfig) -> None:
    """Raises ValueError where `evaluation.metrics` needs a library, weights or more pictures than there are."""
    for name in config.metrics:
        for key in ("num_images", "num_reference") if name in AGAINST else ("num_images",):
            asked = getattr(config, key)
            if asked is not None and asked < LEAST[name]:
                raise ValueError(f"evaluation.{key} is {asked}: {name} needs at least {LEAST[name]} pictures")
    if set(config.metrics) & {"fid", "kid"}:
        need("torchmetrics", f"evaluation.metrics ({', '.join(config.metrics)})")
    for names, path in ((BY_FEATURES, config.features), (BY_CLIP, config.clip)):
        if set(config.metrics) & set(names) and path is not None:
            find_weights(path)


class Judge:
    """Scores pictures against a reference: `add` batches of them, then call `scores`.

    reference: pictures of the same size; None where no metric needs any. Raises ValueError for weights that are missing
    or do not fit.
    """

    def __init__(
        self, config: EvaluationConfig, reference: Source | None, device: torch.device, log: Log = lambda text: None
    ) -> None:
        self.config, self.reference, self.log = config, reference, log
        if reference is None and self._asks(*AGAINST):
            raise DataError(
                f"{', '.join(config.metrics)}: pictures are held against others, so name those by evaluation.reference "
                "(mmdit evaluate --reference)"
            )
        self._networks: dict[str, Any] = {}
        if self._asks(*BY_FEATURES):
            self._networks["features"] = open_features(str(config.features)).to(device)
        if self._asks(*BY_CLIP):
            self._networks["clip"] = open_clip_model(str(config.clip)).to(device)
        self._seen: dict[str, list[Tensor]] = {name: [] for name in (*self._networks, "captions")}
        self._references: dict[str, Tensor] = {}

    def _asks(self, *names: str) -> bool:
        return any(name in self.config.metrics for name in names)

    def add(self, images: Tensor, captions: Sequence[str] = ()) -> None:
        """Add pictures, uint8 (B, 3, H, W), and for CLIPScore a caption for each."""
        for name, network in self._networks.items():
            self._seen[name].append(network(images).cpu())
        if self._asks("clip-score"):
            if len(captions) != len(images) or not all(captions):
                raise DataError(
                    "clip-score needs a caption for each picture: put a .txt file of the same name beside it"
                )
            self._seen["captions"].append(self._networks["clip"].read(captions).cpu())

    def scores(self) -> dict[str, Any]:
        """The scores in `evaluation.metrics` of all pictures added since the last call. Raises DataError for none."""
        seen = {name: torch.cat(parts) for name, parts in self._seen.items() if parts}
        if not seen:
            raise DataError("none of the pictures can be read: there is nothing to score")
        for parts in self._seen.values():
            parts.clear()
        out: dict[str, Any] = {}
        if self._asks("fid"):
            out["fid"] = fid(self._held_against("features"), seen["features"])
        if self._asks("kid"):
            reference = self._held_against("features")
            size = min(KID_SUBSET, len(reference), len(seen["features"]))
            out["kid"], out["kid_deviation"] = kid(reference, seen["features"], size, seed=self.config.seed)
            out["kid_subset"] = size
        if self._asks("precision-recall"):
            out["precision"], out["recall"] = precision_recall(self._held_against("features"), seen["features"])
        if self._asks("clip-score"):
            out["clip_score"] = clip_score(seen["clip"], seen["captions"])
        if self._asks("cmmd"):
            out["cmmd"] = cmmd(self._held_against("clip"), seen["clip"])
        counts: dict[str, Any] = {f"{name}_network": network.name for name, network in self._networks.items()}
        for reference in self._references.values():
            counts["num_reference"] = len(reference)
        return {**out, "num_images": len(next(iter(seen.values()))), **counts}

    def _held_against(self, name: str) -> Tensor:
        """The reference's features by a network."""
        if name not in self._references:
            assert self.reference is not None
            self._references[name] = reference_features(
                self.reference,
                spread(len(self.reference), self.config.num_reference),
                self._networks[name],
                cache_folder(self.config.cache),
                self.config.batch_size,
                log=self.log,
            )
        return self._references[name]


class ModelJudge:
    """Scores a run's model on pictures drawn from captions; can be called at any step."""

    def __init__(self, config: TrainConfig, pipe: TextToImage, run: RunFolder | None = None) -> None:
        """run: its log gets the messages, and its index of the data is used."""
        self.config, index = config.evaluation, run.index if run is not None else None
        check_reference(config)
        if self.config.reference is None:
            data = replace(config.data, image_size=pipe.size, buckets=False)  # at the size that is drawn
            own = open_run_source(replace(config, data=data), pipe.step, index, need_captions=False)
            reference = own if isinstance(own, Source) else None  # a stream is none
        else:
            reference = open_source(self.config.reference, pipe.size, pipe.step, need_captions=False)
        self.captions = captions_to_draw(config, reference, pipe, index)
        self.judge = Judge(self.config, reference, pipe.device, run.log if run else lambda text: None)

    def __call__(self, pipe: TextToImage, progress: bool = False) -> dict[str, Any]:
        """Draw `evaluation.num_images` pictures and score them; picture i has the noise of seed + i. progress: show on
        standard error how many are drawn.
        """
        config, prompts = self.config, list(islice(cycle(self.captions), self.config.num_images))
        with drawing(len(prompts), progress) as callback:
            for first in range(0, len(prompts), config.batch_size):
                some = prompts[first : first + config.batch_size]
                images = pipe(some, seed=config.seed + first, batch_size=config.batch_size, callback=callback)
                self.judge.add(as_tensor(images), some)
        return self.judge.scores()


def captions_to_draw(
    config: TrainConfig, reference: Source | None, pipe: TextToImage, index: Path | None = None
) -> list[str]:
    """The captions of evaluation.reference, if it has any; else the held-out ones of the run's own data."""
    if config.evaluation.reference and reference is not None:
        own = [caption for i in range(len(reference)) if (caption := reference.caption(i))]
        if own:
            return own
    source, held_out = held_out_samples(config, open_run_source(config, pipe.step, index))
    indices = held_out if len(held_out) else range(len(source))
    found = [caption for i in indices if (caption := source.caption(int(i)))]
    if not found:
        raise DataError(f"there are no captions to draw in {config.data.source}: name others by evaluation.reference")
    return found


def as_tensor(pictures: Sequence[Image.Image]) -> Tensor:
    """Pictures of one size as uint8 (B, 3, H, W)."""
    return torch.from_numpy(np.stack([np.asarray(picture.convert("RGB")) for picture in pictures])).permute(0, 3, 1, 2)


def spread(length: int, count: int | None) -> np.ndarray:
    """`count` evenly spread numbers below `length`; all of them for None or a larger count."""
    return np.arange(length) if count is None or count >= length else np.arange(count) * length // count


def evaluate_images(
    spec: str,
    config: EvaluationConfig,
    num_images: int | None = None,
    out: Path | None = None,
    log: Log = print,
    device: str = "auto",
) -> dict[str, Any]:
    """Score a folder of pictures (or shards) by `config.metrics`, against `config.reference`; writes JSON to `out`.

    Captions are beside the pictures as in training data. num_images: score only so many, evenly spread. The reference
    is fitted to the pictures' size. device: where the networks compute, as for `pick_device`. Raises DataError where
    there are no pictures, ValueError for a missing network or device.
    """
    if not config.metrics:
        raise ValueError("which scores? name some: fid, kid, precision-recall, clip-score, cmmd")
    check_metrics(config)
    source = open_source(spec, need_captions=False)
    reference = None
    if config.reference is not None:
        reference = open_source(config.reference, source.image_size, need_captions=False)
    judge = Judge(config, reference, pick_device(device), log)
    for batch in one_pass(source, spread(len(source), num_images), config.batch_size, 0):
        for key, reason in batch.skipped:
            log(f"skipped: {key}: {reason}")
        if len(batch.captions):
            judge.add(batch.images, batch.captions)
    scores = judge.scores()
    if out is not None:
        write_json(out, scores)
    return scores


def with_evaluation(config: TrainConfig, given: dict[str, Any]) -> TrainConfig:
    """The config with some settings of [evaluation] replaced; None leaves one as it is.

    Raises ValueError where a setting is for scores by networks, and evaluation.metrics names none.
    """
    given = {name: value for name, value in given.items() if value is not None}
    about = [name for name in given if name in OF_NETWORKS]
    if about and not given.get("metrics", config.evaluation.metrics):
        raise ValueError(f"evaluation.{about[0]} is for scores by networks: name some with --metrics")
    return replace(config, evaluation=replace(config.evaluation, **given))
