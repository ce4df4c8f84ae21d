"""Writing on: cached is uncached, alone is in a batch, images wait for BOI, and every rule of drawing does its part."""

import math
from dataclasses import replace

import pytest
import torch

from mmdit.config import LlamaConfig, TransfusionConfig
from mmdit.generate import ImageSampling, TextSampling, generate
from mmdit.sequences import BOI, EOI, pack
from mmdit.transfusion import Transfusion

PAD, EOS = 0, 1
TINY = TransfusionConfig(vocab_size=24, in_channels=3, patch_size=2, depth=2, num_heads=2, head_dim=16)
LLAMA = LlamaConfig(hidden=40, num_kv_heads=1, qkv_bias=True)
SETTINGS = {
    "shared, added": TINY,
    "shared, image": replace(TINY, time="image"),
    "separate, image": replace(TINY, weights="separate", time="image"),
    "unet": replace(TINY, codec="unet", codec_width=8),
    "llama, added": replace(TINY, llama=LLAMA),
    "llama, image": replace(TINY, weights="separate", time="image", llama=LLAMA),
    "no qk-norm, causal": replace(TINY, qk_norm=None, attention="causal"),
}
SMALL = ImageSampling(size=(4, 4), num_steps=3, guidance=2.0)


def alive(config, seed=0, scale=0.3):
    model, generator = Transfusion(config).double().eval(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(scale * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return model


def text(*ids):
    return torch.tensor(ids)


def image(height, width, seed=0):
    return torch.randn(3, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=SETTINGS, ids=str)
def model(request):
    return alive(SETTINGS[request.param])


DOCUMENT = [text(5, 6), image(4, 6, 1), text(7), image(2, 2, 2), image(4, 4, 3), text(8, 9, 10)]


@torch.no_grad()
def test_read_in_parts_is_read_at_once(model):
    """Across several images, beside a row that reads other things in between."""
    cache, states = model.cache(2), []
    for k, part in enumerate(DOCUMENT):
        reading = cache.reading([1])
        states.append(model(pack([[part]]), None, reading).states)
        reading.keep()
        if k % 2:
            other = cache.reading([0])
            model(pack([[text(*range(11, 12 + k))]]), None, other)
            other.keep()
    whole = model(pack([DOCUMENT])).states
    torch.testing.assert_close(torch.cat(states), whole, rtol=1e-9, atol=1e-10)
    # And an image that is being denoised in that context, again and again, without a trace.
    for t in (0.9, 0.3):
        time = torch.tensor([t], dtype=torch.float64)
        x = model(pack([[image(4, 4, 7)]]), time, cache.reading([1])).v[0]
        expected = model(pack([[*DOCUMENT, image(4, 4, 7)]]), torch.tensor([0, 0, 0, t], dtype=torch.float64)).v[-1]
        torch.testing.assert_close(x, expected, rtol=1e-9, atol=1e-10)


@torch.no_grad()
def test_only_the_last_pass_can_be_kept():
    """The room behind what is kept is that of the last pass: another's keys would be taken for its own."""
    model = alive(TINY)
    cache = model.cache(1)
    first, second = cache.reading([0]), cache.reading([0])
    with pytest.raises(ValueError, match="last pass"):
        first.keep()
    for reading in (first, second):
        model(pack([[text(5, 6)]]), None, reading)
    with pytest.raises(ValueError, match="last pass"):
        first.keep()
    second.keep()
    with pytest.raises(ValueError, match="last pass"):
        second.keep()
    assert second.lengths.tolist() == [2]


@torch.no_grad()
def test_greedy_writing_is_what_the_whole_model_would_say(model):
    """Token by token without a cache, with the images that were drawn."""
    [written] = generate(model, [[text(5, 6, 7)]], 8, 2, TextSampling(temperature=0), SMALL)
    document = [text(5, 6, 7)]
    for part in written.parts:
        if part.is_floating_point():
            document.append(part)
            continue
        for token in part:
            logits = model(pack([document])).logits[-1]
            logits[[PAD, EOI]] = -math.inf
            if sum(p.is_floating_point() for p in document) >= 2:
                logits[BOI] = -math.inf
            assert int(logits.argmax()) == token
            last_is_text = not document[-1].is_floating_point()
            document = (
                [*document[:-1], torch.cat([document[-1], token[None]])] if last_is_text else [*document, token[None]]
            )


@torch.no_grad()
def test_an_image_is_drawn_in_its_context_and_read_as_finished(model):
    """The solver's own loop on the whole documents, without a cache."""
    from samplers import Field, RectifiedFlow, cfg, randn, sample, uniform

    prompt = [text(5, 6), image(2, 4, 1), text(7)]
    [written] = generate(model, [prompt], 2, 1, TextSampling(temperature=0), SMALL, seed=4, begin="image")

    def v(context):
        def network(x_t, t):
            times = torch.cat([torch.zeros(len(context) // 3, dtype=torch.float64), t])
            return model(pack([[*context, x_t[0]]]), times).v[-1][None]

        return Field(network, RectifiedFlow())

    x = randn((1, 3, 4, 4), [torch.Generator().manual_seed(4)], torch.float64)
    drawn = sample(cfg(v(prompt), v([]), 2.0), x, "ab2", grid=uniform(3)).x[0]
    torch.testing.assert_close(written.parts[0], drawn, rtol=1e-8, atol=1e-9)
    logits = model(pack([[*prompt, drawn]])).logits[-1]
    logits[[PAD, EOI, BOI]] = -math.inf
    assert int(logits.argmax()) == (
        EOS if written.stopped == "end" and len(written.parts) == 1 else written.parts[1][0]
    )


def test_a_prompt_gives_the_same_alone_and_in_a_batch(model):
    prompts = [[text(5, 6, 7)], [image(4, 2, 1), text(8)], [], [text(*range(4, 20)), image(2, 2, 2)]]
    how = dict(max_tokens=5, max_images=2, image=SMALL)
    together = generate(model, prompts, seed=[3, 1, 4, 1], **how)
    for prompt, seed, written in zip(prompts, [3, 1, 4, 1], together, strict=True):
        [alone] = generate(model, [prompt], seed=[seed], **how)
        assert alone.stopped == written.stopped and len(alone.parts) == len(written.parts)
        for a, b in zip(alone.parts, written.parts, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)
    assert together[2].parts[0].is_floating_point()  # nothing to go on from: an image
    other = generate(model, prompts, seed=[5, 6, 7, 8], **how)
    assert not torch.equal(other[2].parts[0], together[2].parts[0])


def saying(*ids, vocabulary=24):
    """A model whose text says these ids whatever it reads: the bias of its last norm decides."""
    model = alive(TINY)
    with torch.no_grad():
        model.norm_out.weight.zero_()
        model.norm_out.bias.copy_(torch.ones(32))
        model.head.weight.zero_()
        for strength, token in enumerate(reversed(ids)):
            model.head.weight[token] = 1.0 + strength
    return model


def test_it_ends_at_the_end_token_at_the_limit_and_never_says_what_is_no_text():
    greedy = TextSampling(temperature=0)
    [ended] = generate(saying(PAD, EOI, EOS, 9), [[text(5)]], text=greedy)
    assert ended.parts == [] and ended.stopped == "end"
    [limited] = generate(saying(PAD, EOI, 9), [[text(5)]], 4, text=greedy)
    assert [p.tolist() for p in limited.parts] == [[9] * 4] and limited.stopped == "length"
    [drawn] = generate(saying(BOI, 9), [[text(5)]], 3, 2, greedy, SMALL)
    assert [p.is_floating_point() for p in drawn.parts] == [True, True, False] and drawn.parts[2].tolist() == [9] * 3
    assert drawn.parts[0].shape == (3, 4, 4)
    [none] = generate(saying(BOI, 9), [[text(5)]], 3, 0, greedy, SMALL)
    assert [p.tolist() for p in none.parts] == [[9] * 3]


def test_it_stops_at_the_longest_document_of_the_model():
    greedy, limit = TextSampling(temperature=0), 12
    model = saying(9)
    model.config = replace(TINY, max_tokens=limit)
    [written] = generate(model, [[text(*range(5, 13))]], 64, text=greedy)
    assert [p.tolist() for p in written.parts] == [[9] * 4] and written.stopped == "length"
    model = saying(BOI, 9)
    model.config = replace(TINY, max_tokens=limit)
    [drawn, full] = generate(model, [[text(5, 6)], [text(*range(5, 12))]], 64, 9, greedy, SMALL)
    # 2 + an image of 6 + nothing of 6 more; the other has no room for one
    assert [p.shape for p in drawn.parts] == [(3, 4, 4)] and drawn.stopped == full.stopped == "length"
    assert full.parts == []
    with pytest.raises(ValueError, match="of 13 tokens, including patches, is longer than the model's limit of 12"):
        generate(model, [[text(*range(5, 18))]])


SIZED = replace(TINY, size_tokens=3, first_size=10)


def test_the_size_of_an_image_is_said_before_it():
    batch = Transfusion(SIZED).pack([[text(5), image(4, 6)]])
    assert batch.ids.tolist() == [5, 11, 12, BOI, EOI] and batch.lead == 2
    with pytest.raises(ValueError, match="sizes of 1 to 3"):
        Transfusion(SIZED).pack([[image(8, 4)]])
    with pytest.raises(ValueError, match="inside its text"):
        Transfusion(SIZED).pack([[text(5, 11)]])


@torch.no_grad()
def test_the_model_chooses_the_size_of_an_image():
    """Of each greedily written image the whole model, without a cache, would say rows and columns."""
    model, free = alive(SIZED), replace(SMALL, size=None)
    greedy, prompts = TextSampling(temperature=0), [[text(5, i)] for i in range(14, 22)]
    written = generate(model, prompts, 0, 1, greedy, free, begin="image")
    for prompt, one in zip(prompts, written, strict=True):
        rows = 10 + int(model(model.pack([prompt])).logits[-1, 10:13].argmax())
        begun = pack([[torch.cat([prompt[0], text(rows)])]])
        columns = 10 + int(model(begun).logits[-1, 10:13].argmax())
        assert one.parts[0].shape == (3, 2 * (rows - 9), 2 * (columns - 9))
    assert len({one.parts[0].shape for one in written}) > 1
    [asked] = generate(model, prompts[:1], 0, 1, greedy, SMALL, begin="image")
    assert asked.parts[0].shape == (3, 4, 4)
    with pytest.raises(ValueError, match="no size is given"):
        generate(model, [[]], image=free)
    with pytest.raises(ValueError, match="no size is given"):
        generate(alive(TINY), [[text(5)]], image=free)


def test_an_image_begins_where_the_model_says_a_size():
    model = saying(11, 9)
    model.config = SIZED
    free, greedy = replace(SMALL, size=None), TextSampling(temperature=0)
    [written] = generate(model, [[text(5)]], 2, 1, greedy, free)
    assert [p.shape for p in written.parts] == [(3, 4, 4), (2,)] and written.parts[1].tolist() == [9, 9]
    [none] = generate(model, [[text(5)]], 2, 0, greedy, free)
    assert [p.tolist() for p in none.parts] == [[9, 9]]


def test_parts_are_told_as_they_come():
    seen = []

    def told(i, part):
        seen.append((i, part.shape if part.is_floating_point() else part.tolist()))

    generate(saying(BOI, 9), [[text(5)], [text(6)]], 2, 1, TextSampling(temperature=0), SMALL, told=told)
    assert seen == [(0, (3, 4, 4)), (1, (3, 4, 4)), (0, [9]), (1, [9]), (0, [9]), (1, [9])]


@pytest.mark.parametrize(
    "option",
    [dict(guidance=5.0), dict(solver="heun"), dict(num_steps=5), dict(interval=(0.0, 0.5)), dict(shift=3.0)]
    + [dict(grid="cosine")],
)
def test_every_option_of_an_image_changes_it(option):
    model = alive(TINY)

    def drawn(how):
        return generate(model, [[text(5)]], 0, image=how, begin="image")[0].parts[0]

    assert (drawn(SMALL) - drawn(replace(SMALL, **option))).abs().max() > 1e-6


# --- drawing a token ----------------------------------------------------------------------------------------------

P = torch.tensor([[0.4, 0.05, 0.3, 0.15, 0.1]])


@pytest.mark.parametrize(
    ("how", "left"),
    [
        (dict(), [0, 1, 2, 3, 4]),
        (dict(top_k=2), [0, 2]),
        (dict(top_p=0.69), [0, 2]),
        (dict(top_p=0.71), [0, 2, 3]),
        (dict(top_p=0.01), [0]),
        (dict(min_p=0.3), [0, 2, 3]),
        (dict(min_p=1.0), [0]),
        (dict(top_k=3, min_p=0.5), [0, 2]),
        (dict(top_k=2, top_p=0.56), [0]),
        (dict(top_k=3, top_p=0.75), [0, 2]),
        (dict(temperature=0), [0]),
    ],
)
def test_what_each_rule_leaves(how, left):
    generator = torch.Generator().manual_seed(0)
    drawn = TextSampling(**how).draw(P.log().expand(2000, 5), [generator] * 2000)
    counts = torch.bincount(drawn, minlength=5) / 2000
    assert counts.nonzero()[:, 0].tolist() == left
    expected = torch.zeros(5)
    expected[left] = P[0, left] / P[0, left].sum()
    assert (counts - expected).abs().max() < 0.05


@pytest.mark.parametrize("how", [dict(top_k=5, top_p=0.8), dict(temperature=0.6, top_k=20, top_p=0.9, min_p=0.05)])
def test_rules_together_leave_what_those_of_transformers_leave(how, monkeypatch):
    from transformers import (
        LogitsProcessorList,
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    kinds = dict(temperature=TemperatureLogitsWarper, top_k=TopKLogitsWarper, top_p=TopPLogitsWarper,
                 min_p=MinPLogitsWarper)  # fmt: skip
    warpers = LogitsProcessorList(kinds[name](value) for name, value in how.items())
    logits = 2 * torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    expected = warpers(None, logits).softmax(-1).sort(-1, descending=True).values
    given = []
    monkeypatch.setattr(
        torch, "multinomial", lambda p, n, generator: given.append(p / p.sum()) or torch.zeros(1).long()
    )
    TextSampling(**how).draw(logits, [torch.Generator()] * 50)
    torch.testing.assert_close(torch.stack(given), expected)


def test_temperature_sharpens():
    generator = torch.Generator().manual_seed(0)
    drawn = TextSampling(temperature=0.5).draw(P.log().expand(4000, 5), [generator] * 4000)
    expected = P[0] ** 2 / (P[0] ** 2).sum()
    assert (torch.bincount(drawn, minlength=5) / 4000 - expected).abs().max() < 0.03


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (dict(prompts=[]), "no prompt given"),
        (dict(begin="sound"), "begin is 'sound'"),
        (dict(max_tokens=-1), "max_tokens = -1"),
        (dict(max_tokens=2.5), "max_tokens = 2.5 .* give whole numbers of at least 0"),
        (dict(max_images=None), "max_images = None: give whole numbers"),
        (dict(seed=[1, 2]), "2 seeds for 1 prompts"),
        (dict(image=ImageSampling(size=(3, 4))), "both sides must be multiples of 2"),
        (dict(prompts=[[text(5, 99)]]), "beyond the vocabulary"),
        (dict(prompts=[[text(5, BOI)]]), "image token"),
        (dict(prompts=[["a star"]]), "prompt 0 holds a str"),
        (dict(prompts=[text(5)]), "prompt 0 holds a Tensor, expected a list"),
        (dict(prompts=5), "prompts are a int, expected a list of lists"),
        (dict(text={"top_k": 5}), "text is a dict, expected a TextSampling"),
        (dict(image={"num_steps": 4}), "image is a dict, expected a ImageSampling"),
    ],
)
def test_bad_input_is_refused(change, what):
    with pytest.raises(ValueError, match=what):
        generate(alive(TINY), **({"prompts": [[text(5)]]} | change))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (dict(solver="euller"), "euler"),
        (dict(num_steps=0), "num_steps = 0"),
        (dict(solver="restart", num_steps=2), "no step of the grid"),
        (dict(guidance=float("nan")), "guidance is nan"),
        (dict(shift=0.0), "shift 0.0, expected"),
        (dict(guidance=None), "guidance is None"),
        (dict(interval=None), "interval is None"),
        (dict(size=8), "size is 8"),
        (dict(size=(8.5, 8)), "size is .*, expected two whole numbers"),
        (dict(solver="euler", diffusion="kl"), "solves the ODE"),
        (dict(shift_of=8), "shift_of is 8"),
        (dict(shift_of=(0, 8)), "shift_of is .*, expected the sides"),
        (dict(grid="diffusers"), "diffusers"),
    ],
)
def test_how_an_image_is_drawn_is_checked_before_anything_is_written(change, what):
    with pytest.raises(ValueError, match=what):
        ImageSampling(**change)


def test_a_model_that_sees_what_follows_cannot_write():
    with pytest.raises(ValueError, match="cannot generate"):
        generate(alive(replace(TINY, attention="full")), [[text(5)]])


@pytest.mark.parametrize(
    "wrong", [dict(temperature=-1), dict(top_k=0), dict(top_k=1.5), dict(top_p=0.0), dict(min_p=1.5)]
)
def test_rules_are_checked(wrong):
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))} is .*, expected"):
        TextSampling(**wrong)


