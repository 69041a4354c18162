"""Whole matrices out of the flat pieces that ranks hold, and back: for optimizers whose update is not element by element.

ZeRO cuts parameters wherever it likes. Here every matrix gets an owner among the ranks, to which the others send their
pieces of it; the owner computes; each rank gets back the elements that it holds. Who owns what is the same on every rank,
a function of who holds what:

| ZeRO | a rank holds | so it sends and gets, per step |
|---|---|---|
| 0 | everything | nothing to the owners; back, what others own: (1 - 1/W) of all elements on W ranks |
| 1, 2 | one stretch of the flat group | little: the at most W - 1 matrices that a stretch's end cuts, there and back |
| 3 | an even piece of every parameter | its pieces to the owners and back: at most 2 (1 - 1/W) / W of all elements |

An element takes 4 bytes in fp32 training and 2 in bf16 training, in whose precision Newton-Schulz computes.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.engine.held import Held

ROUND_ELEMENTS = 1 << 24
"""Elements of the matrices that an owner gathers at a time (64 MiB of fp32), unless a single one is larger."""


class Matrix(NamedTuple):
    """`rows` x `columns` elements of the flattened parameter `name`, from `start` on."""

    name: str
    start: int
    rows: int
    columns: int

    @property
    def numel(self) -> int:
        """Its elements."""
        return self.rows * self.columns

    @property
    def work(self) -> int:
        """Multiply-adds of a Newton-Schulz step: X X^T, its square, and the product with X."""
        short, long = sorted((self.rows, self.columns))
        return short * short * (2 * long + short)


class Part(NamedTuple):
    """Elements [start, start + numel) of a flattened matrix are [offset, offset + numel) of a rank's flat number `flat`."""

    start: int
    numel: int
    flat: int
    offset: int


def stacked(name: str, shape: Sequence[int], count: int) -> list[Matrix]:
    """The `count` matrices that lie on top of one another, along dimension 0, in a parameter of this shape."""
    rows, columns = shape[0] // count, torch.Size(shape[1:]).numel()
    return [Matrix(name, number * rows * columns, rows, columns) for number in range(count)]


def parts_of(matrix: Matrix, held: Iterable[Held]) -> list[Part]:
    """Which parts of a matrix the held ranges of its parameter are."""
    found = []
    for piece in held:
        begin = max(piece.start, matrix.start)
        end = min(piece.start + piece.numel, matrix.start + matrix.numel)
        if begin < end:
            found.append(Part(begin - matrix.start, end - begin, piece.flat, piece.offset + begin - piece.start))
    return found


def choose_owners(matrices: Sequence[Matrix], parts: Sequence[Sequence[Sequence[Part]]]) -> list[int]:
    """The rank that computes each matrix; `parts[rank][number]` is what a rank holds of matrix `number`.

    Who holds more than half of a matrix keeps it, the others go to whoever has least to do; but no rank gets more than its
    even share of the work and one matrix.
    """
    num_ranks = len(parts)
    work, owners = [0.0] * num_ranks, [0] * len(matrices)
    largest = max((matrix.work for matrix in matrices), default=0)
    most = sum(matrix.work for matrix in matrices) / num_ranks + largest

    def holder(number: int) -> int | None:
        """The one rank that holds more than half."""
        ranks = [
            rank
            for rank in range(num_ranks)
            if 2 * sum(part.numel for part in parts[rank][number]) > matrices[number].numel
        ]
        return ranks[0] if len(ranks) == 1 else None

    for number in sorted(range(len(matrices)), key=lambda number: -matrices[number].work):
        rank = holder(number)
        if rank is None or work[rank] + matrices[number].work > most:
            rank = min(range(num_ranks), key=lambda rank: work[rank])
        owners[number] = rank
        work[rank] += matrices[number].work
    return owners


@dataclass(frozen=True)
class Exchange:
    """What moves for one matrix: `parts[rank]` is what each rank holds of it."""

    matrix: Matrix
    owner: int
    parts: list[list[Part]]

    @property
    def gathered(self) -> bool:
        """Whether the owner needs pieces of others."""
        return sum(part.numel for part in self.parts[self.owner]) < self.matrix.numel

    def numel(self, rank: int) -> int:
        """Elements that a rank holds."""
        return sum(part.numel for part in self.parts[rank])


