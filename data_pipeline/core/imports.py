"""A command's imports, without looking for garbage among them: there is none in torch and its like, and looking took a third of a start."""

import gc


def begin_imports() -> None:
    """From here to `end_imports` Python does not look for garbage."""
    gc.disable()


def end_imports() -> None:
    """What is there now is never looked through again, neither while the command runs nor at its end."""
    gc.freeze()
    gc.enable()
