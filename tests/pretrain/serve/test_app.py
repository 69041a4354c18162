"""The server as its clients see it: OpenAI's own client, bad requests, a full queue, clients that go, the end."""

import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
import schemathesis
import torch
from hypothesis import HealthCheck, Phase, given, settings
from transformers import GenerationConfig

from pretrain.serve.sampler import Draw, Settings
from tests.pretrain.serve.running import EOS, NAME, Running, running, tiny_model, words

NEW = 10
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running() as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as found:
        yield found


def expected(prompt: list[int], new: int = NEW, seed: int = 5, **options: Any) -> list[int]:
    """What `generate` makes of it, alone, up to the end of text."""
    return tiny_model().generate([prompt], new, seed=seed, **options)[0].tolist()


def in_words(ids: list[int]) -> str:
    return words().decode(ids)


def test_a_completion_is_what_generate_makes_of_it(client: openai.OpenAI) -> None:
    found = client.completions.create(model=NAME, prompt="w3 w4 w5", max_tokens=NEW, seed=5)
    tokens = expected([3, 4, 5])
    assert found.choices[0].text == in_words(tokens)
    assert found.choices[0].finish_reason == ("stop" if len(tokens) < NEW else "length")
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (3, len(tokens))
    other = client.completions.create(model=NAME, prompt="w3 w4 w5", max_tokens=NEW, seed=6)
    assert other.choices[0].text == in_words(expected([3, 4, 5], seed=6)) != found.choices[0].text


@pytest.mark.parametrize("prompt", ["w3 w4", ["w3 w4", "w9"], [3, 4], [[3, 4], [9]], ""], ids=str)
def test_every_form_of_a_prompt(client: openai.OpenAI, prompt: Any) -> None:
    found = client.completions.create(model=NAME, prompt=prompt, max_tokens=4, seed=5)
    alone = {"": [[]], "w3 w4": [[3, 4]], "[3, 4]": [[3, 4]]}.get(str(prompt), [[3, 4], [9]])
    assert [choice.text for choice in found.choices] == [in_words(expected(ids, 4)) for ids in alone]


def test_choices_differ_and_settings_and_echo_are_honoured(client: openai.OpenAI) -> None:
    sampled = {"num_steps": 4, "guidance_scale": 1.5, "solver": "heun", "grid": "uniform"}
    found = client.completions.create(
        model=NAME, prompt="w3 w4", max_tokens=NEW, seed=5, n=3, temperature=0.6, echo=True, extra_body=sampled
    )
    texts = [choice.text for choice in found.choices]
    assert len(set(texts)) == 3
    assert texts[0] == "w3 w4" + in_words(expected([3, 4], token_temperature=0.6, **sampled))
    # Choice i has the noise that generate gives to the prompt at place i.
    together = tiny_model().generate([[3, 4]] * 3, NEW, seed=5, token_temperature=0.6, **sampled)
    assert texts == ["w3 w4" + in_words(ids.tolist()) for ids in together]


def test_defaults_are_those_of_generation_config() -> None:
    """As a sweep leaves them in the folder: the config beside it says others."""
    model = tiny_model()
    left = {"num_steps": 3, "guidance_scale": 2.5, "guidance_interval": [0.3, 0.7], "temperature": 0.5}
    model.generation_config = GenerationConfig(**model.generation_config.to_dict() | left)
    alone = model.generate([[3, 4]], NEW, seed=5)[0].tolist()
    whole = model.generate([[3, 4]], NEW, seed=5, guidance_interval=(0.0, 1.0))[0].tolist()
    assert alone != whole != expected([3, 4])
    with running(model=model) as server:
        ask = {"prompt": [3, 4], "max_tokens": NEW, "seed": 5}
        assert server.http.post("/v1/completions", json=ask).json()["choices"][0]["text"] == in_words(alone)
        (about,) = server.http.get("/v1/models").json()["data"]
    assert about["defaults"].items() >= {"num_steps": 3, "guidance_scale": 2.5, "temperature": 0.5}.items()


def test_without_a_seed_one_is_drawn_and_said(client: openai.OpenAI) -> None:
    ask = {"model": NAME, "prompt": "w3", "max_tokens": NEW}
    found = [client.completions.create(**ask) for _ in range(2)]
    assert found[0].seed != found[1].seed
    assert client.completions.create(**ask, seed=found[0].seed).choices[0].text == found[0].choices[0].text


