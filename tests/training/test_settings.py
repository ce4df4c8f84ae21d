"""Every setting changes what it should in a short run, and nothing else."""

import hashlib
import json
from pathlib import Path

import pytest
import torch

import training
import training.evaluate
from tests.training.runs import TRANSFUSION, config_for, last_weights, metrics
from training.checkpoint import list_checkpoints
from training.run import RunFolder
from training.settings import field_docs


def digest(tensors: dict[str, torch.Tensor]) -> str:
    return hashlib.sha256(
        b"".join(name.encode() + t.numpy().tobytes() for name, t in sorted(tensors.items()))
    ).hexdigest()


def traces(out: Path, *overrides: str) -> dict:
    """What a short run leaves that a setting can change."""
    training.train(config_for(out, "training.num_steps=3", "optimizer.warmup_steps=1", *overrides))
    weights = last_weights(out)
    scores = json.loads((out / "scores.json").read_text())
    return {
        "shapes": {name: tuple(value.shape) for name, value in weights.items() if name.startswith("model/")},
        "weights": digest({name: value for name, value in weights.items() if name.startswith("model/")}),
        "average": digest({name: value for name, value in weights.items() if name.startswith("ema/")}),
        "loss": metrics(out, "loss"),
        "lr": metrics(out, "lr"),
        "validation": [(row["step"], len(row)) for row in RunFolder(out).metrics() if "validation_loss" in row],
        "checkpoints": [path.name for path in list_checkpoints(out)],
        "samples": sorted(path.name for path in (out / "samples").glob("*")),
        "grid": hashlib.sha256((out / "samples.png").read_bytes()).hexdigest(),
        "scores": {name: value for name, value in scores.items() if name != "seconds_per_image"},
        "log": [line.split(" ", 2)[2].replace(str(out), "") for line in (out / "log.txt").read_text().splitlines()],
    }


