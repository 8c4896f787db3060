"""Who may call: keys, the tenants that they stand for, and the session that a browser shows in place of a key.

No key is kept, only what it is recognised by: its SHA-256, and the secret of its sessions, which follows from it. So a
session is good at every gateway that knows the key, and ends with the key.

Every path but `OPEN_PATHS` is closed where there are keys. `/admin` has a key of its own, which opens the rest too.
What comes without a key in a header, from a browser by its session or where none is needed, must not come from
another site's page: by the request's `Sec-Fetch-Site` and `Origin` (https://www.w3.org/TR/fetch-metadata/).
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import stat
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import cookie_parser
from starlette.types import Scope

from cluster.errors import AuthenticationError, ConfigError, PermissionDeniedError

OPEN_PATHS = frozenset({"/health", "/health/live", "/health/ready", "/health/startup", "/ping"})
LOGIN_PATH = "/login"  # asks for the key itself
ADMIN_PATH = "/admin"
DEFAULT_TENANT = "default"  # of keys that name none
MIN_KEY_CHARS = 16
MAX_KEYS = 4096
MAX_KEY_FILE_BYTES = 2**20
SESSION_S = 7 * 24 * 3600
SESSION_COOKIE = "foretoken_session"

_KEY = re.compile(rf"[A-Za-z0-9._~+/=-]{{{MIN_KEY_CHARS},512}}")  # what an Authorization header can carry
_TENANT = re.compile(r"[A-Za-z0-9._-]{1,64}")
_SAFE_METHODS = frozenset({"GET", "HEAD"})


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sent a request. `tenant` "": nobody in particular, where no key is needed, or the administrator."""

    tenant: str = ""
    is_admin: bool = False


@dataclass(frozen=True, slots=True)
class Key:
    """What a key is recognised by, and whom it stands for."""

    digest: bytes = field(repr=False)
    session_secret: bytes = field(repr=False)
    caller: Caller

    @classmethod
    def of(cls, key: str, caller: Caller) -> Key:
        secret = hmac.digest(key.encode(), b"foretoken session", "sha256")
        return cls(hashlib.sha256(key.encode()).digest(), secret, caller)


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys of a gateway. Without `users` no key is needed but for `/admin`, and there only with an `admin`."""

    users: tuple[Key, ...] = ()
    admin: Key | None = None

    @classmethod
    def of(cls, users: Iterable[Key], admin: Key | None) -> Keys:
        """Raises `ConfigError` where one key stands for two callers."""
        made = cls(tuple(users), admin)
        if len({key.digest for key in made._all}) < len(made._all):
            raise ConfigError("a key is given twice: the administrator and each tenant need keys of their own")
        return made

    @property
    def _all(self) -> tuple[Key, ...]:
        return self.users if self.admin is None else (*self.users, self.admin)

    def caller(self, key: str) -> Caller | None:
        """Whose key it is. The time that it takes does not depend on which it is, nor on how much of it is right."""
        digest = hashlib.sha256(key.encode()).digest()
        found = None
        for known in self._all:
            if hmac.compare_digest(known.digest, digest):
                found = known.caller
        return found

    def new_session(self, key: str) -> str | None:
        """The session of a user's or the administrator's key; None: there is no such key."""
        digest = hashlib.sha256(key.encode()).digest()
        expiry = str(int(time.time()) + SESSION_S)
        found = None
        for known in self._all:
            if hmac.compare_digest(known.digest, digest):
                found = f"{expiry}.{_seal(known, expiry)}"
        return found

    def caller_of_session(self, session: str) -> Caller | None:
        expiry, _, seal = session.partition(".")
        if not (expiry.isascii() and expiry.isdigit() and len(expiry) <= 12 and int(expiry) > time.time()):
            return None
        found = None
        for known in self._all:
            if hmac.compare_digest(_seal(known, expiry).encode(), seal.encode()):
                found = known.caller
        return found


NO_KEYS = Keys()


def _seal(key: Key, expiry: str) -> str:
    return hmac.new(key.session_secret, expiry.encode(), hashlib.sha256).hexdigest()


def new_key() -> str:
    return f"ft-{secrets.token_urlsafe(32)}"


# ----------------------------------------------------------------------------------------------- where keys come from


def parse_keys(text: str, source: str) -> tuple[Key, ...]:
    """The keys of a text: `key` or `tenant:key` on each line or behind each comma; `#` begins a comment.

    Raises `ConfigError` naming `source` and the line, never what stands there.
    """
    found: dict[bytes, int] = {}
    keys = []
    for line, entry in _entries(text):
        tenant, colon, key = entry.rpartition(":")
        if not _KEY.fullmatch(key):
            raise ConfigError(
                f"{source}: line {line} is no key: at least {MIN_KEY_CHARS} letters, digits and ._~+/=-, such as from "
                "`openssl rand -hex 32`; with a tenant, tenant:key"
            )
        if colon and not _TENANT.fullmatch(tenant):
            raise ConfigError(
                f"{source}: the tenant on line {line} must be letters, digits and ._-, at most 64 of them"
            )
        made = Key.of(key, Caller(tenant or DEFAULT_TENANT))
        if made.digest in found:
            raise ConfigError(f"{source}: line {line} has the key of line {found[made.digest]}: a key has one tenant")
        found[made.digest] = line
        keys.append(made)
    if len(keys) > MAX_KEYS:
        raise ConfigError(f"{source}: {len(keys)} keys; at most {MAX_KEYS} can be compared with every request's")
    if not keys:
        raise ConfigError(f"{source} has no key: give `key` or `tenant:key`, several on lines of their own")
    return tuple(keys)


def _entries(text: str) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(text.splitlines(), 1):
        for entry in line.partition("#")[0].split(","):
            if entry := entry.strip():
                yield number, entry


def parse_admin_key(text: str, source: str) -> Key:
    """Raises `ConfigError` for what is not one key."""
    if not _KEY.fullmatch(text.strip()):
        raise ConfigError(f"{source} is no key: at least {MIN_KEY_CHARS} letters, digits and ._~+/=-", param=source)
    return Key.of(text.strip(), Caller(is_admin=True))


def read_key_file(path: Path) -> str:
    """A file of keys, which nobody else may read. Raises `ConfigError` with what to do."""
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            if mode & 0o077:
                raise ConfigError(
                    f"the key file {path} may be used by others than its owner (mode {mode:03o}): chmod 600 {path}",
                    param="api_key_file",
                )
            content = file.read(MAX_KEY_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"the key file {path} cannot be read: {error.strerror}", param="api_key_file") from None
    try:
        text = content.decode()
    except UnicodeDecodeError:
        text = ""
    if len(content) > MAX_KEY_FILE_BYTES or not text:
        raise ConfigError(f"the key file {path} must be text: `key` or `tenant:key` on each line", param="api_key_file")
    return text


# ------------------------------------------------------------------------------------------------------- who comes in


def admit(keys: Keys, scope: Scope) -> Caller:
    """Who sent a request. Raises `AuthenticationError` or `PermissionDeniedError`; reads nothing but its head."""
    path: str = scope["path"]
    if path in OPEN_PATHS or path == LOGIN_PATH:
        return Caller()
    headers = Headers(scope=scope)
    given = list(given_keys(headers))
    by_key = next((found for found in map(keys.caller, given) if found is not None), None)
    is_admin_path = path == ADMIN_PATH or path.startswith(ADMIN_PATH + "/")
    if by_key is not None:
        if is_admin_path and not by_key.is_admin:
            raise PermissionDeniedError(_needs_admin(keys))
        return by_key
    if is_admin_path and (keys.admin is not None or keys.users):
        raise (
            _unknown(given)
            if _caller_by_session(keys, scope, headers) is None
            else PermissionDeniedError(f"{_needs_admin(keys)}, in a header: a browser's session is not enough")
        )
    if keys.users:
        by_session = _caller_by_session(keys, scope, headers)
        if by_session is None:
            raise _unknown(given)
        return by_session
    if scope["method"] not in _SAFE_METHODS and not is_of_this_site(scope, in_doubt=True):
        raise PermissionDeniedError("a page of another site may not use this server through a browser")
    return Caller(is_admin=is_admin_path)


def _unknown(given: list[str]) -> AuthenticationError:
    if given:
        return AuthenticationError("this API key is not valid here")
    return AuthenticationError("an API key is needed: send the header Authorization: Bearer <key>")


def _needs_admin(keys: Keys) -> str:
    hint = "" if keys.admin is not None else " (there is none: set FORETOKEN_ADMIN_API_KEY)"
    return f"this needs the administrator's key{hint}"


def given_keys(headers: Headers) -> Iterator[str]:
    """What may be a key: OpenAI's clients send `Authorization`, Anthropic's `x-api-key`."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and key.strip():
        yield key.strip()
    if key := headers.get("x-api-key", "").strip():
        yield key


