"""Which device a command computes on, from its --device."""

import torch

from data_pipeline.core.errors import UserError


def device_of(name: str | None) -> torch.device:
    """The named device, else a GPU if there is one. Raises: UserError when torch cannot use it."""
    try:
        return torch.empty(0, device=name or ("cuda" if torch.cuda.is_available() else "cpu")).device
    except (RuntimeError, AssertionError) as error:  # the second from a torch without CUDA
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--device is {name} ({reason}); expected cpu, or a GPU of this machine: cuda, cuda:1"
        ) from None