@torch.no_grad()
@pytest.mark.parametrize("time", ["added", "image"])
def test_half_precision_keeps_times_and_states(time):
    """In bfloat16 the weights are rounded, not the time of an image nor the states between its steps."""
    half = alive(replace(TINY, time=time), scale=0.1).bfloat16()
    exact = Transfusion(half.config).float().eval()
    exact.load_state_dict({name: x.float() for name, x in half.state_dict().items()})
    x, t = image(4, 4).bfloat16(), torch.tensor([0.503])  # no number of bfloat16
    ours, theirs = half(pack([[x]]), t).v[0].float(), exact(pack([[x.float()]]), t).v[0]
    assert (ours - theirs).norm() < 0.03 * theirs.norm()
    how = dict(max_tokens=0, begin="image", image=replace(SMALL, num_steps=100))
    drawn, right = (model.generate([[text(5)]], **how)[0].parts[0] for model in (half, exact))
    assert drawn.dtype == torch.float32
    assert (drawn - right).norm() < 0.01 * right.norm()


@pytest.mark.parametrize(("room", "drawn"), [(6, 1), (5, 0)])
def test_an_image_from_nothing_fills_the_document_to_its_last_token(room, drawn):
    """Four patches of a latent of 4 x 4, and the two tokens around them."""
    model = alive(replace(TINY, max_tokens=room))
    [written] = generate(model, [[]], 0, image=replace(SMALL, size=(4, 4)))
    assert len(written.parts) == drawn and written.stopped == "length"