def test_text_ends_before_a_stop_word(client: openai.OpenAI) -> None:
    whole = client.completions.create(model=NAME, prompt="w3 w4 w5", max_tokens=NEW, seed=5).choices[0].text.split()
    word = next(word for word in whole[1:] if word not in whole[:1])
    found = client.completions.create(model=NAME, prompt="w3 w4 w5", max_tokens=NEW, seed=5, stop=["absent", word])
    assert found.choices[0].text.split() == whole[: whole.index(word)]
    assert found.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("usage", [False, True])
def test_a_stream_has_the_same_text(client: openai.OpenAI, usage: bool) -> None:
    ask: dict[str, Any] = {"model": NAME, "prompt": ["w3", "w4"], "max_tokens": NEW, "seed": 5}
    whole = client.completions.create(**ask)
    options = {"stream_options": {"include_usage": True}} if usage else {}
    texts, reasons, counted = ["", ""], ["", ""], None
    for chunk in client.completions.create(**ask, stream=True, **options):
        counted = chunk.usage or counted
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason
    assert texts == [choice.text for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert counted == (whole.usage if usage else None)


def test_chat_without_a_template_is_the_texts_in_their_order(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "system", "content": "w3"}, {"role": "user", "content": [{"type": "text", "text": "w4"}]}]
    found = client.chat.completions.create(model=NAME, messages=messages, max_completion_tokens=NEW, seed=5)
    assert found.choices[0].message.content == in_words(expected([3, 4]))
    assert found.choices[0].message.role == "assistant"
    stream = client.chat.completions.create(model=NAME, messages=messages, max_tokens=NEW, seed=5, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == found.choices[0].message.content


def test_chat_with_a_template() -> None:
    tokenizer = words()
    refusal = "{% if m.content == 'bad' %}{{ raise_exception('no') }}{% endif %}"
    tokenizer.chat_template = "{% for m in messages %}" + refusal + "w9 {{ m.content }} {% endfor %}w8"
    with running(tokenizer=tokenizer) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        ask = {"model": NAME, "max_tokens": NEW, "seed": 5}
        found = client.chat.completions.create(**ask, messages=[{"role": "user", "content": "w3"}])
        assert found.choices[0].message.content == in_words(expected([9, 3, 8]))
        with pytest.raises(openai.BadRequestError, match="template refuses"):
            client.chat.completions.create(**ask, messages=[{"role": "user", "content": "bad"}])


def test_models_are_listed(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.max_window, model.has_temperature) == (NAME, 32, True)
    assert model.max_text_tokens == 4 * 32
    assert client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other/model")
    with pytest.raises(openai.NotFoundError, match="no model 'gpt'"):
        client.completions.create(model="gpt", prompt="w3")


def test_the_same_text_whatever_else_is_in_the_call(server: Running, client: openai.OpenAI) -> None:
    asked = [([3 + i] * (i % 4), NEW - i % 3, i) for i in range(8)]

    def ask(prompt: list[int], new: int, seed: int) -> str:
        ids: Any = [prompt] if prompt else [[]]
        return client.completions.create(model=NAME, prompt=ids, max_tokens=new, seed=seed).choices[0].text

    server.gate.calls.clear()
    server.gate.open.clear()
    with ThreadPoolExecutor(8) as threads:
        found = [threads.submit(ask, *asked[0])]
        server.eventually(0, 1)
        found += [threads.submit(ask, *one) for one in asked[1:]]
        server.eventually(7, 1)
        server.gate.open.set()
        texts = [one.result() for one in found]
    assert max(server.gate.calls) > 2  # packed
    assert texts == [in_words(expected(prompt, new, seed)) for prompt, new, seed in asked]
    assert len(set(texts)) == 8


def test_beyond_the_window_it_is_what_generate_makes_of_it_and_short_texts_pass(
    server: Running, client: openai.OpenAI
) -> None:
    long = [3 + i % 40 for i in range(40)]
    asked = [([3, 4, 5], 60), (long, 20), (long, None)]

    def ask(prompt: list[int], new: int | None, seed: int = 5) -> Any:
        given = {} if new is None else {"max_tokens": new}
        return client.completions.create(model=NAME, prompt=[prompt], seed=seed, **given).choices[0]  # type: ignore[call-overload]

    texts = [expected(prompt, new or 16) for prompt, new in asked]
    assert len(texts[0]) > 32  # more than one block, as no end of text came early
    server.gate.calls.clear()
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda one: ask(*one), asked))
    assert [choice.text for choice in found] == [in_words(ids) for ids in texts]
    assert sum(server.gate.calls) == 4 + 2 + 1  # a block each
    # A short text that comes after a long one began is drawn between its blocks.
    server.gate.open.clear()
    order: list[str] = []
    with ThreadPoolExecutor(2) as threads:
        threads.submit(lambda: (ask([3, 4, 5], 60), order.append("long")))
        server.eventually(0, 1)
        threads.submit(lambda: (ask([9], 4), order.append("short")))
        server.eventually(1, 1)
        server.gate.open.set()
    assert order == ["short", "long"]


