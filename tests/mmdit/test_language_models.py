"""Language models of transformers held by a trunk: the same logits, and a refusal that names what cannot be held."""

import json

import pytest
import torch

from mmdit.config import MMDiTConfig, TransfusionConfig
from mmdit.files import save
from mmdit.init_from import init_from, needs
from mmdit.model import MMDiT
from mmdit.transfusion import Transfusion
from mmdit.weights_io import read_weights, save_weights

SHAPE = dict(vocab_size=40, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96)
KINDS = {
    "gpt_neox": dict(
        use_parallel_residual=False,
        hidden_act="gelu_new",
        layer_norm_eps=1e-6,
        rope_parameters={"rope_theta": 10000.0, "rope_type": "default", "partial_rotary_factor": 0.5},
    ),
    "llama": dict(
        num_key_value_heads=2, rms_norm_eps=1e-5, rope_parameters={"rope_theta": 5e5, "rope_type": "default"}
    ),
    "llama 3.1": dict(
        rope_parameters=dict(
            rope_theta=500.0,
            rope_type="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=64,
        )
    ),
    "mistral": dict(num_key_value_heads=1, sliding_window=None),
    "qwen2": dict(num_key_value_heads=2),
}


def language_model(kind, folder, **changes):
    """A random model of transformers in which every tensor matters, saved."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(kind.split()[0], **(SHAPE | KINDS[kind] | changes))
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    model.save_pretrained(folder)
    return model


def trunk_of(folder, **changes):
    fields = needs([folder]) | dict(weights="separate", time="image", in_channels=3) | changes
    return Transfusion(TransfusionConfig(**fields))


def edit(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@torch.no_grad()
@pytest.mark.parametrize("weights", ["separate", "shared"])
def test_its_logits_are_those_of_transformers(kind, weights, tmp_path):
    """Of two documents of different lengths, packed."""
    theirs = language_model(kind, tmp_path)
    trunk = trunk_of(tmp_path, weights=weights, time="added")
    init_from(trunk, [tmp_path])
    generator = torch.Generator().manual_seed(1)
    documents = [[torch.randint(4, 40, (n,), generator=generator)] for n in (50, 7)]
    for [ids], ours in zip(documents, trunk(trunk.pack(documents)).per_document(), strict=True):
        expected = theirs(ids[None]).logits[0]
        assert expected.std() > 0.3
        torch.testing.assert_close(ours.logits, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_tied_tables_and_weights_in_several_files(kind, tmp_path):
    theirs = language_model(kind, tmp_path, tie_word_embeddings=True)
    state = read_weights(tmp_path / "model.safetensors")
    names = sorted(state)
    files = {name: f"model-{1 + (i > 9)}.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_weights({name: state[name] for name in names if files[name] == file}, tmp_path / file)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    trunk = trunk_of(tmp_path)
    init_from(trunk, [tmp_path])
    ids = torch.arange(4, 12)
    torch.testing.assert_close(trunk(trunk.pack([[ids]])).logits, theirs(ids[None]).logits[0], rtol=1e-5, atol=1e-5)
    save_weights({name: state[name] for name in names[9:]}, tmp_path / "model-2.safetensors")
    with pytest.raises(ValueError, match="is in model-1.safetensors and in model-2.safetensors"):
        init_from(trunk, [tmp_path])
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model-2"):
        init_from(trunk, [tmp_path])


@torch.no_grad()
@pytest.mark.parametrize("order", [1, -1])
def test_beside_an_mmdit_the_text_is_the_language_models_alone(kind, order, tmp_path):
    """In whichever order they are named; the patches' side is the MMDiT's."""
    theirs = language_model(kind, tmp_path / "text")
    fields = needs([tmp_path / "text"])
    same = {name: fields[name] for name in ("depth", "num_heads", "head_dim", "mlp_ratio") if name in fields}
    images = MMDiT(MMDiTConfig(in_channels=3, context_dim=8, pooled_dim=8, **same))
    save(images, tmp_path / "images")
    trunk = trunk_of(tmp_path / "text", qk_norm=None)
    started = init_from(trunk, [tmp_path / "text", tmp_path / "images"][::order])
    assert started.fresh == []
    ids, state = torch.arange(4, 30), trunk.state_dict()
    torch.testing.assert_close(trunk(trunk.pack([[ids]])).logits, theirs(ids[None]).logits[0], rtol=1e-5, atol=2e-5)
    assert all(torch.equal(state[name], x) for name, x in images.state_dict().items() if ".img." in name)


def test_patches_begin_as_the_text_does_where_their_stream_is_of_the_same_form(kind, tmp_path):
    """LMFusion's start; a stream that is modulated by the time is of another form, and starts fresh."""
    language_model(kind, tmp_path)
    trunk = trunk_of(tmp_path, time="added")
    started = init_from(trunk, [tmp_path])
    state = trunk.state_dict()
    names = [name for name in state if ".txt." in name]
    assert len(names) > 10 and all(torch.equal(state[name], state[name.replace("txt", "img")]) for name in names)
    assert "copied from the text's stream: blocks.*.img" in started.lines
    assert not [name for name in started.fresh if "blocks" in name]
    modulated = init_from(trunk_of(tmp_path), [tmp_path])
    assert {name.split(".")[2] for name in modulated.fresh if "blocks" in name} == {"img"}


