"""Keys: who gets in, as whom, and to what."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import os
import re
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from cluster.errors import ConfigError
from cluster.gateway import auth
from cluster.gateway.auth import NO_KEYS, OPEN_PATHS, SESSION_COOKIE, Caller, Keys, parse_admin_key, parse_keys
from tests.support.scripted_worker import DEADLINE_S, ScriptedWorker
from tests.unit.gateway.conftest import MODEL, Serve, Served

pytestmark = pytest.mark.anyio

ALICE, BOB, NOBODY, ADMIN = (name * 4 for name in ("alice", "bob-key_", "nobody", "admin+/="))
KEYS = Keys.of(parse_keys(f"# who may\nalice:{ALICE}\nbob:{BOB}, {NOBODY}  # of no tenant\n", "test"), None)
WITH_ADMIN = Keys.of(KEYS.users, parse_admin_key(ADMIN, "test"))
BODY = {"model": MODEL, "prompt": "Hi", "max_tokens": 1}


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def paths(app: FastAPI) -> list[tuple[str, str]]:
    """Method and path of every route, each parameter filled in."""
    found = []
    for included in app.routes:
        assert hasattr(included, "effective_route_contexts"), (
            f"{included} is in no router: this test cannot look into it"
        )
        for route in included.effective_route_contexts():
            found += [(method, re.sub(r"{[^}]*}", "x", route.path)) for method in route.methods]
    return found


def check_unknown(response: httpx.Response) -> None:
    assert response.status_code == 401, response.request.url
    assert response.headers["www-authenticate"] == "Bearer"
    error = response.json()["error"]
    if response.request.url.path.startswith("/v1/messages"):  # Anthropic's
        assert (response.json()["type"], error["type"]) == ("error", "authentication_error")
        return
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_api_key")


# ------------------------------------------------------------------------------------------------------------ the keys


def test_a_text_of_keys() -> None:
    assert [key.caller.tenant for key in KEYS.users] == ["alice", "bob", "default"]
    assert (KEYS.caller(BOB), KEYS.caller(ADMIN)) == (Caller("bob"), None)
    assert WITH_ADMIN.caller(ADMIN) == Caller(is_admin=True)
    assert ALICE not in repr(KEYS)
    assert KEYS.users[0].digest.hex() not in repr(KEYS)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("short-secret", "line 1 is no key"),
        (f"{ALICE}\nsecret with spaces in it", "line 2 is no key"),
        (f"a b:secret{ALICE}", "the tenant on line 1"),
        (f":secret{ALICE}", "the tenant on line 1"),
        (f"a:b:secret{ALICE}", "the tenant on line 1"),
        (f"a:secret{ALICE}\n\nb:secret{ALICE}", "line 3 has the key of line 1"),
        ("# secret", "has no key"),
        (",\n ,", "has no key"),
        ("\n".join(f"secret{number:020}" for number in range(auth.MAX_KEYS + 1)), "at most 4096"),
    ],
)
def test_a_text_that_has_no_usable_keys_is_not_quoted(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        parse_keys(text, "the file")
    assert caught.value.message.startswith("the file")
    assert "secret" not in caught.value.message


def test_a_key_has_one_owner() -> None:
    with pytest.raises(ConfigError, match="given twice"):
        Keys.of(KEYS.users, parse_admin_key(ALICE, "admin_api_key"))
    with pytest.raises(ConfigError, match="admin_api_key is no key") as caught:
        parse_admin_key("two words are no secret", "admin_api_key")
    assert "secret" not in caught.value.message


def test_a_key_file_is_its_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        auth.read_key_file(path)
    path.write_text(f"alice:{ALICE}\n")
    for mode in (0o644, 0o640, 0o620, 0o601):
        path.chmod(mode)
        with pytest.raises(ConfigError, match=f"mode {mode:03o}.*: chmod 600 {re.escape(str(path))}$"):
            auth.read_key_file(path)
    for mode in (0o600, 0o400):
        path.chmod(mode)
        assert parse_keys(auth.read_key_file(path), "file")[0].caller.tenant == "alice"
    path.chmod(0o600)
    for content in (b"\xff\xfe", b""):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match="must be text"):
            auth.read_key_file(path)
    read, write = os.pipe()  # as of a shell's <(…)
    os.write(write, ALICE.encode())
    os.close(write)
    assert auth.read_key_file(Path(f"/dev/fd/{read}")) == ALICE
    os.close(read)


@pytest.mark.parametrize("key", [ALICE, NOBODY, "x" * 30])
def test_every_key_is_compared_whatever_is_right(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return one == other

    monkeypatch.setattr(hmac, "compare_digest", compare)
    WITH_ADMIN.caller(key)
    assert len(compared) == 4
    assert {len(side) for pair in compared for side in pair} == {32}


# --------------------------------------------------------------------------------------------------------- what is open


async def test_every_route_but_the_health_ones_needs_a_key(serve: Serve, worker: ScriptedWorker) -> None:
    served = await serve(keys=WITH_ADMIN)
    await served.ready()
    routes = paths(served.app)
    assert {("POST", "/v1/completions"), ("GET", "/metrics"), ("GET", "/"), ("POST", "/admin/drain")} <= set(routes)
    for method, path in [
        *routes,
        ("GET", "/v2/none"),
        ("OPTIONS", "/v1/models"),
        ("GET", "/health/none"),
        ("GET", "//"),
    ]:
        response = await served.http.request(method, path)
        if path in OPEN_PATHS:
            assert response.status_code == 200, path
        elif path == auth.LOGIN_PATH and method == "POST":
            assert response.status_code == 401
            assert "set-cookie" not in response.headers
        else:
            check_unknown(response)
            check_unknown(await served.http.request(method, path, headers=bearer("x" * 32)))
    cheap = {path for _, path in routes if path.startswith(("/health", "/ping"))}
    assert cheap - {"/health/generate", "/health_generate"} == OPEN_PATHS  # these cost a step
    assert worker.submits == []


async def test_the_ways_to_send_a_key(serve: Serve) -> None:
    served = await serve(keys=KEYS)
    await served.ready()
    wrong = [
        {},
        {"authorization": "Bearer"},
        bearer(ALICE[:-1]),
        bearer(f"{ALICE} {ALICE}"),
        {"authorization": ALICE},
        {"authorization": f"Basic {ALICE}"},
        {"x-api-key": "é"},
        {"api-key": ALICE},
    ]
    for headers in wrong:
        check_unknown(await served.http.get("/v1/models", headers={k: v.encode() for k, v in headers.items()}))
    check_unknown(await served.http.get("/v1/models", params={"api_key": ALICE}))
    for headers in (
        bearer(ALICE),
        {"authorization": f"bearer  {BOB}"},
        {"x-api-key": NOBODY},
        {"authorization": "Bearer none", "x-api-key": BOB},
    ):
        assert (await served.http.get("/v1/models", headers=headers)).status_code == 200
    answer = await served.http.post("/v1/completions", json=BODY, headers=bearer(ALICE))
    assert answer.status_code == 200
    assert (await served.http.get("/metrics", headers=bearer(BOB))).status_code == 200
    refused = 'foretoken:request_errors_total{code="invalid_api_key",model_name="org/scripted"} 9.0'
    assert refused in (await served.http.get("/metrics", headers=bearer(BOB))).text


async def test_without_keys_any_key_will_do(served: Served) -> None:
    for headers in ({}, bearer("EMPTY"), {"x-api-key": "none"}):
        assert (await served.http.get("/v1/models", headers=headers)).status_code == 200


async def test_a_refusal_does_not_wait_for_the_body(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, worker: ScriptedWorker
) -> None:
    monkeypatch.setattr("cluster.gateway.connection.REST_S", 0.05)
    served = await serve(keys=KEYS)
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\nexpect: 100-continue\r\n\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
    writer.write(head)
    async with asyncio.timeout(DEADLINE_S):
        assert await reader.readline() == b"HTTP/1.1 401 Unauthorized\r\n"
        try:  # then it is cut: a rest that never comes holds no connection
            while await reader.read(4096):
                pass
        except ConnectionError:
            pass
    writer.close()
    assert served.app.state.gateway.admission.num_open == 0


async def test_a_body_behind_a_refusal_is_thrown_away_and_the_connection_goes_on(serve: Serve) -> None:
    served = await serve(keys=KEYS)
    body = b"x" * 300_000
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body)
    reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
    writer.write(head)
    async with asyncio.timeout(DEADLINE_S):
        answer = await reader.readuntil(b"\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 401 ")
        length = int(re.findall(rb"content-length: (\d+)", answer)[0])
        await reader.readexactly(length)
        writer.write(body + b"GET /health/live HTTP/1.1\r\nhost: x\r\n\r\n")
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
    writer.close()


# ------------------------------------------------------------------------------------------------------------- browsers


HTML = {"accept": "text/html,application/xhtml+xml,*/*;q=0.8"}


async def log_in(served: Served, key: str, **headers: str) -> httpx.Response:
    origin = {"origin": served.base_url}
    return await served.http.post("/login", data={"key": key}, headers=origin | headers)


async def test_a_browser_is_asked_for_a_key_and_remembered(serve: Serve) -> None:
    first, second = await serve(keys=KEYS), await serve(keys=Keys.of(parse_keys(f"someone:{ALICE}", "b"), None))
    form = await first.http.get("/", headers=HTML)
    assert form.status_code == 401
    assert '<form method="post" action="login">' in form.text
    assert "<script" not in form.text
    assert form.headers["www-authenticate"] == "Bearer"
    assert "script-src" not in form.headers["content-security-policy"]
    refused = await log_in(first, "x" * 32)
    assert (refused.status_code, "set-cookie" in refused.headers) == (401, False)
    assert 'role="alert"' in refused.text
    done = await log_in(first, f" {ALICE}\n")
    assert (done.status_code, done.headers["location"]) == (303, "./")
    cookie = done.headers["set-cookie"]
    assert {"HttpOnly", "Path=/", "SameSite=strict"} <= set(cookie.split("; "))
    assert "Secure" not in cookie
    assert ALICE not in cookie
    assert "Secure" in (await log_in(first, ALICE, origin="https://127.0.0.1", host="127.0.0.1")).headers["set-cookie"]
    session = {"cookie": f"other=1; {cookie.split(';')[0]}"}
    first.http.cookies.clear()
    for served in (first, second):  # the second knows the key, for another tenant
        await served.ready()
        assert "<title>Foretoken</title>" in (await served.http.get("/", headers=HTML | session)).text
        assert (await served.http.get("/cluster", headers=session)).status_code == 200
        ours = {"origin": served.base_url}
        assert (await served.http.post("/v1/completions", content=b"", headers=session | ours)).status_code == 400
        for site in ("same-origin", "none"):
            assert (await served.http.get("/cluster", headers=session | {"sec-fetch-site": site})).status_code == 200
        for wrong in (
            {"sec-fetch-site": "cross-site"},
            {"sec-fetch-site": "same-site"},
            {"origin": "http://evil.example"},
            {"origin": "null"},
            {"origin": "http://[", "host": "["},
            {"origin": served.base_url + "1"},
        ):
            check_unknown(await served.http.get("/cluster", headers=session | wrong))
        check_unknown(await served.http.post("/v1/completions", content=b"", headers=session))
        same = {"sec-fetch-site": "same-origin", "origin": "https://by-its-proxy.example"}
        assert (await served.http.post("/v1/completions", content=b"", headers=session | same)).status_code == 400


async def test_a_session_that_is_not_ours_or_over(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    served = await serve(keys=WITH_ADMIN)
    session = WITH_ADMIN.new_session(BOB)
    assert session is not None
    expiry, _, seal = session.partition(".")
    assert WITH_ADMIN.caller_of_session(session) == Caller("bob")
    assert Keys.of(parse_keys(ALICE, "x"), None).caller_of_session(session) is None
    assert WITH_ADMIN.new_session("x" * 32) is None
    for wrong in ("", ".", "x", f"{int(expiry) + 1}.{seal}", f"{expiry}.{seal[:-1]}", f"{expiry}.é", f"²{session}"):
        assert WITH_ADMIN.caller_of_session(wrong) is None
        cookie = {"cookie": f"{SESSION_COOKIE}={wrong}".encode()}
        check_unknown(await served.http.get("/cluster", headers=cookie))
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + auth.SESSION_S + 1)
    assert WITH_ADMIN.caller_of_session(session) is None


async def test_a_login_of_another_sites_form_is_refused(serve: Serve) -> None:
    served = await serve(keys=KEYS)
    for headers in ({"origin": "https://evil.example"}, {"sec-fetch-site": "cross-site"}, {"origin": "null"}):
        response = await log_in(served, ALICE, **headers)
        assert (response.status_code, "set-cookie" in response.headers) == (401, False)
    for content in (b"", b"key", b"\xff", b"key=" + b"x" * 5000, b"&".join([b"a=1"] * 99)):
        response = await served.http.post("/login", content=content, headers={"origin": served.base_url})
        assert response.status_code == 401


async def test_another_sites_page_reaches_no_server_without_keys(served: Served, worker: ScriptedWorker) -> None:
    """A page may send a form's kind of request to this machine without asking first."""
    for path in ("/v1/completions", "/admin/drain"):
        for headers in ({"origin": "https://evil.example"}, {"sec-fetch-site": "cross-site"}):
            response = await served.http.post(path, json=BODY, headers=headers)
            assert (response.status_code, response.json()["error"]["code"]) == (403, "permission_denied")
    assert worker.submits == []
    own = {"origin": served.base_url, "sec-fetch-site": "same-origin"}
    assert (await served.http.post("/v1/completions", json=BODY, headers=own)).status_code == 200


