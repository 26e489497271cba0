"""What every request passes before anything else: host, origin, token, rate, size; and what every answer carries."""

import asyncio
import hashlib
import hmac
import json
import logging
import re
import time
import uuid
from collections import OrderedDict
from dataclasses import dataclass
from datetime import UTC, datetime
from http.cookies import SimpleCookie
from typing import Any
from urllib.parse import urlsplit

from fastapi import HTTPException
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ddad.errors import ConfigError
from ddad.server.measures import Measures

access_log = logging.getLogger("ddad.server.access")
COOKIE = "ddad_session"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
SHORTEST_TOKEN = 16
OPEN = ("/login", "/static/", "/v2/health/live")
"""What needs no token."""
CLIENTS = 10_000
"""Clients whose rate is remembered."""
HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; media-src 'self' blob:; "
        "connect-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "permissions-policy": "camera=(self), microphone=(), geolocation=()",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


@dataclass(frozen=True)
class GuardSettings:
    token: str | None = None
    """What clients must show; None: whoever reaches the server is let in, so only this machine may."""
    max_bytes: int = 64 << 20
    """Of a request's body."""
    rate: float = 100.0
    """Requests a second from one address, on average; twice as many at once."""
    body_seconds: float = 30.0
    """The longest pause while a body arrives."""

    def __post_init__(self) -> None:
        if self.token is not None and len(self.token) < SHORTEST_TOKEN:
            raise ConfigError(
                f"Expected a token of at least {SHORTEST_TOKEN} characters, found {len(self.token)}; "
                "make one with: openssl rand -hex 32"
            )

    @property
    def session(self) -> str:
        """What a browser keeps instead of the token itself."""
        return hmac.new((self.token or "").encode(), b"ddad session", hashlib.sha256).hexdigest()


class Refusal(Exception):
    def __init__(self, status: int, sentence: str, headers: dict[str, str] | None = None, reason: str = "") -> None:
        super().__init__(sentence)
        self.status, self.headers, self.reason = status, headers or {}, reason


