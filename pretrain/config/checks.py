"""Checks across a configuration's keys, before anything is built: each ValueError gives the values and the remedy."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pretrain.config.schema import Data, Schedule, Train


def check_heads(section: str, width: int, head_dim: int) -> None:
    if width <= 0 or head_dim <= 0 or width % head_dim or head_dim % 2:
        raise ValueError(
            f"{section}.width is {width} and {section}.head_dim {head_dim}; width must be a multiple of head_dim, and"
            " head_dim even (rotary pairs): the nearest width is "
            f"{max(1, round(width / max(head_dim, 1))) * head_dim}"
        )


def check_data(data: "Data") -> None:
    if data.rows_per_step % data.streams:
        multiple = -(-data.rows_per_step // data.streams) * data.streams
        raise ValueError(
            f"data.rows_per_step is {data.rows_per_step} and data.streams {data.streams}; a step takes equally many"
            f" rows of each stream: make rows_per_step a multiple, e.g. {multiple}"
        )


def check_schedule(schedule: "Schedule", steps: int) -> None:
    decay = schedule.decay_steps if schedule.kind != "constant" else 0
    if schedule.warmup_steps + decay > steps:
        raise ValueError(
            f"schedule.warmup_steps {schedule.warmup_steps} and schedule.decay_steps {decay} are more than train.steps"
            f" {steps}; shorten them or train longer"
        )


def check_sharding(train: "Train") -> None:
    if train.offload_parameters != "none" and train.zero_stage != 3:
        raise ValueError(
            f"train.offload_parameters is {train.offload_parameters} at train.zero_stage {train.zero_stage}; only stage"
            " 3 shares out parameters: set train.zero_stage=3 or train.offload_parameters=none"
        )
    if train.offload_optimizer != "none" and train.zero_stage == 0:
        raise ValueError(
            f"train.offload_optimizer is {train.offload_optimizer} at train.zero_stage 0, where the optimizer is"
            " torch's own; set train.zero_stage to 1, 2 or 3, or train.offload_optimizer=none"
        )
    if "nvme" in (train.offload_optimizer, train.offload_parameters) and not train.offload_folder:
        raise ValueError("train.offload_folder is empty; offloading to nvme needs a folder on a local disk there")


def check_faults(train: "Train") -> None:
    if train.grace_s >= train.watchdog_s:
        raise ValueError(
            f"train.grace_s is {train.grace_s:g} and train.watchdog_s {train.watchdog_s:g}; the watchdog would end"
            " the job during the checkpoint after a signal: make watchdog_s the larger"
        )
