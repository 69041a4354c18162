"""The command line of `textldm diagnose`, without torch: a mistake in it is said before imports that take seconds."""

import argparse
from pathlib import Path

from data_pipeline.core.errors import UserError, check_early
from data_pipeline.core.storage import is_url
from pretrain.checkpoint.find import had_checkpoints
from pretrain.config.registry import stage_kind
from pretrain.config.schema import RunConfig
from pretrain.runs.folder import config_of

JSON_NAME, PAGE_NAME = "diagnosis.json", "diagnosis.png"
DESCRIPTION = """Go or no-go: the checks that tell a healthy run from one whose loss only looks fine (docs/diagnosis.md).

    textldm diagnose --run runs/vae_base        is this latent space fit for diffusion?
    textldm diagnose --run runs/dit_xl          does it model language? (its VAE included)

Measures the EMA weights of the newest complete checkpoint on held-out rows, prints a table, and writes diagnosis.json and
diagnosis.png into the run folder. Thresholds and sizes: section `diagnose` of the run's configuration (--set diagnose.rows=64).
Exit code 0: go, 1: no-go, 2: it could not be measured.
"""


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="textldm diagnose", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True, help="folder of a stage-1 or stage-2 run")
    parser.add_argument("--output", type=Path, help=f"folder for {JSON_NAME} and {PAGE_NAME} (the run folder)")
    parser.add_argument("--rows", type=int, help="held-out rows to measure (diagnose.rows)")
    parser.add_argument("--guidance-scale", type=float, help="of the generated text (diagnose.guidance_scale)")
    parser.add_argument("--num-steps", type=int, help="solver steps of the generated text (diagnose.num_steps)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (a GPU if there is one)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the run")
    return parser


def read(argv: list[str] | None = None) -> tuple[argparse.Namespace, RunConfig]:
    """The arguments and the run's configuration under them. Raises: UserError, also for what they name and is not there."""
    arguments = make_parser().parse_args(argv)
    given = {name: getattr(arguments, name) for name in ("rows", "guidance_scale", "num_steps")}
    overrides = [f"diagnose.{name}={value}" for name, value in given.items() if value is not None]
    config = config_of(arguments.run, [*arguments.set, *overrides])
    if stage_kind(config.stage).diagnosis is None:
        raise UserError(f"{arguments.run} is a run of stage {config.stage}, which has no diagnosis")
    if not had_checkpoints(arguments.run):
        raise UserError(f"{arguments.run} has no checkpoint yet; wait for the first one, or train longer")
    if not is_url(config.data.path) or "data.path" in given_keys(arguments):  # else __main__ says what to do
        config.data.manifest()
    return arguments, config


def given_keys(arguments: argparse.Namespace) -> set[str]:
    """The keys that `--set` sets."""
    return {override.partition("=")[0] for override in arguments.set}


def check(argv: list[str] | None = None) -> None:
    """End the process with a line and exit code 2 if `read` finds a mistake."""
    check_early(read, argv)
