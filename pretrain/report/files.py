"""What lies in a run's folder, read for the report: without torch, and without believing any of it.

A file that is not there is None, and the page says so; one that is damaged is a UserError that names it. Lines of metrics.jsonl that
a kill tore are counted and left out.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_pipeline.core.errors import UserError
from data_pipeline.core.outside import parse_json, read_at_most
from data_pipeline.core.storage import is_url, open_file
from data_pipeline.format.manifest import Manifest
from pretrain.checkpoint.find import checkpoint_name, saved_steps
from pretrain.checkpoint.manifest import Manifest as CheckpointManifest
from pretrain.checkpoint.manifest import read_manifest
from pretrain.checkpoint.storage import Checkpoint, storage_of
from pretrain.config.registry import stage_names
from pretrain.evaluate.tables import read_result, read_sweep
from pretrain.runs.folder import CONFIG_NAME
from pretrain.telemetry.sinks import METRICS_NAME

DIAGNOSIS_NAME, TRAJECTORY_NAME = "diagnosis.json", "trajectory.json"
LARGEST_METRICS, LARGEST_FILE = 1 << 30, 1 << 26
"""Bytes: of a run of ten million logged lines; of other files."""

Entry = dict[str, Any]


@dataclass(frozen=True)
class Metrics:
    """metrics.jsonl by kind of line; of steps that a restart repeated, the last. `torn`: lines that are none."""

    train: list[Entry] = field(default_factory=list)
    eval: list[Entry] = field(default_factory=list)
    samples: list[Entry] = field(default_factory=list)
    events: list[Entry] = field(default_factory=list)
    torn: int = 0


@dataclass(frozen=True)
class Run:
    """A run's folder. What is None is not there; `data_note` says why there is no `data`, `vae_note` why no `vae`."""

    folder: Path
    config: Entry
    stage: str
    metrics: Metrics
    checkpoint: CheckpointManifest | None
    diagnosis: Entry | None
    trajectory: list[tuple[float, str]] | None
    evaluations: list[Entry]
    sweeps: list[Entry]
    data: Manifest | None = None
    data_note: str = ""
    vae: Metrics | None = None
    vae_note: str = ""

    def setting(self, key: str) -> Any:
        """The configuration's value under a key like train.steps; None if it has none."""
        found: Any = self.config
        for name in key.split("."):
            found = found.get(name) if isinstance(found, dict) else None
        return found

    @property
    def step(self) -> int:
        """The last step that the folder knows of."""
        logged = [line["step"] for line in (*self.metrics.train, *self.metrics.eval)]
        return max([*logged, self.checkpoint.step if self.checkpoint else 0])


def read_run(folder: Path, trajectory: Path | None = None, evaluations: Sequence[Path] = ()) -> Run:
    """All files of a run's folder. `trajectory`, `evaluations`: files to read besides. Raises: UserError."""
    config = _json(folder / CONFIG_NAME)
    if config is None:
        raise UserError(f"{folder} has no {CONFIG_NAME}; expected the folder of a training run, e.g. runs/vae_base")
    stage = config.get("stage") if isinstance(config, dict) else None
    if stage not in stage_names():
        raise UserError(
            f"{folder / CONFIG_NAME}: stage is {repr(stage)[:80]}; expected one of {', '.join(stage_names())} (a stage of another package:"
            " install that)"
        )
    checkpoint = newest_checkpoint(folder)
    run = Run(
        folder,
        config,
        stage,
        read_metrics(folder / METRICS_NAME),
        checkpoint,
        read_diagnosis(folder / DIAGNOSIS_NAME),
        read_trajectory(trajectory or folder / TRAJECTORY_NAME, must_exist=trajectory is not None),
        [*_results_of(folder, ("metrics", "benchmark"), read_result), *map(read_result, evaluations)],
        [*_results_of(folder, ("points", "pareto"), read_sweep)],
    )
    return Run(**vars(run) | _data(run) | _vae(run))


def newest_checkpoint(folder: Path) -> CheckpointManifest | None:
    """What the newest checkpoint says of itself; its tensors are not looked at. Raises: UserError."""
    steps = saved_steps(folder)
    return read_manifest(Checkpoint(storage_of(folder), checkpoint_name(steps[0]))) if steps else None


def _bytes(path: Path, most: int = LARGEST_FILE) -> bytes | None:
    try:
        with open_file(path) as file:
            return read_at_most(file, most)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({getattr(error, 'strerror', None) or error})") from None


def _json(path: Path) -> Any:
    content = _bytes(path)
    try:
        return None if content is None else parse_json(content)
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); expected JSON: restore it, or make it again") from None


