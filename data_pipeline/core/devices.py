"""Which device and how many cores a process computes on."""

import os

import torch

from data_pipeline.core.errors import UserError


def device_of(name: str | None = None, local_rank: int = 0) -> torch.device:
    """The named device; of None or "auto" this rank's GPU where there is one. Raises: UserError when torch cannot use it."""
    if name in (None, "auto"):
        name = f"cuda:{local_rank % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # the second from a torch without CUDA
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--device is {name} ({reason}); expected cpu, or a GPU of this machine: cuda, cuda:1"
        ) from None
    if device.type == "cpu":
        flush_denormals()
    return device


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 rather than emulating it: GPUs from Ampere on, CPUs with AMX or AVX512-BF16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


def flush_denormals() -> None:
    """Take numbers below 1e-38 for zero on this thread of the CPU, and on all that it starts from now on.

    Softmax and its gradients are full of them, and the CPU takes a hundred times as long for one as for a zero: a training step of a text
    model whose attention is sharp takes up to twice as long with them (docs/decisions/engine.md). GPUs do not mind.
    """
    torch.set_flush_denormal(True)


def share_cores(num_processes: int) -> None:
    """Divide the cores among the processes of this host that do the same, unless OMP_NUM_THREADS says otherwise."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // num_processes))
