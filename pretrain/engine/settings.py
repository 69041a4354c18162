"""How to shard and in what precision, and the DeepSpeed dictionary that says so. Does not need DeepSpeed itself."""

import json
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from data_pipeline.core.errors import UserError

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


@dataclass
class EngineSettings:
    """How to shard, and in what precision to compute.

    `accumulation_steps`: micro-batches of each rank per step. `offload_folder`: on a local disk, for what is offloaded to
    nvme. `overrides`: the config's section `deepspeed`.
    """

    zero_stage: Literal[0, 1, 2, 3] = 1
    precision: Literal["fp32", "bf16"] = "fp32"
    accumulation_steps: int = 1
    offload_optimizer: Literal["none", "cpu", "nvme"] = "none"
    offload_parameters: Literal["none", "cpu", "nvme"] = "none"
    offload_folder: str = ""
    overrides: dict[str, Any] = field(default_factory=dict)


def check_settings(settings: EngineSettings) -> None:
    """Refuse what DeepSpeed cannot do. Raises: UserError with the remedy."""
    stage = settings.zero_stage
    if stage not in (0, 1, 2, 3):
        raise UserError(f"train.zero_stage is {stage}; expected 0, 1, 2 or 3")
    if settings.accumulation_steps < 1:
        raise UserError(f"accumulation_steps is {settings.accumulation_steps}; expected at least 1")
    if settings.precision == "bf16" and stage == 0:
        raise UserError(
            "train.precision is bf16 and train.zero_stage 0, where DeepSpeed would accumulate gradients in bf16: "
            "set train.zero_stage=1, 2 or 3"
        )
    if settings.offload_optimizer != "none" and stage == 0:
        raise UserError("train.offload_optimizer needs train.zero_stage of 1, 2 or 3, found 0")
    if settings.offload_parameters != "none" and stage != 3:
        raise UserError(f"train.offload_parameters needs train.zero_stage=3, found {stage}")
    if "nvme" in (settings.offload_optimizer, settings.offload_parameters) and not settings.offload_folder:
        raise UserError("offloading to nvme needs train.offload_folder, a folder on a local disk; found none")


def deepspeed_config(settings: EngineSettings, num_parameters: int) -> dict[str, Any]:
    """DeepSpeed's dictionary for these settings and model size, with `settings.overrides` merged over it, key by key.

    Raises: UserError for a top-level key that is unknown (DeepSpeed would ignore it) or that has another name here, and
    for a section that is no object.
    """
    zero: dict[str, Any] = {"stage": settings.zero_stage}
    if settings.zero_stage > 0:  # by default a buffer of 2 GB, however small the model
        zero["reduce_bucket_size"] = max(1, min(num_parameters, MAX_BUCKET))
    if settings.offload_optimizer != "none":  # to DeepSpeed, what is in files is on the host too (file_memory.py)
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    elif settings.zero_stage in (1, 2) and not (settings.precision == "bf16" and settings.zero_stage == 1):
        zero["compute_grad_norm"] = False  # measure() has it already
    if settings.offload_parameters != "none":
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
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
    for key in settings.overrides:
        if key in OURS:
            raise UserError(f"deepspeed.{key} is set elsewhere in the configuration: use {OURS[key]}")
        if key not in OVERRIDABLE:
            raise UserError(
                f"deepspeed.{key} is unknown or not supported; possible are {', '.join(sorted(OVERRIDABLE))}"
            )
    for section in SECTIONS:
        value: Any = settings.overrides
        for key in section.split("."):
            value = value.get(key, {})
        if not isinstance(value, dict):
            raise UserError(
                f"deepspeed.{section} is {json.dumps(value)}; expected an object: set keys below deepspeed.{section}"
            )
    stage = settings.overrides.get("zero_optimization", {}).get("stage", settings.zero_stage)
    if stage != settings.zero_stage:
        raise UserError(
            f"deepspeed.zero_optimization.stage is {stage}, train.zero_stage {settings.zero_stage}: set the latter only"
        )
    merged = _merged(config, settings.overrides)
    for section, key in (("offload_optimizer", "offload_optimizer"), ("offload_param", "offload_parameters")):
        if merged["zero_optimization"].get(section, {}).get("device") == "nvme":
            raise UserError(
                f"deepspeed.zero_optimization.{section}.device is nvme, with which DeepSpeed trains on wrong gradients (docs/engine.md):"
                f" set train.{key}=nvme and train.offload_folder, a folder on a local disk"
            )
    return merged


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    both_dicts = {
        key for key in base.keys() & over.keys() if isinstance(base[key], dict) and isinstance(over[key], dict)
    }
    return base | over | {key: _merged(base[key], over[key]) for key in both_dicts}
