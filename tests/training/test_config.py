"""Configs: presets, TOML round trips, overrides, error lines, and the page of keys."""

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from samplers import solver_names
from training import config as c
from training import presets, settings
from training.config import ConfigError, TrainConfig, apply_overrides, load_config, to_toml
from training.config_page import describe
from training.settings import field_docs, hint_of

ROOT = Path(__file__).parents[2]


def write(folder: Path, text: str, name: str = "my.toml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


# --- round trips ---------------------------------------------------------------------------------

text = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)
count = st.integers(1, 10**9)
fraction = st.floats(0, 1)
below_one = st.floats(0, 1, exclude_max=True)
positive = st.floats(0, 1e9, exclude_min=True)
pair = st.tuples(count, count)


def no_none(strategy):
    """Strings but "none", which means None where None is allowed."""
    return strategy.filter(lambda value: value != "none")


configs = st.builds(
    TrainConfig,
    name=st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=8),
    seed=st.integers(0, 2**40),
    autoencoder=text.filter(bool),
    data=st.builds(
        c.DataConfig,
        source=text,
        image_size=st.none() | count | pair,
        held_out=below_one,
        cache_latents=st.booleans(),
    ),
    model=st.builds(
        c.ModelConfig,
        depth=st.integers(10, 40),
        head_dim=st.integers(1, 16).map(lambda n: 4 * n),
        mlp_ratio=positive,
        qk_norm=st.sampled_from([None, "rms_norm"]),
        positions=st.sampled_from(["sincos", "rope"]),
        dual_attention_layers=st.lists(st.integers(0, 9), max_size=4).map(tuple),
    ),
    objective=st.builds(
        c.ObjectiveConfig,
        time_density=st.sampled_from(["uniform", "logit-normal", "mode", "cosmap"]),
        m=st.floats(-10, 10),
        s=st.floats(0.01, 1.75),
        shift=st.floats(0.01, 100),
    ),
    optimizer=st.builds(c.OptimizerConfig, lr=positive, betas=st.tuples(below_one, below_one), eps=positive),
    training=st.builds(c.TrainingConfig, num_steps=count, out=st.none() | no_none(text)),
    sampling=st.builds(
        c.SamplingConfig,
        prompts=st.lists(text, max_size=3).map(tuple),
        solver=st.sampled_from(sorted({*solver_names()} - {"euler-maruyama", "stochastic-heun"})),  # want a diffusion
        interval=st.sampled_from([(0.0, 1.0), (0.25, 0.5)]),
    ),
)


@given(configs)
def test_a_written_config_reads_back_equal(tmp_path_factory, config):
    path = write(tmp_path_factory.mktemp("c"), to_toml(config), "config.toml")
    assert load_config(path) == config
    assert load_config(path.parent) == config  # a run folder is named by its folder


@pytest.mark.parametrize("name", presets.preset_names())
def test_presets_load_by_name_and_round_trip(tmp_path, name):
    config = load_config(name)
    assert config == presets.preset(name) and config.name == name
    assert load_config(write(tmp_path, to_toml(config))) == config


def test_a_preset_is_found_even_where_a_folder_has_its_name(tmp_path, monkeypatch):
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_config("demo") == presets.demo()


# --- files and overrides ---------------------------------------------------------------------------


def test_a_file_takes_its_own_name_and_says_only_what_differs(tmp_path):
    config = load_config(write(tmp_path, "[optimizer]\nlr = 3e-4\n", "mine.toml"))
    assert config == dataclasses.replace(
        TrainConfig(name="mine"), optimizer=dataclasses.replace(c.OptimizerConfig(), lr=3e-4)
    )
    assert config.run_folder == Path("runs/mine")


def test_a_file_builds_on_the_preset_that_it_names(tmp_path):
    config = load_config(write(tmp_path, 'preset = "demo"\nname = "x"\n[training]\nnum_steps = 7\n'))
    demo = presets.demo()
    assert config == dataclasses.replace(demo, name="x", training=dataclasses.replace(demo.training, num_steps=7))


def test_a_file_may_want_what_the_command_line_gives(tmp_path):
    text = '[model]\npositions = "rope"\n[transfusion]\nenabled = true\nweights = "separate"\nfreeze_text = true\n'
    path = write(tmp_path, text)
    assert load_config(path, ["init=llama"]).transfusion.freeze_text
    with pytest.raises(ConfigError, match=r"^\S*my.toml: transfusion.freeze_text needs a language model"):
        load_config(path)
    with pytest.raises(ConfigError, match=r"^\S*my.toml: transfusion.freeze_text needs a language model"):
        load_config(path, ["seed=1"])
    with pytest.raises(ConfigError, match=r"^transfusion.text_length is 1"):
        load_config(path, ["init=llama", "transfusion.text_length=1"])


