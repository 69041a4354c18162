"""The files of a checkpoint."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from data_pipeline.core.errors import UserError
from pretrain.checkpoint.manifest import Manifest, SavedFile
from pretrain.checkpoint.slices import SliceReader, write_slices
from pretrain.checkpoint.storage import Checkpoint, Folder
from tests.pretrain.bare_engine import bare_engine, save, states_of


def test_the_files_are_plain_safetensors_of_minimal_size(tmp_path: Path):
    engine = bare_engine(nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 300)))
    engine.buffers = dict
    path = save(tmp_path, 1, engine)
    with safe_open(f"{path}/rank-00000.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("ema/0.bias@0"), states_of(engine)["ema/0.bias"])
    minimum = 16 * sum(p.numel() for p in engine.stage.parameters())
    assert sum(file.stat().st_size for file in Path(str(path)).iterdir()) <= 1.02 * minimum


def test_every_dtype_comes_back(tmp_path: Path):
    checkpoint = Checkpoint(Folder(tmp_path), "step-000000001")
    dtypes = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8]
    tensors = {f"buffer/{dtype}": torch.arange(6).view(2, 3).to(dtype) for dtype in dtypes}
    tensors |= {"buffer/flag": torch.tensor(True), "buffer/nothing": torch.zeros(0, 3)}
    saved = write_slices(checkpoint, "rank-00000.safetensors", tensors.items())
    assert saved.bytes == (tmp_path / checkpoint.name / "rank-00000.safetensors").stat().st_size
    manifest = Manifest(1, 1, 1, 0, "fp32", {}, {}, {"rank-00000.safetensors": saved}, {}, {}, checkpoint=checkpoint)
    with SliceReader(manifest) as reader:
        found = reader.buffers()
    assert found.keys() == {name.removeprefix("buffer/") for name in tensors}
    for name, tensor in found.items():
        expected = tensors[f"buffer/{name}"]
        assert tensor.dtype == expected.dtype
        assert torch.equal(tensor, expected)


@pytest.mark.parametrize("content", [b"", b"12345678", b"\xff" * 16, b"\2\0\0\0\0\0\0\0[]", b"\2\0\0\0\0\0\0\0{]"])
def test_what_is_no_such_file_is_named(tmp_path: Path, content: bytes):
    checkpoint = Checkpoint(Folder(tmp_path), "step-000000001")
    checkpoint.storage.put(checkpoint.name, "x", [content])
    manifest = Manifest(1, 1, 1, 0, "fp32", {}, {}, {"x": SavedFile(len(content), "")}, {}, {}, checkpoint=checkpoint)
    with pytest.raises(UserError, match="step-000000001/x cannot be read"):
        SliceReader(manifest)
