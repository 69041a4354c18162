"""A home folder and a user's name for accounts that have none: a number without a passwd entry in a container, HOME unset or read-only.

Libraries ask for both at unexpected places (torch's compiler the name, Triton and DeepSpeed the folder), and fail.
"""

import getpass
import os
import stat
import tempfile
from pathlib import Path

HUB = "HF_HOME"
CACHES = {
    HUB: ".cache/huggingface",
    "TORCH_EXTENSIONS_DIR": ".cache/torch_extensions",
    "TRITON_CACHE_DIR": ".triton/cache",
    "WANDB_CACHE_DIR": ".cache/wandb",
    "WANDB_CONFIG_DIR": ".config/wandb",
    "WANDB_DATA_DIR": ".local/share/wandb",
}
"""Variables that name folders which libraries make, and where these lie in a home folder without them."""


def settle_home() -> None:
    """Let this process and those that it starts have a home folder and caches that can be written, and a user's name."""
    try:
        home = Path.home()
    except RuntimeError:
        home = None
    if home is None or not home.is_dir():
        os.environ["HOME"] = str(temporary_home())
    elif not os.access(home, os.W_OK | os.X_OK):
        for variable, place in CACHES.items():
            kept = variable == HUB and (home / place).exists()  # models and tokens that are there can be read
            if not kept and not can_be_made(home / place):
                os.environ.setdefault(variable, str(temporary_home() / place))
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["USER"] = f"uid-{os.getuid()}"


def temporary_home() -> Path:
    """A folder of this user's alone below the temporary folder, the same for all of the user's processes if it can be.

    Its name is known to others, who may have made it first: then it is not taken.
    """
    folder = Path(tempfile.gettempdir()) / f"textldm-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
        is_private = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o077
    except OSError:
        is_private = False
    return folder if is_private else Path(tempfile.mkdtemp(prefix=folder.name))


def is_own(folder: Path) -> bool:
    """Whether no other user made the folder or may write to it; of the home's owner's, a container's root may be the user."""
    try:
        status = folder.stat()
    except OSError:
        return True  # it is not there yet
    return status.st_uid in (os.getuid(), Path.home().stat().st_uid) and not status.st_mode & stat.S_IWOTH


def can_be_made(folder: Path) -> bool:
    """Whether a folder is there to write in, or could be made."""
    there = next(place for place in (folder, *folder.parents) if place.exists())
    return os.access(there, os.W_OK | os.X_OK)
