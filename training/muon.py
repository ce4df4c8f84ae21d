"""Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon): momentum, made orthogonal; by many processes.

A matrix can be made orthogonal only as a whole, so each one has an owner among the processes that hold it. In `Team`
process (c, s) holds part s of the rows of every weight, as the processes (0, s), (1, s), ... do: copies alone (DDP) are
(n, 1), parts alone (FSDP2) (1, n), both HSDP. Of a turn, which is as many weights as fit into memory at a time,

    parts of an update  --all-to-all-->  its owner: Newton-Schulz  --all-to-all-->  parts  --all-gather-->  copies

so that a process sends M / N numbers to owners and as many back, of M in all matrices and N parts, and gathers M / N
from the other copies. Numbers go in the type that they are multiplied in; one process alone rounds them to it only when
it has scaled them.

C copies, S parts, m x n a matrix.
"""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from training.devices import multiplies_bf16
from training.sharding import local

# Of each round the a x + b x^3 + c x^5 that is nearest to 1 on the interval to which the rounds before bring singular
# values of [0.002, 1], and 1 % over (Amsel et al. 2025, arXiv 2505.16932). Four bring them to 0.67 to 1.33.
ROUNDS = (
    (8.344204, -24.206055, 17.597537),
    (4.073998, -2.971761, 0.547483),
    (3.692357, -2.70853, 0.518506),
    (2.787833, -2.044984, 0.446334),
)
MATCH_RMS = 0.2  # of AdamW's usual updates (Liu et al. 2025, arXiv 2502.16982, section 2.2)
TURN = 2**26  # numbers that each process makes orthogonal at a time: 0.27 GB in fp32


