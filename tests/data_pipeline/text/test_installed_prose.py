"""The default text is sentences, not code."""

import json
from pathlib import Path

import pytest

from data_pipeline.text import installed_prose
from data_pipeline.text.installed_prose import is_prose, prose_paragraphs

DOCSTRING = """
    Open the file and return a :class:`~io.Reader` that gives ``bytes`` to
    whoever asks for them; the *caller* must close it.

    Parameters
    ----------
    path : str
        The file that is to be opened by this function when it is called.

    >>> open_it("x")
    <Reader>

    This block shows how it can be used in the code of a program::

        reader = open_it("x")  # This is a comment, and it is not one of the sentences.

        Another paragraph that is inside of the code block and should not be kept.

    Args:
        path: The path is the place at which the file that is to be read can be found.

    - This is an item of a list, and lists are not what we want to have in here.

    If the file does not exist then it is made, and nothing is written to it.
"""


def test_only_sentences_stay_and_markup_goes() -> None:
    assert prose_paragraphs(DOCSTRING) == [
        "Open the file and return a io.Reader that gives bytes to whoever asks for them; the caller must close it.",
        "If the file does not exist then it is made, and nothing is written to it.",
    ]


@pytest.mark.parametrize(
    "text",
    [
        "too short to be a sentence.",
        "This one has no full stop at the end of it and so it is not a sentence",
        "Foo(bar, baz) -> qux[0]; x = y + z; return {a: b}; and so on to the end of it.",
        "Zebra giraffe elephant monkey tiger lion bear wolf fox badger otter.",
        "Это предложение написано по-русски, and it is not what we are looking for in here.",
    ],
)
def test_what_is_not_prose(text: str) -> None:
    assert not is_prose(text)


def test_documents_are_files_without_repeated_paragraphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (
        f"If the {name} does not exist then it is made, and nothing else is written to it by this function. " * 2
        for name in ("FileOne", "FileTwo")
    )
    other = "There is nothing in here that could be of any use to those who are looking for an answer. " * 2
    (tmp_path / "a.py").write_text(f'"""{first}\n\n{other}"""\nx = """\n{other}"""\n')
    (tmp_path / "b.py").write_text(f'def f():\n    """{second}"""\n')
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "c.py").write_text(f'"""{other.replace("nothing", "something")}"""\n')
    monkeypatch.setattr(installed_prose, "_folders", lambda: [tmp_path])
    documents = [
        d for d in installed_prose.documents(workers=1) if "FileOne" in d or "FileTwo" in d or "something" in d
    ]
    assert documents == [f"{first.strip()}\n\n{other.strip()}"]
    path = tmp_path / "out.jsonl"
    assert installed_prose.main(["--output", str(path), "--max-bytes", "20000"]) == 0
    assert path.stat().st_size < 25000
    assert all(json.loads(line)["text"] for line in path.read_text().splitlines())
