"""How to shard and in what precision, and the DeepSpeed dictionary that says so. Does not need DeepSpeed itself."""

import json
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from data_pipeline.core.configuration import merged
from data_pipeline.core.errors import UserError
from data_pipeline.core.settings import OnResume, Section

if TYPE_CHECKING:
    import torch

OVERRIDABLE = {
    "zero_optimization", "communication_data_type", "aio", "comms_logger", "flops_profiler",
    "wall_clock_breakdown", "memory_breakdown", "dump_state", "steps_per_print", "log_level", "disable_python_gc",
}  # fmt: skip
"""Top-level keys that the config's `deepspeed` section may set. DeepSpeed itself ignores unknown ones silently."""

SECTIONS = (
    "zero_optimization", "zero_optimization.offload_optimizer", "zero_optimization.offload_param", "aio", "comms_logger",
    "flops_profiler",
)  # fmt: skip
"""Those of them, and below them, that are objects."""

OURS = {
    "optimizer": "optimizer.*", "scheduler": "schedule.*", "gradient_clipping": "optimizer.grad_clip",
    "train_batch_size": "data.rows_per_step", "train_micro_batch_size_per_gpu": "data.micro_batch_rows",
    "gradient_accumulation_steps": "data.micro_batch_rows", "checkpoint": "train.checkpoint_every",
    "fp16": "train.precision", "bf16": "train.precision", "data_types": "train.precision", "torch_autocast": "train.precision",
    "activation_checkpointing": "train.activation_checkpointing",
}  # fmt: skip
"""Keys of DeepSpeed that the configuration sets by another name."""


MAX_BUCKET = 200_000_000
"""Elements of gradients reduced at a time."""


class Sharding(Section):
    """What the ranks share out, where it lies, and in what precision they compute."""

    precision: Literal["fp32", "bf16", "fp8", "auto"] = "auto"
    """Of forward and backward; masters and sums are fp32 always. auto: bf16 where the device multiplies it (GPUs, CPUs with AMX or
    AVX512-BF16).
    fp8: bf16, but for the blocks' matrices, which torchao multiplies in fp8 (Ada, Hopper or newer; not measured yet)."""
    zero_stage: Annotated[Literal[0, 1, 2, 3], OnResume.FREE] = 1
    """What ranks share out: 0 nothing, 1 optimizer, 2 and gradients, 3 and parameters."""
    offload_optimizer: Annotated[Literal["none", "cpu", "nvme"], OnResume.FREE] = "none"
    """Where masters, moments and EMA live: on the device, in the host's memory, or in files in offload_folder."""
    offload_parameters: Annotated[Literal["none", "cpu", "nvme"], OnResume.FREE] = "none"
    """Where parameters live between uses (ZeRO 3)."""
    offload_folder: Annotated[str, OnResume.FREE] = ""
    """For nvme: a folder on every host's local disk; 36 bytes per parameter that a rank holds, freed when the job ends."""

    def computes_in(self, device: "torch.device") -> Literal["fp32", "bf16"]:
        """What `precision` comes to on this device, "auto" being bf16 where it is multiplied, not emulated."""
        if self.precision != "auto":
            return "fp32" if self.precision == "fp32" else "bf16"
        from data_pipeline.core.devices import multiplies_bf16  # and torch, without which a configuration is checked

        return "bf16" if self.zero_stage > 0 and multiplies_bf16(device) else "fp32"

    @model_validator(mode="after")
    def _check_sharding(self) -> Self:
        """Refuse combinations that DeepSpeed cannot do, or would do wrongly. Raises: ValueError."""
        if self.precision in ("bf16", "fp8") and self.zero_stage == 0:
            raise ValueError(
                f"train.precision is {self.precision} and train.zero_stage 0, where DeepSpeed would accumulate gradients in bf16: set"
                " train.zero_stage=1, 2 or 3"
            )
        if self.offload_parameters != "none" and self.zero_stage != 3:
            raise ValueError(
                f"train.offload_parameters is {self.offload_parameters} at train.zero_stage {self.zero_stage}; only stage"
                " 3 shares out parameters: set train.zero_stage=3 or train.offload_parameters=none"
            )
        if self.offload_optimizer != "none" and self.zero_stage == 0:
            raise ValueError(
                f"train.offload_optimizer is {self.offload_optimizer} at train.zero_stage 0, where the optimizer is"
                " torch's own; set train.zero_stage to 1, 2 or 3, or train.offload_optimizer=none"
            )
        if "nvme" in (self.offload_optimizer, self.offload_parameters) and not self.offload_folder:
            raise ValueError("train.offload_folder is empty; offloading to nvme needs a folder on a local disk there")
        return self


