"""Our MMDiT and diffusers' transformer with the same weights, for benchmarks."""

import torch
from torch import Tensor, nn

from mmdit.config import MMDiTConfig
from mmdit.formats import config_to_diffusers, to_diffusers
from mmdit.model import MMDiT


def ours(config: MMDiTConfig, device: str = "cpu") -> MMDiT:
    """A model in which every part matters: modulations start at zero, and there a block would be the identity."""
    model = MMDiT(config).to(device)
    for parameter in model.parameters():
        if parameter.ndim == 1 or not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return model


def theirs(model: MMDiT) -> nn.Module:
    """diffusers' `SD3Transformer2DModel` with the weights of ours."""
    from diffusers import SD3Transformer2DModel

    with torch.device(model.device):
        other = SD3Transformer2DModel(**config_to_diffusers(model.config))
    other.load_state_dict(to_diffusers(model.state_dict(), model.config))
    return other


def inputs(c: MMDiTConfig, side: int, batch: int, num_text: int, device: str = "cpu") -> tuple[Tensor, ...]:
    """x_t of side x side tokens, t, context and pooled."""
    x = torch.randn(batch, c.in_channels, side * c.patch_size, side * c.patch_size, device=device)
    t = torch.rand(batch, device=device)
    context = torch.randn(batch, num_text, c.context_dim, device=device)
    return x, t, context, torch.randn(batch, c.pooled_dim, device=device)


def caption_lengths(noise: Tensor, most: int) -> Tensor:
    """Text tokens of captions, (B,), B even, from normal noise (B,): half of them short and half long (log-normal about
    12 and 90 tokens, as original and synthetic captions are).
    """
    median = torch.tensor([12.0, 90.0]).repeat(len(noise) // 2)
    return (median * (0.5 * noise).exp()).round().clamp(2, most)


def call_ours(model: nn.Module, x: Tensor, t: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
    return model(x, t, context, pooled)


def call_packed(model: nn.Module, x: Tensor, t: Tensor, context: Tensor, pooled: Tensor, real: Tensor) -> Tensor:
    """Samples in one row, of each caption what is real, (B, L)."""
    return torch.stack(model(list(x), t, context, pooled, real))


def call_theirs(model: nn.Module, x: Tensor, t: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
    return model(x, context, pooled, t * 1000, return_dict=False)[0]
