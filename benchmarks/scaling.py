"""Step time, memory and network traffic of the 2 B and 8 B models on many GPUs, extrapolated from one GPU.

    python -m benchmarks.scaling --out docs/scaling.md

This is calculated, not measured. All inputs are in `Assumptions`, and each formula is a function of a few lines. FLOPs
are counted by torch on the full models on the meta device; the utilisation of a training step and the bytes of
activations per token are measured on one H100 (benchmarks/results/gpu.md).
"""

import argparse
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

import mmdit
from training.muon import ROUNDS, matrices
from training.optim import hidden_matrices

PRESETS = {"2 B": "sd3-medium", "8 B": "sd3.5-large"}
SHARDINGS = ("ddp", "fsdp", "hsdp")
NOTE = """"Pictures at once" are those of one pass; gradients of several passes are accumulated and sent once a step. A
step takes at least the longer of work and network (full overlap) and at most their sum. The last column is the rate at
which a GPU sends to other nodes in the shortest step. fsdp shards over all GPUs, hsdp within each node of 8."""
MUON = """What Muon adds to a step of AdamW: the seconds of its Newton-Schulz iterations where each GPU computes all of
them, and where they are distributed as by training/muon.py; and for each sharding the traffic of a GPU for this, and
its seconds."""


@dataclass(frozen=True)
class Assumptions:
    """The inputs of the calculation; GB are 10^9 bytes."""

    peak: float = 989e12
    """FLOP/s of one GPU: H100 SXM, dense bf16, datasheet."""
    utilisation: float = 0.34
    """MFU of a training step, measured (33.8 and 35.0 % for 2 B on one H100)."""
    memory: float = 80e9
    """Bytes of memory of one GPU."""
    activation: float = 36.6
    """Bytes of activations per token, block and channel: (59.4 GB - state) / (24 pictures x 589 tokens x 24 x 1536)."""
    inside: float = 450e9
    """Bytes/s that a GPU sends within a node of 8: NVLink 4, one direction, datasheet."""
    outside: float = 50e9
    """Bytes/s that a GPU sends to other nodes: one 400 Gbit/s network card per GPU."""
    text: int = 333
    """Text tokens per picture: 77 of CLIP and 256 of T5."""
    image: int = 1024
    """Image tokens per picture: 512 x 512 pixels."""
    batch: int = 2048
    """Pictures per step, of all GPUs together."""


@dataclass(frozen=True)
class Model:
    """Parameters, FLOPs of the forward pass of one picture, depth, width; parameters in Muon's matrices, FLOPs of
    Muon's step for all of these and for the most expensive one.
    """

    params: int
    flops: int
    depth: int
    width: int
    inner: int
    rounds: int
    dearest: int


@cache
def model(name: str, image: int, text: int) -> Model:
    """Counted on a model on the meta device."""
    config, side = mmdit.preset(name), int(image**0.5) * 2
    with torch.device("meta"):
        trunk = mmdit.MMDiT(config)
        x, context = torch.empty(1, config.in_channels, side, side), torch.empty(1, text, config.context_dim)
        with FlopCounterMode(display=False) as counter:
            trunk(x, torch.empty(1), context, torch.empty(1, config.pooled_dim))
    params = sum(p.numel() for p in trunk.parameters())
    inner = hidden_matrices(trunk)
    rounds = [2 * len(ROUNDS) * part.cost for w in inner for part in matrices(0, *w.shape)]
    muon = (sum(w.numel() for w in inner), sum(rounds), max(rounds))
    return Model(params, counter.get_total_flops(), config.depth, config.width, *muon)


def compute(m: Model, pictures: float, recompute: bool, a: Assumptions) -> float:
    """Seconds of computation on a GPU: a forward pass, two for the backward pass, and one more with recomputation."""
    return pictures * m.flops * (4 if recompute else 3) / (a.peak * a.utilisation)


def state(m: Model, gpus: int, sharding: str) -> float:
    """Bytes of weights, gradients, Adam's two moments and the average, 4 each, over the number of shards; where sharded
    also two blocks that are gathered in bf16.
    """
    shards = {"ddp": 1, "fsdp": gpus, "hsdp": min(8, gpus)}[sharding]
    gathered = 0 if sharding == "ddp" else 2 * 2 * m.params / m.depth  # nearly all weights are in blocks
    return 20 * m.params / shards + gathered


def activations(m: Model, pictures: float, recompute: bool, a: Assumptions) -> float:
    """Bytes kept for the backward pass: all, or with recomputation each block's input in bf16 and all of one block."""
    tokens = pictures * (a.image + a.text)
    if recompute:
        return tokens * m.width * (2 * m.depth + a.activation)
    return tokens * m.width * a.activation * m.depth


