"""Random numbers as a pure function of counters: what happens at a step depends on (seed, step), never on what came
before.
"""

import numpy as np
import torch


def generator_for(seed: int, *counters: int) -> torch.Generator:
    """A CPU generator for (seed, counters...): equal arguments give equal draws, others independent ones."""
    # Not SeedSequence([seed, *counters]): trailing zeros do not count there, (0, 5) and (0, 5, 0) would be one.
    state = np.random.SeedSequence(seed, spawn_key=counters).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) & (2**63 - 1))
