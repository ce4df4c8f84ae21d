"""The sections of a run's config: every field with its type, default, and a line of meaning and unit.

`training/config.py` joins them; `config_page.py` writes docs/config.md from the fields below.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from training.own import is_own
from training.settings import (
    BelowOne,
    ConfigError,
    Count,
    CountOrZero,
    Fraction,
    NotNegative,
    Positive,
    Range,
    Settings,
    shown,
    suggestion,
)

MODE_S_MAX = 2 / (math.pi - 2)
"""Largest scale of the mode density: beyond it the map u -> t is no longer monotone (SD3 paper, section 3.1)."""

SigmaRel = Annotated[float, Range(0, 0.2886, open_low=True)]


BY_FEATURES, BY_CLIP = ("fid", "kid", "precision-recall"), ("clip-score", "cmmd")
"""Scores of `evaluation.metrics` by the network that they take."""


@dataclass(frozen=True)
class DataConfig(Settings):
    """Images and captions."""

    section: ClassVar[str] = "data"

    source: str = "shapes"
    """The pictures: "shapes" (drawn), a folder of images with captions, .tar shards or Parquet files (a folder, a glob
    or a URL), "hf:NAME", a mix of these by weight, "a=0.7,b=0.3", or a cache of them by `mmdit cache`
    (its folder, or the URL of its cache.json); or your own, "python:MODULE:CLASS" (docs/data.md)."""
    num_samples: Count | None = None
    """Number of samples to use, the first ones ("none": all; 100,000 for "shapes")."""
    image_size: Count | tuple[Count, Count] | None = None
    """Pixels that every image is fitted to: a side, or [height, width]; "none" is the most common size of the data."""
    held_out: BelowOne = 0.02
    """Fraction of the samples that is held out for the validation loss, chosen by a hash of each sample's key."""
    num_workers: CountOrZero = 0
    """Worker processes that read images; the order of samples does not depend on it."""
    cache_latents: bool = True
    """Encode each image once and keep its latent in memory (float32), instead of encoding it every epoch."""
    posterior: Literal["mode", "sample"] = "mode"
    """Latents of an AutoencoderKL to train on: the mode of their distribution, or a sample drawn anew each time."""
    buckets: bool | Literal["own"] = False
    """Train at several aspect ratios: sizes of about the area of image_size, of which each image takes the nearest in
    shape. A batch has one size, or with training.packing any. "own", which needs packing: each image has about its own
    size, up to that area."""
    bucket_ratio: Annotated[float, Range(1)] = 2.0
    """Largest aspect ratio of a bucket: its longer side over its shorter."""
    crop: Literal["center", "random"] = "center"
    """Where an image is cropped if its shape differs from the size it is fitted to."""
    flip: bool = False
    """Mirror each image with probability 1/2, drawn anew each time; not for captions that mention left and right."""
    captions: str | None = None
    """Fields of captions to draw from and their weights, such as "original=0.5,synthetic=0.5"; the captions of a list
    divide its field's weight equally. "none" takes the first caption that is found."""
    min_side: CountOrZero = 0
    """Leave out images with a side of fewer pixels."""
    max_aspect: Annotated[float, Range(0)] = 0.0
    """Leave out images with a larger aspect ratio (longer side over shorter); 0 takes any."""
    min_caption: CountOrZero = 0
    """Leave out captions of fewer characters, and samples that have no others."""
    max_caption: CountOrZero = 0
    """Leave out captions of more characters, and samples that have no others; 0 takes any, cut at 10,000."""
    shuffle_buffer: Count = 1000
    """Rows of a stream ("hf-stream:NAME") that are shuffled at a time."""
    timeout: Positive = 30.0
    """Seconds that a server may take for an answer."""
    retries: CountOrZero = 5
    """Further tries where a server fails, after pauses that start at half a second and double."""

    def check(self) -> None:
        if self.cache_latents and self.source.startswith("hf-stream:"):
            raise ConfigError("data.source is a stream, which is read as it comes: set data.cache_latents=false")
        if self.cache_latents and (self.crop == "random" or self.flip):
            what = 'data.crop = "random"' if self.crop == "random" else "data.flip"
            raise ConfigError(
                f"{what} draws anew each time, kept latents are of one draw: leave it out, or train on images with "
                "data.cache_latents=false"
            )


