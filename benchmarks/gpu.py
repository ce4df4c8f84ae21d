"""Speed on one CUDA GPU compared with diffusers: forward, training step, attention, sampling.

    python -m benchmarks.gpu --out benchmarks/results/gpu.md        (or: make bench-gpu)
    python -m benchmarks.gpu --only training --autotune             (compiles for some minutes more)

Both models have the shape of SD3.5 without dual attention at depth d = heads, the same weights, 333 text tokens (77
of CLIP, 256 of T5), bf16 by autocast over fp32 weights, blocks compiled one by one. A training step is forward,
backward, fused AdamW and the moving average. FLOPs are those of matrix products and attention by torch's FLOP counter,
so MFU counts nothing else; its peak is the datasheet's for dense bf16. Times are medians of seven
runs, and for sampling of five alternating runs. A step takes as many pictures as fit into memory, since the optimizer
is memory-bound and takes as long for one as for all. Rows "packed": captions of realistic lengths (half short and half
long, log-normal with medians of 12 and 90 tokens), of which ours packs the tokens without padding into one sequence,
where diffusers attends to all 333; their FLOPs are those of the mean length. Rows "autotuned": torch.compile's mode
"max-autotune-no-cudagraphs". The second table of training has the time of one step by kind of kernel, by torch's
profiler.
"""

import argparse
import copy
import re
from collections import Counter
from collections.abc import Callable, Mapping
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import timing
from benchmarks.beside_diffusers import call_ours, call_packed, call_theirs, caption_lengths, inputs, ours, theirs
from mmdit.config import MMDiTConfig
from mmdit.model import MMDiT
from samplers import Field, RectifiedFlow, cfg_batched, sample, shift_time, uniform
from training.ema import update_ema
from training.flops import datasheet_peak

DEVICE = "cuda"
TEXT = 333
SAMPLED = 24, 32  # depth and latent side in tokens for sampling: the 2 B model
SHAPES = ((14, 16), (24, 16), (24, 32))  # depth and latent side in tokens for training
KERNELS = {  # regular expressions for names of kernels, of which the first that matches counts
    "attention": "^(?!triton_(poi|per|red)_).*(attention|flash|fmha|sdpa)",  # but not the kernels fused around it
    "matrix products": "gemm|cutlass|nvjet|xmma|splitk|triton_tem|::mm|::addmm|linear_pointwise",
    "optimizer and average": "multi_tensor_apply|adam|lerp",
    "norms, GELU, casts and the rest": "",
}


def config(depth: int) -> MMDiTConfig:
    return MMDiTConfig(depth=depth, num_heads=depth, qk_norm="rms_norm", sample_size=64, pos_embed_max_size=64)


def seconds(runs: Mapping[str, Callable[[], object]], repeats: int = 7, warm: int = 3) -> dict[str, float]:
    return timing.seconds(runs, repeats, warm, cuda=DEVICE == "cuda")


def bf16() -> torch.autocast:
    return torch.autocast(DEVICE, torch.bfloat16)


def training_step(model: nn.Module, call: Callable[..., Tensor], given: tuple[Tensor, ...]) -> Callable[[], None]:
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    target = torch.randn_like(given[0])

    def step() -> None:
        with bf16():
            v = call(model, *given)
        F.mse_loss(v.float(), target).backward()
        optimizer.step()
        optimizer.zero_grad()
        update_ema(ema, model, 0.999, 10_000)

    return step


def compiled(model: nn.Module, blocks: str, **how: Any) -> nn.Module:
    for block in getattr(model, blocks):
        block.compile(**how)
    return model


class Entry(NamedTuple):
    """A model to be measured: its name, its constructor (several models may not fit at a time) and its call."""

    name: str
    make: Callable[[], nn.Module]
    call: Callable[..., Tensor]


def models(depth: int) -> tuple[Entry, Entry, Entry, Entry]:
    """Ours, diffusers', ours packed and ours autotuned, all with the same weights."""
    torch.manual_seed(0)
    state = {name: value.cpu() for name, value in ours(config(depth), DEVICE).state_dict().items()}

    def first() -> Any:
        model = ours(config(depth), DEVICE)
        model.load_state_dict(state)
        return model

    return (
        Entry("ours", lambda: compiled(first(), "blocks"), call_ours),
        Entry("diffusers", lambda: compiled(theirs(first()), "transformer_blocks"), call_theirs),
        Entry("ours, packed", lambda: compiled(first(), "blocks", dynamic=True), call_packed),
        Entry("ours, autotuned", lambda: compiled(first(), "blocks", mode="max-autotune-no-cudagraphs"), call_ours),
    )


