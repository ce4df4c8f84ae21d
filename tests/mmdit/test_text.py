"""Tokenizer and learned text encoder: any text there and back, padding without effect, captions dropped one by one."""

import unicodedata
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmdit.config import MMDiTConfig
from mmdit.model import MMDiT
from mmdit.text import LearnedText, TextConfig, Tokenizer, Tokens
from mmdit.text_to_image import CaptionedMMDiT

CAPTIONS = ["a red circle", "two blue stars", "a green square left of a red star", "three circles on a grey background"]
SMALL = TextConfig(vocab_size=300, max_length=12, width=16, depth=2, num_heads=2)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(CAPTIONS, vocab_size=300, max_length=12)


@pytest.fixture(scope="module")
def text(tokenizer):
    """An encoder in which every parameter matters."""
    torch.manual_seed(0)
    encoder = LearnedText(SMALL, tokenizer)
    for p in encoder.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return encoder


# --- tokenizer ----------------------------------------------------------------------------------------------------


@given(st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=60))
def test_any_text_comes_back(text):
    """Up to Unicode's composed form and white space at the ends; nothing is unknown."""
    tokenizer = _wide()
    ids = tokenizer([text]).ids[0]
    assert tokenizer.decode(ids) == unicodedata.normalize("NFC", text).strip()


@given(st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=40), st.data())
def test_a_text_and_what_continues_it_join_without_a_seam(text, data):
    tokenizer = _wide()
    [ids] = tokenizer.encode([text])
    whole = tokenizer.backend.decode(ids)
    cuts = [i for i in range(1, len(ids)) if not tokenizer.backend.decode(ids[:i]).endswith("\ufffd")]
    for cut in [data.draw(st.sampled_from(cuts))] if cuts else []:
        assert tokenizer.backend.decode(ids[:cut]) + tokenizer.decode(ids[cut:], ids[:cut]) == whole


def test_half_a_surrogate_pair_is_no_error():
    """What JSON can hold and UTF-8 cannot."""
    assert _wide().decode(_wide()(["a \ud83d star"]).ids[0]) == "a ? star"
    Tokenizer.train(["a \ud83d star"], 300, 12)


@cache
def _wide():
    return Tokenizer.train(CAPTIONS, vocab_size=300, max_length=400)


@pytest.mark.parametrize("caption", ["<pad>", "<eos>", "a <pad> star", "<eos><eos>", "red<pad>"])
def test_the_names_of_special_tokens_are_text_like_any_other(caption):
    tokenizer = _wide()
    ids, mask = tokenizer([caption])
    assert tokenizer.decode(ids[0]) == caption
    length = int(mask.sum())
    assert mask[0, :length].all() and (ids[0] == tokenizer.eos).nonzero().tolist() == [[length - 1]]


@given(st.text(max_size=40), st.integers(2, 12))
def test_cutting_keeps_the_end_token(text, max_length):
    long, short = _wide()([text]), Tokenizer(_wide().backend, max_length)([text])
    length = min(max_length, int(long.mask.sum()))
    assert short.ids.shape == (1, max_length)
    assert short.ids[0, : length - 1].tolist() == long.ids[0, : length - 1].tolist()
    assert short.ids[0, length - 1] == _wide().eos
    assert short.mask[0].tolist() == [True] * length + [False] * (max_length - length)


def test_the_empty_caption_is_the_end_token_alone(tokenizer):
    ids, mask = tokenizer(["", "a red circle"])
    assert ids[0].tolist() == [tokenizer.eos] + [tokenizer.pad] * 11
    assert mask.sum(1).tolist()[0] == 1 < mask.sum(1).tolist()[1]


@pytest.mark.parametrize("vocab_size", [258, 265, 280])
def test_vocabulary_keeps_to_its_limit(vocab_size):
    many = [
        f"{word} {other}" for word in ["red", "green", "blue", "grey"] for other in ["circle", "square", "star"]
    ] * 9
    assert Tokenizer.train(many, vocab_size, 8).vocab_size == vocab_size


def test_merges_come_from_the_captions(tokenizer):
    plain = Tokenizer.train([], 258, 12)
    assert tokenizer(["circle"]).mask.sum() < plain(["circle"]).mask.sum() == len(" circle") + 1


def test_saved_and_loaded_is_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "text" / "tokenizer.json")
    again = Tokenizer.load(tmp_path / "text" / "tokenizer.json", 12)
    for caption in (*CAPTIONS, "unseen <pad> Wörter 星", ""):
        assert torch.equal(again([caption]).ids, tokenizer([caption]).ids)
    assert {path.name for path in (tmp_path / "text").iterdir()} == {"tokenizer.json", "tokenizer_config.json"}


