"""Figures of evaluations as tables, in text and in Markdown, with the paper's beside those of its sets."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from data_pipeline.core.errors import UserError
from data_pipeline.core.outside import parse_json, read_at_most
from data_pipeline.core.storage import open_file
from pretrain.evaluate import paper

DIGITS = {
    "seconds": 2,
    "tokens_per_second": 1,
    "generative_nll": 3,
    "nats_per_token": 3,
    "bits_per_byte": 3,
    "entropy": 3,
}
"""Behind the point; of others, which are shares, three as percentages' tenths."""
PERCENT = ("rouge_1", "rouge_2", "rouge_l", "bertscore", "mauve")
"""Shown times 100, as they are published."""


def read_result(path: Path) -> dict[str, Any]:
    """What an evaluation wrote. Raises: UserError."""
    found = _read(path)
    try:
        texts = [found[name] for name in ("model", "benchmark")] + [str(found["protocol"]["samples"])]
        if all(isinstance(text, str) for text in texts) and all(map(_is_figure, found["metrics"].values())):
            return {"left_out": {}, "versions": {}, **found}
    except (KeyError, TypeError, AttributeError):
        pass
    raise UserError(f"{path} is no result of textldm evaluate; expected the file of its --output")


def read_sweep(path: Path) -> dict[str, Any]:
    """What a sweep wrote. Raises: UserError."""
    found = _read(path)
    try:
        points, by = found["points"], found["by"]
        texts = [found["model"], found["benchmark"], by]
        whole = all(
            isinstance(point["settings"], dict)
            and _is_number(point["evaluations"])
            and _is_figure(point["metrics"][by])
            for point in points
        )
        chosen = all(isinstance(i, int) and 0 <= i < len(points) for i in found["pareto"])
        if points and whole and chosen and all(isinstance(text, str) for text in texts):
            return dict(found)
    except (KeyError, TypeError, AttributeError):
        pass
    raise UserError(f"{path} is no result of textldm evaluate sweep; expected the file of its --output")


def _read(path: Path) -> Any:
    try:
        with open_file(path) as file:
            return parse_json(read_at_most(file))
    except (OSError, ValueError):
        return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) < 1e100


def _is_figure(figure: Mapping[str, Any]) -> bool:
    """Whether it is a metric with the ends of its interval; None is what could not be told."""
    ends = [figure[name] for name in ("value", "low", "high") if figure[name] is not None]
    return all(map(_is_number, ends)) and isinstance(figure["n"], int)


def shown(name: str, figure: Mapping[str, float]) -> str:
    """A figure with its interval."""
    times, digits = (100, 1) if name in PERCENT else (1, DIGITS.get(name, 3))
    value, low, high = (
        times * (float("nan") if figure[key] is None else figure[key]) for key in ("value", "low", "high")
    )
    text = f"{value:.{digits}f}"
    return f"{text} ({low:.{digits}f} to {high:.{digits}f})" if low == low else text


def one(result: Mapping[str, Any], kind: str) -> str:
    """The table of one evaluation; `kind` is a format of tabulate."""
    rows = [(name, shown(name, figure), figure["n"]) for name, figure in result["metrics"].items()]
    lines = [tabulate(rows, headers=("figure", "value (95 % interval)", "n"), tablefmt=kind, disable_numparse=True)]
    lines += [f"left out: {name} ({why})" for name, why in result["left_out"].items()]
    return "\n".join(lines)


def several(results: Sequence[Mapping[str, Any]], kind: str) -> str:
    """A row a model; one table for each benchmark, and below our models the paper's."""
    found = []
    for benchmark in dict.fromkeys(result["benchmark"] for result in results):
        group = [result for result in results if result["benchmark"] == benchmark]
        names = list(dict.fromkeys(name for result in group for name in result["metrics"]))
        rows = [
            [
                result["model"],
                *(shown(name, result["metrics"][name]) if name in result["metrics"] else "" for name in names),
            ]
            for result in group
        ]
        rows += [
            [f"{model}, the paper's", *(values.get(name, "") for name in names)]
            for model, values in published(group[0])
        ]
        title = f"{benchmark}, {group[0]['protocol']['samples']} documents"
        found.append(title + "\n" + tabulate(rows, headers=["model", *names], tablefmt=kind, disable_numparse=True))
    return "\n\n".join(found)


def published(result: Mapping[str, Any]) -> list[tuple[str, dict[str, str]]]:
    """The paper's rows for the result's benchmark, where the protocol is the paper's: one of its sets, cut as it was, 1,000 documents."""
    rows = paper.ROWS.get(Path(result["benchmark"]).stem, {})
    protocol = result["protocol"]
    if protocol["samples"] != paper.SAMPLES or protocol.get("max_words", 0) < paper.WORDS:
        return []
    return [(model, dict(zip(paper.COLUMNS, map(str, values)))) for model, values in rows.items()]
