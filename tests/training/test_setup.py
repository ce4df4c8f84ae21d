"""A run that starts from other weights: frozen text stays what it was, all else learns, and resume needs no path."""

import shutil

import pytest
import torch

import mmdit
import training
from mmdit.init_from import text_parameters
from mmdit.weights_io import read_weights
from training.checkpoint import list_checkpoints
from training.config import ConfigError, load_config
from training.run import RunFolder
from training.trainer import Trainer

LANGUAGE = dict(vocab_size=390, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    """A folder with a small language model, and the model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**LANGUAGE, intermediate_size=80, tie_word_embeddings=True)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    folder = tmp_path_factory.mktemp("language")
    model.save_pretrained(folder)
    return folder, model


def config_for(out, *overrides):
    quiet = ("training.sample_every=0", "training.validate_every=0", "evaluation.prompts_per_question=0")
    mixed = (
        "transfusion.enabled=true",
        "transfusion.weights=separate",
        "transfusion.time=image",
        "model.positions=rope",
    )
    size = ("text.vocab_size=400", "training.num_steps=4", "training.precision=fp32")
    return load_config("pixels-tiny", [*quiet, *mixed, *size, f"training.out={out}", *overrides])


def starting(folder, *overrides):
    return (f"transfusion.init={folder}", *overrides)


def started(config):
    """The trunk of a run before its first step."""
    return Trainer(config, RunFolder.create(config.run_folder, config)).model.transformer


def tensors(run, name="model"):
    return read_weights(list_checkpoints(run)[-1] / f"{name}.safetensors")


@pytest.fixture(scope="module")
def frozen(language, tmp_path_factory):
    """A run over frozen text; and the model with the weights that it started from."""
    run = tmp_path_factory.mktemp("frozen") / "run"
    training.train(config_for(run, *starting(language[0], "transfusion.freeze_text=true")))
    return run


def test_frozen_text_is_left_bit_for_bit_and_all_else_moves(frozen, language, tmp_path):
    free = training.train(config_for(tmp_path / "free", *starting(language[0])))
    start = started(config_for(tmp_path / "start", *starting(language[0])))
    names = {f"transformer.{name}" for name in text_parameters(mmdit.load(frozen))}
    before = {f"transformer.{name}": x for name, x in start.state_dict().items()}
    after, average, other = tensors(frozen), tensors(frozen, "ema"), tensors(free)
    assert {name for name in after if torch.equal(after[name], before[name])} == names
    assert {name for name in average if torch.equal(average[name], before[name])} == names
    assert not [name for name in other if torch.equal(other[name], before[name])]
    state = {name.rpartition("/")[0] for name in tensors(frozen, "optimizer")}
    assert state == before.keys() - names


@torch.no_grad()
def test_its_text_is_still_the_language_models(frozen, language):
    trunk, ids = mmdit.load(frozen), torch.arange(4, 60)
    logits = trunk(trunk.pack([[ids]])).logits
    torch.testing.assert_close(logits[:, :390], language[1](ids[None]).logits[0], rtol=1e-5, atol=1e-5)
    assert (logits[:, 390:] < logits.logsumexp(-1, keepdim=True) - 5).all()  # new tokens: at the mean, log 390 below


def test_what_was_taken_and_what_starts_fresh_is_said(frozen, language):
    log = (frozen / "log.txt").read_text()
    assert f"weights from {language[0]} (llama): blocks.*.txt, embed, head, norm_out" in log
    assert "weights starts fresh: blocks.*.img.attn.k_norm" in log


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resumed_it_is_the_uninterrupted_run_and_needs_the_path_no_more(optimizer, language, tmp_path):
    folder = shutil.copytree(language[0], tmp_path / "language")
    settings = starting(folder, "transfusion.freeze_text=true", f"optimizer.name={optimizer}")
    whole = training.train(config_for(tmp_path / "whole", *settings))
    part = training.train(config_for(tmp_path / "part", *settings, "training.num_steps=2"))
    shutil.rmtree(folder)
    training.resume(part, ["training.num_steps=4"])
    for name in ("model", "ema", "optimizer"):
        a, b = tensors(whole, name), tensors(part, name)
        assert a.keys() == b.keys() and not [key for key in a if not torch.equal(a[key], b[key])]


def test_a_language_model_and_an_image_model(language, tmp_path):
    """The text of one, the image side of the other."""
    images = load_config(
        "pixels-tiny",
        ["training.num_steps=1", "training.sample_every=0", "training.validate_every=0",
         "evaluation.prompts_per_question=0", f"training.out={tmp_path / 'images'}"],
    )  # fmt: skip
    training.train(images)
    both = f"transfusion.init=['{language[0]}', '{tmp_path / 'images'}']"
    trunk = started(config_for(tmp_path / "both", both)).state_dict()
    image_model = mmdit.load(tmp_path / "images").state_dict()
    taken = [name for name in image_model if ".img." in name or name.startswith(("patch", "time", "modulation"))]
    assert len(taken) == 34 and all(torch.equal(trunk[name], image_model[name]) for name in taken)
    assert torch.equal(trunk["head.weight"][:390], language[1].get_output_embeddings().weight)


def test_a_run_goes_on_from_another(frozen, tmp_path):
    again = started(config_for(tmp_path / "again", *starting(frozen))).state_dict()
    assert all(torch.equal(again[name], x) for name, x in mmdit.load(frozen).state_dict().items())


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        (
            ["model.depth=1", "model.num_heads=4", "text.vocab_size=300"],
            "set model.depth=2 model.num_heads=2 text.vocab_size=390$",
        ),
        (["transfusion.weights=shared"], 'weights = "shared" with time = "image"'),
        (["transfusion.init=nowhere"], "nowhere holds no model"),
    ],
)
def test_what_does_not_fit_is_refused_and_leaves_no_run(changes, what, language, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=what):
        training.train(config_for(tmp_path / "run", *starting(language[0]), *changes))
    assert not (tmp_path / "run").exists()


def test_text_is_frozen_only_where_it_is_given_and_apart(language, tmp_path):
    with pytest.raises(ConfigError, match="needs transfusion.enabled = true"):
        config_for(tmp_path, *starting(language[0]), "transfusion.enabled=false")
    with pytest.raises(ConfigError, match="freeze_text needs .* a language model, which is none"):
        config_for(tmp_path, "transfusion.freeze_text=true")
    with pytest.raises(ConfigError, match='"separate", which is "shared"'):
        config_for(tmp_path, *starting(language[0]), "transfusion.freeze_text=true", "transfusion.weights=shared")
    images = load_config("pixels-tiny", ["training.num_steps=1", f"training.out={tmp_path / 'images'}"])
    training.train(images)
    settings = ("transfusion.freeze_text=true", f"transfusion.init={tmp_path / 'images'}")
    with pytest.raises(ConfigError, match="did not give, blocks.0.txt.*: name a language model"):
        training.train(config_for(tmp_path / "run", *settings))
