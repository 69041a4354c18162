"""Train a stage: `deepspeed --hostfile hosts pretrain/train.py --config dit_xl`; or under torchrun, srun, plain python.

A run is a function of (configuration, data, step): the same command again resumes the newest complete checkpoint.
"""
# The command line of pretrain/train.py, without torch: a mistake in it is said before imports that take seconds.

import argparse
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from data_pipeline.core.errors import UserError, check_arguments
from data_pipeline.core.launcher import check_hostfile
from pretrain.config.load import load_config
from pretrain.config.schema import RunConfig
from pretrain.faults.exit_codes import EXIT_CODES, say_mistake


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    codes = "\n".join(f"  {code:>3}  {meaning}" for code, meaning in EXIT_CODES.items())
    parser = argparse.ArgumentParser(
        prog="pretrain/train.py" if Path(sys.argv[0]).name == "train.py" else "textldm train",
        description=__doc__,
        epilog="exit codes:\n" + codes,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, help="a JSON file, or a name in configs/ (textldm config NAME)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a key, e.g. train.steps=1000"
    )
    parser.add_argument("--run", "--run-folder", help="short for --set train.run=...; torchrun takes --run for its own")
    parser.add_argument("--fresh", action="store_true", help="put an existing run folder aside and start at step 0")
    parser.add_argument("--dry-run", action="store_true", help="build everything, take one step, leave nothing")
    parser.add_argument(
        "--as-rank", metavar="RANK/RANKS",
        help="with --dry-run: what one rank of so many holds and sends, computed here, without data (0/512)",
    )  # fmt: skip
    parser.add_argument("--profile", type=int, default=0, metavar="N", help="trace N steps with torch's profiler")
    parser.add_argument(
        "--allow-change", action="append", default=[], metavar="KEY", help="a key that a resumed run may change"
    )
    parser.add_argument(
        "--local_rank", "--local-rank", help=argparse.SUPPRESS
    )  # launchers add it; LOCAL_RANK says the same
    return parser


def read(argv: list[str] | None = None) -> tuple[argparse.Namespace, RunConfig]:
    """The arguments and the configuration that they name. Raises: UserError."""
    check_arguments(sys.argv[1:] if argv is None else argv)
    arguments = make_parser().parse_args(argv)
    if arguments.as_rank:
        arguments.as_rank = rank_of(arguments.as_rank)
        if not arguments.dry_run:
            raise UserError(
                "--as-rank is there, and --dry-run is not: only a dry run is computed for another rank; add --dry-run"
            )
    overrides = [*arguments.set, *([f"train.run={arguments.run}"] if arguments.run else [])]
    return arguments, load_config(arguments.config, overrides)


def rank_of(text: str) -> tuple[int, int]:
    """Rank and number of ranks out of "0/512". Raises: UserError."""
    match = re.fullmatch(r"([0-9]{1,7})/([0-9]{1,7})", text)
    if not match or int(match[1]) >= int(match[2]):
        raise UserError(
            f"--as-rank is {text!r}; expected RANK/RANKS, a rank below their number: the first of 512 is 0/512"
        )
    return int(match[1]), int(match[2])


def check(argv: list[str] | None = None) -> None:
    """End the process with a line and EXIT_USER if the arguments or the configuration hold a mistake."""
    try:
        arguments, config = read(argv)
        check_hostfile()
        if arguments.as_rank:
            return
        if os.environ.get("WORLD_SIZE", "1") == "1" and "SLURM_PROCID" not in os.environ:
            config.data.manifest()  # of several ranks none may end alone, before they have met
    except UserError as error:
        sys.exit(say_mistake(error, own_rank(os.environ)))


def own_rank(environment: Mapping[str, str]) -> int:
    """This process's rank as far as the launcher's variables tell it; 0 where they do not."""
    found = environment.get("RANK") or environment.get("SLURM_PROCID") or "0"
    return int(found) if found.isdecimal() else 0
