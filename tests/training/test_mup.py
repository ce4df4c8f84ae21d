"""muP: what is scaled by which width, and that activations then move alike at every width."""

import pytest
import torch

from mmdit.config import MMDiTConfig, TransfusionConfig
from mmdit.model import MMDiT
from mmdit.text import LearnedText, TextConfig, Tokenizer
from mmdit.text_to_image import CaptionedMMDiT
from mmdit.transfusion import Transfusion
from training.config import ConfigError, OptimizerConfig, load_config
from training.mup import fan_ratios, rate_scales, scale_start
from training.optim import make_optimizer, set_rate


def trunk(heads: int) -> MMDiT:
    torch.manual_seed(0)
    return MMDiT(MMDiTConfig(4, 1, 2, heads, 16, context_dim=16, pooled_dim=16, qk_norm="rms_norm", sample_size=2))


def captioned(heads: int) -> CaptionedMMDiT:
    text = LearnedText(TextConfig(260, 8, 16, 1, 2), Tokenizer.train(["a star"], 260, 8))
    return CaptionedMMDiT(trunk(heads), text)


def test_ratios_follow_the_width():
    ratios = fan_ratios(trunk(8), 32)  # 128 over 32
    fixed = {name: ratio for name, ratio in ratios.items() if ratio != (4, 4)}
    assert fixed == {
        "patch_in.weight": (1, 4),
        "context_in.weight": (1, 4),
        "time_in.fc1.weight": (1, 4),
        "pooled_in.fc1.weight": (1, 4),
        "patch_out.weight": (4, 1),
    }
    assert ratios.keys() == {name for name, p in trunk(8).named_parameters() if p.ndim == 2}
    assert fan_ratios(trunk(2), 32) == {}
    with pytest.raises(ValueError, match="optimizer.base_width is 24, expected a multiple of model.head_dim = 16"):
        fan_ratios(trunk(2), 24)


def test_embeddings_and_heads_of_text():
    config = TransfusionConfig(vocab_size=64, in_channels=4, depth=1, num_heads=8, head_dim=16)
    ratios = fan_ratios(Transfusion(config), 32)
    assert ratios["head.weight"] == (4, 1) and "embed.weight" not in ratios


def test_a_head_starts_smaller_by_the_whole_ratio():
    torch.manual_seed(0)
    shape = dict(vocab_size=64, in_channels=4, depth=1, head_dim=16)
    narrow, wide = (Transfusion(TransfusionConfig(num_heads=heads, **shape)) for heads in (2, 8))
    scale_start(wide, 32)
    assert wide.head.weight.std().item() == pytest.approx(narrow.head.weight.std().item() / 4, rel=0.1)


def test_rates_and_decay_of_each_group():
    net = captioned(8)
    names = {id(p): name for name, p in net.named_parameters()}
    for optimizer, inner in (("adamw", 1 / 4), ("muon", 1 / 2)):
        config = OptimizerConfig(name=optimizer, weight_decay=0.5, base_width=32)
        made = make_optimizer(net, config)
        set_rate(made, 0.1)
        rates = {names[id(p)]: (group["lr"], group["weight_decay"]) for group in made.param_groups
                 for p in group["params"]}  # fmt: skip
        assert rates.keys() == set(names.values())
        assert rates["transformer.blocks.0.img.mlp.fc1.weight"] == pytest.approx((0.1 * inner, 0.5 / inner))
        assert rates["transformer.patch_out.weight"] == pytest.approx((0.025, 2.0))
        for name in ("transformer.patch_in.weight", "conditioner.layers.0.mlp.fc1.weight"):
            assert rates[name] == pytest.approx((0.1, 0.5))
        for name in ("transformer.blocks.0.img.mlp.fc1.bias", "conditioner.embed.weight"):
            assert rates[name] == (0.1, 0.0)


def test_at_its_own_width_nothing_changes():
    plain, scaled = trunk(2), trunk(2)
    scale_start(scaled, 32)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), scaled.parameters(), strict=True))
    assert rate_scales(scaled, 32) == {}


def test_first_weights_have_the_size_of_the_narrow_trunks():
    wide, narrow = trunk(16), trunk(2)
    before = torch.random.get_rng_state()
    scale_start(wide, 32)
    assert torch.equal(torch.random.get_rng_state(), before)
    sizes = {name: (p.square().mean().sqrt() / narrow.get_parameter(name).square().mean().sqrt()).item()
             for name, p in wide.named_parameters() if p.ndim == 2}  # fmt: skip
    for name in ("patch_in.weight", "time_in.fc1.weight"):
        assert sizes[name] == pytest.approx(1, rel=0.08)
    for name in ("time_in.fc2.weight", "blocks.0.img.mlp.fc1.weight"):
        assert sizes[name] == pytest.approx(8**-0.5, rel=0.08)
    assert not wide.patch_out.weight.any()


def moved(heads: int, optimizer: str, base_width: int | None) -> tuple[float, float]:
    """How far the last block's image tokens, and the velocity, moved in some steps."""
    net = trunk(heads)
    if base_width:
        scale_start(net, base_width)
    whole = torch.nn.ModuleDict({"transformer": net})
    how = make_optimizer(whole, OptimizerConfig(name=optimizer, lr=0.005, weight_decay=0.0, base_width=base_width))
    set_rate(how, 0.005)
    draw = torch.Generator().manual_seed(0)
    x, context, pooled, v = (torch.randn(shape, generator=draw) for shape in ((8, 4, 2, 2), (8, 3, 16), (8, 16),
                                                                             (8, 4, 2, 2)))  # fmt: skip
    t, states = torch.linspace(0.1, 0.9, 8), []
    net.blocks[-1].register_forward_hook(lambda block, given, out: states.append(out[0].detach()))
    outs = []
    for _ in range(5):
        outs.append(net(x, t, context, pooled))
        (outs[-1] - v).square().mean().backward()
        how.step()
        how.zero_grad()
    return (states[-1] - states[0]).square().mean().sqrt().item(), outs[-1].square().mean().sqrt().item()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_activations_move_alike_at_every_width(optimizer):
    """The coordinate check: over a factor of eight in width within a tenth; without muP, far apart."""
    scaled = [moved(heads, optimizer, 32) for heads in (2, 4, 16)]
    plain = [moved(heads, optimizer, None) for heads in (2, 4, 16)]
    for of in zip(*scaled, strict=True):
        assert max(of) < 1.1 * min(of)
    assert plain[-1][1] > 2 * plain[0][1]


def test_a_run_takes_it(tmp_path):
    import training

    quiet = ("training.sample_every=0", "training.validate_every=0", "evaluation.prompts_per_question=0")
    words = [*quiet, "model.num_heads=4", "optimizer.base_width=16", "training.num_steps=2"]
    config = load_config("pixels-tiny", [*words, f"training.out={tmp_path / 'run'}"])
    run = training.train(config)
    with pytest.raises(ValueError, match="trained with another optimizer.base_width"):
        training.resume(run, ["optimizer.base_width=32"])
    with pytest.raises(ConfigError, match="optimizer.base_width is 24, expected a multiple of model.head_dim = 16"):
        load_config("pixels-tiny", ["optimizer.base_width=24"])
