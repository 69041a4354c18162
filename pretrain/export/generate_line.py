"""The command line of `textldm generate`, without torch: a mistake in it is said before imports that take seconds."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from data_pipeline.core.errors import UserError, check_early
from data_pipeline.core.hub import check_hub_id
from modeling.shapes import DEFAULT_NEW_TOKENS

DESCRIPTION = "Continue prompts with an exported TextLDM."
EXPECTED = "what textldm convert wrote, or a hub id"


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="textldm generate", description=DESCRIPTION)
    parser.add_argument("--model", required=True, help="exported folder, or hub id")
    parser.add_argument(
        "--prompt",
        action="append",
        default=[],
        help="text to continue; can be repeated; without one, lines are read that are piped in",
    )
    parser.add_argument(
        "--prompt-file", help="file of prompts, one a line, - for the standard input; blank lines are left out"
    )
    parser.add_argument("--max-new-tokens", type=int, help=f"default {DEFAULT_NEW_TOKENS}, or what the window leaves")
    parser.add_argument("--num-steps", type=int, help="solver steps; default of the export")
    parser.add_argument("--guidance-scale", type=float, help="1 is none; default of the export")
    parser.add_argument("--solver", help="euler, heun, multistep, or an installed one; default of the export")
    parser.add_argument("--grid", help="of the solver's times; default of the export")
    parser.add_argument(
        "--token-temperature", type=float, help="with the categorical head, below 1 sharper; default of the export"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the noise, 0 to 2^64 - 1")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (a GPU if there is one)")
    parser.add_argument("--json", action="store_true", help="print one JSON object a prompt")
    parser.add_argument("--trajectory", type=Path, help="write the first prompt's text at several t as JSON")
    return parser


def read(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments. Raises: UserError."""
    given = make_parser().parse_args(argv)
    for name in ("num_steps", "max_new_tokens"):
        if getattr(given, name) is not None and getattr(given, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(given, name)}; expected at least 1")
    if not Path(given.model).expanduser().is_dir():
        check_hub_id(given.model, "--model", EXPECTED)
    return given


def check(argv: list[str] | None = None) -> None:
    """End the process with a line and exit code 2 if `read` finds a mistake."""
    check_early(read, argv)
