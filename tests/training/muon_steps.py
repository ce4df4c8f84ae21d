"""Steps of Muon for tests/training/test_muon.py, in one of four processes: `python muon_steps.py`.

Prints, for each way to share weights out, the largest difference from steps of one process; the number of matrices that
this process made orthogonal in a step, and that of all of them.
"""

import json
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

import training.muon
from mmdit.weights_io import whole
from mmdit_cli.errors import end_at_once
from training.muon import Muon, matrices, newton_schulz

SHAPES = ((5, 7), (3, 9), (2, 2), (12, 4), (8, 8), (24, 4), (16, 4), (4, 16), (1, 6))
STEPS = 3


class Weights(nn.Module):
    """Matrices of SHAPES, and one more, which gets no gradient."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.all = nn.ParameterList(torch.randn(shape) for shape in (*SHAPES, (3, 3)))


def stepped(model: Weights, mesh: object = None, copies: object = None) -> tuple[list[Tensor], int]:
    """The weights after the steps, and how many matrices this process made orthogonal in each."""
    made: list[int] = []

    def counting(batch: Tensor) -> Tensor:
        made.append(len(batch))
        return newton_schulz(batch)

    weights = list(model.all)
    groups = [
        {"params": weights[:4], "muon": True, "lr": 0.1, "weight_decay": 0.3},
        {"params": weights[4:], "muon": True, "lr": 0.02, "weight_decay": 0.0},
    ]
    optimizer = Muon(groups, lr=1.0, betas=(0.9, 0.99), eps=1e-8, replicas=copies)
    generator = torch.Generator().manual_seed(1)
    with mock.patch("training.muon.newton_schulz", counting):
        for _ in range(STEPS):
            for w in weights[:-1]:
                gradient = torch.randn(w.shape, generator=generator)
                w.grad = distribute_tensor(gradient, mesh, w.placements, src_data_rank=None) if mesh else gradient
            optimizer.step()
    assert not optimizer.state[weights[-1]]
    return [whole(w).detach() for w in weights], sum(made) // STEPS


def main() -> None:
    torch.set_num_threads(1)
    training.muon.multiplies_bf16 = lambda device: False  # rounding there would hide what is compared
    dist.init_process_group("gloo")
    meshes = {
        "copies": None,
        "parts": init_device_mesh("cpu", (4,)),
        "both": init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")),
    }
    expected, count = stepped(Weights())
    assert count == sum(len(matrices(0, *shape)) for shape in SHAPES)
    found = {}
    for name, mesh in meshes.items():
        for turns, most in (("", 2**26), (" in turns", 10)):
            model = Weights() if mesh is None else fully_shard(Weights(), mesh=mesh)
            with mock.patch("training.muon.CHUNK", most):
                got, made = stepped(model, mesh, None if mesh else dist.group.WORLD)
            error = max(float((x - y).abs().max()) for x, y in zip(got, expected, strict=True))
            found[name + turns] = {"error": error, "made": made, "matrices": count}
    print(json.dumps(found), flush=True)
    dist.destroy_process_group()
    end_at_once(0)


if __name__ == "__main__":
    main()