# ------------------------------------------------------------------------------------------------------- administration


@pytest.mark.parametrize("keys", [KEYS, WITH_ADMIN], ids=["none", "one"])
async def test_administration_needs_its_own_key(serve: Serve, keys: Keys) -> None:
    served = await serve(keys=keys)
    session = {"cookie": f"{SESSION_COOKIE}={keys.new_session(ADMIN) or keys.new_session(ALICE)}"}
    for headers in (bearer(ALICE), session):
        response = await served.http.get("/admin/requests", headers=headers)
        assert (response.status_code, response.json()["error"]["code"]) == (403, "permission_denied")
        assert ("FORETOKEN_ADMIN_API_KEY" in response.json()["error"]["message"]) == (keys.admin is None)
    status = 401 if keys.admin is None else 200
    for path in ("/admin/requests", "/v1/models", "/metrics"):
        assert (await served.http.get(path, headers=bearer(ADMIN))).status_code == status


async def test_an_administrators_key_alone_closes_only_administration(serve: Serve) -> None:
    served = await serve(keys=Keys.of((), WITH_ADMIN.admin))
    assert (await served.http.get("/v1/models")).status_code == 200
    for path in ("/admin", "/admin/", "/admin/requests"):
        check_unknown(await served.http.get(path))
    assert (await served.http.get("/admin/requests", headers=bearer(ADMIN))).status_code == 200