def test_files_and_settings_that_do_not_work_are_named(tmp_path):
    with pytest.raises(ValueError, match="tokenizer.json is not a tokenizer file"):
        Tokenizer.load(tmp_path / "tokenizer.json", 12)
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(ValueError, match="tokenizer.json is not a tokenizer file"):
        Tokenizer.load(tmp_path / "tokenizer.json", 12)
    with pytest.raises(ValueError, match="vocab_size is 257"):
        Tokenizer.train(CAPTIONS, 257, 12)
    with pytest.raises(ValueError, match="max_length is 1"):
        Tokenizer.train(CAPTIONS, 300, 1)


def test_what_is_no_list_of_captions_is_refused(tokenizer):
    for call in (tokenizer, tokenizer.encode, lambda captions: Tokenizer.train(captions, 300, 8)):
        with pytest.raises(ValueError, match="got one string, expected a list of captions"):
            call("a red circle")
        with pytest.raises(ValueError, match="a caption is a NoneType, expected a string"):
            call(["a red circle", None])


def test_a_tokenizer_without_our_special_tokens_is_refused():
    from tokenizers import Tokenizer as Backend
    from tokenizers import models

    with pytest.raises(ValueError, match="no <pad> or <eos>"):
        Tokenizer(Backend(models.BPE()), 12)


# --- other tokenizers ---------------------------------------------------------------------------------------------


def bpe(special=("<s>", "</s>", "<unk>")):
    """Byte-level, with a beginning and an end that its own template puts around, cutting and padding switched on."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    backend, bytes_of = Backend(models.BPE()), pre_tokenizers.ByteLevel
    backend.pre_tokenizer, backend.decoder = bytes_of(add_prefix_space=False), decoders.ByteLevel()
    how = dict(vocab_size=290, initial_alphabet=bytes_of.alphabet(), show_progress=False)
    backend.train_from_iterator(CAPTIONS, trainers.BpeTrainer(special_tokens=list(special), **how))
    around = [(name, backend.token_to_id(name)) for name in special[:2]]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{special[0]} $A {special[1]}", special_tokens=around
    )
    backend.enable_truncation(3)
    backend.enable_padding(length=9, pad_token=special[2], pad_id=2)
    return backend


def word_piece():
    """Words of the captions in small letters, and as words the names of special tokens; no end."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

    backend = Backend(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.WordPiece()
    special = ["[UNK]", "[CLS]", "[PAD]", "<image>"]
    trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=special, show_progress=False)
    backend.train_from_iterator(CAPTIONS, trainer)
    return backend


def unigram():
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = Backend(models.Unigram())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    how = dict(vocab_size=60, special_tokens=["<unk>", "</s>", "<pad>"], unk_token="<unk>", show_progress=False)
    backend.train_from_iterator(CAPTIONS, trainers.UnigramTrainer(**how))
    return backend


def saved(folder, backend, **names):
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(folder)
    return folder


OTHERS = {
    "bpe": (bpe, dict(bos_token="<s>", eos_token="</s>", pad_token="<unk>")),
    "padded with the end": (bpe, dict(eos_token="</s>", pad_token="</s>")),
    "of other names": (lambda: bpe(("<end>", "<begin>", "<fill>")), dict(eos_token="<end>", pad_token="<fill>")),
    "word piece": (word_piece, dict(unk_token="[UNK]", pad_token="[PAD]")),
    "unigram": (unigram, dict(unk_token="<unk>", eos_token="</s>", pad_token="<pad>")),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_another_tokenizer_is_taken_as_it_is(kind, tmp_path):
    """Its own ids, as its backend gives them without a template; its own names; and text comes back."""
    from tokenizers import Tokenizer as Backend

    make, names = OTHERS[kind]
    folder = saved(tmp_path, make(), **names)
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    tokenizer = Tokenizer.adopt(folder, 40, images=True)
    backend.no_truncation()
    backend.no_padding()
    for caption in CAPTIONS:
        ids, mask = (x[0] for x in tokenizer([caption]))
        own = backend.encode(caption, add_special_tokens=False).ids
        assert ids[mask].tolist() == [*own, tokenizer.eos] and (ids[~mask] == tokenizer.pad).all()
        assert tokenizer.decode(ids) == caption
    assert len(set(tokenizer.special)) == 4 and max(tokenizer.special) < tokenizer.vocab_size
    if "eos_token" in names:
        assert tokenizer.eos == backend.token_to_id(names["eos_token"])
    if kind != "padded with the end":
        assert tokenizer.pad == backend.token_to_id(names["pad_token"])
    assert Tokenizer.adopt(folder, 40).special[2:] == ((3, None) if kind == "word piece" else (None, None))


@pytest.mark.parametrize("kind", OTHERS)
def test_another_tokenizer_is_saved_whole(kind, tmp_path):
    """The folder that it came from may go; transformers reads ours."""
    from transformers import AutoTokenizer

    make, names = OTHERS[kind]
    tokenizer = Tokenizer.adopt(saved(tmp_path / "from", make(), **names), 40, images=True)
    tokenizer.save(tmp_path / "to" / "tokenizer.json")
    again = Tokenizer.load(tmp_path / "to" / "tokenizer.json", 40)
    assert again.special == tokenizer.special and again.vocab_size == tokenizer.vocab_size
    assert torch.equal(again(CAPTIONS).ids, tokenizer(CAPTIONS).ids)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "to")
    assert (theirs.pad_token_id, theirs.eos_token_id) == tokenizer.special[:2]