def _caller_by_session(keys: Keys, scope: Scope, headers: Headers) -> Caller | None:
    session = cookie_parser(headers.get("cookie", "")).get(SESSION_COOKIE)
    if not session or not is_of_this_site(scope, in_doubt=scope["method"] in _SAFE_METHODS):
        return None
    return keys.caller_of_session(session)


def is_of_this_site(scope: Scope, *, in_doubt: bool) -> bool:
    """Whether a request is from a page of ours, or of somebody who typed our address; `in_doubt`: nothing tells.

    A browser tells by `Sec-Fetch-Site` (over https, or on loopback) and, whenever something may change, by `Origin`.
    """
    headers = Headers(scope=scope)
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    if site == "same-origin":
        return True
    if site not in (None, "none"):
        return False
    if origin is not None:
        ours = _host(f"//{headers.get('host', '')}", scheme=urlsplit(origin).scheme if _host(origin) else "")
        return ours is not None and ours == _host(origin)
    return in_doubt


def _host(address: str, scheme: str = "") -> tuple[str, int | None] | None:
    """Name and port; None: it has none."""
    try:
        parts = urlsplit(address)
        port = parts.port or {"http": 80, "https": 443}.get(parts.scheme or scheme)
    except ValueError:
        return None
    return (parts.hostname, port) if parts.hostname else None


# ------------------------------------------------------------------------------------------------------------ tenants


def tenant_of(scope: Scope) -> str:
    """The tenant whose key a request came with; "" where no key is needed."""
    tenant: str = scope.get("state", {}).get("tenant", "")
    return tenant


def tenants_salt(tenant: str, cache_salt: str | None) -> str | None:
    """The salt of a tenant's prefix pages, which no salt of another tenant's request gives. A tenant has no NUL."""
    return f"{tenant}\0{cache_salt or ''}" if tenant else cache_salt