@dataclass(frozen=True)
class ModelConfig(Settings):
    """The MMDiT trunk; the trainer fills in what follows from the data (channels, sizes) and from the text encoder."""

    section: ClassVar[str] = "model"

    depth: Count = 12
    """Number of joint blocks."""
    num_heads: Count = 6
    """Attention heads; the width is num_heads * head_dim."""
    head_dim: Count = 64
    """Width of one head."""
    mlp_ratio: Positive = 4.0
    """Hidden width of the MLPs over the model's width."""
    patch_size: Count = 2
    """Side of the square patch that becomes one token, in latent pixels (image pixels without an autoencoder)."""
    qk_norm: Literal["rms_norm"] | None = "rms_norm"
    """RMS-normalise queries and keys per head (SD3.5), or "none" (SD3)."""
    positions: Literal["sincos", "rope", "both"] = "sincos"
    """Image positions: SD3's table added to the patches, 2-D rotary embedding of queries and keys, or both."""
    pos_embed_max_size: Count = 64
    """Side of the position table, in tokens: the largest height or width that can be sampled."""
    dual_attention_layers: tuple[CountOrZero, ...] = ()
    """Blocks, from 0, whose image stream has a second attention over itself (SD3.5-medium: 0 to 12)."""

    def check(self) -> None:
        if self.positions != "sincos" and self.head_dim % 4:
            raise ConfigError(f"model.head_dim is {self.head_dim}, rotary positions need a multiple of 4")
        if self.positions != "rope" and self.num_heads * self.head_dim % 4:
            width = self.num_heads * self.head_dim
            raise ConfigError(f"model.num_heads * model.head_dim is {width}, sin-cos positions need a multiple of 4")
        wrong = [block for block in self.dual_attention_layers if block >= self.depth]
        if wrong:
            raise ConfigError(
                f"model.dual_attention_layers names blocks {wrong}, but model.depth gives 0 to {self.depth - 1}"
            )


@dataclass(frozen=True)
class TextConfig(Settings):
    """The tokenizer, and the text encoder: one that is trained with the model, or a frozen one."""

    section: ClassVar[str] = "text"

    encoder: str = "learned"
    """"learned", or the folder of a frozen one: a CLIP, T5 or causal language model, or a diffusers SD3 pipeline, whose
    three encoders are used. A frozen one uses only max_length of this section (at most 77 for CLIP; for SD3's, T5's).
    """
    vocab_size: Annotated[int, Range(258)] = 4096
    """Most tokens of the tokenizer. A trained one has 256 tokens for bytes, and two special tokens, or four in models
    of text and images."""
    tokenizer: str = "train"
    """The tokenizer: the folder of one, or "train": that of the weights in `init`, else one trained on the captions and
    transfusion.text."""
    max_length: Annotated[int, Range(2)] = 64
    """Tokens per caption, including the end token; longer captions are cut."""
    width: Count = 256
    """Width of a text token, and of the pooled text vector."""
    depth: CountOrZero = 2
    """Transformer layers over the text before the joint blocks."""
    num_heads: Count = 4
    """Attention heads of those layers."""

    def check(self) -> None:
        if not self.encoder:
            raise ConfigError('text.encoder is empty, expected "learned" or a folder')
        if self.width % (2 * self.num_heads):
            raise ConfigError(
                f"text.width is {self.width}, expected a multiple of 2 * text.num_heads = {2 * self.num_heads}"
            )


