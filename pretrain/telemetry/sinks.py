"""Where rank 0 writes: metrics.jsonl and log.txt always, a progress bar in terminals, wandb and TensorBoard when asked.

A recorder that fails (no network, no package, a full account) is reported once and dropped, one that hangs holds up nobody
(background.py): neither ends a run.
"""

import contextlib
import json
import math
import netrc
import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from tqdm import tqdm

from data_pipeline.core.outside import parse_json
from data_pipeline.core.telling import tellable, without_passwords
from pretrain.config.schema import RunConfig
from pretrain.faults.output import LineFile
from pretrain.telemetry.background import Background
from pretrain.telemetry.identity import run_id

CLOSE_S = 60.0
"""How long a recorder may take to send the rest; less where the watchdog is quick."""
METRICS_NAME, LOG_NAME = "metrics.jsonl", "log.txt"


def read_metrics(run: Path, kind: str = "train") -> list[dict[str, Any]]:
    """The lines of one kind ("train", "eval") by step; of steps that a restart repeated, the last. No torn lines."""
    lines: dict[int, dict[str, Any]] = {}
    for line in _lines(run / METRICS_NAME):
        if line.get("kind") == kind:
            lines[line["step"]] = line
    return [lines[step] for step in sorted(lines)]


def _lines(path: Path) -> list[dict[str, Any]]:
    parsed = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            parsed.append(parse_json(text))
        except ValueError:  # torn by a kill
            continue
    return parsed


def _first_time(path: Path) -> float | None:
    """Time of a metrics file's first line, in seconds since 1970; None if it has none."""
    try:
        with open(path, encoding="utf-8") as file:
            return parse_json(file.readline())["time"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


class Sinks:
    """All recorders of rank 0."""

    def __init__(self, run: Path, config: RunConfig, start_step: int):
        run.mkdir(parents=True, exist_ok=True)
        self._steps = config.train.steps
        self.first_start = _first_time(run / METRICS_NAME) or time.time()
        self._metrics, self._log = LineFile(run / METRICS_NAME), LineFile(run / LOG_NAME)
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=self._steps, initial=start_step, unit="step", dynamic_ncols=True)
        self._close_s = min(CLOSE_S, config.train.watchdog_s / 8)
        self._terminal = Background("the terminal", lambda: (self._show, lambda: None), self._to_log)
        makers = {"wandb": start_wandb, "tensorboard": start_tensorboard}
        self._recorders = [
            Background(name, lambda make=make: make(run, config), self.say)  # type: ignore[misc]
            for name, make in makers.items()
            if getattr(config.telemetry, name)
        ]

    def train(self, line: dict[str, Any], eta_s: float) -> None:
        """Record a logged step; `eta_s`: seconds that the rest of the run will take."""
        self.write(line)
        self._record(line)
        text = describe_step(line)
        self._to_log(f"step {line['step']}/{self._steps}  {text}")
        self._terminal(f"step {line['step']}/{self._steps}  {text}  eta {duration(eta_s)}", line["step"], text)

    def evaluation(self, line: dict[str, Any]) -> None:
        """Record a held-out evaluation."""
        self.write(line)
        self._record(line)
        figures = {name.removeprefix("eval/"): value for name, value in line.items() if name.startswith("eval/")}
        self.say(f"held-out after step {line['step']}:  {describe_figures(figures)}")

    def write(self, line: Mapping[str, Any]) -> None:
        """Append a line to metrics.jsonl; nan and infinities, which JSON lacks, become null."""
        finite = {name: None if _is_odd(value) else value for name, value in line.items()}
        self._metrics.write(without_passwords(json.dumps({**finite, "time": time.time()})))

    def say(self, text: str) -> None:
        """Print a line above the progress bar and append it to log.txt; what is not `tellable` in neither."""
        text = tellable(text)
        self._to_log(text)
        self._terminal(text)

    def _show(self, text: str, step: int | None = None, beside_bar: str = "") -> None:
        if self._bar is None:
            print(text, flush=True)
        elif step is None:
            self._bar.write(text, file=sys.stderr)
        else:
            self._bar.update(step - self._bar.n)
            self._bar.set_postfix_str(beside_bar)

    def _to_log(self, text: str) -> None:
        self._log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}")

    def _record(self, line: Mapping[str, Any]) -> None:
        numbers = {n: float(v) for n, v in line.items() if isinstance(v, int | float) and n not in ("step", "time")}
        for record in self._recorders:
            record(numbers, line["step"])

    def close(self) -> None:
        """Write everything and close, as far as nothing hangs."""
        for recorder in self._recorders:
            recorder.close(self._close_s)
        self._terminal.close(self._close_s)
        if self._bar is not None:
            self._bar.close()
        self._metrics.close()
        self._log.close()


