"""What a request passes before it is read: host, key, limits, size and depth of its body."""

import asyncio
import re

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from runner.serve.access import Access, check_host
from runner.serve.errors import ApiError, invalid

MAX_DEPTH = 64  # of nested lists and objects
_OPEN = {"/", "/health", "/ready", "/metrics"}  # without a key; /metrics looks at the address
# One that nobody closes goes on to the end: to look for its end from each quote in it would take
# time as the square of the body.
_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z)', re.DOTALL)
_BRACKET = re.compile(rb"[\[\]{}]")


class Gate:
    """ASGI middleware; what it refuses costs neither parsing nor the model.

    Args:
        only_loopback: refuse requests that name another host.
        max_body: bytes.
        body_timeout_s: the longest that a client may take to send it.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        access: Access,
        only_loopback: bool,
        max_body: int = 1 << 20,
        body_timeout_s: float = 30.0,
    ) -> None:
        self.app, self.access, self.only_loopback = app, access, only_loopback
        self.max_body, self.body_timeout_s = max_body, body_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, with its key's digest and its body, or answer it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            headers = dict(scope["headers"])
            if b"transfer-encoding" in headers and b"content-length" in headers:
                raise _two_lengths()
            if self.only_loopback:
                check_host(scope["headers"])
            if scope["path"] not in _OPEN:
                given = headers.get(b"authorization", b"").decode("latin-1")
                key = self.access.authenticate(given)
                scope.setdefault("state", {})["key"] = key
                if scope["method"] == "POST":
                    self.access.take("requests", key, 1)
            body = await self._body(headers, receive)
        except ApiError as error:
            response = JSONResponse(error.body(), error.status, error.headers)
            await response(scope, receive, send)
            return
        await self.app(scope, _replayed(body, receive), send)

    async def _body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length[:20]) > self.max_body:
            raise self._too_large()
        body = bytearray()
        try:
            async with asyncio.timeout(self.body_timeout_s):
                while True:
                    message = await receive()
                    body += message.get("body", b"")
                    if len(body) > self.max_body:
                        raise self._too_large()
                    if not message.get("more_body", False):
                        break
        except TimeoutError:
            late = f"the body took longer than {self.body_timeout_s:g} s; send it faster"
            raise ApiError(408, late, code="slow_body", headers={"Connection": "close"}) from None
        if _is_deep(bytes(body)):
            raise invalid(
                f"the JSON is nested deeper than {MAX_DEPTH}; flatten it", code="too_deep"
            )
        return bytes(body)

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            f"the body has more than {self.max_body} bytes; send less",
            code="body_too_large",
            headers={"Connection": "close"},
        )


def _two_lengths() -> ApiError:
    """Return the error of a body that a proxy in front might end elsewhere than we do."""
    return ApiError(
        400,
        "Transfer-Encoding and Content-Length give the body two lengths; send one of them",
        code="two_lengths",
        headers={"Connection": "close"},
    )


def _is_deep(body: bytes) -> bool:
    """Return whether JSON nests deeper than MAX_DEPTH, as a parser that recurses cannot."""
    depth = 0
    for bracket in _BRACKET.findall(_STRING.sub(b"", body)):
        depth += 1 if bracket in b"[{" else -1
        if depth > MAX_DEPTH:
            return True
    return False


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Return what gives a body that was read, then what comes after it: that the client left."""
    given: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return given.pop() if given else await receive()

    return again
