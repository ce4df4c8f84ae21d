"""The error of half precision: forward pass, gradient and one step of AdamW against float64, for a small MMDiT.

    python -m benchmarks.precision --out benchmarks/results/precision.md

12 blocks of width 256 (4 heads), 64 image tokens, 32 text tokens, 8 pictures, QK-norm. Weights are Xavier and the
modulations normal (std 0.02), so that no block is the identity. An error is the norm of the difference over the norm,
of all numbers as one vector. A gradient is lost where it is 0 and that of float64 is not. fp16 has a loss scale of
2^16, as in training, of 1, and of 2^28, which overflows. "packed": the samples in one sequence, as with
training.packing. "weights in bf16 too", which training never does: weights and optimiser state in bf16.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.timing import hardware
from mmdit.config import MMDiTConfig
from mmdit.model import MMDiT
from samplers import RectifiedFlow
from training.precision import autocast

LR = 1e-4


def model() -> MMDiT:
    torch.manual_seed(0)
    shape = MMDiTConfig(in_channels=16, context_dim=64, pooled_dim=64, sample_size=16, patch_size=2, depth=12,
                        num_heads=4, head_dim=64, pos_embed_max_size=16, qk_norm="rms_norm")  # fmt: skip
    net = MMDiT(shape)
    for parameter in net.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return net


def data() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    x_0, eps = (torch.randn(8, 16, 16, 16, generator=g) for _ in range(2))
    t = (torch.arange(8) + 0.5) / 8
    v = RectifiedFlow().velocity(x_0, eps, t)
    context, pooled = torch.randn(8, 32, 64, generator=g), torch.randn(8, 64, generator=g)
    return {"x_t": RectifiedFlow().mix(x_0, eps, t), "t": t, "context": context, "pooled": pooled, "target": v}


def step(net: MMDiT, dtype: torch.dtype, scale: float = 1.0, packed: bool = False) -> dict[str, Tensor]:
    """v, the loss, the gradient and the first update by AdamW with it, each as a float64 vector."""
    inputs = {name: x.to(net.dtype) if name != "t" else x for name, x in data().items()}
    target = inputs.pop("target")
    half = dtype in (torch.bfloat16, torch.float16)
    with autocast(torch.device("cpu"), dtype if half else torch.float32):
        v = torch.stack(net(**inputs | {"x_t": list(inputs["x_t"])})) if packed else net(**inputs)
        loss = (v.to(torch.promote_types(net.dtype, torch.float32)) - target).square().mean()
    (loss * scale).backward()
    before = [p.detach().clone() for p in net.parameters()]
    for p in net.parameters():
        p.grad /= scale
    gradient = torch.cat([p.grad.double().flatten() for p in net.parameters()])
    torch.optim.AdamW(net.parameters(), LR, weight_decay=0.0).step()
    update = torch.cat([(p - b).double().flatten() for p, b in zip(net.parameters(), before, strict=True)])
    return {"v": v.detach().double().flatten(), "loss": loss.detach().double(), "gradient": gradient, "update": update}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    out = parser.parse_args().out
    net = model()
    exact = step(copy.deepcopy(net).double(), torch.float64)
    ways: dict[str, tuple[Any, ...]] = {
        "fp32": (net, torch.float32),
        "bf16": (net, torch.bfloat16),
        "bf16, packed": (net, torch.bfloat16, 1.0, True),
        "fp16, scale 2^16": (net, torch.float16, 2.0**16),
        "fp16, scale 1": (net, torch.float16, 1.0),
        "fp16, scale 2^28": (net, torch.float16, 2.0**28),
        "weights in bf16 too": (copy.deepcopy(net).bfloat16(), torch.float32),
    }
    lines = ["| | v | loss | gradient | gradient lost | step of AdamW |", "|---|---|---|---|---|---|"]
    for name, (start, *how) in ways.items():
        found = step(copy.deepcopy(start), *how)
        errors = {k: ((found[k] - exact[k]).norm() / exact[k].norm()).item() for k in exact}
        lost = ((found["gradient"] == 0) & (exact["gradient"] != 0)).double().mean().item()
        finite = bool(found["gradient"].isfinite().all())
        gradient = (
            f"{errors['gradient']:.1e} | {lost:.1%} | {errors['update']:.1e}" if finite else "overflow: left out | |"
        )
        lines.append(f"| {name} | {errors['v']:.1e} | {errors['loss']:.1e} | {gradient} |")
    text = "\n".join([f"# Half precision\n\n`python -m benchmarks.precision`, {hardware()}\n", *lines, ""])
    print(text)
    if out:
        out.write_text(text)


if __name__ == "__main__":
    main()