def start_wandb(run: Path, config: RunConfig) -> tuple[Callable, Callable]:
    """A Weights & Biases run, continued by a restart: its id goes with the run folder."""
    import wandb

    session = wandb.init(
        project=config.telemetry.wandb_project,
        name=run.name,
        id=run_id(run),
        resume="allow",
        dir=run,
        mode=wandb_mode(),  # type: ignore[arg-type]
        config=config.told(),
        settings=wandb.Settings(silent=True),
    )
    # wandb drops steps that are not larger than its last, but those that a restart repeats must be taken: so the step
    # is a metric of its own.
    session.define_metric("step")
    session.define_metric("*", step_metric="step")
    return lambda numbers, step: session.log({**numbers, "step": step}), session.finish


def wandb_mode() -> str:
    """What wandb is to do: what WANDB_MODE (or `wandb offline`, `wandb disabled`) says, else online if there is a key."""
    import wandb

    settings = wandb.setup().settings
    said = os.environ.get("WANDB_MODE", "").lower() or settings.mode
    if said == "disabled" or os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1", "yes"):
        return "disabled"
    if said in ("offline", "dryrun"):
        return "offline"
    if os.environ.get("WANDB_MODE"):
        return "online"
    host = urlparse(os.environ.get("WANDB_BASE_URL") or settings.base_url).hostname
    return "online" if os.environ.get("WANDB_API_KEY") or settings.api_key or _in_netrc(host or "") else "offline"


def _in_netrc(host: str) -> bool:
    """Whether there is a password for a host, which may be one's own, in the file that wandb reads."""
    named = os.environ.get("NETRC")
    for place in [named] if named else ["~/.netrc", "~/_netrc"]:
        with contextlib.suppress(OSError, netrc.NetrcParseError):
            return host in netrc.netrc(os.path.expanduser(place)).hosts
    return False


def start_tensorboard(run: Path, config: RunConfig) -> tuple[Callable, Callable]:
    """TensorBoard event files in <run>/tensorboard."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(run / "tensorboard"))

    def record(numbers: dict[str, float], step: int) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)

    return record, writer.close


def describe_step(line: Mapping[str, Any]) -> str:
    """A logged step in one line for people."""
    parts = [
        f"loss {line['loss']:.4f}",
        f"norm {line['grad_norm']:.3g}",
        f"lr {line['lr']:.2e}",
        f"{line['tokens_per_s']:,.0f} tokens/s",
        f"wait {line['wait_share']:.0%}",
    ]
    if "mfu" in line:
        parts.append(f"mfu {line['mfu']:.1%}")
    return "  ".join(parts)


def describe_figures(figures: Mapping[str, float]) -> str:
    """Named figures in one line; those called x_q1, x_q2, ... become one list x [...]."""
    lists: dict[str, list[float]] = {}
    for name, value in figures.items():
        lists.setdefault(re.sub(r"_q\d+$", " by quarter of t", name), []).append(value)
    texts = {name: " ".join(f"{value:.4g}" for value in values) for name, values in lists.items()}
    return "  ".join(f"{name} [{text}]" if " by " in name else f"{name} {text}" for name, text in texts.items())


def duration(seconds: float) -> str:
    """Seconds as days, hours, minutes and seconds: 1 d 02:03:04."""
    whole = max(0, round(seconds))
    days, rest = divmod(whole, 86400)
    clock = f"{rest // 3600:02d}:{rest // 60 % 60:02d}:{rest % 60:02d}"
    return f"{days} d {clock}" if days else clock


def _is_odd(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
