"""`textldm serve`'s options, without torch: mistakes in them are found at once."""

import argparse
import importlib.util
import os
import re
from pathlib import Path

from data_pipeline.core.errors import UserError, check_early
from data_pipeline.core.hub import check_hub_id
from pretrain.export.generate_line import EXPECTED

API_KEY = "TEXTLDM_API_KEY"
"""Environment variable that holds the key; never an argument, which every user of the machine can read."""
NEEDED = ("fastapi", "uvicorn", "prometheus_client")
_KEY = re.compile(r"[!-~]{16,512}")
_COUNTS = ("max_batch_tokens", "queue", "max_choices", "max_steps", "max_body_bytes", "drain_s")


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="textldm serve", description="Serve an exported TextLDM: OpenAI's completions API, and a page at /."
    )
    parser.add_argument("--model", required=True, help="exported folder, or hub id")
    parser.add_argument("--name", help="by which requests ask for the model; default: the last part of --model")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; default: %(default)s, this machine alone"
    )
    parser.add_argument("--port", type=int, default=8000, help="0: any free one; default: %(default)s")
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument(
        "--api-key-file", type=Path, help=f"file whose one line every request must know; or set {API_KEY}"
    )
    parser.add_argument(
        "--max-batch-tokens",
        type=int,
        default=16384,
        help="prompts and new tokens of one packed call; default: %(default)s",
    )
    parser.add_argument(
        "--queue", type=int, default=256, help="texts that may wait; more are answered with 429; default: %(default)s"
    )
    parser.add_argument("--max-choices", type=int, default=64, help="texts of one request; default: %(default)s")
    parser.add_argument("--max-steps", type=int, default=250, help="solver steps of a request; default: %(default)s")
    parser.add_argument(
        "--max-text-tokens", type=int, help="of a prompt with what continues it; default: four of the model's windows"
    )
    parser.add_argument("--max-body-bytes", type=int, default=1 << 20, help="of a request; default: %(default)s")
    parser.add_argument(
        "--drain-s",
        type=int,
        default=60,
        help="seconds that requests under way are given after SIGTERM; default: %(default)s",
    )
    return parser


def read(argv: list[str] | None) -> argparse.Namespace:
    """The options. Raises: UserError for those that cannot be."""
    given = make_parser().parse_args(argv)
    for name in _COUNTS:
        if getattr(given, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(given, name)}; expected at least 1")
    if not 0 <= given.port < 1 << 16:
        raise UserError(f"--port is {given.port}; expected 0 to 65535")
    if given.max_text_tokens is not None and given.max_text_tokens < 2:
        raise UserError(f"--max-text-tokens is {given.max_text_tokens}; expected at least 2")
    if given.max_choices > given.queue:
        raise UserError(
            f"--max-choices {given.max_choices} is more than --queue {given.queue}: such a request could never wait"
        )
    if not Path(given.model).expanduser().is_dir():
        check_hub_id(given.model, "--model", EXPECTED)
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"{', '.join(missing)} is not installed: pip install -e '.[serve]'")
    return given


def check(argv: list[str] | None) -> None:
    """End the process with a line and exit code 2 if the options are wrong."""
    check_early(read, argv)


def api_key(file: Path | None) -> str | None:
    """The key that requests must know, of a file or the environment; None if none is asked for. Raises: UserError."""
    where = f"--api-key-file {file}" if file else API_KEY
    if file:
        try:
            key = file.read_text().strip()
        except (OSError, ValueError) as error:
            raise UserError(f"{where} cannot be read ({type(error).__name__}); expected a file of one line") from None
    elif API_KEY in os.environ:
        key = os.environ[API_KEY].strip()
    else:
        return None
    if not _KEY.fullmatch(key):
        raise UserError(
            f"{where} holds {len(key)} characters; expected one word of 16 to 512 printable ASCII characters"
        )
    return key
