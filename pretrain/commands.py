"""The commands of `textldm`, in the order of a run's life, and the modules that they are."""

from typing import NamedTuple


class Command(NamedTuple):
    """A command: a module with `main(arguments)`, which returns the exit code, and `make_parser()`; what it does in one line.

    `line`: another module that has `make_parser()`, and `check(arguments)` for mistakes, because `module` takes seconds to import.
    """

    module: str
    summary: str
    line: str = ""


GROUPS = {
    "try it": {
        "quickstart": Command("pretrain.quickstart.recipe", "the whole recipe in miniature (what ./run.sh runs)"),
    },
    "data": {
        "prepare": Command(
            "data_pipeline.prepare.__main__", "text into packed, shuffled shards; `prepare inspect | verify FOLDER`"
        ),
        "cache": Command(
            "data_pipeline.cache_features",
            "the frozen language model's features, once; `cache check`",
            "data_pipeline.features.command_line",
        ),
        "tokenizer": Command(
            "data_pipeline.text.tokenization", "train a byte-level BPE on text, where no hub is at hand"
        ),
        "teacher": Command(
            "data_pipeline.features.make_teacher", "a small frozen language model, where no hub is at hand"
        ),
        "prose": Command(
            "data_pipeline.text.installed_prose",
            "the English prose that lies on any machine with Python, as JSON lines",
        ),
    },
    "train": {
        "config": Command("pretrain.config.__main__", "every key of a configuration, with its value and meaning"),
        "plan": Command("pretrain.plan.__main__", "memory, days and failures of a run on a cluster; `plan simulate`"),
        "train": Command("pretrain.train", "train a stage, in one process", "pretrain.config.command_line"),
        "supervise": Command("pretrain.jobs.supervise", "start a job, and start it again on the hosts that answer"),
        "hosts": Command("pretrain.jobs.hosts", "do the hosts of a hostfile answer, with the same versions?"),
        "checkpoint": Command("pretrain.checkpoint.__main__", "inspect or verify a checkpoint"),
    },
    "judge and use": {
        "diagnose": Command(
            "pretrain.diagnose.__main__", "go or no-go: is the run alive?", "pretrain.diagnose.command_line"
        ),
        "evaluate": Command(
            "pretrain.evaluate.__main__",
            "ROUGE, MAUVE, nats and more, with intervals; `evaluate table | sweep | harness`",
            "pretrain.evaluate.command_line",
        ),
        "report": Command("pretrain.report.__main__", "a run on one page: figures, curves, texts; beside another's"),
        "convert": Command("pretrain.export.convert", "a run into one Hugging Face folder"),
        "generate": Command(
            "pretrain.export.generate", "continue prompts with an exported model", "pretrain.export.generate_line"
        ),
        "serve": Command(
            "pretrain.serve.__main__",
            "the same over HTTP: OpenAI's completions API, and a page",
            "pretrain.serve.command_line",
        ),
    },
    "shell": {
        "completion": Command("pretrain.completion", "a script by which bash or zsh completes all of these"),
    },
}

COMMANDS = {name: command for commands in GROUPS.values() for name, command in commands.items()}
