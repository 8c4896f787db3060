"""The OpenAPI document says what the API does: schemathesis sends what it allows, and what it does not."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import pytest
from fastapi.routing import iter_route_contexts

from cluster.gateway.auth import OPEN_PATHS, Keys, parse_admin_key, parse_keys
from cluster.gateway.capabilities import ENDPOINTS
from cluster.gateway.openapi import STATUSES
from cluster.gateway.openapi_replies import REPLIES
from cluster.version import version
from tests.unit.gateway.conftest import Serve, Served

pytestmark = pytest.mark.anyio

KEY, ADMIN = "user-key-user-key", "admin-key-admin-key"
KEYS = Keys.of(parse_keys(KEY, "test"), parse_admin_key(ADMIN, "test"))
CONFIG = """
[checks]
# A list of more entries than are allowed may be a body of more bytes than are read.
negative_data_rejection.expected-statuses = [400, 401, 404, 405, 413]
"""
# To drain is for good, so that the rest would be refused (tests of /admin have it); the others are aliases.
ASIDE = "^/admin/drain$|^/v1/(de)?tokenize$|^/health_generate$"
# Which fields may not stand together, and how long a context is, is no part of a schema.
NO_PART_OF_A_SCHEMA = "positive_data_acceptance"
PHASES = ("examples", "coverage", "fuzzing", "stateful")
NO_EXAMPLES = "examples"  # the document has none, so this phase has nothing to do
RUN_S = 300.0


async def run_schemathesis(served: Served, folder: Path, *options: str) -> tuple[int, str]:
    (folder / "schemathesis.toml").write_text(CONFIG)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "schemathesis.cli", "--config-file", str(folder / "schemathesis.toml")),
        *("run", f"{served.base_url}/openapi.json", "--phases", ",".join(PHASES), "--checks", "all"),
        *("--exclude-checks", NO_PART_OF_A_SCHEMA),
        *("--seed", "7", "--continue-on-failure", "--no-shrink", "--no-color", "--warnings", "off", *options),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        cwd=folder,
    )
    try:
        async with asyncio.timeout(RUN_S):
            output, _ = await process.communicate()
    except TimeoutError:
        process.kill()
        raise
    assert process.returncode is not None
    # a request in it can have megabytes on a line
    return process.returncode, "\n".join(line[:400] for line in output.decode(errors="replace").splitlines())


@pytest.mark.timeout(420)
@pytest.mark.needs("schemathesis")
async def test_schemathesis_finds_nothing_in_any_phase(serve: Serve, tmp_path: Path) -> None:
    served = await serve(keys=KEYS)
    await served.ready()
    status, report = await run_schemathesis(
        served, tmp_path, "--header", f"Authorization: Bearer {ADMIN}", "--exclude-path-regex", ASIDE, "-n", "5"
    )
    assert status == 0, report
    assert [phase for phase in PHASES if f"✅ {phase.capitalize()}" not in report] == [NO_EXAMPLES], report


@pytest.mark.needs("schemathesis")
async def test_schemathesis_finds_a_wrong_document(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(REPLIES, ("GET", "/v1/models"), {"type": "object", "required": ["models"]})
    monkeypatch.setitem(STATUSES, ("GET", "/v1/models/{model_id}"), (200,))
    served = await serve()
    await served.ready()
    status, report = await run_schemathesis(served, tmp_path, "--include-path-regex", "^/v1/models", "-n", "5")
    assert status == 1, report
    assert "Response violates schema" in report, report
    assert "Undocumented status code" in report, report


async def document(served: Served) -> dict[str, Any]:
    found: dict[str, Any] = (await served.http.get("/openapi.json")).json()
    return found


async def test_every_route_of_the_api_is_in_it(served: Served) -> None:
    found = await document(served)
    assert found["info"]["version"] == version()
    documented = {(method.upper(), path) for path, item in found["paths"].items() for method in item}
    routes = {
        (method, route.path_format or "")
        for route in iter_route_contexts(served.app.routes)
        for method in route.methods or ()
    }
    aside = {path for _, path in routes - documented}
    assert documented <= routes
    assert all(path in ("/", "/login", "/openapi.json") or path.startswith("/dashboard/") for path in aside)
    assert REPLIES.keys() | STATUSES.keys() <= documented
    for path in ENDPOINTS:
        assert "requestBody" in found["paths"][path]["post"]
    for path, item in found["paths"].items():
        for operation in item.values():
            assert (operation.get("security") == []) == (path in OPEN_PATHS)


async def test_a_path_names_all_of_its_methods(served: Served) -> None:
    refused = await served.http.put("/v1/responses/x")
    assert (refused.status_code, refused.headers["allow"]) == (405, "DELETE, GET")
    assert (await served.http.get("/v1/completions")).headers["allow"] == "POST"


async def test_the_document_is_behind_the_key(serve: Serve) -> None:
    served = await serve(keys=KEYS)
    assert (await served.http.get("/openapi.json")).status_code == 401
