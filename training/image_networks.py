"""Networks that compute features of pictures for scores: Inception, any vision model of transformers, CLIP.

    open_features("inception.safetensors" | "dinov2-large/")      pictures -> features
    open_clip_model("clip-vit-large-patch14-336/")                pictures and captions -> embeddings

`digest` is a hash of a network's weights and of the libraries that run it, to know which network kept features are of.
Weights are read from disk, or with "hf-hub:ORG/NAME" from the hub; never from a pickle.

Shape letters: B pictures, H W their sides, D features.
"""

from __future__ import annotations

import hashlib
import io
from abc import ABC, abstractmethod
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from mmdit.mapped import PICKLES, read_weights
from mmdit.text_encoders import fingerprint, quiet_transformers
from mmdit.weights_io import read_json
from training.metrics import need

HUB = "hf-hub:"
HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model"]


class ImageNetwork(nn.Module, ABC):
    """`network(images)`: uint8 (B, 3, H, W) of any size to features (B, D) in float32. name: a short description."""

    num_features: int

    def __init__(self, network: nn.Module, name: str, digest: str) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.name, self.digest = name, digest

    @property
    def device(self) -> torch.device:
        """The device that it computes on."""
        return next(self.network.parameters()).device

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        return self.look(images).float()

    @abstractmethod
    def look(self, images: Tensor) -> Tensor:
        """Features (B, D) of uint8 pictures (B, 3, H, W)."""


class Inception(ImageNetwork):
    """FID's InceptionV3 with its own resizing, as torchmetrics runs it: the 2048 features of the last pooling."""

    num_features = 2048

    def look(self, images: Tensor) -> Tensor:
        return self.network(images.to(self.device))


class Vision(ImageNetwork):
    """A vision model of transformers, with its own preprocessing: its pooled output, or else its first token."""

    def __init__(self, network: Any, processor: Any, name: str, digest: str) -> None:
        super().__init__(network, name, digest)
        self.processor, self.num_features = processor, network.config.hidden_size

    def pixels(self, images: Tensor) -> Tensor:
        """Uint8 pictures (B, 3, H, W) as the network's input: normalised float (B, 3, h, w) of its own size."""
        out = self.processor(images=list(images.cpu()), return_tensors="pt", input_data_format="channels_first")
        return out["pixel_values"].to(self.device)

    def look(self, images: Tensor) -> Tensor:
        out: Any = self.network(pixel_values=self.pixels(images))
        pooled = getattr(out, "pooler_output", None)
        return out.last_hidden_state[:, 0] if pooled is None else pooled.flatten(1)


class Clip(Vision):
    """A CLIP of transformers: the projected embeddings of pictures, and of captions (`read`)."""

    def __init__(self, network: Any, processor: Any, tokenizer: Any, name: str, digest: str) -> None:
        nn.Module.__init__(self)
        ImageNetwork.__init__(self, network, name, digest)
        self.processor, self.tokenizer, self.num_features = processor, tokenizer, network.config.projection_dim

    def look(self, images: Tensor) -> Tensor:
        return _embeddings(self.network.get_image_features(pixel_values=self.pixels(images)))  # type: ignore[operator]

    @torch.no_grad()
    def read(self, captions: Sequence[str]) -> Tensor:
        """Embeddings (B, D) of captions; what is too long is cut."""
        longest = self.network.config.text_config.max_position_embeddings  # type: ignore[union-attr]
        how: dict[str, Any] = dict(padding=True, truncation=True, max_length=longest, return_tensors="pt")
        words = self.tokenizer(list(captions), **how).to(self.device)
        return _embeddings(self.network.get_text_features(**words)).float()  # type: ignore[operator]


class OpenClip(ImageNetwork):
    """A CLIP of open_clip: as `Clip`."""

    def __init__(self, network: Any, preprocess: Any, tokenizer: Any, name: str, digest: str) -> None:
        super().__init__(network, name, digest)
        self.preprocess, self.tokenizer = preprocess, tokenizer
        self.num_features = int(network.encode_text(tokenizer([""])).shape[1])

    def look(self, images: Tensor) -> Tensor:
        pictures = [Image.fromarray(image) for image in images.permute(0, 2, 3, 1).cpu().numpy()]
        return self.network.encode_image(torch.stack(list(map(self.preprocess, pictures))).to(self.device))  # type: ignore[operator]

    @torch.no_grad()
    def read(self, captions: Sequence[str]) -> Tensor:
        """Embeddings (B, D) of captions; what is too long is cut."""
        return self.network.encode_text(self.tokenizer(list(captions)).to(self.device)).float()  # type: ignore[operator]


def _embeddings(out: Any) -> Tensor:
    """The embeddings: transformers 4 returns them as a tensor, 5 within an output."""
    return getattr(out, "pooler_output", out)


