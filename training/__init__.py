"""Training of text-to-image models: data, objectives, the trainer and its run folder, evaluation.

    import training
    run = training.train(training.load_config("demo", ["training.num_steps=200"]))

Names are imported when first used, so that `import training` is quick.
"""

from importlib import import_module
from typing import Any

_WHERE = {
    "training.config": ("TrainConfig", "load_config", "to_toml"),
    "training.presets": ("preset", "preset_names"),
    "training.launch": ("train", "resume"),
    "training.trainer": ("Trainer",),
    "training.evaluate": ("evaluate_run", "validation_loss"),
    "training.objectives": ("FlowMatching", "TextAndImages", "Batch", "Loss"),
    "training.time_density": ("Uniform", "LogitNormal", "Mode", "CosMap", "make_time_density"),
    "training.shapes": ("ShapesWorld",),
    "training.shapes_eval": ("ShapesEval",),
    "training.order": ("Layout",),
    "training.data": ("open_source", "split_by_key", "loader", "Source", "Sample"),
    "training.autoencoder": ("AutoencoderTrainConfig", "train_autoencoder"),
}
_MODULES = {name: module for module, names in _WHERE.items() for name in names}
__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'training' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
