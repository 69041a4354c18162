"""The folder of a run: its configuration, and what becomes of an earlier run that stands in the way."""

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from data_pipeline.core.errors import UserError
from data_pipeline.core.storage import write_text
from pretrain.config.load import load_config
from pretrain.config.schema import RunConfig
from pretrain.ranks.launcher import is_restart
from pretrain.runs.owner import Ownership

CONFIG_NAME = "config.json"


def write_config(config: RunConfig) -> None:
    """Leave the resolved configuration in the run's folder."""
    write_text(config.run_folder / CONFIG_NAME, config.model_dump_json(indent=2) + "\n")


def config_of(run: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration in a run folder, wherever the folder lies now. Raises: UserError."""
    if not (run / CONFIG_NAME).is_file():
        raise UserError(f"{run} has no {CONFIG_NAME}; expected the folder of a training run, e.g. runs/vae_base")
    config = load_config(run / CONFIG_NAME, overrides)
    config.train.run = str(run)
    return config


def put_aside(run: Path) -> None:
    """Rename an existing run folder to <run>.1, <run>.2 and so on. For one process. Raises: UserError when it is in use."""
    if is_restart(os.environ):
        print("--fresh: this job has been started before, and resumes", flush=True)
        return
    if run.exists():
        Ownership(run).release()
    if run.exists():  # an empty one is gone
        number = next(n for n in range(1, sys.maxsize) if not Path(f"{run}.{n}").exists())
        shutil.move(run, f"{run}.{number}")
        print(f"--fresh: {run} is now {run}.{number}", flush=True)
