"""What a run needs and how long it takes, before a GPU is asked for.

textldm plan --config dit_xl --nodes 4 --gpus-per-node 8 --gpu-memory 80
textldm plan --config dit_7b --nodes 24 --gpus-per-node 8 --gpu-memory 141 --write dit_7b.planned.json
textldm plan simulate --nodes 1000 --failures 16 --spares 32        goodput against the interval between checkpoints

Arithmetic over the configuration's own models (docs/cluster.md). Prepared data in data.path say how long windows are and how much text
there is; without them --row-tokens, --window-tokens and --tokens do.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from tabulate import tabulate

from data_pipeline.core.errors import UserError, cli
from data_pipeline.core.storage import write_text
from pretrain.config.load import load_config
from pretrain.plan.estimate import GIB, Choice, Hardware, Plan, Text, make_plan, no_fit, text_of
from pretrain.plan.reliability import LLAMA_3, OPT, between_failures_s, daly_s, goodput
from pretrain.plan.simulate import POLICIES, Cluster, Outcome, sweep
from pretrain.telemetry.flops import PEAK_TFLOPS, peak_flops

FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Intervals that a simulation tries, in Daly's."""


def make_parser() -> argparse.ArgumentParser:
    """The command line, without that of simulate."""
    parser = argparse.ArgumentParser(
        prog="textldm plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="a JSON file, or a name in configs/")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as of pretrain/train.py")
    parser.add_argument("--nodes", type=int, default=1, help="(%(default)s)")
    parser.add_argument("--gpus-per-node", type=int, default=8, help="(%(default)s)")
    parser.add_argument("--gpu-memory", type=float, default=80.0, metavar="GiB", help="of one GPU (%(default)s)")
    parser.add_argument(
        "--gpu", default="H100", help="name, for its peak: " + ", ".join(PEAK_TFLOPS) + " (%(default)s)"
    )
    parser.add_argument(
        "--tflops", type=float, help="that a GPU sustains in training, measured; none: 40 %% of its peak"
    )
    parser.add_argument(
        "--interconnect", type=float, default=50.0, metavar="GB/s", help="a GPU to other nodes (%(default)s)"
    )
    parser.add_argument(
        "--mtbf-node-days", type=float, default=1000 / LLAMA_3, metavar="DAYS",
        help="mean days between failures of a node; 0: none (%(default).0f: Llama 3's; OPT's were 63)",
    )  # fmt: skip
    parser.add_argument("--restart", type=float, default=300.0, metavar="S", help="failure to training (%(default)s)")
    parser.add_argument("--storage", type=float, default=5.0, metavar="GB/s", help="shared storage (%(default)s)")
    parser.add_argument("--price", type=float, default=0.0, help="of a GPU hour")
    parser.add_argument("--row-tokens", type=int, help="of a row (the data's, else what textldm prepare makes)")
    parser.add_argument("--window-tokens", type=int, help="of a mean window (the data's, else 512)")
    parser.add_argument("--tokens", type=float, help="of the prepared text (the data's)")
    parser.add_argument("--vocab-size", type=int, default=0, help="where the configuration does not say (151936)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write a configuration with what is recommended")
    return parser


