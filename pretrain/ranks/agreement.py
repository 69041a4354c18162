"""Whether all ranks start from the same: versions of what computes, fingerprints of what is read. Hosts may have copies of their own."""

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version

from data_pipeline.core.errors import UserError

FACTS_BYTES, SHOWN = 1024, 16
"""Room for one rank's facts, and characters of each that are compared."""


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that must be the same on all hosts, by name."""
    return {"python": sys.version.split()[0]} | {name: version(name) for name in ("torch", "deepspeed")}


def refuse_differences(
    facts: Mapping[str, str], host: str, rank: int, ranks: int, all_reduce_sum: Callable[[Sequence[float]], list[float]]
) -> None:
    """Compare every rank's facts with those of rank 0. Collective.

    Raises: UserError on every rank if one has others: it names that rank's host, what differs, and both values.
    """
    own = _read(_told(facts))
    first = _read(_of_rank(0, rank, facts, all_reduce_sum))
    differ = all_reduce_sum([float(rank == number and own != first) for number in range(ranks)])
    others = [number for number, differs in enumerate(differ) if differs]
    if not others:
        return
    theirs = _read(_of_rank(others[0], rank, {**facts, "host": host}, all_reduce_sum))
    where = theirs.pop("host", "another host")
    told = "; ".join(
        f"{name} is {theirs.get(name, 'nothing')} there and {first.get(name, 'nothing')} on rank 0"
        for name in {**first, **theirs}
        if theirs.get(name) != first.get(name)
    )
    raise UserError(
        f"rank {others[0]} on {where}{f' and {len(others) - 1} more' * (len(others) > 1)} would not train the same: {told}; let all hosts"
        " see one folder of data and one installation, or copy rank 0's (textldm hosts check compares versions)"
    )


def _told(facts: Mapping[str, str]) -> str:
    lines = "".join(f"{name}={value[:SHOWN]}\n" for name, value in facts.items())
    return lines.encode()[:FACTS_BYTES].decode(errors="ignore")


def _read(told: str) -> dict[str, str]:
    return dict(line.split("=", 1) for line in told.splitlines() if "=" in line)


def _of_rank(
    who: int, rank: int, facts: Mapping[str, str], all_reduce_sum: Callable[[Sequence[float]], list[float]]
) -> str:
    """One rank's facts on every rank."""
    own = _told(facts).encode().ljust(FACTS_BYTES) if rank == who else bytes(FACTS_BYTES)
    return bytes(map(int, all_reduce_sum(own))).decode()
