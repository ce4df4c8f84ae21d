"""A StableDiffusion3Pipeline of random weights in miniature, as diffusers and transformers make and save it."""

import shutil
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

PROMPTS = ["a red circle", "two blue stars left of a green square"]


def clip_tokenizer(pad: str) -> CLIPTokenizer:
    """Letters, and letters that end a word, with a few merges; CLIP-L pads with the end, bigG with "!"."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,!"
    words = [*letters, *(f"{c}</w>" for c in letters), "re", "red</w>", "st", "<|startoftext|>", "<|endoftext|>"]
    words.insert(0, words.pop(words.index("!")))
    merges = [("r", "e"), ("re", "d</w>"), ("s", "t")]
    vocab = {word: i for i, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocab, merges=merges, pad_token=pad, model_max_length=77)


def clip(
    tokenizer: CLIPTokenizer, width: int, projection: int, act: str, layers: int = 3, heads: int = 2
) -> CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        projection_dim=projection,
        hidden_act=act,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return randomised(CLIPTextModelWithProjection(config))


def t5_tokenizer() -> T5TokenizerFast:
    pieces = ["<pad>", "</s>", "<unk>", "\u2581", *"abcdefghijklmnopqrstuvwxyz", "\u2581red", "\u2581a", "star"]
    return T5TokenizerFast(vocab=[(piece, -float(i > 2)) for i, piece in enumerate(pieces)], extra_ids=0)


def t5(tokenizer: T5TokenizerFast, width: int) -> T5EncoderModel:
    shape = dict(d_model=width, d_kv=8, d_ff=2 * width, num_layers=2, num_heads=2)
    return randomised(T5EncoderModel(T5Config(vocab_size=len(tokenizer), feed_forward_proj="gated-gelu", **shape)))


def randomised(module, std: float = 0.15):
    """Weights in which every one matters."""
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(std=std) if p.ndim > 1 else p.add_(torch.randn_like(p) * std)
    return module.eval()


def make_pipeline(num_layers: int = 3) -> StableDiffusion3Pipeline:
    """Pictures of 32 x 32 by default, latents of 4 channels at half size, T5 of 256 tokens."""
    torch.manual_seed(0)
    tokenizers = clip_tokenizer("<|endoftext|>"), clip_tokenizer("!"), t5_tokenizer()
    transformer = SD3Transformer2DModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        num_layers=num_layers,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=32,
        pooled_projection_dim=20,
        pos_embed_max_size=24,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.5305,
        shift_factor=0.0609,
    )
    return StableDiffusion3Pipeline(
        transformer=randomised(transformer, 0.2),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=randomised(vae, 0.1),
        text_encoder=clip(tokenizers[0], 8, 8, "quick_gelu"),
        tokenizer=tokenizers[0],
        text_encoder_2=clip(tokenizers[1], 16, 12, "gelu"),
        tokenizer_2=tokenizers[1],
        text_encoder_3=t5(tokenizers[2], 32),
        tokenizer_3=tokenizers[2],
    )


def save_pipeline(folder: Path, num_layers: int = 3) -> StableDiffusion3Pipeline:
    """Make one, write it, and give it without its progress bar."""
    pipe = make_pipeline(num_layers)
    pipe.save_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def save_encoders(root: Path) -> None:
    """A T5 in root/t5, and in root/sd3 the three of SD3's pipeline, without its trunk."""
    words = t5_tokenizer()
    t5(words, 32).save_pretrained(root / "t5")
    words.save_pretrained(root / "t5")
    save_pipeline(root / "sd3")
    shutil.rmtree(root / "sd3" / "transformer")
