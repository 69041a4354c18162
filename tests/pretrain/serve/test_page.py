"""The page in headless Chromium: text emerges, the slider goes back through it, in light and dark, on a phone, without a complaint."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pretrain.serve import chromium
from tests.pretrain.serve.running import Running, running

PAGE = Path(__file__).resolve().parents[3] / "pretrain/serve/page"
HOSTILE = "w3 <img src=x onerror=alert(1)> w4"


def test_nothing_in_the_page_reads_markup_or_asks_others() -> None:
    files = {path.name: path.read_text() for path in PAGE.iterdir()}
    assert set(files) == {"index.html", "page.css", "page.js"}
    for name, text in files.items():
        assert "://" not in text, name
        assert not any(
            word in text for word in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval(", "style=")
        )
    assert "onclick" not in files["index.html"]


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running() as found:
        yield found


@pytest.fixture(scope="module")
def page() -> Iterator[chromium.Page]:
    if chromium.find() is None:
        pytest.skip("needs Chromium (Debian's package chromium)")
    with chromium.opened() as found:
        yield found


@pytest.mark.parametrize(("scheme", "width"), [("light", 1000), ("dark", 375)])
def test_text_emerges_and_the_slider_goes_back(
    server: Running, page: chromium.Page, tmp_path: Path, scheme: str, width: int
) -> None:
    page.complaints.clear()
    page.look(server.url, width, 800, scheme)
    page.until("document.getElementById('model').textContent === 'tiny'")
    page.evaluate(
        f"document.getElementById('prompt').value = {HOSTILE!r}; document.getElementById('settings').open = true"
    )
    page.evaluate("document.getElementById('max_tokens').value = 10; document.getElementById('seed').value = 5")
    page.evaluate("document.getElementById('go').click()")
    page.until("!document.getElementById('go').disabled && !document.getElementById('time').disabled")
    assert page.evaluate("document.getElementById('status').textContent") == ""
    assert page.evaluate("document.getElementById('given').textContent") == HOSTILE
    assert page.evaluate("document.querySelectorAll('img, iframe').length") == 0
    assert page.evaluate("Number(document.getElementById('time').max)") == 6  # six steps and the text
    shown = []
    for place in range(7):
        page.evaluate(
            f"document.getElementById('time').value = {place}; document.getElementById('time').dispatchEvent(new Event('input'))"
        )
        shown.append(page.evaluate("document.getElementById('found').textContent"))
        assert ("t = 1.00" if place == 0 else "t = 0") in page.evaluate("document.getElementById('facts').textContent")
    assert len(set(shown)) > 2
    assert "seed 5" in page.evaluate("document.getElementById('facts').textContent")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (dark == "rgb(22, 24, 27)") == (scheme == "dark")
    page.evaluate("document.getElementById('theme').click()")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != dark
    page.picture(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 5000
    assert page.complaints == []
    assert all(url.startswith((server.url, "data:", "about:")) for url in page.asked)


def test_a_mistake_is_said(server: Running, page: chromium.Page) -> None:
    page.look(server.url, 1000, 800, "light")
    page.until("document.getElementById('model').textContent === 'tiny'")
    page.evaluate("document.getElementById('prompt').value = 'w3 '.repeat(200); document.getElementById('go').click()")
    page.until("document.getElementById('status').classList.contains('bad')")
    assert "more than the 128 that a text may have here" in page.evaluate(
        "document.getElementById('status').textContent"
    )
