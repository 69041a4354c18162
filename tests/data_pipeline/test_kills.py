"""prepare and cache_features killed with SIGKILL at 20 random moments: the same command ends with the very same bytes."""

import json
import sys
from functools import partial
from pathlib import Path

import pytest

from data_pipeline import cache_features
from data_pipeline.prepare import __main__ as prepare
from data_pipeline.prepare import encode
from data_pipeline.text import sources
from data_pipeline.text.tokenization import train_tokenizer
from tests.data_pipeline.kills import kill_again_and_again, run_to_end
from tests.data_pipeline.prepare.test_command import TEXTS, contents
from tests.data_pipeline.sentences import write_data
from tests.data_pipeline.test_cache_features import FAST, write_teacher

KILLS = 20


def prepare_small_units(arguments: list[str]) -> None:
    sources.UNIT_BYTES, encode.CHUNK_TOKENS = 8000, 1000
    sys.exit(prepare.main(arguments))


def cache(arguments: list[str]) -> None:
    sys.exit(cache_features.main(arguments))


def assert_equal(killed: Path, whole: Path) -> None:
    """The same files with the same bytes, and nothing else."""
    found, expected = contents(killed), contents(whole)
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "kills"), [(1, KILLS // 2), (2, KILLS // 2)])
def test_prepare(tmp_path: Path, workers: int, kills: int) -> None:
    (tmp_path / "source.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    train_tokenizer(TEXTS, 300).save(tmp_path / "tokenizer")
    arguments = [
        "--source", str(tmp_path / "source.jsonl"), "--tokenizer", str(tmp_path / "tokenizer"), "--row-tokens", "256",
        "--max-document-length", "64", "--min-document-length", "5", "--workers", str(workers),
    ]  # fmt: skip
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    num_files = run_to_end(partial(prepare_small_units, [*arguments, "--output", str(whole)]), whole)
    command = partial(prepare_small_units, [*arguments, "--output", str(killed)])
    tally = kill_again_and_again(command, killed, partial(assert_equal, killed, whole), kills, num_files, seed=workers)
    print(num_files, tally)
    assert tally.kills >= kills
    assert tally.while_writing >= kills // 4


@pytest.mark.slow
def test_cache_features(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    write_data(data)
    teacher = write_teacher(tmp_path / "teacher", data)
    arguments = ["--data", str(data), "--teacher", str(teacher), "--device", "cpu", *FAST]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    num_files = run_to_end(partial(cache, [*arguments, "--output", str(whole)]), whole)
    command = partial(cache, [*arguments, "--output", str(killed)])
    tally = kill_again_and_again(command, killed, partial(assert_equal, killed, whole), KILLS, num_files, seed=0)
    print(num_files, tally)
    assert tally.kills >= KILLS
    assert tally.while_writing >= KILLS // 4
