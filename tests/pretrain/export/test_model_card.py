"""What a card takes from elsewhere is text there, and nothing else (docs/security.md: attack 17)."""

import re
from types import SimpleNamespace

import pytest

from pretrain.export.model_card import cell, model_card
from tests.modeling.test_textldm import make_model


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


def test_attack_17_whatever_a_card_takes_from_elsewhere_goes_through_it() -> None:
    """The run, its checkpoint and its data may have been somebody else's."""
    evil = "<b>|\n# `x"
    places = {
        "model": {"vae": evil},
        "flow": {},
        "data": {"path": evil},
        "optimizer": {},
        "schedule": {},
        "train": {"run": evil},
    }
    source = SimpleNamespace(
        name="mine", license_id="mit", weights="ema",
        record=SimpleNamespace(config=places | {"about": {"purpose": evil}}),
        saved=SimpleNamespace(step=1, world_size=1, precision=evil),
        manifest=SimpleNamespace(
            source=evil, fingerprint="0" * 64, splits={"train": []}, tokenizer=SimpleNamespace(name=evil, vocab_size=1)
        ),
    )  # fmt: skip
    card = model_card(make_model(), source)
    settings = card.partition("```json")[2]
    assert evil not in card
    assert "<b>" not in card.replace(settings, "")
    assert "&#60;b&#62;" in card
    assert settings.count("```") == 1  # JSON keeps line ends to itself, so that none of it ends the block
