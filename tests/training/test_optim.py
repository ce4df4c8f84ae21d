"""The optimisers, their groups and rates, each against its formula."""

import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mmdit.config import MMDiTConfig
from mmdit.model import MMDiT
from mmdit.text import LearnedText, TextConfig, Tokenizer
from mmdit.text_to_image import CaptionedMMDiT
from training.config import ConfigError, OptimizerConfig
from training.optim import (
    hidden_matrices,
    learning_rate,
    make_optimizer,
    parameter_groups,
    set_rate,
    warmup_warning,
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


def test_wsd_holds_the_rate_and_then_falls():
    config = OptimizerConfig(lr=2.0, warmup_steps=4, schedule="wsd", decay_fraction=0.25, final_lr_fraction=0.1)
    rate = learning_rate(config, 40)
    assert [rate(k) for k in (0, 3, 4, 29, 30)] == [0.5, 2.0, 2.0, 2.0, 2.0]
    assert rate(35) == pytest.approx(2.0 * (0.1 + 0.9 * 0.5)) and rate(40) == rate(99) == pytest.approx(0.2)
    longer = learning_rate(config, 80)  # what a longer run did so far is the same
    assert [longer(k) for k in range(30)] == [rate(k) for k in range(30)]
    all_of_it = learning_rate(replace(config, decay_fraction=1.0), 40)
    assert [all_of_it(k) for k in range(41)] == [
        pytest.approx(learning_rate(replace(config, schedule="linear"), 40)(k)) for k in range(41)
    ]


def test_rate_without_warmup_and_with_nothing_but_warmup():
    assert learning_rate(OptimizerConfig(lr=1.0, warmup_steps=0), 10)(0) == 1.0
    short = learning_rate(OptimizerConfig(lr=1.0, warmup_steps=10, schedule="cosine"), 5)
    assert [short(k) for k in range(5)] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    assert warmup_warning(10, 10) is not None and warmup_warning(9, 10) is None


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
        make_optimizer(one, OptimizerConfig(name=name, lr=0.01, betas=(0.5, 0.6), eps=0.1)).step()
    for (name, p), q in zip(net.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q) == (name not in inner), name
        assert not torch.equal(p, before[name]), name


# --- optimisers of other libraries --------------------------------------------------------------------------------


def test_schedule_free_is_its_recursion():
    """y = (1 - b) z + b x;  z -= lr g / (sqrt(v) + eps);  x += c (z - x) with c = lr_max^2 over its sum so far."""
    pytest.importorskip("schedulefree")
    config = OptimizerConfig(name="schedule-free", betas=(0.8, 0.9), eps=1e-3, weight_decay=0.0)
    layer = nn.Linear(3, 2, bias=False)
    optimizer = make_optimizer(layer, config)
    z = x = layer.weight.detach().clone()
    v, total, largest = torch.zeros_like(x), 0.0, 0.0
    for k, rate in enumerate((0.01, 0.02, 0.02, 0.02), 1):
        torch.testing.assert_close(layer.weight.detach(), 0.2 * z + 0.8 * x)
        layer.zero_grad()
        (layer(torch.tensor([1.0, -2.0, 0.5])) ** 3).sum().backward()
        gradient = layer.weight.grad.clone()
        set_rate(optimizer, rate)
        optimizer.step()
        v = 0.9 * v + 0.1 * gradient**2
        z = z - rate * gradient / ((v / (1 - 0.9**k)).sqrt() + 1e-3)
        largest = max(largest, rate)
        total += largest**2
        x = x + largest**2 / total * (z - x)
    torch.testing.assert_close(layer.weight.detach(), 0.2 * z + 0.8 * x)


def test_8_bit_moments_step_almost_as_adamw():
    pytest.importorskip("bitsandbytes")
    moved = {}
    for name in ("adamw", "adamw-8bit"):
        torch.manual_seed(0)
        layer = nn.Linear(128, 64, bias=False)
        optimizer, before = make_optimizer(layer, OptimizerConfig(name=name, lr=0.01)), layer.weight.detach().clone()
        for _ in range(5):
            layer(torch.randn(8, 128)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        moved[name] = layer.weight.detach() - before
        sizes = [value.element_size() for value in optimizer.state[layer.weight].values() if torch.is_tensor(value)]
        assert (1 in sizes) == (name == "adamw-8bit")
    error = (moved["adamw"] - moved["adamw-8bit"]).norm() / moved["adamw"].norm()
    assert 0 < error < 0.1


@pytest.mark.parametrize(("name", "library"), [("schedule-free", "schedulefree"), ("adamw-8bit", "bitsandbytes")])
def test_without_its_library_an_optimiser_says_what_to_install(name, library, monkeypatch):
    for module in (library, f"{library}.optim"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=rf"which needs a library: pip install 'mmdit\[{library}\]'"):
        make_optimizer(nn.Linear(2, 2), OptimizerConfig(name=name))


def test_8_bit_moments_say_why_they_cannot_run(monkeypatch):
    class Broken(torch.optim.SGD):
        def step(self):
            raise RuntimeError("no kernel image")

    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", SimpleNamespace(AdamW8bit=Broken))
    with pytest.raises(ValueError, match=r"no such step on cpu \(RuntimeError: no kernel image\); take adamw"):
        make_optimizer(nn.Linear(2, 2), OptimizerConfig(name="adamw-8bit"))


def test_schedule_free_takes_no_schedule():
    with pytest.raises(ConfigError, match='takes schedule "constant", not "cosine"'):
        OptimizerConfig(name="schedule-free", schedule="cosine")
    with pytest.raises(ConfigError, match="needs a number above 0"):
        OptimizerConfig(name="schedule-free", betas=(0.0, 0.9))
