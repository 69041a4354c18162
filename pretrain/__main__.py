"""TextLDM: pretraining latent diffusion language models, from text to a Hugging Face folder.

`textldm NAME ...` is the same as `python -m pretrain NAME ...`; `textldm NAME --help` says what a command takes. Over
several processes `pretrain/train.py` and `data_pipeline/cache_features.py` are launched by their paths (deepspeed, torchrun, srun).
"""

import difflib
import importlib
import sys

from data_pipeline.core.errors import EXIT_USER
from data_pipeline.core.home import settle_home
from data_pipeline.core.imports import begin_imports, end_imports
from pretrain.commands import COMMANDS, GROUPS
from pretrain.faults.signals import ends_at_once


def overview() -> str:
    """The map of commands."""
    width = max(map(len, COMMANDS))
    lines = ["usage: textldm NAME [ARGUMENTS]", "", (__doc__ or "").strip()]
    for group, commands in GROUPS.items():
        lines += ["", f"{group}:"]
        lines += [f"  {name:<{width}}  {command.summary}" for name, command in commands.items()]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int | None:
    """Run the named command; its module is imported only now, so that a misspelt name is found at once."""
    name, *arguments = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(overview())
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        print(f"error: textldm has no command {name!r}; expected one of {', '.join(COMMANDS)}{hint}", file=sys.stderr)
        return EXIT_USER
    settle_home()  # libraries ask for it while they are imported
    command = COMMANDS[name]
    with ends_at_once():  # imports take seconds, in which Ctrl-C would print a traceback
        begin_imports()
        try:
            if command.line:
                importlib.import_module(command.line).check(arguments)
            module = importlib.import_module(command.module)
        finally:
            end_imports()
    return module.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
