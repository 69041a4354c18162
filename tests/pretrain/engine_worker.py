"""One rank of a test job: runs a list of cases after one another (start-up costs seconds), rank 0 writes what came out.

Started by engine_launch.py with the name of the cases' file.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from pretrain.checkpoint.find import checkpoint_of
from pretrain.checkpoint.read import restore
from pretrain.checkpoint.write import CheckpointWriter
from pretrain.engine.engine import Engine, EngineSettings
from pretrain.engine.optimizer_settings import optimizer_settings
from pretrain.ranks.distributed import init_distributed
from tests.pretrain import engine_toy as toy
from tests.pretrain.engine_states import gather_full
from tests.pretrain.toy_sgd import install_toy_sgd


@dataclasses.dataclass
class Case:
    """One training run. `steps`: [first, last). `skip`: steps not applied. `poison`: steps with a nan on the last rank.
    `sums`: of a `SumStage`.
    `save`: numbers of updates after which to save into `run`."""

    name: str
    zero_stage: int = 2
    accumulation: int = 1
    precision: str = "fp32"
    offload: str = "none"
    offload_parameters: str = "none"
    offload_folder: str = ""
    steps: tuple[int, int] = (0, 3)
    skip: tuple[int, ...] = ()
    poison: tuple[int, ...] = ()
    save: tuple[int, ...] = ()
    run: str = ""
    restore: str = ""
    autocast: bool = False
    recompute: bool = False
    evaluate: bool = False
    sums: bool = False
    optimizer: dict[str, Any] = dataclasses.field(default_factory=toy.OPTIMIZER.model_dump)
    overrides: dict[str, Any] = dataclasses.field(default_factory=dict)


def run_case(case: Case, topology, output: Path) -> None:
    """Train as the case says and write every state, losses and norms to `output`/<name>.safetensors and .json."""
    settings = EngineSettings(
        zero_stage=case.zero_stage, precision=case.precision, accumulation_steps=case.accumulation,
        offload_optimizer=case.offload, offload_parameters=case.offload_parameters, offload_folder=case.offload_folder,
        overrides=case.overrides,
    )  # fmt: skip
    stage = toy.SumStage() if case.sums else toy.ToyStage(case.autocast, case.recompute)
    optimizer = optimizer_settings(case.optimizer["kind"])(**case.optimizer)
    engine = Engine(stage, settings, optimizer, topology)
    notes: dict[str, Any] = {
        "losses": [],
        "norms": [],
        "manifest": None,
        "table": engine.parameter_table(),
        "checks": {},
    }
    first, last = case.steps
    if case.restore:
        manifest = restore(checkpoint_of(case.restore), engine)
        notes["manifest"] = {"step": manifest.step, "extra": manifest.extra}
    writer = CheckpointWriter(Path(case.run), topology, keep_last=10) if case.save else None
    for step in range(first, last):
        counts = toy.counts_of(toy.step_rows(step))
        if case.sums:
            batches = toy.sum_batches(topology.rank, case.accumulation)
        else:
            batches = toy.micro_batches(step, topology.rank, topology.world_size, case.accumulation)
        for index, batch in enumerate(batches):
            if step in case.poison and topology.rank == topology.world_size - 1 and index == 0:
                batch.target_BT = batch.target_BT * float("nan")
            engine.forward_backward(batch, counts, last=index == len(batches) - 1)
        measured = engine.measure()
        engine.step(step, toy.LR, skip=step in case.skip)
        notes["losses"].append(measured.loss)
        notes["norms"].append(measured.grad_norm)
        if case.evaluate:
            check_evaluation(engine, counts, notes["checks"])
        if writer and step + 1 in case.save:
            writer.save(step + 1, engine, {"seen": step})
    if writer:
        writer.wait()
    tensors = gather_full(engine)
    notes["updates"] = engine.updates
    notes["bytes_in_files"] = bytes_in_files(case.offload_folder) if case.offload_folder else 0
    notes["bytes_of_masters"] = sum(flat.numel() * 4 for flat in engine.partition.flats)
    notes["buffers"] = {name: [str(buffer.dtype), buffer.tolist()] for name, buffer in engine.buffers().items()}
    notes["dtypes"] = sorted({str(p.dtype) for p in stage.parameters()})
    notes["matrices"] = engine._base.whole and str(engine._base.whole.dtype)
    engine.close()
    if topology.is_main:
        save_file(tensors, output / f"{case.name}.safetensors")
        (output / f"{case.name}.json").write_text(json.dumps(notes))


def bytes_in_files(folder: str) -> int:
    """Bytes of this process's memory that are files in `folder` without a name."""
    total = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, *_, path = line.split(maxsplit=5)
        if path.startswith(folder) and path.endswith("(deleted)"):
            begin, end = (int(address, 16) for address in addresses.split("-"))
            total += end - begin
    return total


def check_evaluation(engine: Engine, counts: dict[str, int], checks: dict[str, bool]) -> None:
    """The EMA evaluates as a plain model with the EMA's weights would, and everything is back to the bit afterwards."""
    batch = toy.step_rows(77)
    before = gather_full(engine)
    plain_loss = engine.evaluate(batch, counts).loss
    with engine.ema_weights():
        ema_loss = engine.evaluate(batch, counts).loss
    reference = toy.ToyStage()
    with torch.no_grad():
        for name, p in reference.named_parameters():
            p.copy_(before[f"ema/{name}"])
        expected = reference(batch, counts).loss
    tolerance = 1e-6 if engine.settings.precision == "fp32" else 2e-2
    after = gather_full(engine)
    checks["ema_used"] = bool(torch.isclose(ema_loss.float(), expected, rtol=tolerance, atol=0)) and bool(
        ema_loss != plain_loss
    )
    checks["bitwise"] = all(torch.equal(before[name], after[name]) for name in before)
    checks["same_loss"] = bool(engine.evaluate(batch, counts).loss == plain_loss)
    checks["training"] = engine.stage.training


def main(argv: list[str]) -> int:
    """Run the cases of the JSON file that is the only argument."""
    jobs = Path(argv[0])
    topology = init_distributed(timeout_s=60)
    install_toy_sgd(jobs.parent / f"site-{topology.rank}")
    for case in json.loads(jobs.read_text()):
        if "betas" in case.get("optimizer", {}):
            case["optimizer"]["betas"] = tuple(case["optimizer"]["betas"])  # a list in JSON
        run_case(Case(**case), topology, jobs.parent)
    return 0
