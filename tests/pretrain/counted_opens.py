"""pretrain/train.py that counts how often this rank opens manifests of data and features: <run>.opens-RANK holds one path a line."""

import os
import sys
from pathlib import Path

from pretrain import train


def main(argv: list[str]) -> int:
    """`train.main`; the environment names the folders, COUNTED="data:features"."""
    counted = {f"{folder}/manifest.json" for folder in os.environ["COUNTED"].split(":")}
    opened: list[str] = []

    def hook(event: str, arguments: tuple) -> None:
        # Python tells of an open() with an opener twice; the system call itself has no mode.
        if event == "open" and arguments[1] is None and str(arguments[0]) in counted:
            opened.append(str(arguments[0]))

    sys.addaudithook(hook)
    code = train.main(argv)
    Path(os.environ["COUNTED_IN"] + os.environ["RANK"]).write_text("\n".join(opened))
    return code