def test_a_text_is_whole_when_it_has_its_length_or_has_ended() -> None:
    draw = Draw((3,) * 20, 40, 5, 0, Settings(4, 1.0, (0.0, 1.0), "euler", "training", 1.0), window=32, end_id=EOS)
    assert (draw.place, draw.num_tokens, draw.context) == ((0, 16), 32, [3] * 16)
    grown, whole = draw.after([4] * 16)
    assert (grown.place, grown.context, whole) == ((1, 16), [4] * 16, False)
    assert grown.after([EOS] * 16)[1]
    last, whole = grown.after([5] * 16)
    assert (last.place, last.context, whole) == ((2, 8), [4] * 8 + [5] * 16, False)
    assert last.after([6] * 8)[1]
    assert Draw((3,), 31, 5, 0, draw.settings, window=32).place == (0, 31)


def connect(server: Running, body: dict[str, Any]) -> socket.socket:
    """A client that has asked for a completion and waits."""
    client = socket.create_connection(("127.0.0.1", httpx.URL(server.url).port))
    content = json.dumps(body).encode()
    headers = f"host: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(content)}"
    client.sendall(f"POST /v1/completions HTTP/1.1\r\n{headers}\r\n\r\n".encode() + content)
    return client


def test_a_full_queue_is_429_and_a_client_that_goes_frees_its_places(server: Running) -> None:
    ask = {"prompt": "w3", "max_tokens": NEW, "num_steps": 5}
    server.gate.open.clear()
    try:
        gone = [connect(server, ask)]
        server.eventually(0, 1)
        gone.append(connect(server, {**ask, "n": 8, "num_steps": 4}))
        server.eventually(8, 1)
        full = server.http.post("/v1/completions", json=ask)
        assert full.status_code == 429
        assert int(full.headers["retry-after"]) >= 1
        assert full.json()["error"]["code"] == "queue_full"
        with pytest.raises(openai.RateLimitError):
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0).completions.create(
                model=NAME, prompt="w3"
            )
        for client in gone:
            client.close()
        server.eventually(0, 0)
    finally:
        server.gate.open.set()
    assert server.http.post("/v1/completions", json=ask).status_code == 200
    counted = server.http.get("/metrics").text
    assert "textldm_gone_total 2.0" in counted
    assert "textldm_refused_total 2.0" in counted
    assert "textldm_waiting 0.0" in counted


@pytest.mark.parametrize("route", ["completions", "steps"])
def test_a_stream_whose_client_goes_is_ended(server: Running, route: str) -> None:
    server.gate.open.clear()
    ask = {"prompt": "w3", "max_tokens": NEW, "stream": True}
    try:
        with server.http.stream("POST", f"/v1/{route}", json=ask) as answer:
            assert answer.status_code == 200
            server.eventually(0, 1)
        server.eventually(0, 0)
    finally:
        server.gate.open.set()


def test_the_steps_are_those_of_the_text(server: Running) -> None:
    ask = {"prompt": "w3 w4", "max_tokens": NEW, "seed": 5, "num_steps": 6}
    with server.http.stream("POST", "/v1/steps", json=ask) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    *steps, last = map(json.loads, lines)
    seen: list[Any] = []
    tiny_model().generate(
        [[3, 4]],
        NEW,
        num_steps=6,
        seed=5,
        on_step=lambda step, t, ids: seen.append((step, t, in_words(ids[0].tolist()))),
    )
    for (step, t, text), found in zip(seen, steps, strict=True):
        assert (found["step"], found["t"], found["num_steps"]) == (step, t, 6)
        assert found["text"].split() == [word for word in text.split() if word != f"w{EOS}"]
    assert last["text"] == in_words(expected([3, 4], num_steps=6))
    assert (last["t"], last["seed"], last["usage"]["prompt_tokens"]) == (0.0, 5, 2)


