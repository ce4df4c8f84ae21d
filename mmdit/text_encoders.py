"""Frozen text encoders as conditioners: any CLIP, T5 or causal language model in a folder.

An encoder's network is never trained: it moves with the model that holds it, but is not among its parameters, in its
state dict or copied with it. Folders are in the hub's format, with config.json, model.safetensors and the tokenizer's
files, or in open_clip's, with open_clip_config.json. transformers and open_clip are imported when they are needed.

Shape letters: B batch, L tokens, D width, P width of the pooled vector.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mmdit.features import Encoded, Features, FrozenText, TextShape, joined
from mmdit.files import variant_of
from mmdit.text import Condition, Tokens
from mmdit.weights_io import read_json

if TYPE_CHECKING:
    from mmdit.sd3_text import SD3Text


class TextEncoder(FrozenText):
    """One frozen encoder; by itself the conditioner of a model trained from scratch.

    As with `LearnedText`, padding is masked in the encoder and the trunk, and a dropped caption is the empty one.
    source: the folder it was loaded from, or None.
    """

    num_encoders = 1
    context_dim: int
    pooled_dim: int

    def __init__(self, network: nn.Module, max_length: int, longest: int | None, source: Path | None = None) -> None:
        super().__init__()
        if max_length < 2 or (longest is not None and max_length > longest):
            raise ValueError(
                f"max_length is {max_length}, expected 2 to {longest or 'any number of'} tokens"
                + (f", all that the text encoder {source or ''} has places for" if longest else "")
            )
        # In a tuple, hidden from parameters() and state_dict().
        self._held = (network.requires_grad_(False).eval(),)
        self.max_length, self.source = max_length, source

    @property
    def network(self) -> Any:
        """The network, frozen."""
        return self._held[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TextEncoder:
        kept = {id(x) for x in _kept_in_float32(self.network)}

        def change(x: Tensor) -> Tensor:
            new = fn(x)
            return x.to(new.device, torch.float32) if id(x) in kept and new.dtype == torch.float16 else new

        self.network._apply(change, recurse)
        return super()._apply(fn, recurse)

    def __deepcopy__(self, memo: object) -> TextEncoder:
        return self

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @abstractmethod
    def tokenize(self, captions: Sequence[str]) -> Tokens:
        """Captions to `Tokens` (B, max_length), on the CPU."""

    @abstractmethod
    def encode(self, ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """States (B, L, D) and pooled vectors (B, P) of ids (B, L); with mask None the encoder attends to padding."""

    @torch.no_grad()
    def forward(self, tokens: Tokens, drop: Tensor | None = None) -> Condition:
        """Tokens to a `Condition` in float32; the caption is replaced by the empty one where `drop` (B, 1) is True."""
        return joined(self.features(self.dropped(tokens, drop)), self.context_dim)

    @torch.no_grad()
    def features(self, tokens: Tokens) -> Features:
        """States, pooled vectors and mask of captions."""
        return Features([Encoded(*self.encode(*tokens), tokens.mask)])

    @property
    def shape(self) -> TextShape:
        """The shape of the features."""
        return TextShape(((self.max_length, self.context_dim, self.pooled_dim),), (True,), self.context_dim)

    def dropped(self, tokens: Tokens, drop: Tensor | None) -> Tokens:
        """The tokens, with those of the empty caption where `drop` (B, 1) is True."""
        if drop is None:
            return tokens
        empty = self.tokenize([""]).to(tokens.ids.device)
        return Tokens(*(torch.where(drop, e, x) for e, x in zip(empty, tokens, strict=True)))

    def about(self) -> dict[str, Any]:
        if self.source is None:
            raise ValueError("this text encoder came from no folder: save it, and open it with open_text_encoder")
        return {"encoder": str(self.source), "max_length": self.max_length, "sha256": fingerprint(self.source)}


def _kept_in_float32(network: nn.Module) -> Iterator[Tensor]:
    """The weights that transformers keeps in float32 when the others are float16: T5's activations overflow in it."""
    names = getattr(network, "_keep_in_fp32_modules", None) or ()
    for name, parameter in network.named_parameters():
        if not set(names).isdisjoint(name.split(".")):
            yield parameter


def _never_in_float16(device: str) -> AbstractContextManager:
    """A context without autocast to float16, in which the states of T5 and of language models may overflow."""
    half = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16
    return torch.autocast(device, enabled=False) if half else nullcontext()


class HubEncoder(TextEncoder):
    """An encoder of transformers with its tokenizer."""

    def __init__(
        self, network: Any, tokenizer: Any, max_length: int, longest: int | None = None, source: Path | None = None
    ) -> None:
        super().__init__(network, max_length, longest, source)
        if tokenizer.pad_token is None:  # as in most causal language models
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.padding_side = "right"
        self.tokenizer = tokenizer

    def tokenize(self, captions: Sequence[str]) -> Tokens:
        out = self.tokenizer(
            list(captions), padding="max_length", max_length=self.max_length, truncation=True, return_tensors="pt"
        )
        mask = out.attention_mask.bool()
        mask[:, 0] = True  # some tokenizers give no token for the empty caption
        return Tokens(out.input_ids, mask)