class EngineSettings(Sharding):
    """A configuration's sharding on the ranks and the device at hand."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """What auto has become on this device."""
    accumulation_steps: PositiveInt = 1
    """Micro-batches of each rank per step."""
    overrides: dict[str, Any] = Field(default_factory=dict)
    """The configuration's section `deepspeed`."""

    @classmethod
    def of(cls, sharding: Sharding, **decided: Any) -> Self:
        """The settings from a configuration's section and what was decided for these ranks. Raises: ValueError."""
        return cls(**sharding.model_dump(include=set(Sharding.model_fields)) | decided)


def check_overrides(overrides: dict[str, Any], zero_stage: int) -> None:
    """Refuse what DeepSpeed would ignore silently, or do wrongly.

    Raises: UserError for a top-level key that is unknown or has another name here, for a section that is no object, for another
    ZeRO stage than `zero_stage`, and for DeepSpeed's own offloading to NVMe.
    """
    for key in overrides:
        if key in OURS:
            raise UserError(f"deepspeed.{key} is set elsewhere in the configuration: use {OURS[key]}")
        if key not in OVERRIDABLE:
            raise UserError(
                f"deepspeed.{key} is unknown or not supported; possible are {', '.join(sorted(OVERRIDABLE))}"
            )
    for section in SECTIONS:
        value: Any = overrides
        for key in section.split("."):
            value = value.get(key, {})
        if not isinstance(value, dict):
            raise UserError(
                f"deepspeed.{section} is {json.dumps(value)}; expected an object: set keys below deepspeed.{section}"
            )
    zero = overrides.get("zero_optimization", {})
    if (stage := zero.get("stage", zero_stage)) != zero_stage:
        raise UserError(
            f"deepspeed.zero_optimization.stage is {stage}, train.zero_stage {zero_stage}: set the latter only"
        )
    for section, key in (("offload_optimizer", "offload_optimizer"), ("offload_param", "offload_parameters")):
        if zero.get(section, {}).get("device") == "nvme":
            raise UserError(
                f"deepspeed.zero_optimization.{section}.device is nvme, with which DeepSpeed trains on wrong gradients (docs/engine.md):"
                f" set train.{key}=nvme and train.offload_folder, a folder on a local disk"
            )


def deepspeed_config(settings: EngineSettings, num_parameters: int, pin_memory: bool = False) -> dict[str, Any]:
    """DeepSpeed's dictionary for these settings and model size, with `settings.overrides` merged over it, key by key.

    `pin_memory`: what is offloaded to the host lies in pinned memory, from which GPUs copy faster.

    Raises: UserError, as `check_overrides`.
    """
    check_overrides(settings.overrides, settings.zero_stage)
    zero: dict[str, Any] = {"stage": settings.zero_stage}
    if settings.zero_stage > 0:  # by default a buffer of 2 GB, however small the model
        zero["reduce_bucket_size"] = max(1, min(num_parameters, MAX_BUCKET))
    if settings.offload_optimizer != "none":  # to DeepSpeed, what is in files is on the host too (file_memory.py)
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": pin_memory}
    elif settings.zero_stage in (1, 2) and not (settings.precision == "bf16" and settings.zero_stage == 1):
        zero["compute_grad_norm"] = False  # measure() has it already
    if settings.offload_parameters != "none":
        zero["offload_param"] = {"device": "cpu", "pin_memory": pin_memory}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # bookkeeping only: a micro-batch is whatever the loader gives
        "gradient_accumulation_steps": settings.accumulation_steps,
        "gradient_clipping": 0.0,
        "zero_optimization": zero,
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 40,
    }
    if settings.precision == "bf16":
        config["bf16"] = {"enabled": True}
        config["communication_data_type"] = "fp32"
    return merged(config, settings.overrides)