GOOD = {"prompt": "w3", "max_tokens": 2}
BAD: list[tuple[str, Any]] = [
    *(("/v1/completions", value) for value in (None, [], "text", 3, {}, {"prompt": None}, {"prompt": 3}, {"prompt": {}})),
    *(("/v1/completions", {"prompt": value}) for value in ([], [None], [1.5], [True], ["a", 3], [[3], "a"], [[[3]]], [60], [-1], [10**30])),
    *(("/v1/completions", {"prompt": value}) for value in ("\ud800", "w3 " * 128, ["w3"] * 9, [[3]] * 9, "w3 " * 6000)),
    *(("/v1/completions", GOOD | {"max_tokens": value}) for value in (0, -1, 1.5, "2", True, 128, 10**30)),
    *(("/v1/completions", GOOD | {"n": value}) for value in (0, -1, 9, 1.0, "1", 10**30)),
    *(("/v1/completions", GOOD | {"seed": value}) for value in (-1, 2**64, 1.5, "1", False)),
    *(("/v1/completions", GOOD | {"temperature": value}) for value in (0, -1, 2.1, "1", 10**400, [])),
    *(("/v1/completions", GOOD | {"stop": value}) for value in ("", [""], list("abcde"), 3, [3], "x" * 257)),
    *(("/v1/completions", GOOD | {"stream": value}) for value in ("true", 1)),
    *(("/v1/completions", GOOD | {"num_steps": value}) for value in (0, 21, "5", 10**30)),
    *(("/v1/completions", GOOD | {"guidance_scale": value}) for value in (-1, 101, "5", True)),
    *(("/v1/completions", GOOD | {"solver": value}) for value in ("rk4", "", 3, "\udfff")),
    *(("/v1/completions", GOOD | {"grid": value}) for value in ("even", "cosine", 3)),
    *(("/v1/completions", GOOD | {name: value}) for name, value in {
        "model": "\ud800", "max_token": 3, "\ud800": 1, "logprobs": 3, "top_p": 0.9, "logit_bias": {"3": 5}, "suffix": "x", "best_of": 2,
        "presence_penalty": 0.5, "stream_options": {"include_usage": True}, "echo": "yes", "tools": [{}], "top_k": 5,
    }.items()),
    *(("/v1/chat/completions", value) for value in (
        {}, {"messages": []}, {"messages": [{}]}, {"messages": "w3"}, {"messages": [{"role": "tool", "content": "w3"}]},
        {"messages": [{"role": "user"}]}, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        {"messages": [{"role": "user", "content": "w3"}], "max_tokens": 2, "max_completion_tokens": 3},
        {"messages": [{"role": "user", "content": "w3"}], "response_format": {"type": "json_object"}},
        {"messages": [{"role": "user", "content": "w3"}], "prompt": "w3"},
    )),
    *(("/v1/steps", value) for value in ({}, {"prompt": ["w3"]}, GOOD | {"n": 2}, GOOD | {"num_steps": 99})),
]  # fmt: skip


def test_bad_requests_are_told_in_openais_format_and_none_is_the_servers_fault(server: Running) -> None:
    assert len(BAD) > 80
    for route, body in BAD:
        answer = server.http.post(route, content=json.dumps(body), headers=JSON)
        assert 400 <= answer.status_code < 500, (body, answer.text)
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        assert len(answer.json()["error"]["message"]) > 10


@pytest.mark.slow
@pytest.mark.parametrize("route", ["/v1/completions", "/v1/chat/completions", "/v1/steps"])
def test_what_schemathesis_makes_of_the_schema_is_refused(server: Running, route: str) -> None:
    torch.set_flush_denormal(False)  # the server's setting, without which the package draws no numbers
    schema = schemathesis.openapi.from_dict(server.app.openapi())
    statuses: list[int] = []

    @given(case=schema[route]["POST"].as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE))
    @settings(
        max_examples=50, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
    )
    def ask(case: Any) -> None:
        statuses.append(case.call(base_url=server.url, timeout=60).status_code)
        assert 400 <= statuses[-1] < 500, case.as_curl_command()

    ask()
    assert len(statuses) >= 50


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b"", JSON, 400),
        (b"{", JSON, 400),
        (b'{"prompt": "w3", "guidance_scale": NaN}', JSON, 400),
        (b'{"prompt": "w3", "guidance_scale": 1e999}', JSON, 400),
        (b'{"prompt": "w3", "max_tokens": ' + b"1" * 9000 + b"}", JSON, 400),
        (b'{"prompt": ' + b"[" * 9000 + b"]" * 9000 + b"}", JSON, 400),
        (b'{"prompt": "\xff"}', JSON, 400),
        (b'{"prompt": "w3"}', {"content-type": "text/plain"}, 400),  # what another site's page may send without asking
        (b"x" * 20_001, JSON, 413),
        (b"prompt=w3", {"content-type": "application/x-www-form-urlencoded"}, 400),
    ],
    ids=range(10),
)
def test_bodies_that_are_no_request(server: Running, body: bytes, headers: dict[str, str], status: int) -> None:
    for content in (body, iter([body])):  # with and without a promised length
        answer = server.http.post("/v1/completions", content=content, headers=headers, timeout=60)
        assert answer.status_code == status
        assert answer.json()["error"]["type"] == "invalid_request_error"


