"""The Pools page and what it asks for, over HTTP: what people see and set, and what monitors read.

    GET  /                   the page: static, with nothing from elsewhere
    GET  /api/pools          all pools as JSON                                    token
    POST /api/pools/{kind}   {"verb": "set" | "hold" | "release", "count": …}     token
    GET  /metrics            Prometheus text
    GET  /healthz            whether this answers

The token travels in a header only, so that no other page's request and no link can carry it.
"""

import base64
import hashlib
import hmac
import ipaddress
import json
import logging
import platform
import re
import secrets
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from aiohttp import web

from cluster.errors import Internal, InvalidRequest, TriviumError, Unauthenticated
from cluster.http_server import Metrics

logger = logging.getLogger(__name__)

PAGE = Path(__file__).with_name("pools_page.html")
BODY_BYTES_MAX = 1024
VERBS = ("set", "hold", "release")
TRUSTED_SUFFIXES = (".localhost", ".local", ".internal", ".svc", ".cluster.local")  # no public name ends so
HTTP_STATUSES = {
    "INVALID_ARGUMENT": 400,
    "UNAUTHENTICATED": 401,
    "FAILED_PRECONDITION": 409,
    "RESOURCE_EXHAUSTED": 429,
    "UNAVAILABLE": 503,
    "DEADLINE_EXCEEDED": 504,
}
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "Server": "trivium",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}

Read = Callable[[], Awaitable[Any]]
Act = Callable[[str, str, int | None], Awaitable[None]]
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def pools_application(token: str, read: Read, act: Act, metrics: Metrics) -> web.Application:
    """The application: `read` gives JSON, `act(kind, verb, count)` raises TriviumError where it cannot.

    `metrics` gives a text and its content type for an Accept header.
    """
    doors = Doors(token, read, act, metrics)
    app = web.Application(client_max_size=BODY_BYTES_MAX, middlewares=[typed_errors, doors.guard])
    app.on_response_prepare.append(protect)
    app.router.add_get("/", doors.page)
    app.router.add_get("/healthz", doors.healthz)
    app.router.add_get("/metrics", doors.metrics)
    app.router.add_get("/api/pools", doors.pools)
    app.router.add_post("/api/pools/{kind}", doors.change)
    return app


class Doors:
    """What is behind each path, and who may come in."""

    def __init__(self, token: str, read: Read, act: Act, metrics: Metrics):
        self._token = token.encode()
        self._read = read
        self._act = act
        self._metrics = metrics
        self._page = PAGE.read_text(encoding="utf-8")
        self._page_policy = page_policy(self._page)

    @web.middleware
    async def guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Let in who has the token, and to the open paths everybody who does not come by a foreign name."""
        check_origin(request)
        if not self._has_token(request):
            if request.path.startswith("/api/"):
                raise Unauthenticated(
                    "NO_TOKEN" if "Authorization" not in request.headers else "WRONG_TOKEN",
                    "the Pools page's token is needed here",
                    field="Authorization",
                    limit="Bearer and the token",
                    remedy="Send the token that was shown at start, or the one in operations.token_file.",
                )
            check_host(request)
        return await handler(request)

    def _has_token(self, request: web.Request) -> bool:
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        is_same = hmac.compare_digest(token.strip().encode("utf-8", "surrogateescape"), self._token)
        return scheme.lower() == "bearer" and is_same

    async def page(self, _: web.Request) -> web.Response:
        """The page, which may run its own script and style alone."""
        headers = {"Content-Security-Policy": self._page_policy}
        return web.Response(text=self._page, content_type="text/html", headers=headers)

    async def healthz(self, _: web.Request) -> web.Response:
        """Whether this process answers."""
        return web.Response(text="ok\n")

    async def metrics(self, request: web.Request) -> web.Response:
        """All metrics, for monitors."""
        text, content_type = await self._metrics(request.headers.get("Accept", ""))
        return web.Response(body=text, headers={"Content-Type": content_type})

    async def pools(self, _: web.Request) -> web.Response:
        """All pools."""
        return web.json_response(await self._read())

    async def change(self, request: web.Request) -> web.Response:
        """Set, hold or release a pool, and answer with all pools as they are then."""
        verb, count = read_change(request.content_type, await request.read())
        await self._act(request.match_info["kind"], verb, count)
        return web.json_response(await self._read())


@web.middleware
async def typed_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer every error as JSON that says what to do; what is our fault leaves its traceback in the log."""
    try:
        return await handler(request)
    except TriviumError as error:
        return error_response(error, HTTP_STATUSES.get(error.grpc_status, 500))
    except web.HTTPException as error:
        limit = f"{BODY_BYTES_MAX} bytes" if error.status == 413 else error.headers.get("Allow")
        reason = re.sub(r"\W+", "_", error.reason).upper()
        return error_response(
            TriviumError(reason, f"{request.method} is not answered here", limit=limit), error.status
        )
    except Exception:
        fault = Internal(secrets.token_hex(6))
        logger.exception("error %s at the Pools page", fault.error_id)
        return error_response(fault, 500)


