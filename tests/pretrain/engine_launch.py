"""Start the ranks of a test job and read what it wrote."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from tests.pretrain import forked_ranks

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass
class Result:
    """Outcome of a case: `states` state -> name -> full tensor, and the worker's notes (losses, norms, ...)."""

    states: dict[str, dict[str, Tensor]]
    notes: dict[str, Any]


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What a launcher would set."""
    return os.environ | {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
    }  # fmt: skip


def launch(
    folder: Path,
    world_size: int,
    cases: list[dict[str, Any]],
    timeout_s: float = 1200,
    worker: str = "tests.pretrain.engine_worker",
) -> dict[str, Result]:
    """Run the cases with `world_size` ranks, in one start; raise with the ranks' last words if any of them fails."""
    folder.mkdir(parents=True, exist_ok=True)
    jobs, log = folder / "jobs.json", folder / "ranks.log"
    jobs.write_text(json.dumps(cases))
    codes = forked_ranks.finish(forked_ranks.start_module(worker, [str(jobs)], log, world_size), timeout_s)
    assert codes == [0] * world_size, log.read_text()[-6000:]
    return {case["name"]: read_result(folder, case["name"]) for case in cases}


def read_result(folder: Path, name: str) -> Result:
    """What rank 0 wrote for a case."""
    states: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(folder / f"{name}.safetensors").items():
        state, _, parameter = key.partition("/")
        states.setdefault(state, {})[parameter] = tensor
    return Result(states, json.loads((folder / f"{name}.json").read_text()))


def largest_relative_difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """max over tensors of |found - expected| / |expected|, in Euclidean norms."""
    assert found.keys() == expected.keys()
    return max(
        float((found[n].double() - e.double()).norm() / e.double().norm().clamp(min=1e-30)) for n, e in expected.items()
    )
