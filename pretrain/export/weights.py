"""An export's weights: safetensors files of bounded size, written tensor by tensor, as transformers itself would write them."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from transformers import PreTrainedModel

from pretrain.checkpoint.tensor_files import Hashed, file_pieces
from pretrain.stages.exported import INDEX

LARGEST_FILE = "50GB"
"""As `save_pretrained` has it."""


def write_weights(
    model: PreTrainedModel, tensor: Callable[[str], Tensor], folder: Path, largest: str = LARGEST_FILE
) -> dict[str, str]:
    """Write a model's weights and buffers; returns the SHA-256 of every file by name.

    Args:
        model: on any device, also the meta device: its names, shapes and dtypes count.
        tensor: gives the values by name, on the CPU in any dtype; no two of them need be in memory together.
        largest: bytes of a file at most ("5GB", "200MB"), but for one that holds a single tensor. Of several files an index tells.

    Raises: OSError.
    """
    state = model.state_dict()
    plan = split_torch_state_dict_into_shards(
        state, filename_pattern="model{suffix}.safetensors", max_shard_size=largest
    )
    hashes = {}
    for file, names in plan.filename_to_tensors.items():
        # The library's order: of several dtypes the wider ones first, then by name.
        ordered = sorted(names, key=lambda name: (-state[name].element_size(), name))

        def values(ordered: list[str] = ordered) -> Iterator[Tensor]:
            for name in ordered:
                yield tensor(name).to(state[name].dtype)

        layout = {name: (state[name].dtype, state[name].shape) for name in ordered}
        content = Hashed(file_pieces(layout, values(), {"format": "pt"}))
        with (folder / file).open("wb") as opened:
            for chunk in content:
                opened.write(chunk)
                del chunk
        hashes[file] = content.sha256
    if plan.is_sharded:
        metadata = {"total_parameters": model.num_parameters(), **plan.metadata}
        index = {"metadata": metadata, "weight_map": plan.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return hashes
