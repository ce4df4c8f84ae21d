"""From what one GPU was measured to do to many: step time, memory and network of the 2 B and 8 B models.

    python -m benchmarks.scaling --out docs/scaling.md

A calculation, not a measurement: every input is in `Assumptions`, every formula in a function of a few lines. torch
counts the FLOPs on the real models without memory (meta device); the share of the peak that a step reaches, and the
bytes of activations per token, are measured on one H100 (benchmarks/results/gpu.md).
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
NOTE = """Pictures at once are those of one pass; more are accumulated, and gradients are sent once a step. A step takes
at least the longer of work and network (full overlap) and at most their sum. The last column is what a GPU sends out of
its node in the shortest step. fsdp shards over all GPUs, hsdp within each node of 8."""
MUON = """What Muon adds to a step of AdamW: the seconds of its Newton-Schulz rounds, where each GPU computes all of
them and where training/muon.py shares them out; and for each sharding what a GPU sends for this, and the seconds of
that."""


@dataclass(frozen=True)
class Assumptions:
    """What the table rests on; GB are 10^9 bytes."""

    peak: float = 989e12
    """FLOP/s of one GPU: H100 SXM, dense bf16, datasheet."""
    utilisation: float = 0.34
    """Share of the peak that a whole step reaches, measured (33.8 and 35.0 % for 2 B on one H100)."""
    memory: float = 80e9
    """Bytes of one GPU."""
    activation: float = 36.6
    """Bytes of activations a token, block and channel: (59.4 GB - state) / (24 pictures x 589 tokens x 24 x 1536)."""
    inside: float = 450e9
    """Bytes/s a GPU sends within a node of 8: NVLink 4, one direction, datasheet."""
    outside: float = 50e9
    """Bytes/s a GPU sends to other nodes: one 400 Gbit/s card each."""
    text: int = 333
    """Text tokens a picture: 77 of CLIP and 256 of T5."""
    image: int = 1024
    """Image tokens a picture: 512 x 512 pixels."""
    batch: int = 2048
    """Pictures a step, of all GPUs together."""


@dataclass(frozen=True)
class Model:
    """Parameters, FLOPs of one picture's forward pass, blocks times width; numbers in Muon's matrices, FLOPs of a step
    of these and of the dearest one.
    """

    params: int
    flops: int
    depth_width: int
    inner: int
    rounds: int
    dearest: int


@cache
def model(name: str, image: int, text: int) -> Model:
    """Counted on a model without memory."""
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
    return Model(params, counter.get_total_flops(), config.depth * config.width, *muon)


def compute(m: Model, pictures: float, recompute: bool, a: Assumptions) -> float:
    """Seconds of a GPU's own work: a forward pass, two for the backward pass, and one more where it recomputes."""
    return pictures * m.flops * (4 if recompute else 3) / (a.peak * a.utilisation)


def state(m: Model, gpus: int, sharding: str) -> float:
    """Bytes of weights, gradients, Adam's two moments and the average, 4 each; sharded over all GPUs, or a node's 8."""
    shards = {"ddp": 1, "fsdp": gpus, "hsdp": min(8, gpus)}[sharding]
    gathered = 0 if sharding == "ddp" else 2 * 2 * m.params / (m.depth_width**0.5)  # two blocks in bf16, about
    return 20 * m.params / shards + gathered


def activations(m: Model, pictures: float, recompute: bool, a: Assumptions) -> float:
    """Bytes kept for the backward pass: all, or with recomputing each block's input (two bytes) and one block's own."""
    tokens = pictures * (a.image + a.text)
    return tokens * (2 * m.depth_width + a.activation * 3000 if recompute else a.activation * m.depth_width)


def traffic(m: Model, gpus: int, sharding: str) -> tuple[float, float]:
    """Bytes that one GPU sends a step (within its node, to other nodes).

    A ring over n sends (n - 1) / n of what is gathered or reduced, once each. ddp: gradients in fp32 are reduced and
    gathered; fsdp: weights in bf16 gathered twice, gradients reduced in fp32, over all; hsdp: the same within a node,
    and an eighth of the gradients reduced and gathered between nodes.
    """
    p, n = m.params, gpus
    ring, within, nodes = (n - 1) / n, (min(8, n) - 1) / min(8, n), max(1, n // 8)
    across = (nodes - 1) / nodes
    if sharding == "hsdp":
        return 8 * p * within, 8 * p / 8 * across
    sent = 8 * p * ring
    return (sent, 0.0) if n <= 8 else (sent, sent)  # a ring's slowest link is the one between nodes


def orthogonal(m: Model, gpus: int, a: Assumptions) -> float:
    """Seconds of Newton-Schulz rounds on each GPU, which does 1 / n of them, one matrix at least: 4 rounds of an m x n
    matrix, m <= n, take 8 m^2 (2 n + m) FLOPs.
    """
    return max(m.rounds / gpus, m.dearest) / (a.peak * a.utilisation)


def muon_traffic(m: Model, gpus: int, sharding: str) -> tuple[float, float]:
    """Bytes that one GPU sends for these rounds (within its node, to other nodes), of M numbers in bf16: ddp gathers
    all results in a ring; fsdp sends its M / n to the owners, and back; hsdp does so within a node for the matrices
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
    """The largest number of pictures at a time that fits, with recomputing only where it must, and what follows."""
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
            f"\n{name}: {m.params / 1e9:.3f} B parameters; {m.flops / 1e12:.2f} TFLOP a picture and forward pass."
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