class Guard:
    """ASGI middleware around the whole application."""

    def __init__(self, app: ASGIApp, settings: GuardSettings, measures: Measures) -> None:
        self._app, self._settings, self._measures = app, settings, measures
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, started = Headers(scope=scope), time.perf_counter()
        given = headers.get("x-request-id", "")
        request_id = given if re.fullmatch(r"[A-Za-z0-9._-]{1,64}", given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        status, body = 0, _Body(receive, headers, self._settings, self._measures)

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = MutableHeaders(scope=message)
                if not body.complete:  # so that the rest is not even received
                    own["connection"] = "close"
                for name, value in HEADERS.items():
                    own.setdefault(name, value)
                own["x-request-id"] = request_id
            await send(message)

        try:
            try:
                self._check(scope, headers)
            except Refusal as refusal:
                self._measures.refused.labels(refusal.reason).inc()
                await _refused(refusal, request_id, headers)(scope, receive, answer)
            else:
                await self._app(scope, body.receive, answer)
        except Exception:
            access_log.exception("request failed", extra={"request_id": request_id})
            if not status:
                await failure(request_id)(scope, receive, answer)
        finally:
            seconds = time.perf_counter() - started
            route = getattr(scope.get("route"), "path", "other")
            self._measures.requests.labels(scope["method"], route, status).inc()
            self._measures.request_seconds.labels(route).observe(seconds)
            access_log.info(
                "request",
                extra={
                    "request_id": request_id,
                    "client": _client(scope),
                    "method": scope["method"],
                    "path": scope["path"],
                    "status": status,
                    "seconds": round(seconds, 4),
                },
            )

    def _check(self, scope: Scope, headers: Headers) -> None:
        host = headers.get("host", "")
        if self._settings.token is None and _hostname(host) not in LOOPBACK:
            # A page elsewhere can point its own name at this machine and reach what listens here.
            raise Refusal(
                403, f"Expected a request to {LOOPBACK[0]}, found one to {host!r}; use that address.", None, "host"
            )
        origin = headers.get("origin")
        if scope["method"] not in ("GET", "HEAD", "OPTIONS") and origin and urlsplit(origin).netloc != host:
            raise Refusal(
                403, f"Expected a request from a page of this server, found one from {origin!r}.", None, "origin"
            )
        wait = self._wait(_client(scope))
        if wait:
            retry = {"retry-after": str(max(1, round(wait)))}
            raise Refusal(429, "Expected fewer requests at a time from one client; try again later.", retry, "rate")
        if not self._may_enter(scope, headers):
            sentence = "Expected the server's token, as 'Authorization: Bearer TOKEN', found none or another one."
            raise Refusal(401, sentence, {"www-authenticate": "Bearer"}, "token")
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self._settings.max_bytes:
            raise Refusal(413, self._too_large(), None, "bytes")

    def _too_large(self) -> str:
        return (
            f"Expected at most {self._settings.max_bytes:,} bytes a request, found more; send fewer or smaller files."
        )

    def _may_enter(self, scope: Scope, headers: Headers) -> bool:
        if self._settings.token is None or scope["path"].startswith(OPEN):
            return True
        kind, _, token = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and same(token.strip(), self._settings.token):
            return True
        cookie = SimpleCookie()
        cookie.load(headers.get("cookie", ""))
        return COOKIE in cookie and same(cookie[COOKIE].value, self._settings.session)

    def _wait(self, client: str) -> float:
        """Seconds until this client's next request is let in; a leaking bucket for each."""
        now, rate = time.monotonic(), self._settings.rate
        level, since = self._buckets.pop(client, (0.0, now))
        level = max(0.0, level - (now - since) * rate)
        wait = (level + 1 - 2 * rate) / rate
        self._buckets[client] = (level if wait > 0 else level + 1, now)
        if len(self._buckets) > CLIENTS:
            self._buckets.popitem(last=False)
        return max(0.0, wait)


class _Body:
    """A request's body as it arrives; it ends the request where it gets too long, or stalls."""

    def __init__(self, receive: Receive, headers: Headers, settings: GuardSettings, measures: Measures) -> None:
        self._receive, self._settings, self._measures, self._taken = receive, settings, measures, 0
        self.complete = headers.get("content-length", "0") == "0" and "transfer-encoding" not in headers

    async def receive(self) -> Message:
        if self.complete:
            return await self._receive()
        try:
            async with asyncio.timeout(self._settings.body_seconds):
                message = await self._receive()
        except TimeoutError:
            raise HTTPException(408, "Expected the whole request, found that it stopped; send it again.") from None
        self._taken += len(message.get("body", b""))
        self.complete = message["type"] != "http.request" or not message.get("more_body", False)
        if self._taken > self._settings.max_bytes:
            self._measures.refused.labels("bytes").inc()
            raise HTTPException(413, _too_large(self._settings.max_bytes))
        return message


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, message, and what a request adds."""

    FIELDS = ("request_id", "client", "method", "path", "status", "seconds")

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
        }
        line |= {name: value for name in self.FIELDS if (value := getattr(record, name, None)) is not None}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def same(one: str, other: str) -> bool:
    """Whether two secrets are the same, in a time that does not tell where they differ."""
    return hmac.compare_digest(one.encode("utf-8", "surrogateescape"), other.encode())


def error_response(status: int, sentence: str, request_id: str, headers: dict[str, str] | None = None) -> Response:
    """The one form of an error, for people and programs."""
    return JSONResponse({"error": sentence, "request_id": request_id}, status, headers)


def failure(request_id: str) -> Response:
    """The answer where the server is at fault: the log has the traceback, the client does not."""
    sentence = f"Something went wrong in the server; its log has more under request {request_id}."
    return error_response(500, sentence, request_id)


def _refused(refusal: Refusal, request_id: str, headers: Headers) -> Response:
    if refusal.status == 401 and "text/html" in headers.get("accept", ""):
        return RedirectResponse("/login", 303)
    return error_response(refusal.status, str(refusal), request_id, refusal.headers)


def _too_large(most: int) -> str:
    return f"Expected at most {most:,} bytes a request, found more; send fewer or smaller files."


def _client(scope: Scope) -> str:
    return scope["client"][0] if scope.get("client") else "unknown"


def _hostname(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
