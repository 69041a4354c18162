"""The files of a checkpoint, and those that somebody forged (docs/security.md: attacks 7b, 7c, 7d, 7f)."""

import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from data_pipeline.core.errors import UserError
from pretrain.checkpoint.manifest import Manifest, SavedFile
from pretrain.checkpoint.read import read_tensors, verify
from pretrain.checkpoint.slices import SliceReader, write_slices
from pretrain.checkpoint.storage import Checkpoint, Folder
from tests.pretrain.bare_engine import bare_engine, save, states_of
from tests.pretrain.checkpoint.forged import forge, safetensors


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


W = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
FORGED_HEADERS = [
    {"weight/w@0": W, "weight/v@0": W},  # both of the same bytes: any amount of memory out of a small file
    {"weight/w@0": W | {"data_offsets": [4, 20]}},
    {"weight/w@0": W | {"shape": [-2, -2]}},
    {"weight/w@0": W | {"shape": [4.0]}},
    {"weight/w@0": W | {"shape": [True, 4]}},
    {"weight/w@0": W | {"shape": [1 << 62]}},
    {"weight/w@0": W | {"data_offsets": [0]}},
    {"weight/w@0": W | {"dtype": "F1"}},
    {"weight/w@x": W},
    {"weight/w@-4": W},
    {f"weight/w@{'9' * 5000}": W},
    {"weight/w@0": []},
    b'{"weight/w@0": 1, "weight/w@0": 1}',
    b"[" * 100_000,
    b'{"a":' * 200 + b"1" + b"}" * 200,
]


@pytest.mark.parametrize("header", FORGED_HEADERS)
def test_attack_7d_forged_headers_are_named(tmp_path: Path, header: dict | bytes):
    checkpoint = forge(tmp_path / "step", safetensors(header, bytes(16)))
    with pytest.raises(UserError, match=r"step/rank-00000\.safetensors cannot be read"):
        verify(checkpoint)


@pytest.mark.parametrize(
    ("slices", "numel", "said"),
    [
        ({0: 4, 2: 2}, 4, r"elements of weight/w more than once, between 2 and 4"),
        ({0: 3, 1: 1}, 4, r"more than once, between 1 and 3"),  # as many as there should be, and the last never written
        ({0: 2, 3: 1}, 4, r"not at all, between 2 and 3"),
        ({2: 2}, 4, r"not at all, between 0 and 2"),
        ({0: 4}, 5, r"incomplete: 4 of 5"),
        ({0: 6}, 4, r"incomplete: 6 of 4"),
        ({}, 1 << 47, r"incomplete: 0 of"),  # half a petabyte, which nobody may allocate to find it missing
    ],
)
def test_attacks_7b_7c_slices_that_overlap_or_leave_gaps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slices: dict[int, int], numel: int, said: str
):
    checkpoint = forge(tmp_path / "step", {f"weight/w@{at}": torch.ones(n) for at, n in slices.items()}, numel=numel)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: pytest.fail("memory before the slices are known to be whole"))
    for use in (verify, lambda found: read_tensors(found, "weight")):
        with pytest.raises(UserError, match=said):
            use(checkpoint)


@pytest.mark.parametrize(
    "tensor",
    [torch.ones(2, 2), torch.tensor(1.0), torch.ones(4, dtype=torch.int32), torch.ones(4, dtype=torch.float64)],
)
def test_attack_7b_a_slice_is_fp32_of_one_dimension(tmp_path: Path, tensor: torch.Tensor):
    with pytest.raises(UserError, match=r"weight/w@0 is torch\..*, expected"):
        verify(forge(tmp_path / "step", {"weight/w@0": tensor}))


def test_attack_7b_states_that_the_manifest_does_not_name_are_refused(tmp_path: Path):
    with pytest.raises(UserError, match="holds weight/v, which its manifest does not name"):
        verify(forge(tmp_path / "step", {"weight/w@0": torch.ones(4), "weight/v@0": torch.ones(1)}))


@pytest.mark.parametrize("alias", [False, True])
def test_attack_7f_a_buffer_takes_no_parameters_place(tmp_path: Path, alias: bool):
    name = "v" if alias else "w"
    tensors = {"weight/w@0": torch.ones(4), f"buffer/{name}": torch.zeros(4)}
    checkpoint = forge(tmp_path / "step", tensors, lambda content: content.update(aliases={"v": "w"}))
    for use in (verify, lambda found: read_tensors(found, "weight")):
        with pytest.raises(UserError, match=f"buffer {name} has the name of a parameter"):
            use(checkpoint)


def test_attack_7c_a_tensor_has_the_bytes_that_its_shape_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of a buffer the manifest says no size."""
    claimed = {"dtype": "F32", "shape": [1 << 40], "data_offsets": [16, 16]}
    checkpoint = forge(tmp_path / "step", safetensors({"weight/w@0": W, "buffer/b": claimed}, bytes(16)))
    monkeypatch.setattr(torch, "empty", lambda *_, **__: pytest.fail("4 TiB of memory"))
    for use in (verify, lambda found: read_tensors(found, "weight")):
        with pytest.raises(UserError, match=r"cannot be read: buffer/b does not lie within it"):
            use(checkpoint)


def test_attack_7c_a_header_is_no_longer_than_its_file(tmp_path: Path):
    checkpoint = forge(tmp_path / "step", (1 << 33).to_bytes(8, "little") + b"{}")
    tracemalloc.start()
    with pytest.raises(UserError, match="its header would have 8589934592 bytes"):
        verify(checkpoint)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 26