@dataclass(frozen=True)
class ObjectiveConfig(Settings):
    """Flow matching: the times to train at, and how often a caption is dropped."""

    section: ClassVar[str] = "objective"

    name: str = "flow-matching"
    """The loss: "flow-matching", or one of your own, "python:MODULE:CLASS" (docs/training.md)."""
    time_density: Literal["uniform", "logit-normal", "mode", "cosmap"] = "logit-normal"
    """Density of the training times t in [0, 1] (t = 1 is noise)."""
    m: float = 0.0
    """Location of the logit-normal density: above 0 trains more on noise, below 0 more on data."""
    s: float = 1.0
    """Scale of the logit-normal density (> 0), or of the mode density (in [-1, 1.75], 0 is uniform)."""
    stratified: bool = True
    """Draw one time of a batch from each of batch_size equal slices of probability: same density, less variance. With
    training.grad_accumulation, within each part of the batch."""
    shift: Positive = 1.0
    """Resolution-dependent shift a of training and sampling times, t -> a t / (1 + (a - 1) t): above 1 is more noise.
    """
    caption_dropout: Fraction = 0.1
    """Probability to train a sample without its caption, which classifier-free guidance needs."""

    def check(self) -> None:
        if self.name != "flow-matching" and not is_own(self.name):
            expected = '"flow-matching", or "python:MODULE:CLASS"'
            raise ConfigError(f"objective.name is {shown(self.name)}, expected {expected}")
        if self.time_density == "logit-normal" and self.s <= 0:
            raise ConfigError(f"objective.s is {self.s}, the logit-normal density needs a number > 0")
        if self.time_density == "mode" and not -1 <= self.s <= MODE_S_MAX:
            raise ConfigError(f"objective.s is {self.s}, the mode density needs a number in [-1, {MODE_S_MAX:.4g}]")


@dataclass(frozen=True)
class TransfusionConfig(Settings):
    """One trunk that reads and writes text and images (Transfusion), instead of the MMDiT and its text encoder."""

    section: ClassVar[str] = "transfusion"

    enabled: bool = False
    """Train such a trunk, of [model]'s size; of [text] it uses vocab_size, tokenizer and max_length."""
    weights: Literal["shared", "separate"] = "shared"
    """One set of weights for all tokens (the paper), or one for text and one for patches (mixture of transformers)."""
    time: Literal["added", "image"] = "added"
    """How an image's time enters: added to its patches, or by adaLN of its patches."""
    attention: Literal["transfusion", "causal"] = "transfusion"
    """Whether the patches of an image attend to each other, or only to those before them."""
    codec: Literal["linear", "unet"] = "linear"
    """How patches become tokens, and tokens velocities: by a linear layer each, or by the two halves of a U-Net."""
    codec_width: Annotated[int, Range(4)] = 64
    """Channels of the U-Net at the latent's own size, a multiple of 4; doubled at each halving of the size."""
    size_tokens: CountOrZero = 0
    """Add tokens for image sizes, up to so many rows or columns of patches, by which the model chooses a size."""
    max_tokens: Count = 4096
    """Most tokens of a document, patches included, in training and in generation."""
    image_weight: NotNegative = 5.0
    """Weight of the image loss relative to the next-token loss."""
    caption_first: Fraction = 0.8
    """Probability that a caption comes before its picture (to draw it) and not after it (to describe it)."""
    image_first_cap: Annotated[float, Range(0, 1, open_low=True)] = 0.5
    """Factor on the times of pictures that come before their captions, so that they stay recognisable."""
    z_loss: NotNegative = 0.0
    """Weight of log^2 Z of the logits, which keeps these from drifting."""
    text: str | None = None
    """Text without pictures to train on too: a .txt, .jsonl or .parquet file, a folder or a glob of these."""
    text_fraction: BelowOne = 0.0
    """Share of training.batch_size that is documents of this text (rounded in each of grad_accumulation's parts)."""
    text_length: Annotated[int, Range(2, 4096)] = 256
    """Most tokens of such a document, the end token included; longer ones are cut into pieces."""
    freeze_text: bool = False
    """Freeze the weights for text that `init` (at the top) gave: the text stream, embedding and head (LMFusion)."""

    def check(self) -> None:
        if self.text == "":
            raise ConfigError('transfusion.text is empty, expected a file, a folder, a glob or "none"')
        if (self.text is None) != (self.text_fraction == 0):
            raise ConfigError(
                f"transfusion.text is {self.text or 'none'} and transfusion.text_fraction {self.text_fraction:g}: "
                "text alone needs both, a file and a share of the batch above 0"
            )
        if self.freeze_text and self.weights != "separate":
            raise ConfigError(
                f'transfusion.freeze_text needs transfusion.weights = "separate", which is "{self.weights}"'
            )


