"""Continuations and likelihoods of all samples, batch by batch, each in a file of its own: a killed evaluation goes on where it
was, several ranks share the batches, and whoever finds all of them finished goes on to the figures.

What batches there are is a function of the settings alone, so that the same texts come out however often it was interrupted.
"""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_pipeline.core.errors import UserError
from data_pipeline.core.keys import key, permutation
from data_pipeline.core.outside import parse_json
from data_pipeline.core.storage import write_text
from pretrain.evaluate.samples import Sample
from pretrain.evaluate.subjects import Subject, Texts

SETTINGS = "settings.json"


@dataclass(frozen=True)
class Record:
    """Of one sample: what the model wrote, in how many tokens and seconds (its share of its batch's), and -log p(reference | prompt)
    in nats, None of what has no probabilities, with the reference's number of tokens.
    """

    key: str
    continuation: str
    tokens: int
    seconds: float
    nats: float | None
    reference_tokens: int


@dataclass(frozen=True)
class Work:
    """What there is to do: everything that the records follow from."""

    samples: list[Sample]
    subject: Subject | None
    """None: the continuations are the references, or another document's."""
    name: str
    seed: int
    batch_size: int

    def batches(self) -> list[range]:
        """Of places of samples, in their order."""
        return [
            range(start, min(start + self.batch_size, len(self.samples)))
            for start in range(0, len(self.samples), self.batch_size)
        ]

    def batch(self, number: int) -> list[Record]:
        """The records of a batch."""
        places = self.batches()[number]
        if self.subject is None:
            return [self._true_text(i) for i in places]
        subject, samples = self.subject, [self.samples[i] for i in places]
        ids = [split_ids(subject.texts, sample) for sample in samples]
        prompts, targets = [prompt for prompt, _ in ids], [target for _, target in ids]
        seeds = [key(self.seed, "text", sample.key) for sample in samples]
        started = time.perf_counter()
        found = subject.continuations(prompts, [len(target) for target in targets], seeds)
        seconds = (time.perf_counter() - started) / len(samples)
        nats = subject.nats(prompts, targets, seeds)
        return [
            Record(sample.key, continuation_text(subject.texts, prompt, new), len(new), seconds, value, len(target))
            for sample, prompt, target, new, value in zip(samples, prompts, targets, found, nats, strict=True)
        ]

    def _true_text(self, place: int) -> Record:
        source = self.samples[place if self.name == "reference" else _others(len(self.samples))[place]]
        words = len(self.samples[place].reference.split())
        text = " ".join(source.reference.split()[:words]) if self.name == "chance" else source.reference
        return Record(self.samples[place].key, text, words, 0.0, None, words)


def _others(count: int) -> list[int]:
    """Of each document another one: the next in a keyed order."""
    order = permutation(count, "chance")
    others = [0] * count
    for i, place in enumerate(order):
        others[place] = int(order[(i + 1) % count])
    return others


def split_ids(texts: Texts, sample: Sample) -> tuple[list[int], list[int]]:
    """Token ids of prompt and reference: those of the whole text where its beginning is tokenised as the prompt alone is."""
    prompt, whole = texts.encode(sample.prompt), texts.encode(sample.prompt + sample.reference)
    if whole[: len(prompt)] == prompt and len(whole) > len(prompt):
        return prompt, whole[len(prompt) :]
    return prompt, texts.encode(sample.reference)


def continuation_text(texts: Texts, prompt: Sequence[int], new: Sequence[int]) -> str:
    """What the new tokens add to the text: a tokenizer may decode them otherwise at a text's beginning."""
    whole, before = texts.decode([*prompt, *new]), texts.decode(prompt)
    return whole[len(before) :] if whole.startswith(before) else texts.decode(new)


def finish(
    work: Work, folder: Path, settings: dict[str, Any], rank: int = 0, world_size: int = 1
) -> list[Record] | None:
    """Do what is missing of this rank's batches; all records once every batch of every rank is there, else None.

    Args:
        folder: of the records; made if need be. settings: what they follow from, to be compared with what the folder was begun with.

    Raises: UserError when it was begun with others.
    """
    begin(folder, settings)
    batches = work.batches()
    mine = [number for number in range(rank, len(batches), world_size) if not _file(folder, number).exists()]
    for number in tqdm(mine, f"{work.name}: batches of texts", disable=rank != 0 or None, mininterval=2):
        records = [asdict(record) for record in work.batch(number)]
        write_text(_file(folder, number), json.dumps(records, ensure_ascii=False, indent=1) + "\n")
    if not all(_file(folder, number).exists() for number in range(len(batches))):
        return None
    return list(read_records(folder, len(batches)))


def begin(folder: Path, settings: dict[str, Any]) -> None:
    """Note in the folder what its records follow from. Raises: UserError when it holds other records."""
    wanted = json.loads(json.dumps(settings))
    path = folder / SETTINGS
    if path.exists():
        found = _read(path)
        if not isinstance(found, dict):
            raise UserError(f"{path} is damaged; run the command with --fresh")
        if differ := sorted(name for name in {*wanted, *found} if wanted.get(name) != found.get(name)):
            shown = "; ".join(f"{name} {found.get(name)!r} there, {wanted.get(name)!r} now" for name in differ[:3])
            raise UserError(
                f"{folder} holds texts that were made otherwise ({shown}); give another --output, or --fresh to make them anew"
            )
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(wanted, indent=1, ensure_ascii=False) + "\n")
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}") from None


def read_records(folder: Path, count: int) -> Iterator[Record]:
    """Of the first `count` batches. Raises: UserError for a damaged file."""
    names = {field.name for field in fields(Record)}
    for number in range(count):
        rows = _read(_file(folder, number))
        if not isinstance(rows, list) or not all(isinstance(row, dict) and set(row) == names for row in rows):
            raise UserError(f"{_file(folder, number)} is damaged; remove it, and run the same command")
        yield from (Record(**row) for row in rows)


def _read(path: Path) -> Any:
    try:
        return parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); remove it, and run the same command") from None


def _file(folder: Path, number: int) -> Path:
    return folder / f"batch-{number:05d}.json"
