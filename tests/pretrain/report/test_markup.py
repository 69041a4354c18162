"""What is not markup is escaped, whoever passes it and wherever it goes."""

import pytest

from pretrain.report.markup import Html, compact, figure, join, table, tag, text


def test_text_is_escaped_once_and_markup_is_not() -> None:
    assert text("<b>&\"'") == "&lt;b&gt;&amp;&quot;&#x27;"
    assert text(text("<")) == "&lt;"
    assert tag("p", "<", tag("b", ">"), title='"') == '<p title="&quot;">&lt;<b>&gt;</b></p>'
    assert join(["<", Html("<br>")], "&") == "&lt;&amp;<br>"
    assert "<i>" not in table(("<i>",), [("<i>", "<i>")])


def test_what_no_page_and_no_encoding_can_hold_is_shown() -> None:
    assert text("a\x00b\x1b") == "a\\u0000b\\u001b"
    text("\ud800").encode()
    assert "hunter2" not in text("https://me:hunter2@host/x")


def test_attributes_that_are_none_or_false_are_left_out() -> None:
    assert tag("input", type="range", hidden=True, max=None, min=0) == '<input type="range" hidden min="0">'
    assert tag("line", x1=1.234, x2=2.0) == '<line x1="1.2" x2="2"/>'


def test_a_figure_keeps_the_files_own_number() -> None:
    assert figure(4.857720357672801, ".3f") == '<data value="4.857720357672801">4.858</data>'


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (972_475, "972k"),
        (1_769_472, "1.77M"),
        (999_600, "1.00M"),
        (12_345, "12.3k"),
        (9.6e9, "9.60B"),
        (512, "512"),
        (0.25, "0.25"),
    ],
)
def test_compact_numbers_have_three_digits(value: float, shown: str) -> None:
    assert compact(value) == shown
