"""A training step of our MMDiT compared with diffusers' transformer in a plain loop, on a CPU in fp32.

    python -m benchmarks.train_step --out benchmarks/results/train_step.md

Width 384, 12 blocks, QK-norm, the same weights, 4 latents of 256 tokens per step, 333 text tokens (SD3's 77 of CLIP and
256 of T5). A step is forward, backward, gradient clipping, optimizer and moving average. Diffusers' is the loop of its
training examples: the flow-matching loss, `torch.optim.AdamW`, `clip_grad_norm_` and its `EMAModel`. Ours is the
trainer's. Rows "all 333 real": there is no padding, so that packing has no advantage. Rows "real lengths": half of the
captions are short and half long (log-normal with medians of 12 and 90 tokens, as original and synthetic captions have),
at most 333; diffusers attends to the padding, as SD3 does, and ours packs the tokens without padding into one sequence.

Each loop runs in a process of its own; steps alternate, and times are medians. On a CPU the trainer keeps the memory
that a step has freed (`mmdit.memory`); "memory kept" is diffusers' loop with that too. Compiled means `torch.compile`
of each block. The share of the peak is the FLOPs of a step by torch's FLOP counter, padding included where it is
computed, over the time and the FLOP/s of a matrix product of size 2048.
The second table has the time of eager steps by kind of kernel, by torch's profiler, without padding, and the share of
the peak of each kind. "The rest" is norms, modulations, GELU, copies, clipping, optimizer and average.
"""

import argparse
import multiprocessing
import statistics
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import cycle
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.beside_diffusers import caption_lengths, ours, theirs
from benchmarks.forward import CONFIG
from benchmarks.timing import hardware, on_cpu, seconds
from mmdit.blocks import allow_graphs
from mmdit.memory import keeping_memory
from training.config import OptimizerConfig
from training.ema import update_ema
from training.optim import make_optimizer

BATCH, SIDE, TEXT, KINDS = 4, 32, 333, 6  # samples, latent side, text tokens, number of different batches


@dataclass(frozen=True)
class Given:
    """A batch: x_0 and eps (B, C, h, w), t (B,), context (B, L, D), pooled (B, P), and the text mask real (B, L)."""

    x_0: Tensor
    eps: Tensor
    t: Tensor
    context: Tensor
    pooled: Tensor
    real: Tensor

    @property
    def x_t(self) -> Tensor:
        t = self.t[:, None, None, None]
        return (1 - t) * self.x_0 + t * self.eps


def batches(real_lengths: bool) -> list[Given]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def one() -> Given:
        lengths = caption_lengths(normal(BATCH), TEXT)
        real = torch.arange(TEXT) < (lengths[:, None] if real_lengths else TEXT)
        image = (BATCH, CONFIG.in_channels, SIDE, SIDE)
        t = torch.rand(BATCH, generator=generator)
        context = normal(BATCH, TEXT, CONFIG.context_dim)
        return Given(normal(*image), normal(*image), t, context, normal(BATCH, CONFIG.pooled_dim), real)

    return [one() for _ in range(KINDS)]


def our_step(compiled: bool, packed: bool) -> Callable[[Given], None]:
    torch.manual_seed(0)
    model = ours(CONFIG)
    average = ours(CONFIG).requires_grad_(False)
    average.load_state_dict(model.state_dict())
    optimizer = make_optimizer(model, OptimizerConfig())
    if compiled:
        for block in model.blocks:
            block.compile(dynamic=packed)

    def step(given: Given) -> None:
        if packed:
            v = torch.stack(model(list(given.x_t), given.t, given.context, given.pooled, given.real))
        else:
            v = model(given.x_t, given.t, given.context, given.pooled)
        (v - (given.eps - given.x_0)).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        update_ema(average, model, 0.999, 1000)

    return step


def their_step(compiled: bool) -> Callable[[Given], None]:
    from diffusers.training_utils import EMAModel

    torch.manual_seed(0)
    model = theirs(ours(CONFIG)).train()
    average = EMAModel(model.parameters(), decay=0.999)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01)
    if compiled:
        for block in model.transformer_blocks:  # type: ignore[union-attr]
            block.compile()  # type: ignore[operator]

    def step(given: Given) -> None:
        v = model(given.x_t, given.context, given.pooled, given.t * 1000, return_dict=False)[0]
        torch.nn.functional.mse_loss(v, given.eps - given.x_0).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.step(model.parameters())

    return step


