"""A server of a tiny random model on a free port, in a thread; and words for its tokens."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import torch
import uvicorn
from fastapi import FastAPI
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from modeling.textldm import TextLDM
from pretrain.serve.app import make_app
from pretrain.serve.completions import Limits
from tests.modeling.test_textldm import make_model

NAME = "tiny"
EOS = 7


def tiny_model(**options: Any) -> TextLDM:
    """With the categorical head, times spread over tokens, and an end of text."""
    model = make_model(**({"head": "categorical", "vocab_size": 60} | options))
    model.config.times["spread"] = 1.0
    model.config.eos_token_id = EOS
    for buffer in model.dit.buffers():
        buffer.copy_(torch.rand_like(buffer) + 0.5)
    return model


def words() -> PreTrainedTokenizerFast:
    """w0 to w59, split at spaces."""
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(60)}, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=f"w{EOS}", unk_token="w1")


@dataclass
class Gate:
    """Between a sampler and its model: while closed, calls wait at their next step. `calls` has the texts of each call."""

    open: threading.Event = field(default_factory=threading.Event)
    calls: list[int] = field(default_factory=list)

    def on(self, sampler: Any) -> None:
        inner = sampler.draw

        def draw(draws: Any, watched: Any, abandoned: Any) -> Any:
            self.calls.append(len(draws))

            def asked() -> bool:
                while not self.open.wait(0.01):
                    if abandoned():
                        return True
                return abandoned()

            return inner(draws, watched, asked)

        sampler.draw = draw
        self.open.set()


@dataclass
class Running:
    """A server that listens, and a client of it."""

    url: str
    http: httpx.Client
    app: FastAPI
    server: uvicorn.Server
    gate: Gate

    def eventually(self, waiting: int, running: int) -> None:
        """Wait until so many texts wait and are drawn."""
        batcher = self.app.state.batcher
        for _ in range(1000):
            if (batcher.num_waiting, batcher.num_running) == (waiting, running):
                return
            time.sleep(0.01)
        raise AssertionError(f"{batcher.num_waiting} wait, {batcher.num_running} are drawn")


@contextlib.contextmanager
def running(**options: Any) -> Iterator[Running]:
    """The server; closed in the end as by SIGTERM."""
    listening = socket.create_server(("127.0.0.1", 0))
    tokenizer = options.pop("tokenizer", None) or words()
    settings = {
        "queue": 8,
        "limits": Limits(max_choices=8, max_steps=20),
        "max_batch_tokens": 64,
        "max_body_bytes": 20_000,
    }
    app = make_app(options.pop("model", None) or tiny_model(), tokenizer, NAME, **settings | options)
    gate = Gate()
    gate.on(app.state.batcher._sampler)
    server = uvicorn.Server(
        uvicorn.Config(app, log_level="error", access_log=False, ws="none", timeout_graceful_shutdown=20)
    )
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        with httpx.Client(
            base_url=url, timeout=60, verify=False, trust_env=False
        ) as http:  # certificates take their time
            yield Running(url, http, app, server, gate)
    finally:
        gate.open.set()
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()
