"""Starting from existing weights (`init`), and which parameters are then trained; drawing those of a sharded model.

A resumed run loads its own weights later; here only its modules get their shapes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import mmdit.config
from mmdit.config import LlamaConfig, MMDiTConfig
from mmdit.features import FrozenText
from mmdit.files import find, load
from mmdit.init_from import extend_tables, is_language_model, needs, text_parameters, weights_for
from mmdit.lora import add_lora, base_state, draw_adapters
from mmdit.model import MMDiT
from mmdit.text import LearnedText
from mmdit.text_to_image import CaptionedMMDiT
from mmdit.transfusion import Transfusion
from mmdit.weights_io import load_weights, read_config, read_json
from training.alike import first_values
from training.config import ConfigError, TrainConfig
from training.mup import scale_start
from training.parallel import Ranks
from training.run import RunFolder
from training.settings import as_override
from training.sharding import copy_tensors, local, shard_like

T = TypeVar("T", MMDiT, Transfusion)
SHAPE = ("patch_size", "depth", "num_heads", "head_dim", "mlp_ratio", "positions", "dual_attention_layers")
TEXT_IN = ("context_in.", "pooled_in.")  # layers that a trunk for another text encoder learns afresh
NEW_NORMS = (".q_norm.weight", ".k_norm.weight")


def shape_alone() -> torch.device:
    """A context in which a trunk is built without memory: all of its weights will be loaded, or drawn later."""
    return torch.device("meta")


class DrawnInFull(TorchDispatchMode):
    """A context in which each sharded tensor is drawn as one process draws it: in full and on the CPU, where it moves
    the generator as far. Its shard is kept. `digest` is of the first values of each.
    """

    def __init__(self) -> None:
        super().__init__()
        self.digest = hashlib.sha256()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded not in op.tags or not hasattr(args[0], "to_local"):
            return op(*args, **(kwargs or {}))
        x, *how = args
        full = op(torch.empty(x.shape, dtype=x.dtype), *how, **(kwargs or {}))
        self.digest.update(first_values(full))
        local(x).copy_(local(shard_like(full, x)))
        return x


@torch.no_grad()
def fill_weights(trunk: Any, given: Mapping[str, Tensor], base_width: int | None, ranks: Ranks) -> None:
    """Give a sharded trunk, built by `shape_alone`, the weights that one process gives it, bit for bit: those in
    `given`, by name, and all others as its constructor draws them; and its adapters theirs.

    base_width: see `scale_start`. Called by all processes, of which each has one tensor in full at a time. Raises
    ConfigError, in all of them, where one has or draws other numbers.
    """
    own = base_state(trunk)
    with DrawnInFull() as drawn:
        if own.keys() - given.keys():
            for module in trunk.modules():
                if hasattr(module, "reset_parameters"):
                    module.reset_parameters()
            trunk.init_weights()
        draw_adapters(trunk)
    for name, x in given.items():
        drawn.digest.update(name.encode() + first_values(x))
    ranks.agree(weights=drawn.digest.hexdigest())
    copy_tensors(own, extend_tables(given, own))
    if base_width is not None and not given:
        scale_start(trunk, base_width)


def language_model_in(config: TrainConfig) -> str | None:
    """The language model in `init`, from which the embedding of the words is then taken, if there is one."""
    return next((path for path in config.init_paths if is_language_model(path)), None)


def tokenizer_to_start_from(config: TrainConfig) -> Path | None:
    """The tokenizer of the run in `init`, if that has a model of the same kind: its ids are those of the weights."""
    if config.text.tokenizer != "train" or language_model_in(config) is not None:
        return None
    for path in config.init_paths:
        text = _text_folder(path)
        if text is not None and ("vocab_size" in read_json(find(path) / "config.json")) == config.transfusion.enabled:
            return text / "tokenizer.json"
    return None


@torch.no_grad()
def start_mmdit(
    config: TrainConfig, run: RunFolder, model: CaptionedMMDiT, resumed: bool, sharded: bool
) -> tuple[MMDiT, dict[str, Tensor]]:
    """The trunk with the weights that `init` names, and with adapters where only those are trained. One that will be
    sharded is without memory, and comes with these weights, for `fill_weights`.

    Layers that read the text start afresh where the text encoder is another; QK-norm may be added. Raises ConfigError,
    which names the settings to change, where [model] does not have the shape of the weights.
    """
    trunk, given = model.transformer, dict[str, Tensor]()
    if config.init_paths and resumed:
        with shape_alone():
            trunk = MMDiT(read_config(MMDiTConfig, run.path / "pipeline" / "transformer" / "config.json"))
    elif config.init_paths:
        trunk, given = _adapted_trunk(config, run, trunk, _reads_another(config.init_paths[0], model.conditioner))
        if not sharded:
            trunk, given = _filled(trunk, given), {}
        text = _text_folder(config.init_paths[0])
        if text is not None and isinstance(model.conditioner, LearnedText):
            load_weights(model.conditioner, text / "model.safetensors")
            run.log(f"text encoder and tokenizer from {config.init_paths[0]}")
    if config.lora.rank:
        with torch.random.fork_rng(devices=[], enabled=sharded):
            add_lora(trunk, config.lora.rank, config.lora.alpha, config.lora.targets)
        model.conditioner.requires_grad_(False)
    return trunk, given


def _adapted_trunk(
    config: TrainConfig, run: RunFolder, fresh: MMDiT, other_text: bool
) -> tuple[MMDiT, dict[str, Tensor]]:
    """A trunk of the shape of `fresh`, without memory, and by name the weights that `init` names wherever they fit.
    other_text: but for the layers that read the text.
    """
    path = config.init_paths[0]
    found = load(path)
    if not isinstance(found, MMDiT):
        raise ConfigError(f"{path} is a model of text and images: set transfusion.enabled=true to go on from it")
    theirs, ours = found.config, fresh.config
    wrong = [
        f"model.{name}={as_override(getattr(theirs, name))}"
        for name in SHAPE
        if getattr(theirs, name) != getattr(ours, name)
    ]
    if theirs.qk_norm and not ours.qk_norm:
        wrong.append(f"model.qk_norm={theirs.qk_norm}")
    if wrong:
        raise ConfigError(f"to start from {path} set {' '.join(wrong)}")
    if theirs.in_channels != ours.in_channels:
        raise ConfigError(
            f"{path} has latents of {theirs.in_channels} channels, the autoencoder {ours.in_channels}: name its own in "
            "autoencoder"
        )
    side = config.model.pos_embed_max_size
    if ours.positions != "rope" and side != theirs.pos_embed_max_size:
        run.log(
            f"warning: model.pos_embed_max_size = {side} takes no effect with init = {as_override(path)}: "
            f"its table of positions has {theirs.pos_embed_max_size} rows and columns"
        )
    shape = replace(ours, sample_size=theirs.sample_size, pos_embed_max_size=theirs.pos_embed_max_size)
    with shape_alone():
        trunk = MMDiT(shape)
    own, given = trunk.state_dict(), found.state_dict()
    norms = [name for name in own.keys() - given.keys() if name.endswith(NEW_NORMS)]
    drawn = [
        name
        for name, tensor in own.items()
        if name.startswith(TEXT_IN) and (other_text or given[name].shape != tensor.shape)
    ]
    if config.lora.rank and drawn:
        raise ConfigError(
            f"{path} reads another text encoder than {config.text.encoder}, and adapters alone would leave the layers "
            "that read it as they begin: name its own in text.encoder, or leave out lora.rank"
        )
    new = [name for name in own if name in drawn or name in norms]
    rest = f"; new: {', '.join(new[:4])}{', ...' if len(new) > 4 else ''}" if new else ", none new"
    run.log(f"weights from {path}: {len(own) - len(new)} tensors{rest}")
    given |= {name: torch.ones(own[name].shape) for name in norms}
    return trunk, {name: given[name] for name in own if name not in drawn}


def _reads_another(path: str, text: nn.Module) -> bool:
    """Whether the weights in `init` say that they were trained with another text encoder than this."""
    files = [folder / "config.json" for folder in (Path(path) / "pipeline" / "text", Path(path) / "text")]
    about = next((read_json(file) for file in files if file.exists()), None)
    if about is None:
        return False
    sha256 = about.get("sha256")  # of frozen ones
    return bool(sha256 != (text.about()["sha256"] if isinstance(text, FrozenText) else None))


def _text_folder(path: str) -> Path | None:
    for folder in (Path(path) / "pipeline" / "text", Path(path) / "text"):
        if (folder / "tokenizer.json").exists() and (folder / "config.json").exists():
            return folder
    return None


def text_form(config: TrainConfig, run: RunFolder, resumed: bool) -> LlamaConfig | None:
    """The form of the text stream of a language model that the run starts from, or None; a resumed run has kept it.

    Raises ConfigError, which names the settings to change, where [model] or [text] does not fit the weights in `init`.
    """
    if resumed:
        return read_config(mmdit.config.TransfusionConfig, find(run.path) / "config.json").llama
    paths = config.init_paths
    wanted, model = needs(paths), config.model
    wrong = [
        f"model.{name}={as_override(value)}"
        for name, value in wanted.items()
        if name in model.__dataclass_fields__ and getattr(model, name) != value
    ]
    if config.text.vocab_size < wanted.get("vocab_size", 0):
        wrong.append(f"text.vocab_size={wanted['vocab_size']}")
    if wrong:
        raise ConfigError(f"to start from {' and '.join(paths)} set {' '.join(wrong)}")
    return wanted.get("llama")


@torch.no_grad()
def start_transfusion(
    config: TrainConfig, run: RunFolder, trunk: Transfusion, resumed: bool, sharded: bool
) -> tuple[Transfusion, dict[str, Tensor]]:
    """The trunk with the weights that `init` names, and its text's frozen if transfusion.freeze_text. One that will be
    sharded is without memory, and comes with these weights, for `fill_weights`.

    Raises ConfigError where text is to be frozen and `init` has not given all of its weights.
    """
    frozen, given = config.transfusion.freeze_text, dict[str, Tensor]()
    if config.init_paths and not resumed:
        started = weights_for(trunk, config.init_paths)
        for line in started.lines:
            run.log(f"weights {line}")
        own = sorted(text_parameters(trunk).keys() & set(started.fresh)) if frozen else []
        if own:
            raise ConfigError(
                f"transfusion.freeze_text is set, but {' and '.join(config.init_paths)} did not give what is to be "
                f"frozen, {own[0]} for one: name a language model in init"
            )
        trunk, given = (trunk, started.tensors) if sharded else (_filled(trunk, started.tensors), {})
    if frozen:
        for parameter in text_parameters(trunk).values():
            parameter.requires_grad_(False)
    return trunk, given


def _filled(trunk: T, given: Mapping[str, Tensor]) -> T:
    """A trunk like this one, which is without memory, with the weights in `given`, and all others as its constructor
    draws them.
    """
    missing = trunk.state_dict().keys() - given.keys()
    trunk = type(trunk)(trunk.config) if missing else trunk.to_empty(device="cpu")
    own = trunk.state_dict()
    copy_tensors(own, extend_tables(given, own))
    return trunk