def test_an_override_does_not_hide_a_value_where_the_file_should_have_a_section(tmp_path):
    with pytest.raises(ConfigError, match=r"my.toml: training is a section, but 5 came"):
        load_config(write(tmp_path, "training = 5\n"), ["training.num_steps=3"])


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("training.num_steps=1e5", 100_000),  # a float in TOML
        ("training.num_steps = 12", 12),
        ("optimizer.lr=1", 1.0),
        ("optimizer.betas=[0.5, 0.75]", (0.5, 0.75)),
        ("data.image_size=[100, 400]", (100, 400)),
        ("data.image_size=64", 64),
        ("data.image_size=none", None),
        ("data.cache_latents=false", False),
        ("model.qk_norm=none", None),
        ("model.dual_attention_layers=[0, 1]", (0, 1)),
        ("objective.time_density=uniform", "uniform"),
        ('objective.time_density="uniform"', "uniform"),
        ("data.source=a folder/b=c.tar", "a folder/b=c.tar"),
        ("data.source=2024", "2024"),
        ("training.out=2024-01-01", "2024-01-01"),
        ("autoencoder=none", "none"),
        ('sampling.prompts=["a", "b"]', ("a", "b")),
        ("seed=3", 3),
    ],
)
def test_overrides_take_toml_values_or_bare_strings(override, value):
    config = load_config("demo", [override])
    for part in override.partition("=")[0].strip().split("."):
        config = getattr(config, part)
    assert config == value and type(config) is type(value)


def test_the_last_override_wins_and_others_stay():
    config = load_config("demo", ["training.num_steps=5", "training.batch_size=8", "training.num_steps=6"])
    assert (config.training.num_steps, config.training.batch_size) == (6, 8)
    assert apply_overrides(config, []) == config
    assert config.training.ema_decay == presets.demo().training.ema_decay


# --- errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.num_step=5", 'unknown key "training.num_step"; did you mean "training.num_steps"?'),
        ("lr=1", 'unknown key "lr"; did you mean "optimizer.lr"?'),
        ("trainign.batch_size=1", 'unknown key "trainign.batch_size"; did you mean "training.batch_size"?'),
        ("zzz=1", 'unknown key "zzz"; the keys here are name, seed,'),
        ("model.depth.x=1", 'unknown key "model.depth.x"; did you mean "model.depth"?'),
        ("training=1", "training is a section; set one of its keys, such as training.num_steps=..."),
        ("fast", '"fast" is no setting; expected key=value'),
        ("=3", '"=3" is no setting; expected key=value'),
        ("training.num_steps=1.5", "training.num_steps is 1.5, expected a whole number"),
        ("training.num_steps=0", "training.num_steps is 0, expected a whole number >= 1"),
        (f"seed={2**64}", f"seed is {2**64}, expected a number of 64 bits"),
        ("optimizer.lr=1" + 400 * "0", "0000, expected a number of 64 bits"),
        ("sampling.num_steps=1" + 19 * "0", "num_steps = 1" + 19 * "0" + ": give an integer of at least 1, below"),
        ("training.num_steps=true", "training.num_steps is true, expected a whole number"),
        ("training.compile=maybe", 'training.compile is "maybe", expected one of "auto", "on", "off"'),
        ("optimizer.lr=0", "optimizer.lr is 0.0, expected a number > 0"),
        ("optimizer.lr=nan", "optimizer.lr is nan, expected a finite number"),
        ("optimizer.lr=fast", 'optimizer.lr is "fast", expected a number'),
        ("optimizer.betas=[0.9]", "optimizer.betas is [0.9], expected a list of 2, each a number in [0, 1)"),
        ("optimizer.betas=[0.9, 1]", "optimizer.betas[1] is 1.0, expected a number in [0, 1)"),
        ("data.held_out=1", "data.held_out is 1.0, expected a number in [0, 1)"),
        ("data.cache_latents=1", "data.cache_latents is 1, expected true or false"),
        ("data.image_size=big", 'data.image_size is "big", expected a whole number >= 1 or a list of 2'),
        ("model.qk_norm=rms", 'model.qk_norm is "rms", expected one of "rms_norm" or "none"'),
        ("objective.time_density=logitnormal", 'did you mean "logit-normal"?'),
        ("objective.s=0", "objective.s is 0.0, the logit-normal density needs a number > 0"),
        ("sampling.solver=huen", 'sampling.solver is "huen", which is no solver; did you mean "heun"?'),
        ("transfusion.size_tokens=4", "size_tokens = 4 takes no effect with transfusion.enabled = false"),
        ("sampling.interval=[0.5, 0.5]", "expected [low, high] with low < high"),
        ("sampling.prompts=a star", 'sampling.prompts is "a star", expected a list [...], each a string'),
        ("model.dual_attention_layers=[6]", "names blocks [6], but model.depth gives 0 to 3"),
        ("model.head_dim=33", "sin-cos positions need a multiple of 4"),
        ("text.width=100", "text.width is 100, expected a multiple of 2 * text.num_heads"),
        ("training.grad_accumulation=7", "expected a multiple of training.grad_accumulation = 7"),
        ("name=a/b", 'name is "a/b", expected one word that can name a folder'),
    ],
)
def test_a_bad_override_is_one_line_that_names_the_key(override, message):
    with pytest.raises(ConfigError) as caught:
        load_config("demo", [override])
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_solver_that_cannot_take_the_steps_is_refused_at_the_start():
    with pytest.raises(ConfigError, match='sampling.solver = "restart" with sampling.num_steps = 2: no step of the'):
        load_config("demo", ["sampling.solver=restart", "sampling.num_steps=2"])
    load_config("demo", ["sampling.solver=restart", "sampling.num_steps=9"])


