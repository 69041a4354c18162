"""The folder of a run: its configuration, and what becomes of an earlier run that stands in the way."""

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from data_pipeline.core.errors import UserError
from data_pipeline.core.storage import write_text
from pretrain.config.load import load_config
from pretrain.config.schema import RunConfig
from pretrain.ranks.launcher import is_restart, job_name
from pretrain.runs.owner import OWNER, Ownership

CONFIG_NAME = "config.json"
BEGUN = "begun_by"
"""In a run folder that --fresh began: the scheduler's name for the job, which resumes when it is started again with --fresh."""


def write_config(config: RunConfig) -> None:
    """Leave the resolved configuration in the run's folder."""
    write_text(config.run_folder / CONFIG_NAME, json.dumps(config.told(), indent=2, ensure_ascii=False) + "\n")


def config_of(run: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration in a run folder, wherever the folder lies now. Raises: UserError.

    The folder may have been downloaded: the folder of its cache, from which old files are deleted, is not taken from it.
    """
    if not (run / CONFIG_NAME).is_file():
        raise UserError(f"{run} has no {CONFIG_NAME}; expected the folder of a training run, e.g. runs/vae_base")
    config = load_config(run / CONFIG_NAME, overrides, whole=True)
    config.train.run = str(run)
    named = any(override.startswith("data.cache_dir=") for override in overrides)
    return config if named else config.without_deletions()


def put_aside(run: Path) -> None:
    """Rename an existing run folder to <run>.1, <run>.2 and so on. For one process. Raises: UserError when it is in use."""
    job = job_name(os.environ)
    if is_restart(os.environ) and (not job or _job_that_began(run) == job):
        print("--fresh: this job has been started before, and resumes", flush=True)
        return
    if run.exists():
        Ownership(run).release()
    if run.exists():  # an empty one is gone
        number = next(n for n in range(1, sys.maxsize) if not Path(f"{run}.{n}").exists())
        shutil.move(run, f"{run}.{number}")
        print(f"--fresh: {run} is now {run}.{number}", flush=True)


def begun_anew(run: Path) -> None:
    """Note in a run folder which job began it with --fresh, where a scheduler or launcher may start that job again."""
    if job := job_name(os.environ):
        write_text(run / BEGUN, job)


def _job_that_began(run: Path) -> str:
    with contextlib.suppress(OSError):
        return (run / BEGUN).read_text(encoding="utf-8")
    return ""


def remove_unstarted(run: Path) -> Callable[[], None]:
    """Call before the folder is owned. Called before it is released, the function that it gives empties a folder that was not there,
    unless the run got so far that its configuration was written: a start that fails leaves nothing.
    """
    if run.is_dir() and any(path.name != BEGUN for path in run.iterdir()):
        return lambda: None

    def remove() -> None:
        if not run.is_dir() or (run / CONFIG_NAME).exists():
            return
        for path in run.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != OWNER:
                path.unlink(missing_ok=True)

    return remove
