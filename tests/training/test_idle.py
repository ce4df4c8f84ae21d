"""Settings that take no effect with the others: refused where a person set them, told where a preset did."""

import json

import pytest

import training
from training.config import ConfigError, load_config
from training.idle import RULES, idle_settings, idle_warnings
from training.presets import preset, preset_names
from training.run import RunFolder
from training.settings import overridden

MIXED = ("transfusion.enabled=true", "model.positions=both")
FROZEN, POWER = ["transfusion.weights=separate", "init=llama"], ["training.ema=power"]
# (what somebody sets; beside what it is idle; beside what it works)
CASES = [
    ("data.num_samples=5", ["data.source=shapes:100"], ["data.source=shapes"]),
    ("data.num_workers=2", ["data.source={cache}"], ["data.source=shapes"]),
    ("data.bucket_ratio=3", [], ["data.buckets=true"]),
    ("data.bucket_ratio=3", ["data.buckets=false"], ["data.source={cache}"]),
    ("data.shuffle_buffer=5", [], ["data.source=hf-stream:x", "data.cache_latents=false"]),
    ("data.timeout=5", ["data.source=photos"], ["data.source=https://host/x.tar"]),
    ("data.retries=2", ["data.source=photos"], ["data.source=a=0.5,s3://b/x.tar=0.5"]),
    ("model.pos_embed_max_size=9", ["model.positions=rope"], ["model.positions=both"]),
    *((f"text.{key}={value}", ["text.encoder=clip"], []) for key, value in (("vocab_size", 999), ("tokenizer", "gpt"))),
    *((f"text.{key}", list(MIXED), []) for key in ("width=64", "depth=3", "num_heads=8")),
    ("text.width=64", ["text.encoder=clip"], []),
    ("objective.m=1", ["objective.time_density=mode"], []),
    ("objective.s=0.5", ["objective.time_density=cosmap"], ["objective.time_density=mode"]),
    ("objective.caption_dropout=0.5", [*MIXED, "transfusion.caption_first=0"], list(MIXED)),
    *(
        (f"transfusion.{setting}", [], [*MIXED, *also])
        for setting, *also in (
            ("time=image",),
            ("attention=causal",),
            ("codec=unet",),
            ("codec_width=8", "transfusion.codec=unet"),
            ("size_tokens=4",),
            ("max_tokens=99",),
            ("image_weight=1",),
            ("caption_first=0.5",),
            ("image_first_cap=1",),
            ("z_loss=0.1",),
            ("text_length=9", "transfusion.text=a.txt", "transfusion.text_fraction=0.5"),
        )
    ),
    ("transfusion.weights=separate", [], list(MIXED)),
    ("transfusion.freeze_text=true", FROZEN, [*MIXED, *FROZEN]),
    ("transfusion.codec_width=8", list(MIXED), [*MIXED, "transfusion.codec=unet"]),
    ("transfusion.image_first_cap=1", [*MIXED, "transfusion.caption_first=1"], list(MIXED)),
    ("transfusion.text_length=9", list(MIXED), [*MIXED, "transfusion.text=a.txt", "transfusion.text_fraction=0.5"]),
    ("lora.alpha=8", [], ["init=w", "lora.rank=4"]),
    ("lora.targets=all", [], ["init=w", "lora.rank=4"]),
    ("optimizer.momentum=0.5", [], ["optimizer.name=muon"]),
    ("optimizer.decay_fraction=0.5", ["optimizer.schedule=linear"], ["optimizer.schedule=wsd"]),
    ("optimizer.final_lr_fraction=0.5", [], ["optimizer.schedule=linear"]),
    ("training.ema_decay=0.5", ["training.ema=power"], []),
    ("training.ema_decay=0", ["training.ema=power"], []),  # which keeps an average
    ("training.ema_sigma_rel=[0.1, 0.2]", [], ["training.ema=power"]),
    ("training.ema_snapshot_every=5", [], ["training.ema=power"]),
    ("training.ema_snapshot_dtype=bf16", [], ["training.ema=power"]),
    ("training.ema_snapshot_dtype=bf16", [*POWER, "training.ema_snapshot_every=0"], POWER),
    ("training.recompute_every=2", [], ["training.recompute=full"]),
    ("training.profile=5:6", ["training.num_steps=4"], ["training.num_steps=5"]),
    ("training.validate_every=2", ["data.held_out=0"], []),
    ("parallel.shard_size=2", ["parallel.strategy=fsdp"], ["parallel.strategy=hsdp"]),
    ("parallel.reshard=false", ["parallel.strategy=ddp"], ["parallel.strategy=fsdp"]),
    ("parallel.cpu_offload=true", [], ["parallel.strategy=hsdp"]),
    ("parallel.timeout=5", ["parallel.strategy=none"], []),
    ("evaluation.prompts_per_question=3", ["data.source=photos"], []),
    ("evaluation.validation_samples=3", ["data.held_out=0"], []),
    ("evaluation.validation_times=3", ["data.held_out=0"], []),
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("idle") / "cache"
    folder.mkdir()
    (folder / "cache.json").write_text(json.dumps({}))
    return folder


@pytest.mark.parametrize(("setting", "idle", "works"), CASES)
def test_what_takes_no_effect_is_named_with_what_decides(setting, idle, works, cache):
    idle, works = ([word.format(cache=cache) for word in words] for words in (idle, works))
    key, config = setting.partition("=")[0], preset("pixels-tiny")
    line = idle_settings(overridden(config, [*idle, setting]), [key])[key]
    assert line.startswith(f"{key} = ") and "\n" not in line
    assert line.partition(" with ")[2].partition(" = ")[0] in {word.partition("=")[0] for word in (*idle, *works)}
    assert key not in idle_settings(overridden(config, [*works, setting]))


def test_every_rule_has_a_case():
    assert {key for rule in RULES for key in rule.keys} == {setting.partition("=")[0] for setting, _, _ in CASES}


@pytest.mark.parametrize(
    ("off", "beside"),
    [
        ("evaluation.prompts_per_question=0", "data.source=photos"),
        ("training.validate_every=0", "data.held_out=0"),
        ("training.ema_snapshot_every=0", "training.ema=exponential"),
    ],
)
def test_what_is_off_may_be_switched_off(off, beside):
    load_config("demo", [off, beside])


@pytest.mark.parametrize("name", preset_names())
def test_presets_set_nothing_idle(name):
    assert idle_settings(preset(name)) == {}


def test_a_file_is_asked_as_a_command_line_is(tmp_path):
    path = tmp_path / "my.toml"
    path.write_text('preset = "demo"\n[training]\nema_sigma_rel = [0.1, 0.2]\n')
    with pytest.raises(ConfigError, match=r"^.*my.toml: training.ema_sigma_rel = \[0.1, 0.2\] takes no effect with"):
        load_config(path)
    load_config(path, ["training.ema=power"])  # which makes it work


def test_what_a_file_or_a_preset_says_may_be_spoken_over(tmp_path):
    path = tmp_path / "my.toml"
    path.write_text("[data]\nnum_samples = 50\n[training]\nema_decay = 0.5\n")
    config = load_config(path, ["training.ema=power", "data.source=shapes:9"])
    assert list(idle_settings(config)) == ["data.num_samples", "training.ema_decay"]
    assert list(idle_settings(load_config("demo", ["training.ema=power"]))) == ["training.ema_decay"]
    with pytest.raises(ConfigError, match="training.ema_decay = 0.25 takes no effect"):
        load_config("demo", ["training.ema=power", "training.ema_decay=0.25"])


def test_a_config_is_put_to_other_data_without_a_warning(tmp_path):
    (tmp_path / "cache.json").write_text("{}")
    config = load_config("latent", [f"data.source={tmp_path}"])
    assert list(idle_settings(config)) == ["data.num_workers"] and idle_warnings(config) == []
    config = load_config("demo", ["data.source=photos"])
    assert "evaluation.prompts_per_question" in idle_settings(config) and idle_warnings(config) == []


def test_a_run_says_what_is_idle_and_that_its_warm_up_does_not_end_and_reads_its_own_config(tmp_path, capsys):
    small = ["training.num_steps=1", "evaluation.prompts_per_question=0", f"training.out={tmp_path / 'run'}"]
    run = training.train(load_config("pixels-tiny", [*small, "training.ema=power"]))
    line = 'warning: training.ema_decay = 0.9 takes no effect with training.ema = "power": it is for "exponential"'
    warming = "warning: the learning rate warms up for the whole run: warmup_steps = 2, num_steps = 1"
    assert {line, warming} <= set(capsys.readouterr().out.splitlines())
    assert RunFolder.open(run).config() == load_config(run)
    copied = tmp_path / "copied.toml"
    copied.write_bytes((run / "config.toml").read_bytes())
    assert load_config(copied, ["optimizer.lr=0.5"]).training.ema == "power"
    with pytest.raises(ConfigError, match="training.ema_decay = 0.25 takes no effect"):
        load_config(copied, ["training.ema_decay=0.25"])
