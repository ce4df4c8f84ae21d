"""Loading and saving a trunk: our own folder, a diffusers folder, or a single file in the original SD3 layout.

A folder holds `config.json`, which tells ours from diffusers' `SD3Transformer2DModel`, and the weights. A file holds
only tensors, of the trunk and perhaps of text encoders and autoencoder; the config follows from their shapes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from mmdit.config import MMDiTConfig, TransfusionConfig
from mmdit.formats import config_from_diffusers, config_from_sd3, config_to_diffusers, metadata_for_sd3
from mmdit.layouts import DIFFUSERS, SD3, Layout
from mmdit.lora import plain_state
from mmdit.mapped import PICKLES, Weights, read_metadata, read_weights, refuse_pickle
from mmdit.model import MMDiT
from mmdit.transfusion import Transfusion
from mmdit.weights_io import (
    check_dtype,
    check_fit,
    json_writer,
    read_config,
    read_json,
    shapes_of,
    weights_writer,
    write_all_aside,
)

LayoutName = Literal["mmdit", "diffusers", "sd3"]
DIFFUSERS_WEIGHTS = "diffusion_pytorch_model"
TRUNK_PREFIX = "model.diffusion_model."
OTHER_PARTS = ("first_stage_model.", "text_encoders.", "model_sampling.", "model.model_sampling.")
"""Prefixes of the tensors in an SD3 file that are not the trunk's."""


class _Stored(NamedTuple):
    """A model on disk: its config, its mapped tensors, their layout (None: ours), and where they were found."""

    config: MMDiTConfig | TransfusionConfig
    tensors: Weights
    layout: Layout | None
    where: Path


def load(
    path: str | Path, dtype: torch.dtype | None = None, device: str | torch.device | None = None
) -> MMDiT | Transfusion:
    """The trunk in a run folder, in what `save` wrote, in a diffusers folder (a transformer or a pipeline; shards and
    variants too), or in a .safetensors file in the original SD3 layout, with or without other parts in it.

    dtype: of all tensors (None: as stored). device: of all tensors (None: CPU). On the CPU, tensors that need no
    conversion stay memory-mapped and are read when first used. Raises FileNotFoundError if there is no model,
    ValueError for pickles and for weights that do not fit, naming them.
    """
    root = Path(path)
    check_dtype(dtype)
    stored = _from_file(root) if root.is_file() or root.suffix in PICKLES else _from_folder(root)
    config = stored.config

    def build() -> MMDiT | Transfusion:
        return Transfusion(config) if isinstance(config, TransfusionConfig) else MMDiT(config)

    model = shapes_of(build, config.depth, stored.tensors, str(stored.where))
    own = model.state_dict()
    check_fit(_expected(own, stored), stored.tensors, str(stored.where))
    storage_only = {x.dtype for x in stored.tensors.values() if x.dtype.itemsize == 1 or not x.is_floating_point()}
    if dtype is None and storage_only:
        raise ValueError(f"{stored.where} holds {storage_only.pop()}, in which no model can compute: give a dtype")
    state = {}
    for name, tensor in _converted(stored):
        state[name] = tensor.to(device=device, dtype=dtype)
        stored.tensors.release()  # else memory holds both the copy and the pages it was read from
    model.load_state_dict(state, assign=True)
    return model


def _expected(own: dict[str, Tensor], stored: _Stored) -> dict[str, Tensor]:
    """Names and shapes that the files must hold for a model with the (meta) tensors `own`."""
    if stored.layout is None:
        return own
    assert isinstance(stored.config, MMDiTConfig)
    return stored.layout.from_ours(own, stored.config)


def _converted(stored: _Stored) -> Iterator[tuple[str, Tensor]]:
    """Tensors in our layout, one by one; each is removed from `stored`."""
    if stored.layout is None:
        return ((name, stored.tensors.pop(name)) for name in [*stored.tensors])
    assert isinstance(stored.config, MMDiTConfig)
    return stored.layout.take(stored.tensors, stored.config)


def find(path: str | Path) -> Path:
    """The folder of a trunk's config.json: this one, or that in a run folder or pipeline. FileNotFoundError if none."""
    root = Path(path)
    for folder in (root / "pipeline" / "transformer", root / "transformer", root):
        if (folder / "config.json").exists():
            return folder
    raise FileNotFoundError(
        f"{root} holds no model: expected a run folder, a folder with config.json, or a .safetensors file"
    )


def _from_folder(root: Path) -> _Stored:
    folder = find(root)
    path = folder / "config.json"
    config = read_json(path)
    kind = config.get("_class_name") if isinstance(config, dict) else None
    if kind == "SD3Transformer2DModel":
        return _Stored(config_from_diffusers(config), read_folder(folder, DIFFUSERS_WEIGHTS), DIFFUSERS, folder)
    if not isinstance(config, dict) or not config or kind or "model_type" in config or "architectures" in config:
        found = kind or (_architecture(config) if isinstance(config, dict) else None) or "no model that is known"
        raise ValueError(f"{path} describes {found}, expected SD3Transformer2DModel or a model of mmdit's own")
    own: Any = TransfusionConfig if "vocab_size" in config else MMDiTConfig
    if unknown := sorted(config.keys() - {field.name for field in fields(own)}):
        raise ValueError(
            f"{path} does not fit: it has no _class_name, so it would be a model of mmdit's own, and these have no "
            f"{', '.join(unknown[:4])}"
        )
    return _Stored(read_config(own, path), read_folder(folder, "model"), None, folder)


def _architecture(config: dict[str, Any]) -> Any:
    """The architecture that a config of transformers names."""
    architectures = config.get("architectures")
    return architectures[0] if isinstance(architectures, list) and architectures else config.get("model_type")


