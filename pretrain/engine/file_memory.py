"""Tensors whose memory is a file: what train.offload_optimizer=nvme and train.offload_parameters=nvme keep on a local disk.

They are used like any others: the kernel reads their pages when they are touched, and writes them and takes their memory
back when it runs short. docs/engine.md says why this is not left to DeepSpeed.
"""

import mmap
import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from data_pipeline.core.errors import UserError


def empty_in_file(numel: int, dtype: torch.dtype, folder: Path) -> Tensor:
    """A one-dimensional tensor in a file in `folder`, which ends with the tensor, or the process, however that ends.

    Raises: UserError if the folder cannot hold it.
    """
    size = numel * dtype.itemsize
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:  # on Linux without a name: a kill leaves nothing to clean up
            os.posix_fallocate(file.fileno(), 0, size)  # a full disk is an error now, not a SIGBUS in some later step
            memory = mmap.mmap(file.fileno(), size)
    except OSError as error:
        raise UserError(
            f"train.offload_folder {folder} cannot take another {size / 1e9:.3g} GB: {error.strerror}; name a folder on a local"
            " disk with 36 bytes (train.offload_optimizer) and 4 bytes (train.offload_parameters) per parameter that a rank holds"
        ) from None
    memory.madvise(mmap.MADV_SEQUENTIAL)  # read ahead, and give back first: a step passes through it once
    return torch.frombuffer(memory, dtype=dtype)


def in_file(tensor: Tensor, folder: Path) -> Tensor:
    """A copy of `tensor` in a file in `folder`. Raises: UserError if the folder cannot hold it."""
    return empty_in_file(tensor.numel(), tensor.dtype, folder).view(tensor.shape).copy_(tensor)
