"""Packing compared with padding on a CPU: forward and backward of small models on the drawn world's short captions, in
milliseconds of CPU time, which other work on the machine affects little.

    OMP_NUM_THREADS=1 python -m benchmarks.packing [--widths 32 128 384]
"""

import argparse
import itertools
from collections.abc import Callable

import torch

from benchmarks.timing import hardware, seconds
from mmdit import MMDiT, MMDiTConfig
from mmdit.text import LearnedText, TextConfig, Tokenizer
from mmdit.text_to_image import CaptionedMMDiT
from training.data import open_source
from training.objectives import Batch, make_objective
from training.precision import autocast
from training.presets import demo

CPU = torch.device("cpu")
DEPTHS = {32: 2, 128: 4, 384: 6}  # by width; 128 is the demo's


def captioned(width: int, captions: list[str]) -> CaptionedMMDiT:
    """A model with 64 image tokens and the demo's text encoder."""
    text = demo().text
    words = TextConfig(**{name: getattr(text, name) for name in TextConfig.__dataclass_fields__})
    conditioner = LearnedText(words, Tokenizer.train(captions, text.vocab_size, text.max_length))
    pairs = {"context_dim": conditioner.context_dim, "pooled_dim": conditioner.pooled_dim}
    shape = MMDiTConfig(16, 1, DEPTHS.get(width, 4), 2, width // 2, qk_norm="rms_norm", sample_size=8, **pairs)
    return CaptionedMMDiT(MMDiT(shape), conditioner)


def train_step(model: CaptionedMMDiT, captions: list[str], packed: bool, precision: torch.dtype) -> Callable[[], None]:
    """A forward and backward pass on 32 pictures."""
    objective, rest = make_objective(demo()), itertools.cycle(captions)

    def step() -> None:
        model.packed = packed
        batch = Batch(torch.randn(32, 16, 8, 8), model.conditioner.tokenize(list(itertools.islice(rest, 32))))
        with autocast(CPU, precision):
            loss = objective(model, batch, torch.Generator().manual_seed(0))
        loss.total.backward()
        model.zero_grad()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=list(DEPTHS))
    source = open_source("shapes", 64, num_samples=512)
    captions = [source.caption(i) for i in range(len(source))]
    print(hardware())
    print("| width | products | padded, ms | packed, ms |\n|---|---|---|---|")
    for width in parser.parse_args().widths:
        model = captioned(width, captions)
        for name, precision in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            runs = {how: train_step(model, captions, how == "packed", precision) for how in ("padded", "packed")}
            padded, packed = (1000 * found for found in seconds(runs, repeats=5).values())
            print(f"| {width} | {name} | {padded:.0f} | {packed:.0f} |", flush=True)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
