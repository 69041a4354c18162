"""Figures that were measured: benchmarks/results/*.json, shown as benchmarks/results/RESULTS.md.

    python -m benchmarks.results

writes RESULTS.md anew. A file holds {"title", "tables"}; a table

| key | |
|---|---|
| `title` | what was measured |
| `date` | day or days, 2026-11-25 |
| `commit` | of the code, null where it was not noted or rows name their own |
| `machine` | what it ran on, and what else ran there |
| `command`, `notes` | how to repeat it; what a reader must know; both may be left out |
| `columns`, `rows` | names, and lists as long: a number, a text, a list of numbers, null, or {"value": ..., "error": ...} |

Numbers are shown with the digits that the file has. Newest tables come first in a file.
"""

import argparse
import json
import re
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any

from data_pipeline.core.errors import UserError, cli

FOLDER = Path(__file__).resolve().parent / "results"
NAME = "RESULTS.md"
_KEYS = ("title", "date", "commit", "machine", "columns", "rows")
_DATE = r"\d{4}-\d{2}-\d{2}"


def read(path: Path) -> dict[str, Any]:
    """One file of results. Raises: UserError naming the table and what is wrong with it."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"), parse_float=Decimal)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON ({error})") from None
    for number, table in enumerate(found.get("tables", [])):
        place = f"{path.name}, table {number} ({table.get('title')})"
        if missing := [key for key in _KEYS if key not in table]:
            raise UserError(f"{place}: no {', '.join(missing)}; expected {', '.join(_KEYS)}")
        if not re.fullmatch(rf"{_DATE}( to {_DATE})?", table["date"]):
            raise UserError(f"{place}: date {table['date']!r}, expected 2026-11-25 or 2026-11-24 to 2026-11-25")
        if table["commit"] is not None and not re.fullmatch(r"[0-9a-f]{7,40}(-dirty)?", table["commit"]):
            raise UserError(f"{place}: commit {table['commit']!r}, expected 7 to 40 hexadecimal digits or null")
        if wrong := [row for row in table["rows"] if len(row) != len(table["columns"])]:
            raise UserError(f"{place}: a row of {len(wrong[0])} cells, expected {len(table['columns'])}: {wrong[0]}")
    return found


def render(folder: Path = FOLDER) -> str:
    """The page of all files, by name."""
    pages = [read(path) for path in sorted(folder.glob("*.json"))]
    lines = ["# Results", "", "Made from the JSON files beside it by `python -m benchmarks.results`; change those."]
    for page in pages:
        lines += ["", f"## {page['title']}"]
        for table in page["tables"]:
            lines += [
                "",
                f"### {table['title']}",
                "",
                _surroundings(table),
                "",
                *table_of(table["columns"], table["rows"]),
            ]
            if "notes" in table:
                lines += ["", table["notes"]]
    return "\n".join(lines) + "\n"


def _surroundings(table: dict[str, Any]) -> str:
    parts = [table["date"], f"commit {table['commit']}" if table["commit"] else None, table["machine"]]
    return "; ".join(part for part in parts if part) + (f": `{table['command']}`" if "command" in table else "")


def table_of(columns: list[str], rows: list[list[Any]]) -> list[str]:
    cells = [columns, ["---"] * len(columns), *([_shown(cell) for cell in row] for row in rows)]
    return [f"| {' | '.join(row)} |" for row in cells]


def _shown(cell: Any) -> str:
    match cell:
        case None:
            return ""
        case list():
            return " ".join(map(_shown, cell))
        case {"value": list(values), "error": list(errors)}:
            return " ".join(f"{_shown(value)} ({error})" for value, error in zip(values, errors, strict=True))
        case {"value": value, "error": error}:
            return f"{_shown(value)} ({error})"
        case int():
            return f"{cell:,}"
        case _:
            return str(cell)


@cli
def main(argv: list[str] | None = None) -> None:
    """Write RESULTS.md."""
    argparse.ArgumentParser(prog="python -m benchmarks.results", description=main.__doc__).parse_args(argv)
    (FOLDER / NAME).write_text(render(), encoding="utf-8")
    print(FOLDER / NAME)


if __name__ == "__main__":
    sys.exit(main())
