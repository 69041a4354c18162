"""Should a scheduler start a job again? For scripts: exit code 0 says yes, 1 no, with the reason on stderr.

    python -m pretrain.jobs.requeue CODE --config dit_xl [further arguments of pretrain/train.py]

By the table in faults/exit_codes.py, which the supervisor goes by too. How many starts in a row have brought no new checkpoint is kept
beside the run folder, in .<run>.restarts.json.
"""

import argparse
import json
import sys
from pathlib import Path

from data_pipeline.core.errors import EXIT_USER, cli
from data_pipeline.core.storage import write_text
from pretrain.checkpoint.find import complete_steps
from pretrain.config.command_line import make_parser as train_parser
from pretrain.config.load import load_config
from pretrain.faults.exit_codes import EXIT_CODES, EXIT_FAILED, EXIT_OK, MAX_FAILURES, restart


def ledger(run: Path) -> Path:
    """Where the failures of a run are counted."""
    return run.parent / f".{run.name}.restarts.json"


def start_again(run: Path, code: int) -> tuple[bool, str]:
    """Whether to start the job again after this exit code, and why; a failure is counted."""
    kind, told = restart(code), EXIT_CODES.get(code, "unknown, or a signal's")
    if kind != "bounded":
        ledger(run).unlink(missing_ok=True)
        return kind == "at once", f"exit code {code} ({told})"
    try:
        kept = json.loads(ledger(run).read_text(encoding="utf-8"))
        known, failures = set(kept["checkpoints"]), int(kept["failures"])
    except (OSError, ValueError, KeyError, TypeError):
        known, failures = set(), 0
    found = set(complete_steps(run).values())
    failures = 1 if found - known else failures + 1
    ledger(run).parent.mkdir(parents=True, exist_ok=True)
    write_text(ledger(run), json.dumps({"checkpoints": sorted(found), "failures": failures}))
    return failures <= MAX_FAILURES, (
        f"exit code {code} ({told}), {failures} start(s) in a row without a new checkpoint, at most {MAX_FAILURES}"
    )


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m pretrain.jobs.requeue",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("code", type=int, help="with which the job ended")
    parser.add_argument("train", nargs=argparse.REMAINDER, help="arguments of pretrain/train.py")
    return parser


@cli
def main(argv: list[str] | None = None) -> int:
    """Command line."""
    arguments = make_parser().parse_args(argv)
    if arguments.code == EXIT_USER:  # perhaps a mistake in what would be read here
        print("not started again: a mistake in the input", file=sys.stderr)
        return EXIT_FAILED
    parsed = train_parser().parse_args(arguments.train)
    config = load_config(parsed.config, [*parsed.set, *([f"train.run={parsed.run}"] if parsed.run else [])])
    again, why = start_again(config.run_folder, arguments.code)
    print(f"{'started again' if again else 'not started again'}: {why}", file=sys.stderr)
    return EXIT_OK if again else EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main(None))