class Muon(torch.optim.AdamW):
    """AdamW, but for groups with `"muon": True`: there the step is the momentum, made orthogonal.

        m = b m + (1 - b) g       u = U V^T of the SVD of (1 - b) g + b m       w = (1 - lr wd) w - 0.2 lr sqrt(side) u

    with `side` the longer one (Nesterov's momentum as in Jordan et al. 2024; the scale of Liu et al. 2025, arXiv
    2502.16982, which makes AdamW's rate fit). U V^T is found by four Newton-Schulz rounds, for all matrices of one
    shape at a time. A matrix that stacks several square ones (queries, keys and values; modulations) counts as those.

    copies: the group of processes that hold the same weights and gradients, and share out the work. Of weights in parts
    their mesh says which these are.
    """

    def __init__(
        self,
        groups: list[dict],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        momentum: float = 0.95,
        copies: Any = None,
    ) -> None:
        super().__init__(groups, lr=lr, betas=betas, eps=eps, fused=True)
        self.momentum, self.copies = momentum, copies

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient; which ones have is the same in all processes."""
        groups = self.param_groups
        try:
            self.param_groups = [group for group in groups if not group.get("muon")]
            super().step()
        finally:
            self.param_groups = groups
        told = [(w, g) for g in groups if g.get("muon") for w in g["params"] if w.grad is not None]
        if told:
            team = team_of(told[0][0], self.copies)
            for turn in _turns(told, TURN * team.copies.size * team.parts.size):
                self._turn(turn, team)

    def _turn(self, told: list[tuple[Tensor, dict]], team: Team) -> None:
        for w, _ in told:
            if not self.state[w]:
                self.state[w]["momentum"] = torch.zeros_like(w)
        weights, momenta = [local(w) for w, _ in told], [local(self.state[w]["momentum"]) for w, _ in told]
        gradients = [local(w.grad) for w, _ in told if w.grad is not None]
        torch._foreach_lerp_(momenta, gradients, 1 - self.momentum)
        torch._foreach_mul_(weights, [1 - group["lr"] * group["weight_decay"] for _, group in told])
        work = Work(share_out([m for i, (w, _) in enumerate(told) for m in matrices(i, *w.shape)], team), team)
        own = work.pieces(team.copies.place)
        now, before = ([x[m.weight][first:last] for m, first, last in own] for x in (gradients, momenta))
        updates = torch._foreach_lerp(now, before, self.momentum) if own else ()
        moves = iter(work.orthogonal(updates, weights[0].dtype if team.is_one else products(team.device)))
        for m, first, last in (piece for copy in range(team.copies.size) for piece in work.pieces(copy)):
            rows = weights[m.weight][first:last]
            rows.add_(next(moves).view_as(rows).to(rows).mul_(-told[m.weight][1]["lr"] * m.scale))


def _turns(told: list[tuple[Tensor, dict]], most: int) -> Iterator[list[tuple[Tensor, dict]]]:
    """The weights, in order, as many at a time as have `most` numbers; at least one."""
    turn: list[tuple[Tensor, dict]] = []
    left = most
    for one in told:
        left -= one[0].numel()
        if turn and left < 0:
            yield turn
            turn, left = [], most - one[0].numel()
        turn.append(one)
    yield turn


class Matrix(NamedTuple):
    """Rows `start` to `end`, of the `total` rows of weight number `weight` of a turn."""

    weight: int
    total: int
    start: int
    end: int
    columns: int

    @property
    def scale(self) -> float:
        """What makes the size of its step that of AdamW's."""
        return MATCH_RMS * math.sqrt(max(self.end - self.start, self.columns))

    @property
    def cost(self) -> int:
        """Multiplications of a Newton-Schulz round: those of x x^T, s s, and s x."""
        short, long = sorted((self.end - self.start, self.columns))
        return short * short * (2 * long + short)

    def rows(self, part: int, parts: int) -> tuple[int, int]:
        """Its rows that part `part` of the weight has, counted within that; FSDP2 cuts as torch.chunk does."""
        size = -(-self.total // parts)
        first, last = (min(max(row - part * size, 0), size) for row in (self.start, self.end))
        return first, last

    def numel(self, part: int, parts: int) -> int:
        """Its numbers in that part."""
        first, last = self.rows(part, parts)
        return (last - first) * self.columns


def matrices(weight: int, rows: int, columns: int) -> list[Matrix]:
    """The square matrices that a tall one of whole multiples stacks, or itself; an MLP's 4 D x D is one."""
    each = columns if rows in (2 * columns, 3 * columns, 6 * columns, 9 * columns) else rows
    return [Matrix(weight, rows, start, start + each, columns) for start in range(0, rows, each)]


class Axis(NamedTuple):
    """One direction of the processes: their group, how many there are, and which of them this one is."""

    group: Any = None
    size: int = 1
    place: int = 0

    @classmethod
    def of(cls, group: Any) -> Axis:
        return cls() if group is None else cls(group, dist.get_world_size(group), dist.get_rank(group))


class Team(NamedTuple):
    """Processes that share the work, where this one stands among them, and the device that it computes on."""

    copies: Axis
    parts: Axis
    device: torch.device

    @property
    def is_one(self) -> bool:
        """Whether there is but one process."""
        return self.copies.size == self.parts.size == 1


def team_of(weight: Tensor, copies: Any) -> Team:
    """Those that a weight in parts says, else the group `copies`, which has it whole."""
    mesh: Any = getattr(weight, "device_mesh", None)
    if mesh is None:
        return Team(Axis.of(copies), Axis(), weight.device)
    groups = [mesh.get_group(k) for k in range(mesh.ndim)]
    return Team(Axis.of(groups[0] if len(groups) == 2 else None), Axis.of(groups[-1]), torch.device(mesh.device_type))


def share_out(jobs: list[Matrix], team: Team) -> list[list[list[Matrix]]]:
    """What each process (c, s) owns, [c][s]: the dearest job first, to the one that has least to do (Graham 1969)."""
    owned: list[list[list[Matrix]]] = [[[] for _ in range(team.parts.size)] for _ in range(team.copies.size)]
    loads = [(0, s, c) for s in range(team.parts.size) for c in range(team.copies.size)]
    for job in sorted(jobs, key=lambda job: -job.cost):
        load, s, c = loads[0]
        owned[c][s].append(job)
        heapq.heapreplace(loads, (load + job.cost, s, c))
    return owned


class Work(NamedTuple):
    """A turn's matrices by their owners, [c][s], and how they come together there."""

    owned: list[list[list[Matrix]]]
    team: Team

    def pieces(self, copy: int) -> list[tuple[Matrix, int, int]]:
        """(matrix, first row, last row) of what this process has of each, by owners (copy, 0), (copy, 1), ..."""
        _, parts, place = self.team.parts
        return [(m, *m.rows(place, parts)) for owner in self.owned[copy] for m in owner]

    def orthogonal(self, updates: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
        """What this process has of each matrix, of all copies' `pieces`, made orthogonal as a whole; flat.

        updates: what it has of those that its own copy's processes own.
        """
        copies, parts, device = self.team
        mine = self.owned[copies.place][parts.place]
        sizes = [[m.numel(s, parts.size) for m in mine] for s in range(parts.size)]
        given = [sum(m.numel(parts.place, parts.size) for m in owner) for owner in self.owned[copies.place]]
        taken = [sum(those) for those in sizes]
        came = _exchanged(_packed(updates, dtype, device), given, taken, parts).split([n for x in sizes for n in x])
        whole = [torch.cat(came[k :: len(mine)]).view(-1, m.columns) for k, m in enumerate(mine)]
        cut = [x.flatten().split([of[k] for of in sizes]) for k, x in enumerate(_orthogonal(whole))]
        moves = _exchanged(_packed([x[s] for s in range(parts.size) for x in cut], dtype, device), taken, given, parts)
        numbers = [[(last - first) * m.columns for m, first, last in self.pieces(c)] for c in range(copies.size)]
        gathered = _gathered(moves, [sum(n) for n in numbers], copies)
        return [move for x, n in zip(gathered, numbers, strict=True) for move in x.split(n)]


def _packed(pieces: Sequence[Tensor], dtype: torch.dtype, device: torch.device) -> Tensor:
    """All numbers of the pieces, one after the other."""
    buffer = torch.empty(sum(x.numel() for x in pieces), dtype=dtype, device=device)
    if pieces:
        torch._foreach_copy_(list(buffer.split([x.numel() for x in pieces])), [x.flatten() for x in pieces])
    return buffer


def _exchanged(x: Tensor, given: list[int], taken: list[int], axis: Axis) -> Tensor:
    """What each process has for this one, for what this one has for each: so many numbers of each."""
    if axis.size == 1:
        return x
    found = x.new_empty(sum(taken))
    dist.all_to_all_single(found, x, taken, given, group=axis.group)
    return found


def _gathered(x: Tensor, sizes: list[int], axis: Axis) -> list[Tensor]:
    """What each process has, which is of these sizes."""
    if axis.size == 1:
        return [x]
    most = max(sizes)  # work is shared out evenly, so sizes nearly are: by 4 / 3 at most of D x D and 4 D x D
    found = x.new_empty(axis.size * most)
    gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # the name that it has of late
    if most:
        gather(found, torch.nn.functional.pad(x, (0, most - x.numel())), group=axis.group)
    return [found[k * most : k * most + size] for k, size in enumerate(sizes)]


def _orthogonal(whole: list[Tensor]) -> list[Tensor]:
    """Each made orthogonal, all of one shape at a time."""
    by_shape: dict[torch.Size, list[int]] = defaultdict(list)
    for k, x in enumerate(whole):
        by_shape[x.shape].append(k)
    made = list(whole)
    for same in by_shape.values():
        for k, x in zip(same, newton_schulz(torch.stack([whole[k] for k in same])), strict=True):
            made[k] = x
    return made


def newton_schulz(matrices: Tensor) -> Tensor:
    """Nearly U V^T of the singular value decompositions of matrices (n, rows, columns): of the Frobenius norm, singular
    values from 0.002 on become 0.67 to 1.33, smaller ones are multiplied by up to 350.

    Computed in bf16 where the hardware multiplies it; the rounding is far below that range.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (torch.linalg.matrix_norm(x, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32)) + 1e-7)
    x = x.to(products(x.device)).contiguous()
    for a, b, c in ROUNDS:
        s = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(s, s, s, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def products(device: torch.device) -> torch.dtype:
    """The type that matrices are multiplied in."""
    return torch.bfloat16 if multiplies_bf16(device) else torch.float32
