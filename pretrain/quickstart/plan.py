"""The plan of the miniature recipe: its steps as commands, and the ledger of what is done."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_pipeline.core.errors import UserError
from data_pipeline.core.storage import write_text

RANKS = 2
ROW_TOKENS = 512
WINDOW_TOKENS = 256


@dataclass(frozen=True)
class Step:
    """One command of the recipe.

    `name`: also its key in recipe.json. `command`: as a user would type it. `title`: what it does, in a line.
    `produces`: file or folder without which the step does not count as done. `owns`: folder that is the step's alone, removed when
    it has to start anew.
    """

    name: str
    title: str
    command: list[str]
    produces: Path
    owns: Path | None = None


class Ledger:
    """What has been done, in <output>/recipe.json."""

    def __init__(self, folder: Path):
        self.path = folder / "recipe.json"
        self.entries: dict[str, Any] = {}
        if self.path.is_file():
            try:
                self.entries = json.loads(self.path.read_text())
            except ValueError as error:
                raise UserError(f"{self.path} cannot be read ({error}); start over with --fresh") from None

    def is_done(self, step: Step) -> bool:
        """Whether the step was finished with this very command, on inputs that have not changed since, and its product exists."""
        return self._goes_on(step) and "seconds" in self.entries[step.name] and step.produces.exists()

    def begin(self, step: Step, behind: Sequence[str]) -> None:
        """Note that a step starts, so that the steps named in `behind`, which use what it makes, have to run again.

        A step that was interrupted goes on where it was; one with another command or other inputs than before starts anew.
        """
        if step.name in self.entries and not self._goes_on(step) and step.owns is not None:
            shutil.rmtree(step.owns, ignore_errors=True)
        self.entries[step.name] = {"command": step.command}
        for name in behind:
            if name in self.entries:
                self.entries[name]["stale"] = True
        self.save()

    def finish(self, step: Step, seconds: float, peak_memory_gib: float) -> None:
        """Remember a finished step with its figures."""
        self.entries[step.name] |= {"seconds": seconds, "peak_memory_gib": peak_memory_gib}
        self.save()

    def _goes_on(self, step: Step) -> bool:
        entry = self.entries.get(step.name)
        return entry is not None and entry["command"] == step.command and not entry.get("stale")

    def save(self) -> None:
        """Write the file, atomically."""
        write_text(self.path, json.dumps(self.entries, indent=1))


@dataclass(frozen=True)
class Sizes:
    """How large the recipe is. `vae`, `dit`: overrides of the two configurations, key -> value."""

    vocab_size: int = 4096
    teacher_seconds: int = 60
    min_dit_steps: int = 400
    max_dit_steps: int = 60_000
    min_teacher_steps: int = 250
    """In 60 s a slow machine takes some 330; one that is busy with other things took 37, and its features said nothing."""
    vae: dict[str, Any] = field(default_factory=dict)
    dit: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """The recipe's choices: where everything lies, and what the user brought."""

    output: Path
    source: str
    tokenizer: str | None
    teacher: str | None
    long: bool
    sizes: Sizes = Sizes()

    @property
    def data(self) -> Path:
        return self.output / "data"

    @property
    def vae(self) -> Path:
        return self.output / "vae"

    @property
    def dit(self) -> Path:
        return self.output / ("dit-long" if self.long else "dit")

    @property
    def export(self) -> Path:
        return self.output / ("export-long" if self.long else "export")

    @property
    def prompts(self) -> Path:
        return self.output / "prompts.txt"

    @property
    def page(self) -> Path:
        """The report: in the run's folder, so the long run has its own."""
        return self.dit / "report.html"

    @property
    def tokenizer_folder(self) -> str:
        """Folder or hub id of the tokenizer: as given, else the teacher's (a teacher cannot read another's tokens), else one trained
        on the text.
        """
        return self.tokenizer or self.teacher or str(self.output / "tokenizer")

    @property
    def teacher_folder(self) -> str:
        return self.teacher or str(self.output / "teacher")

    def before_dit(self) -> list[Step]:
        """Steps up to the VAE's diagnosis; the short and the long recipe share them."""
        data, features = str(self.data), str(self.data / "features")
        steps = []
        if not (self.tokenizer or self.teacher):
            steps.append(
                Step(
                    "tokenizer",
                    f"train a byte-level BPE of {self.sizes.vocab_size} tokens on the text",
                    _command(
                        "tokenizer",
                        "train",
                        source=self.source,
                        vocab_size=self.sizes.vocab_size,
                        output=self.tokenizer_folder,
                    ),
                    Path(self.tokenizer_folder),
                    Path(self.tokenizer_folder),
                )
            )
        steps.append(
            Step(
                "prepare",
                "tokenise the text and pack it into WebDataset shards",
                _command(
                    "prepare",
                    source=self.source,
                    tokenizer=self.tokenizer_folder,
                    output=data,
                    row_tokens=ROW_TOKENS,
                    max_document_length=WINDOW_TOKENS,
                    min_document_length=16,
                    heldout_fraction=0.02,
                ),
                self.data / "manifest.json",
                self.data,
            )
        )
        if self.teacher is None:
            steps.append(
                Step(
                    "teacher",
                    f"train a small causal language model for {self.sizes.teacher_seconds} s, the teacher where no hub is at hand",
                    _command(
                        "teacher",
                        data=data,
                        output=self.teacher_folder,
                        seconds=self.sizes.teacher_seconds,
                        min_steps=self.sizes.min_teacher_steps,
                    ),
                    Path(self.teacher_folder),
                    Path(self.teacher_folder),
                )
            )
        steps += [
            Step(
                "features",
                "run the frozen teacher over every shard once and store its features, compressed",
                _launch(
                    "data_pipeline/cache_features.py",
                    data=data,
                    teacher=self.teacher_folder,
                    output=features,
                    sample_tokens=60_000,
                ),
                self.data / "features" / "manifest.json",
                self.data / "features",
            ),
            Step(
                "vae",
                "stage 1: train the VAE",
                _train(
                    "quickstart_vae",
                    self.vae,
                    {"data.path": data, "repa.features": features, "repa.teacher": self.teacher_folder}
                    | self.sizes.vae,
                ),
                self.vae / "checkpoints" / "latest",
                self.vae,
            ),
            Step(
                "diagnose-vae",
                "is this latent space fit for diffusion?",
                _command("diagnose", run=self.vae),
                self.vae / "diagnosis.json",
            ),
        ]
        return steps

    def from_dit(self, num_steps: int) -> list[Step]:
        """Steps from the DiT's training (`num_steps` updates) to the report."""
        data, suffix = str(self.data), "-long" if self.long else ""
        trajectory = str(self.dit / "trajectory.json")
        return [
            Step(
                f"dit{suffix}",
                "stage 2: train the DiT on the frozen VAE's latents",
                _train(
                    "quickstart_dit",
                    self.dit,
                    {"data.path": data, "model.vae": self.vae, "train.steps": num_steps} | self.sizes.dit,
                ),
                self.dit / "checkpoints" / "latest",
                self.dit,
            ),
            Step(
                f"diagnose-dit{suffix}",
                "does it know language? (nats per token against the unigram's)",
                # Judged by its words: of four times the text, whose share then has an error of 2 % instead of 4.
                _command("diagnose", run=self.dit, **{"set": "diagnose.sample_tokens=4096"} if self.long else {}),
                self.dit / "diagnosis.json",
            ),
            Step(
                f"export{suffix}",
                "one Hugging Face folder of VAE, DiT and tokenizer",
                _command("convert", run=self.dit, output=self.export),
                self.export / "config.json",
            ),
            Step(
                f"generate{suffix}",
                "continue three held-out prompts",
                _command(
                    "generate",
                    model=self.export,
                    prompt_file=self.prompts,
                    max_new_tokens=64,
                    trajectory=trajectory,
                ),
                Path(trajectory),
            ),
            Step(
                f"report{suffix}",
                "all of it on one page: nats, losses, verdict, texts, speed, and a text on its way from noise to words",
                _command("report", run=self.dit, trajectory=trajectory, output=self.page),
                self.page,
            ),
        ]


def _flags(options: dict[str, Any]) -> list[str]:
    return [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]


def _command(name: str, *arguments: str, **options: Any) -> list[str]:
    return ["textldm", name, *arguments, *_flags(options)]


def _launch(script: str, *arguments: str, **options: Any) -> list[str]:
    return ["deepspeed", "-q", "--num_accelerators", str(RANKS), script, *arguments, *_flags(options)]


def _train(config: str, run: Path, settings: dict[str, Any]) -> list[str]:
    overrides = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    return _launch("pretrain/train.py", "--config", config, "--run", str(run), *overrides)