def traffic(m: Model, gpus: int, sharding: str) -> tuple[float, float]:
    """Bytes that one GPU sends in a step (within its node, to other nodes).

    In a ring of n each GPU sends (n - 1) / n of the data in an all-gather or a reduce-scatter. ddp: all-reduce of
    gradients in fp32 (both); fsdp: two all-gathers of weights in bf16 and a reduce-scatter of gradients in fp32, over
    all GPUs; hsdp: the same within a node, and an all-reduce of an eighth of the gradients between nodes.
    """
    p, n = m.params, gpus
    ring, within, nodes = (n - 1) / n, (min(8, n) - 1) / min(8, n), max(1, n // 8)
    across = (nodes - 1) / nodes
    if sharding == "hsdp":
        return 8 * p * within, 8 * p / 8 * across
    sent = 8 * p * ring
    return (sent, 0.0) if n <= 8 else (sent, sent)  # a ring's slowest link is the one between nodes


def orthogonal(m: Model, gpus: int, a: Assumptions) -> float:
    """Seconds of Newton-Schulz iterations on each GPU, which has 1 / n of the work, and at least one matrix: 4
    iterations for an m x n matrix, m <= n, take 8 m^2 (2 n + m) FLOPs.
    """
    return max(m.rounds / gpus, m.dearest) / (a.peak * a.utilisation)


def muon_traffic(m: Model, gpus: int, sharding: str) -> tuple[float, float]:
    """Bytes that one GPU sends for this (within its node, to other nodes), of M numbers in bf16: ddp gathers all
    results in a ring; fsdp sends its M / n to the owners, and back; hsdp does so within a node for the matrices
    that the node owns, then gathers its eighth of the others from the other nodes.
    """
    size, n = 2 * m.inner, gpus
    node, nodes = min(8, n), max(1, n // 8)
    across = (nodes - 1) / nodes
    if sharding == "ddp":
        return size * (n - 1) / n, size * (n - 1) / n * (nodes > 1)
    if sharding == "fsdp":
        return 2 * size / n * (node - 1) / n, 2 * size / n * across
    return 2 * size / n * (node - 1) / node, size / node * across


def muon_row(name: str, gpus: int, a: Assumptions) -> str:
    m = model(PRESETS[name], a.image, a.text)
    found = [f"| {name} | {gpus} | {orthogonal(m, 1, a):.2f} | {orthogonal(m, gpus, a):.4f} |"]
    for sharding in SHARDINGS:
        inside, outside = muon_traffic(m, gpus, sharding)
        found.append(f" {(inside + outside) / 1e9:.2f} | {inside / a.inside + outside / a.outside:.3f} |")
    return "".join(found)


def row(name: str, gpus: int, sharding: str, a: Assumptions) -> str:
    """A row of the table: as many pictures at once as fit, with recomputation only where it is needed."""
    m, mine = model(PRESETS[name], a.image, a.text), a.batch / gpus
    free = 0.9 * a.memory - state(m, gpus, sharding)
    fits = [(again, int(free // activations(m, 1, again, a))) for again in (False, True)]
    recompute, at_once = fits[0] if fits[0][1] >= 1 else fits[1]
    start = f"| {name} | {gpus} | {sharding} | {state(m, gpus, sharding) / 1e9:.1f} |"
    if at_once < 1:
        return f"{start} does not fit | | | | | |"
    at_once = min(at_once, int(-(-mine // 1)))
    own = compute(m, mine, recompute, a)
    inside, outside = traffic(m, gpus, sharding)
    network = inside / a.inside + outside / a.outside
    used = (state(m, gpus, sharding) + activations(m, at_once, recompute, a)) / 1e9
    return (
        f"{start} {at_once}{' (recomputed)' if recompute else ''} | {used:.0f} | {own:.2f} | {network:.2f} | "
        f"{max(own, network):.2f} to {own + network:.2f} | {outside / max(own, network) / 1e9:.1f} |"
    )


def page(a: Assumptions) -> str:
    text = Path(__file__).read_text()
    words = {f.name: text.split(f"    {f.name}:", 1)[1].split('"""', 2)[1].split('"""')[0] for f in fields(Assumptions)}
    lines = ["# From one GPU to 512", "", "Written by `python -m benchmarks.scaling`: calculated, not measured.", ""]
    lines += [str(__doc__).split("\n\n", 2)[2].strip(), "", "| input | value | what it is |", "|---|---|---|"]
    lines += [f"| `{name}` | {getattr(a, name):g} | {meaning} |" for name, meaning in words.items()]
    for name, key in PRESETS.items():
        m = model(key, a.image, a.text)
        lines.append(
            f"\n{name}: {m.params / 1e9:.3f} B parameters; {m.flops / 1e12:.2f} TFLOP per picture and forward pass."
        )
    formulas = (compute, state, activations, traffic, orthogonal, muon_traffic)
    said = [f"- **{f.__name__.replace('_', ' ')}**: {' '.join(str(f.__doc__).split())}" for f in formulas]
    lines += ["", "Formulas:", "", *said, ""]
    columns = "model, GPUs, sharding, state in GB, pictures at once, memory in GB, work in s, network in s, step in s"
    head = [*columns.split(", "), "out of the node, GB/s"]
    lines += [f"## A step of {a.batch} pictures", "", NOTE, "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    lines += [row(name, gpus, how, a) for name in PRESETS for gpus in (8, 64, 512) for how in SHARDINGS]
    columns = "model, GPUs, rounds by each in s, shared in s"
    head = [*columns.split(", "), *(f"{how}, {what}" for how in SHARDINGS for what in ("GB", "s"))]
    lines += ["", "## Muon", "", MUON, "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    lines += [muon_row(name, gpus, a) for name in PRESETS for gpus in (8, 64, 512)]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    arguments = parser.parse_args()
    text = page(Assumptions())
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
