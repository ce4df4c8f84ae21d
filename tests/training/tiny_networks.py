"""Small random networks on disk, as large trained ones lie there: CLIP by transformers and open_clip, DINOv2."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tests.mmdit.tiny_sd3 import clip_tokenizer, randomised


def save_clip(folder: Path, seed: int = 0) -> Path:
    """A CLIP of transformers that looks at 16 x 16 pixels."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    torch.manual_seed(seed)
    tokenizer = clip_tokenizer("<|endoftext|>")
    shape = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    words = dict(vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    vision = shape | dict(image_size=16, patch_size=8)
    config = CLIPConfig(text_config=shape | words, vision_config=vision, projection_dim=12)
    randomised(CLIPModel(config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def save_dino(folder: Path) -> Path:
    """A DINOv2 that looks at 28 x 28 pixels."""
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    torch.manual_seed(1)
    config = Dinov2Config(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
    randomised(Dinov2Model(config)).save_pretrained(folder)
    BitImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(folder)
    return folder


def save_open_clip(folder: Path) -> Path:
    """A CLIP of open_clip that looks at 16 x 16 pixels."""
    import open_clip
    from safetensors.torch import save_file

    torch.manual_seed(2)
    text = dict(context_length=77, vocab_size=49408, width=16, heads=2, layers=2)
    shape = dict(
        embed_dim=12, vision_cfg=dict(image_size=16, patch_size=8, width=16, layers=2, head_width=8), text_cfg=text
    )
    model = randomised(open_clip.CLIP(**shape))
    folder.mkdir(parents=True)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    how = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": shape, "preprocess_cfg": how}))
    return folder


def save_pictures(folder: Path, count: int, seed: int = 0, size: int = 24, captions: bool = True) -> Path:
    """Pictures of noise of several grains, each with a caption."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        grain = rng.integers(2, 7)
        pixels = rng.integers(0, 256, (grain, grain, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC).save(folder / f"{i:03d}.png")
        if captions:
            (folder / f"{i:03d}.txt").write_text(["a red star", "a star", "red"][i % 3])
    return folder


def pictures(folder: Path) -> torch.Tensor:
    """The pictures in a folder, uint8 (B, 3, H, W)."""
    arrays = [np.asarray(Image.open(path).convert("RGB")) for path in sorted(folder.glob("*.png"))]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
