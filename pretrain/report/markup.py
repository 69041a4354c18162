"""HTML out of text that may be anything: whatever comes from a file is escaped here, and nowhere else.

`Html` is text that is safe as it is; every function takes plain texts or `Html` and gives `Html`. So what was not made here is escaped,
because a plain `str` is.
"""

import html
import math
from collections.abc import Iterable, Sequence
from typing import Any

from data_pipeline.core.telling import tellable


class Html(str):
    """Markup, as opposed to text."""

    __slots__ = ()


def text(value: Any) -> Html:
    """Anything as text between tags or in an attribute's quotes: escaped, without passwords, control characters and lone surrogates."""
    if isinstance(value, Html):
        return value
    plain = str(value).encode("utf-8", "backslashreplace").decode("utf-8")
    return Html(html.escape(tellable(plain), quote=True))


def join(parts: Iterable[Any], between: str = "") -> Html:
    """Texts and markup, one after the other."""
    return Html(str(text(between)).join(text(part) for part in parts))


def tag(name: str, /, *inside: Any, **attributes: Any) -> Html:
    """An element. Attributes: `class_` for class, `_` for `-`; None and False leave one out, True has no value."""
    shown = ""
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        shown += f" {key}" if value is True else f' {key}="{text(_short(value))}"'
    if name in ("meta", "input", "circle", "line", "path", "rect") and not inside:
        return Html(f"<{name}{shown}/>" if name not in ("meta", "input") else f"<{name}{shown}>")
    return Html(f"<{name}{shown}>{join(inside)}</{name}>")


def _short(value: Any) -> Any:
    """Coordinates with a tenth of a pixel: a third of the bytes."""
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else value


def figure(value: float, form: str = ".4g") -> Html:
    """A number as people read it; the file's own stands in `value`."""
    return tag("data", f"{value:{form}}", value=repr(value))


def compact(value: float) -> str:
    """A number in few characters: 972,475 is 972k, 1,769,472 is 1.77M; with three digits."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * size:
            scaled = value / size
            return f"{scaled:.{max(0, 2 - int(math.log10(abs(scaled) * 1.0005)))}f}{letter}"
    return f"{value:.3g}"


def table(head: Sequence[Any], rows: Iterable[Sequence[Any]], class_: str = "") -> Html:
    """A table that scrolls by itself where the page is narrow; its first column names the rows."""
    body = join(
        tag(
            "tr",
            tag("th", row[0], scope="row"),
            *(tag("td", cell, data_head=name) for name, cell in zip(head[1:], row[1:])),
        )
        for row in rows
    )
    heads = join(tag("th", name, scope="col") for name in head)
    return tag(
        "div", tag("table", tag("thead", tag("tr", heads)), tag("tbody", body), class_=class_ or None), class_="wide"
    )


def facts(pairs: Iterable[tuple[str, Any]]) -> Html:
    """Names and what they are, side by side."""
    return tag("dl", *(tag("div", tag("dt", name), tag("dd", value)) for name, value in pairs), class_="facts")


def missing(what: str) -> Html:
    """One line for what is not there."""
    return tag("p", what, class_="missing")
