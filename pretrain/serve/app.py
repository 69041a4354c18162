"""The routes: OpenAI's, those of the page, health and metrics."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from starlette.exceptions import HTTPException

from modeling.textldm import TextLDM
from pretrain.serve.batcher import Batcher
from pretrain.serve.completions import Asked, Completions, Limits
from pretrain.serve.guard import Guard
from pretrain.serve.metrics import Metrics
from pretrain.serve.replies import ApiError, EventStream, error_body, error_response, unless_gone
from pretrain.serve.sampler import Sampler
from pretrain.serve.schema import ChatRequest, CompletionRequest, Sampling, StepsRequest

PAGE = Path(__file__).parent / "page"
CLIENT_GONE = 499
"""nginx's status of a request whose client did not wait; nobody reads it but the metrics."""


def make_app(
    model: TextLDM,
    tokenizer: Any,
    name: str,
    *,
    key: str | None = None,
    local: bool = True,
    max_batch_tokens: int = 16384,
    queue: int = 256,
    limits: Limits = Limits(max_choices=64, max_steps=250),  # noqa: B008 (frozen)
    max_body_bytes: int = 1 << 20,
) -> FastAPI:
    """The server of one model. Its `state` has the batcher and the metrics."""
    metrics = Metrics()
    batcher = Batcher(Sampler(model), metrics, max_batch_tokens, queue)
    served = Completions(model, tokenizer, name, batcher, metrics, limits)

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        batcher.start()
        yield
        await batcher.close()

    app = FastAPI(
        title="TextLDM", lifespan=life, docs_url=None, redoc_url=None
    )  # their pages load scripts from elsewhere
    app.state.batcher, app.state.metrics = batcher, metrics
    app.add_middleware(Guard, metrics=metrics, key=key, local=local, max_body_bytes=max_body_bytes)
    _tell_errors(app)

    async def reply(request: Request, body: Sampling, asked: Asked, chat: bool) -> Response:
        ticket = served.submit(asked)
        if body.stream:
            usage = body.stream_options is not None and body.stream_options.include_usage
            return EventStream(served.stream(asked, ticket, chat, usage), ticket.leave, metrics.gone.inc)
        try:
            choices = await unless_gone(served.choices(asked, ticket), request.receive, metrics.gone.inc)
        finally:
            ticket.leave()
        if choices is None:
            return Response(status_code=CLIENT_GONE)
        return JSONResponse(served.answer(asked, choices, chat))

    @app.post("/v1/completions", response_model=None)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        return await reply(request, body, await served.completion(body), chat=False)

    @app.post("/v1/chat/completions", response_model=None)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        return await reply(request, body, await served.chat(body), chat=True)

    @app.post("/v1/steps", response_model=None)
    async def steps(body: StepsRequest) -> Response:
        asked = await served.steps(body)
        arrived: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        num_steps = asked.draws[0].settings.num_steps

        def watch(step: int, t: float, text: str) -> None:
            arrived.put_nowait({"step": step, "num_steps": num_steps, "t": t, "text": text})

        ticket = served.submit(asked, watch)
        return EventStream(served.watched(asked, ticket, arrived), ticket.leave, metrics.gone.inc)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [served.about()]}

    @app.get("/v1/models/{model_id:path}")
    async def model_(model_id: str) -> dict[str, Any]:
        if model_id != name:
            raise ApiError(
                404, f"there is no model {model_id!r} here; this server has {name!r}", "model", "model_not_found"
            )
        return served.about()

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "waiting": batcher.num_waiting, "running": batcher.num_running}

    @app.get("/metrics", response_model=None)
    async def metrics_() -> Response:
        return Response(metrics.page(), media_type="text/plain; version=0.0.4")

    for path, file in {"/": "index.html", "/page.css": "page.css", "/page.js": "page.js"}.items():
        app.add_api_route(path, _file(PAGE / file), include_in_schema=False, response_model=None)
    return app


def _file(path: Path) -> Any:
    async def give() -> FileResponse:
        return FileResponse(path, headers={"cache-control": "no-cache"})

    return give


def _tell_errors(app: FastAPI) -> None:
    """Everything that goes wrong, in OpenAI's format."""

    @app.exception_handler(ApiError)
    async def of_ours(_: Request, error: ApiError) -> Response:
        return error_response(error)

    @app.exception_handler(RequestValidationError)
    async def of_the_schema(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        return error_response(ApiError(400, f"{where}: {first['msg']}" if where else str(first["msg"]), where or None))

    @app.exception_handler(HTTPException)
    async def of_http(_: Request, error: HTTPException) -> Response:
        body = error_body(error.status_code, str(error.detail))
        return JSONResponse(body, error.status_code, dict(error.headers or {}))

    @app.exception_handler(Exception)
    async def of_the_server(_: Request, __: Exception) -> Response:
        return JSONResponse(error_body(500, "the server failed; its log says why"), 500)
