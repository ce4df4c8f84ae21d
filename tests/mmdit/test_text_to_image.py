"""The pipeline: a prompt and its seed give one picture, alone or in company; each argument does what it says."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import mmdit
import samplers
from mmdit.autoencoder import PatchAutoencoder, PatchAutoencoderConfig, PixelSpace, open_autoencoder
from mmdit.config import MMDiTConfig
from mmdit.model import MMDiT
from mmdit.pipeline_files import load_pipeline
from mmdit.text import LearnedText, TextConfig, Tokenizer
from mmdit.text_to_image import CaptionedMMDiT, TextToImage

PROMPTS = ["a red circle", "two blue stars", ""]


def make_model(channels: int, patch_size: int) -> CaptionedMMDiT:
    """A model whose prediction depends on all that goes in, and is of the size of a velocity."""
    torch.manual_seed(0)
    tokenizer = Tokenizer.train(PROMPTS, 280, 8)
    config = MMDiTConfig(
        in_channels=channels,
        patch_size=patch_size,
        depth=2,
        num_heads=2,
        head_dim=8,
        context_dim=16,
        pooled_dim=16,
        sample_size=8,
        pos_embed_max_size=8,
    )
    model = CaptionedMMDiT(MMDiT(config), LearnedText(TextConfig(280, 8, 16, 1, 2), tokenizer))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    with torch.no_grad():
        model.transformer.patch_out.weight.mul_(0.1)
    return model.eval()


@pytest.fixture(scope="module")
def pipe():
    """Pixels of 8 x 12 in patches of 4."""
    return TextToImage(make_model(3, 4), PixelSpace(), (8, 12), sampling={"num_steps": 3, "guidance": 3.0})


def pixels(images) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images]).astype(int)


@pytest.fixture
def evaluations(pipe):
    """Rows that the trunk was given, call by call."""
    rows = []
    handle = pipe.model.transformer.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    yield rows
    handle.remove()


@pytest.fixture
def states(pipe, monkeypatch):
    """x_t that the trunk was given, call by call."""
    seen = []
    handle = pipe.model.transformer.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    yield seen
    handle.remove()


def test_pictures_are_pil_images_of_the_trained_size(pipe):
    images = pipe(PROMPTS)
    assert [(image.mode, image.height, image.width) for image in images] == [("RGB", 8, 12)] * 3
    assert len(pipe("a red circle")) == 1
    assert pixels(images).std() > 5


def test_a_prompt_with_its_seed_is_the_same_alone_and_in_a_batch(pipe, states):
    together = pixels(pipe(PROMPTS, seed=[5, 6, 7]))
    noise = states[0][:3]
    in_turns = pixels(pipe(PROMPTS, seed=5, batch_size=2))
    assert abs(together - in_turns).max() <= 1
    for i, prompt in enumerate(PROMPTS):
        states.clear()
        alone = pixels(pipe(prompt, seed=5 + i))
        assert torch.equal(states[0][0], noise[i])
        assert abs(alone[0] - together[i]).max() <= 1


def test_noise_is_standard_normal_and_the_sampler_starts_from_it(pipe, states):
    pipe([""] * 64, seed=0, num_steps=1, guidance=1)
    x = states[0]
    assert abs(x.mean()) < 0.03 and abs(x.std() - 1) < 0.03
    assert len({row.sum().item() for row in x}) == 64


def test_seed_and_prompt_both_count_and_repeat(pipe):
    first = pixels(pipe(PROMPTS[:2], seed=0))
    assert (first == pixels(pipe(PROMPTS[:2], seed=0))).all()
    assert (first != pixels(pipe(PROMPTS[:2], seed=9))).mean() > 0.5
    same_noise = pixels(pipe(PROMPTS[:2], seed=[0, 0]))
    assert (same_noise[0] != same_noise[1]).mean() > 0.2


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        (dict(solver="euler", guidance=1, num_steps=4), [2] * 4),
        (dict(solver="euler", guidance=3, num_steps=4), [4] * 4),
        (dict(solver="euler", guidance=0, num_steps=2), [4] * 2),
        (dict(solver="midpoint", guidance=1, num_steps=2), [2] * 4),
    ],
    ids=str,
)
def test_evaluations_of_the_network(pipe, evaluations, options, rows):
    """One a step without guidance; with it, one of a batch twice as large."""
    pipe(PROMPTS[:2], **options)
    assert evaluations == rows


def test_guidance_only_acts_in_its_interval(evaluations, pipe):
    narrow = TextToImage(pipe.model, pipe.autoencoder, pipe.size, sampling={"interval": [0.4, 0.6]})
    narrow(PROMPTS[:2], solver="euler", num_steps=4, guidance=3)  # at t = 1, 3/4, 1/2, 1/4
    assert evaluations == [2, 2, 4, 2]


def test_guidance_moves_from_the_empty_caption_through_the_prompt(pipe):
    """One Euler step from the noise: x_0 is linear in the guidance, 0 is the empty caption and 1 the prompt."""
    one = dict(solver="euler", num_steps=1, seed=3)
    unguided, empty = (pixels(pipe(prompt, guidance=1, **one)) for prompt in ("two blue stars", ""))
    assert abs(pixels(pipe("two blue stars", guidance=0, **one)) - empty).max() <= 1
    twice = pixels(pipe("two blue stars", guidance=2, **one))
    inside = (twice > 0) & (twice < 255)
    assert inside.mean() > 0.5 and abs(twice - (2 * unguided - empty))[inside].max() <= 3
    assert abs(unguided - empty).max() > 3


@pytest.mark.parametrize("option", [dict(solver="midpoint"), dict(num_steps=7), dict(guidance=6.0)], ids=str)
def test_each_option_changes_the_picture_as_a_default_and_as_an_argument(pipe, option):
    given = pixels(pipe(PROMPTS, **({"solver": "euler"} | option)))
    assert (given != pixels(pipe(PROMPTS, solver="euler"))).any()
    other = TextToImage(pipe.model, pipe.autoencoder, pipe.size, sampling=pipe.sampling | {"solver": "euler"} | option)
    assert (pixels(other(PROMPTS)) == given).all()


def test_shift_moves_the_times_of_sampling_and_grows_with_the_picture(pipe):
    def times(model, **size):
        seen = []
        model(PROMPTS[:1], solver="euler", num_steps=2, callback=lambda p: seen.append(p.t_next), **size)
        return seen

    shifted = TextToImage(pipe.model, pipe.autoencoder, pipe.size, shift=3.0)
    assert times(pipe) == [0.5, 0]
    assert times(shifted) == pytest.approx([3 * 0.5 / (1 + 2 * 0.5), 0])
    # Twice each side is 4 times the tokens, and the shift goes with the root: 2 * 0.5 / (1 + 1 * 0.5).
    assert times(pipe, height=16, width=24) == pytest.approx([2 / 3, 0])


def test_a_bar_counts_the_steps_of_all_batches(pipe, capsys):
    seen = []
    plain = pipe(PROMPTS, solver="euler", num_steps=3)
    how = dict(solver="euler", num_steps=3, batch_size=1, callback=lambda p: seen.append(p.index))
    shown = pipe(PROMPTS, **how, progress=True)
    assert f"{3 * len(PROMPTS)}/{3 * len(PROMPTS)}" in capsys.readouterr().err
    assert seen == [0, 1, 2] * len(PROMPTS)
    assert abs(pixels(shown).astype(int) - pixels(plain).astype(int)).max() <= 1
    pipe(PROMPTS[:1], solver="euler", num_steps=1)
    assert capsys.readouterr().err == ""


def test_other_sizes_work(pipe):
    [image] = pipe("a red circle", height=16, width=4)
    assert (image.height, image.width) == (16, 4)
    [image] = pipe("a red circle", width=32)
    assert (image.height, image.width) == (8, 32)


def test_beyond_the_position_table_it_is_continued(pipe):
    """8 x 8 tokens are stored; 10 x 9 are those of a model that was built for them."""
    trunk = pipe.model.transformer
    larger = MMDiT(replace(trunk.config, pos_embed_max_size=10))
    larger.load_state_dict(trunk.state_dict() | {"pos_embed": larger.pos_embed})
    x, t, context, pooled = torch.randn(1, 3, 40, 36), torch.rand(1), torch.randn(1, 5, 16), torch.randn(1, 16)
    with torch.no_grad():
        torch.testing.assert_close(trunk(x, t, context, pooled), larger(x, t, context, pooled))
    [image] = pipe("a red circle", height=40, width=36)
    assert (image.height, image.width) == (40, 36)


def test_a_position_table_of_another_form_is_not_continued(pipe):
    other = TextToImage(copy.deepcopy(pipe.model), pipe.autoencoder, pipe.size)
    other.model.transformer.pos_embed.add_(0.1)
    other("a red circle", height=32, num_steps=1)
    with pytest.raises(ValueError, match="cannot be continued: sample smaller"):
        other("a red circle", height=40, num_steps=1)


def test_a_negative_prompt_stands_in_the_place_of_no_caption(pipe):
    one = dict(solver="euler", num_steps=1, seed=3)
    against = pixels(pipe("two blue stars", "a red circle", guidance=0, **one))
    assert abs(against - pixels(pipe("a red circle", guidance=1, **one))).max() <= 1
    both = pixels(pipe(PROMPTS[:2], ["a red circle", ""], guidance=3, **one))
    assert (pixels(pipe(PROMPTS[:2], guidance=3, **one))[1] == both[1]).all()
    assert (pixels(pipe(PROMPTS[:2], "a blue star", guidance=3, **one))[0] != both[0]).any()


def test_offloaded_parts_work_and_come_back(pipe, monkeypatch):
    """Each part is moved before it works and back after, to a device that is the CPU by another name."""
    expected, moves = pixels(pipe(PROMPTS[:2])), []
    other = TextToImage(copy.deepcopy(pipe.model), pipe.autoencoder, pipe.size, sampling=pipe.sampling)
    for name, part in (("text", other.model.conditioner), ("trunk", other.model.transformer)):
        monkeypatch.setattr(part, "to", lambda d, name=name: moves.append((name, str(d))))
    other.offload("cpu:0")
    assert (pixels(other(PROMPTS[:2])) == expected).all()
    assert moves == [("text", "cpu:0"), ("text", "cpu"), ("trunk", "cpu:0"), ("trunk", "cpu")]


def test_a_type_that_is_none_is_refused(pipe):
    for given, message in (((torch.bfloat16,), "a type goes after it"), (("cpu", torch.int8), "dtype is torch.int8")):
        with pytest.raises(ValueError, match=message):
            pipe.to(*given)


def test_half_precision_is_near_and_states_stay_in_full(pipe):
    expected, seen = pixels(pipe(PROMPTS)), []
    half = TextToImage(copy.deepcopy(pipe.model), pipe.autoencoder, pipe.size, sampling=pipe.sampling)
    half.to("cpu", torch.bfloat16)
    got = pixels(half(PROMPTS, callback=lambda p: seen.append(p.x_next.dtype)))
    assert set(seen) == {torch.float32}
    assert 0 < abs(got - expected).mean() < 5


def test_preview_shows_what_the_model_sees_coming(pipe):
    shown = []
    [last] = pixels(pipe("a star", solver="euler", num_steps=3, callback=lambda p: shown.append(pipe.preview(p))))
    assert len(shown) == 3 and abs(pixels(shown[-1])[0] - last).max() <= 1
    assert abs(pixels(shown[0])[0] - last).max() > 3


@pytest.mark.slow
def test_compiled_it_draws_the_same(pipe):
    graphs, how = [], dict(num_steps=2, skip_layers=[0], skip_steps=(0.0, 1.0))
    compiled = TextToImage(copy.deepcopy(pipe.model), pipe.autoencoder, pipe.size, sampling=pipe.sampling)
    compiled.compile(backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    assert abs(pixels(compiled(PROMPTS, **how)) - pixels(pipe(PROMPTS, **how))).max() <= 1
    assert graphs and list(compiled.model.state_dict()) == list(pipe.model.state_dict())


def test_callback_is_told_of_each_step(pipe):
    seen = []
    pipe(PROMPTS[:1], num_steps=3, callback=lambda progress: seen.append((progress.index, progress.num_steps)))
    assert seen == [(0, 3), (1, 3), (2, 3)]


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        (["a"], dict(height=10), "10 x 12 does not fit: both sides must be multiples of 4"),
        (["a"], dict(width=4 * 10**18), "8 x 4(0){18}: expected sides of at most"),
        (["a"], dict(width=0), "8 x 0 does not fit"),
        (["a"], dict(height=-8), "-8 x 12 does not fit"),
        (["a"], dict(solver="eular"), "eular"),
        (["a"], dict(num_steps=0), "num_steps"),
        ([], {}, "no prompt given"),
        (["a", "b"], dict(seed=[1]), "1 seeds for 2 prompts"),
        (["a", "b"], dict(negative_prompts=["c"]), "1 negative prompts for 2 prompts"),
        (["a"], dict(negative_prompts=[1]), "a negative prompt is a int"),
        (["a"], dict(negative_prompts=1), "negative_prompts is 1, expected a string"),
        ([None], {}, "a prompt is a NoneType, expected a string"),
        (5, {}, "a prompt is a int"),
        (["a"], dict(seed=1.5), "seed is 1.5, expected a whole number"),
        (["a"], dict(seed=["1"]), "seed is .'1'., expected a whole number"),
        (["a"], dict(seed=2**64), "expected a number of 64 bits"),
        (["a"], dict(batch_size=0), "batch_size is 0"),
        (["a"], dict(height=8.0), "8.0 x 12: expected whole numbers"),
        (["a"], dict(edit="old.png"), "edit is a str, expected an mmdit.Edit"),
        (["a"], dict(solver="restart", num_steps=2), "no step of the grid"),
        (["a"], dict(skip_layers=[0], num_steps=4), "skip_layers acts in none of 4 steps"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(pipe, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        pipe(prompts, **options)


def test_the_noise_of_a_solver_given_as_one(pipe):
    """Its diffusion is the call's where that says one, as of a solver given by name."""
    options = dict(num_steps=4, diffusion=0.3)
    named, given = (pixels(pipe(["a"], solver=s, **options)) for s in ("ddpm", samplers.SOLVERS["ddpm"]))
    assert (named == given).all()
    assert (named != pixels(pipe(["a"], solver=samplers.SOLVERS["ddpm"], num_steps=4))).any()


