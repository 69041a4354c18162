"""Reading a run's configuration: one JSON file, overrides on the command line, and one clear message for every mistake.

    config = load_config("dit_xl", ["train.steps=1000"])       # a path, else a name in configs/
    textldm config dit_xl --set train.steps=1000    # prints every key, its value and its meaning

Relative paths inside a configuration are relative to the working directory. The keys: pretrain/config_schema.py.
"""

import argparse
import json

from data_pipeline.core.errors import cli
from pretrain.config.load import describe, flatten, load_config


@cli
def main(argv: list[str] | None = None) -> int:
    """Print a configuration, resolved, with the meaning of every key."""
    parser = argparse.ArgumentParser(prog="textldm config", description=main.__doc__)
    parser.add_argument("config", help="a JSON file, or a name in configs/")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a key; may be repeated"
    )
    parser.add_argument("--json", action="store_true", help="print the resolved JSON alone")
    arguments = parser.parse_args(argv)
    config = load_config(arguments.config, arguments.set)
    if arguments.json:
        print(config.model_dump_json(indent=2))
        return 0
    values = dict(flatten(config.model_dump(mode="json")))
    for key, kind, meaning in describe(type(config)):
        print(f"{key + ' = ' + json.dumps(values.get(key)):<60} {meaning}  [{kind}]")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(None))