@pytest.mark.parametrize(
    ("kind_", "changes", "what"),
    [
        ("gpt_neox", dict(use_parallel_residual=True), "use_parallel_residual is True, supported: False"),
        ("gpt_neox", dict(hidden_act="gelu"), "hidden_act is 'gelu', supported: 'gelu_new'"),
        ("gpt_neox", dict(layer_norm_eps=1e-5), "layer_norm_eps is 1e-05, supported: 1e-06"),
        ("gpt_neox", dict(rope_parameters=None), "rotary_pct is 0.25, supported: 0.5"),
        ("gpt_neox", dict(rope_parameters=None, rotary_pct=0.5, rotary_emb_base=500), "rope_theta is 500"),
        ("gpt_neox", dict(model_type="gpt2"), "holds a 'gpt2'; language models .* gpt_neox"),
        ("llama", dict(attention_bias=True, mlp_bias=True), "attention_bias is True.*; mlp_bias is True"),
        ("llama", dict(rope_parameters=None, rope_scaling={"type": "linear", "factor": 2.0}), "rope_type is 'linear'"),
        ("llama", dict(head_dim=32), "head_dim is 32, supported: hidden_size / num_attention_heads = 16"),
        ("llama", dict(hidden_act="gelu"), "hidden_act is 'gelu', supported: 'silu'"),
        (
            "llama",
            dict(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}),
            "'yarn', supported: 'default' or 'll",
        ),
        ("llama", dict(model_type="qwen3"), "holds a 'qwen3'"),
        ("mistral", dict(sliding_window=8), "sliding_window is 8, supported: None"),
        ("qwen2", dict(use_sliding_window=True), "use_sliding_window is True"),
    ],
)
def test_what_cannot_be_held_is_refused_by_name(kind_, changes, what, tmp_path):
    language_model(kind_, tmp_path)
    trunk = trunk_of(tmp_path)
    before = {name: x.clone() for name, x in trunk.state_dict().items()}
    edit(tmp_path, **changes)
    for ask in (lambda: needs([tmp_path]), lambda: init_from(trunk, [tmp_path])):
        with pytest.raises(ValueError, match=what):
            ask()
    assert all(torch.equal(x, before[name]) for name, x in trunk.state_dict().items())


@pytest.mark.parametrize(
    "changes", [dict(attention="full"), dict(time="all"), dict(time="image", weights="shared", llama=None)]
)
def test_a_trunk_whose_text_sees_more_than_the_language_models_is_refused(changes, tmp_path):
    language_model("gpt_neox", tmp_path)
    with pytest.raises(ValueError, match="is a language model: its text sees nothing that follows"):
        init_from(trunk_of(tmp_path, **changes), [tmp_path])


def test_the_same_config_in_the_words_of_older_files(tmp_path):
    language_model("gpt_neox", tmp_path)
    found = needs([tmp_path])
    edit(tmp_path, rope_parameters=None, rotary_pct=0.5, rotary_emb_base=10000)
    assert needs([tmp_path]) == found


@pytest.mark.parametrize("change", ["cut", "more"])
def test_tensors_that_are_missing_or_unknown_are_named(change, kind, tmp_path):
    language_model(kind, tmp_path)
    trunk = trunk_of(tmp_path)
    state = read_weights(tmp_path / "model.safetensors")
    lost = next(name for name in state if "mlp" in name)
    if change == "cut":
        del state[lost]
    else:
        state["model.adapter.weight"] = torch.zeros(2)
    save_weights(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=lost.partition("mlp")[2] if change == "cut" else "model.adapter.weight"):
        init_from(trunk, [tmp_path])
