"""The figure of docs/samplers.md: schedules in the plane of alpha and sigma, and trajectories on two of them.

python -m benchmarks.picture docs/samplers.png
"""

import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from samplers import Cosine, DiscreteVP, RectifiedFlow, VPLinear, sample
from tests.oracles import Mixture


def main(path: str) -> None:
    t = torch.linspace(0, 1, 201, dtype=torch.float64)
    schedules = {
        "rectified flow": RectifiedFlow(),
        "cosine": Cosine(),
        "VP": VPLinear(),
        "scaled linear": DiscreteVP.scaled_linear(),
    }
    figure, (plane, time, flow_path, vp_path) = plt.subplots(1, 4, figsize=(15, 3.6))
    for name, schedule in schedules.items():
        c = schedule(t)
        plane.plot(c.alpha, c.sigma, label=name)
        time.plot(t, schedule.log_snr(t).clamp(-14, 14), label=name)
    for log_snr in (-4.0, 0.0, 4.0):  # a ray of equal log-SNR meets every schedule's curve once
        slope = torch.exp(torch.tensor(-log_snr / 2)).item()
        plane.plot([0, min(1.0, 1 / slope)], [0, min(slope, 1.0)], color="0.8", linewidth=1)
    plane.set(xlabel="alpha", ylabel="sigma", title="paths; grey: equal log-SNR", aspect="equal")
    plane.legend(fontsize=7)
    time.set(xlabel="t", ylabel="log-SNR", title="log-SNR")
    data = Mixture(
        torch.tensor([0.5, 0.5], dtype=torch.float64),
        torch.tensor([[-1.0], [1.0]], dtype=torch.float64),
        torch.tensor([0.1, 0.1], dtype=torch.float64),
    )
    eps = torch.linspace(-2, 2, 12, dtype=torch.float64)[:, None]
    for axis, name in ((flow_path, "rectified flow"), (vp_path, "cosine")):
        field = data.field(RectifiedFlow()).on(schedules[name])
        out = sample(field, eps, "rk4", 100, trajectory=True)
        assert out.trajectory is not None
        axis.plot(out.ts, out.trajectory[..., 0], color="C0" if name == "rectified flow" else "C1", linewidth=1)
        axis.set(xlabel="t", ylabel="x_t", title=f"one model, seen as {name}")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main(sys.argv[1])
