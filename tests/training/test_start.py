"""A run that starts from other weights: frozen text stays what it was, all else learns, and resume needs no path."""

import shutil

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import T5EncoderModel

import mmdit
import training
from mmdit.config import LlamaConfig, MMDiTConfig, TransfusionConfig
from mmdit.init_from import text_parameters
from mmdit.lora import load_lora, plain_state
from mmdit.model import MMDiT
from mmdit.text import Tokenizer
from mmdit.transfusion import Transfusion
from mmdit.weights_io import read_weights
from tests.mmdit.tiny_sd3 import randomised
from training.checkpoint import list_checkpoints
from training.config import ConfigError, load_config
from training.mup import scale_start
from training.parallel import ALONE
from training.run import RunFolder
from training.sharding import local
from training.start import fill_weights, shape_alone
from training.trainer import Trainer

LANGUAGE = dict(vocab_size=390, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)


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
    return (f"init={folder}", *overrides)


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
    assert average.keys() == after.keys() - names  # its frozen weights are the model's
    assert not [name for name in average if torch.equal(average[name], before[name])]
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


def test_a_language_models_tokenizer_comes_with_its_weights(frozen, language, material, tmp_path):
    assert f"warning: {language[0]} came without a tokenizer.json" in (frozen / "log.txt").read_text()
    mmdit.save(mmdit.load(frozen), tmp_path / "weights", layout="mmdit")
    started(config_for(tmp_path / "bare", *starting(tmp_path / "weights")))
    assert f"warning: {tmp_path / 'weights'} came without" in (tmp_path / "bare" / "log.txt").read_text()
    folder = shutil.copytree(language[0], tmp_path / "language")
    shutil.copytree(material["tokenizer"], folder, ignore=shutil.ignore_patterns("config.json"), dirs_exist_ok=True)
    config = config_for(tmp_path / "run", f"init=['{frozen}', '{folder}']")
    words = Trainer(config, RunFolder.create(config.run_folder, config)).model.conditioner.tokenizer
    own = Tokenizer.adopt(material["tokenizer"], 64, images=True)
    assert words.encode(["a red circle"]) == own.encode(["a red circle"])
    assert (words.special, words.names) == (own.special, own.names)
    assert f"tokenizer from {folder}" in (tmp_path / "run" / "log.txt").read_text()


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
    both = f"init=['{language[0]}', '{tmp_path / 'images'}']"
    trunk = started(config_for(tmp_path / "both", both)).state_dict()
    image_model = mmdit.load(tmp_path / "images").state_dict()
    taken = [name for name in image_model if ".img." in name or name.startswith(("patch", "time", "modulation"))]
    assert len(taken) == 34 and all(torch.equal(trunk[name], image_model[name]) for name in taken)
    assert torch.equal(trunk["head.weight"][:390], language[1].get_output_embeddings().weight)


def test_a_run_goes_on_from_another(frozen, tmp_path):
    """With its tokenizer, whatever the new captions are."""
    config = config_for(tmp_path / "words", *starting(frozen), "seed=7")
    words = Trainer(config, RunFolder.create(config.run_folder, config)).model.conditioner.tokenizer
    assert words.backend.to_str() == mmdit.TextToImage.load(frozen, "cpu").model.conditioner.tokenizer.backend.to_str()
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
        (["init=nowhere"], "nowhere holds no model"),
    ],
)
def test_what_does_not_fit_is_refused_and_leaves_no_run(changes, what, language, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=what):
        training.train(config_for(tmp_path / "run", *starting(language[0]), *changes))
    assert not (tmp_path / "run").exists()


def test_text_is_frozen_only_where_it_is_given_and_apart(language, tmp_path):
    with pytest.raises(FileNotFoundError, match="MMDiT|no model|holds"):
        training.train(images_config(tmp_path / "run", *starting(tmp_path)))
    with pytest.raises(ConfigError, match="freeze_text needs a language model in init"):
        config_for(tmp_path, "transfusion.freeze_text=true")
    with pytest.raises(ConfigError, match='"separate", which is "shared"'):
        config_for(tmp_path, *starting(language[0]), "transfusion.freeze_text=true", "transfusion.weights=shared")
    images = load_config("pixels-tiny", ["training.num_steps=1", f"training.out={tmp_path / 'images'}"])
    training.train(images)
    settings = ("transfusion.freeze_text=true", f"init={tmp_path / 'images'}")
    with pytest.raises(ConfigError, match="did not give what is to be frozen, blocks.0.txt.*: name a language model"):
        training.train(config_for(tmp_path / "run", *settings))


