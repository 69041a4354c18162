"""pretrain/train.py on a disk that takes its time: a save of so small a model would be over before anybody could kill it."""

import os
import time

from pretrain import train

SYNC_S = 0.008
"""By how much longer the disk takes to have something for sure: seven times a save."""


def main(argv: list[str]) -> int:
    """pretrain/train.py's."""
    sync = os.fsync

    def sync_slowly(file: int) -> None:
        time.sleep(SYNC_S)
        sync(file)

    os.fsync = sync_slowly  # type: ignore[assignment]
    return train.main(argv)
