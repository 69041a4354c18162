"""Arrow files and streams: the cache of `datasets` is one."""

from pathlib import Path

import pyarrow as pa
import pytest

from data_pipeline.core.errors import UserError
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