def make_simulate_parser() -> argparse.ArgumentParser:
    """The command line of simulate."""
    parser = argparse.ArgumentParser(
        prog="textldm plan simulate", description="Goodput of a job on nodes that fail, against the interval between checkpoints."
    )  # fmt: skip
    parser.add_argument("--nodes", type=int, default=1000, help="of 8 GPUs (%(default)s)")
    parser.add_argument(
        "--failures", type=float, default=LLAMA_3, help=f"per 1,000 node-days (%(default)s: Llama 3's; OPT's {OPT:g})"
    )
    parser.add_argument("--slow", type=float, default=0.0, help="nodes that become slow, per 1,000 node-days")
    parser.add_argument("--spares", type=int, default=0, help="further nodes at hand (%(default)s)")
    parser.add_argument(
        "--checkpoint", type=float, default=5.0, metavar="S", help="training stands still (%(default)s)"
    )
    parser.add_argument(
        "--write-time", type=float, default=60.0, metavar="S", help="until it is complete (%(default)s)"
    )
    parser.add_argument("--restart", type=float, default=300.0, metavar="S", help="failure to training (%(default)s)")
    parser.add_argument("--repair", type=float, default=24.0, metavar="HOURS", help="of a node (%(default)s)")
    parser.add_argument("--days", type=float, default=100.0, help="simulated (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="goodput against interval, as PNG")
    return parser


def hardware_of(arguments: argparse.Namespace) -> Hardware:
    """The cluster of a command line. Raises: UserError."""
    for name in ("nodes", "gpus_per_node", "gpu_memory", "interconnect", "storage"):
        if getattr(arguments, name) <= 0:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(arguments, name)}; expected a number above 0")
    if arguments.tflops is not None and arguments.tflops <= 0:
        raise UserError(
            f"--tflops is {arguments.tflops}; expected a number above 0, measured by python -m benchmarks.gpu"
        )
    if arguments.mtbf_node_days < 0:
        raise UserError(
            f"--mtbf-node-days is {arguments.mtbf_node_days}; expected days, or 0 for nodes that never fail"
        )
    peak = peak_flops(arguments.gpu, "bf16")
    if peak is None and arguments.tflops is None:
        raise UserError(f"--gpu {arguments.gpu} is not known: name one of {', '.join(PEAK_TFLOPS)}, or give --tflops")
    return Hardware(
        arguments.nodes, arguments.gpus_per_node, arguments.gpu_memory * GIB, (peak or 0) / 1e12, arguments.tflops,
        interconnect=1e9 * arguments.interconnect, storage=1e9 * arguments.storage, restart_s=arguments.restart,
        failures=1000 / arguments.mtbf_node_days if arguments.mtbf_node_days > 0 else 0.0, price=arguments.price,
    )  # fmt: skip


def choices_table(plan: Plan) -> str:
    """Memory and time by ZeRO stage and recomputation."""

    def row(choice: Choice) -> tuple[str, ...]:
        sizes = (choice.weights, choice.gradients, choice.states, choice.buffers, choice.row_bytes)
        fits = choice.micro_batch_rows > 0
        return (
            f"{'*' if choice == plan.best else ' '}{choice.zero_stage}",
            "all" if choice.activation_checkpointing else "none",
            *(f"{size / GIB:.1f}" for size in sizes),
            f"{choice.micro_batch_rows or 'none'}",
            f"{choice.memory / GIB:.1f}",
            f"{choice.sent_bytes / 1e9:.1f}",
            f"{choice.compute_s:.2f}" if fits else "",
            f"{choice.communication_s:.2f}" if fits else "",
            f"{choice.step_s:.2f}" if fits else "",
        )

    headers = ("ZeRO", "recomputed", "weights", "gradients", "states", "buffers", "a row", "rows fit", "GiB", "GB sent",
               "compute s", "+ comm. s", "step s")  # fmt: skip
    alignment = ("left", "left", *["right"] * 11)
    return tabulate(map(row, plan.choices), headers, tablefmt="plain", disable_numparse=True, colalign=alignment)


def report(plan: Plan, hardware: Hardware, text: Text) -> str:
    """The plan in words."""
    lines = [
        f"{plan.parameters:,} parameters trained, {plan.frozen_parameters:,} frozen; {plan.flops_per_token:.3g} FLOPs a token;"
        f" {plan.tokens_per_step:,} tokens a step",
        f"{plan.ranks} GPUs, {plan.rows_per_rank} row(s) each"
        + (f", {plan.idle:.0%} of them filler" * (plan.idle > 0)),
        "",
        choices_table(plan),
        "",
        "GiB a GPU; activations without torch.compile, which keeps less. Communication at 0 to 2 comes after compute, at 3 beside it.",
    ]
    if (best := plan.best) is None:
        return "\n".join([*lines, no_fit(plan.choices)])
    lines += [
        f"recommended: train.zero_stage={best.zero_stage} train.activation_checkpointing={best.activation_checkpointing}"
        f" data.micro_batch_rows={best.micro_batch_rows} train.checkpoint_every={plan.checkpoint_every}",
        f"a step {best.step_s:.2f} s at {hardware.rate / 1e12:.0f} TFLOP/s a GPU: {plan.tokens_per_s:,.0f} tokens/s,"
        f" {plan.days:.1f} days at {plan.goodput:.1%} goodput"
        + (f", {plan.passes:.1f} passes" if plan.passes is not None else ""),
        f"a checkpoint {plan.checkpoint_bytes / 1e9:.1f} GB, training stands still {plan.checkpoint_stall_s:.1f} s, complete after"
        f" {plan.checkpoint_write_s:.0f} s; one every {plan.checkpoint_interval_s / 60:.0f} minutes for"
        f" {plan.hours_between_failures:.1f} hours between failures",
        f"{plan.gpu_hours:,.0f} GPU hours"
        + (f", {plan.cost:,.0f} at {hardware.price:g} an hour" * (hardware.price > 0)),
    ]
    if text.tokens:
        cache = "; feature cache " + ", ".join(
            f"{size / 1e9:,.0f} GB ({name})" for name, size in plan.cache_bytes.items()
        )
        lines.append(f"shards {plan.shard_bytes / 1e9:,.1f} GB" + cache * bool(plan.cache_bytes))
    return "\n".join(lines)