def test_numbers_of_numpy_are_numbers(pipe):
    how = dict(num_steps=1, height=np.int64(16))
    same = pixels(pipe(["a"] * 2, seed=np.int64(3), guidance=np.float32(2), **how))
    assert (same == pixels(pipe(["a"] * 2, seed=np.array([3, 4]), guidance=2.0, **how))).all()


# --- files --------------------------------------------------------------------------------------------------------


def test_saved_and_loaded_draws_the_same(pipe, tmp_path):
    pipe.save(tmp_path / "a")
    pipe.save(tmp_path / "run" / "pipeline")
    before = pixels(pipe(PROMPTS))
    for path in (tmp_path / "a", tmp_path / "run"):
        again = mmdit.TextToImage.load(path, "cpu")
        assert (again.size, again.shift, again.sampling) == (pipe.size, pipe.shift, pipe.sampling)
        assert not again.model.training
        assert (pixels(again(PROMPTS)) == before).all()


def test_autoencoder_is_saved_and_loaded_and_used(tmp_path):
    torch.manual_seed(0)
    config = PatchAutoencoderConfig(channels=4, widths=(8, 8), depth=1, scaling_factor=0.5, shift_factor=0.1)
    PatchAutoencoder(config).save(tmp_path / "autoencoder")  # rounds its weights
    autoencoder = open_autoencoder(tmp_path / "autoencoder")
    pipe = TextToImage(make_model(4, 2), autoencoder, (16, 32), 2.0, {"num_steps": 2, "solver": "euler"})
    assert pipe.step == 16
    pipe.save(tmp_path)
    again = TextToImage.load(tmp_path, "cpu")
    assert again.shift == 2.0 and again.autoencoder.scaling_factor == 0.5
    assert (pixels(again(PROMPTS)) == pixels(pipe(PROMPTS))).all()
    assert pixels(again(PROMPTS)).shape == (3, 16, 32, 3)


