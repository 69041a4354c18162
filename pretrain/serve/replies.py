"""Errors as OpenAI's API tells them, and streams of server-sent events that end with their client."""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any

from fastapi.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from data_pipeline.core.telling import tellable

KINDS = {401: "authentication_error", 429: "rate_limit_error"}
_LONGEST = 800


class ApiError(Exception):
    """What is wrong with a request.

    Attributes:
        status: of HTTP.
        param: the field that is wrong, if it is one.
        code: a word that programs can compare.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None, **headers: str):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """In OpenAI's format."""
    kind = KINDS.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": _plain(message), "type": kind, "param": param and _plain(param), "code": code}}


def error_response(error: ApiError) -> JSONResponse:
    """Its answer."""
    headers = {name.replace("_", "-"): value for name, value in error.headers.items()}
    return JSONResponse(error_body(error.status, error.message, error.param, error.code), error.status, headers)


def event(value: dict[str, Any] | str) -> bytes:
    """One server-sent event."""
    return f"data: {value if isinstance(value, str) else json.dumps(value)}\n\n".encode()


async def disconnected(receive: Receive) -> None:
    """Returns when the client is gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events; `leave` is called in the end, however it comes."""

    def __init__(self, events: AsyncGenerator[bytes, None], leave: Callable[[], None], gone: Callable[[], None]):
        super().__init__(
            media_type="text/event-stream", headers={"cache-control": "no-store", "x-accel-buffering": "no"}
        )
        del self.headers["content-length"]
        self._events, self._leave, self._gone = events, leave, gone

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI asks for it."""

        async def pump() -> None:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for piece in self._events:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        try:
            await unless_gone(pump(), receive, self._gone)
        finally:
            await self._events.aclose()
            self._leave()


async def unless_gone(work: Coroutine[Any, Any, Any], receive: Receive, gone: Callable[[], None]) -> Any:
    """What `work` returns; if its client goes first, the work is cancelled, `gone` called and None returned."""
    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(disconnected(receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        gone()
        return None
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


def _plain(text: str) -> str:
    """Whatever characters a request held: what every JSON reader takes."""
    return tellable(text[:_LONGEST]).encode("utf-8", "backslashreplace").decode()
