"""Serve an exported model: OpenAI's completions API, dynamic batching, and a page at /.

textldm serve --model export/textldm-xl
curl http://127.0.0.1:8000/v1/completions -H 'content-type: application/json' -d '{"prompt": "Once upon a time", "max_tokens": 64}'
"""

import contextlib
import copy
import signal
import socket
import sys
from typing import Any

import transformers
import uvicorn
from uvicorn.config import LOGGING_CONFIG

from data_pipeline.core.devices import device_of
from data_pipeline.core.errors import UserError, cli
from pretrain.export.generate import load_exported
from pretrain.ranks.addresses import is_loopback
from pretrain.serve.app import make_app
from pretrain.serve.command_line import API_KEY, api_key, make_parser, read
from pretrain.serve.completions import Limits

__all__ = ["main", "make_parser"]


@cli
def main(argv: list[str] | None = None) -> int:
    """Serve until SIGTERM or Ctrl-C; what is under way is answered first."""
    given = read(argv)
    key, local = api_key(given.api_key_file), is_loopback(given.host)
    device = device_of(given.device)
    listening = listen(given.host, given.port)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model, tokenizer = load_exported(given.model, device)
    if given.max_batch_tokens < model.config.max_window:
        raise UserError(
            f"--max-batch-tokens is {given.max_batch_tokens}; expected at least a whole window, {model.config.max_window} tokens"
        )
    name = given.name or str(given.model).rstrip("/").rpartition("/")[2]
    app = make_app(
        model, tokenizer, name, key=key, local=local, max_batch_tokens=given.max_batch_tokens, queue=given.queue,
        limits=Limits(given.max_choices, given.max_steps, given.max_text_tokens), max_body_bytes=given.max_body_bytes,
    )  # fmt: skip
    server = uvicorn.Server(server_settings(app, given.drain_s))
    port = listening.getsockname()[1]
    host = f"[{given.host}]" if ":" in given.host else given.host
    print(f"{name} on {device}: http://{host}:{port} (page), http://{host}:{port}/v1 (OpenAI's API)", flush=True)
    print(exposure(given.host, local, key is not None), flush=True)
    # uvicorn drains at these, and then sends itself the signal again: by then all is done, and the end is a good one.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=[listening])
    print("drained", file=sys.stderr)
    return 0


def server_settings(app: Any, drain_s: int) -> uvicorn.Config:
    """No access log, which would be a line a request; metrics count them."""
    logging = copy.deepcopy(LOGGING_CONFIG)
    return uvicorn.Config(
        app, log_config=logging, log_level="warning", access_log=False, ws="none", server_header=False, proxy_headers=False,
        timeout_graceful_shutdown=drain_s,
    )  # fmt: skip


def listen(host: str, port: int) -> socket.socket:
    """A socket at that address. Raises: UserError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(1024)
    except OSError as error:
        raise UserError(f"--host {host} --port {port}: cannot listen there ({error.strerror or error})") from None
    return listening


def exposure(host: str, local: bool, has_key: bool) -> str:
    """Who can use the server, in a line."""
    if local:
        users = "whoever knows the key" if has_key else "every user and program"
        return f"for {users} of this machine alone; --host 0.0.0.0 would open it to everybody who reaches this machine, unencrypted"
    if has_key:
        return f"for everybody who reaches {host} and knows the key; keys and texts travel unencrypted: put a proxy with TLS before it"
    return f"WARNING: everybody who reaches {host} can use the model, unencrypted; give --api-key-file or {API_KEY}, or stay at 127.0.0.1"


if __name__ == "__main__":
    sys.exit(main())
