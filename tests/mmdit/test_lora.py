"""LoRA: the same function as diffusers' adapters both ways, merged as beside, and nothing trained but A and B."""

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("peft")

import mmdit
from mmdit.config import MMDiTConfig
from mmdit.formats import config_to_diffusers
from mmdit.layouts import DIFFUSERS
from mmdit.lora import add_lora, load_lora, lora_pairs, merge_lora, plain_state, save_lora
from mmdit.model import MMDiT
from mmdit.weights_io import save_weights

SHAPE = dict(in_channels=4, num_heads=2, head_dim=8, context_dim=8, pooled_dim=8, sample_size=8, pos_embed_max_size=8)
CONFIG = MMDiTConfig(depth=2, qk_norm="rms_norm", dual_attention_layers=(0,), **SHAPE)


def alive(seed=0):
    generator = torch.Generator().manual_seed(seed)
    model = MMDiT(CONFIG)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    return model


def inputs():
    generator = torch.Generator().manual_seed(9)
    shapes = (2, 4, 8, 8), (2, 5, 8), (2, 8)
    x, context, pooled = (torch.randn(shape, generator=generator) for shape in shapes)
    return x, torch.tensor([0.2, 0.7]), context, pooled


def theirs(model):
    from diffusers import SD3Transformer2DModel

    other = SD3Transformer2DModel(**config_to_diffusers(CONFIG))
    other.load_state_dict(DIFFUSERS.from_ours(plain_state(model), CONFIG))
    return other.eval()


def call(other):
    x, t, context, pooled = inputs()
    return other(x, context, pooled, t * 1000, return_dict=False)[0]


def shaken(model):
    """Adapters that say something: B starts at zero."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))))
    return model


@pytest.mark.parametrize("targets", ["attention", "all"])
@torch.no_grad()
def test_it_starts_as_nothing_and_merges_to_the_same(targets):
    model = alive()
    before = model(*inputs())
    add_lora(model, 3, 6.0, targets)
    torch.testing.assert_close(model(*inputs()), before)
    beside = shaken(model)(*inputs())
    assert (beside - before).abs().max() > 1e-2
    state = plain_state(model)
    merge_lora(model)
    assert model.state_dict().keys() == MMDiT(CONFIG).state_dict().keys() == state.keys()
    torch.testing.assert_close(model(*inputs()), beside, rtol=1e-4, atol=1e-5)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(state[name], tensor)


@torch.no_grad()
def test_a_merged_model_takes_further_adapters_without_a_warning(recwarn):
    model = alive()
    for _ in range(2):
        add_lora(model, 2)
        merge_lora(model)
    assert not [str(warning.message) for warning in recwarn if "peft" in str(warning.message)]
    assert model.__dict__.keys() == alive().__dict__.keys()


@torch.no_grad()
def test_diffusers_reads_what_we_write_and_says_the_same(tmp_path):
    model = alive()
    other = theirs(model)
    add_lora(model, 3, 6.0, "all")
    shaken(model)
    save_lora(model, tmp_path / "lora.safetensors")
    other.load_lora_adapter(str(tmp_path), weight_name="lora.safetensors")
    torch.testing.assert_close(call(other), model(*inputs()), rtol=1e-4, atol=1e-5)
    again = alive()
    load_lora(again, tmp_path / "lora.safetensors")
    torch.testing.assert_close(again(*inputs()), model(*inputs()), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("layout", "name"), [("mmdit", "x"), ("diffusers", "x"), ("sd3", "x.safetensors")])
def test_a_model_is_saved_with_its_adapters(tmp_path, layout, name):
    model = alive()
    add_lora(model, 3, 6.0, "all")
    shaken(model)
    mmdit.save(model, tmp_path / name, layout)
    again = mmdit.load(tmp_path / name)
    torch.testing.assert_close(again(*inputs()), model(*inputs()), rtol=1e-4, atol=1e-5)
    assert lora_pairs(model)  # they stay as they were


@torch.no_grad()
@pytest.mark.parametrize("layers", [["to_q", "to_k", "to_v", "to_out.0"], ["to_q", "add_k_proj", "ff.net.2"]])
def test_we_read_what_diffusers_writes_and_say_the_same(tmp_path, layers):
    """Three adapters, or one of three, beside what is one matrix here."""
    from peft import LoraConfig

    model = alive()
    other = theirs(model)
    other.add_adapter(LoraConfig(r=2, lora_alpha=5, target_modules=layers))
    shaken(other)
    other.save_lora_adapter(str(tmp_path))
    load_lora(model, tmp_path / "pytorch_lora_weights.safetensors")
    torch.testing.assert_close(model(*inputs()), call(other), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layer", ["norm1.linear", "norm_out.linear"])
def test_adapters_of_modulations_are_refused(tmp_path, layer):
    """They give a tuple here, the last ones in another order than diffusers'."""
    from peft import LoraConfig

    model = alive()
    other = theirs(model)
    other.add_adapter(LoraConfig(r=2, target_modules=[layer]))
    other.save_lora_adapter(str(tmp_path))
    with pytest.raises(ValueError, match=rf"adapts .*{layer}, a modulation"):
        load_lora(model, tmp_path / "pytorch_lora_weights.safetensors")
    assert not lora_pairs(model)