def open_features(path: str) -> ImageNetwork:
    """The network that a path names: a .safetensors file of FID's Inception, or the folder of a vision model or a CLIP.

    Raises ValueError where there is none, for pickles, for weights that do not fit, and for a missing library.
    """
    where = find_weights(path)
    if where.is_dir():
        return _open_folder(where)
    return _open_inception(where)


def open_clip_model(path: str) -> Clip | OpenClip:
    """The CLIP in a folder, of transformers or of open_clip. Raises as `open_features`."""
    network = open_features(path)
    if not isinstance(network, Clip | OpenClip):
        raise ValueError(f"{path} is {network.name}, which reads no captions: expected the folder of a CLIP")
    return network


def find_weights(path: str) -> Path:
    """The local path of some weights, downloaded from the hub for "hf-hub:ORG/NAME".

    Raises ValueError where there are none, and for pickles.
    """
    if path.startswith(HUB):
        return _from_hub(path)
    where = Path(path).expanduser()
    if where.suffix in PICKLES and where.is_file():
        raise ValueError(
            f"{path} is a pickle, which may run code when it is read. If you trust it, convert it once: python -c "
            f"\"import torch; from safetensors.torch import save_file as s; s(torch.load('{where.name}', "
            f"weights_only=True), '{where.stem}.safetensors')\""
        )
    if not where.exists():
        raise ValueError(
            f"no weights at {path}: expected FID's Inception as .safetensors, the folder of a vision model or a CLIP "
            f"(config.json and .safetensors), or {HUB}ORG/NAME of the hub; docs/evaluation.md says where to get them"
        )
    return where


def _from_hub(path: str) -> Path:
    need("huggingface_hub", path)
    from huggingface_hub import constants, snapshot_download

    name = path.removeprefix(HUB)
    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except Exception as error:  # of many kinds: no network, unknown name, no access
        raise ValueError(
            f"{path} is not in {constants.HF_HUB_CACHE} and cannot be downloaded ({_first_line(error)}): download it "
            "where there is a network, and name its folder"
        ) from error


def _open_inception(path: Path) -> Inception:
    need("torchmetrics", "FID's Inception")
    need("torch_fidelity", "FID's Inception")
    from torchmetrics.image.fid import NoTrainInceptionV3

    state, content = read_weights(path), io.BytesIO()
    # The library reads weights from a file of torch.save: this one we have written, in memory.
    torch.save({name: tensor.clone() for name, tensor in state.items()}, content)
    content.seek(0)
    try:
        network = NoTrainInceptionV3("inception-v3-compat", ["2048"], content)  # type: ignore[arg-type]
    except RuntimeError as error:
        raise ValueError(
            f"{path} is not FID's Inception, the one of weights-inception-2015-12-05: {_first_line(error)}"
        ) from error
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Inception(
        network, f"Inception {digest[:12]}", _digest("inception", digest, "torchmetrics", "torch-fidelity")
    )


def _open_folder(folder: Path) -> ImageNetwork:
    if (folder / "open_clip_config.json").is_file():
        return _open_open_clip(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no model: expected config.json and .safetensors, or open_clip_config.json")
    need("transformers", f"the model in {folder}")
    import transformers

    kind = read_json(folder / "config.json").get("model_type")
    found = fingerprint(folder)
    about = (f"{kind} {found[:12]}", _digest("transformers", found, "transformers", "torchvision"))
    local: dict[str, Any] = {"local_files_only": True}
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(folder, **local)
        loader = transformers.CLIPModel if kind == "clip" else transformers.AutoModel
        with quiet_transformers():
            network, info = loader.from_pretrained(folder, use_safetensors=True, output_loading_info=True, **local)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **local) if kind == "clip" else None
    except Exception as error:  # transformers raises many kinds
        raise ValueError(f"cannot read the model in {folder}: {_first_line(error)}") from error
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"the weights in {folder} do not fit its config: {len(missing)} missing: {missing[0]}, ...")
    return Clip(network, processor, tokenizer, *about) if kind == "clip" else Vision(network, processor, *about)


def _open_open_clip(folder: Path) -> OpenClip:
    need("open_clip", f"the model in {folder}")
    import open_clip

    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"no .safetensors in {folder}: a pickle may run code when it is read, so none is opened")
    try:
        network, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
        tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    except Exception as error:
        raise ValueError(f"cannot read the model in {folder}: {_first_line(error)}") from error
    found = fingerprint(folder)
    return OpenClip(
        network, preprocess, tokenizer, f"open_clip {found[:12]}", _digest("open_clip", found, "open_clip_torch")
    )


def _digest(kind: str, weights: str, *libraries: str) -> str:
    """One hash of the weights and of the libraries that run them and prepare their pictures."""
    parts = [kind, weights, *(f"{name} {version(name)}" for name in (*libraries, "pillow"))]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