@dataclass(frozen=True)
class LoraConfig(Settings):
    """Fine-tuning by low-rank adapters instead of all weights."""

    section: ClassVar[str] = "lora"

    rank: CountOrZero = 0
    """Rank of the adapters on the blocks' matrices, which alone are trained; 0: no adapters, all weights are trained.
    """
    alpha: Positive | None = None
    """The adapters are scaled by alpha / rank; "none" is alpha = rank."""
    targets: Literal["attention", "all"] = "attention"
    """Matrices that get an adapter: those of the attention, or also those of the MLPs."""


@dataclass(frozen=True)
class OptimizerConfig(Settings):
    """The optimiser and the learning rate over the run."""

    section: ClassVar[str] = "optimizer"

    name: Literal["adamw", "muon", "schedule-free", "adamw-8bit"] = "adamw"
    """The optimiser. Muon orthogonalises the updates of the blocks' matrices: steps are slower, and fewer are needed.
    "schedule-free" is AdamW that averages its own weights, "adamw-8bit" AdamW with 8-bit moments."""
    lr: Positive = 1e-4
    """Learning rate after warm-up."""
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.99)
    """Decay of the first and of the second moment of the gradient, per step (AdamW's parameters)."""
    momentum: BelowOne = 0.95
    """Decay of Muon's momentum, per step."""
    eps: Positive = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NotNegative = 0.01
    """Decoupled weight decay of matrices; not of norms, biases and embedding tables."""
    grad_clip: NotNegative = 1.0
    """Largest norm of the gradient; 0 does not clip."""
    warmup_steps: CountOrZero = 100
    """Steps in which the learning rate rises from 0 to lr."""
    schedule: Literal["constant", "cosine", "linear", "wsd"] = "constant"
    """The learning rate from the end of warm-up to the end of the run; "wsd" is constant, then linear."""
    decay_fraction: Annotated[float, Range(0, 1, open_low=True)] = 0.1
    """Fraction of the run, at its end, in which a "wsd" schedule falls."""
    final_lr_fraction: Fraction = 0.0
    """Learning rate at the end of a schedule that falls, as a fraction of lr."""
    base_width: Count | None = None
    """For muP, the width of the trunk that lr was found for; a wider one gets lower rates and other initial weights."""

    def check(self) -> None:
        if self.name != "schedule-free":
            return
        if self.schedule != "constant":
            raise ConfigError(f'optimizer.name "schedule-free" takes schedule "constant", not "{self.schedule}"')
        if not self.betas[0]:
            raise ConfigError('optimizer.betas[0] is 0, optimizer.name "schedule-free" needs a number above 0')


