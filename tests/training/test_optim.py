"""The optimiser's groups and rates, and the moving average, each against its formula."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from mmdit.config import MMDiTConfig
from mmdit.model import MMDiT
from mmdit.text import LearnedText, TextConfig, Tokenizer
from mmdit.text_to_image import CaptionedMMDiT
from training.config import OptimizerConfig
from training.optim import (
    Muon,
    hidden_matrices,
    learning_rate,
    make_optimizer,
    newton_schulz,
    parameter_groups,
    update_ema,
)


def model() -> CaptionedMMDiT:
    config = MMDiTConfig(
        3, 2, 2, 2, 8, context_dim=16, pooled_dim=16, qk_norm="rms_norm", sample_size=8, pos_embed_max_size=4
    )
    tokenizer = Tokenizer.train(["a star"], 260, 8)
    return CaptionedMMDiT(MMDiT(config), LearnedText(TextConfig(260, 8, 16, 1, 2), tokenizer))


def test_matrices_decay_and_norms_biases_and_embeddings_do_not():
    net = model()
    decaying, rest = parameter_groups(net, 0.3)
    names = {id(p): name for name, p in net.named_parameters()}
    assert (decaying["weight_decay"], rest["weight_decay"]) == (0.3, 0.0)
    with_decay, without = ({names[id(p)] for p in group["params"]} for group in (decaying, rest))
    assert with_decay | without == set(names.values()) and not with_decay & without
    assert without == {
        name for name in names.values() if name.endswith("bias") or "norm" in name or name == "conditioner.embed.weight"
    }


def test_frozen_parameters_are_left_out():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False))
    assert [len(group["params"]) for group in parameter_groups(net, 0.1)] == [1, 1]


def test_a_step_is_that_of_adamw():
    """Against the update written out: m, v, bias corrections, eps, and decay of the matrix alone."""
    config = OptimizerConfig(lr=0.01, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.5)
    layer = nn.Linear(3, 2)
    optimizer = make_optimizer(layer, config)
    expected = {name: p.detach().clone() for name, p in layer.named_parameters()}
    m = {name: torch.zeros_like(p) for name, p in expected.items()}
    v = {name: torch.zeros_like(p) for name, p in expected.items()}
    for k in range(1, 4):
        layer.zero_grad()
        (layer(torch.tensor([1.0, -2.0, 0.5])) ** 3).sum().backward()
        optimizer.step()
        for name, p in layer.named_parameters():
            m[name] = 0.8 * m[name] + 0.2 * p.grad
            v[name] = 0.9 * v[name] + 0.1 * p.grad**2
            if name == "weight":
                expected[name] = expected[name] * (1 - 0.01 * 0.5)
            step = m[name] / (1 - 0.8**k) / ((v[name] / (1 - 0.9**k)).sqrt() + 1e-3)
            expected[name] = expected[name] - 0.01 * step
            torch.testing.assert_close(p.detach(), expected[name])


def test_rate_rises_and_falls_as_the_schedule_says():
    config = OptimizerConfig(lr=2.0, warmup_steps=4, schedule="constant", final_lr_fraction=0.1)
    rates = {name: learning_rate(replace(config, schedule=name), 24) for name in ("constant", "linear", "cosine")}
    for rate in rates.values():
        assert [rate(k) for k in range(5)] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert rates["constant"](23) == 2.0
    assert rates["linear"](14) == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert rates["cosine"](14) == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert rates["cosine"](9) == pytest.approx(2.0 * (0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2))
    for name in ("linear", "cosine"):
        assert rates[name](24) == rates[name](99) == pytest.approx(0.2)


def test_rate_without_warmup_and_with_nothing_but_warmup():
    assert learning_rate(OptimizerConfig(lr=1.0, warmup_steps=0), 10)(0) == 1.0
    short = learning_rate(OptimizerConfig(lr=1.0, warmup_steps=10, schedule="cosine"), 5)
    assert [short(k) for k in range(5)] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.999])
def test_moving_average_is_the_formula(decay):
    ema, net = nn.Linear(2, 2), nn.Linear(2, 2)
    expected = ema.weight.detach().clone()
    for step in range(5):
        with torch.no_grad():
            net.weight.add_(1)
        d = min(decay, (1 + step) / (10 + step))
        expected = d * expected + (1 - d) * net.weight.detach()
        update_ema(ema, net, decay, step)
        torch.testing.assert_close(ema.weight.detach(), expected)
    if decay == 0:
        assert torch.equal(ema.weight, net.weight)


def test_newton_schulz_keeps_the_singular_vectors_and_evens_the_values():
    for rows, columns in ((8, 8), (24, 6), (6, 24)):
        x = torch.randn(3, rows, columns, generator=torch.Generator().manual_seed(0))
        u, values, v = torch.linalg.svd(x, full_matrices=False)
        core = u.mT @ newton_schulz(x).float() @ v.mT  # diagonal where the vectors are kept
        evened = torch.diagonal(core, dim1=-2, dim2=-1)
        wide = values > 0.1 * values[:, :1]  # the rounds lift smaller ones only part of the way
        assert evened[wide].min() > 0.65 and evened.max() < 1.25
        assert (core - torch.diag_embed(evened)).abs().max() < 0.05


@pytest.mark.parametrize("shape", [(12, 12), (48, 12), (12, 48)])
def test_a_step_of_muon_is_that_of_torch(shape):
    generator = torch.Generator().manual_seed(0)
    ours = nn.Parameter(torch.randn(shape, generator=generator))
    theirs = nn.Parameter(ours.detach().clone())
    optimizer = Muon([{"params": [ours], "weight_decay": 0.3, "muon": True}], lr=0.02, betas=(0.9, 0.99), eps=1e-8)
    reference = torch.optim.Muon(
        [theirs], lr=0.02, weight_decay=0.3, momentum=0.95, nesterov=True, adjust_lr_fn="match_rms_adamw"
    )
    for _ in range(3):
        ours.grad = torch.randn(shape, generator=generator)
        theirs.grad = ours.grad.clone()
        optimizer.step()
        reference.step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.02 * 0.2 * 48**0.5 * 3 * 0.02)  # theirs rounds to bf16


def test_muon_takes_the_parts_of_a_stacked_matrix_apart():
    """Queries, keys and values in one matrix move as they would in three."""
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(3, 8, 8, generator=generator) * torch.tensor([1.0, 10.0, 0.1])[:, None, None]
    moved = []
    for given in (gradients.reshape(1, 24, 8), gradients):
        weights = [nn.Parameter(torch.zeros_like(g)) for g in given]
        for w, g in zip(weights, given, strict=True):
            w.grad = g.clone()
        Muon([{"params": weights, "weight_decay": 0.0, "muon": True}], lr=1.0, betas=(0.9, 0.99), eps=1e-8).step()
        moved.append(torch.cat([w.detach() for w in weights]))
    torch.testing.assert_close(moved[0], moved[1])


def test_muon_has_the_matrices_of_the_blocks_and_adamw_the_rest():
    net = model()
    names = {id(p): name for name, p in net.named_parameters()}
    inner = {names[id(p)] for p in hidden_matrices(net)}
    assert inner and all(".blocks." in name or ".layers." in name for name in inner)
    assert inner == {
        name for name, p in net.named_parameters() if p.ndim == 2 and (".blocks." in name or ".layers." in name)
    }
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    plain = model()
    plain.load_state_dict(net.state_dict())
    for one, name in ((net, "muon"), (plain, "adamw")):
        for p in one.parameters():
            p.grad = torch.full_like(p, 0.1)
        make_optimizer(one, OptimizerConfig(name=name, lr=0.01)).step()
    for (name, p), q in zip(net.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q) == (name not in inner), name
        assert not torch.equal(p, before[name]), name
