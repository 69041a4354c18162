"""Killed evaluations go on to the same records, on any number of ranks; other settings and damaged files are said."""

import itertools
import json
import os
import signal
from pathlib import Path

import pytest

from data_pipeline.core.errors import UserError
from pretrain.evaluate.records import Record, Work, continuation_text, finish, split_ids
from pretrain.evaluate.samples import Sample

SAMPLES = [Sample(f"{i:016x}", "one two " * (i + 1), f" three{i} four five") for i in range(23)]


class Letters:
    """A tokenizer whose tokens are characters."""

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def decode(self, ids) -> str:  # type: ignore[no-untyped-def]
        return "".join(map(chr, ids))


class Echo:
    """A model that writes letters by its seed, and says which batches it was asked for."""

    kind, exact, sampling, texts = "echo", True, {}, Letters()

    def __init__(self, dies_at: int | None = None):
        self.asked, self.dies_at = 0, dies_at

    def continuations(self, prompts, lengths, seeds):  # type: ignore[no-untyped-def]
        self.asked += 1
        if self.asked == self.dies_at:
            raise KeyboardInterrupt
        return [[97 + (seed + k) % 26 for k in range(length)] for length, seed in zip(lengths, seeds)]

    def nats(self, prompts, targets, seeds):  # type: ignore[no-untyped-def]
        return [len(target) + seed % 7 / 10 for target, seed in zip(targets, seeds)]


def work(subject: Echo | None = None, name: str = "echo") -> Work:
    return Work(SAMPLES, subject or Echo(), name, 0, 4)


def without_seconds(records: list[Record]) -> list[tuple]:
    return [(r.key, r.continuation, r.tokens, r.nats, r.reference_tokens) for r in records]


def test_a_killed_evaluation_goes_on_with_what_is_missing(tmp_path: Path) -> None:
    whole = finish(work(), tmp_path / "whole", {"seed": 0})
    assert [record.key for record in whole] == [sample.key for sample in SAMPLES]
    asked = 0
    for dies_at in (1, 2, 2, 3, None):
        subject = Echo(dies_at)
        if dies_at is None:
            found = finish(work(subject), tmp_path / "killed", {"seed": 0})
        else:
            with pytest.raises(KeyboardInterrupt):
                finish(work(subject), tmp_path / "killed", {"seed": 0})
        asked += subject.asked - (dies_at is not None)
    assert without_seconds(found) == without_seconds(whole)
    assert asked == 6  # no batch twice
    again = Echo()
    assert finish(work(again), tmp_path / "killed", {"seed": 0}) == found
    assert again.asked == 0


def test_ten_kills_at_any_moment_leave_the_same_records(tmp_path: Path) -> None:
    """By SIGKILL at the n-th opening of a file, in processes of their own."""
    every_text = Work(SAMPLES, Echo(), "echo", 0, 1)

    def dying(moment: int) -> int:
        child = os.fork()
        if child:
            return os.waitpid(child, 0)[1]
        opened, left = os.open, itertools.count(1)

        def counted(*args, **options):  # type: ignore[no-untyped-def]
            if next(left) == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return opened(*args, **options)

        os.open = counted
        finish(every_text, tmp_path / "killed", {"seed": 0})
        os._exit(0)

    ends = [dying(moment) for moment in (1, 3, 2, 4, 2, 1, 3, 1, 2, 3)]
    assert ends == [signal.SIGKILL] * 10
    found = finish(every_text, tmp_path / "killed", {"seed": 0})
    assert without_seconds(found) == without_seconds(finish(every_text, tmp_path / "whole", {"seed": 0}))


def test_ranks_share_the_batches_and_the_last_to_end_has_all(tmp_path: Path) -> None:
    subjects = [Echo(), Echo(), Echo()]
    ends = [finish(work(subjects[rank]), tmp_path / "three", {}, rank, 3) for rank in (2, 0, 1)]
    assert ends[:2] == [None, None]
    assert without_seconds(ends[2]) == without_seconds(finish(work(), tmp_path / "one", {}))
    assert [subject.asked for subject in subjects] == [2, 2, 2]


def test_other_settings_and_damaged_files_are_said(tmp_path: Path) -> None:
    finish(work(), tmp_path, {"seed": 0, "model": "a"})
    with pytest.raises(UserError, match=r"seed 0 there, 1 now.*--fresh"):
        finish(work(), tmp_path, {"seed": 1, "model": "a"})
    for content in ("[{}]", "{", "[" * 5000):
        (tmp_path / "batch-00002.json").write_text(content)
        with pytest.raises(UserError, match=r"batch-00002.json is damaged.*remove it"):
            finish(work(), tmp_path, {"seed": 0, "model": "a"})
    (tmp_path / "batch-00002.json").unlink()
    assert len(finish(work(), tmp_path, {"seed": 0, "model": "a"})) == len(SAMPLES)
    (tmp_path / "settings.json").write_text("7")
    with pytest.raises(UserError, match="--fresh"):
        finish(work(), tmp_path, {"seed": 0, "model": "a"})


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        finish(work(), tmp_path / "file" / "x", {})


def test_reference_and_chance_are_texts_of_the_benchmark(tmp_path: Path) -> None:
    references = [sample.reference for sample in SAMPLES]
    true = Work(SAMPLES, None, "reference", 0, 4)
    assert [r.continuation for number in range(6) for r in true.batch(number)] == references
    chance = Work(SAMPLES, None, "chance", 0, 4)
    found = [r.continuation for number in range(6) for r in chance.batch(number)]
    assert sorted(found) == sorted(" ".join(text.split()) for text in references)
    assert not any(text == own.strip() for text, own in zip(found, references))


def test_texts_are_tokenised_as_one_and_cut_where_the_prompt_ends() -> None:
    assert split_ids(Letters(), Sample("", "ab", " cd")) == ([97, 98], [32, 99, 100])

    class Merging(Letters):
        """Joins the last letter of the prompt with what follows."""

        def encode(self, text: str) -> list[int]:
            return [1, 2] if text == "ab cd" else super().encode(text)

    assert split_ids(Merging(), Sample("", "ab", " cd")) == ([97, 98], [32, 99, 100])
    assert continuation_text(Letters(), [97], [32, 99]) == " c"
    assert json.loads(json.dumps(continuation_text(Letters(), [], [99]))) == "c"