# --- text-to-image models -----------------------------------------------------------------------------------------


def images_config(out, *overrides):
    quiet = ("training.sample_every=0", "training.validate_every=0", "evaluation.prompts_per_question=0")
    return load_config("pixels-tiny", [*quiet, "training.precision=fp32", f"training.out={out}", *overrides])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return training.train(images_config(tmp_path_factory.mktemp("base") / "run", "training.num_steps=3"))


def test_an_image_model_goes_on_from_another_with_its_words(base, tmp_path, capsys):
    """Trunk, text encoder and tokenizer, whatever the new captions are; and its table of positions, which is said."""
    how = ("data.num_samples=40", "seed=5", "model.pos_embed_max_size=16")
    config = images_config(tmp_path / "on", f"init={base}", *how)
    trainer = Trainer(config, RunFolder.create(config.run_folder, config))
    said = capsys.readouterr().out
    assert "warning: model.pos_embed_max_size = 16 takes no effect with init" in said
    assert f"tensors, none new\ntext encoder and tokenizer from {base}\n" in said
    old = mmdit.TextToImage.load(base, "cpu").model
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, old.state_dict()[name]), name
    words = ["a red circle on a white background"]
    assert torch.equal(trainer.model.conditioner.tokenize(words).ids, old.conditioner.tokenize(words).ids)


def test_layers_that_read_the_text_start_anew_with_another_encoder_of_its_width(tmp_path, parts):
    """Of the same encoder they are kept."""
    shutil.copytree(parts / "t5", tmp_path / "other")
    other = T5EncoderModel.from_pretrained(tmp_path / "other")
    randomised(other).save_pretrained(tmp_path / "other")
    base = training.train(images_config(tmp_path / "base", f"text.encoder={parts / 't5'}", "training.num_steps=1"))
    old = mmdit.load(base).state_dict()
    for encoder, new in ((parts / "t5", set()), (tmp_path / "other", {"context_in", "pooled_in"})):
        config = images_config(tmp_path / f"on {len(new)}", f"init={base}", f"text.encoder={encoder}")
        state = Trainer(config, RunFolder.create(config.run_folder, config)).model.transformer.state_dict()
        assert {name.partition(".")[0] for name, x in state.items() if not torch.equal(x, old[name])} == new
    with pytest.raises(ConfigError, match="reads another text encoder than .*other, and adapters alone would leave"):
        training.train(
            images_config(tmp_path / "lora", f"init={base}", f"text.encoder={tmp_path / 'other'}", "lora.rank=2")
        )
    words = images_config(tmp_path / "words", f"init={base}")
    state = Trainer(words, RunFolder.create(words.run_folder, words)).model.transformer.state_dict()
    assert not torch.equal(state["context_in.weight"], old["context_in.weight"])


def test_qk_norm_can_be_added(tmp_path):
    plain = training.train(images_config(tmp_path / "plain", "model.qk_norm=none", "training.num_steps=1"))
    trunk = Trainer(
        config := images_config(tmp_path / "on", f"init={plain}"), RunFolder.create(config.run_folder, config)
    )
    state, old = trunk.model.transformer.state_dict(), mmdit.load(plain).state_dict()
    new = state.keys() - old.keys()
    assert new and all(name.endswith("_norm.weight") and (state[name] == 1).all() for name in new)
    assert all(torch.equal(state[name], x) for name, x in old.items())


def adapters(base, out, *overrides):
    return images_config(out, f"init={base}", "lora.rank=2", "training.ema_decay=0", *overrides)


def test_adapters_alone_are_trained_saved_and_resumed(base, tmp_path):
    out = training.train(adapters(base, tmp_path / "lora", "training.num_steps=4"))
    learnt = sum(x.numel() for x in read_weights(out / "pipeline" / "transformer" / "lora.safetensors").values())
    assert f" M parameters ({learnt / 1e6:.2f} M of them trained), " in (out / "log.txt").read_text()
    part = training.train(adapters(base, tmp_path / "part", "training.num_steps=2"))
    before, after = mmdit.load(base), mmdit.load(out)  # merged
    changed = {n for n, x in after.state_dict().items() if not torch.equal(x, before.state_dict()[n])}
    assert changed and all(name.endswith((".attn.qkv.weight", ".attn.out.weight")) for name in changed)
    old, new = (mmdit.TextToImage.load(run, "cpu").model.conditioner.state_dict() for run in (base, out))
    assert all(torch.equal(new[name], x) for name, x in old.items())
    load_lora(before, out / "pipeline" / "transformer" / "lora.safetensors")
    for name, tensor in plain_state(before).items():
        torch.testing.assert_close(tensor, after.state_dict()[name], rtol=1e-5, atol=1e-6)
    training.resume(part, ["training.num_steps=4"])
    whole = read_weights(out / "pipeline" / "transformer" / "lora.safetensors")
    again = read_weights(part / "pipeline" / "transformer" / "lora.safetensors")
    assert whole.keys() == again.keys() and all(torch.equal(again[name], x) for name, x in whole.items())