def flops(depth: int, side: int, text: int = TEXT) -> int:
    """FLOPs of forward and backward for one picture."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = MMDiT(config(depth))
        x, t, context, pooled = (part.to("meta") for part in inputs(model.config, side, 1, text))
        model(x, t, context, pooled).sum().backward()
    return counter.get_total_flops()


def pictures(depth: int, size: int, tokens: int, memory: float) -> int:
    """The batch size, a multiple of 4, that takes nine tenths of `memory`, in bytes.

    As measured, training takes 22 bytes per parameter (weights, average, gradients and two moments in fp32, weights in
    bf16) and 31 per block, channel and token. size: parameters; tokens: of a picture and its text.
    """
    each = 31 * depth * config(depth).width * tokens
    return max(4, int((0.9 * memory - 22 * size) // each // 4 * 4))


def measure(
    model: nn.Module, call: Callable[..., Tensor], given: tuple[Tensor, ...]
) -> tuple[float, float, Counter[str]]:
    """Seconds of the forward pass, of a training step, and of another step by kind of kernel."""

    def forward() -> None:
        with torch.no_grad(), bf16():
            call(model, *given)

    step = training_step(model, call, given)
    return seconds({"forward": forward})["forward"], seconds({"step": step})["step"], parts(step)


def kind_of(kernel: str) -> str:
    """The kind in `KERNELS` of a kernel, by the name that the profiler gives it."""
    return next(kind for kind, names in KERNELS.items() if re.search(names, kernel, re.IGNORECASE))


def parts(step: Callable[[], None]) -> Counter[str]:
    """Seconds of a step by kind of kernel."""
    found = Counter(dict.fromkeys(KERNELS, 0.0))
    with torch.profiler.profile() as profile:
        step()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
    for event in profile.key_averages():
        if event.device_type.name.lower() == DEVICE:  # events of the CPU include the kernels that they launch
            took = event.self_device_time_total if DEVICE == "cuda" else event.self_cpu_time_total
            found[kind_of(event.key)] += took / 1e6
    return found


def training(peak: float, memory: float, autotune: bool) -> list[str]:
    """Forward and training step of each shape, with as many pictures as fit into `memory`, in bytes."""
    lines = [
        "| parameters | image tokens | batch | | forward, ms | step, ms | pictures/s | MFU of the step | memory, GB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    names = (f"{kind}, ms" for kind in (*KERNELS, "nothing"))
    where = [f"| parameters | image tokens | | {' | '.join(names)} |", "|---" * 8 + "|"]
    for depth, side in SHAPES:
        with torch.device("meta"):
            size = sum(p.numel() for p in MMDiT(config(depth)).parameters())
        batch = pictures(depth, size, side * side + TEXT, memory)
        given = inputs(config(depth), side, batch, TEXT, DEVICE)
        lengths = caption_lengths(torch.randn(batch, generator=torch.Generator().manual_seed(0)), TEXT)
        real = (torch.arange(TEXT) < lengths[:, None]).to(DEVICE)
        for entry in models(depth)[: 4 if autotune else 3]:
            packed = entry.call is call_packed
            work = batch * flops(depth, side, round(lengths.mean().item()) if packed else TEXT)
            cells, kernels = row(entry, (*given, real) if packed else given, work / peak)
            lines.append(f"| {size / 1e9:.2f} B | {side * side} | {batch} | {entry.name} | {cells} |")
            where.append(f"| {size / 1e9:.2f} B | {side * side} | {entry.name} | {kernels} |")
            print(lines[-1], where[-1], sep="\n", flush=True)
    return [*lines, "", *where]


def row(entry: Entry, given: tuple[Tensor, ...], least: float) -> tuple[str, str]:
    """Cells of a model: (times, pictures, MFU and memory; kernels). least: seconds of a step at the peak."""
    torch._dynamo.reset()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        forward, step, took = measure(entry.make(), entry.call, given)
    except torch.OutOfMemoryError:
        return "out of memory | | | | ", " | | | | "
    memory = torch.cuda.max_memory_allocated() / 1e9 if DEVICE == "cuda" else float("nan")
    times = f"{forward * 1e3:.1f} | {step * 1e3:.1f} | {len(given[0]) / step:.0f} | {least / step:.1%} | {memory:.1f}"
    return times, " | ".join(f"{part * 1e3:.1f}" for part in (*took.values(), max(0, step - took.total())))


def attention() -> list[str]:
    """Joint attention, forward and backward, by each kernel: without and with the mask of padded text, and with a new
    number of tokens at each call, as rows of any length have.
    """
    lines = [
        "| kernel | without mask, ms | with the mask of padded text, ms | and a new length at each call, ms |",
        "|---|---|---|---|",
    ]
    q, k, v = (torch.randn(8, 24, 1024 + TEXT, 64, device=DEVICE, dtype=torch.bfloat16) for _ in range(3))
    mask = (torch.arange(1024 + TEXT, device=DEVICE) < 1024 + 60).expand(8, 1, 1, -1)
    shorter = count(1)
    for part in (q, k, v):
        part.requires_grad_()

    def run(given: Tensor | None) -> None:
        F.scaled_dot_product_attention(q, k, v, attn_mask=given).sum().backward()

    def run_shorter() -> None:
        n = 1024 + TEXT - next(shorter)
        parts = (x[:, :, :n].contiguous() for x in (q, k, v))
        F.scaled_dot_product_attention(*parts, attn_mask=mask[..., :n]).sum().backward()

    kinds = {
        "torch's choice": list(SDPBackend.__members__.values())[1:],
        "flash": [SDPBackend.FLASH_ATTENTION],
        "cuDNN": [SDPBackend.CUDNN_ATTENTION],
        "memory-efficient": [SDPBackend.EFFICIENT_ATTENTION],
        "formula": [SDPBackend.MATH],
    }
    for name, backends in kinds.items():
        cells = []
        for call in (lambda: run(None), lambda: run(mask), run_shorter):
            try:
                with sdpa_kernel(backends):
                    cells.append(f"{seconds({name: call})[name] * 1e3:.2f}")
            except RuntimeError:
                cells.append("cannot")
        lines.append(f"| {name} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    return lines


@torch.no_grad()
def sampling() -> list[str]:
    """28 guided Euler steps of the 2 B model at 1024 image tokens, all in bf16; the last pictures are compared."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    depth, side = SAMPLED
    own, other_entry, *_ = models(depth)
    lines = ["| pictures | ours, s | diffusers, s | difference of the latents |", "|---|---|---|---|"]
    model, other = own.make().bfloat16(), other_entry.make().bfloat16()
    for batch in (1, 4):
        x, _, context, pooled = (part.bfloat16() for part in inputs(config(depth), side, batch, TEXT, DEVICE))
        both = [torch.cat([part, torch.zeros_like(part)]) for part in (context, pooled)]

        def by_us() -> Tensor:
            flow = RectifiedFlow()
            cond = Field(lambda x_t, t: model(x_t, t.bfloat16(), context, pooled), flow)  # noqa: B023
            pair = Field(lambda x_t, t: model(x_t, t.bfloat16(), *both), flow)  # noqa: B023
            return sample(cfg_batched(cond, pair, 4.0), x, "euler", grid=shift_time(uniform(28), 3.0)).x  # noqa: B023

        def by_them() -> Tensor:
            scheduler, state = FlowMatchEulerDiscreteScheduler(shift=1.0), x  # noqa: B023
            scheduler.set_timesteps(sigmas=shift_time(uniform(28), 3.0)[:-1].tolist(), device=DEVICE)
            for t in scheduler.timesteps:
                times = t.expand(2 * batch).bfloat16()  # noqa: B023
                v_cond, v_null = other(torch.cat([state] * 2), *both, times, return_dict=False)[0].chunk(2)  # noqa: B023
                state = scheduler.step(v_null + 4.0 * (v_cond - v_null), t, state, return_dict=False)[0]
            return state

        times = seconds({"ours": by_us, "theirs": by_them}, repeats=5, warm=1)
        difference = (by_us() - by_them()).float().norm() / by_us().float().norm()
        lines.append(f"| {batch} | {times['ours']:.3f} | {times['theirs']:.3f} | {difference:.1e} |")
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    parser.add_argument("--only", choices=("attention", "sampling", "training"), help="only this part")
    parser.add_argument("--autotune", action="store_true", help="train with autotuned kernels too")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device found, which this measures")
    torch.set_float32_matmul_precision("high")
    device = torch.cuda.get_device_name()
    peak = 1e12 * (datasheet_peak(device, torch.bfloat16) or float("nan"))
    a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    matmul = 2 * 8192**3 / seconds({"matmul": lambda: a @ b})["matmul"]
    about = (
        f"`python -m benchmarks.gpu`, {device}, torch {torch.__version__}. Peak {peak / 1e12:.0f} TFLOP/s (dense "
        f"bf16); a matrix product of 8192 reaches {matmul / 1e12:.0f}.\n\n{str(__doc__).split(chr(10) * 2, 2)[2]}"
    )
    print(about)
    memory = torch.cuda.get_device_properties().total_memory
    parts = {
        "attention": attention,
        "sampling": sampling,
        "training": lambda: training(peak, memory, arguments.autotune),
    }
    text = f"# On one GPU\n\n{about}\n"
    for name, part in parts.items():
        if arguments.only in (None, name):
            text += f"\n## {name.capitalize()}\n\n" + "\n".join(part()) + "\n"
            if arguments.out:  # after each part, in case the next one fails
                arguments.out.write_text(text)


if __name__ == "__main__":
    main()