class WholeMatrices:
    """The matrices of a model on their way to their owners and back.

    Args:
        matrices: those that are to be seen whole.
        held: by rank, the ranges that it holds.
        masters: this rank's flats, by which `map_` knows the number of each.
        rank: this one.
        device: where matrices are sent and computed; dtype: in which.
    """

    def __init__(
        self,
        matrices: Sequence[Matrix],
        held: Sequence[Sequence[Held]],
        masters: Sequence[Tensor],
        rank: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.rank, self.num_ranks, self.device, self.dtype = rank, len(held), device, dtype
        self._flats = {id(master): number for number, master in enumerate(masters)}
        by_name: list[dict[str, list[Held]]] = [{} for _ in held]
        for ranges, found in zip(held, by_name, strict=True):
            for piece in ranges:
                found.setdefault(piece.name, []).append(piece)
        parts = [[parts_of(matrix, found.get(matrix.name, [])) for matrix in matrices] for found in by_name]
        owners = choose_owners(matrices, parts)
        self.exchanges = [
            Exchange(matrix, owner, [of_rank[number] for of_rank in parts])
            for number, (matrix, owner) in enumerate(zip(matrices, owners, strict=True))
        ]
        self._rounds: dict[frozenset[int], list[list[list[Exchange]]]] = {}

    @classmethod
    def alone(cls, counts: Mapping[Tensor, int]) -> Self:
        """Of parameters that no one has cut, each with its number of stacked matrices: one process, plain PyTorch."""
        held = [Held(str(number), 0, p.numel(), number, 0) for number, p in enumerate(counts)]
        matrices = [
            matrix
            for number, (p, count) in enumerate(counts.items())
            for matrix in stacked(str(number), tuple(p.shape), count)
        ]
        device = next(iter(counts)).device if counts else torch.device("cpu")
        return cls(matrices, [held], list(counts), 0, device)

    def owned(self, rank: int) -> list[Matrix]:
        """The matrices that a rank computes."""
        return [one.matrix for one in self.exchanges if one.owner == rank]

    def sent(self, rank: int) -> int:
        """Elements that a rank sends in a step, to owners and back from them."""
        there = sum(one.numel(rank) for one in self.exchanges if one.gathered and one.owner != rank)
        mine = [one for one in self.exchanges if one.owner == rank]
        return there + sum(one.numel(other) for one in mine for other in range(self.num_ranks) if other != rank)

    def map_(
        self,
        masters: Sequence[Tensor],
        values: Sequence[Tensor],
        function: Callable[[Tensor], Tensor],
    ) -> None:
        """Put `function(matrix)` in the place of every matrix in some flats' values, in place. Collective.

        Args:
            masters: the flats, the same ones on every rank; values: a one-dimensional tensor for each, of its length.
            function: [N, rows, columns] -> the same shape, for a stack of matrices of one shape, on `self.device` in `self.dtype`.
        """
        flats = {self._flats[id(master)]: value for master, value in zip(masters, values, strict=True)}
        for owned in self._rounds_of(frozenset(flats)):
            self._round(owned, flats, function)

    def _rounds_of(self, flats: frozenset[int]) -> list[list[list[Exchange]]]:
        """Rounds for these flats: in each, for every rank, the matrices that it owns."""
        if flats not in self._rounds:
            # A parameter lies in flats of one number on all ranks, though a rank may hold nothing of it.
            chosen = [
                exchange
                for exchange in self.exchanges
                if any(part.flat in flats for parts in exchange.parts for part in parts)
            ]
            batches = [
                _batches([exchange for exchange in chosen if exchange.owner == rank]) for rank in range(self.num_ranks)
            ]
            count = max(map(len, batches))
            self._rounds[flats] = [
                [batch[number] if number < len(batch) else [] for batch in batches] for number in range(count)
            ]
        return self._rounds[flats]

    def _round(
        self,
        owned: list[list[Exchange]],
        flats: dict[int, Tensor],
        function: Callable[[Tensor], Tensor],
    ) -> None:
        ranks, mine = range(self.num_ranks), owned[self.rank]
        whole = [torch.empty(one.matrix.numel, dtype=self.dtype, device=self.device) for one in mine]
        for one, matrix in zip(mine, whole, strict=True):
            for part in one.parts[self.rank]:
                matrix[part.start : part.start + part.numel] = _view(flats, part)
        gathered = [[one for one in of_rank if one.gathered] for of_rank in owned]
        if any(gathered):
            pieces = [
                [_view(flats, part) for one in gathered[rank] for part in one.parts[self.rank]] * (rank != self.rank)
                for rank in ranks
            ]
            expected = [sum(one.numel(rank) for one in gathered[self.rank]) * (rank != self.rank) for rank in ranks]
            for rank, received in enumerate(self._all_to_all(pieces, expected)):
                targets = [
                    matrix[part.start : part.start + part.numel]
                    for one, matrix in zip(mine, whole, strict=True)
                    if one.gathered
                    for part in one.parts[rank]
                ] * (rank != self.rank)
                _scatter(received, targets)
        _compute(mine, whole, function)
        for one, matrix in zip(mine, whole, strict=True):
            for part in one.parts[self.rank]:
                _view(flats, part).copy_(matrix[part.start : part.start + part.numel])
        if self.num_ranks > 1 and any(
            one.numel(rank) for of in owned for one in of for rank in ranks if rank != one.owner
        ):
            pieces = [
                [
                    matrix[part.start : part.start + part.numel]
                    for one, matrix in zip(mine, whole, strict=True)
                    for part in one.parts[rank]
                ]
                * (rank != self.rank)
                for rank in ranks
            ]
            expected = [sum(one.numel(self.rank) for one in owned[rank]) * (rank != self.rank) for rank in ranks]
            for rank, received in enumerate(self._all_to_all(pieces, expected)):
                targets = [_view(flats, part) for one in owned[rank] for part in one.parts[self.rank]]
                _scatter(received, targets * (rank != self.rank))

    def _all_to_all(self, pieces: list[list[Tensor]], expected: list[int]) -> Sequence[Tensor]:
        """Send each rank its pieces; returns what came from each, `expected` elements."""
        sizes = [sum(piece.numel() for piece in of_rank) for of_rank in pieces]
        flat = [piece.to(device=self.device, dtype=self.dtype) for of_rank in pieces for piece in of_rank]
        sent = torch.cat(flat) if flat else torch.empty(0, dtype=self.dtype, device=self.device)
        received = torch.empty(sum(expected), dtype=self.dtype, device=self.device)
        dist.all_to_all_single(received, sent, expected, sizes)
        return received.split(expected)


def _batches(exchanges: list[Exchange]) -> list[list[Exchange]]:
    """One owner's matrices, as many at a time as fit into `ROUND_ELEMENTS`."""
    batches: list[list[Exchange]] = []
    room = 0
    for one in exchanges:
        if one.matrix.numel > room:
            batches.append([])
            room = max(ROUND_ELEMENTS, one.matrix.numel)
        batches[-1].append(one)
        room -= one.matrix.numel
    return batches


def _compute(exchanges: list[Exchange], whole: list[Tensor], function: Callable[[Tensor], Tensor]) -> None:
    """Apply the function to all matrices of a shape at once, in place."""
    shapes: dict[tuple[int, int], list[Tensor]] = {}
    for one, flat in zip(exchanges, whole, strict=True):
        shape = (one.matrix.rows, one.matrix.columns)
        shapes.setdefault(shape, []).append(flat.view(shape))
    for matrices in shapes.values():
        for target, result in zip(matrices, function(torch.stack(matrices)), strict=True):
            target.copy_(result)


def _view(flats: dict[int, Tensor], part: Part) -> Tensor:
    return flats[part.flat][part.offset : part.offset + part.numel]


def _scatter(received: Tensor, targets: list[Tensor]) -> None:
    for target, piece in zip(targets, received.split([target.numel() for target in targets]), strict=True):
        target.copy_(piece)


def whole_matrices(
    counts: Mapping[str, int],
    shapes: Mapping[str, Sequence[int]],
    held: Iterable[Held],
    masters: Sequence[Tensor],
    rank: int,
    num_ranks: int,
    device: torch.device,
    dtype: torch.dtype,
) -> WholeMatrices:
    """Of a partitioned model, of which this rank holds the ranges `held` of the flats `masters`. Collective.

    counts: by name, how many matrices are stacked in a parameter; shapes: its whole shape.
    """
    matrices = [matrix for name, count in counts.items() for matrix in stacked(name, shapes[name], count)]
    names = list(counts)
    mine = [piece for piece in held if piece.name in counts]
    table = torch.tensor(
        [[names.index(piece.name), piece.start, piece.numel, piece.flat, piece.offset] for piece in mine],
        dtype=torch.int64,
    ).view(-1, 5)
    return WholeMatrices(
        matrices,
        [[Held(names[row[0]], *row[1:]) for row in rows.tolist()] for rows in _all_rows(table, num_ranks, device)],
        masters,
        rank,
        device,
        dtype,
    )


def _all_rows(table: Tensor, num_ranks: int, device: torch.device) -> list[Tensor]:
    """The tables of all ranks, which may differ in length."""
    if num_ranks == 1:
        return [table]
    lengths = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(num_ranks)]
    dist.all_gather(lengths, torch.tensor([len(table)], device=device))
    longest = max(int(length) for length in lengths)
    padded = torch.zeros(longest, table.shape[1], dtype=torch.int64, device=device)
    padded[: len(table)] = table.to(device)
    tables = [torch.zeros_like(padded) for _ in range(num_ranks)]
    dist.all_gather(tables, padded)
    return [one[: int(length)].cpu() for one, length in zip(tables, lengths, strict=True)]
