"""What an exporter is given and what it gives: a stage's part of `textldm convert` is one function of a `Source`."""

import ast
import dataclasses
import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

import modeling
from data_pipeline.core.errors import UserError
from data_pipeline.core.telling import tellable
from data_pipeline.format.manifest import Manifest
from data_pipeline.text.tokenization import LoadedTokenizer
from pretrain.checkpoint.manifest import Manifest as CheckpointManifest
from pretrain.checkpoint.read import SavedTensors
from pretrain.config.schema import RunConfig
from pretrain.config.sections import Diagnose
from pretrain.runs.record import RunRecord


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Defaults of `generate` in the exported config; None is what the run's diagnosis generates with."""

    num_steps: int | None = None
    guidance_scale: float | None = None
    token_temperature: float | None = None
    solver: str | None = None

    def __post_init__(self) -> None:
        if self.num_steps is not None and self.num_steps < 1:
            raise UserError(f"--num-steps is {self.num_steps}; expected at least 1")

    def settings(self, diagnose: Diagnose) -> dict[str, Any]:
        """All fields by name; those that are None take the run's diagnosis's value."""
        given = dataclasses.asdict(self)
        return {name: getattr(diagnose, name) if value is None else value for name, value in given.items()}


@dataclasses.dataclass(frozen=True)
class Source:
    """What is exported: a checkpoint whose data and tokenizer are at hand and are those of its run.

    Attributes:
        saved: the checkpoint's manifest; `saved.checkpoint` is the checkpoint itself.
        weights: the state that is exported, "ema" or "weight".
        name, license_id: for the model card.
        sampling: what the command line says about sampling.
        vae: where the run's VAE is now, if it moved.
        files: closes, when the export is written, what was opened for it.
    """

    run: Path
    saved: CheckpointManifest
    record: RunRecord
    config: RunConfig
    manifest: Manifest
    tokenizer: LoadedTokenizer
    weights: str
    name: str
    license_id: str
    files: ExitStack
    sampling: Sampling = Sampling()
    vae: str | None = None

    def tensors(self) -> SavedTensors:
        """The checkpoint's, of the state that is exported. Raises: UserError."""
        return self.files.enter_context(SavedTensors(self.saved, self.weights))

    def without_flow(self, has_not: str) -> None:
        """For stages that sample by none. Raises: UserError, if the command line says something of it."""
        if self.vae is not None or any(value is not None for value in dataclasses.astuple(self.sampling)):
            raise UserError(
                f"{self.run} is a run of stage {self.config.stage}, whose export has {has_not}: drop --vae and the defaults of generate"
            )

    def _told_settings(self) -> str:
        """Model and optimizer as the configuration has them, for a card; of a stage without a model section all that is its own."""
        values = self.config.model_dump(mode="json")
        own = ["model"] if "model" in values else [name for name in values if name not in RunConfig.model_fields]
        return tellable(json.dumps({name: values[name] for name in (*own, "optimizer")}, indent=1))

    def card(self, template: str, model: PreTrainedModel, **more: object) -> str:
        """A card of a template that names `name`, `license_id`, `millions` of parameters, `step`, `fingerprint`, `settings` and what is
        given besides.
        """
        return template.format(
            name=self.name,
            license_id=self.license_id,
            millions=sum(parameter.numel() for parameter in model.parameters()) / 1e6,
            step=self.saved.step,
            fingerprint=self.manifest.fingerprint,
            settings=self._told_settings(),
            **more,
        )


@dataclasses.dataclass(frozen=True)
class Exported:
    """What an exporter makes.

    Attributes:
        model: of fp32 weights, on the meta device; its config says all that the tokenizer's files do not.
        tensor: gives a weight or buffer by the name that `model.state_dict()` has for it, fp32 on the CPU. Each is asked for once, so that
            no more than one need be in memory.
        card: README.md, Markdown with the hub's metadata on top.
        code: files that travel with the weights, for `trust_remote_code=True`; none of a stock class of transformers.
    """

    model: PreTrainedModel
    tensor: Callable[[str], Tensor]
    card: str
    code: tuple[Path, ...] = ()


def modeling_files(entry: str) -> tuple[Path, ...]:
    """A file of modeling/, e.g. textldm.py, and every neighbour that it needs, by their relative imports."""
    folder = Path(modeling.__path__[0])
    names, waiting = set[str](), [entry]
    while waiting:
        name = waiting.pop()
        if name in names:
            continue
        names.add(name)
        for node in ast.walk(ast.parse((folder / name).read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level == 1:
                modules = [node.module] if node.module else [alias.name for alias in node.names]
                waiting += [f"{module}.py" for module in modules]
    return tuple(folder / name for name in sorted(names))