def test_a_document_that_is_full_stops_before_a_size_is_chosen():
    """And the others of its batch are drawn."""
    model = alive(replace(TINY, size_tokens=2, max_tokens=10))
    full, short = generate(
        model, [[torch.arange(10, 20)], [text(10)]], 0, image=replace(SMALL, size=None), begin="image"
    )
    assert full.stopped == "length" and not full.parts
    assert len(short.parts) == 1


@pytest.mark.parametrize("config", [replace(TINY, size_tokens=3), replace(TINY, pos_embed_max_size=3)])
def test_an_image_that_is_too_large_is_refused_before_anything_is_written(config):
    heard = []
    with pytest.raises(ValueError, match="4 x 1 patches does not fit: the model draws sizes of 1 to 3"):
        generate(alive(config), [[text(9)]], image=replace(SMALL, size=(8, 2)), told=lambda i, part: heard.append(part))
    assert not heard
    with pytest.raises(ValueError, match="size_tokens is 9, but the table of positions has 8"):
        replace(TINY, size_tokens=9, pos_embed_max_size=8)


def test_an_sde_solver_draws():
    how = replace(SMALL, solver="euler-maruyama", diffusion="sigma")
    alone, other = (generate(alive(TINY), [[text(9)]], 0, image=i, begin="image")[0].parts[0] for i in (how, SMALL))
    assert torch.isfinite(alone).all() and not torch.allclose(alone, other)


@pytest.mark.parametrize("prompt, begin", [([], "text"), ([text(9)], "image")])
def test_no_image_begins_where_none_is_allowed(prompt, begin):
    with pytest.raises(ValueError, match="max_images is 0, but an image is to begin"):
        generate(alive(TINY), [prompt], max_images=0, image=SMALL, begin=begin)


def test_a_temperature_near_zero_is_zero_and_one_that_is_no_number_is_refused():
    logits, generator = torch.tensor([[1.0, 3.0, 2.0, -torch.inf]]), torch.Generator()
    assert TextSampling(temperature=1e-42).draw(logits, [generator]).item() == 1
    with pytest.raises(ValueError, match="temperature"):
        TextSampling(temperature=math.nan)
