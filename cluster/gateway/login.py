"""What a browser shows a key with: it sends no header when somebody goes to a page, so it gets a session as a cookie.

The form has no script, and needs no file that is not open: its style stands in it.
"""

from __future__ import annotations

import base64
import hashlib
from urllib.parse import parse_qs

from fastapi import APIRouter, Request
from starlette.responses import Response

from cluster.errors import AuthenticationError, RequestError
from cluster.gateway.auth import LOGIN_PATH, SESSION_COOKIE, SESSION_S, Keys, is_of_this_site
from cluster.gateway.limits import read_body

MAX_FORM_BYTES = 4096
FORM_TIMEOUT_S = 10.0

_STYLE = """
:root{color-scheme:light dark}
body{margin:15vh auto;max-width:24rem;padding:0 1.25rem;font:1rem/1.5 system-ui,sans-serif}
h1{font-size:1.6rem}
label,input,button{display:block;width:100%;box-sizing:border-box;font:inherit}
input,button{margin:.25rem 0 1rem;padding:.5rem .75rem}
p{margin:0 0 1rem}
"""
_STYLE_HASH = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Foretoken: log in</title>
<style>{style}</style>
</head>
<body>
<main>
<h1>Foretoken</h1>
<form method="post" action="login">
<p{role}>{message}</p>
<label for="key">API key</label>
<input id="key" name="key" type="password" autocomplete="current-password" maxlength="512" required autofocus>
<button type="submit">Log in</button>
</form>
</main>
</body>
</html>
"""
HEADERS = {
    "content-security-policy": (
        f"default-src 'none'; style-src 'sha256-{_STYLE_HASH}'; base-uri 'none'; form-action 'self'; "
        "frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",  # with "no-referrer" the form would come from nowhere: `Origin: null`
    "cache-control": "no-store",
    "www-authenticate": "Bearer",
}


def login_form(*, is_refused: bool = False) -> Response:
    """The page that asks for a key."""
    message = "This key is not valid here." if is_refused else "This server needs an API key."
    page = _PAGE.format(style=_STYLE, role=' role="alert"' if is_refused else "", message=message)
    return Response(page, status_code=AuthenticationError.status, media_type="text/html", headers=HEADERS)


def login_routes(keys: Keys) -> APIRouter:
    """`POST /login`: a key for a session, which the same key opens at every gateway."""
    router = APIRouter()

    @router.post(LOGIN_PATH, include_in_schema=False)
    async def login(request: Request) -> Response:
        session = keys.new_session(await _key_of(request)) if is_of_this_site(request.scope, in_doubt=True) else None
        if session is None:
            return login_form(is_refused=True)
        response = Response(status_code=303, headers={"location": "./", "cache-control": "no-store"})
        is_https = request.url.scheme == "https" or request.headers.get("origin", "").startswith("https://")
        response.set_cookie(
            SESSION_COOKIE, session, max_age=SESSION_S, path="/", secure=is_https, httponly=True, samesite="strict"
        )
        return response

    return router


async def _key_of(request: Request) -> str:
    """The form's key; "" where it has none."""
    try:
        body = await read_body(
            request.stream(),
            length=request.headers.get("content-length"),
            max_bytes=MAX_FORM_BYTES,
            timeout_s=FORM_TIMEOUT_S,
            hold=lambda _: None,
        )
        return parse_qs(body.decode("ascii"), max_num_fields=8).get("key", [""])[0].strip()
    except (RequestError, ValueError):
        return ""
