"""FLOPs by formula against what torch counts, and the peaks they are held against."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mmdit.attention import Pairs
from mmdit.config import LlamaConfig, MMDiTConfig, TransfusionConfig
from mmdit.lora import add_lora
from mmdit.model import MMDiT
from mmdit.text import LearnedText, TextConfig, Tokenizer, Tokens
from mmdit.text_and_images import CaptionedTransfusion, Words
from mmdit.text_to_image import CaptionedMMDiT
from mmdit.transfusion import Transfusion
from training.flops import captioned, datasheet_peak, in_one_row, measured_peak, of_documents, peak_tflops, step_flops
from training.objectives import Batch, FlowMatching, TextAndImages
from training.seeds import generator_for
from training.time_density import Uniform

WORDS = TextConfig(vocab_size=300, max_length=12, width=32, depth=2, num_heads=2)


def tokens(count: int, images: bool = False, sizes: int = 0):
    tokenizer = Tokenizer.train(["a red circle", "a star"], 300, 12, images, sizes)
    return tokenizer, tokenizer((["a red circle", "star", ""] * count)[:count])


def counted(model, objective, batch) -> float:
    """What torch counts of one step, with attention as plain matrix products."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        objective(model, batch, generator_for(0)).total.backward()
    return counter.get_total_flops()


def mmdit(**changes) -> CaptionedMMDiT:
    shape = dict(in_channels=3, depth=3, num_heads=2, head_dim=16, context_dim=32, pooled_dim=32, sample_size=8)
    config = MMDiTConfig(**{**shape, "pos_embed_max_size": 8, **changes})
    return CaptionedMMDiT(MMDiT(config), LearnedText(WORDS, tokens(1)[0]))


