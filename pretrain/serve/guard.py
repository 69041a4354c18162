"""What stands before every request: whom it may come from, which key it knows, how long it is; and what stands over every answer."""

import asyncio
import hashlib
import hmac
import re
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pretrain.serve.metrics import Metrics
from pretrain.serve.replies import ApiError, error_response

BODY_S = 30.0
"""In which a request must have arrived."""
OPEN = ("/", "/health", "/page.css", "/page.js")
"""Need no key: they hold nothing of the model."""
ROUTES = (*OPEN, "/metrics", "/openapi.json", "/v1/models", "/v1/completions", "/v1/chat/completions", "/v1/steps")
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:;"
    " base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}
_LOCAL = re.compile(r"(localhost|127(\.\d{1,3}){3}|\[::1\])(:\d{1,5})?", re.IGNORECASE)


class Guard:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, metrics: Metrics, key: str | None, local: bool, max_body_bytes: int):
        """`local`: the server listens on loopback, where a name that resolves to it is a trick (DNS rebinding)."""
        self._app, self._metrics, self._local, self._max_body_bytes = app, metrics, local, max_body_bytes
        self._key = None if key is None else _digest(key.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI asks for it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun, status, counted = time.monotonic(), 500, False

        def count() -> None:
            nonlocal counted
            if counted:
                return
            counted = True
            route = scope["path"] if scope["path"] in ROUTES else "other"
            self._metrics.requests.labels(route, str(status)).inc()
            self._metrics.seconds.labels(route).observe(time.monotonic() - begun)

        async def dressed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                present = {name for name, _ in message["headers"]}
                more = [
                    (name.encode(), value.encode()) for name, value in HEADERS.items() if name.encode() not in present
                ]
                message = {**message, "headers": [*message["headers"], *more]}
            elif not message.get("more_body"):
                count()
            await send(message)

        try:
            try:
                self._check(scope)
                body = await self._body(scope, receive)
            except ApiError as error:
                await error_response(error)(scope, receive, dressed)
                return
            await self._app(scope, _replay(body, receive), dressed)
        finally:
            count()  # what broke off

    def _check(self, scope: Scope) -> None:
        """Raises: ApiError."""
        headers = dict(reversed(scope["headers"]))  # the first of a name counts
        host = headers.get(b"host", b"").decode("latin-1")
        if self._local and not _LOCAL.fullmatch(host):
            raise ApiError(421, "this server is asked for by a name that is not this machine's; use http://127.0.0.1")
        if self._key is None or scope["path"] in OPEN:
            return
        kind, _, given = headers.get(b"authorization", b"").partition(b" ")
        known = hmac.compare_digest(_digest(given.strip()), self._key)
        if kind.lower() != b"bearer" or not known:
            raise ApiError(
                401,
                "give this server's key as 'Authorization: Bearer KEY'",
                code="invalid_api_key",
                www_authenticate="Bearer",
            )

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        """All of it. Raises: ApiError, if it is too long, too slow, or breaks off."""
        if scope["method"] in ("GET", "HEAD", "OPTIONS"):
            return b""
        length = dict(scope["headers"]).get(b"content-length", b"")
        if length.isdigit() and int(length[:20]) > self._max_body_bytes:
            raise self._too_long()
        pieces, size = [], 0
        try:
            async with asyncio.timeout(BODY_S):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError(400, "the request broke off")
                    pieces.append(message.get("body", b""))
                    size += len(pieces[-1])
                    if size > self._max_body_bytes:
                        raise self._too_long()
                    if not message.get("more_body"):
                        return b"".join(pieces)
        except TimeoutError:
            raise ApiError(408, f"the request did not arrive within {BODY_S:g} s", connection="close") from None

    def _too_long(self) -> ApiError:
        return ApiError(
            413, f"the request has more than the {self._max_body_bytes:,} bytes that are allowed", connection="close"
        )


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body in one piece; after it, whatever the client does."""
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return waiting.pop() if waiting else await receive()

    return again


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()  # of one length, whatever is given