class CLIPText(HubEncoder):
    """A CLIP text model: its penultimate hidden states, and the projected state of the end token as pooled vector.

    Without a projection (CLIPTextModel) the pooled vector is the unprojected state.
    """

    def __init__(self, network: Any, tokenizer: Any, max_length: int = 77, source: Path | None = None) -> None:
        super().__init__(network, tokenizer, max_length, network.config.max_position_embeddings, source)
        self.context_dim = network.config.hidden_size
        self.pooled_dim = network.config.projection_dim if hasattr(network, "text_projection") else self.context_dim

    def encode(self, ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        out = self.network(ids, output_hidden_states=True)  # no mask: attention is causal, and padding comes last
        return out.hidden_states[-2], out.text_embeds if hasattr(out, "text_embeds") else out.pooler_output


class HiddenStates(HubEncoder):
    """The last hidden states of T5's encoder or of a causal language model; pooled: their mean over real tokens."""

    def __init__(self, network: Any, tokenizer: Any, max_length: int, source: Path | None = None) -> None:
        longest = None if network.config.model_type in T5 else getattr(network.config, "max_position_embeddings", None)
        super().__init__(network, tokenizer, max_length, longest, source)
        network.config.use_cache = False  # nothing is generated
        self.context_dim = self.pooled_dim = network.config.hidden_size

    def encode(self, ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        with _never_in_float16(ids.device.type):
            x = self.network(ids, attention_mask=mask).last_hidden_state
        real = torch.ones_like(x[..., :1]) if mask is None else mask[..., None].to(x.dtype)
        return x, (x * real).sum(1) / real.sum(1)


class OpenCLIPText(TextEncoder):
    """`CLIPText` with a model of open_clip: the same states and pooled vector."""

    def __init__(self, network: Any, tokenizer: Any, max_length: int = 77, source: Path | None = None) -> None:
        text = getattr(network, "text", network)
        super().__init__(network, max_length, text.context_length, source)
        if max_length != text.context_length:
            raise ValueError(f"max_length is {max_length}, expected {text.context_length}: open_clip takes no other")
        self.tokenizer, self.layers = tokenizer, len(text.transformer.resblocks)
        self.context_dim = text.ln_final.weight.shape[0]
        projection = text.text_projection
        self.pooled_dim = getattr(projection, "out_features", None) or projection.shape[1]

    def tokenize(self, captions: Sequence[str]) -> Tokens:
        ids = self.tokenizer(list(captions), context_length=self.max_length)
        real = torch.arange(self.max_length) <= ids.argmax(1, keepdim=True)  # the end token has the largest id
        return Tokens(ids, real)

    def encode(self, ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        out = self.network.forward_intermediates(text=ids, text_indices=[self.layers - 2], normalize=False)
        return out["text_intermediates"][0], out["text_features"]


# --- from disk -----------------------------------------------------------------------------------------------------

T5 = ("t5", "mt5", "umt5")


def open_text_encoder(
    folder: str | Path, max_length: int | None = None, dtype: torch.dtype = torch.float32
) -> TextEncoder | SD3Text:
    """The frozen text encoder in a folder, or the three of a diffusers SD3 pipeline, on the CPU.

    max_length: tokens per caption (of T5, for SD3's three); by default CLIP's 77, or 256. Raises ValueError if there is
    no encoder, if tensors are missing, and for pickled weights.
    """
    folder = Path(folder).expanduser().resolve()
    if (folder / "model_index.json").is_file() or (folder / "text_encoder").is_dir():
        from mmdit.sd3_text import open_sd3_text

        three = open_sd3_text(folder, max_length or 256, dtype)
        if not any(three.encoders):
            raise ValueError(f"no text encoder in {folder}: the pipeline has none of text_encoder, _2 and _3")
        return three
    if (folder / "config.json").is_file():
        return open_hub(folder, folder, max_length, dtype)
    if (folder / "open_clip_config.json").is_file():
        return _open_clip(folder, max_length or 77, dtype)
    raise ValueError(
        f"no text encoder in {folder}: expected config.json with model.safetensors and a tokenizer, "
        "open_clip_config.json, or a diffusers SD3 pipeline"
    )


def open_hub(folder: Path, tokenizer: Path, max_length: int | None, dtype: torch.dtype) -> HubEncoder:
    """The encoder of transformers in one folder, with the tokenizer of another, as pipelines store them."""
    import transformers

    config = read_json(folder / "config.json")
    kind = config.get("model_type") if isinstance(config, dict) else None
    names = (config.get("architectures") or [""]) if isinstance(config, dict) else [""]
    if kind in T5:
        name = {"t5": "T5EncoderModel", "mt5": "MT5EncoderModel", "umt5": "UMT5EncoderModel"}[kind]
    elif kind in ("clip", "clip_text_model"):
        name = "CLIPTextModel" if names[0] == "CLIPTextModel" else "CLIPTextModelWithProjection"
    else:
        name = "AutoModel"
    network, words = _network(getattr(transformers, name), folder, dtype), read_tokenizer(tokenizer)
    if "clip" in str(kind):
        return CLIPText(network, words, max_length or 77, folder)
    if kind not in T5 and not any(name.endswith("ForCausalLM") or name.endswith("LMHeadModel") for name in names):
        raise ValueError(f"{folder} holds {names[0] or kind}, expected a CLIP, a T5 or a causal language model")
    return HiddenStates(network, words, max_length or 256, folder)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers from showing how far it is with loading, which breaks into our output, and from listing the
    weights that a model does not need or lacks, of which we say the latter.
    """
    from transformers.utils import logging

    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()


def _network(kind: Any, folder: Path, dtype: torch.dtype) -> Any:
    try:
        with quiet_transformers():
            network, info = kind.from_pretrained(
                folder,
                dtype=dtype,
                variant=variant_of(folder, "model") or None,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
            )
    except Exception as error:
        raise ValueError(f"cannot read the text encoder in {folder}: {first_line(error)}") from error
    _check_read(info, ("missing_keys", "mismatched_keys"), f"the weights in {folder} do not fit its config")
    return network


def from_transformers(kind: Any, tensors: Mapping[str, Tensor], config: Any, dtype: torch.dtype) -> Any:
    """A network of transformers with these tensors. Raises ValueError listing those that do not fit."""
    with quiet_transformers():
        network, info = kind.from_pretrained(
            None, config=config, state_dict=dict(tensors), dtype=dtype, output_loading_info=True
        )
    _check_read(info, ("missing_keys", "mismatched_keys", "unexpected_keys"), "its tensors do not fit their shape")
    return network


def _check_read(info: Mapping[str, Any], kinds: Sequence[str], what: str) -> None:
    """Raises ValueError for tensors that transformers reports as missing, unexpected or misshapen."""
    wrong = [str(name) for kind in kinds for name in sorted(info[kind])]
    if wrong:
        shown = ", ".join(wrong[:4])
        raise ValueError(f"{what}: {len(wrong)} missing{', extra' * (len(kinds) > 2)} or misshapen: {shown}")


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer of transformers in a folder. Raises ValueError if it cannot be read."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise ValueError(f"cannot read the tokenizer in {folder}: {first_line(error)}") from error


def _open_clip(folder: Path, max_length: int, dtype: torch.dtype) -> OpenCLIPText:
    import open_clip

    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"no .safetensors in {folder}: a pickle may run code when it is read, so none is opened")
    try:
        network = open_clip.create_model(f"local-dir:{folder}").to(dtype)
        tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    except Exception as error:
        raise ValueError(f"cannot read the text encoder in {folder}: {first_line(error)}") from error
    network.visual = None  # only text is encoded
    return OpenCLIPText(network, tokenizer, max_length, folder)


def first_line(error: BaseException) -> str:
    """The first line of another library's error message, which may be long, or the error's type if it is empty."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def fingerprint(folder: str | Path) -> str:
    """SHA-256 of the configs, tokenizers and weights of a folder's text encoders."""
    folder = Path(folder)
    parts = [path for path in folder.glob("*") if path.name.startswith(("text_encoder", "tokenizer")) and path.is_dir()]
    if not any(path.name.startswith("text_encoder") for path in parts):  # not a pipeline, but one encoder
        parts.append(folder)
    digest = hashlib.sha256()
    for path in sorted(path for part in parts for path in part.glob("*")):
        if path.suffix in (".json", ".safetensors", ".txt", ".model"):
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            digest.update(f"{path.relative_to(folder)} {found}\n".encode())
    return digest.hexdigest()


def load_encoder(folder: str | Path) -> TextEncoder | SD3Text:
    """The frozen encoder that `save_config` recorded, in float32. Raises ValueError if it is missing or has changed."""
    where = Path(folder) / "config.json"
    about = read_json(where)
    source = Path(about["encoder"])
    if not source.is_dir():
        raise ValueError(f"the text encoder of this model is gone from {source}: say where it is now in {where}")
    if fingerprint(source) != about.get("sha256"):
        raise ValueError(
            f"the text encoder in {source} is not the one that this model was trained with: "
            f"put that one back, or say where it is in {where}"
        )
    if "dropped" in about:
        from mmdit.sd3_text import open_sd3_text

        return open_sd3_text(source, about["max_length"], dropped=about["dropped"], without=about["without"])
    return open_text_encoder(source, about["max_length"])