@pytest.mark.parametrize("kind", OTHERS)
def test_no_text_holds_a_token_that_is_ours(kind, tmp_path):
    """Word pieces know "<image>" as a word: as an image's token it would begin a picture in the middle of a caption."""
    make, names = OTHERS[kind]
    tokenizer = Tokenizer.adopt(saved(tmp_path, make(), **names), 40, images=True)
    written = " ".join(tokenizer.backend.id_to_token(i) for i in tokenizer.special)
    [ids] = tokenizer.encode([f"a red {written} circle"])
    assert ids and not set(ids) & set(tokenizer.special)


def test_names_are_read_wherever_they_are_written(tmp_path):
    """As strings or tables, in either file; tokenizer_config.json has the last word."""
    folder = saved(tmp_path, bpe())
    (folder / "special_tokens_map.json").write_text('{"pad_token": "<unk>", "eos_token": {"content": "</s>"}}')
    (folder / "tokenizer_config.json").unlink()
    assert Tokenizer.adopt(folder, 8).special[:2] == (2, 1)
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<s>", "pad_token": null}')
    assert Tokenizer.adopt(folder, 8).special[:2] == (2, 0)
    (folder / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ValueError, match="tokenizer_config.json is no table"):
        Tokenizer.adopt(folder, 8)


def test_folders_that_hold_no_tokenizer_are_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere is no tokenizer's folder: it has no tokenizer.json"):
        Tokenizer.adopt(tmp_path / "nowhere", 8)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer.json is not a tokenizer file"):
        Tokenizer.adopt(tmp_path, 8)


def test_a_tokenizer_that_cannot_read_a_text_says_so(tmp_path):
    from tokenizers import Tokenizer as Backend
    from tokenizers import models

    tokenizer = Tokenizer.adopt(saved(tmp_path, Backend(models.WordPiece({"red": 0}, unk_token="[UNK]"))), 8)
    with pytest.raises(ValueError, match="cannot read a text: .*UNK"):
        tokenizer(["blue"])


# --- encoder ------------------------------------------------------------------------------------------------------


def test_shapes(text):
    context, pooled, mask = text(text.tokenize(CAPTIONS))
    assert context.shape == (4, 12, 16) and pooled.shape == (4, 16) and mask.shape == (4, 12)