def test_other_routes_methods_and_names(server: Running) -> None:
    assert server.http.get("/v1/completions").status_code == 405
    for path in ("/docs", "/v1/embeddings", "/page/%2e%2e/app.py", "/%00", "/page/index.html"):
        answer = server.http.get(path)
        assert answer.status_code == 404
        assert answer.json()["error"]["type"] == "invalid_request_error"
    for host in ("evil.example", "evil.example:80", "localhost.evil.example", "", "[::2]"):
        assert server.http.get("/v1/models", headers={"host": host}).status_code == 421
    for host in ("localhost:1", "127.0.0.1", "[::1]:8000"):
        assert server.http.get("/v1/models", headers={"host": host}).status_code == 200


def test_neutral_fields_are_accepted(client: openai.OpenAI) -> None:
    client.completions.create(
        model=NAME, prompt="w3", max_tokens=2, user="me", top_p=1, frequency_penalty=0, presence_penalty=0.0, logit_bias={}, best_of=1,
        suffix=None, extra_body={"metadata": {"a": "b"}, "logprobs": None},
    )  # fmt: skip


def test_a_model_without_probabilities_has_no_temperature() -> None:
    with running(model=tiny_model(head="velocity", vocab_size=0)) as server:
        answers = [server.http.post("/v1/completions", json=GOOD | {"temperature": t}, timeout=60) for t in (0.5, 1)]
    assert [answer.status_code for answer in answers] == [400, 200]
    assert answers[0].json()["error"]["param"] == "temperature"


def test_health_metrics_and_headers(server: Running) -> None:
    assert server.http.get("/health").json()["status"] == "ok"
    page = server.http.get("/")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "unsafe" not in page.headers["content-security-policy"]
    assert page.headers["x-content-type-options"] == "nosniff"
    assert 'textldm_requests_total{route="/",status="200"}' in server.http.get("/metrics").text


def test_with_a_key_only_the_page_and_health_are_open() -> None:
    key = "a" * 32
    with running(key=key) as server:
        for path in ("/", "/page.js", "/page.css", "/health"):
            assert server.http.get(path).status_code == 200
        for path in ("/v1/models", "/metrics", "/openapi.json", "/nothing"):
            for value in (None, "Bearer", "Bearer x", key, f"Basic {key}", f"Bearer {key}x", b"Bearer \xff"):
                answer = server.http.get(path, headers={} if value is None else {"authorization": value})
                assert answer.status_code == 401
                assert answer.json()["error"]["code"] == "invalid_api_key"
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)
        assert client.completions.create(model=NAME, prompt="w3", max_tokens=2).choices
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="other", max_retries=0).models.list()


def test_what_is_under_way_is_answered_before_the_end() -> None:
    with running() as server:
        server.gate.open.clear()
        with ThreadPoolExecutor(1) as threads:
            found = threads.submit(server.http.post, "/v1/completions", json=GOOD)
            server.eventually(0, 1)
            server.server.should_exit = True  # what uvicorn does at SIGTERM
            for _ in range(1000):  # until nobody is let in any more
                try:
                    socket.create_connection(("127.0.0.1", httpx.URL(server.url).port)).close()
                except ConnectionRefusedError:
                    break
                time.sleep(0.01)
            else:
                raise AssertionError("it still takes requests")
            server.gate.open.set()
            assert found.result().status_code == 200


def test_a_failure_of_the_model_is_told_and_the_server_lives_on() -> None:
    with running() as server:
        sampler = server.app.state.batcher._sampler
        inner = sampler.draw

        def fail(*_: Any) -> Any:
            raise RuntimeError("out of memory at 0x1234")

        sampler.draw = fail
        answer = server.http.post("/v1/completions", json=GOOD)
        assert answer.status_code == 500
        assert "0x1234" not in answer.text
        stream = server.http.post("/v1/completions", json=GOOD | {"stream": True}, timeout=60)
        assert '"server_error"' in stream.text
        sampler.draw = inner
        assert server.http.post("/v1/completions", json=GOOD).status_code == 200
