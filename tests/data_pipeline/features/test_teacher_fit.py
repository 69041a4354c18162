"""A teacher must know the data's tokens by the same ids and have positions for its windows; ids that no text has are no matter."""

import json
import shutil
from pathlib import Path

import pytest

from data_pipeline.core.errors import UserError
from data_pipeline.features.teacher_fit import check_fit, check_same_tokenizer
from data_pipeline.features.teacher_loading import load_teacher
from data_pipeline.format.manifest import Manifest
from data_pipeline.text.tokenization import load_tokenizer


def manifest_of(folder: Path, tokenizer: Path) -> Manifest:
    """A prepared folder without shards whose tokens are the tokenizer's."""
    loaded = load_tokenizer(tokenizer)
    loaded.save(folder / "tokenizer")
    return Manifest.create(
        row_tokens=64, token_dtype="uint16", min_window=4, max_window=64, seed=0, heldout_fraction=0.1, dedupe=False,
        tokenizer=loaded.info, splits={"train": [], "heldout": []}, source="none", statistics={},
    )  # fmt: skip


def test_tokenizers_must_agree(shared, tmp_path):
    teacher = str(shared / "teachers/stories260K")
    tokens = manifest_of(tmp_path / "same", Path(teacher))
    check_same_tokenizer(teacher, None, str(tmp_path / "same"), tokens)
    foreign = manifest_of(tmp_path / "foreign", shared / "tokenizers/gpt2")
    with pytest.raises(UserError, match=r"gpt2 .*stories260K.* differ in"):
        check_same_tokenizer(teacher, None, str(tmp_path / "foreign"), foreign)
    # A teacher that knows more tokens behind the shared ones is welcome, one that knows fewer is not.
    tokenizer = json.loads((Path(teacher) / "tokenizer.json").read_text())
    extra = {"id": 512, "content": "<|im_start|>", "special": True} | dict.fromkeys(
        ("single_word", "lstrip", "rstrip", "normalized"), False
    )
    tokenizer["added_tokens"].append(extra)
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    check_same_tokenizer(str(tmp_path), None, str(tmp_path / "same"), tokens)
    larger = manifest_of(tmp_path / "larger", tmp_path)
    with pytest.raises(UserError, match="im_start"):
        check_same_tokenizer(teacher, None, str(tmp_path / "larger"), larger)


def test_windows_must_fit_the_positions(shared, tmp_path):
    teacher = load_teacher(shared / "teachers/stories260K")
    tokens = manifest_of(tmp_path, shared / "teachers/stories260K")
    check_fit(teacher, str(tmp_path), tokens)
    teacher.max_positions = 63
    with pytest.raises(UserError, match=r"windows of up to 64 tokens, but teacher .* has 63 positions"):
        check_fit(teacher, str(tmp_path), tokens)


@pytest.mark.parametrize(
    ("special", "end", "refused", "looked_for"),
    [
        (True, "<s>", False, False),  # never of a text: nothing to look for
        (False, "<s>", False, True),  # may be in a text, or not: whoever runs the teacher looks
        (True, "<beyond>", True, False),  # ends every document
    ],
)
def test_ids_beyond_the_embeddings_are_no_matter_where_no_text_has_them(
    shared: Path, tmp_path: Path, special: bool, end: str, refused: bool, looked_for: bool
):
    folder = tmp_path / "teacher"
    shutil.copytree(shared / "teachers/stories260K", folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append(
        {"id": 512, "content": "<beyond>", "special": special}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    )
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": end}))
    teacher, tokens = load_teacher(folder), manifest_of(tmp_path / "data", folder)
    assert tokens.tokenizer.vocab_size == 513 > teacher.vocab_size
    if refused:
        with pytest.raises(UserError, match="every document of the data ends with token 512"):
            check_fit(teacher, str(tmp_path / "data"), tokens)
        return
    check_fit(teacher, str(tmp_path / "data"), tokens)
    assert teacher.check_ids == looked_for
