"""The parts of the demo's training step in milliseconds, with matrix products in fp32 and in bf16, measured in turn.

OMP_NUM_THREADS=1 python -m benchmarks.demo_step
"""

import copy
from collections.abc import Callable
from unittest import mock

import torch

from benchmarks.timing import hardware, seconds
from mmdit.config import MMDiTConfig
from mmdit.model import MMDiT
from mmdit.text import LearnedText, TextConfig, Tokenizer
from mmdit.text_to_image import CaptionedMMDiT
from training.ema import update_ema
from training.optim import make_optimizer
from training.presets import demo


def parts() -> dict[str, Callable[[], object]]:
    """The parts of a training step of the preset, each by itself, on random latents of 8 x 8."""
    config, shape = (
        demo(),
        MMDiTConfig(16, 1, 4, 2, 64, context_dim=128, pooled_dim=128, qk_norm="rms_norm", sample_size=8),
    )
    tokenizer = Tokenizer.train(["a star"], config.text.vocab_size, config.text.max_length)
    text = LearnedText(TextConfig(config.text.vocab_size, config.text.max_length, 128, 2, 4), tokenizer)
    model = CaptionedMMDiT(MMDiT(shape), text)
    ema, optimizer = copy.deepcopy(model), make_optimizer(model, config.optimizer)
    batch = config.training.batch_size
    x, v, t, tokens = (
        torch.randn(batch, 16, 8, 8),
        torch.randn(batch, 16, 8, 8),
        torch.rand(batch),
        tokenizer(["a star"]),
    )
    tokens = type(tokens)(*(part.expand(batch, -1) for part in tokens))
    compiled = torch.compile(model)

    def learn(half: bool) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            out = compiled(x, t, tokens, None)
        (out.float() - v).square().mean().backward()

    def step(half: bool) -> None:
        with mock.patch("training.muon.multiplies_bf16", lambda device: half):
            optimizer.step()

    return {
        "forward and backward, fp32": lambda: learn(False),
        "forward and backward, bf16": lambda: learn(True),
        "gradient's norm": lambda: torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0),
        "Muon and AdamW, fp32": lambda: step(False),
        "Muon and AdamW, bf16": lambda: step(True),
        "average": lambda: update_ema(ema, model, 0.995, 100),
    }


if __name__ == "__main__":
    torch.manual_seed(0)
    print(hardware())
    for name, time in seconds(parts()).items():
        print(f"{name:28s} {1e3 * time:7.1f} ms")