@torch.no_grad()
def test_alphas_beside_the_matrices_scale_them(tmp_path):
    """alpha / rank times B A, as kohya's scripts and diffusers' older files mean it."""
    layer = "transformer.transformer_blocks.0.attn.to_out.0"
    a, b = torch.randn(4, 16), torch.randn(16, 4)
    state = {f"{layer}.lora_A.weight": a, f"{layer}.lora_B.weight": b, f"{layer}.alpha": torch.tensor(2.0)}
    save_weights(state, tmp_path / "lora.safetensors")
    model, before = alive(), alive().blocks[0].img.attn.out.weight
    load_lora(model, tmp_path / "lora.safetensors")
    merge_lora(model)
    torch.testing.assert_close(model.blocks[0].img.attn.out.weight, before + 0.5 * b @ a)


def test_only_adapters_learn():
    model = alive()
    add_lora(model, 2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        F.mse_loss(model(*inputs()), torch.zeros(2, 4, 8, 8)).backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if "lora_" in name}
    assert lora_pairs(model).keys() == {
        f"blocks.{i}.{stream}.{layer}"
        for i, stream, layer in [
            *((i, "img", f"attn.{x}") for i in (0, 1) for x in ("qkv", "out")),
            *((0, "img", f"attn2.{x}") for x in ("qkv", "out")),
            *((0, "txt", f"attn.{x}") for x in ("qkv", "out")),
            (1, "txt", "attn.qkv"),
        ]
    }


def test_what_does_not_fit_is_refused(tmp_path):
    path = tmp_path / "lora.safetensors"
    for state, what in (
        ({"transformer.x.weight": torch.zeros(2)}, "no LoRA file .* x.weight"),
        ({"transformer.x.lora_A.weight": torch.zeros(2, 2)}, "no lora_B of x"),
        ({f"transformer.x.lora_{k}.weight": torch.zeros(2, 2) for k in "AB"}, "which has no x"),
        (
            {f"transformer.transformer_blocks.0.attn.to_q.lora_{k}.weight": torch.zeros(2, 2) for k in "AB"},
            r"blocks.0.img.attn.qkv is \(48, 16\), there \(2, 2\) \(2, 2\)",
        ),
    ):
        save_weights(state, path)
        with pytest.raises(ValueError, match=what):
            load_lora(alive(), path)
    with pytest.raises(ValueError, match="rank is 0"):
        add_lora(alive(), 0)
    with pytest.raises(ValueError, match="no adapters"):
        save_lora(alive(), path)
    model = alive()
    add_lora(model, 1)
    with pytest.raises(ValueError, match="adapters already"):
        add_lora(model, 1)
    save_lora(model, path)
    with pytest.raises(ValueError, match="adapters already: merge_lora first"):
        load_lora(model, path)


@pytest.mark.parametrize(
    ("rank", "alpha", "message"),
    [(1.5, None, "rank is 1.5"), (True, None, "rank is True"), (2, 0, "alpha is 0"), (2, float("nan"), "alpha is nan")],
)
def test_ranks_and_alphas_that_are_none_are_refused(rank, alpha, message):
    with pytest.raises(ValueError, match=message):
        add_lora(alive(), rank, alpha)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("[1]", "is no table"),
        ("{", "is no table"),
        ('{"r": 0, "lora_alpha": 1}', "r = 0 and lora_alpha = 1, expected numbers above 0"),
        ('{"r": 4, "lora_alpha": null}', "lora_alpha = None, expected numbers"),
        ('{"r": 4, "lora_alpha": 4, "use_dora": true}', "DoRA or rank-stabilised scales, which are not read"),
        ('{"r": 4, "lora_alpha": 4, "rank_pattern": {"to_q": 2}}', "ranks or scales by layer"),
    ],
)
def test_a_file_that_lies_of_its_scale_is_refused(tmp_path, said, message):
    layer = "transformer.transformer_blocks.0.attn.to_q"
    state = {f"{layer}.lora_A.weight": torch.ones(2, 16), f"{layer}.lora_B.weight": torch.ones(16, 2)}
    save_weights(state, tmp_path / "lora.safetensors", {"lora_adapter_metadata": said})
    with pytest.raises(ValueError, match=message):
        load_lora(alive(), tmp_path / "lora.safetensors")
    save_weights({"weight": torch.ones(2)}, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match="no LoRA file in diffusers' layout: 1 tensors are no LoRA: weight"):
        load_lora(alive(), tmp_path / "lora.safetensors")
    save_weights(state | {"weight": torch.ones(2)}, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match="1 tensors are no LoRA: weight"):
        load_lora(alive(), tmp_path / "lora.safetensors")
    save_weights(state | {f"{layer}.lora_A.weight": torch.ones(0, 16)}, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match="has no matrices of transformer_blocks.0.attn.to_q"):
        load_lora(alive(), tmp_path / "lora.safetensors")
