"""Which rows of a batch a process takes, so that a batch is the same whatever the number of processes.

A batch of B rows is computed in `parts` equal parts (gradient accumulation), and each part by `world` processes in
equal pieces: row k of the run's batch stays row k, whoever computes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Share:
    """Of each of `parts` equal parts the `rank`-th of `world` equal pieces."""

    rank: int = 0
    world: int = 1
    parts: int = 1

    def rows(self, num: int) -> list[int]:
        """The rows of a batch of `num`, part after part."""
        size = num // (self.parts * self.world)
        firsts = ((part * self.world + self.rank) * size for part in range(self.parts))
        return [first + row for first in firsts for row in range(size)]

    def of(self, part: T) -> T:
        """This process's piece of what was drawn for a whole part."""
        rows: Any = part
        size = len(rows) // self.world
        return rows[self.rank * size : (self.rank + 1) * size]

    def check(self, name: str, num: int) -> None:
        """Raises ValueError where a batch of `num` cannot be cut into equal pieces."""
        pieces = self.parts * self.world
        if num % pieces:
            near = " or ".join(str(n) for n in (num - num % pieces, num + -num % pieces) if n)
            raise ValueError(
                f"{name} is {num}, expected a multiple of training.grad_accumulation = {self.parts} times "
                f"{self.world} processes: {near}"
            )


WHOLE = Share()
