"""Small batches of images, captions and documents, and a trunk of random weights, for the tests of objectives."""

import torch

from mmdit.config import TransfusionConfig
from mmdit.text import Tokens
from mmdit.transfusion import Transfusion
from training.objectives import Batch
from training.share import Share
from training.time_density import TimeDensity


def batch(n: int = 6) -> Batch:
    g = torch.Generator().manual_seed(0)
    ids = torch.arange(2 * n).view(n, 2)
    return Batch(torch.randn(n, 4, 3, 5, generator=g), Tokens(ids, ids > 0))


def generator(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise_of(like, g: torch.Generator) -> list[torch.Tensor]:
    """Each sample's noise is drawn from its own seed."""
    seeds = torch.randint(2**63 - 1, (len(like),), generator=g).tolist()
    return [torch.randn(x.shape, generator=generator(seed)) for x, seed in zip(like, seeds, strict=True)]


TINY = TransfusionConfig(vocab_size=40, in_channels=3, patch_size=2, depth=2, num_heads=2, head_dim=16)


def trunk(seed=0):
    model, g = Transfusion(TINY), generator(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.2 * torch.randn(p.shape, generator=g))
    return model


def picture(height=4, width=4, seed=0):
    return torch.randn(3, height, width, generator=generator(seed))


DOCUMENTS = [
    [torch.tensor([5, 6, 7]), picture(seed=1), torch.tensor([8, 9])],
    [picture(2, 6, seed=2), torch.tensor([10, 11])],
    [torch.tensor([12, 13])],
    [picture(seed=3)],
]


def piece(data: Batch, share: Share) -> Batch:
    rows = share.rows(len(data.latents))
    return Batch(data.latents[rows], Tokens(*(x[rows] for x in data.tokens)))


class Given(TimeDensity):
    """A density that gives the times it was told to, and says how it was asked."""

    def __init__(self, times):
        object.__setattr__(self, "times", times)
        object.__setattr__(self, "asked", [])

    def quantile(self, u):
        raise NotImplementedError

    def _density(self, t):
        raise NotImplementedError

    def sample(self, n, generator=None, stratified=False, device=None, dtype=torch.float32):
        self.asked.append((n, stratified))
        return self.times[:n]