def peak(size: int = 2048) -> float:
    """FLOP/s of a matrix product of square matrices."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    return 2 * size**3 / seconds({"": lambda: a @ b}, 7)[""]


def kind_of(kernel: str) -> str:
    """The kind of a kernel, by the name that torch gives it."""
    kernel = kernel.replace(".", "::")
    if "scaled_dot_product" in kernel or kernel == "aten::bmm":
        return "attention"
    products = "aten::mm", "aten::addmm", "mkldnn::_linear_pointwise"
    return "matrix products" if kernel in products else "the rest"


def flops(step: Callable[[Given], None], given: list[Given]) -> Counter[str]:
    """Mean FLOPs of a step by kind of kernel; attention runs by its formula here, as the counter needs."""
    found: Counter[str] = Counter()
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        for one in given:
            step(one)
    for kernel, count in counter.get_flop_counts()["Global"].items():
        found[kind_of(str(kernel))] += count / len(given)
    return found


def parts(step: Callable[[Given], None], given: list[Given]) -> Counter[str]:
    """Mean seconds of a step by kind of kernel, with the overhead of the profiler."""
    found: Counter[str] = Counter()
    step(given[0])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for one in given:
            step(one)
    for event in profile.key_averages():
        found[kind_of(event.key)] += event.self_cpu_time_total / 1e6 / len(given)
    return found


LOOPS = ("ours", "diffusers", "memory kept")


@contextmanager
def loop(name: str, compiled: bool, real_lengths: bool) -> Iterator[Connection]:
    """A training loop in a new process: "step" is answered with a step's seconds, "parts" with those by kind."""
    ours_end, theirs_end = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_answer, args=(theirs_end, name, compiled, real_lengths), daemon=True)
    process.start()
    theirs_end.close()
    try:
        yield ours_end
    finally:
        process.terminate()
        process.join()


def _answer(asked: Connection, name: str, compiled: bool, real_lengths: bool) -> None:
    allow_graphs()
    given = batches(real_lengths)
    step = our_step(compiled, real_lengths) if name == "ours" else their_step(compiled)
    with nullcontext() if name == "diffusers" else keeping_memory(torch.device("cpu")):
        run = _cycling(step, given)
        while True:
            asked.send(on_cpu(run) if asked.recv() == "step" else parts(step, given))


def timed(compiled: bool, real_lengths: bool, repeats: int) -> dict[str, float]:
    """Median seconds of a step of each loop; steps alternate."""
    with ExitStack() as stack:
        asked = {name: stack.enter_context(loop(name, compiled, real_lengths)) for name in LOOPS}
        times: dict[str, list[float]] = {name: [] for name in LOOPS}
        warm = KINDS if compiled else 2
        for _ in range(warm + repeats):
            for name, end in asked.items():
                end.send("step")
                times[name].append(end.recv())
    return {name: statistics.median(each[warm:]) for name, each in times.items()}


def profiled() -> dict[str, Counter[str]]:
    """Seconds by kind of kernel of eager steps, ours and diffusers'."""
    found = {}
    for name in LOOPS[:2]:
        with loop(name, False, False) as end:
            end.send("parts")
            found[name] = end.recv()
    return found


def table(repeats: int) -> list[str]:
    best = peak()
    lines = [
        f"A matrix product reaches {best / 1e9:.0f} GFLOP/s.\n",
        "| text | | ours, s | diffusers, s | ratio | memory kept, s | ratio | share of the peak: ours | diffusers |",
        "|---" * 9 + "|",
    ]
    work: dict[bool, dict[str, Counter[str]]] = {}
    for title, real in (("all 333 real", False), ("real lengths", True)):
        eager = {"ours": our_step(False, real), "diffusers": their_step(False)}
        work[real] = {name: flops(step, batches(real)) for name, step in eager.items()}
        for how in ("eager", "compiled"):
            t = timed(how == "compiled", real, repeats)
            seconds_and_ratios = " | ".join(f"{t[name]:.3f} | {t[name] / t['ours']:.2f}" for name in LOOPS[1:])
            share = [f"{counted.total() / t[name] / best:.0%}" for name, counted in work[real].items()]
            lines.append(f"| {title} | {how} | {t['ours']:.3f} | {seconds_and_ratios} | {' | '.join(share)} |")
            print(lines[-1], flush=True)
    mean = sum(int(one.real.sum()) for one in batches(True)) / (KINDS * BATCH)
    return [*lines, f"\nReal captions have {mean:.0f} tokens on average.\n", *where(profiled(), work[False], best)]


def where(took: dict[str, Counter[str]], counted: dict[str, Counter[str]], best: float) -> list[str]:
    """The table of seconds, shares of the time and shares of the peak by kind of kernel."""
    lines = ["| | ours, s | of the time | of the peak | diffusers, s | of the time | of the peak |", "|---" * 7 + "|"]
    for kind in ("matrix products", "attention", "the rest"):
        cells = []
        for name, times in took.items():
            reached = f"{counted[name][kind] / times[kind] / best:.0%}" if kind != "the rest" else ""
            cells += [f"{times[kind]:.2f}", f"{times[kind] / times.total():.0%}", reached]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return lines


def _cycling(step: Callable[[Given], None], given: list[Given]) -> Callable[[], None]:
    turn: Iterator[Given] = cycle(given)
    return lambda: step(next(turn))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    arguments = parser.parse_args()
    about: Any = str(__doc__).split("\n\n", 2)[2].strip()
    text = "\n".join(
        [
            "# Training step on a CPU",
            "",
            f"`python -m benchmarks.train_step --repeats {arguments.repeats}`, {hardware()}.",
            "",
            about,
            "",
        ]
    )
    text += "\n" + "\n".join(table(arguments.repeats))
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
