"""TextLDM: pretraining latent diffusion language models, from text to a Hugging Face folder.

`textldm NAME ...` is the same as `python -m pretrain NAME ...`; `textldm NAME --help` says what a command takes. Over
several processes `pretrain/train.py` and `data_pipeline/cache_features.py` are launched by their paths (deepspeed, torchrun, srun).
"""

import importlib
import sys
from typing import NamedTuple

from data_pipeline.core.errors import EXIT_USER


class Command(NamedTuple):
    """A command: the module whose `main(arguments)` returns its exit code, and what it does in one line."""

    module: str
    summary: str


COMMANDS = {
    "quickstart": Command("pretrain.quickstart.recipe", "the whole recipe in miniature (what ./run.sh runs)"),
    "prepare": Command(
        "data_pipeline.prepare.__main__", "text into packed, shuffled shards; `prepare inspect | verify FOLDER`"
    ),
    "tokenizer": Command("data_pipeline.text.tokenization", "train a byte-level BPE on text, where no hub is at hand"),
    "teacher": Command("data_pipeline.features.make_teacher", "a small frozen language model, where no hub is at hand"),
    "cache": Command("data_pipeline.cache_features", "the frozen language model's features, once; `cache check`"),
    "train": Command("pretrain.train", "train a stage, in one process"),
    "diagnose": Command("pretrain.diagnose.__main__", "go or no-go: is the run alive?"),
    "convert": Command("pretrain.export.convert", "a run into one Hugging Face folder"),
    "generate": Command("pretrain.export.generate", "continue prompts with an exported model"),
    "supervise": Command("pretrain.jobs.supervise", "start a job, and start it again on the hosts that answer"),
    "hosts": Command("pretrain.jobs.hosts", "do the hosts of a hostfile answer, with the same versions?"),
    "checkpoint": Command("pretrain.checkpoint.__main__", "inspect or verify a checkpoint"),
    "config": Command("pretrain.config.__main__", "every key of a configuration, with its value and meaning"),
    "prose": Command(
        "data_pipeline.text.installed_prose", "the English prose that lies on any machine with Python, as JSON lines"
    ),
    "report": Command("pretrain.quickstart.report", "pictures of a finished recipe"),
}


def overview() -> str:
    """The map of commands."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(["usage: textldm NAME [ARGUMENTS]", "", (__doc__ or "").strip(), "", "commands:", *lines])


def main(argv: list[str] | None = None) -> int | None:
    """Run the named command; its module is imported only now, so that a misspelt name is found at once."""
    name, *arguments = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(overview())
        return 0
    if name not in COMMANDS:
        print(f"error: textldm has no command {name!r}; expected one of {', '.join(COMMANDS)}", file=sys.stderr)
        return EXIT_USER
    return importlib.import_module(COMMANDS[name].module).main(arguments)


if __name__ == "__main__":
    sys.exit(main())
