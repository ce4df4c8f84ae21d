"""Our MMDiT and diffusers' transformer with the same weights, for the benchmarks that compare them."""

import torch
from torch import Tensor, nn

from mmdit.config import MMDiTConfig
from mmdit.formats import config_to_diffusers
from mmdit.layouts import DIFFUSERS
from mmdit.model import MMDiT


def ours(config: MMDiTConfig, device: str = "cpu") -> MMDiT:
    """An MMDiT of random weights, modulations too: these start at zero, which makes each block the identity."""
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
    other.load_state_dict(DIFFUSERS.from_ours(model.state_dict(), model.config))
    return other


def inputs(c: MMDiTConfig, side: int, batch: int, num_text: int, device: str = "cpu") -> tuple[Tensor, ...]:
    """x_t of side x side tokens, t, context and pooled."""
    x = torch.randn(batch, c.in_channels, side * c.patch_size, side * c.patch_size, device=device)
    t = torch.rand(batch, device=device)
    context = torch.randn(batch, num_text, c.context_dim, device=device)
    return x, t, context, torch.randn(batch, c.pooled_dim, device=device)


def caption_lengths(noise: Tensor, most: int) -> Tensor:
    """Caption lengths in tokens, (B,), from standard normal noise (B,), B even: half short and half long (log-normal
    with medians 12 and 90, as original and synthetic captions have), clipped to [2, most].
    """
    median = torch.tensor([12.0, 90.0]).repeat(len(noise) // 2)
    return (median * (0.5 * noise).exp()).round().clamp(2, most)


def call_ours(model: nn.Module, x: Tensor, t: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
    return model(x, t, context, pooled)


def call_packed(model: nn.Module, x: Tensor, t: Tensor, context: Tensor, pooled: Tensor, real: Tensor) -> Tensor:
    """The samples packed into one sequence; `real` (B, L): text tokens that are no padding."""
    return torch.stack(model(list(x), t, context, pooled, real))


def call_theirs(model: nn.Module, x: Tensor, t: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
    return model(x, context, pooled, t * 1000, return_dict=False)[0]