async def open_requests(served: Served, number: int) -> list[dict[str, Any]]:
    async with asyncio.timeout(DEADLINE_S):
        while True:
            data: list[dict[str, Any]] = (await served.http.get("/admin/requests", headers=bearer(ADMIN))).json()[
                "data"
            ]
            if len(data) == number:
                return data


async def test_open_requests_are_shown_and_aborted(serve: Serve, worker: ScriptedWorker) -> None:
    served = await serve(keys=WITH_ADMIN)
    await served.ready()
    worker.steps_left = 3
    answers = [
        asyncio.create_task(
            served.http.post(
                "/v1/completions",
                json=BODY | {"prompt": "sesame", "max_tokens": 100, "stream": stream},
                headers=bearer(ALICE) | {"x-request-id": name},
            )
        )
        for name, stream in (("whole", False), ("streamed", True))
    ]
    await worker.wait_until(lambda: not worker.gate.is_set() and len(worker.submits) == 2)
    shown = {request["id"]: request for request in await open_requests(served, 2)}
    assert set(shown) == {"whole", "streamed"}
    for request in shown.values():
        assert (request["tenant"], request["prompt_tokens"]) == ("alice", 1 + len("sesame"))
        assert 0 <= request["generated_tokens"] <= 3
        assert request["age_s"] >= 0
        assert request["state"] in ("waiting", "running")
    assert "sesame" not in json.dumps(list(shown.values()))
    missing = await served.http.post("/admin/requests/none/abort", headers=bearer(ADMIN))
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "request_not_found")
    for name in shown:
        done = await served.http.post(f"/admin/requests/{name}/abort", headers=bearer(ADMIN))
        assert done.json() == {"aborted": 1, "id": name}
    whole, streamed = await asyncio.gather(*answers)
    error = whole.json()["error"] if whole.status_code == 400 else None
    assert error is not None
    assert error["code"] == "request_aborted"
    assert '"code":"request_aborted"' in streamed.text  # in an event, or instead of the stream
    assert sorted(await worker.wait_for_aborts(2)) == sorted(submit.request_id for submit in worker.submits)
    await open_requests(served, 0)


