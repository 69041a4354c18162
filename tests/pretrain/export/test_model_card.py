"""What a card takes from elsewhere is text there, and nothing else (docs/security.md: attack 17)."""

import re

import pytest

from pretrain.export.model_card import cell


@pytest.mark.parametrize(
    "text",
    ["<script>alert(1)</script>", "a | b |\n| weights | mine", "](javascript:x)", "`x`", "![x](http://y/z.png)", "# x\n---\n", "\x1b[2Jx",
     "&lt;b&gt;", "https://me:pass@host/x"],
)  # fmt: skip
def test_attack_17_markdown_and_html_are_shown_as_they_are_written(text: str) -> None:
    found = cell(text)
    assert "\n" not in found
    assert "pass@" not in found
    assert not re.search(r"[<>|`\[\]!*\\\x1b]|&(?!#\d+;)", found)


@pytest.mark.parametrize(
    "text", ["segyges/OpenWebText2#train", "data/x.jsonl", "wikimedia/wikipedia:20231101.en@main", "\u00c4 text, 5 %"]
)
def test_names_of_sources_stay_as_they_are(text: str) -> None:
    assert cell(text) == text