def test_the_density_decides_the_range_of_its_scale():
    assert c.ObjectiveConfig(time_density="mode", s=-1.0).s == -1
    with pytest.raises(ConfigError, match=r"objective.s is 1.76, the mode density needs a number in \[-1, 1.752\]"):
        c.ObjectiveConfig(time_density="mode", s=1.76)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("seed = ", "is no valid TOML"),
        ('preset = "dmeo"', 'there is no preset "dmeo"; did you mean "demo"?'),
        ("preset = 3", "preset is 3, expected a preset's name"),
        ("[training]\nnum_setps = 3", 'unknown key "training.num_setps"; did you mean "training.num_steps"?'),
        ("[trainign]\nnum_steps = 3", 'unknown key "trainign"; did you mean "training"?'),
        ("training = 3", "training is a section, but 3 came"),
        ("[seed]\nx = 1", "seed is {'x': 1}, expected a whole number"),
    ],
)
def test_a_bad_file_is_one_line_that_names_the_file(tmp_path, content, message):
    path = write(tmp_path, content)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value).startswith(str(path)) and message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_config_that_is_not_there_suggests_the_preset(tmp_path):
    with pytest.raises(ConfigError, match='no config file "dmeo"; did you mean the preset "demo"'):
        load_config("dmeo")
    with pytest.raises(ConfigError, match=r"config.toml"):
        load_config(tmp_path)
    with pytest.raises(ConfigError, match='there is no config file "xxx'):
        load_config("x" * 999)


@given(st.sampled_from(settings.keys(TrainConfig)), st.integers(0, 50))
def test_a_misspelt_key_suggests_the_right_one(key, place):
    wrong = key[: place % len(key)] + "_" + key[place % len(key) :]
    with pytest.raises(ConfigError, match=f'did you mean "{key}"'):
        load_config("demo", [f"{wrong}=1"])


def test_construction_in_python_is_checked_as_files_are():
    with pytest.raises(ConfigError, match="optimizer.lr is -1.0"):
        c.OptimizerConfig(lr=-1)
    assert c.OptimizerConfig(betas=[0.5, 0.5]).betas == (0.5, 0.5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig().seed = 1


# --- documentation --------------------------------------------------------------------------------------


def test_every_key_says_what_it_means_and_has_a_default():
    for doc in field_docs(TrainConfig):
        assert doc.meaning.endswith(".") and doc.default, doc.key
        assert hint_of(TrainConfig, doc.key) is not None


def test_the_page_of_keys_is_up_to_date():
    page = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    assert page == describe(), "docs/config.md is out of date: run `make docs`"
    for key in settings.keys(TrainConfig):
        assert f"| `{key.rpartition('.')[2]}` |" in page
    for name in presets.preset_names():
        assert f"- `{name}`: " in page


def test_a_solver_that_wants_more_than_its_name_is_refused():
    with pytest.raises(ConfigError, match="wants a diffusion too"):
        load_config("demo", ["sampling.solver=euler-maruyama"])