def test_padding_changes_nothing(text):
    """Each caption, in a batch with longer ones, as alone and without any padding; whatever stands in the padding."""
    tokens = text.tokenize(["a star", *CAPTIONS, ""])
    noise = torch.randint(2, 300, tokens.ids.shape, generator=torch.Generator().manual_seed(0))
    context, pooled, _ = text(Tokens(torch.where(tokens.mask, tokens.ids, noise), tokens.mask))
    for i, length in enumerate(tokens.mask.sum(1).tolist()):
        alone = text(Tokens(tokens.ids[i : i + 1, :length], tokens.mask[i : i + 1, :length]))
        torch.testing.assert_close(context[i, :length], alone.context[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(pooled[i], alone.pooled[0], atol=1e-5, rtol=1e-5)


def test_padding_changes_nothing_through_the_trunk(text):
    torch.manual_seed(1)
    config = MMDiTConfig(2, 2, depth=2, num_heads=2, head_dim=8, context_dim=16, pooled_dim=16, sample_size=8)
    model = CaptionedMMDiT(MMDiT(config), text)
    for p in model.transformer.parameters():
        torch.nn.init.normal_(p, std=0.2)
    tokens = text.tokenize(["a star", CAPTIONS[2]])
    x_t, t = torch.randn(2, 2, 4, 4), torch.rand(2)
    v = model(x_t, t, tokens)
    for i, length in enumerate(tokens.mask.sum(1).tolist()):
        rows = slice(i, i + 1)
        alone = model(x_t[rows], t[rows], Tokens(tokens.ids[rows, :length], tokens.mask[rows, :length]))
        torch.testing.assert_close(v[rows], alone, atol=1e-5 * v.abs().max().item(), rtol=0)


def test_order_of_words_matters(text):
    """Also to the pooled vector, which is a mean."""
    context, pooled, _ = text(text.tokenize(["red star", "star red"]))
    assert (pooled[0] - pooled[1]).abs().max() > 1e-3


def test_positions_turn_by_the_angles_of_rope(text):
    """RoPE (Su et al. 2021): token i turns pair j by i / 10000^(j / half), half the width of a head."""
    tokens, seen = text.tokenize(["a red star"]), []
    text.layers[0].register_forward_pre_hook(lambda layer, args: seen.append(args[2]))
    text(tokens)
    half = text.config.width // text.config.num_heads // 2
    angle = torch.outer(torch.arange(tokens.ids.shape[1]), 10_000.0 ** -(torch.arange(half) / half))
    torch.testing.assert_close(torch.stack(seen[0]), torch.stack([angle.cos(), angle.sin()]))


@given(st.lists(st.booleans(), min_size=4, max_size=4))
def test_dropped_rows_are_the_empty_caption_and_the_others_as_they_were(dropped):
    encoder, tokens = _encoder(), _encoder().tokenize(CAPTIONS)
    kept = encoder(tokens)
    empty = encoder(encoder.tokenize([""] * 4))
    some = encoder(tokens, torch.tensor(dropped)[:, None])
    for i, is_dropped in enumerate(dropped):
        for part, expected in zip(some, empty if is_dropped else kept, strict=True):
            torch.testing.assert_close(part[i], expected[i], atol=1e-6, rtol=1e-6)
    assert torch.equal(some.mask[:, 1:].any(1), ~torch.tensor(dropped))


@cache
def _encoder():
    torch.manual_seed(0)
    return LearnedText(SMALL, Tokenizer.train(CAPTIONS, 300, 12))


@pytest.mark.parametrize("assign", [False, True])
def test_made_without_memory_it_knows_the_empty_caption(text, tokenizer, assign):
    with torch.device("meta"):
        again = LearnedText(text.config, tokenizer)
    again = again if assign else again.to_empty(device="cpu")
    again.load_state_dict(text.state_dict(), assign=assign)
    tokens, drop = tokenizer(["a red circle", "a blue star"]), torch.tensor([[True], [False]])
    for ours, theirs in zip(again(tokens, drop), text(tokens, drop), strict=True):
        assert torch.equal(ours, theirs)


def test_drop_works_on_shortened_tokens(text):
    tokens = text.tokenize(["a star", "a red star"])
    short = Tokens(tokens.ids[:, :6], tokens.mask[:, :6])
    drop = torch.tensor([[True], [False]])
    torch.testing.assert_close(text(short, drop).pooled, text(tokens, drop).pooled, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "change",
    [dict(depth=0), dict(depth=1), dict(num_heads=1), dict(max_length=6), dict(width=32), dict(vocab_size=290)],
)
def test_each_option_counts(change):
    config = replace(SMALL, **change)
    encoder = LearnedText(config, Tokenizer.train(CAPTIONS, config.vocab_size, config.max_length))
    assert len(encoder.layers) == config.depth
    assert encoder.embed.weight.shape == (config.vocab_size, config.width)
    context, _, _ = encoder(encoder.tokenize([CAPTIONS[2]]))
    assert context.shape == (1, config.max_length, config.width)


def test_every_parameter_learns(text):
    text.zero_grad()
    context, pooled, mask = text(text.tokenize(CAPTIONS))
    (context[mask].square().sum() + pooled.pow(3).sum()).backward()
    assert [name for name, p in text.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(vocab_size=0), "vocab_size is 0"),
        (dict(depth=-1), "depth is -1"),
        (dict(max_length=1), "max_length is 1"),
        (dict(max_length=2.5), "max_length is 2.5, expected a whole number"),
        (dict(width="32"), "width is '32', expected a whole number"),
        (dict(width=18, num_heads=2), "width 18 must be a multiple"),
    ],
)
def test_configs_that_do_not_work_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **change)


def test_a_tokenizer_too_large_for_the_encoder_is_refused(tokenizer):
    with pytest.raises(ValueError, match="not of one model"):
        LearnedText(replace(SMALL, vocab_size=260), tokenizer)
