"""`textldm checkpoint`."""

from pathlib import Path

import pytest

from pretrain.checkpoint.__main__ import main
from tests.pretrain.bare_engine import bare_engine, save


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture):
    path = save(tmp_path, 3, bare_engine())
    assert main(["inspect", str(tmp_path)]) == 0
    assert "step 3, saved by 1 rank(s), ZeRO-0" in capsys.readouterr().out
    assert main(["verify", str(path)]) == 0
    assert "complete and unaltered" in capsys.readouterr().out
    (tmp_path / "checkpoints" / path.name / "rank-00000.safetensors").write_bytes(b"")
    assert main(["verify", str(path)]) == 2
    assert "has 0 bytes" in capsys.readouterr().err