async def test_a_request_without_a_worker_is_aborted_too(serve: Serve, worker: ScriptedWorker) -> None:
    await worker.kill()
    served = await serve()
    answer = asyncio.create_task(served.complete())
    (request,) = await open_requests(served, 1)
    async with asyncio.timeout(DEADLINE_S):
        while request["state"] == "reading":
            (request,) = await open_requests(served, 1)
    assert (request["state"], request["tenant"]) == ("preparing", None)
    assert (await served.http.post(f"/admin/requests/{request['id']}/abort")).status_code == 200
    assert (await answer).json()["error"]["code"] == "request_aborted"


async def test_a_drain_admits_nothing_more(serve: Serve, worker: ScriptedWorker) -> None:
    served = await serve(keys=WITH_ADMIN)
    await served.ready()
    worker.gate.clear()
    running = asyncio.create_task(served.http.post("/v1/completions", json=BODY, headers=bearer(ALICE)))
    await worker.wait_for_submits()
    drained = await served.http.post("/admin/drain", headers=bearer(ADMIN))
    assert drained.status_code == 202
    assert drained.json() == {"status": "draining", "open_requests": 1, "drain_timeout_s": 10.0}
    refused = await served.http.post("/v1/completions", json=BODY, headers=bearer(ALICE))
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
    assert (await served.http.get("/health/ready")).status_code == 503
    worker.gate.set()
    assert (await running).status_code == 200


