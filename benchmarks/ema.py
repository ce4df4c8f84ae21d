"""The error of averages reconstructed after training (post-hoc EMA), by width and precision of the snapshots.

    python -m benchmarks.ema

The weights are a random walk of 4000 numbers over 2000 steps, with snapshots of the averages of sigma_rel 0.05 and 0.1
every 100 steps. Errors are relative: of the weights that the average gives to steps, and of the average itself.
"""

import numpy as np
import torch

from training.ema import mixture, power_of

STEPS, EVERY, KEPT = 2000, 100, (0.05, 0.1)
WIDTHS = (0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.25)


def weights(power: float, t: int) -> np.ndarray:
    """The weights that the average after t steps gives to all STEPS steps, (STEPS,)."""
    return np.diff((np.minimum(np.arange(STEPS + 1), t) / t) ** (power + 1))


def main() -> None:
    rng = np.random.default_rng(0)
    walk = np.cumsum(rng.normal(size=(STEPS, 4000)) * 0.002, 0) + rng.normal(size=4000) * 0.02
    kept = [(t, power_of(width)) for t in range(EVERY, STEPS + 1, EVERY) for width in KEPT]
    profiles = np.stack([weights(power, t) for t, power in kept])
    snapshots = torch.from_numpy(profiles @ walk)
    print("| sigma_rel | weights of steps | fp32 | fp16 | bf16 |\n|---|---|---|---|---|")
    for width in WIDTHS:
        factors, wanted = mixture(kept, (STEPS, power_of(width))), weights(power_of(width), STEPS)
        errors = [np.linalg.norm(factors @ profiles - wanted) / np.linalg.norm(wanted)]
        for kind in (torch.float32, torch.float16, torch.bfloat16):
            found = factors @ snapshots.to(kind).double().numpy()
            errors.append(np.linalg.norm(found - wanted @ walk) / np.linalg.norm(wanted @ walk))
        print(f"| {width} | " + " | ".join(f"{error:.2g}" for error in errors) + " |")


if __name__ == "__main__":
    main()