# Each key: settings that change it, and which traces must then differ. "=" before a name: which must not.
SETTINGS = {
    "seed": ("seed=1", "loss weights"),
    "autoencoder": ("autoencoder={autoencoder}", "shapes"),
    "data.source": ("data.source={pictures}", "loss log"),
    "data.num_samples": ("data.num_samples=60", "loss log"),
    "data.image_size": ("data.image_size=[16, 32]", "loss log"),
    "data.held_out": ("data.held_out=0.3", "loss scores"),
    "data.num_workers": ("data.num_workers=1; data.cache_latents=false", "=weights"),
    "data.cache_latents": ("data.cache_latents=false", "log =weights =loss"),
    "model.depth": ("model.depth=1", "shapes"),
    "model.num_heads": ("model.num_heads=4; model.head_dim=8", "weights"),
    "model.head_dim": ("model.head_dim=8", "shapes"),
    "model.mlp_ratio": ("model.mlp_ratio=2", "shapes"),
    "model.patch_size": ("model.patch_size=4", "shapes"),
    "model.qk_norm": ("model.qk_norm=none", "shapes"),
    "model.positions": ("model.positions=rope", "shapes"),
    "model.pos_embed_max_size": ("model.pos_embed_max_size=9", "shapes"),
    "model.dual_attention_layers": ("model.dual_attention_layers=[0]", "shapes"),
    "text.vocab_size": ("text.vocab_size=280", "shapes"),
    "text.tokenizer": ("text.tokenizer={tokenizer}; text.vocab_size=300", "loss"),
    "text.max_length": ("text.max_length=4", "loss"),
    "text.width": ("text.width=16", "shapes"),
    "text.depth": ("text.depth=0", "shapes"),
    "text.num_heads": ("text.num_heads=4", "=shapes weights"),
    "objective.time_density": ("objective.time_density=cosmap", "loss"),
    "objective.m": ("objective.m=1", "loss"),
    "objective.s": ("objective.s=0.5", "loss"),
    "objective.stratified": ("objective.stratified=false", "loss"),
    "objective.shift": ("objective.shift=3", "loss grid"),
    "objective.caption_dropout": ("objective.caption_dropout=1", "weights"),
    "optimizer.name": ("optimizer.name=muon", "weights"),
    "optimizer.momentum": ("optimizer.name=muon; optimizer.momentum=0.5", "weights"),
    "optimizer.lr": ("optimizer.lr=0.01", "lr weights"),
    "optimizer.betas": ("optimizer.betas=[0.5, 0.5]", "weights =lr"),
    "optimizer.eps": ("optimizer.eps=0.1", "weights"),
    "optimizer.weight_decay": ("optimizer.weight_decay=5", "weights"),
    "optimizer.grad_clip": ("optimizer.grad_clip=0.001", "weights"),
    "optimizer.warmup_steps": ("optimizer.warmup_steps=3", "lr weights"),
    "optimizer.schedule": ("optimizer.schedule=cosine", "lr weights"),
    "optimizer.final_lr_fraction": ("optimizer.schedule=linear; optimizer.final_lr_fraction=0.5", "lr"),
    "optimizer.decay_fraction": ("optimizer.schedule=wsd; optimizer.decay_fraction=1", "lr"),
    "optimizer.base_width": ("optimizer.base_width=16", "weights =shapes =lr"),
    "training.num_steps": ("training.num_steps=2", "loss checkpoints"),
    "training.batch_size": ("training.batch_size=4", "loss"),
    "training.grad_accumulation": ("training.grad_accumulation=2", "loss"),
    "training.ema_decay": ("training.ema_decay=0", "average =weights scores"),
    "training.ema": ("training.ema=power", "average =weights scores"),
    "training.ema_sigma_rel": ("training.ema=power; training.ema_sigma_rel=[0.2, 0.1]", "average =weights scores"),
    "training.ema_every": ("training.ema_every=2", "average =weights scores"),
    "training.packing": ("training.packing=true", "weights"),
    "training.precision": ("training.precision=bf16", "loss weights =shapes"),
    "training.recompute": ("training.recompute=full", "=loss"),
    "training.max_bad_steps": ("training.max_bad_steps=0", "=loss =weights"),
    "training.async_checkpoint": ("training.async_checkpoint=true", "=weights =average =checkpoints =scores"),
    "training.log_every": ("training.log_every=2", "loss =weights"),
    "training.validate_every": ("training.validate_every=1", "validation =weights"),
    "training.sample_every": ("training.sample_every=2", "samples =weights"),
    "training.checkpoint_every": ("training.checkpoint_every=1", "checkpoints =weights"),
    "training.keep_checkpoints": ("training.checkpoint_every=1; training.keep_checkpoints=1", "=checkpoints"),
    "sampling.prompts": ("sampling.prompts=['a star']", "grid =weights"),
    "sampling.solver": ("sampling.solver=heun", "grid scores =weights"),
    "sampling.num_steps": ("sampling.num_steps=5", "grid scores =weights"),
    "sampling.guidance": ("sampling.guidance=9", "grid scores =weights"),
    "sampling.interval": ("sampling.interval=[0.0, 0.1]", "grid scores =weights"),
    "sampling.seed": ("sampling.seed=3", "grid =weights"),
    "evaluation.validation_samples": ("evaluation.validation_samples=2", "scores =weights"),
    "evaluation.validation_times": ("evaluation.validation_times=3", "scores validation =weights"),
    "evaluation.prompts_per_question": ("evaluation.prompts_per_question=1", "scores grid =weights"),
    "evaluation.batch_size": ("evaluation.batch_size=3", "scores =weights"),
    "evaluation.seed": ("evaluation.seed=4", "scores =weights"),
}
MIXED = {
    "weights": "separate",
    "time": "image",
    "attention": "causal",
    "image_weight": "1",
    "caption_first": "0",
    "image_first_cap": "1",
    "z_loss": "0.1",
    "codec": "unet",
    "size_tokens": "4",
}
ELSEWHERE = {
    "objective.name": "tests/training/test_own.py",
    "name": "tests/training/test_trainer.py",
    "training.out": "every test of a run",
    **{f"transfusion.{name}": "MIXED" for name in MIXED},
    **dict.fromkeys(
        [f"transfusion.{key}" for key in ["enabled", "text", "text_fraction", "text_length", "codec_width"]],
        "tests/training/test_transfusion_runs.py",
    ),
    "transfusion.max_tokens": "tests/training/test_setup.py",
    "training.attention": "tests/training/test_setup.py",
    "init": "tests/training/test_start.py",
    **{f"lora.{name}": "tests/training/test_start.py" for name in ("rank", "alpha", "targets")},
    "transfusion.freeze_text": "tests/training/test_start.py",
    "text.encoder": "tests/training/test_frozen_text.py",
    "training.recompute_every": "tests/training/test_sharding.py",
    **{f"parallel.{name}": "tests/training/test_distributed.py" for name in ("strategy", "shard_size", "reshard")},
    **{f"parallel.{name}": "tests/training/test_sharding.py" for name in ("cpu_offload", "timeout")},
    "training.ema_snapshot_every": "tests/training/test_ema.py",
    "training.ema_snapshot_dtype": "tests/training/test_ema.py",
    "data.posterior": "tests/training/test_cached.py",
    **{f"data.{name}": "tests/training/test_buckets.py" for name in ("buckets", "bucket_ratio", "crop", "flip")},
    **{f"data.{name}": "tests/training/test_captions.py" for name in ("captions", "min_caption", "max_caption")},
    **{f"data.{name}": "tests/training/test_captions.py" for name in ("min_side", "max_aspect")},
    **{f"data.{name}": "tests/training/test_remote.py" for name in ("timeout", "retries")},
    "data.shuffle_buffer": "tests/training/test_stream.py",
    "training.compile": "tests/training/test_trainer.py",
    "training.peak_tflops": "tests/training/test_telemetry.py",
    "training.profile": "tests/training/test_telemetry.py",
    "training.wandb": "tests/training/test_telemetry.py",
    **dict.fromkeys(
        [f"evaluation.{key}" for key in ["metrics", "metrics_every", "features", "clip", "reference"]]
        + [f"evaluation.{key}" for key in ["num_reference", "num_images", "cache"]],
        "tests/training/test_quality.py",
    ),
    "training.device": "tests/training/test_trainer.py",
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return traces(tmp_path_factory.mktemp("plain") / "run")


@pytest.mark.parametrize("name", MIXED)
def test_a_setting_of_transfusion_changes_what_it_should(name, mixed, tmp_path):
    run = training.train(config_for(tmp_path / "run", *TRANSFUSION, f"transfusion.{name}={MIXED[name]}"))
    assert metrics(run, "loss") != metrics(mixed, "loss")


def test_every_setting_is_tested():
    keys = {doc.key for doc in field_docs(training.TrainConfig)}
    assert keys == SETTINGS.keys() | ELSEWHERE.keys()


@pytest.mark.parametrize("key", SETTINGS)
def test_a_setting_changes_what_it_should(key, plain, material, tmp_path, monkeypatch):
    monkeypatch.setattr(training.evaluate, "loss_plot", lambda run, path: None)
    settings, names = SETTINGS[key]
    changed = traces(tmp_path / "run", *settings.format(**material).split("; "))
    for name in names.split():
        if name.startswith("="):
            assert changed[name[1:]] == plain[name[1:]], name
        else:
            assert changed[name] != plain[name], name
