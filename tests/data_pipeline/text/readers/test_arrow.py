"""Arrow files and streams: the cache of `datasets` is one."""

from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pytest

from data_pipeline.core.errors import UserError
from data_pipeline.text.readers import arrow
from tests.data_pipeline.text.texts import TEXTS, documents

WRITERS = {"stream": pa.ipc.new_stream, "file": pa.ipc.new_file}


def write(path: Path, columns: dict, form: str) -> None:
    table = pa.table(columns)
    with WRITERS[form](str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=100)


@pytest.mark.parametrize("form", WRITERS)
def test_both_forms(tmp_path: Path, form: str) -> None:
    write(tmp_path / "a.arrow", {"id": list(range(1000)), "text": TEXTS}, form)
    assert documents(tmp_path) == TEXTS
    with pytest.raises(UserError, match=r"a\.arrow: no field 'body' .found 'id', 'text'"):
        documents(tmp_path, "body")
    data = (tmp_path / "a.arrow").read_bytes()
    (tmp_path / "a.arrow").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"a\.arrow: cannot be read"):
        documents(tmp_path)


@pytest.mark.parametrize("form", WRITERS)
def test_null_and_empty(tmp_path: Path, form: str) -> None:
    write(tmp_path / "a.arrow", {"text": [None, ""]}, form)
    assert documents(tmp_path) == [None, ""]


@pytest.mark.parametrize("form", WRITERS)
@pytest.mark.parametrize("codec", ["zstd", "lz4"])
def test_attack_8d_a_record_batch_is_held_against_what_memory_holds_before_it_is_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, codec: str
) -> None:
    table = pa.table({"text": ["x" * (8 << 20)] * 4})
    path = tmp_path / "a.arrow"
    with WRITERS[form](str(path), table.schema, options=pa.ipc.IpcWriteOptions(compression=codec)) as writer:
        writer.write_table(table)
    assert path.stat().st_size < 1 << 19
    before = pa.default_memory_pool().bytes_allocated()
    assert len(documents(path)) == 4
    monkeypatch.setattr(arrow, "LARGEST_BATCH", 1 << 24)
    monkeypatch.setattr(arrow, "_open", None)  # nothing is unpacked
    with pytest.raises(UserError, match=r"a\.arrow: message \d unpacks to 33,554,4\d\d bytes, and 16,777,216 are"):
        documents(path)
    assert pa.default_memory_pool().bytes_allocated() <= before


def test_attack_8d_what_a_buffer_claims_counts(tmp_path: Path) -> None:
    """Memory for it would be taken before anything is unpacked."""
    table = pa.table({"text": ["xyz" * 1000]})
    with pa.ipc.new_stream(
        str(tmp_path / "a.arrow"), table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")
    ) as w:
        w.write_table(table)
    data = (tmp_path / "a.arrow").read_bytes()
    at = data.rindex((3000).to_bytes(8, "little"))
    (tmp_path / "a.arrow").write_bytes(data[:at] + (1 << 45).to_bytes(8, "little") + data[at + 8 :])
    with pytest.raises(UserError, match=r"unpacks to 35,184,372,\d+,\d+ bytes"):
        documents(tmp_path / "a.arrow")


def test_dictionaries_count_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = pa.table({"text": pa.array(["x" * (1 << 20)] * 100).dictionary_encode()})
    with pa.ipc.new_stream(
        str(tmp_path / "a.arrow"), table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")
    ) as w:
        w.write_table(table)
    assert documents(tmp_path / "a.arrow") == ["x" * (1 << 20)] * 100
    monkeypatch.setattr(arrow, "LARGEST_BATCH", 1 << 19)
    with pytest.raises(UserError, match="message 1 unpacks to 1,048,"):
        documents(tmp_path / "a.arrow")


def test_a_file_whose_end_leaves_batches_out_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.arrow", {"text": TEXTS}, "file")
    opened = pa.ipc.open_file
    monkeypatch.setattr(
        pa.ipc, "open_file", lambda file: SimpleNamespace(num_record_batches=opened(file).num_record_batches + 1)
    )
    with pytest.raises(UserError, match=r"a\.arrow: cannot be read \(ValueError: it holds 10 record batches.*names 11"):
        documents(tmp_path)
