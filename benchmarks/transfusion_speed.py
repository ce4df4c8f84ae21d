"""Speed of the model of text and images on a CPU, compared with transfusion-pytorch; and packing compared with padding.

    python -m benchmarks.transfusion_speed --out benchmarks/results/transfusion_speed.md --data shapes=shapes:2000
    python -m benchmarks.transfusion_speed --transfusion-pytorch FOLDER   # with it: pip install --no-deps --target
                        #   FOLDER transfusion-pytorch axial-positional-embedding beartype einx ema-pytorch frozendict
                        #   jaxtyping loguru rotary-embedding-torch torch-einops-utils torchdiffeq wadler-lindig

Both models have 12 blocks of width 384 with 6 heads, MLPs with equally many weights, a vocabulary of 4096, latents
(16, 16, 16) of 256 patches, and fp32. Theirs is built and called as in its README, with its KV cache. It modulates
patches by the time, where ours adds a time embedding to them; "time as adaLN" is ours with modulation. A training step
is forward, backward and fused AdamW, with 410 tokens per document in both. Decoding of text is greedy. Images are
sampled by Euler's method with equally many evaluations; ours adds one, of the finished image.

Packed and padded are forward and backward of 16 documents of a caption and an image of 64 patches, the latter with
every document padded to the longest in all blocks. Tokens are means over 200 batches, seconds are of two batches.

Times are medians of alternating runs in one process. With OMP_NUM_THREADS=1 they are CPU time, which other work on the
machine affects less.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.timing import hardware, seconds
from mmdit.attention import Packed
from mmdit.config import TransfusionConfig
from mmdit.generate import ImageSampling, TextSampling
from mmdit.sequences import MixedBatch
from mmdit.text import Tokenizer
from mmdit.transfusion import Transfusion
from training.data import open_source
from training.objectives import TextAndImages
from training.time_density import Uniform

VOCABULARY, CHANNELS, SIDE, TEXT, BATCH = 4096, 16, 16, 154, 4
PROMPT, NEW, STEPS = 16, 64, 16  # tokens of a prompt, new tokens, steps of sampling an image
DOCUMENTS = 16  # per packed batch, each a caption and an image of 64 patches
OWN_TOKENS = 134  # special tokens of transfusion-pytorch
OBJECTIVE = TextAndImages(Uniform())
Runs = dict[str, Callable[[], object]]


def ours(**settings: Any) -> Transfusion:
    torch.manual_seed(0)
    model = Transfusion(TransfusionConfig(VOCABULARY, CHANNELS, patch_size=1, depth=12, num_heads=6, **settings))
    for parameter in model.parameters():
        if not parameter.any():  # or each block would be the identity
            nn.init.normal_(parameter, std=0.02)
    return model


def theirs(folder: str) -> Any:
    """transfusion-pytorch with its defaults except for the shape, and Euler's method, whose evaluations are known."""
    sys.path.append(folder)
    peer = importlib.import_module("transfusion_pytorch.transfusion")
    peer.tqdm = partial(peer.tqdm, disable=True)
    peer.logger.disable("transfusion_pytorch")
    torch.manual_seed(0)
    return peer.Transfusion(
        num_text_tokens=VOCABULARY - OWN_TOKENS,
        dim_latent=CHANNELS,
        channel_first_latent=True,
        modality_default_shape=(SIDE, SIDE),
        odeint_kwargs=dict(method="euler"),
        transformer=dict(dim=384, depth=12, dim_head=64, heads=6),
    )


def words(num: int) -> Tensor:
    return torch.randint(4, VOCABULARY - OWN_TOKENS, (num,))


