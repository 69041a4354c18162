"""Every key of a configuration, resolved: its value, whether a resumed run may change it, its meaning and type.

textldm config dit_l --set train.steps=1000     # with its base and the overrides
textldm config dit_l --json                     # the whole as one file, without a base
"""

import argparse
import json
import shutil
import sys
from typing import Any

from tabulate import tabulate

from data_pipeline.core.errors import cli
from data_pipeline.core.settings import OnResume, keys, type_name
from pretrain.config.load import load_config
from pretrain.config.resume import on_resume
from pretrain.config.schema import RunConfig

VALUE_WIDTH = 60
"""Characters of "key = value" before it goes on in the next line; only texts are longer."""
RESUME_NOTE = (
    "resume: what a resumed run may change by itself (free), by --allow-change KEY (ask), or not at all (never)"
)


def rows(config: RunConfig) -> list[tuple[str, str, str]]:
    """(key = value, on resume, meaning and type) of every key."""
    marks = on_resume(type(config)) | dict.fromkeys(config.free_on_resume(), OnResume.FREE)
    words = {OnResume.FREE: "free", OnResume.NEVER: "never", None: "ask"}
    dump = config.model_dump(mode="json")
    found = []
    for key in keys(type(config)):
        if not key.is_section:
            value: Any = dump
            for name in key.name.split("."):
                value = value[name]
            text = f"{key.name} = {json.dumps(value, ensure_ascii=False)}"
            found.append((text, words[marks[key.name]], f"{key.meaning}  [{type_name(key.kind)}]"))
    return found


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="textldm config", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="a JSON file, or a name in configs/")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a key; may be repeated"
    )
    parser.add_argument("--json", action="store_true", help="print the resolved JSON alone")
    return parser


@cli
def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    arguments = make_parser().parse_args(argv)
    config = load_config(arguments.config, arguments.set)
    if arguments.json:
        print(config.model_dump_json(indent=2))
        return 0
    left = (
        shutil.get_terminal_size().columns - VALUE_WIDTH - 12 if sys.stdout.isatty() else None
    )  # whole lines for grep
    widths = [VALUE_WIDTH, None, left and max(left, 30)]
    headers = ("key = value", "resume", "meaning  [type]")
    print(tabulate(rows(config), headers=headers, tablefmt="simple", disable_numparse=True, maxcolwidths=widths))
    print(RESUME_NOTE)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(None))
