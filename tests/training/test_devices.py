"""Devices and precisions by name."""

import pytest
import torch

from training.devices import pick_device, pick_precision


def test_devices(monkeypatch):
    for available, expected in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        assert pick_device("auto") == torch.device(expected)
        assert pick_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="no CUDA device: use cpu or auto"):
        pick_device("cuda")


@pytest.mark.parametrize("native", [True, False])
def test_precisions(monkeypatch, native):
    """Asked for, it is that; left to us, bf16 where the hardware has it."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: native)
    cpu = torch.device("cpu")
    assert pick_precision("fp32", cpu) == torch.float32
    assert pick_precision("bf16", cpu) == torch.bfloat16
    assert pick_precision("auto", cpu) == (torch.bfloat16 if native else torch.float32)
