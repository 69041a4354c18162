"""No document holds a document's end within it, and what a tokenizer cannot encode is told with its source."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from data_pipeline.core.errors import UserError
from data_pipeline.prepare.encode import EncodeTask, encode_bundle, use_tokenizer
from data_pipeline.text.sources import open_source
from data_pipeline.text.tokenization import load_tokenizer

END = "<|endoftext|>"


def encode(folder: Path, texts: list[str], model: models.Model) -> dict:
    """The result of a bundle of those texts, each a file, encoded with the model; what was counted."""
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": END}))
    (folder / "text").mkdir()
    for number, text in enumerate(texts):
        (folder / "text" / f"{number}.txt").write_text(text)
    tokenizer = load_tokenizer(folder)
    use_tokenizer(tokenizer)
    [bundle] = open_source(str(folder / "text")).bundles
    task = EncodeTask(0, bundle, "text", folder / "work", tokenizer.info.eos_id, "uint16", 1, 0, 64)
    told: list[tuple[int, int]] = []
    result = encode_bundle(task, lambda count, num_bytes: told.append((count, num_bytes)))
    assert sum(num_bytes for _, num_bytes in told) == result.text_bytes == sum(len(text.encode()) for text in texts)
    return vars(result)


def test_the_end_of_text_in_text_is_text(tmp_path: Path) -> None:
    model = models.WordLevel({END: 0, "?": 1, "a": 2}, unk_token="?")
    assert encode(tmp_path, ["a a a", f"a {END} a", END + "a", "一二三"], model)["documents"] == 4


def test_an_end_within_a_document_is_counted_and_refused(tmp_path: Path) -> None:
    """Here unknown words are ends of text, as GPT-2's are by name."""
    model = models.WordLevel({END: 0, "a": 1}, unk_token=END)
    with pytest.raises(
        UserError, match=r"0\.txt and 2 more: .*\(id 0\) occurs 3 times within 2 of 3 texts.*begins 'a b a'.*eos_token"
    ):
        encode(tmp_path, ["a b a", "a a", "b b"], model)


def test_what_the_tokenizer_cannot_encode_is_told(tmp_path: Path) -> None:
    model = models.WordLevel({END: 0, "a": 1}, unk_token="?")
    with pytest.raises(
        UserError, match=r"0\.txt: the tokenizer cannot encode a text there .*\[UNK\].*use another"
    ) as raised:
        encode(tmp_path, ["a b a"], model)
    assert "\n" not in str(raised.value)


class Panic(BaseException):
    """As a library in Rust panics: no Exception."""


def test_attack_18a_a_tokenizer_that_panics_is_told_with_its_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A regular expression in a tokenizer.json can make it do so."""

    class Hostile:
        def encode_batch_fast(self, *_: object, **__: object) -> None:
            raise Panic("retry-limit-in-match over")

        model = None

    monkeypatch.setattr("data_pipeline.prepare.encode.encoder", lambda _: Hostile())
    with pytest.raises(UserError, match=r"0\.txt: the tokenizer cannot encode a text there .Panic: retry-limit"):
        encode(tmp_path, ["a"], models.WordLevel({END: 0, "a": 1}, unk_token="a"))