def number(value: Any) -> float | None:
    """A number of a size that can be drawn as a float; None for anything else that JSON has. What nearly is zero, is."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e100:
        return None
    return float(value) if abs(value) > 1e-100 else 0.0


def read_metrics(path: Path) -> Metrics:
    """A run's metrics.jsonl; without one, nothing. Raises: UserError for what training does not write."""
    found = Metrics()
    train: dict[int, Entry] = {}
    evaluations: dict[int, Entry] = {}
    samples: dict[int, list[Entry]] = {}
    torn = 0
    for line_number, line in enumerate((_bytes(path, LARGEST_METRICS) or b"").split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            entry = parse_json(line)
        except ValueError:  # torn by a kill
            torn += 1
            continue
        step = entry.get("step") if isinstance(entry, dict) else None
        if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step < 1 << 53:
            raise UserError(
                f"{path}, line {line_number} is not what training writes (an object with a step); restore the file, or move it away"
            )
        if entry.get("kind") == "train":
            train[step] = entry
        elif entry.get("kind") == "eval":
            evaluations[step], samples[step] = entry, []  # its samples follow; an earlier try's are dropped
        elif entry.get("kind") == "sample":
            samples.setdefault(step, []).append(entry)
        elif entry.get("kind") == "event":
            found.events.append(entry)
    if torn and not (train or evaluations or samples or found.events):
        raise UserError(f"{path} is damaged: none of its lines is JSON; restore it, or move it away")
    return Metrics(
        [train[step] for step in sorted(train)],
        [evaluations[step] for step in sorted(evaluations)],
        [entry for step in sorted(samples) for entry in samples[step]],
        found.events,
        torn,
    )


def read_diagnosis(path: Path) -> Entry | None:
    """What `textldm diagnose` wrote. Raises: UserError for what it does not write."""
    found = _json(path)
    if found is None:
        return None
    checks = found.get("checks") if isinstance(found, dict) else None
    if not isinstance(checks, list) or not isinstance(found.get("verdict"), str) or not all(map(_is_check, checks)):
        raise UserError(f"{path} is not what textldm diagnose writes; diagnose the run again, or move the file away")
    return found


def _is_check(check: Any) -> bool:
    return (
        isinstance(check, dict)
        and all(isinstance(check.get(name), str) for name in ("name", "figure", "threshold"))
        and isinstance(check.get("passed"), bool | None)
    )


def read_trajectory(path: Path, must_exist: bool = True) -> list[tuple[float, str]] | None:
    """The (t, text) pairs that `textldm generate --trajectory` wrote, by falling t, from noise to data. Raises: UserError."""
    entries = _json(path)
    if entries is None and not must_exist:
        return None
    found = [_moment(entry) for entry in entries] if isinstance(entries, list) else []
    if not found or None in found:
        raise UserError(
            f'{path} is not a trajectory; expected the JSON list of {{"t", "text"}} that textldm generate --trajectory writes'
        )
    return sorted((moment for moment in found if moment), key=lambda moment: -moment[0])


def _moment(entry: Any) -> tuple[float, str] | None:
    if not isinstance(entry, dict) or not isinstance(entry.get("text"), str):
        return None
    t = number(entry.get("t"))
    return None if t is None else (t, entry["text"])


def _results_of(folder: Path, keys: Sequence[str], read: Callable[[Path], Entry]) -> Iterator[Entry]:
    """Results of `textldm evaluate` among a folder's files: those that hold all of these keys."""
    known = (CONFIG_NAME, DIAGNOSIS_NAME, TRAJECTORY_NAME)
    for path in sorted(path for path in folder.glob("*.json") if path.name not in known and path.is_file()):
        try:
            found = _json(path)
        except UserError:
            continue  # whatever it is: nobody said that it was ours
        if isinstance(found, dict) and all(key in found for key in keys):
            yield read(path)


def _places(run: Run, key: str) -> list[Path]:
    """Where a folder that the configuration names may lie: there, or, if the run was moved with what belongs to it, beside the run."""
    named = run.setting(key)
    if not isinstance(named, str) or not named or is_url(named):
        return []
    return [Path(named), run.folder.absolute().parent / Path(named).name]


def _recorded(run: Run, name: str) -> Any:
    return run.checkpoint.extra.get(name) if run.checkpoint else None


def _data(run: Run) -> Entry:
    """The prepared data's manifest, if it is the one that the run was trained on."""
    named, expected = run.setting("data.path"), _recorded(run, "data_fingerprint")
    other = ""
    for place in _places(run, "data.path"):
        if not (place / "manifest.json").is_file():
            continue
        manifest = Manifest.load(str(place), "data.path")
        if expected in (None, manifest.fingerprint):
            return {"data": manifest}
        found = manifest.fingerprint[:16]
        other = f"{place} holds other data (fingerprint {found}) than the run was trained on ({str(expected)[:16]})."
    return {"data_note": other or f"The data's manifest is not on this machine: data.path is {named}."}


def _vae(run: Run) -> Entry:
    """The log of the stage-1 run beneath, if its newest checkpoint is the one that was read."""
    named = run.setting("model.vae")
    if named is None:
        return {}
    inputs = _recorded(run, "inputs")
    expected = inputs.get("model.vae") if isinstance(inputs, Mapping) else None
    other = ""
    for place in _places(run, "model.vae"):
        if not (place / METRICS_NAME).is_file():
            continue
        below = newest_checkpoint(place)
        if expected is None or (below is not None and below.fingerprint == expected):
            return {"vae": read_metrics(place / METRICS_NAME)}
        other = f"{place} has gone on, or is another run, since this one was trained on it."
    return {"vae_note": other or f"The stage-1 run is not on this machine: model.vae is {named}."}


def flat(config: Any, prefix: str = "") -> dict[str, str]:
    """A configuration as keys like train.steps with their values as JSON."""
    if isinstance(config, dict) and config:
        found: dict[str, str] = {}
        for name, value in config.items():
            found |= flat(value, f"{prefix}.{name}" if prefix else name)
        return found
    return {prefix: json.dumps(config, ensure_ascii=False)}
