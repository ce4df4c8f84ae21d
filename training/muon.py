"""Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon): orthogonalised momentum, on any number of
processes.

A matrix can be orthogonalised only as a whole, so one of the processes that hold it owns it. In a `Team`, process
(c, s) has shard s of the rows of every weight, in replica c: DDP is (n, 1), FSDP2 (1, n), HSDP has several of both. For
each chunk of weights (as many as fit into memory at a time)

    rows of an update  --all-to-all-->  its owner: Newton-Schulz  --all-to-all-->  rows  --all-gather-->  other replicas

so that with N shards, of matrices of M numbers in all, a process sends M / N to owners and as many back, and gathers
M / N from the other replicas. Several processes exchange numbers in the type of the matrix products; one process alone
rounds to it only once the matrix is normalised.

Letters: C replicas, S shards, m x n a matrix.
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

# (a, b, c) of each round. a x + b x^3 + c x^5 is the best approximation of 1 on the interval that the rounds before map
# singular values in [0.002, 1] to, widened by 1 % (Amsel et al. 2025, arXiv 2505.16932). Four map them to [0.67, 1.33].
ROUNDS = (
    (8.344204, -24.206055, 17.597537),
    (4.073998, -2.971761, 0.547483),
    (3.692357, -2.70853, 0.518506),
    (2.787833, -2.044984, 0.446334),
)
MATCH_RMS = 0.2  # of AdamW's usual updates (Liu et al. 2025, arXiv 2502.16982, section 2.2)
CHUNK = 2**26  # numbers that each process orthogonalises at a time: 0.27 GB in fp32


class Muon(torch.optim.AdamW):
    """AdamW, but for groups with `"muon": True`: there the step is the orthogonalised momentum.

        m = b m + (1 - b) g       u = U V^T of the SVD of (1 - b) g + b m       w = (1 - lr wd) w - 0.2 lr sqrt(side) u

    with `side` the longer one (Nesterov's momentum as in Jordan et al. 2024; the scale of Liu et al. 2025, arXiv
    2502.16982, which makes AdamW's rate fit). U V^T is found by four Newton-Schulz rounds, for all matrices of one
    shape at a time. A matrix that stacks several square ones (queries, keys and values; modulations) counts as those.

    replicas: the process group that holds the same weights and gradients, and shares the work. For sharded weights it
    is not needed: their mesh has it.
    """

    def __init__(
        self,
        groups: list[dict],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        momentum: float = 0.95,
        replicas: Any = None,
    ) -> None:
        super().__init__(groups, lr=lr, betas=betas, eps=eps, fused=True)
        self.momentum, self.replicas = momentum, replicas

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient; all processes must have gradients for the same ones."""
        groups = self.param_groups
        try:
            self.param_groups = [group for group in groups if not group.get("muon")]
            super().step()
        finally:
            self.param_groups = groups
        weights = [(w, g) for g in groups if g.get("muon") for w in g["params"] if w.grad is not None]
        if weights:
            team = team_of(weights[0][0], self.replicas)
            for chunk in _chunks(weights, CHUNK * team.replicas.size * team.shards.size):
                self._update(chunk, team)

    def _update(self, chunk: list[tuple[Tensor, dict]], team: Team) -> None:
        """Update some weights, given with their groups, in one exchange between the processes."""
        for w, _ in chunk:
            if not self.state[w]:
                self.state[w]["momentum"] = torch.zeros_like(w)
        weights, momenta = [local(w) for w, _ in chunk], [local(self.state[w]["momentum"]) for w, _ in chunk]
        gradients = [local(w.grad) for w, _ in chunk if w.grad is not None]
        torch._foreach_lerp_(momenta, gradients, 1 - self.momentum)
        torch._foreach_mul_(weights, [1 - group["lr"] * group["weight_decay"] for _, group in chunk])
        work = Work(assign_owners([m for i, (w, _) in enumerate(chunk) for m in matrices(i, *w.shape)], team), team)
        own = work.local_rows(team.replicas.place)
        now, before = ([x[m.weight][first:last] for m, first, last in own] for x in (gradients, momenta))
        updates = torch._foreach_lerp(now, before, self.momentum) if own else ()
        dtype = weights[0].dtype if team.is_one else products(team.device)
        steps = iter(work.orthogonalised(updates, dtype))
        for replica in range(team.replicas.size):
            for m, first, last in work.local_rows(replica):
                rows = weights[m.weight][first:last]
                rows.add_(next(steps).view_as(rows).to(rows).mul_(-chunk[m.weight][1]["lr"] * m.scale))


def _chunks(weights: list[tuple[Tensor, dict]], most: int) -> Iterator[list[tuple[Tensor, dict]]]:
    """The weights in order, as many at a time as have `most` numbers together; at least one."""
    chunk: list[tuple[Tensor, dict]] = []
    left = most
    for one in weights:
        left -= one[0].numel()
        if chunk and left < 0:
            yield chunk
            chunk, left = [], most - one[0].numel()
        chunk.append(one)
    yield chunk


class Matrix(NamedTuple):
    """Rows `start` to `end` of the `total` rows of a weight, which is number `weight` of a chunk."""

    weight: int
    total: int
    start: int
    end: int
    columns: int

    @property
    def scale(self) -> float:
        """The factor that gives its step the RMS of AdamW's."""
        return MATCH_RMS * math.sqrt(max(self.end - self.start, self.columns))

    @property
    def cost(self) -> int:
        """Multiplications of a Newton-Schulz round: those of x x^T, s s, and s x."""
        short, long = sorted((self.end - self.start, self.columns))
        return short * short * (2 * long + short)

    def rows(self, shard: int, shards: int) -> tuple[int, int]:
        """(first, last) row of the matrix in a shard of the weight, counted there; FSDP2 cuts as torch.chunk does."""
        size = -(-self.total // shards)
        first, last = (min(max(row - shard * size, 0), size) for row in (self.start, self.end))
        return first, last

    def numel(self, shard: int, shards: int) -> int:
        """How many of its numbers that shard has."""
        first, last = self.rows(shard, shards)
        return (last - first) * self.columns


def matrices(weight: int, rows: int, columns: int) -> list[Matrix]:
    """The square matrices that a weight of 2, 3, 6 or 9 D x D stacks, else the weight as one (so an MLP's 4 D x D)."""
    each = columns if rows in (2 * columns, 3 * columns, 6 * columns, 9 * columns) else rows
    return [Matrix(weight, rows, start, start + each, columns) for start in range(0, rows, each)]


class Axis(NamedTuple):
    """One axis of the mesh of processes: the group along it, its size, and this process's place in it."""

    group: Any = None
    size: int = 1
    place: int = 0

    @classmethod
    def of(cls, group: Any) -> Axis:
        return cls() if group is None else cls(group, dist.get_world_size(group), dist.get_rank(group))


class Team(NamedTuple):
    """The processes that share the work, this one's place among them, and the device that it computes on."""

    replicas: Axis
    shards: Axis
    device: torch.device

    @property
    def is_one(self) -> bool:
        """Whether there is one process alone."""
        return self.replicas.size == self.shards.size == 1


def team_of(weight: Tensor, replicas: Any) -> Team:
    """The processes of a sharded weight's mesh; of any other weight, the group `replicas`."""
    mesh: Any = getattr(weight, "device_mesh", None)
    if mesh is None:
        return Team(Axis.of(replicas), Axis(), weight.device)
    groups = [mesh.get_group(k) for k in range(mesh.ndim)]
    return Team(Axis.of(groups[0] if len(groups) == 2 else None), Axis.of(groups[-1]), torch.device(mesh.device_type))


def assign_owners(jobs: list[Matrix], team: Team) -> list[list[list[Matrix]]]:
    """The matrices that each process (c, s) owns, [c][s]: the costliest first, to who has least to do (Graham 1969)."""
    owned: list[list[list[Matrix]]] = [[[] for _ in range(team.shards.size)] for _ in range(team.replicas.size)]
    loads = [(0, s, c) for s in range(team.shards.size) for c in range(team.replicas.size)]
    for job in sorted(jobs, key=lambda job: -job.cost):
        load, s, c = loads[0]
        owned[c][s].append(job)
        heapq.heapreplace(loads, (load + job.cost, s, c))
    return owned


class Work(NamedTuple):
    """The matrices of a chunk by their owners, [c][s], and the exchange that brings each together at its owner."""

    owned: list[list[list[Matrix]]]
    team: Team

    def local_rows(self, replica: int) -> list[tuple[Matrix, int, int]]:
        """(matrix, first row, last row) here, of each matrix that the processes (replica, 0), (replica, 1), ... own."""
        _, shards, place = self.team.shards
        return [(m, *m.rows(place, shards)) for owner in self.owned[replica] for m in owner]

    def orthogonalised(self, updates: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
        """This process's rows of every orthogonalised matrix, flat, in the order of `local_rows` of replica 0, 1, ...

        updates: this process's rows of the matrices that its own replica owns.
        """
        replicas, shards, device = self.team
        owners = self.owned[replicas.place]
        mine = owners[shards.place]
        sizes = [[m.numel(s, shards.size) for m in mine] for s in range(shards.size)]  # of my matrices in each shard
        send = [sum(m.numel(shards.place, shards.size) for m in owner) for owner in owners]
        receive = [sum(row) for row in sizes]
        # The rows go to their owners, which put each matrix together ...
        received = _all_to_all(_packed(updates, dtype, device), send, receive, shards)
        rows = received.split([n for row in sizes for n in row])  # shard after shard, of each matrix after matrix
        whole = [torch.cat(rows[k :: len(mine)]).view(-1, m.columns) for k, m in enumerate(mine)]
        # ... and send its rows back to where they came from.
        cut = [x.flatten().split([row[k] for row in sizes]) for k, x in enumerate(_orthogonalised(whole))]
        answers = [x[s] for s in range(shards.size) for x in cut]
        returned = _all_to_all(_packed(answers, dtype, device), receive, send, shards)
        # What other replicas own comes from the process in the same place there.
        numels = [[(last - first) * m.columns for m, first, last in self.local_rows(c)] for c in range(replicas.size)]
        gathered = _all_gather(returned, [sum(n) for n in numels], replicas)
        return [step for x, n in zip(gathered, numels, strict=True) for step in x.split(n)]


def _packed(pieces: Sequence[Tensor], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The numbers of all pieces in one flat tensor."""
    buffer = torch.empty(sum(x.numel() for x in pieces), dtype=dtype, device=device)
    if pieces:
        torch._foreach_copy_(list(buffer.split([x.numel() for x in pieces])), [x.flatten() for x in pieces])
    return buffer


def _all_to_all(x: Tensor, send: list[int], receive: list[int], axis: Axis) -> Tensor:
    """The flat tensor that the processes of an axis send to this one; send, receive: numbers to and from each."""
    if axis.size == 1:
        return x
    found = x.new_empty(sum(receive))
    dist.all_to_all_single(found, x, receive, send, group=axis.group)
    return found


def _all_gather(x: Tensor, sizes: list[int], axis: Axis) -> list[Tensor]:
    """The flat tensors of all processes of an axis, which have these sizes."""
    if axis.size == 1:
        return [x]
    most = max(sizes)  # the work is even, so the sizes nearly are: at most 4 / 3 with D x D and 4 D x D
    found = x.new_empty(axis.size * most)
    gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # newer versions rename it
    if most:
        gather(found, torch.nn.functional.pad(x, (0, most - x.numel())), group=axis.group)
    return [found[k * most : k * most + size] for k, size in enumerate(sizes)]


def _orthogonalised(whole: list[Tensor]) -> list[Tensor]:
    """Each matrix orthogonalised; those of one shape are computed together."""
    by_shape: dict[torch.Size, list[int]] = defaultdict(list)
    for k, x in enumerate(whole):
        by_shape[x.shape].append(k)
    made = list(whole)
    for same in by_shape.values():
        for k, x in zip(same, newton_schulz(torch.stack([whole[k] for k in same])), strict=True):
            made[k] = x
    return made


def newton_schulz(matrices: Tensor) -> Tensor:
    """About U V^T of the singular value decompositions of matrices (n, rows, columns): singular values above 0.002 of
    the Frobenius norm become 0.67 to 1.33, smaller ones are multiplied by up to 350.

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
    """The type of the matrix products."""
    return torch.bfloat16 if multiplies_bf16(device) else torch.float32