def read_folder(folder: Path, stem: str) -> Weights:
    """The mapped tensors of a model that diffusers or transformers saved: one file, or shards with their index; of a
    variant, bf16 before fp16, if there are none without.

    Raises as `read_weights` does, and for a folder that has only pickles.
    """
    variant = variant_of(folder, stem)
    if variant is None:
        for path in sorted(folder.iterdir()):
            refuse_pickle(path)
        raise FileNotFoundError(f"no weights at {folder / stem}.safetensors")
    single, index = _weight_paths(folder, stem, variant)
    return read_weights(single) if single.is_file() else _read_shards(index)


def variant_of(folder: Path, stem: str) -> str | None:
    """The variant that `read_folder` reads: "" for weights without one, else its name; None if there are no weights."""
    found = [path.name.split(".")[1] for path in folder.glob(f"{stem}.*.safetensors")]
    found += [path.name.split(".")[-2] for path in folder.glob(f"{stem}.safetensors.index.*.json")]
    names = ("", *sorted({*found}))
    return next((name for name in names if any(path.is_file() for path in _weight_paths(folder, stem, name))), None)


def _weight_paths(folder: Path, stem: str, variant: str) -> tuple[Path, Path]:
    """The paths of the single weights file and of the index of shards."""
    end = f".{variant}" if variant else ""
    return folder / f"{stem}{end}.safetensors", folder / f"{stem}.safetensors.index{end}.json"


def _read_shards(index: Path) -> Weights:
    table = read_json(index)
    file_of = table.get("weight_map") if isinstance(table, dict) else None
    if not isinstance(file_of, dict):
        raise ValueError(f"{index} has no weight_map, which says where the tensors are")
    if outside := [name for name in file_of.values() if not _is_file_name(name)]:
        raise ValueError(f"{index} names {outside[0]!r}, expected files in its own folder")
    shards = {name: read_weights(index.parent / name) for name in sorted({*file_of.values()})}
    found: dict[str, str] = {}
    for file, shard in shards.items():
        for name in shard:
            if (other := found.setdefault(name, file)) != file:
                raise ValueError(f"{index.parent}: {name} is in {other} and in {file}, expected it in one of them")
    tensors = {name: tensor for shard in shards.values() for name, tensor in shard.items()}
    if missing := sorted(file_of.keys() - tensors.keys()):
        raise ValueError(f"{index} names {len(missing)} tensors that its files do not have: {', '.join(missing[:4])}")
    return Weights(tensors, [mapping for shard in shards.values() for mapping in shard.mappings])


def _is_file_name(name: object) -> bool:
    return isinstance(name, str) and name not in ("", "..") and Path(name).name == name


def _from_file(path: Path) -> _Stored:
    stored = read_weights(path)
    prefix = next((name[: name.index("joint_blocks.")] for name in stored if "joint_blocks." in name), None)
    if prefix is None:
        known = any(name.startswith(("blocks.", "transformer_blocks.")) for name in stored)
        what = "load the folder that holds its config.json" if known else "its tensors are those of another model"
        raise ValueError(f"{path} is not in the original SD3 layout, none of its names holds joint_blocks: {what}")
    trunk = {name.removeprefix(prefix): x for name, x in stored.items() if not name.startswith(OTHER_PARTS)}
    try:
        config = config_from_sd3(trunk, read_metadata(path))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return _Stored(config, Weights(trunk, stored.mappings), SD3, path)


def read_part(path: str | Path, prefix: str) -> dict[str, Tensor]:
    """The mapped tensors of one part of a single file, without their prefix: "first_stage_model." is the autoencoder,
    "text_encoders.clip_l.", "text_encoders.clip_g." and "text_encoders.t5xxl." the text encoders.

    Empty if the file has no such part; raises as `mmdit.mapped.read_weights` does.
    """
    tensors = read_weights(Path(path))
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def save(model: MMDiT | Transfusion, path: str | Path, layout: LayoutName = "mmdit") -> None:
    """Write a trunk: a folder in our layout, or as diffusers' `SD3Transformer2DModel.from_pretrained` reads it; or one
    .safetensors file in the original SD3 layout ("sd3"). LoRA adapters (`mmdit.lora`) are merged into the weights.

    Raises ValueError for what the layout cannot express. A failure leaves the files there as they were.
    """
    if not isinstance(model, MMDiT | Transfusion):
        raise ValueError(f"got a {type(model).__name__}, expected an MMDiT or a Transfusion; a pipeline has `save`")
    root, state = Path(path), plain_state(model)
    if layout not in get_args(LayoutName):
        raise ValueError(f"layout is {layout!r}, expected 'mmdit', 'diffusers' or 'sd3'")
    if (root.suffix == ".safetensors") != (layout == "sd3"):
        wanted = "one file: give a path that ends in .safetensors" if layout == "sd3" else "a folder, not a file"
        raise ValueError(f"the layout {layout!r} is {wanted} (got {root})")
    if layout == "mmdit":
        weights, config = weights_writer(state), json_writer(model.config.to_dict())
        write_all_aside({root / "model.safetensors": weights, root / "config.json": config})
        return
    if not isinstance(model, MMDiT):
        raise ValueError(f"the layout {layout!r} has no model of text and images: save it in the layout 'mmdit'")
    if layout == "sd3":
        theirs = {TRUNK_PREFIX + name: tensor for name, tensor in SD3.from_ours(state, model.config).items()}
        write_all_aside({root: weights_writer(theirs, metadata_for_sd3(model.config))})
    else:
        config = json_writer({"_class_name": "SD3Transformer2DModel", **config_to_diffusers(model.config)})
        weights = weights_writer(DIFFUSERS.from_ours(state, model.config), {"format": "pt"})
        write_all_aside({root / f"{DIFFUSERS_WEIGHTS}.safetensors": weights, root / "config.json": config})