@dataclass(frozen=True)
class TrainingConfig(Settings):
    """The loop: its length, its batches, and what is written when."""

    section: ClassVar[str] = "training"

    num_steps: Count = 100_000
    """Optimizer steps of the whole run."""
    batch_size: Count = 64
    """Samples per step."""
    grad_accumulation: Count = 1
    """Number of parts to compute a batch in, to save memory; the whole batch stays batch_size samples."""
    ema: Literal["exponential", "power"] = "exponential"
    """Average of the weights that is sampled and scored: with a fixed decay, or EDM2's power-function average."""
    ema_decay: BelowOne = 0.999
    """Decay per step of an "exponential" average; 0 keeps no average."""
    ema_every: Count = 1
    """Steps between updates of the average, to save work for large models; decay and widths still are per step."""
    ema_sigma_rel: tuple[SigmaRel, SigmaRel] = (0.05, 0.1)
    """Relative widths of two "power" averages, as fractions of the steps done; the first is sampled and scored."""
    ema_snapshot_every: CountOrZero = 1000
    """Steps from one snapshot of both averages to the next; `mmdit ema` makes any other width from them. 0: none."""
    ema_snapshot_dtype: Literal["fp32", "fp16", "bf16"] = "fp16"
    """Type of the numbers in snapshots."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of the model; "auto" compiles where a compiler is found and the run is long enough to gain."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute; "auto" takes CUDA if present. "mps" is the GPU of a Mac."""
    attention: Literal["sdpa", "flex", "varlen", "xformers"] = "sdpa"
    """Kernel of the attention; all but "sdpa" need CUDA."""
    packing: bool = False
    """Pack a batch's samples into one sequence, without padding of captions: the same results for less work. With
    data.buckets a batch then holds images of several sizes."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Type of the matrix products in training; weights, loss and optimiser stay fp32. "auto": bf16 where native."""
    recompute: Literal["none", "full", "selective"] = "none"
    """Activation checkpointing, i.e. what the backward pass recomputes: nothing, whole blocks, or all of a block but
    its matrix products and attention (with training.attention "flex" or "xformers" also the attention)."""
    recompute_every: Count = 1
    """Recompute only every n-th block."""
    max_bad_steps: CountOrZero = 10
    """Number of steps in a row without a finite gradient that ends the run; each is skipped. 0 does not check."""
    log_every: Count = 10
    """Steps from one line in metrics.jsonl to the next."""
    validate_every: CountOrZero = 1000
    """Steps from one validation loss to the next; 0 validates only at the end."""
    sample_every: CountOrZero = 1000
    """Steps from one sample grid to the next; 0 samples only at the end."""
    checkpoint_every: CountOrZero = 1000
    """Steps from one checkpoint to the next; 0 writes one only at the end, and when stopped."""
    keep_checkpoints: Count = 2
    """Number of checkpoints to keep; older ones are removed."""
    async_checkpoint: bool = False
    """Write checkpoints in the background, from a copy in the CPU's memory."""
    peak_tflops: Positive | Literal["auto", "measure"] = "auto"
    """Peak for MFU, in TFLOPS per device: a number, the datasheet's for a known GPU ("auto"; no MFU on other devices),
    or measured with a large matrix product ("measure")."""
    profile: str | None = None
    """Steps to profile, FIRST:LAST from 1, both included: a trace for chrome://tracing goes into profile/."""
    wandb: str | None = None
    """Project of Weights & Biases to send metrics and samples to; WANDB_MODE=offline keeps them in the run's folder."""
    out: str | None = None
    """Folder of the run; "none" is runs/ and the run's name."""

    def check(self) -> None:
        if self.profile is not None and self.profiled is None:
            raise ConfigError(f'training.profile is "{self.profile}", expected steps FIRST:LAST from 1, such as 10:15')
        if self.wandb == "":
            raise ConfigError('training.wandb is empty, expected a project or "none"')
        if self.batch_size % self.grad_accumulation:
            raise ConfigError(
                f"training.batch_size is {self.batch_size}, expected a multiple of training.grad_accumulation = "
                f"{self.grad_accumulation}"
            )
        if self.ema_every > self.num_steps:
            raise ConfigError(f"training.ema_every is {self.ema_every}: a run of {self.num_steps} steps has no average")
        if self.ema_every > 1 and self.ema == "exponential" and not self.ema_decay:
            raise ConfigError(f"training.ema_every is {self.ema_every}, and training.ema_decay = 0 keeps no average")
        if self.ema == "power" and self.ema_sigma_rel[0] == self.ema_sigma_rel[1]:
            raise ConfigError(f"training.ema_sigma_rel is {list(self.ema_sigma_rel)}, expected two different widths")

    @property
    def profiled(self) -> tuple[int, int] | None:
        """The first and the last step that `profile` names; None where it names none."""
        first, _, last = (self.profile or "").partition(":")
        if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
            return None
        return int(first), int(last)


@dataclass(frozen=True)
class ParallelConfig(Settings):
    """One run on the processes that torchrun starts (docs/distributed.md); one process alone needs none of it."""

    section: ClassVar[str] = "parallel"

    strategy: Literal["auto", "none", "ddp", "fsdp", "hsdp"] = "auto"
    """How the model is distributed: replicated ("ddp", "auto"), sharded over all processes with average and optimiser
    ("fsdp"), or sharded within groups of shard_size processes ("hsdp"). "none": one process alone."""
    shard_size: Count | None = None
    """Number of processes that share one model with "hsdp"; "none" is those of a node."""
    reshard: bool = True
    """Free a block's gathered weights after its forward pass, and gather them again for the backward pass."""
    cpu_offload: bool = False
    """With "fsdp" and "hsdp", keep weights, gradients, optimiser and average in the CPU's memory; the GPU holds the
    block being computed. Also for one process with one GPU."""
    timeout: Count = 1800
    """Seconds to wait for a process that does not respond."""


