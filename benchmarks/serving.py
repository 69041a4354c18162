"""The server under many clients beside one: texts a second, how long one takes, and whether any failed.

    python -m benchmarks.serving --model export/textldm-xl --seconds 60

starts `textldm serve` as it is, asks one request at a time for a third of the seconds and then with `--clients` at once.
`throughput_ratio` is tokens/s of the second over the first; `p95_s` the time below which 95 % of the many clients' requests ended;
`errors` counts answers that are none.
"""

import argparse
import json
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

from benchmarks.measuring import ROOT, existing, print_figures
from data_pipeline.core.errors import UserError, cli

START_S = 300.0


class Client:
    """Asks for texts, one after the other; `seconds` are what its answers took, `tokens` what they held."""

    def __init__(self, url: str, number: int, max_tokens: int, prompt: str):
        self._url, self._number, self._max_tokens, self._prompt = url, number, max_tokens, prompt
        self.seconds: list[float] = []
        self.tokens = 0
        self.errors = 0

    def ask_until(self, end: float) -> None:
        """The last question is asked before `end`, on the clock of time.monotonic."""
        while time.monotonic() < end:
            seed = self._number * 100_000 + len(self.seconds)
            body = {"prompt": self._prompt, "max_tokens": self._max_tokens, "seed": seed}
            begun = time.monotonic()
            try:
                usage = ask(f"{self._url}/v1/completions", body)["usage"]
            except (OSError, ValueError, KeyError):
                self.errors += 1
                time.sleep(0.1)
                continue
            self.seconds.append(time.monotonic() - begun)
            self.tokens += usage["completion_tokens"]


def ask(url: str, body: dict[str, object] | None = None) -> dict:
    """The JSON at a URL. Raises: OSError, ValueError."""
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(
        urllib.request.Request(url, data, {"content-type": "application/json"}), timeout=600
    ) as answer:
        return json.load(answer)


def together(url: str, num_clients: int, seconds: float, max_tokens: int, prompt: str) -> tuple[float, list[Client]]:
    """Tokens a second, and the clients."""
    clients = [Client(url, number, max_tokens, prompt) for number in range(num_clients)]
    begun = time.monotonic()
    threads = [threading.Thread(target=client.ask_until, args=(begun + seconds,)) for client in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(client.tokens for client in clients) / (time.monotonic() - begun), clients


def started(arguments: list[str]) -> tuple[subprocess.Popen[str], str]:
    """The server's process and URL. Raises: UserError, if it does not start."""
    command = [sys.executable, "-m", "pretrain", "serve", "--port", "0", *arguments]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    if "http://" not in line:
        process.kill()
        raise UserError(f"textldm serve did not start; its first line is {line!r}")
    url = line.split(": ", 1)[1].split(" ")[0]
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        try:
            ask(f"{url}/health")
        except (urllib.error.URLError, ValueError):
            time.sleep(0.1)
        else:
            return process, url
    process.kill()
    raise UserError(f"textldm serve does not answer at {url}")


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="what textldm convert wrote")
    parser.add_argument("--clients", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=60, help="of the many clients; default: %(default)s")
    parser.add_argument("--max-tokens", type=int, default=64, help="of a text; default: %(default)s")
    parser.add_argument("--prompt", default="And it came about", help="default: %(default)s")
    parser.add_argument("serve", nargs="*", help="options of textldm serve, after --")
    return parser


@cli
def main(argv: list[str] | None = None) -> None:
    """Run it."""
    given = make_parser().parse_args(argv)
    process, url = started(["--model", str(existing(given.model, "--model")), *given.serve])
    try:
        ask(f"{url}/v1/completions", {"prompt": given.prompt, "max_tokens": given.max_tokens})
        alone, (one,) = together(url, 1, given.seconds / 3, given.max_tokens, given.prompt)
        many, clients = together(url, given.clients, given.seconds, given.max_tokens, given.prompt)
    finally:
        process.terminate()
        ended = process.wait(120)
    taken = sorted(seconds for client in clients for seconds in client.seconds)
    alone_p50_s = sorted(one.seconds)[len(one.seconds) // 2]
    print_figures({
        "throughput_ratio": many / alone, "p95_s": taken[int(0.95 * len(taken))] if taken else None,
        "errors": one.errors + sum(client.errors for client in clients) + (ended != 0), "clients": given.clients,
        "requests": len(taken), "tokens_per_s": many, "alone_tokens_per_s": alone, "alone_p50_s": alone_p50_s,
    })  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
