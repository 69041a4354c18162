"""The benchmark of the server starts it, asks it from many clients, and says what the documents quote."""

import json
from pathlib import Path

import pytest

from benchmarks import serving
from tests.pretrain.serve.running import tiny_model, words


@pytest.mark.slow
def test_its_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_model().save_pretrained(tmp_path)
    words().save_pretrained(tmp_path)
    arguments = ["--model", str(tmp_path), "--clients", "8", "--seconds", "2", "--max-tokens", "8", "--prompt", "w3"]
    assert serving.main([*arguments, "--", "--queue", "64"]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["errors"] == 0  # among them: the server ended well at SIGTERM
    assert figures["requests"] >= 8
    assert figures["throughput_ratio"] > 0
    assert 0 < figures["p95_s"] < 60
