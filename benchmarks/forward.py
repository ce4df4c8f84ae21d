"""Forward and backward of our MMDiT compared with diffusers' transformer of the same weights, on a CPU in fp32.

    python -m benchmarks.forward --out benchmarks/results/forward.md

Width 384, 12 blocks, QK-norm; and 3 blocks of SD3-medium's width, 1536, without gradients. Both models run in turn in
one process, and times are medians; compiled means `torch.compile` of each block. Memory is the growth of the process at
its peak in one forward and backward pass, each model in a process of its own. Sampling is 28 guided Euler steps, both
predictions in one batch, compared with diffusers' scheduler in a loop. Pipelines are ours and
`StableDiffusion3Pipeline`: 12 blocks of width 384, 256 image and 333 text tokens, small encoders and autoencoder.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.beside_diffusers import call_ours, call_theirs, inputs, ours, theirs
from benchmarks.timing import hardware, seconds
from mmdit.blocks import allow_graphs
from mmdit.config import MMDiTConfig
from samplers import Field, RectifiedFlow, cfg_batched, sample, shift_time, uniform

CONFIG = MMDiTConfig(depth=12, num_heads=6, qk_norm="rms_norm", context_dim=512, pooled_dim=256, sample_size=32)
WIDE = replace(CONFIG, depth=3, num_heads=24)
SHAPES = ((16, 77, 4), (16, 333, 4), (32, 333, 1))  # tokens a side, text tokens, batch
CALLS: dict[str, Callable[..., Tensor]] = {"ours": call_ours, "diffusers": call_theirs}


def models(config: MMDiTConfig = CONFIG) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    first = ours(config)
    return {"ours": first, "diffusers": theirs(first)}


def forward(name: str, model: nn.Module, given: tuple[Tensor, ...]) -> Callable[[], object]:
    def run() -> None:
        with torch.no_grad():
            CALLS[name](model, *given)

    return run


def backward(name: str, model: nn.Module, given: tuple[Tensor, ...]) -> Callable[[], object]:
    def run() -> None:
        CALLS[name](model, *given).square().mean().backward()
        model.zero_grad()

    return run


def speed(repeats: int) -> list[str]:
    lines = [
        "| image tokens | text tokens | batch | | forward: ours, s | diffusers, s | ratio | and backward: ours, s |"
        " diffusers, s | ratio |",
        "|---" * 10 + "|",
    ]
    allow_graphs()
    for how in ("eager", "compiled"):
        both = models()
        if how == "compiled":
            for model in both.values():
                for block in getattr(model, "blocks", None) or model.transformer_blocks:  # type: ignore[union-attr]
                    block.compile()  # type: ignore[operator]
        for side, text, batch in SHAPES:
            given = inputs(CONFIG, side, batch, text)
            cells = []
            for kind in (forward, backward):
                t = seconds({name: kind(name, model, given) for name, model in both.items()}, repeats)
                cells += [f"{t['ours']:.3f}", f"{t['diffusers']:.3f}", f"{t['diffusers'] / t['ours']:.2f}"]
            lines.append(f"| {side * side} | {text} | {batch} | {how} | {' | '.join(cells)} |")
            print(lines[-1], flush=True)
    return lines


def wide(repeats: int) -> list[str]:
    lines = ["| image tokens | text tokens | batch | ours, s | diffusers, s | ratio |", "|---" * 6 + "|"]
    both = models(WIDE)
    for side, text, batch in SHAPES:
        given = inputs(WIDE, side, batch, text)
        t = seconds({name: forward(name, model, given) for name, model in both.items()}, repeats)
        ratio = t["diffusers"] / t["ours"]
        lines.append(f"| {side * side} | {text} | {batch} | {t['ours']:.3f} | {t['diffusers']:.3f} | {ratio:.2f} |")
        print(lines[-1], flush=True)
    return lines


def memory_of(name: str, shape: tuple[int, int, int]) -> float:
    """Megabytes by which this process grows at its peak in one forward and backward pass (Linux)."""
    model, given = models()[name], inputs(CONFIG, shape[0], shape[2], shape[1])
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _status("VmRSS")
    backward(name, model, given)()
    return _status("VmHWM") - before


def _status(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))


def memory() -> list[str]:
    lines = ["| image tokens | text tokens | batch | ours, MB | diffusers, MB |", "|---" * 5 + "|"]
    for i, (side, text, batch) in enumerate(SHAPES):
        found = [
            subprocess.run(
                [sys.executable, "-m", "benchmarks.forward", "--memory-of", name, str(i)],
                check=True,
                capture_output=True,
                text=True,
            ).stdout.split()[-1]
            for name in CALLS
        ]
        lines.append(f"| {side * side} | {text} | {batch} | {' | '.join(found)} |")
        print(lines[-1], flush=True)
    return lines


GRID = shift_time(uniform(28), 3.0)
Pair = tuple[Tensor, Tensor]  # context and pooled


def sampled_by_us(model: nn.Module, x: Tensor, given: Pair, both: Pair) -> Tensor:
    cond = Field(lambda x_t, t: model(x_t, t, *given), RectifiedFlow())
    two = Field(lambda x_t, t: model(x_t, t, *both), RectifiedFlow())
    return sample(cfg_batched(cond, two, 4.0), x, "euler", grid=GRID).x


def sampled_by_diffusers(model: nn.Module, x: Tensor, both: Pair) -> Tensor:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    scheduler.set_timesteps(sigmas=GRID[:-1].tolist())
    for t in scheduler.timesteps:
        v, v_null = model(torch.cat([x] * 2), *both, t.expand(2 * len(x)), return_dict=False)[0].chunk(2)
        x = scheduler.step(v_null + 4.0 * (v - v_null), t, x, return_dict=False)[0]
    return x


@torch.no_grad()
def sampling(repeats: int) -> list[str]:
    lines = ["| width | pictures | ours, s | diffusers, s | ratio | largest difference |", "|---" * 6 + "|"]
    for config, batch in ((CONFIG, 1), (CONFIG, 4), (WIDE, 1), (WIDE, 4)):
        model, other = models(config).values()
        x, _, context, pooled = inputs(config, 16, batch, 77)
        given = context, pooled
        both = torch.cat([context, torch.zeros_like(context)]), torch.cat([pooled, torch.zeros_like(pooled)])
        runs: dict[str, Callable[[], Tensor]] = {
            "ours": partial(sampled_by_us, model, x, given, both),
            "diffusers": partial(sampled_by_diffusers, other, x, both),
        }
        difference = (runs["ours"]() - runs["diffusers"]()).abs().max()
        t = seconds(runs, max(2, repeats // 2), warm=0)
        cells = (f"{t['ours']:.2f}", f"{t['diffusers']:.2f}", f"{t['diffusers'] / t['ours']:.2f}", f"{difference:.1e}")
        lines.append(f"| {config.num_heads * config.head_dim} | {batch} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    return lines


@torch.no_grad()
def pipelines(repeats: int) -> list[str]:
    from diffusers import SD3Transformer2DModel

    from mmdit.text_to_image import TextToImage
    from tests.mmdit.tiny_sd3 import make_pipeline

    other = make_pipeline()
    small = dict(other.transformer.config)
    wide = {"num_layers": 12, "num_attention_heads": 6, "attention_head_dim": 64, "caption_projection_dim": 384}
    other.transformer = SD3Transformer2DModel(**small | wide | {"sample_size": 32, "dual_attention_layers": ()}).eval()
    other.register_to_config(transformer=("diffusers", "SD3Transformer2DModel"))
    other.set_progress_bar_config(disable=True)
    with tempfile.TemporaryDirectory() as folder:
        other.save_pretrained(folder)
        pipe = TextToImage.load(folder, "cpu")
    lines = ["| pictures | ours, s | diffusers, s | ratio | largest difference of 255 |", "|---" * 5 + "|"]
    for batch in (1, 4):
        prompts = ["a red circle"] * batch

        def by_us(prompts: list[str] = prompts) -> list[Any]:
            return pipe(prompts, num_steps=28, guidance=4.0, seed=0, height=64, width=64)

        def by_them(prompts: list[str] = prompts) -> list[Any]:
            generators = [torch.Generator().manual_seed(k) for k in range(len(prompts))]
            return other(
                prompts, num_inference_steps=28, guidance_scale=4.0, generator=generators, height=64, width=64
            ).images

        pairs = zip(by_us(), by_them(), strict=True)
        difference = max(np.abs(np.asarray(a).astype(int) - np.asarray(b)).max() for a, b in pairs)
        t = seconds({"ours": by_us, "diffusers": by_them}, max(2, repeats // 2), warm=0)
        cells = (f"{t['ours']:.2f}", f"{t['diffusers']:.2f}", f"{t['diffusers'] / t['ours']:.2f}", str(difference))
        lines.append(f"| {batch} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    parser.add_argument(
        "--only", nargs="+", choices=["speed", "forward", "sampling", "pipelines", "memory"], help="these sections"
    )
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        name, shape = arguments.memory_of
        print(f"{memory_of(name, SHAPES[int(shape)]):.0f}")
        return
    n = arguments.repeats
    found = {
        "Speed": lambda: speed(n),
        "Forward at SD3-medium's width, eager": lambda: wide(n),
        "Sampling": lambda: sampling(n),
        "Pipelines": lambda: pipelines(n),
        "Memory": memory,
    }
    about = f"`python -m benchmarks.forward --repeats {n}`, {hardware()}.\n\n{str(__doc__).split(chr(10) * 2, 2)[2]}"
    text = f"# Compared with diffusers on a CPU\n\n{about}"
    for title, run in found.items():
        if not arguments.only or title.split()[0].lower() in arguments.only:
            text += f"\n\n## {title}\n\n" + "\n".join(run())
            if arguments.out:
                arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
