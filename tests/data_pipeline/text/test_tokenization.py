"""Tokenizers train, save, load and identify themselves; the document end is found."""

import json
from pathlib import Path

import pytest

from data_pipeline.core.errors import UserError
from data_pipeline.text.tokenization import (
    END_OF_TEXT,
    encoder,
    load_tokenizer,
    load_transformers_tokenizer,
    main,
    tokenizer_hash,
    train_tokenizer,
)

TEXTS = [
    f"The {word} of number {i} is not the same, naïve or otherwise.\n\n  ok" for i, word in enumerate("abcdefgh" * 20)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TEXTS, 320).save(path)
    return path


def test_any_text_survives(folder: Path) -> None:
    backend = load_tokenizer(folder).backend
    for text in (*TEXTS[:3], "漢字 \x00 😀", "", " a", "<|endoftext|>"):
        ids = encoder(load_tokenizer(folder)).encode(text, add_special_tokens=False).ids
        assert backend.decode(ids, skip_special_tokens=False) == text


def test_special_tokens_in_the_text_are_text(folder: Path) -> None:
    loaded = load_tokenizer(folder)
    ids = encoder(load_tokenizer(folder)).encode(f"a{END_OF_TEXT}b", add_special_tokens=False).ids
    assert loaded.info.eos_id not in ids


def test_training_is_reproducible(folder: Path) -> None:
    assert train_tokenizer(TEXTS, 320).info == load_tokenizer(folder).info.model_copy(
        update={"name": "byte-level-bpe-320"}
    )
    assert load_tokenizer(folder).info.vocab_size == 320


def test_transformers_reads_the_folder(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder))
    assert tokenizer.eos_token == END_OF_TEXT
    ours = load_transformers_tokenizer(folder)
    assert (
        tokenizer(TEXTS[0])["input_ids"]
        == ours(TEXTS[0])["input_ids"]
        == load_tokenizer(folder).backend.encode(TEXTS[0]).ids
    )
    assert ours.eos_token_id == load_tokenizer(folder).info.eos_id


def test_hash_is_of_the_meaning(folder: Path) -> None:
    definition = (folder / "tokenizer.json").read_bytes()
    fields = json.loads(definition)
    reordered = dict(reversed(list(fields.items()))) | {"truncation": {"max_length": 5}}
    assert tokenizer_hash(json.dumps(reordered, indent=7).encode()) == tokenizer_hash(definition)
    fields["model"]["merges"] = fields["model"]["merges"][::-1]
    assert tokenizer_hash(json.dumps(fields).encode()) != tokenizer_hash(definition)


def test_document_ends_of_real_tokenizers(shared: Path) -> None:
    for name, vocab_size, eos in (("qwen", 151646, 151643), ("gpt2", 50257, 50256)):
        info = load_tokenizer(shared / "tokenizers" / name).info
        assert (info.name, info.vocab_size, info.eos_id) == (name, vocab_size, eos)
    teacher = load_tokenizer(shared / "teachers" / "stories260K")
    assert (teacher.info.vocab_size, teacher.backend.id_to_token(teacher.info.eos_id)) == (512, "</s>")


def test_configured_eos_that_ends_a_turn_does_not_end_a_document(folder: Path, tmp_path: Path) -> None:
    loaded = load_tokenizer(folder)
    loaded.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "a"}}))
    assert load_tokenizer(tmp_path).info.eos_id == loaded.info.eos_id


def test_a_tokenizer_without_document_end(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).info.eos_id is None


@pytest.mark.parametrize("content", [b"", b"{}", b"not json", b'{"model": {"type": "BPE"}}'])
def test_damaged_tokenizers_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(UserError, match="is not a tokenizer"):
        load_tokenizer(tmp_path)


def test_missing_tokenizers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"tokenizer\.json of a fast tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="at least 257"):
        train_tokenizer(TEXTS, 100)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    texts = [*TEXTS, "half a pair: \ud83d"]  # JSON can hold that, UTF-8 cannot
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    arguments = ["train", "--source", str(tmp_path / "a.jsonl"), "--vocab-size", "300", "--output", str(tmp_path / "t")]
    assert main(arguments) == 0
    assert load_tokenizer(tmp_path / "t").info.vocab_size == 300
    assert main(["train", "--source", "nowhere.txt", "--vocab-size", "300", "--output", str(tmp_path / "u")]) == 2
    assert "error: source nowhere.txt" in capsys.readouterr().err