def text_and_images(**changes) -> tuple[CaptionedTransfusion, Tokens]:
    """A model, and the words of three captions."""
    shape = dict(vocab_size=320, in_channels=3, depth=2, num_heads=2, head_dim=16, sample_size=8, pos_embed_max_size=8)
    tokenizer, words = tokens(3, True, changes.get("size_tokens", 0))
    special = dict(zip(("pad", "eos", "boi", "eoi"), tokenizer.special, strict=True), first_size=tokenizer.sizes.start)
    config = TransfusionConfig(**{**shape, **special, **changes})
    return CaptionedTransfusion(Transfusion(config), Words(WORDS, tokenizer)), words


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dual_attention_layers": (0, 1), "qk_norm": "rms_norm"},
        {"positions": "rope", "mlp_ratio": 2.5, "patch_size": 4},
    ],
)
def test_a_step_of_an_mmdit_is_what_torch_counts(changes):
    model = mmdit(**changes)
    batch = Batch(torch.randn(4, 3, 8, 12), tokens(4)[1])
    sizes = captioned(4, 8 * 12 // model.transformer.config.patch_size**2, 12)
    assert step_flops(model, sizes) == counted(model, FlowMatching(Uniform()), batch)


@pytest.mark.parametrize("sides", [((8, 12),) * 4, ((8, 12), (4, 4), (2, 16), (8, 12))], ids=["one-size", "several"])
def test_a_step_in_one_row_is_what_torch_counts(sides, monkeypatch):
    monkeypatch.setattr(Pairs, "_is_short", False)  # side by side, on a CPU, samples are padded
    model = mmdit(dual_attention_layers=(0,))
    model.packed = True
    words = tokens(4)[1]
    lengths, batch = words.mask.sum(1), Batch([torch.randn(3, *size) for size in sides], words)
    patches = torch.tensor([height * width // 4 for height, width in sides])
    sizes = in_one_row(patches, lengths, int(lengths.max()))
    assert len(set(lengths.tolist())) > 1 and step_flops(model, sizes) < step_flops(model, captioned(4, 24, 12))
    assert step_flops(model, sizes) == counted(model, FlowMatching(Uniform(), caption_dropout=0.0), batch)


def test_what_is_frozen_costs_no_gradient():
    """Adapters: a matrix has no gradient of its own; the encoder of words none at all."""
    model = mmdit()
    model.conditioner.requires_grad_(False)
    add_lora(model.transformer, 4, 4, "all")
    batch = Batch(torch.randn(4, 3, 8, 8), tokens(4)[1])
    sizes = captioned(4, 16, 12)
    assert step_flops(model, sizes) == pytest.approx(counted(model, FlowMatching(Uniform()), batch), rel=0.2)
    assert step_flops(model, sizes) < 0.85 * step_flops(mmdit(), sizes)


@pytest.mark.parametrize(
    "changes",
    [
        dict(weights="shared", time="added"),
        dict(weights="shared", time="image"),
        dict(weights="separate", time="image", size_tokens=8),
        dict(weights="separate", time="added", codec="unet", codec_width=8, patch_size=4, positions="both"),
        dict(weights="separate", time="image", positions="rope", llama=LlamaConfig(hidden=48, num_kv_heads=1)),
    ],
)
def test_a_step_of_text_and_images_is_what_torch_counts(changes):
    model, words = text_and_images(**changes)
    config, lead = model.transformer.config, changes.get("size_tokens", 0)
    text = Tokens(words.ids[:2], words.mask[:2])
    batch = Batch(torch.randn(3, 3, 8, 8), words, text)
    objective = TextAndImages(Uniform(), caption_dropout=0.0)
    patches = torch.tensor([64 // config.patch_size**2] * 3 + [0, 0])
    sizes = of_documents(patches, torch.cat([words.mask, text.mask]).sum(1), 2 if lead else 0)
    # On a CPU documents stand side by side, each padded to the longest; the model asks for their own lengths alone.
    lengths = patches + torch.cat([words.mask, text.mask]).sum(1) + (patches > 0) * (4 if lead else 2)
    dense = 3 * 4 * config.width * config.depth * float(len(lengths) * lengths.max() ** 2 - sizes.joint)
    # Beside the images' times there is a row of zeros for text.
    zeros = 3 * 2 * 6 * config.width**2 * config.depth if config.time == "image" else 0
    assert step_flops(model, sizes) + dense + zeros == counted(model, objective, batch)


@pytest.mark.parametrize(
    ("name", "half", "single"),
    [
        ("NVIDIA H100 80GB HBM3", 989, 67),
        ("NVIDIA H100 PCIe", 756, 51),
        ("NVIDIA H100 NVL", 835, 60),
        ("NVIDIA A100-SXM4-80GB", 312, 19.5),
        ("NVIDIA GeForce RTX 4090", 165.2, 82.6),
        ("NVIDIA L4", 121, 30.3),
        ("AMD Instinct MI300X", 1307, 163.4),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None, None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None, None),
        ("NVIDIA H20", None, None),
        ("A device of tomorrow", None, None),
    ],
)
def test_peaks_of_the_datasheets_are_found_by_name(name, half, single):
    assert datasheet_peak(name, torch.bfloat16) == half
    assert datasheet_peak(name, torch.float32) == single


def test_the_peak_is_the_one_asked_for():
    cpu = torch.device("cpu")
    assert peak_tflops(12.5, cpu, torch.float32) == 12.5
    assert peak_tflops("auto", cpu, torch.float32) is None
    assert peak_tflops("measure", cpu, torch.float32) > 0
    assert measured_peak(cpu, torch.float32, 0.0) > 0


def test_a_measured_peak_is_the_arithmetic_of_the_best_product_over_its_time(monkeypatch):
    """Two products of 1024 x 1024 matrices, of 0.5 s and 0.25 s, within 1 s."""
    times = iter([0.0, 0.0, 0.0, 0.5, 0.5, 0.5, 0.75, 1.0])
    monkeypatch.setattr("training.flops.time.perf_counter", lambda: next(times))
    assert measured_peak(torch.device("cpu"), torch.float32, 1.0) == pytest.approx(2 * 1024**3 / 0.25 / 1e12)


def test_documents_are_measured_by_their_own_lengths():
    """Three words and 10 patches, two words alone: tokens 3 + 2 + 2 and 2; all look at all of their document."""
    sizes = of_documents(torch.tensor([10, 0]), torch.tensor([3, 2]), lead=2)
    assert (sizes.images, sizes.patches, sizes.text) == (1, 10, 9)
    assert sizes.predicting == 7 - 2 + 2 - 1
    assert sizes.joint == (10 + 7) ** 2 + 2**2


def test_what_reads_frozen_words_has_no_gradient_to_give():
    frozen, model, sizes = mmdit(), mmdit(), captioned(4, 16, 12)
    frozen.conditioner.requires_grad_(False)
    batch = Batch(torch.randn(4, 3, 8, 8), tokens(4)[1])
    saved = step_flops(model, sizes) - step_flops(frozen, sizes)
    objective = FlowMatching(Uniform(), caption_dropout=0.0)
    assert saved == counted(model, objective, batch) - counted(frozen, objective, batch)