def simulated(arguments: argparse.Namespace) -> dict[str, list[Outcome]]:
    """Outcomes by policy, one for each factor of Daly's interval."""
    between_s = between_failures_s(arguments.nodes, max(arguments.failures, 1e-9))
    interval_s = daly_s(arguments.checkpoint, between_s)
    found: dict[str, list[Outcome]] = {}
    for policy in POLICIES:
        cluster = Cluster(
            arguments.nodes, arguments.spares, arguments.failures, interval_s, arguments.checkpoint, arguments.write_time,
            arguments.restart, repair_s=3600 * arguments.repair, slow=arguments.slow, policy=policy,
        )  # fmt: skip
        found[policy] = sweep(cluster, [factor * interval_s for factor in FACTORS], arguments.days, arguments.seed)
    return found


def plot(path: Path, intervals_s: list[float], found: dict[str, list[Outcome]], formula: list[float]) -> None:
    """Goodput against interval, a line a policy, and Daly's formula."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    minutes = [interval / 60 for interval in intervals_s]
    for policy, outcomes in found.items():
        axes.plot(minutes, [outcome.goodput for outcome in outcomes], marker="o", label=policy)
    axes.plot(minutes, formula, "k--", label="Daly, nodes replaced at once")
    axes.set(xscale="log", xlabel="minutes between checkpoints", ylabel="goodput")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def simulate_command(argv: list[str]) -> None:
    """`textldm plan simulate`."""
    arguments = make_simulate_parser().parse_args(argv)
    if min(arguments.nodes, arguments.days, arguments.checkpoint) <= 0:
        raise UserError("--nodes, --days and --checkpoint must be above 0")
    found = simulated(arguments)
    between_s = between_failures_s(arguments.nodes, max(arguments.failures, 1e-9))
    intervals_s = [factor * daly_s(arguments.checkpoint, between_s) for factor in FACTORS]
    behind_s = arguments.restart + arguments.write_time
    formula = [goodput(interval, arguments.checkpoint, behind_s, between_s) for interval in intervals_s]
    if arguments.plot:
        plot(arguments.plot, intervals_s, found, formula)
    if arguments.json:
        outcomes = {policy: [dataclasses.asdict(one) for one in of] for policy, of in found.items()}
        print(json.dumps({"intervals_s": intervals_s, "daly": formula, "outcomes": outcomes}))
        return
    rows = [
        (policy, f"{interval / 60:.1f}", *(f"{share:.1%}" for share in (
            one.goodput, one.bought, one.lost, one.restarting, one.waiting, one.checkpoints, one.slower, daly)))
        for policy, of in found.items()
        for interval, one, daly in zip(intervals_s, of, formula, strict=True)
    ]  # fmt: skip
    headers = (
        "policy",
        "minutes",
        "goodput",
        "with spares",
        "lost",
        "restarting",
        "waiting",
        "checkpoints",
        "slower",
        "Daly",
    )
    print(
        f"{arguments.nodes} nodes, {arguments.spares} spares, {between_s / 3600:.2f} hours between failures, {arguments.days:g} days"
    )
    print(tabulate(rows, headers, tablefmt="plain", disable_numparse=True, colalign=("left", *["right"] * 9)))


@cli
def main(argv: list[str] | None = None) -> None:
    """Plan a run, or simulate a cluster."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["simulate"]:
        return simulate_command(argv[1:])
    arguments = make_parser().parse_args(argv)
    config = load_config(arguments.config, arguments.set)
    hardware = hardware_of(arguments)
    text, vocab_size = text_of(config, arguments.row_tokens, arguments.window_tokens, arguments.tokens)
    plan = make_plan(config, hardware, text, arguments.vocab_size or vocab_size)
    print(json.dumps(plan.told()) if arguments.json else report(plan, hardware, text))
    if arguments.write:
        values = {"base": str(arguments.config)} | plan.settings()
        write_text(arguments.write, json.dumps(values, indent=2) + "\n")
        print(f"written: {arguments.write}", file=sys.stderr)
    return None


if __name__ == "__main__":
    sys.exit(main(None))
