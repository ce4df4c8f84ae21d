"""Ready-made configs: each is a function that says what it is for and returns a `TrainConfig`."""

from collections.abc import Callable
from dataclasses import replace

from training.config import (
    ConfigError,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    SamplingConfig,
    TextConfig,
    TrainConfig,
    TrainingConfig,
    TransfusionConfig,
)
from training.settings import suggestion


def demo() -> TrainConfig:
    """64x64 pictures of the drawn world, from scratch, in a quarter of an hour on two CPU cores with AVX-512."""
    return TrainConfig(
        name="demo",
        autoencoder="shapes",
        data=DataConfig(source="shapes", num_samples=24_000, image_size=64),
        # One token for each 8x8 pixels, and a narrow model: many quick steps learn more here than few of a larger one.
        model=ModelConfig(depth=4, num_heads=2, head_dim=64, patch_size=1, pos_embed_max_size=32),
        text=TextConfig(vocab_size=512, max_length=17, width=128, depth=2, num_heads=4),
        # Towards noise: layout and shape are settled at t = 0.6 to 0.9; below, little is left to learn from captions.
        objective=ObjectiveConfig(time_density="logit-normal", m=0.3, s=1.0, shift=1.7),
        optimizer=OptimizerConfig(name="muon", lr=5e-3, warmup_steps=50, schedule="cosine", final_lr_fraction=0.02),
        training=TrainingConfig(
            num_steps=5400,
            batch_size=32,
            ema_decay=0.995,
            validate_every=2000,
            sample_every=2000,
            checkpoint_every=2000,
        ),
        # 29 network evaluations a picture. Where guidance starts at once, pictures of few objects come out empty.
        sampling=SamplingConfig(num_steps=16, guidance=3.0, interval=(0.0, 0.9)),
        evaluation=EvaluationConfig(prompts_per_question=100),
    )


def transfusion_demo() -> TrainConfig:
    """The drawn world in one trunk that draws captions and describes pictures, in half an hour on two CPU cores."""
    return replace(
        demo(),
        name="transfusion-demo",
        model=ModelConfig(depth=4, num_heads=2, head_dim=64, patch_size=1, positions="both", pos_embed_max_size=32),
        text=TextConfig(vocab_size=512, max_length=17),
        transfusion=TransfusionConfig(enabled=True, weights="separate", time="image"),
        training=replace(demo().training, num_steps=8000),
    )


def latent() -> TrainConfig:
    """Your own images (`--data`), 64 to 256 pixels, as latents of an autoencoder that you train first on them."""
    return TrainConfig(
        name="latent",
        autoencoder="shapes",
        data=DataConfig(source="", num_workers=2),
        model=ModelConfig(depth=12, num_heads=6, head_dim=64, patch_size=2, pos_embed_max_size=64),
        text=TextConfig(vocab_size=4096, max_length=64, width=256, depth=2, num_heads=4),
        optimizer=OptimizerConfig(lr=3e-4, warmup_steps=500, schedule="cosine", final_lr_fraction=0.05),
        training=TrainingConfig(num_steps=50_000, batch_size=64, ema_decay=0.999),
    )


def pixels_tiny() -> TrainConfig:
    """A few steps on 32x32 pixels without an autoencoder: tests in seconds that all works, and learns nothing."""
    return TrainConfig(
        name="pixels-tiny",
        data=DataConfig(source="shapes", num_samples=64, image_size=32, held_out=0.125),
        model=ModelConfig(depth=2, num_heads=2, head_dim=16, patch_size=8, pos_embed_max_size=8),
        text=TextConfig(vocab_size=300, max_length=32, width=32, depth=1, num_heads=2),
        optimizer=OptimizerConfig(lr=1e-3, warmup_steps=2),
        training=TrainingConfig(
            num_steps=6,
            batch_size=8,
            ema_decay=0.9,
            compile="off",
            log_every=1,
            validate_every=3,
            sample_every=3,
            checkpoint_every=3,
        ),
        sampling=SamplingConfig(num_steps=2, guidance=2.0),
        evaluation=EvaluationConfig(validation_samples=8, validation_times=2, prompts_per_question=1, batch_size=8),
    )


PRESETS: dict[str, Callable[[], TrainConfig]] = {
    "demo": demo,
    "transfusion-demo": transfusion_demo,
    "latent": latent,
    "pixels-tiny": pixels_tiny,
}


def preset(name: str) -> TrainConfig:
    """The preset of that name (see `preset_names`). Raises ConfigError for another name."""
    if name not in PRESETS:
        raise ConfigError(
            f'there is no preset "{name}"{suggestion(name, PRESETS) or "; there are " + ", ".join(PRESETS)}'
        )
    return PRESETS[name]()


def preset_names() -> list[str]:
    """Names that `preset` takes."""
    return list(PRESETS)
