"""How often a step's host waits for what the device computes: once, for the loss and the norm by which it decides.

Counted on a CPU, where nothing waits: all calls by which a program reads a tensor's values or learns a shape from them. Copies to
the device, which wait too, are seen by tests/pretrain/stages/test_on_a_gpu.py.
"""

import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain import train
from pretrain.session import Session
from tests.pretrain import tiny_pipeline, tiny_run

READS = {"item", "tolist", "cpu", "numpy", "nonzero", "masked_select", "unique", "synchronize", "__array__"}
OPERATORS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "is_nonzero"}
DISTILL = {"num_steps": 3, "teacher_steps": 2, "guidance_scale": 3.0, "guidance_interval": [0.2, 0.8]}
OF_THE_HOST = {"row_noise"}
"""Reads the rows' keys, which never leave the host."""


class Functions(TorchFunctionMode):
    """Counts, by the function that asks."""

    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__name__", "") in READS:
            _count(self.found)
        return function(*args, **(kwargs or {}))


class Operators(TorchDispatchMode):
    """The same of operators, however they come to be called: `bool(tensor)`, a mask as an index."""

    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        masks = [x for x in (args[1] if len(args) > 1 and isinstance(args[1], list | tuple) else ()) if _is_mask(x)]
        if function.overloadpacket.__name__ in OPERATORS or masks:
            _count(self.found)
        return function(*args, **(kwargs or {}))


def _is_mask(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype == torch.bool


def _count(found: Counter[str]) -> None:
    names = [frame.name for frame in traceback.extract_stack() if "/torch/" not in frame.filename]
    asking = next(name for name in reversed(names) if not name.startswith(("__torch_", "_count", "<")))
    if asking not in OF_THE_HOST:
        found[asking] += 1


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "zero_stage"), [("vae", 1), ("dit", 1), ("dit", 3), ("distill", 1)])
def test_a_step_waits_once_and_not_between_micro_batches(
    stage: str, zero_stage: int, trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if stage == "vae":
        values = tiny_run.config_values(trained.data, tmp_path / "run")
    elif stage == "distill":
        values = tiny_pipeline.dit_values(trained.data, trained.vae, tmp_path / "run")
        values |= {"stage": "distill", "distill": {"teacher": str(trained.dit)} | DISTILL}
    else:
        values = tiny_pipeline.dit_values(trained.data, trained.vae, tmp_path / "run", {"self_conditioning": True})
        values["flow"] |= {"target": "sample", "token_loss_weight": 0.1}
    values["train"] |= {
        "steps": 5,
        "precision": "bf16",
        "zero_stage": zero_stage,
        "eval_every": 0,
        "spike_sigmas": 20.0,
    }
    values["train"] |= {"checkpoint_every": 100, "log_every": 100}
    found: Counter[str] = Counter()
    loop = train.train

    def counted(session: Session, profiler: Any = None) -> int:
        loop(session, until=1)
        with Functions(found), Operators(found):
            loop(session, until=4)
        assert len(session.loader.build(0)) == 4  # micro-batches a step
        return loop(session)

    monkeypatch.setattr(train, "train", counted)
    tiny_pipeline.start(tmp_path, values)
    assert found == {"measure": 3}, found