def test_save_weights_replaces_only_the_weights(pipe, tmp_path):
    pipe.save(tmp_path)
    other = TextToImage(make_model(3, 4), PixelSpace(), (8, 12))
    with torch.no_grad():
        other.model.transformer.patch_out.bias.add_(1)
        other.model.conditioner.norm.bias.add_(1)
    other.save_weights(tmp_path)
    again = TextToImage.load(tmp_path, "cpu")
    assert again.sampling == pipe.sampling
    assert all(torch.equal(v, other.model.state_dict()[k]) for k, v in again.model.state_dict().items())


def test_a_pipeline_is_held_by_no_file(pipe, tmp_path):
    """Where its files are written over, it stays as it is."""
    pipe.save(tmp_path)
    again = TextToImage.load(tmp_path, "cpu")
    path = tmp_path / "transformer" / "model.safetensors"
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(b"\x55" * (path.stat().st_size // 2))
    assert np.array_equal(pixels(again(PROMPTS)), pixels(pipe(PROMPTS)))


def test_a_pipeline_in_half_precision_is_never_whole_in_full(pipe, tmp_path):
    """Its trunk is converted as it is read, one tensor after the other."""
    pipe.save(tmp_path)
    trunk = load_pipeline(tmp_path, torch.bfloat16).model.transformer  # before it is moved
    expected = {name: x.bfloat16() for name, x in pipe.model.transformer.state_dict().items()}
    assert all(torch.equal(x, expected[name]) for name, x in trunk.state_dict().items())
    assert {x.dtype for x in trunk.state_dict().values()} == {torch.bfloat16}


def test_the_trunk_of_a_pipeline_loads_alone(pipe, tmp_path):
    pipe.save(tmp_path / "pipeline")
    model = mmdit.load(tmp_path)
    assert all(torch.equal(v, pipe.model.transformer.state_dict()[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("pipeline.json", lambda about: about.pop("size"), "pipeline.json lacks size"),
        ("pipeline.json", None, "pipeline.json is not JSON"),
        ("pipeline.json", lambda about: about.update(size=[8]), r"says size = \[8\], expected two numbers"),
        ("pipeline.json", lambda about: about.update(shift=0), "says shift = 0, expected a number above 0"),
        ("pipeline.json", lambda about: about.update(sampling="x"), "says sampling = 'x', expected a table"),
        ("pipeline.json", lambda about: about.update(autoencoder=None), 'says autoencoder = None, expected "none" or'),
        ("pipeline.json", lambda about: about.update(autoencoder="/etc"), "says autoencoder = '/etc', expected"),
        ("transformer/config.json", lambda config: config.update(depth=10**9), "too few for 1000000000 blocks"),
        ("transformer/config.json", lambda config: config.update(head_dim=10**6), "do not fit the model"),
        ("transformer/config.json", lambda config: config.update(head_dim=2**62), "sizes that no tensor can have"),
        ("text/config.json", 3, "text/config.json does not fit"),
        ("text/config.json", lambda config: config.update(vocab_size=10**12), "do not fit the model"),
        ("text/config.json", lambda config: config.update(vocab_size=2**63), "sizes that no tensor can have"),
        ("text/config.json", lambda config: config.update(depth=10**9), "too few for 1000000000 blocks"),
        ("text/config.json", lambda config: config.update(max_length=10**9), "and at most 65536"),
        ("text/config.json", lambda config: config.update(widht=3), "text/config.json does not fit: .*widht"),
        ("text/config.json", lambda config: config.update(width=32), "do not fit the model"),
        ("text/tokenizer.json", None, "not a tokenizer file"),
        ("transformer/config.json", lambda config: config.update(depht=3), "config.json does not fit: .*depht"),
        ("transformer/config.json", lambda config: config.update(depth=3), "do not fit the model"),
        ("transformer/model.safetensors", None, "no readable safetensors file"),
    ],
)
def test_files_that_do_not_fit_are_named(pipe, tmp_path, file, change, message):
    pipe.save(tmp_path)
    path = tmp_path / file
    if not callable(change):
        path.write_text("{" if change is None else json.dumps(change))
    else:
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        TextToImage.load(tmp_path, "cpu")


def test_a_save_that_fails_leaves_nothing_and_what_was_there(pipe, tmp_path, monkeypatch):
    pipe.save(tmp_path / "old")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def full(path):
        raise OSError("no room")

    monkeypatch.setattr(LearnedText, "weights_writers", lambda self, folder: {folder / "model.safetensors": full})
    other = TextToImage(make_model(3, 4), PixelSpace(), (8, 8))
    torch.nn.init.ones_(other.model.transformer.patch_out.bias)
    for layout in ("mmdit", "diffusers"):
        for name in ("old", "new/folder")[layout == "diffusers" :]:
            with pytest.raises(OSError, match="no room"):
                other.save(tmp_path / name, layout)
    with pytest.raises(OSError, match="no room"):
        other.save_weights(tmp_path / "old")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="holds a pipeline in the layout 'mmdit': save this one in another folder"):
        pipe.save(tmp_path / "old", "diffusers")


def test_a_folder_without_a_pipeline_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no trained model"):
        TextToImage.load(tmp_path)