def step(model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
    """A training step: forward, backward, AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def run() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def compiled(model: Transfusion) -> Transfusion:
    """A copy with its blocks compiled as by the trainer."""
    model = copy.deepcopy(model)
    for block in model.blocks:
        block.compile(dynamic=True)
    return model


def training(peer: Any) -> Runs:
    """A training step of 4 documents of 154 text tokens, with those around the image and the end, and 256 patches."""
    generator, latents = torch.Generator().manual_seed(0), torch.randn(BATCH, CHANNELS, SIDE, SIDE)
    models = {"ours": ours(), "ours, time as adaLN": ours(time="image"), "ours, compiled": compiled(ours())}
    batch = ours().pack([[words(TEXT - 3), latent, torch.tensor([1])] for latent in latents])
    runs: Runs = {
        name: step(model, lambda model=model: OBJECTIVE(model, batch, generator).total)
        for name, model in models.items()
    }
    if peer is not None:  # which adds 9 tokens to a training document
        given = [[words(TEXT - 9), latent] for latent in latents]
        runs["transfusion-pytorch"] = step(peer, lambda: peer(given))
    return runs


def writing(model: Transfusion, peer: Any, num: int) -> Runs:
    """Greedy decoding of 64 tokens after prompts of 16."""
    prompts = torch.stack([words(PROMPT) for _ in range(num)])
    greedy = TextSampling(temperature=0)
    runs: Runs = {"ours": lambda: model.generate([[p] for p in prompts], max_tokens=NEW, max_images=0, text=greedy)}
    if peer is not None:
        how: dict[str, Any] = dict(max_length=NEW - 1, text_temperature=0.0)
        runs["sample_many"] = lambda: peer.sample_many(list(prompts), **how)
        runs["generate_text_only"] = lambda: peer.generate_text_only(prompts, PROMPT + NEW, temperature=0.0)
    return runs


def drawing(model: Transfusion, peer: Any, num: int, guidance: float) -> Runs:
    """An image after each prompt by 16 steps of Euler's method; ours evaluates the finished image too."""
    prompts = [words(PROMPT) for _ in range(num)]
    image = ImageSampling((SIDE, SIDE), "euler", STEPS, guidance)
    runs: Runs = {"ours": lambda: model.generate([[p] for p in prompts], max_tokens=0, begin="image", image=image)}
    if peer is not None:
        how: dict[str, Any] = dict(modality_steps=STEPS + 1, cfg_scale=guidance, max_length=0)
        runs["sample_many"] = lambda: peer.sample_many(prompts, force_modality_at_start=(0, (SIDE, SIDE)), **how)
    return runs


def compared(peer: Any, repeats: int) -> Iterator[str]:
    """Rows of the table: task, library, seconds, and speed relative to the peer's fastest function."""
    yield "| | | seconds | | of the peer's speed |\n|---|---|---|---|---|"
    yield from rows(
        f"training step of {BATCH} documents", training(peer), repeats, BATCH * (TEXT + SIDE**2), "tokens/s"
    )
    model = ours().eval()
    for num in (1, 4):
        yield from rows(f"{NEW} tokens, batch {num}", writing(model, peer, num), repeats, num * NEW, "tokens/s")
    for num, guidance in ((1, 1.0), (1, 3.0), (4, 1.0)):
        title = f"{num} image(s), {STEPS} steps, guidance {guidance:g}"
        yield from rows(title, drawing(model, peer, num, guidance), repeats, num, "images/s")


def rows(title: str, runs: Runs, repeats: int, amount: int, unit: str) -> Iterator[str]:
    times = seconds(runs, repeats, warm=1)
    best = min((s for name, s in times.items() if not name.startswith("ours")), default=None)
    for name, s in times.items():
        ratio = f"{best / s:.2f}" if best and name.startswith("ours") else ""
        yield f"| {title} | {name} | {s:.3f} | {amount / s:.3g} {unit} | {ratio} |"


class Padded(nn.Module):
    """All blocks of a model on documents padded to the longest, in place of one block."""

    def __init__(self, blocks: nn.ModuleList) -> None:
        super().__init__()
        self.blocks = blocks

    def forward(self, streams: list[Tensor], conditions: Any, packed: Packed, rotaries: Any) -> list[Tensor]:
        rotary = tuple(part[packed.rows][:, None] for part in rotaries[0])
        wide = [streams[0][0][packed.rows]]
        for block in self.blocks:
            wide = block(wide, conditions, packed.mask, [rotary])
        return [wide[0].flatten(0, 1)[packed.places][None]]


def padded(model: Transfusion) -> Transfusion:
    """A copy whose blocks compute the padding too."""
    model = copy.deepcopy(model)
    model.blocks = nn.ModuleList([Padded(model.blocks)])
    model.config = replace(model.config, depth=1)
    return model


def captions(spec: str) -> list[Tensor]:
    """Token ids of a data set's captions with the end token, by a tokenizer trained on them."""
    source = open_source(spec)
    texts = [source.caption(i) for i in range(len(source))]
    ids, mask = Tokenizer.train(texts, VOCABULARY, max_length=TEXT, images=True)(texts)
    return [row[real] for row, real in zip(ids, mask, strict=True)]


def batches(model: Transfusion, texts: list[Tensor]) -> list[MixedBatch]:
    """200 batches of documents: a random caption, an image of 64 patches and the end token."""
    generator, out = torch.Generator().manual_seed(0), []
    for _ in range(200):
        chosen = [texts[i] for i in torch.randint(len(texts), (DOCUMENTS,), generator=generator)]
        out.append(model.pack([[x[:-1], torch.randn(CHANNELS, 8, 8), x[-1:]] for x in chosen]))
    return out


def packing(data: dict[str, list[Tensor]], repeats: int) -> Iterator[str]:
    """Rows of the table: mean tokens of all batches, and seconds of forward and backward of the first two."""
    titles = ("captions", "tokens of text", "tokens a batch", "padded", "ratio", "packed, s", "padded, s", "ratio")
    yield f"| {' | '.join(titles)} |\n{'|---' * 8}|"
    model, generator = ours(), torch.Generator().manual_seed(0)
    wide = padded(model)
    for name, texts in data.items():
        every = batches(model, texts)
        lengths = torch.stack([torch.bincount(batch.document) for batch in every])  # of text only
        real, full = lengths.sum(1) + 64 * DOCUMENTS, (lengths.amax(1) + 64) * DOCUMENTS

        def run(model: Transfusion, some: list[MixedBatch]) -> None:
            for batch in some:
                OBJECTIVE(model, batch, generator).total.backward()
            model.zero_grad()

        times = seconds({"packed": partial(run, model, every[:2]), "padded": partial(run, wide, every[:2])}, repeats, 1)
        low, high = lengths.min(), lengths.max()
        yield (
            f"| {name} | {low} to {high} | {real.float().mean():.0f} | {full.float().mean():.0f} "
            f"| {full.sum() / real.sum():.2f} | {times['packed']:.3f} | {times['padded']:.3f} "
            f"| {times['padded'] / times['packed']:.2f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transfusion-pytorch", metavar="FOLDER", help="where it and its dependencies are installed")
    parser.add_argument("--data", metavar="NAME=SPEC", action="append", default=[], help="captions to pack; may repeat")
    parser.add_argument("--repeats", type=int, default=7, help="runs of each")
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    args = parser.parse_args()
    peer = theirs(args.transfusion_pytorch) if args.transfusion_pytorch else None
    data = {"24 tokens each": [words(24)] * 2} | {
        name: captions(spec) for name, spec in (one.split("=", 1) for one in ["shapes=shapes:2000", *args.data])
    }
    text = [f"# Speed of text and images\n\n`python -m benchmarks.transfusion_speed` on {hardware()}.\n"]
    text += [str(__doc__).split("\n\n", 2)[2], "## Compared with transfusion-pytorch\n"]
    if peer is None:
        text.append("Not measured: --transfusion-pytorch names no folder.\n")
    for lines in (compared(peer, args.repeats), ["\n## Packed and padded\n"], packing(data, args.repeats)):
        for line in lines:
            print(line, flush=True)
            text.append(line)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
