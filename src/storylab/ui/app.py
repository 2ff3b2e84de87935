"""The application behind the page: its addresses, and the hosts that may read them."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable
from functools import cache, partial
from importlib import resources
from pathlib import Path
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from storylab.errors import UserError
from storylab.reporting.html import figure_script
from storylab.ui.library import Library

# Only these names reach the page: a foreign site whose name leads to this machine does not.
HOSTS = ["127.0.0.1", "localhost"]
FILES = {"": "text/html", "app.js": "text/javascript", "app.css": "text/css"}
FIGURES = "/figures.js"
# Figures compile their expressions, hence 'unsafe-eval'; nothing comes from elsewhere.
POLICY = (
    "default-src 'none'; connect-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; style-src 'self' 'unsafe-inline'; script-src 'self' 'unsafe-eval'"
)


def create_app(runs: Path) -> Starlette:
    """The application for the folder ``runs``. It answers GET alone, and changes nothing."""
    library = Library(runs)
    figures = cache(figure_script)

    def answer(read: Callable[..., Any]) -> Callable[[Request], Response]:
        return lambda request: _answer(request, partial(read, **request.path_params))

    def experiment(request: Request) -> Response:
        try:
            page = library.experiment_page(request.path_params["name"], FIGURES)
        except UserError as error:
            return _text(request, str(error), "text/plain", 404)
        # The page's own script is inline: it is allowed by its hash.
        return _text(request, page, "text/html", policy=f"{POLICY} {_hash_of_script(page)}")

    def file(request: Request) -> Response:
        name = request.url.path.removeprefix("/")
        source = resources.files("storylab.ui").joinpath("static", name or "index.html")
        return _text(request, source.read_text("utf-8"), FILES[name])

    def script(request: Request) -> Response:
        return _text(request, figures(), "text/javascript")

    return Starlette(
        routes=[
            *(Route(f"/{name}", file) for name in FILES),
            Route(FIGURES, script),
            Route("/api/overview", answer(library.overview)),
            Route("/api/curves/{name}", answer(library.curve)),
            Route("/api/runs/{name}", answer(library.detail)),
            Route("/experiments/{name}", experiment),
        ],
        middleware=[
            Middleware(TrustedHostMiddleware, allowed_hosts=HOSTS, www_redirect=False),
            Middleware(GZipMiddleware, compresslevel=3),
        ],
    )


def _answer(request: Request, read: Callable[[], Any]) -> Response:
    try:
        body, code = msgspec.json.encode(read()).decode(), 200
    except UserError as error:
        body, code = msgspec.json.encode({"error": str(error)}).decode(), 404
    return _text(request, body, "application/json", code)


def _text(
    request: Request, text: str, kind: str, code: int = 200, policy: str = POLICY
) -> Response:
    """A response that the browser may keep, but asks about before it uses it again."""
    body = text.encode()
    tag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
    headers = {
        "Cache-Control": "no-cache",
        "Content-Security-Policy": policy,
        "Cross-Origin-Resource-Policy": "same-origin",
        "ETag": tag,
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }
    if code == 200 and request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return Response(body, code, headers, f"{kind}; charset=utf-8")


def _hash_of_script(page: str) -> str:
    """The source expression for the last script of a page."""
    script = page[page.rindex("<script>") + len("<script>") : page.rindex("</script>")]
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
