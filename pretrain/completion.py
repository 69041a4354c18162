"""Completion of `textldm` in a shell, from the same parsers that read the command lines.

    textldm completion bash > ~/.local/share/bash-completion/completions/textldm
    textldm completion zsh > "${fpath[1]}/_textldm"

The script is static: a TAB costs no start of Python. Print it again after an update.
"""

import argparse
import importlib

import shtab

from data_pipeline.core.errors import cli
from pretrain.commands import COMMANDS


def whole_parser() -> argparse.ArgumentParser:
    """One parser with every command's below it."""
    parser = argparse.ArgumentParser(prog="textldm")
    commands = parser.add_subparsers(dest="command")
    for name, command in COMMANDS.items():
        own = importlib.import_module(command.line or command.module).make_parser()
        commands.add_parser(name, parents=[own], add_help=False, help=command.summary)
    complete_files(parser)
    return parser


def complete_files(parser: argparse.ArgumentParser) -> None:
    """Where a text or a path is expected that is no choice, names of files are offered."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                complete_files(below)
        elif action.choices is None and action.nargs != 0 and action.type not in (int, float):
            action.complete = shtab.FILE  # type: ignore[attr-defined]


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="textldm completion", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shell", choices=("bash", "zsh"))
    return parser


@cli
def main(argv: list[str] | None = None) -> None:
    """Print the script."""
    print(shtab.complete(whole_parser(), make_parser().parse_args(argv).shell))


if __name__ == "__main__":
    raise SystemExit(main())