def error_response(error: TriviumError, status: int) -> web.Response:
    """An error as programs and people read it."""
    keys = ("reason", "message", "field", "limit", "remedy")
    headers = {"WWW-Authenticate": "Bearer"} if status == 401 else {}
    return web.json_response({key: getattr(error, key) for key in keys}, status=status, headers=headers)


async def protect(_: web.Request, response: web.StreamResponse) -> None:
    """Give every answer the headers that keep browsers from doing more than they should with it."""
    for name, value in HEADERS.items():
        if name == "Server" or name not in response.headers:
            response.headers[name] = value


def read_change(content_type: str, body: bytes) -> tuple[str, int | None]:
    """Verb and count of a change; raises InvalidRequest."""
    if content_type != "application/json":  # what a form on a foreign page cannot send
        raise invalid("Content-Type", f"{content_type[:80]!r} is not read here", "application/json")
    try:
        match json.loads(body):
            case {"verb": str() as verb, **rest}:
                pass
            case _:
                raise invalid("body", "it names no verb", "an object with verb and count")
    except (ValueError, RecursionError):
        raise invalid("body", "it is not JSON", "an object with verb and count") from None
    if verb not in VERBS:
        raise invalid("verb", f"{verb[:80]!r} is not known", f"one of {', '.join(VERBS)}")
    count = rest.pop("count", None)
    if rest:
        raise invalid("body", f"{next(iter(rest))[:80]!r} is not known", "verb and count alone")
    if (count is None and verb == "set") or not (count is None or type(count) is int):
        raise invalid("count", "it is not a whole number", "a whole number of actors")
    if count is not None and verb == "release":
        raise invalid("count", "a release takes none", "verb alone")
    return verb, count


def check_origin(request: web.Request) -> None:
    """Refuse what another site's page would have changed; raises InvalidRequest."""
    origin = request.headers.get("Origin")
    is_own = origin is None or origin.lower().partition("://")[2] == request.host.lower()
    if request.method not in ("GET", "HEAD") and not is_own:
        raise invalid("Origin", "another site's page may not change pools", f"a page of {request.host[:260]}")


def check_host(request: web.Request) -> None:
    """Refuse a public name that leads here by its owner's doing alone; raises InvalidRequest.

    Such a name makes a browser believe that this server belongs to the site which owns the name.
    """
    if request.path in ("/", "/healthz"):  # nothing there that is not public
        return
    if not is_trusted_host(request.host):
        raise invalid(
            "Host", f"{request.host[:260]!r} is not a name of this server", "its address or its host's name"
        )


def is_trusted_host(host: str) -> bool:
    """Whether a Host header is an IP address, this host's name, or a name that no site can own."""
    try:
        name = (urlsplit(f"//{host}").hostname or "").rstrip(".")
    except ValueError:
        return False
    try:
        ipaddress.ip_address(name)
        return True
    except ValueError:
        own = platform.node().lower().split(".")[0]
        return bool(name) and (
            "." not in name or name.endswith(TRUSTED_SUFFIXES) or name.split(".")[0] == own
        )


def page_policy(page: str) -> str:
    """A policy under which the page's own style and script work, and no others."""
    hashes = {
        tag: " ".join(map(digest, re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.S)))
        for tag in ("style", "script")
    }
    return (
        f"default-src 'none'; style-src {hashes['style']}; script-src {hashes['script']}; connect-src 'self';"
        " img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def digest(text: str) -> str:
    """A text's hash as policies write it."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def invalid(field: str, message: str, limit: str) -> InvalidRequest:
    """The error about a part of a request."""
    return InvalidRequest(
        "INVALID_REQUEST", message, field, limit, remedy="Change it; as it is it fails again."
    )
