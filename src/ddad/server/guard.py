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
METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH")
"""What metrics tell apart."""
LOGIN_BYTES = 10_000
"""Of a body that comes without a token."""
CROWDED = "Expected fewer bytes at a time, found too many requests under way; try again later."
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
    max_inside: int = 512 << 20
    """Bytes of the bodies of all requests that have no answer yet."""
    rate: float = 100.0
    """Requests a second from one address, on average; twice as many at once."""
    body_seconds: float = 60.0
    """Until a body has arrived."""

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
    def __init__(self, status: int, sentence: str, reason: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(sentence)
        self.status, self.headers, self.reason = status, headers or {}, reason


class Guard:
    """ASGI middleware around the whole application."""

    def __init__(self, app: ASGIApp, settings: GuardSettings, measures: Measures) -> None:
        self._app, self.settings, self.measures = app, settings, measures
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()
        self.bytes_inside = 0
        """Of the bodies of all requests that have no answer yet."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, started = Headers(scope=scope), time.perf_counter()
        given = headers.get("x-request-id", "")
        request_id = given if re.fullmatch(r"[A-Za-z0-9._-]{1,64}", given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        method = scope["method"] if scope["method"] in METHODS else "other"
        most = LOGIN_BYTES if scope["path"] == "/login" else self.settings.max_bytes
        status, body = 0, _Body(receive, headers, most, self)

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
                self._check(scope, headers, most)
            except Refusal as refusal:
                self.measures.refused.labels(refusal.reason).inc()
                await _refused(refusal, request_id, headers)(scope, receive, answer)
            else:
                await self._app(scope, body.receive, answer)
        except Exception:
            access_log.exception("request failed", extra={"request_id": request_id})
            if not status:
                await failure(request_id)(scope, receive, answer)
        finally:
            self.bytes_inside -= body.taken
            seconds = time.perf_counter() - started
            route = getattr(scope.get("route"), "path", "other")
            self.measures.requests.labels(method, route, status).inc()
            self.measures.request_seconds.labels(route).observe(seconds)
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

    def _check(self, scope: Scope, headers: Headers, most: int) -> None:
        host = headers.get("host", "")
        if self.settings.token is None and _hostname(host) not in LOOPBACK:
            # A page elsewhere can point its own name at this machine and reach what listens here.
            raise Refusal(403, f"Expected a request to {LOOPBACK[0]}, found one to {host!r}; use that address.", "host")
        origin = headers.get("origin")
        if scope["method"] not in ("GET", "HEAD", "OPTIONS") and origin and _netloc(origin) != host:
            raise Refusal(403, f"Expected a request from a page of this server, found one from {origin!r}.", "origin")
        wait = self._wait(_client(scope))
        if wait:
            retry = {"retry-after": str(max(1, round(wait)))}
            raise Refusal(429, "Expected fewer requests at a time from one client; try again later.", "rate", retry)
        if not self._may_enter(scope, headers):
            sentence = "Expected the server's token, as 'Authorization: Bearer TOKEN', found none or another one."
            raise Refusal(401, sentence, "token", {"www-authenticate": "Bearer"})
        kind = headers.get("content-type", "").lower()
        if kind.count("charset") != len(re.findall(r"charset=\"?utf-?8\"?\s*(?:;|$)", kind)):
            # Some of the others take minutes for a megabyte.
            raise Refusal(400, "Expected a body in UTF-8, found another charset in Content-Type.", "charset")
        length = headers.get("content-length", "0")
        if not re.fullmatch("[0-9]{1,15}", length) or int(length) > most:
            raise Refusal(413, _too_large(most), "bytes")
        if self.bytes_inside + int(length) > self.settings.max_inside:
            raise Refusal(429, CROWDED, "bytes", {"retry-after": "1"})

    def _may_enter(self, scope: Scope, headers: Headers) -> bool:
        if self.settings.token is None or scope["path"].startswith(OPEN):
            return True
        kind, _, token = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and same(token.strip(), self.settings.token):
            return True
        # By hand: the parser of the standard library stops at what other programs on this host may have set.
        cookies = (part.partition("=") for part in headers.get("cookie", "").split(";"))
        return any(name.strip() == COOKIE and same(value.strip(), self.settings.session) for name, _, value in cookies)

    def _wait(self, client: str) -> float:
        """Seconds until this client's next request is let in; a leaking bucket for each."""
        now, rate = time.monotonic(), self.settings.rate
        level, since = self._buckets.pop(client, (0.0, now))
        level = max(0.0, level - (now - since) * rate)
        wait = (level + 1 - max(1.0, 2 * rate)) / rate
        self._buckets[client] = (level if wait > 0 else level + 1, now)
        if len(self._buckets) > CLIENTS:
            self._buckets.popitem(last=False)
        return max(0.0, wait)


class _Body:
    """A request's body as it arrives; it ends the request where it gets too long, or takes too long."""

    def __init__(self, receive: Receive, headers: Headers, most: int, guard: Guard) -> None:
        self._receive, self._most, self._guard = receive, most, guard
        self._until = time.monotonic() + guard.settings.body_seconds
        self.taken = 0
        self.complete = headers.get("content-length", "0") == "0" and "transfer-encoding" not in headers

    async def receive(self) -> Message:
        if self.complete:
            return await self._receive()
        try:
            async with asyncio.timeout(self._until - time.monotonic()):
                message = await self._receive()
        except TimeoutError:
            raise HTTPException(408, "Expected the whole request, found that it stopped; send it again.") from None
        size = len(message.get("body", b""))
        self.taken += size
        self._guard.bytes_inside += size
        self.complete = message["type"] != "http.request" or not message.get("more_body", False)
        if self.taken > self._most:
            self._guard.measures.refused.labels("bytes").inc()
            raise HTTPException(413, _too_large(self._most))
        if self._guard.bytes_inside > self._guard.settings.max_inside:
            self._guard.measures.refused.labels("bytes").inc()
            raise HTTPException(429, CROWDED, {"retry-after": "1"})
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
    return hmac.compare_digest(one.encode("utf-8", "surrogatepass"), other.encode())


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


def _netloc(origin: str) -> str:
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return ""


def _hostname(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
