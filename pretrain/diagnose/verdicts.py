"""Verdicts: a figure beside its threshold, and the table that a tired person can read."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tabulate import tabulate

Figures = dict[str, Any]


@dataclass(frozen=True)
class Verdict:
    """A line of the table; check is its number in docs/diagnosis.md, passed is None for what is only reported or could not be measured."""

    check: int
    name: str
    figure: str
    threshold: str = ""
    passed: bool | None = None

    def record(self) -> dict[str, Any]:
        """The verdict as a dictionary for JSON."""
        return asdict(self)


def at_least(
    check: int, name: str, value: float | None, limit: float, form: str = ".3f", error: float | None = None
) -> Verdict:
    """A verdict that passes if value >= limit; nan fails. Beside the figure stands its standard error, where there is one."""
    if value is None:
        return Verdict(check, name, "not measured", f">= {limit:g}")
    return Verdict(check, name, with_error(value, error, form), f">= {limit:g}", bool(value >= limit))


def above(check: int, name: str, value: float, limit: float, form: str = ".3f", error: float | None = None) -> Verdict:
    """A verdict that passes if value > limit; nan fails. The error as in `at_least`."""
    return Verdict(check, name, with_error(value, error, form), f"> {limit:g}", bool(value > limit))


def at_most(
    check: int, name: str, value: float | None, limit: float, form: str = ".3f", error: float | None = None
) -> Verdict:
    """A verdict that passes if value <= limit; nan fails. The error as in `at_least`."""
    if value is None:
        return Verdict(check, name, "not measured", f"<= {limit:g}")
    return Verdict(check, name, with_error(value, error, form), f"<= {limit:g}", bool(value <= limit))


def with_error(value: float, error: float | None, form: str = ".3f") -> str:
    """A figure and its standard error, where there is one: none, or nan, stands for too few documents to tell."""
    return (
        f"{value:{form}}"
        if error is None or math.isnan(error)
        else f"{value:{form}} +- {error:{form.removeprefix('+')}}"
    )


def quarters(values: Sequence[float], form: str = ".3f", errors: Sequence[float] | None = None) -> str:
    """The four quarters' numbers, formatted, with spaces between; with their standard errors, where given."""
    beside: Sequence[float | None] = errors or [None] * len(values)
    return "  ".join(with_error(value, error, form) for value, error in zip(values, beside))


def table(verdicts: Sequence[Verdict]) -> str:
    """Aligned columns: check, figure, threshold, verdict."""
    words = {True: "ok", False: "FAIL", None: ""}
    rows = [(f"{v.check} {v.name}", v.figure, v.threshold, words[v.passed]) for v in verdicts]
    headers = ("check", "figure", "threshold", "verdict")
    note = "(four figures: the quarters of t, from data to noise)"
    return f"{tabulate(rows, headers, tablefmt='simple', disable_numparse=True)}\n{note}"
