"""The FLOPs of a training step, and the peak FLOPS of a device: the two sides of MFU.

MFU (model FLOPs utilisation; Chowdhery et al. 2022, arXiv 2204.02311, appendix B) is the FLOPs of the model's matrix
products over what the hardware could compute in the same time. Recomputation (activation checkpointing), frozen
encoders and autoencoders, norms and activations do not count. A multiplication and an addition are two FLOPs.

Shape letters: B batch, N patches of an image, L text tokens, T text tokens of a document, D width.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmdit.blocks import JointBlock
from mmdit.sd3_text import CLIP_TOKENS
from mmdit.text import TextLayer

PEAKS: tuple[tuple[str, float, float], ...] = (
    ("B200", 2250, 75),
    ("H200", 989, 67),
    ("H100 NVL", 835, 60),
    ("H100 PCIe", 756, 51),
    ("H100", 989, 67),
    ("A100", 312, 19.5),
    ("L40S", 362, 91.6),
    ("L40", 181, 90.5),
    ("L4", 121, 30.3),
    ("A40", 149.7, 37.4),
    ("A10", 125, 31.2),
    ("RTX 6000 Ada", 364, 91.1),
    ("RTX A6000", 154.8, 38.7),
    ("RTX 4090", 165.2, 82.6),
    ("RTX 3090", 71, 35.6),
    ("MI300X", 1307, 163.4),
)
"""(part of a device's name, dense peak TFLOPS in bf16 with fp32 accumulation, in fp32 without TF32), by datasheet. The
first entry that fits a name counts."""


def datasheet_peak(name: str, precision: torch.dtype) -> float | None:
    """The datasheet's TFLOPS of matrix products on a device of that name; None for an unknown one."""
    words = {word.partition("-")[0] for word in name.split()}  # "A100-SXM4-80GB"
    if words & {"MIG", "Laptop", "D"}:  # a slice of a GPU, or a smaller one of the same name
        return None
    for part, half, single in PEAKS:
        if words.issuperset(part.split()):
            return single if precision == torch.float32 else half
    return None


def measured_peak(device: torch.device, precision: torch.dtype, seconds: float = 0.3) -> float:
    """The TFLOPS of a product of large square matrices, the best of as many as fit into `seconds`."""
    side = 1024 if device.type == "cpu" else 8192
    a, best = torch.ones(side, side, device=device, dtype=precision), 0.0
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or not best:
        start = time.perf_counter()
        a @ a
        torch.get_device_module(device).synchronize()
        best = max(best, 2 * side**3 / (time.perf_counter() - start) / 1e12)
    return best


def peak_tflops(asked: float | str, device: torch.device, precision: torch.dtype) -> float | None:
    """The peak that `training.peak_tflops` asks for: its number, the datasheet's ("auto"), or a measured one
    ("measure"); None where there is none.
    """
    if isinstance(asked, float):
        return asked
    if asked == "measure":
        return measured_peak(device, precision)
    return datasheet_peak(torch.cuda.get_device_name(device), precision) if device.type == "cuda" else None


@dataclass(frozen=True)
class Sizes:
    """The numbers that the FLOPs of a batch depend on.

    Totals of images, patches, text tokens, and positions that predict a token (predicting). Sums over sequences, for
    attention: of squared lengths (joint), of squared numbers of patches (image) and of text tokens (words), and of
    patches times length (asked), for the last block, where text gives keys and values alone. read: text tokens in the
    text encoder, where the trunk has fewer.
    """

    images: float
    patches: float
    text: float
    predicting: float = 0
    joint: float = 0
    image: float = 0
    words: float = 0
    asked: float = 0
    read: float | None = None


def captioned(images: int, patches: int, text: int) -> Sizes:
    """Sizes of an MMDiT's padded batch: images with so many patches and text positions each, padding included."""
    both = patches + text
    squares = [images * n for n in (both**2, patches**2, text**2, patches * both)]
    return Sizes(images, images * patches, images * text, 0, *squares)


def in_one_row(patches: Tensor, text: Tensor, longest: int) -> Sizes:
    """Sizes of an MMDiT's packed batch: images of so many patches (B,) with `text` (B,) real tokens. longest: positions
    of each caption in the text encoder, padding included.
    """
    images, patches, text = len(text), patches.double(), text.double()
    rows = [patches, text, (patches + text).square(), patches.square(), patches * (patches + text)]
    num_patches, real, joint, image, asked = (x.sum().item() for x in rows)
    return Sizes(images, num_patches, real, 0, joint, image, images * longest**2, asked, images * longest)


def of_documents(patches: Tensor, text: Tensor, lead: int = 0) -> Sizes:
    """Sizes of a `Transfusion`'s batch: documents with so many patches (n,), 0 for no image, and text tokens (n,).

    lead: number of tokens for an image's size.
    """
    images = patches > 0
    length = text + images * (2 + lead)  # and the tokens around the image
    predicting = length - 1 - images.to(length.dtype)  # the token that opens an image predicts none
    sums = [x.double().sum().item() for x in (images, patches, length, predicting, (patches + length).double() ** 2)]
    return Sizes(*sums)


def text_places(conditioner: nn.Module, tokens: int) -> int:
    """The trunk's text positions for a caption of so many tokens; SD3's two CLIPs share theirs, and T5's follow."""
    return CLIP_TOKENS + conditioner.shape.encoders[2][0] if reads_padding(conditioner) else tokens  # type: ignore


def reads_padding(conditioner: nn.Module) -> bool:
    """Whether the trunk attends to padding like to text, as it does with SD3's three encoders, computed or cached."""
    shape: Any = getattr(conditioner, "shape", None)
    return shape is not None and len(shape.encoders) > 1


def step_flops(model: Any, sizes: Sizes) -> float:
    """FLOPs of a forward and backward pass of a captioned model.

    Each matrix product of the forward pass has two in the backward pass: for the gradient of its input, unless that
    comes from the data, and for that of its weight, unless that is frozen.
    """
    width = model.transformer.config.width
    learned = any(p.requires_grad for p in model.conditioner.parameters())
    total = 0.0
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            passes = 1 + module.weight.requires_grad + (not _reads_data(name, learned))
            total += passes * 2 * module.weight.numel() * _rows(name, module, model.transformer, sizes)
        elif isinstance(module, JointBlock):
            ends = any(stream.pre_only for stream in module.children())
            total += 3 * 4 * width * (sizes.asked if ends else sizes.joint)
        elif name.endswith(".attn2"):
            total += 3 * 4 * width * sizes.image
        elif isinstance(module, TextLayer):
            total += (3 if learned else 1) * 4 * module.norm1.normalized_shape[0] * sizes.words
    return total


def _reads_data(name: str, learned: bool) -> bool:
    """Whether a layer's input has no gradient: latents, times, and what comes from a frozen text encoder."""
    first = ("transformer.patch_in", "transformer.patch_in.conv", "transformer.time_in.fc1")
    text = ("transformer.context_in", "transformer.pooled_in.fc1")
    return name in first or (not learned and (name in text or name.startswith("conditioner.")))


def _rows(name: str, module: nn.Module, trunk: Any, sizes: Sizes) -> float:
    """The rows that a layer is applied to; for a convolution, the pixels."""
    part = name.removeprefix("transformer.")
    if part.startswith(("time_in.", "pooled_in.")) or part.endswith((".modulation", "modulation_out")):
        return sizes.images
    if part.startswith("conditioner.") and sizes.read is not None:
        return sizes.read
    if part.startswith("conditioner.") or part == "context_in" or ".txt." in part:
        return sizes.text
    if part == "head":
        return sizes.predicting
    if isinstance(module, nn.Conv2d):
        patch = trunk.config.patch_size
        return sizes.patches * patch**2 / 4 ** _level(part.split("."), patch.bit_length() - 1)
    return sizes.patches + (sizes.text if ".all." in part else 0)


def _level(words: list[str], last: int) -> int:
    """How many times a U-Net has halved the sides of a convolution's output."""
    if words[1] in ("blocks", "up", "down"):
        return int(words[2]) + (words[1] == "down")
    return 0 if words[1] == "conv" else last
