"""The page in headless Chromium: in light and dark, on a desk, on a phone and on paper, without a complaint or a request."""

import base64
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from pretrain.report.files import read_run
from pretrain.report.page import page
from tests.pretrain.report.run_folder import HOSTILE, write_run
from tests.pretrain.serve import chromium

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser() -> Iterator[chromium.Page]:
    if chromium.find() is None:
        pytest.skip("needs Chromium (Debian's package chromium)")
    with chromium.opened() as found:
        yield found


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page whose every text would run and load something, if it could."""
    folder = tmp_path_factory.mktemp("report")
    run = write_run(
        folder / "runs",
        f"{HOSTILE}<script>document.title='run'</script><link rel=stylesheet href=http://127.0.0.1:9/x.css>",
    )
    (folder / "page.html").write_text(page(read_run(run), read_run(write_run(folder / "others"))))
    return folder / "page.html"


@pytest.mark.parametrize("width", [1280, 375])
def test_it_is_seen_in_light_and_dark_and_fits(
    browser: chromium.Page, written: Path, tmp_path: Path, width: int
) -> None:
    browser.complaints.clear()
    browser.asked.clear()
    pictures = {}
    for scheme in ("light", "dark"):
        browser.look(written.as_uri(), width, 900, scheme)
        assert browser.evaluate("document.documentElement.scrollWidth") <= width
        assert browser.evaluate("document.title").endswith("TextLDM run")
        browser.picture(tmp_path / f"{scheme}.png")
        pictures[scheme] = Image.open(tmp_path / f"{scheme}.png").convert("L")
        assert len(pictures[scheme].getcolors(1 << 20) or []) > 50
    light, dark = (sum(image.resize((40, 40)).tobytes()) / 1600 for image in pictures.values())
    assert light > 180 > 80 > dark
    clipped = """[...document.querySelectorAll("svg text")].filter(one => {
      const [box, frame] = [one.getBoundingClientRect(), one.ownerSVGElement.getBoundingClientRect()];
      return box.right > frame.right + 1 || box.left < frame.left - 1;
    }).map(one => one.textContent)"""
    assert [text for text in browser.evaluate(clipped) if "script" not in text] == []
    assert browser.complaints == []
    assert set(browser.asked) == {written.as_uri()}


def test_the_slider_shows_one_text_at_a_time(browser: chromium.Page, written: Path) -> None:
    browser.look(written.as_uri(), 1280, 900, "light")
    shown = """[...document.querySelectorAll(".frame")].filter(one => one.offsetHeight).map(one => one.querySelector("h4").textContent)"""
    assert browser.evaluate(shown) == ["t = 1.00"]
    move = "const time = document.getElementById('time'); time.value = {}; time.dispatchEvent(new Event('input')); 0"
    for place, t in ((2, "0.00"), (1, "0.50")):
        browser.evaluate("{" + move.format(place) + "}")
        assert browser.evaluate(shown) == [f"t = {t}"]
    browser.call("Emulation.setEmulatedMedia", media="print", features=[])
    assert browser.evaluate(shown) == ["t = 1.00", "t = 0.50", "t = 0.00"]
    assert len(base64.b64decode(browser.call("Page.printToPDF")["data"])) > 10_000
    browser.call("Emulation.setEmulatedMedia", media="", features=[])


def test_the_button_turns_light_into_dark_and_back(browser: chromium.Page, written: Path) -> None:
    browser.look(written.as_uri(), 1280, 900, "dark")
    color = "getComputedStyle(document.body).backgroundColor"
    before = browser.evaluate(color)
    browser.evaluate("document.getElementById('theme').click()")
    after = browser.evaluate(color)
    assert (before, after) == ("rgb(22, 24, 27)", "rgb(251, 250, 247)")
    browser.evaluate("document.getElementById('theme').click()")
    assert browser.evaluate(color) == before
