"""The rows of a batch that a process computes; the batch itself does not depend on the number of processes.

A batch is cut into `parts` equal parts (gradient accumulation), and each part into one equal piece for each of `world`
processes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

from training.settings import ConfigError

T = TypeVar("T")


@dataclass(frozen=True)
class Share:
    """The pieces of process `rank`: in each of `parts` parts of a batch, the rank-th of `world` pieces."""

    rank: int = 0
    world: int = 1
    parts: int = 1

    def rows(self, num: int) -> list[int]:
        """This process's rows in a batch of `num`, part after part."""
        size = num // (self.parts * self.world)
        firsts = ((part * self.world + self.rank) * size for part in range(self.parts))
        return [first + row for first in firsts for row in range(size)]

    def of(self, part: T) -> T:
        """This process's piece of a tensor or list that has a row for every sample of a part."""
        rows: Any = part
        size = len(rows) // self.world
        return rows[self.rank * size : (self.rank + 1) * size]

    def check(self, name: str, num: int) -> None:
        """Raises ConfigError where a batch of `num` cannot be cut into equal pieces; `name` says what `num` is."""
        pieces = self.parts * self.world
        if num % pieces:
            near = " or ".join(str(n) for n in (num - num % pieces, num + -num % pieces) if n)
            raise ConfigError(
                f"{name} is {num}, expected a multiple of training.grad_accumulation = {self.parts} times "
                f"{self.world} processes: {near}"
            )


WHOLE = Share()