# -------------------------------------------------------------------------------------------------------------- tenants


async def salts(served: Served, worker: ScriptedWorker) -> list[str]:
    """The salts of: alice's, alice's with a salt, bob's with hers, and two that try to be alice's."""
    asked: list[tuple[str, str | None]] = [
        (ALICE, None),
        (ALICE, "s"),
        (BOB, "s"),
        (BOB, "alice\0"),
        (NOBODY, "alice\0s"),
    ]
    for key, salt in asked:
        body = BODY | ({} if salt is None else {"cache_salt": salt})
        assert (await served.http.post("/v1/completions", json=body, headers=bearer(key))).status_code == 200
    return [submit.cache_salt for submit in worker.submits[-len(asked) :]]


async def test_tenants_share_no_pages(serve: Serve, worker: ScriptedWorker) -> None:
    served = await serve(keys=KEYS)
    await served.ready()
    found = await salts(served, worker)
    assert len(set(found)) == 5
    assert await salts(served, worker) == found, "of one tenant they are the same"


async def test_tenants_share_pages_where_the_operator_says_so(serve: Serve, worker: ScriptedWorker) -> None:
    shared = await serve(keys=KEYS, share_prefix_cache=True)
    await shared.ready()
    assert await salts(shared, worker) == ["", "s", "s", "alice\0", "alice\0s"]


async def test_without_keys_the_salt_is_the_callers(served: Served, worker: ScriptedWorker) -> None:
    await served.complete(max_tokens=1)
    await served.complete(max_tokens=1, cache_salt="s")
    assert [submit.cache_salt for submit in worker.submits] == ["", "s"]


async def test_a_tenant_has_a_bound_of_its_own(serve: Serve, worker: ScriptedWorker) -> None:
    served = await serve(keys=WITH_ADMIN, max_open_requests_per_tenant=1)
    await served.ready()
    worker.gate.clear()

    def ask(key: str) -> asyncio.Task[httpx.Response]:
        return asyncio.create_task(served.http.post("/v1/completions", json=BODY, headers=bearer(key)))

    running = [ask(ALICE)]
    await worker.wait_for_submits(1)
    refused = await ask(ALICE)
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
    running += [ask(BOB), ask(ADMIN), ask(ADMIN)]
    await worker.wait_for_submits(4)
    worker.gate.set()
    assert [answer.status_code for answer in await asyncio.gather(*running)] == [200] * 4
    assert (await ask(ALICE)).status_code == 200


async def test_a_line_of_the_log_names_the_tenant_and_no_key(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    served = await serve(keys=KEYS)
    await served.http.get("/v1/models", headers=bearer(ALICE))
    await served.http.get("/v1/models", headers=bearer("x" * 32))
    await log_in(served, ALICE)
    tenants = [
        getattr(record, "tenant", None) for record in caplog.records if record.name == "cluster.gateway.middleware"
    ]
    assert tenants == ["alice", None, None]
    text = caplog.text + str([vars(record) for record in caplog.records if record.name.startswith("cluster")])
    assert ALICE not in text
    assert "x" * 32 not in text


def test_no_keys_are_none() -> None:
    assert NO_KEYS.caller("") is None
    assert NO_KEYS.new_session("") is None