def test_a_checkpoint_with_adapters_is_sampled_as_the_run(base, tmp_path):
    from mmdit_cli.sample import load_checkpoint_into

    out = training.train(adapters(base, tmp_path / "lora", "training.num_steps=2"))
    pipe, last = mmdit.TextToImage.load(out, "cpu"), mmdit.load(out).state_dict()
    pipe.model.transformer.load_state_dict(mmdit.load(base).state_dict())
    load_checkpoint_into(pipe, out, "2")
    for name, tensor in pipe.model.transformer.state_dict().items():
        assert torch.equal(tensor, last[name]), name


@pytest.mark.parametrize("setting", ["lora.rank=4", "lora.alpha=8", "lora.targets=all"])
def test_a_setting_of_adapters_changes_what_it_should(setting, base, tmp_path):
    def file(name, *settings):
        run = training.train(adapters(base, tmp_path / name, "training.num_steps=1", *settings))
        return read_weights(run / "pipeline" / "transformer" / "lora.safetensors")

    one, other = file("one"), file("other", setting)
    assert one.keys() != other.keys() or any(not torch.equal(x, other[name]) for name, x in one.items())


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        (["model.depth=1"], "set model.depth=2$"),
        (["model.qk_norm=none"], "set model.qk_norm=rms_norm$"),
        (
            ["autoencoder=shapes", "model.patch_size=8", "data.image_size=64"],
            "latents of 3 channels, the autoencoder 16",
        ),
    ],
)
def test_an_image_model_that_does_not_fit_is_refused(changes, what, base, tmp_path):
    with pytest.raises(ConfigError, match=what):
        training.train(images_config(tmp_path / "run", f"init={base}", *changes))
    assert not (tmp_path / "run").exists()


def test_adapters_want_weights_to_adapt(tmp_path):
    with pytest.raises(ConfigError, match="lora.rank needs an MMDiT's weights"):
        images_config(tmp_path, "lora.rank=2")
    with pytest.raises(ConfigError, match="an MMDiT starts from one"):
        images_config(tmp_path, "init=['a', 'b']")


SHAPE = dict(depth=2, num_heads=2, head_dim=16, sample_size=4)
IMAGE = dict(context_dim=16, pooled_dim=16, qk_norm="rms_norm", **SHAPE)
WORDS = dict(vocab_size=64, in_channels=4, **SHAPE)
TRUNKS = {
    "image": lambda: MMDiT(MMDiTConfig(4, dual_attention_layers=(0,), **IMAGE)),
    "rotary": lambda: MMDiT(MMDiTConfig(4, positions="rope", **IMAGE)),
    "mixed": lambda: Transfusion(TransfusionConfig(**WORDS)),
    "plain text": lambda: Transfusion(TransfusionConfig(weights="separate", time="image", codec="unet", **WORDS)),
    "added time": lambda: Transfusion(TransfusionConfig(time="added", positions="rope", **WORDS)),
    "llama": lambda: Transfusion(
        TransfusionConfig(weights="separate", time="image", positions="rope", llama=LlamaConfig(40, 1), **WORDS)
    ),
}


@pytest.mark.parametrize("base_width", [None, 16])
@pytest.mark.parametrize("kind", TRUNKS)
def test_a_sharded_trunk_is_drawn_as_by_its_constructor(kind, base_width, group):
    """Bit for bit, and so is all that is drawn after it."""
    torch.manual_seed(0)
    whole = TRUNKS[kind]()
    if base_width:
        scale_start(whole, base_width)
    after = torch.rand(4)
    with shape_alone():
        parts = TRUNKS[kind]()
    mesh = init_device_mesh("cpu", (1,))
    for part in (*parts.blocks, parts):
        fully_shard(part, mesh=mesh)
    parts.to_empty(device="cpu")
    for x in parts.state_dict().values():
        local(x).fill_(7)
    torch.manual_seed(0)
    fill_weights(parts, {}, base_width, ALONE)
    assert torch.equal(torch.rand(4), after)
    drawn = parts.state_dict()
    assert [name for name, x in whole.state_dict().items() if not torch.equal(x, local(drawn[name]))] == []
