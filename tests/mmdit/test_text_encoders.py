"""Frozen encoders: SD3's assembly is diffusers', both CLIP libraries agree, padding and dropping do what they say."""

import copy
import json
from logging import Handler

import open_clip
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import save_file
from transformers import CLIPTextModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from mmdit.features import Features
from mmdit.sd3_text import SD3Text, open_sd3_text
from mmdit.text import Tokenizer
from mmdit.text_encoders import CLIPText, OpenCLIPText, fingerprint, load_encoder, open_text_encoder
from tests.mmdit.tiny_sd3 import (
    PROMPTS,
    clip,
    clip_tokenizer,
    make_pipeline,
    randomised,
    save_pipeline,
    t5,
    t5_tokenizer,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd3")
    save_pipeline(folder)
    return folder


@pytest.fixture(scope="module")
def theirs():
    return make_pipeline()


@pytest.fixture(scope="module")
def singles(tmp_path_factory):
    """Folders of one encoder each, as the hub keeps them."""
    torch.manual_seed(1)
    root = tmp_path_factory.mktemp("singles")
    words = t5_tokenizer(), clip_tokenizer("<|endoftext|>")
    for name, model, tokenizer in (
        ("t5", t5(words[0], 32), words[0]),
        ("clip", clip(words[1], 16, 12, "gelu"), words[1]),
    ):
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    backend = Tokenizer.train(PROMPTS, 280, 32).backend
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    tokenizer.save_pretrained(root / "llama")
    shape = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    config = LlamaConfig(vocab_size=280, max_position_embeddings=64, **shape)
    randomised(LlamaForCausalLM(config)).save_pretrained(root / "llama")
    return root


# --- the three of SD3 ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [77, 256, 512])
def test_prompts_are_encoded_as_diffusers_does(folder, theirs, tokens):
    prompts = [*PROMPTS, "", "star " * 600]  # the last is cut by all three
    with torch.no_grad():
        context, _, pooled, _ = theirs.encode_prompt(prompts, None, None, max_sequence_length=tokens)
    text = open_sd3_text(folder, tokens)
    ours = text(text.tokenize(prompts))
    assert ours.context.shape == (4, 77 + tokens, 32) and ours.pooled.shape == (4, 20) and ours.mask is None
    torch.testing.assert_close(ours.context, context, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.pooled, pooled, rtol=0, atol=1e-5)


def test_without_t5_it_is_diffusers_without_t5(folder, theirs):
    less = StableDiffusion3Pipeline(**{**theirs.components, "text_encoder_3": None, "tokenizer_3": None})
    with torch.no_grad():
        context, _, pooled, _ = less.encode_prompt(PROMPTS, None, None)
    text = open_sd3_text(folder, without=["t5"])
    ours = text(text.tokenize(PROMPTS))
    torch.testing.assert_close(ours.context, context, rtol=0, atol=1e-5)
    assert not ours.context[:, 77:].any() and torch.equal(ours.pooled, pooled)


@pytest.mark.parametrize(
    ("name", "states", "pooled"),
    [("clip_l", slice(0, 8), slice(0, 8)), ("clip_g", slice(8, 24), slice(8, 20))],
)
def test_a_clip_that_is_left_out_gives_zeros_and_changes_nothing_else(folder, name, states, pooled):
    text, less = open_sd3_text(folder, 16), open_sd3_text(folder, 16, without=[name])
    full, ours = text(text.tokenize(PROMPTS)), less(less.tokenize(PROMPTS))
    expected = full.context.clone()
    expected[:, :77, states] = 0
    torch.testing.assert_close(ours.context, expected)
    assert full.pooled[:, pooled].all() and not ours.pooled[:, pooled].any()
    other = torch.ones(20, dtype=torch.bool)
    other[pooled] = False
    assert torch.equal(ours.pooled[:, other], full.pooled[:, other])


def test_nothing_left_is_zeros(folder):
    text = open_sd3_text(folder, 16, without=["clip_l", "clip_g", "t5"])
    out = text(text.tokenize(PROMPTS), torch.zeros(2, 3, dtype=torch.bool))
    assert out.context.shape == (2, 93, 32) and out.pooled.shape == (2, 20)
    assert not out.context.any() and not out.pooled.any()


@pytest.mark.parametrize("dropped", ["zeros", "empty"])
def test_each_encoder_is_dropped_for_each_sample_alone(folder, dropped):
    """One prompt in each of the eight ways to drop of three: every part is the prompt's or the dropped one's."""
    text = open_sd3_text(folder, 16, dropped=dropped)
    drop = torch.tensor([[bool(i >> bit & 1) for bit in range(3)] for i in range(8)])
    out = text(text.tokenize(PROMPTS[1:] * 8), drop)
    prompt, empty = (text(text.tokenize([caption])) for caption in (PROMPTS[1], ""))
    parts = [
        lambda x: (x.context[:, :77, :8], x.pooled[:, :8]),
        lambda x: (x.context[:, :77, 8:24], x.pooled[:, 8:]),
        lambda x: (x.context[:, 77:],),
    ]
    for encoder, part in enumerate(parts):
        for got, on, off in zip(part(out), part(prompt), part(empty), strict=True):
            off = torch.zeros_like(on) if dropped == "zeros" else off
            assert not torch.allclose(on, off, atol=1e-3)
            for row in range(8):
                torch.testing.assert_close(got[row], (off if drop[row, encoder] else on)[0])


# --- one encoder --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["t5", "clip", "llama"])
def test_one_encoder_gives_its_own_states_and_padding_counts_for_nothing(singles, name):
    text = open_text_encoder(singles / name, 40)
    tokens = text.tokenize(PROMPTS)
    out = text(tokens)
    assert out.context.shape == (2, 40, text.context_dim) and out.pooled.shape == (2, text.pooled_dim)
    for row, prompt in enumerate(PROMPTS):
        ids = text.tokenizer(prompt, return_tensors="pt").input_ids
        assert out.mask[row].sum() == ids.shape[1] < 40
        with torch.no_grad():
            alone = text.network(ids, output_hidden_states=True)
        states = alone.hidden_states[-2] if name == "clip" else alone.last_hidden_state
        pooled = alone.text_embeds if name == "clip" else states.mean(1)
        torch.testing.assert_close(out.context[row, : ids.shape[1]], states[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(out.pooled[row], pooled[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["t5", "clip", "llama"])
def test_a_dropped_caption_is_the_empty_one(singles, name):
    text = open_text_encoder(singles / name, 24)
    tokens = text.tokenize([PROMPTS[0], PROMPTS[0], ""])
    dropped, as_it_is = text(tokens, torch.tensor([[True], [False], [False]])), text(tokens)
    torch.testing.assert_close(dropped.pooled[0], as_it_is.pooled[2])
    assert torch.equal(dropped.mask[0], as_it_is.mask[2])
    assert torch.equal(dropped.pooled[1:], as_it_is.pooled[1:])
    assert not torch.allclose(as_it_is.pooled[0], as_it_is.pooled[2], atol=1e-3)
    assert as_it_is.pooled.isfinite().all()


@pytest.mark.parametrize("shown", [True, False])
def test_loading_is_silent_and_leaves_others_their_bars(singles, capfd, shown):
    (logging.enable_progress_bar if shown else logging.disable_progress_bar)()
    open_text_encoder(singles / "t5")
    said, still = capfd.readouterr().err, logging.is_progress_bar_enabled()
    logging.enable_progress_bar()
    assert said == "" and still == shown


def test_weights_that_are_not_needed_are_no_news(singles):
    """Here a language model's head; of a whole CLIP, transformers would list every layer that sees."""
    before, heard, handler = logging.get_verbosity(), [], Handler()
    handler.emit = heard.append
    logging.add_handler(handler)
    open_text_encoder(singles / "llama", 32)
    logging.remove_handler(handler)
    assert heard == [] and logging.get_verbosity() == before


def test_a_clip_without_projection_gives_the_state_of_the_end(singles, tmp_path):
    full = open_text_encoder(singles / "clip")
    plain = CLIPTextModel.from_pretrained(singles / "clip")
    plain.save_pretrained(tmp_path)
    full.tokenizer.save_pretrained(tmp_path)
    text = open_text_encoder(tmp_path)
    assert text.pooled_dim == 16
    ours = text(text.tokenize(PROMPTS))
    torch.testing.assert_close(full.network.text_projection(ours.pooled), full(full.tokenize(PROMPTS)).pooled)


def carried(state: dict[str, torch.Tensor], layers: int) -> dict[str, torch.Tensor]:
    """A CLIP text model of transformers under open_clip's names."""
    state = {name.removeprefix("text_model."): value for name, value in state.items()}
    out = {
        "token_embedding.weight": state["embeddings.token_embedding.weight"],
        "positional_embedding": state["embeddings.position_embedding.weight"],
        "ln_final.weight": state["final_layer_norm.weight"],
        "ln_final.bias": state["final_layer_norm.bias"],
        "text_projection": state["text_projection.weight"].T.contiguous(),
    }
    names = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    names["attn.out_proj"] = "self_attn.out_proj"
    for i in range(layers):
        for leaf in ("weight", "bias"):
            for own, other in names.items():
                out[f"transformer.resblocks.{i}.{own}.{leaf}"] = state[f"encoder.layers.{i}.{other}.{leaf}"]
            qkv = [state[f"encoder.layers.{i}.self_attn.{x}_proj.{leaf}"] for x in "qkv"]
            out[f"transformer.resblocks.{i}.attn.in_proj_{leaf}"] = torch.cat(qkv)
    return out


@pytest.fixture(scope="module")
def both_clips(tmp_path_factory):
    """The same random CLIP with the vocabulary of the originals, by open_clip from a folder and by transformers."""
    torch.manual_seed(2)
    folder = tmp_path_factory.mktemp("open_clip")
    shape = dict(embed_dim=12, text_cfg=dict(context_length=77, vocab_size=49408, width=16, heads=2, layers=3))
    shape["vision_cfg"] = dict(image_size=16, layers=1, width=64, patch_size=16)
    model = open_clip.CLIP(**shape)
    words = clip_tokenizer("!")
    words_config = clip(words, 16, 12, "gelu").config
    words_config.update(dict(vocab_size=49408, eos_token_id=49407, bos_token_id=49406, pad_token_id=0))
    words_config.intermediate_size = 64
    from transformers import CLIPTextModelWithProjection

    network = randomised(CLIPTextModelWithProjection(words_config))
    missing = model.load_state_dict(carried(network.state_dict(), 3), strict=False)
    assert not missing.unexpected_keys and all(n.startswith(("visual.", "logit")) for n in missing.missing_keys)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": shape, "preprocess_cfg": {}}))
    return open_text_encoder(folder), CLIPText(network, words)


def test_both_libraries_give_the_same_features_for_the_same_weights(both_clips):
    by_open_clip, by_transformers = both_clips
    assert isinstance(by_open_clip, OpenCLIPText)
    tokens = by_open_clip.tokenize([*PROMPTS, "", "star " * 100])
    assert tokens.mask.sum(1).tolist() == [5, 10, 2, 77]
    ours, theirs = by_open_clip(tokens), by_transformers(tokens)
    assert (ours.context.shape, ours.pooled.shape) == ((4, 77, 16), (4, 12))
    torch.testing.assert_close(ours.context, theirs.context, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.pooled, theirs.pooled, rtol=0, atol=1e-5)


def test_a_clip_of_open_clip_takes_its_place_in_sd3s_assembly(both_clips):
    by_open_clip, by_transformers = both_clips
    text, other = (SD3Text([None, clip, None], 64, 20, 16) for clip in (by_open_clip, by_transformers))
    tokens = text.tokenize(PROMPTS)
    out = text(tokens)
    torch.testing.assert_close(out.context, other(tokens).context, rtol=0, atol=1e-5)
    assert not out.context[:, :77, :8].any() and out.context[:, :77, 8:24].all()
    with pytest.raises(ValueError, match="clip_g is of open_clip"):
        text.save_parts("anywhere")


# --- frozen -------------------------------------------------------------------------------------------------------


def test_what_is_frozen_is_no_part_of_parameters_state_or_copies_and_moves_along(singles):
    text = open_text_encoder(singles / "t5", 16)
    model = torch.nn.Sequential(text, torch.nn.Linear(2, 2))
    assert [name for name, _ in model.named_parameters()] == ["1.weight", "1.bias"] == list(model.state_dict())
    assert copy.deepcopy(model)[0] is text
    assert not any(p.requires_grad for p in text.network.parameters())
    model.train()
    assert not text.network.training
    before = text(text.tokenize(PROMPTS)).context
    assert next(model.to(torch.bfloat16)[0].network.parameters()).dtype == torch.bfloat16
    after = text(text.tokenize(PROMPTS)).context
    assert after.dtype == torch.float32 and 0 < (after - before).abs().max() < 0.2


def test_in_float16_t5_keeps_in_float32_what_transformers_does(singles):
    """Its numbers are beyond float16 there."""
    text, half = open_text_encoder(singles / "t5", 16), open_text_encoder(singles / "t5", 16, torch.float16)
    for encoder in (text, half):
        state = encoder.to(torch.float16).network.state_dict()
        assert {x.dtype for name, x in state.items() if ".wo." in name} == {torch.float32}
        assert {x.dtype for name, x in state.items() if ".wo." not in name} == {torch.float16}
    assert all(torch.equal(x, half.network.state_dict()[name]) for name, x in text.network.state_dict().items())
    assert {x.dtype for x in half.to(torch.bfloat16).network.state_dict().values()} == {torch.bfloat16}
    assert half.to(torch.float16).network.encoder.block[0].layer[1].DenseReluDense.wo.weight.dtype == torch.float32


def test_states_that_are_too_large_for_float16_survive_its_autocast(tmp_path):
    words = t5_tokenizer()
    network = t5(words, 32)
    with torch.no_grad():
        network.encoder.block[0].layer[1].DenseReluDense.wo.weight.mul_(3e5)
    network.save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    text = open_text_encoder(tmp_path, 16)
    tokens = text.tokenize(["a red star"])
    known = text(tokens)
    with torch.autocast("cpu", torch.float16):
        assert torch.equal(text(tokens).context, known.context)
    with torch.autocast("cpu", torch.bfloat16):
        assert not torch.equal(text(tokens).context, known.context)


@pytest.mark.parametrize("name", ["t5", "clip", "sd3"])
def test_an_encoder_is_found_again_and_another_is_refused(singles, folder, tmp_path, name):
    source = folder if name == "sd3" else singles / name
    text = open_text_encoder(source, 20)
    text.save_config(tmp_path)
    tokens = text.tokenize(PROMPTS)
    assert torch.equal(load_encoder(tmp_path)(tokens).context, text(tokens).context)
    about = json.loads((tmp_path / "config.json").read_text())
    assert about["encoder"] == str(source) and about["sha256"] == fingerprint(source)
    (tmp_path / "config.json").write_text(json.dumps(about | {"sha256": "0" * 64}))
    with pytest.raises(ValueError, match="is not the one that this model was trained with"):
        load_encoder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(about | {"encoder": str(tmp_path / "gone")}))
    with pytest.raises(ValueError, match="is gone from .*gone: say where it is now in .*config.json"):
        load_encoder(tmp_path)


def test_sd3_encoders_are_found_again_as_they_were(folder, tmp_path):
    open_sd3_text(folder, 20, dropped="empty", without=["t5"]).save_config(tmp_path)
    again = load_encoder(tmp_path)
    assert (again.max_length, again.dropped, again.t5) == (20, "empty", None) and again.clip_l is not None


def test_the_fingerprint_is_of_config_tokenizer_and_weights(singles, tmp_path):
    import shutil

    first = fingerprint(singles / "clip")
    for name in ("config.json", "tokenizer_config.json", "model.safetensors"):
        shutil.copytree(singles / "clip", tmp_path / name)
        assert fingerprint(tmp_path / name) == first
        with (tmp_path / name / name).open("ab") as file:
            file.write(b" ")
        assert fingerprint(tmp_path / name) != first


def test_the_fingerprint_is_of_the_weights_beside_a_folder_of_the_tokenizer(tmp_path):
    (tmp_path / "tokenizer").mkdir()
    seen = set()
    for path in (tmp_path / "model.safetensors", tmp_path / "tokenizer" / "vocab.txt"):
        path.write_text("changed")
        seen.add(fingerprint(tmp_path))
    assert len(seen) == 2
    (tmp_path / "model.safetensors").write_text("changed again")
    assert fingerprint(tmp_path) not in seen


# --- bad input ----------------------------------------------------------------------------------------------------


def test_what_is_no_text_encoder_is_refused_in_one_line(singles, folder, tmp_path):
    import shutil

    with pytest.raises(ValueError, match="no text encoder in"):
        open_text_encoder(tmp_path)
    (tmp_path / "none").mkdir()
    shutil.copy(folder / "model_index.json", tmp_path / "none")
    with pytest.raises(ValueError, match="none has no text_encoder, which its model_index.json names"):
        open_text_encoder(tmp_path / "none")
    (tmp_path / "none" / "model_index.json").write_text("{}")
    with pytest.raises(ValueError, match="no text encoder in .*none: the pipeline has none of"):
        open_text_encoder(tmp_path / "none")
    with pytest.raises(ValueError, match="features of no encoder"):
        assert Features().mask is None
    with pytest.raises(ValueError, match="max_length is 78, expected 2 to 77 tokens"):
        open_text_encoder(singles / "clip", 78)
    with pytest.raises(ValueError, match="without names t6, expected a list of some of clip_l, clip_g, t5"):
        open_sd3_text(folder, without=["t6"])
    with pytest.raises(ValueError, match="dropped is 'none'"):
        open_sd3_text(folder, dropped="none")
    with pytest.raises(ValueError, match="cannot read the tokenizer in"):
        shutil.copytree(singles / "clip", tmp_path / "wordless", ignore=shutil.ignore_patterns("*token*", "*.txt"))
        open_text_encoder(tmp_path / "wordless")
    shutil.copytree(singles / "t5", tmp_path / "pickled")
    weights = tmp_path / "pickled" / "model.safetensors"
    weights.rename(weights.with_name("pytorch_model.bin"))
    with pytest.raises(ValueError, match="cannot read the text encoder in .*pickled") as error:
        open_text_encoder(tmp_path / "pickled")
    assert "\n" not in str(error.value)


def test_weights_that_lack_a_tensor_are_refused(singles, tmp_path):
    import shutil

    from safetensors.torch import load_file

    shutil.copytree(singles / "t5", tmp_path / "t5")
    state = load_file(singles / "t5" / "model.safetensors")
    del state["encoder.final_layer_norm.weight"]
    save_file(state, tmp_path / "t5" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="1 missing or misshapen: encoder.final_layer_norm.weight"):
        open_text_encoder(tmp_path / "t5")


def test_a_model_of_pictures_is_no_text_encoder(singles, tmp_path):
    from transformers import ViTConfig, ViTModel

    shape = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=16)
    ViTModel(ViTConfig(**shape)).save_pretrained(tmp_path)
    open_text_encoder(singles / "clip").tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds ViTModel, expected a CLIP, a T5 or a causal language model"):
        open_text_encoder(tmp_path)
