"""A run on one page: how it learned, what it writes, what others say of it, how it ran, and what it was made from.

    textldm report --run runs/dit_xl
    textldm report --run runs/dit_xl --against runs/ar_b --output compared.html

Reads the files of the run's folder, whether it trains or has ended; what is not there yet, the page says. It is one HTML file, which asks
nothing of any network: it can be mailed, printed and kept.
"""

import argparse
from pathlib import Path

from data_pipeline.core.errors import UserError, cli
from data_pipeline.core.storage import write_text
from pretrain.report.files import TRAJECTORY_NAME, read_run
from pretrain.report.page import page

PAGE_NAME = "report.html"


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="textldm report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True, help="folder of a run")
    parser.add_argument("--against", type=Path, help="folder of another run, beside which it is shown")
    parser.add_argument(
        "--evaluation", type=Path, nargs="+", default=[], metavar="FILE", help="results of textldm evaluate, besides those in the folder"
    )  # fmt: skip
    parser.add_argument(
        "--trajectory", type=Path, help=f"file of textldm generate --trajectory ({TRAJECTORY_NAME} of the folder)"
    )
    parser.add_argument("--output", type=Path, help=f"HTML file ({PAGE_NAME} in the folder)")
    return parser


@cli
def main(argv: list[str] | None = None) -> None:
    """Write the page and print its path."""
    arguments = make_parser().parse_args(argv)
    output = arguments.output or arguments.run / PAGE_NAME
    if output.suffix not in (".html", ".htm"):
        raise UserError(f"--output {output}: expected a file that ends in .html")
    run = read_run(arguments.run, arguments.trajectory, arguments.evaluation)
    against = read_run(arguments.against) if arguments.against else None
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_text(output, page(run, against))
    except OSError as error:
        raise UserError(f"--output {output} cannot be written ({error.strerror})") from None
    print(output)


if __name__ == "__main__":
    raise SystemExit(main(None))