@dataclass(frozen=True)
class SamplingConfig(Settings):
    """How pictures are drawn: in the run's grids, and by default wherever its model is sampled."""

    section: ClassVar[str] = "sampling"

    prompts: tuple[str, ...] = ()
    """Captions for the sample grids; an empty list takes those of held-out samples, or of others if there are none."""
    solver: str = "ab2"
    """Name of the ODE solver, as in `samplers.solver_names()`."""
    num_steps: Count = 28
    """Steps of the solver; heun and midpoint evaluate the network twice a step."""
    guidance: NotNegative = 4.0
    """Scale of classifier-free guidance; 1 is none, 0 ignores the caption."""
    interval: tuple[Fraction, Fraction] = (0.0, 1.0)
    """Interval [low, high] of times in which guidance is used; outside it only the conditional prediction is."""
    seed: CountOrZero = 0
    """Seed of the noise that pictures start from."""

    def check(self) -> None:
        from samplers import RectifiedFlow, SDESolver, make_solver, solver_names

        if self.solver not in solver_names():
            hint = suggestion(self.solver, solver_names()) or f"; there are {', '.join(solver_names())}"
            raise ConfigError(f'sampling.solver is "{self.solver}", which is no solver{hint}')
        solver = make_solver(self.solver, RectifiedFlow())
        if isinstance(solver, SDESolver) and solver.diffusion is None:
            raise ConfigError(f'sampling.solver is "{self.solver}", which wants a diffusion too: name it at a call')
        if self.interval[0] >= self.interval[1]:
            raise ConfigError(f"sampling.interval is {list(self.interval)}, expected [low, high] with low < high")


@dataclass(frozen=True)
class EvaluationConfig(Settings):
    """Validation loss on held-out samples, the six-question score of the drawn world, and scores by networks."""

    section: ClassVar[str] = "evaluation"

    validation_samples: Count = 256
    """Held-out samples in a validation loss (fewer where there are fewer)."""
    validation_times: Count = 8
    """Number of evenly spaced fixed times t at which the validation loss is computed."""
    prompts_per_question: CountOrZero = 50
    """Prompts for each of ShapesEval's six questions, if the source is "shapes"; 0 does not score."""
    batch_size: Count = 64
    """Pictures that are sampled, or validated, at a time."""
    seed: CountOrZero = 0
    """Seed of the prompts and of the noise."""
    metrics: tuple[Literal["fid", "kid", "precision-recall", "clip-score", "cmmd"], ...] = ()
    """Scores of pictures by networks; docs/evaluation.md says what each of them is and needs."""
    metrics_every: CountOrZero = 0
    """Steps from one of these scores to the next; 0 scores only at the end."""
    features: str | None = None
    """Network for fid, kid, precision-recall: FID's Inception (.safetensors), or a vision model's or CLIP's folder."""
    clip: str | None = None
    """Network for clip-score and cmmd: a CLIP's folder, or "hf-hub:ORG/NAME"."""
    reference: str | None = None
    """Pictures to compare the model's with, named as in data.source, and the captions to draw; "none": the run's data
    and its held-out captions."""
    num_reference: Count | None = None
    """Number of these pictures to use, evenly spread ("none": all)."""
    num_images: Count = 1000
    """Number of pictures drawn for these scores; published scores use 10,000 to 50,000."""
    cache: str | None = None
    """Folder that keeps the reference's features; "none": mmdit/references in the user's cache folder."""

    def check(self) -> None:
        for names, key in ((BY_FEATURES, "features"), (BY_CLIP, "clip")):
            wanting = [name for name in self.metrics if name in names]
            if wanting and not getattr(self, key):
                raise ConfigError(
                    f"{wanting[0]} needs a network: name it by evaluation.{key} (mmdit evaluate --{key}); "
                    "docs/evaluation.md says where to get one"
                )
        if self.metrics_every and not self.metrics:
            raise ConfigError("evaluation.metrics_every is set, but evaluation.metrics names none")
