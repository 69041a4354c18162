"""Heartbeats: a small file a rank in the run folder, which says where the rank is and that it is alive.

heartbeats/rank-00000.json        written every few seconds by a thread of the rank's watchdog
"""

import contextlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Self

from pydantic import ConfigDict, Field, NonNegativeInt
from pydantic.dataclasses import dataclass

from data_pipeline.core.outside import parse_json
from data_pipeline.core.storage import write_text

FOLDER = "heartbeats"


@dataclass(frozen=True, config=ConfigDict(strict=True, extra="forbid"))
class Heartbeat:
    """A rank's sign of life at `time` (seconds since 1970): for `stuck_s` seconds in this phase of this step.

    Signals are sent to its `pid` (jobs/supervise.py), so a file that holds anything else is none.
    """

    rank: NonNegativeInt
    host: str
    pid: Annotated[int, Field(gt=0, lt=1 << 31)]
    step: NonNegativeInt
    phase: str
    stuck_s: float
    time: float

    def write(self, run: Path) -> None:
        """Replace the rank's file as a whole; not where the run folder is gone, as after a start that failed. Raises: OSError."""
        if run.is_dir():
            write_text(heartbeat_file(run, self.rank), json.dumps(asdict(self)), durable=False)

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """The heartbeat in a file; None if the file is missing, or was written by another version."""
        with contextlib.suppress(OSError, ValueError, TypeError):
            return cls(**parse_json(path.read_text(encoding="utf-8")))
        return None


def heartbeat_file(run: Path, rank: int) -> Path:
    """Path of a rank's heartbeat file in the run folder."""
    return run / FOLDER / f"rank-{rank:05d}.json"


def read_heartbeats(run: Path) -> list[Heartbeat]:
    """Heartbeats of all ranks that left a file, in the order of ranks. A killed job leaves its files behind, so look at their times."""
    found = [Heartbeat.read(path) for path in sorted((run / FOLDER).glob("rank-*.json"))]
    return [beat for beat in found if beat is not None]
