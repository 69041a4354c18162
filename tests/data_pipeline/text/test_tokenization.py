"""Tokenizers train, save, load and identify themselves; the document end is found."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from data_pipeline.core.errors import UserError
from data_pipeline.text.tokenization import (
    END_OF_TEXT,
    LoadedTokenizer,
    encoder,
    load_prepared_tokenizer,
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


NAMES = ["<pad>", "<s>", "</s>", "<unk>"]
TAGGED = [
    "</s>",
    "a</s>b",
    "x </s> y",
    "<s>begins</s>",
    "Prices: <s>$9</s> <unk> <pad> end",
    "</s></s>",
    "<</s>>",
    "</ s>",
    "s>",
]


def sentencepiece_unigram() -> Tokenizer:
    """As conversions of T5 and others are: every special token is a piece like any other."""
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=NAMES, unk_token="<unk>", show_progress=False)
    backend.train_from_iterator(TEXTS + TAGGED, trainer)
    return backend


def sentencepiece_bpe(**options: object) -> Tokenizer:
    """As conversions of Llama are: merges build `</s>`."""
    vocabulary = {name: id_ for id_, name in enumerate(NAMES)}
    for token in (*sorted(set("".join(TEXTS + TAGGED)) | {"▁"}), "</", "s>", "th", "the"):
        vocabulary.setdefault(token, len(vocabulary))
    merges = [("t", "h"), ("<", "/"), ("s", ">"), ("</", "s>"), ("<", "s>"), ("th", "e")]
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, **options))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in NAMES])
    return backend


def words(model: type, **options: object) -> Tokenizer:
    """A vocabulary of whole words, parted at blanks alone: `</s>` is one of them."""
    found = sorted({word for text in TEXTS for word in text.split()} | set("</s>$9xyab"))
    backend = Tokenizer(model({word: id_ for id_, word in enumerate([*NAMES, *found])}, unk_token="<unk>", **options))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(NAMES)
    return backend


def byte_level(special: bool) -> Tokenizer:
    """With an end of text that is in the vocabulary, or one that is added and not marked special."""
    backend = train_tokenizer(TEXTS, 300).backend
    backend.add_tokens([AddedToken("</s>", special=special, normalized=False)])
    return backend


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "Unigram": sentencepiece_unigram,
    "BPE": sentencepiece_bpe,
    "BPE that looks words up first": partial(sentencepiece_bpe, ignore_merges=True),
    "WordLevel": partial(words, models.WordLevel),
    "WordPiece": partial(words, models.WordPiece),
    "byte-level BPE": partial(byte_level, True),
    "byte-level BPE, end not marked special": partial(byte_level, False),
}


def write(folder: Path, backend: Tokenizer, **config: object) -> LoadedTokenizer:
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_in_the_text_are_text(kind: str, tmp_path: Path) -> None:
    backend = KINDS[kind]()
    if "byte-level" in kind:  # whose own mark would come before the configured end
        fields = json.loads(backend.to_str())
        fields["added_tokens"] = [token for token in fields["added_tokens"] if token["content"] != END_OF_TEXT]
        fields["model"]["vocab"] = {k if k != END_OF_TEXT else "unused": v for k, v in fields["model"]["vocab"].items()}
        backend = Tokenizer.from_str(json.dumps(fields))
    loaded = write(tmp_path / "tokenizer", backend, eos_token="</s>")
    assert loaded.backend.id_to_token(loaded.info.eos_id) == "</s>"
    ours = encoder(loaded)
    plain = load_tokenizer(tmp_path / "tokenizer").backend
    unknown = plain.token_to_id("<unk>")
    roles = {plain.token_to_id(name) for name in NAMES} - {None}
    for text in TAGGED:
        ids = ours.encode(text, add_special_tokens=False).ids
        assert not roles & set(ids) - {unknown}, text
        if "Word" not in kind:  # those lose the blanks, and unknown words
            assert unknown not in ids
            assert plain.decode(ids, skip_special_tokens=False) == text
    for text in TEXTS:
        ids = plain.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, add_special_tokens=False).ids == ids
    assert (
        ours.encode("\U0001f600 \u6f22", add_special_tokens=False).ids
        == plain.encode("\U0001f600 \u6f22", add_special_tokens=False).ids
    )


def test_the_ends_of_shared_tokenizers_need_no_second_vocabulary(shared: Path) -> None:
    """Text cannot become them: no merges build them. A second backend would take as long to load as the first."""
    for name in ("tokenizers/gpt2", "tokenizers/qwen", "teachers/stories260K"):
        loaded = load_tokenizer(shared / name)
        assert encoder(loaded) is loaded.backend


def test_an_end_that_is_a_character_is_left_to_the_refusal(tmp_path: Path) -> None:
    """Of characters: without its name the character would be lost, and silently. encode.py refuses ends within documents."""
    backend = Tokenizer(models.BPE(vocab={name: id_ for id_, name in enumerate("$abc ")}, merges=[]))
    loaded = write(tmp_path, backend, eos_token="$")
    assert encoder(loaded).encode("a $ b").ids == [1, 4, 0, 4, 2]


def test_merges_are_not_dropped_at_random(tmp_path: Path) -> None:
    backend = encoder(write(tmp_path, sentencepiece_bpe(dropout=0.5)))
    assert len({tuple(backend.encode("the the the the", add_special_tokens=False).ids) for _ in range(30)}) == 1


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


def nameless() -> Tokenizer:
    """With tokens of which none is known to end texts."""
    backend = Tokenizer(models.WordLevel({"a": 0, "b": 1, "[END]": 2, "[TURN]": 3}, unk_token="a"))
    backend.add_special_tokens(["[END]", "[TURN]"])
    return backend


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config.json": {"eos_token": "[END]"}},
        {"tokenizer_config.json": {"eos_token": {"__type": "AddedToken", "content": "[END]", "lstrip": False}}},
        {"tokenizer_config.json": {"eos_token_id": 2}},
        {"tokenizer_config.json": {"model_max_length": 5}, "special_tokens_map.json": {"eos_token": "[END]"}},
        {"tokenizer_config.json": {"eos_token": None}, "special_tokens_map.json": {"eos_token": {"content": "[END]"}}},
        {"special_tokens_map.json": {"eos_token": "[END]"}, "generation_config.json": {"eos_token_id": 3}},
        {"tokenizer_config.json": {"eos_token": "[END]"}, "special_tokens_map.json": {"eos_token": "[TURN]"}},
        {"tokenizer_config.json": {"eos_token": "<of another>"}, "special_tokens_map.json": {"eos_token": "[END]"}},
        {"special_tokens_map.json": {"pad_token": "[TURN]"}, "generation_config.json": {"eos_token_id": [99, 2, 3]}},
        {"config.json": {"eos_token_id": 2, "vocab_size": 4}},
    ],
)
def test_the_document_end_is_found_where_it_is_named(tmp_path: Path, files: dict) -> None:
    nameless().save(str(tmp_path / "tokenizer.json"))
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    loaded = load_tokenizer(tmp_path)
    assert loaded.info.eos_id == 2
    assert load_tokenizer(tmp_path / "tokenizer.json").info.eos_id == 2
    loaded.save(tmp_path / "saved")
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    assert load_tokenizer(tmp_path / "saved").info.eos_id == 2
    if files.get("tokenizer_config.json", {}).get("eos_token") != "<of another>":
        transformers = pytest.importorskip("transformers")
        assert transformers.AutoTokenizer.from_pretrained(str(tmp_path / "saved")).eos_token_id == 2


@pytest.mark.parametrize("end", [None, "<of another>", 99, [], -1, True])
def test_a_tokenizer_without_document_end(tmp_path: Path, end: object) -> None:
    assert write(tmp_path, nameless(), eos_token_id=end).info.eos_id is None


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_pointers_are_refused(tmp_path: Path, name: str) -> None:
    write(tmp_path, nameless(), eos_token="[END]")
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")
    with pytest.raises(UserError, match=rf"{name}: a Git LFS pointer .git lfs pull. instead of the contents"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{}", b"not json", b'{"model": {"type": "BPE"}}'])
def test_damaged_tokenizers_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(UserError, match="is not a tokenizer"):
        load_tokenizer(tmp_path)


def test_missing_tokenizers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder or file"):
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


def test_attack_18b_settings_nested_without_end_are_one_line(tmp_path: Path) -> None:
    write(tmp_path, nameless(), eos_token="[END]")
    for text in ("[" * 100_000, '{"a":' * 200 + "1" + "}" * 200):
        (tmp_path / "tokenizer_config.json").write_text(text)
        with pytest.raises(UserError, match=r"tokenizer_config\.json: not valid JSON .nested more than"):
            load_tokenizer(tmp_path)


@pytest.mark.parametrize("field", ["sha256", "vocab_size", "eos_id"])
def test_attack_16_another_tokenizer_beside_the_shards_is_noticed_by_whoever_reads_it(
    tmp_path: Path, field: str
) -> None:
    """Inspection, samples, diagnosis and export: all go through here."""
    made_with = write(tmp_path / "tokenizer", nameless(), eos_token="[END]").info
    assert load_prepared_tokenizer(str(tmp_path), made_with).info.sha256 == made_with.sha256
    other = made_with.model_copy(update={field: "0" * 64 if field == "sha256" else 7})
    with pytest.raises(UserError, match=rf"tokenizer/tokenizer\.json has the {field} .*, the manifest says"):
        load_prepared_tokenizer(str(tmp_path), other)
