"""What learning images costs a trunk in text: a run's model compared with a language model of the same size.

    python -m benchmarks.text_only runs/transfusion-demo

The same trunk is trained from scratch on the run's captions alone (and on its text, if it has any, in the same
proportion), with the same tokenizer, optimiser, steps and batch size; a document is a caption and the end token. Both
models are then evaluated on the same held-out captions by the cross-entropy in nats per token. It includes the end of a
caption, which is the end token for the language model and the begin-of-image token for the run's.
"""

import argparse
import copy
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from mmdit import TextToImage
from mmdit.text import Tokens
from mmdit.text_and_images import CaptionedTransfusion, TransfusionPipeline
from mmdit.transfusion import Transfusion
from training.config import TrainConfig
from training.corpus import Corpus, Pieces
from training.data import open_source, split_by_key
from training.devices import compiled, pick_precision, repeatable
from training.ema import make_average
from training.mup import scale_start
from training.objectives import next_token_loss
from training.optim import learning_rate, make_optimizer, set_rate
from training.order import Order
from training.progress import Progress
from training.run import RunFolder


def captions(config: TrainConfig, pipe: TextToImage) -> tuple[list[str], list[str]]:
    """(training captions, held-out captions) of a run's data, without samples that have none."""
    data = config.data
    source = open_source(data.source, data.image_size, pipe.step, data.num_samples, config.seed)
    training, held_out = split_by_key(source, data.held_out)
    sides = training, held_out[: config.evaluation.validation_samples]
    found = [[caption for i in side if (caption := source.caption(int(i)))] for side in sides]
    if not all(found):
        raise ValueError(f"{data.source} has {len(found[0])} captions to train on and {len(found[1])} held out")
    return found[0], found[1]


def rows(tokens: Tokens) -> list[Tensor]:
    """The ids of each document without padding."""
    return [ids[mask] for ids, mask in zip(*tokens, strict=True)]


@torch.no_grad()
def nats(model: CaptionedTransfusion, held_out: list[str], ends_with: int, size: int) -> float:
    """Cross-entropy of captions without images, in nats per token; each ends with the token `ends_with`."""
    total, count = 0.0, 0
    for first in range(0, len(held_out), size):
        tokens = model.conditioner.tokenize(held_out[first : first + size])
        batch = model.pack([[ids] for ids in rows(tokens)]).to(model.transformer.device)
        targets = batch.ids[batch.predicting + 1]
        targets = torch.where(targets == model.transformer.config.eos, ends_with, targets)
        logits = model.transformer.head(model(batch).states[batch.predicting])
        total += torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum").item()
        count += len(targets)
    return total / count


def batches(config: TrainConfig, pipe: TextToImage, training: list[str]) -> Iterator[list[list[Tensor]]]:
    """The documents of each step: captions in the order of the run, and pieces of its text, if it has any."""
    words, cpu = pipe.model.conditioner, torch.device("cpu")
    tokens, num_text = words.tokenize(training), config.text_documents
    num = config.training.batch_size - num_text
    order, text = Order(len(training), config.seed), None
    if config.transfusion.text is not None:
        documents = Corpus(config.transfusion.text).part(False, config.data.held_out)
        pieces = Pieces(documents, words.tokenizer, config.transfusion.text_length, cpu)
        text = pieces.batches(num_text, config.seed)
    for step in range(config.training.num_steps):
        index = torch.tensor([order[place] for place in range(step * num, (step + 1) * num)])
        more = [] if text is None else rows(next(text))
        yield [[ids] for ids in rows(Tokens(tokens.ids[index], tokens.mask[index])) + more]


def train(config: TrainConfig, pipe: TextToImage, training: list[str]) -> CaptionedTransfusion:
    """The run's trunk trained from scratch on text alone, with averaged weights."""
    device = pipe.model.transformer.device
    torch.manual_seed(config.seed)
    own = CaptionedTransfusion(Transfusion(pipe.model.transformer.config), pipe.model.conditioner).to(device)
    if config.optimizer.base_width is not None:
        scale_start(own.transformer, config.optimizer.base_width)
    ema = copy.deepcopy(own).eval().requires_grad_(False)
    optimizer, rate = make_optimizer(own, config.optimizer), learning_rate(config.optimizer, config.training.num_steps)
    average = make_average(ema, own, optimizer, config.training)
    precision = pick_precision(config.training.precision, device)
    clip, z_loss = config.optimizer.grad_clip or float("inf"), config.transfusion.z_loss
    compiled(own, config, device, print)  # its blocks, in place
    losses: list[Tensor] = []
    with repeatable(device), Progress("text alone", config.training.num_steps, 0, config.training.batch_size) as shown:
        for step, documents in enumerate(batches(config, pipe, training)):
            with torch.autocast(device.type, precision, enabled=precision != torch.float32):
                batch = own.pack(documents).to(device)
                out = own(batch)
                loss = next_token_loss(out.states, out.head, batch, z_loss)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(own.parameters(), clip)
            set_rate(optimizer, rate(step))
            optimizer.step()
            optimizer.zero_grad()
            average.update(own, step)
            losses = [*losses[-99:], loss.detach()]
            if (step + 1) % 100 == 0 or step + 1 == config.training.num_steps:
                shown.show(step + 1, nats=torch.stack(losses).mean().item())
    return ema


def compare(run: str | Path) -> dict[str, float]:
    """Nats per token of the run's held-out captions, by its model and by one trained on text alone.

    Raises ValueError for a run of images alone, and if no caption is held out.
    """
    config = RunFolder.open(run).config()
    pipe = TextToImage.load(run, None if config.training.device == "auto" else config.training.device)
    if not isinstance(pipe, TransfusionPipeline):
        raise ValueError(f"{run} is a model of images alone: expected one trained with transfusion.enabled=true")
    training, held_out = captions(config, pipe)
    special, size = pipe.model.transformer.config, config.evaluation.batch_size
    both = nats(pipe.model, held_out, special.boi, size)
    alone = nats(train(config, pipe, training), held_out, special.eos, size)
    return {"text and images": both, "text alone": alone, "captions": len(held_out)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder of mmdit train with transfusion.enabled=true")
    start, found = time.perf_counter(), compare(parser.parse_args().run)
    both, alone = (torch.tensor(found[name]) for name in ("text and images", "text alone"))
    print(
        f"{found['captions']:.0f} held-out captions, {time.perf_counter() - start:.0f} s\n"
        f"text and images: {both:.4f} nats a token, perplexity {both.exp():.4f}\n"
        f"text alone:      {alone:.4f} nats a token, perplexity {alone.exp():.4f}\n"
        f"perplexity of text and images over that of text alone: {(both - alone).exp():.4f}"
    )


if __name__ == "__main__":
    main()
