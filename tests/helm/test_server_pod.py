"""The pod against the program that it runs: its settings, arguments, probes and end are those of `foretoken serve`."""

from __future__ import annotations

import base64
import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from cluster.cli import app
from cluster.config import Settings, load
from cluster.gateway.auth import OPEN_PATHS, Caller
from cluster.gateway.health import router
from cluster.gateway.limits import FLUSH_S
from cluster.serve import HTTP_STOP_TIMEOUT_S, WORKER_STOP_TIMEOUT_S, keys_of
from tests.support.chart import (
    CHART,
    FULLNAME,
    ROOT,
    VALUE_SETS,
    Object,
    environment,
    maybe,
    one,
    pod_of,
    serve_yaml,
)

pytestmark = pytest.mark.needs("helm")

HUB = VALUE_SETS["hub"]
HUB_NAME = "blue-moe"
SHARED = VALUE_SETS["shared"]


def _container(values: Any = None, kind: str = "Deployment", name: str = FULLNAME) -> Object:
    (container,) = pod_of(values or {}, kind, name)["containers"]
    return container


@pytest.fixture
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting comes from this machine's environment."""
    for name in Settings.model_fields:
        monkeypatch.delenv(f"FORETOKEN_{name.upper()}", raising=False)


def _load(text: str, folder: Path) -> Settings:
    file = folder / "serve.yaml"
    file.write_text(text)
    return load(config=file)


@pytest.mark.usefixtures("no_settings")
def test_the_server_takes_the_settings_file(tmp_path: Path) -> None:
    settings = _load(serve_yaml({}), tmp_path)
    assert (settings.host, settings.port) == ("0.0.0.0", _container()["ports"][0]["containerPort"])
    assert settings.model is None
    assert settings.drain_timeout_s == 60
    assert settings.log_format == "json"


@pytest.mark.usefixtures("no_settings")
def test_every_setting_arrives_as_it_was_given(tmp_path: Path) -> None:
    given = {
        "drain_timeout_s": 2.5, "start_timeout_s": 900, "request_timeout_s": 30, "max_open_requests": 2000000,
        "device": "cuda:0", "numerics": "fast", "max_model_len": 1048576, "max_num_seqs": 128, "token_budget": 4096,
        "page_size": 32, "kv_cache_bytes": 68719476736, "prefix_cache": False, "static_batching": True,
        "host_kernels": False, "num_threads": 12, "expert_copies": 2, "lease_s": 0.5, "peer_timeout_s": 1.5,
        "tool_parser": "hermes", "reasoning_parser": "think",
        "max_ttft_s": 2.5, "vllm_metrics": True, "otlp_traces_endpoint": "http://collector:4318/v1/traces",
        "max_open_requests_per_tenant": 3, "max_connections": 10000, "share_prefix_cache": True,
        "reroute_timeout_s": 70, "orphan_timeout_s": 90, "log_level": "debug", "log_format": "text",
    }  # fmt: skip
    model = {"name": "Qwen/Qwen3-30B-A3B", "revision": "1" * 40, "servedName": "qwen"}
    settings = _load(serve_yaml({"settings": given, "model": model}), tmp_path)
    assert {name: getattr(settings, name) for name in given} == given
    assert (settings.model, settings.revision, settings.served_model_name) == tuple(model.values())
    allowed = json.loads((CHART / "values.schema.json").read_text())["properties"]["settings"]["properties"]
    assert set(given) == set(allowed)  # none is forgotten here


def test_a_size_may_have_a_unit(tmp_path: Path) -> None:
    assert _load(serve_yaml({"settings": {"kv_cache_bytes": "48GiB"}}), tmp_path).kv_cache_bytes == 48 * 2**30


def test_the_command_line_takes_the_arguments() -> None:
    container = _container()
    command, *arguments = container["args"]
    group = typer.main.get_command(app)
    serve = group.commands[command]  # type: ignore[attr-defined]
    context = serve.make_context(command, list(arguments))  # parses, and calls nothing
    config = context.params["config"]
    (mount,) = [mount for mount in container["volumeMounts"] if mount["name"] == "config"]
    assert config == Path(mount["mountPath"]) / "serve.yaml"
    assert {name for name, value in context.params.items() if value is not None} == {"config"}


def test_no_variable_of_a_service_is_taken_for_a_setting() -> None:
    """Kubernetes would give FORETOKEN_PORT=tcp://… to each pod beside a Service named foretoken."""
    assert pod_of({})["enableServiceLinks"] is False


def test_the_probes_ask_routes_that_the_gateway_has() -> None:
    container = _container()
    routes = {route.path for route in router.routes}  # type: ignore[attr-defined]
    asked = {kind: container[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "liveness", "readiness")}
    assert asked == {"startup": "/health/startup", "liveness": "/health/live", "readiness": "/health/ready"}
    assert set(asked.values()) <= routes & OPEN_PATHS  # a probe has no key
    assert {container[f"{kind}Probe"]["httpGet"]["port"] for kind in asked} == {container["ports"][0]["name"]}


@pytest.mark.parametrize("seconds", [10, 11, 1800])
def test_a_pod_may_start_for_as_long_as_the_values_say(seconds: int) -> None:
    values = {"server": {"startupSeconds": seconds}}
    probe = _container(values)["startupProbe"]
    allowed = probe["periodSeconds"] * probe["failureThreshold"]
    assert seconds <= allowed < seconds + probe["periodSeconds"]
    assert one(values, "Deployment")["spec"]["progressDeadlineSeconds"] > allowed


@pytest.mark.parametrize(("drain_s", "pre_stop_s"), [(60, 5), (0, 0), (2.5, 7), (600, 5)])
def test_the_grace_period_holds_the_whole_end(drain_s: float, pre_stop_s: int) -> None:
    values = {"settings": {"drain_timeout_s": drain_s}, "server": {"preStopSeconds": pre_stop_s}}
    needed = pre_stop_s + drain_s + FLUSH_S + HTTP_STOP_TIMEOUT_S + WORKER_STOP_TIMEOUT_S
    assert needed < pod_of(values)["terminationGracePeriodSeconds"] < needed + 15
    hook = _container(values).get("lifecycle")
    assert hook == ({"preStop": {"exec": {"command": ["sleep", str(pre_stop_s)]}}} if pre_stop_s else None)


def test_what_it_writes_lies_on_volumes(tmp_path: Path) -> None:
    container = _container()
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    home = str(_load(serve_yaml({}), tmp_path).home)
    assert set(mounts) == {home, "/tmp", "/etc/foretoken"}
    assert mounts["/etc/foretoken"]["readOnly"] is True
    variables = environment(container)
    assert variables["HOME"] == home
    assert variables["HF_HOME"].startswith(home + "/")
    volumes = {volume["name"] for volume in pod_of({})["volumes"]}
    assert {mount["name"] for mount in mounts.values()} == volumes


def test_a_change_of_settings_restarts_the_pods() -> None:
    def digest(values: Any) -> str:
        annotation: str = one(values, "Deployment")["spec"]["template"]["metadata"]["annotations"]["foretoken/config"]
        return annotation

    assert digest({}) != digest({"settings": {"max_num_seqs": 8}})
    assert digest({}) == digest({"service": {"port": 81}})


def test_the_image_is_the_release_a_tag_or_a_digest() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert _container()["image"] == f"foretoken:{version}"
    assert _container({"image": {"tag": "nightly"}})["image"] == "foretoken:nightly"
    assert _container(SHARED)["image"] == "registry.example:5000/team/foretoken@sha256:" + "0" * 64
    assert pod_of(SHARED)["imagePullSecrets"] == [{"name": "registry"}]


def test_a_token_comes_from_a_secret_ours_or_theirs() -> None:
    assert "HF_TOKEN" not in environment(_container())
    ours = environment(_container(HUB, "StatefulSet", HUB_NAME))["HF_TOKEN"]["secretKeyRef"]
    assert set(one(HUB, "Secret", ours["name"])["data"]) == {ours["key"]}
    theirs = environment(_container(SHARED))["HF_TOKEN"]["secretKeyRef"]
    assert theirs == {"name": "hub", "key": "hf"}
    assert maybe(SHARED, "Secret", "blue-foretoken-hub") is None


def test_keys_come_from_a_secret_ours_or_theirs() -> None:
    def references(container: Object) -> dict[str, dict[str, str]]:
        variables = environment(container)
        return {name: variables[name]["secretKeyRef"] for name in variables if name.startswith("FORETOKEN_")}

    ours = references(_container())
    assert set(ours) == {"FORETOKEN_API_KEY", "FORETOKEN_ADMIN_API_KEY"}
    data = one({}, "Secret", f"{FULLNAME}-keys")["data"]
    made = {name: base64.b64decode(data[reference["key"]]).decode() for name, reference in ours.items()}
    assert {reference["name"] for reference in ours.values()} == {f"{FULLNAME}-keys"}
    keys = keys_of(load({"api_key": made["FORETOKEN_API_KEY"], "admin_api_key": made["FORETOKEN_ADMIN_API_KEY"]}))
    assert keys.caller(made["FORETOKEN_API_KEY"]) == Caller("default")
    assert keys.caller(made["FORETOKEN_ADMIN_API_KEY"]) == Caller(is_admin=True)
    theirs = references(_container(SHARED))
    assert theirs["FORETOKEN_API_KEY"] == {"name": "llm-keys", "key": "tenants"}
    assert theirs["FORETOKEN_ADMIN_API_KEY"] == {"name": "llm-keys", "key": "root"}
    assert maybe(SHARED, "Secret", f"{FULLNAME}-keys") is None
    closed = references(_container({"apiKeys": {"existingSecret": "llm-keys"}}))
    assert closed == {"FORETOKEN_API_KEY": {"name": "llm-keys", "key": "keys"}}


def test_the_hub_is_reached_through_a_mirror_or_not_at_all() -> None:
    assert environment(_container(HUB, "StatefulSet", HUB_NAME))["HF_ENDPOINT"] == "https://mirror.example"
    assert environment(_container(SHARED))["HF_HUB_OFFLINE"] == "1"
    assert not {"HF_ENDPOINT", "HF_HUB_OFFLINE"} & set(environment(_container()))


def test_gpus_are_asked_for_where_they_are_wanted() -> None:
    assert "nvidia.com/gpu" not in _container()["resources"]["limits"]
    limits = _container(HUB, "StatefulSet", HUB_NAME)["resources"]["limits"]
    assert limits == {"cpu": 8, "memory": "64Gi", "nvidia.com/gpu": 1}
    assert pod_of(HUB, "StatefulSet", HUB_NAME)["runtimeClassName"] == "nvidia"


def test_memory_is_asked_for_as_it_is_limited() -> None:
    resources = _container()["resources"]
    assert resources["requests"]["memory"] == resources["limits"]["memory"]


def test_the_pods_are_placed_where_the_values_say() -> None:
    pod = pod_of(SHARED)
    assert pod["nodeSelector"] == {"gpu": "h100"}
    assert pod["tolerations"] == SHARED["server"]["tolerations"]
    assert pod["affinity"] == SHARED["server"]["affinity"]
    assert pod["priorityClassName"] == "high"
    template = one(SHARED, "Deployment")["spec"]["template"]["metadata"]
    assert template["labels"]["team"] == "ml"
    assert template["annotations"]["example.com/team"] == "ml"
    assert environment(_container(SHARED))["HTTPS_PROXY"] == "http://proxy:3128"
    (spread,) = pod["topologySpreadConstraints"]
    assert spread["labelSelector"]["matchLabels"].items() <= template["labels"].items()
    assert "topologySpreadConstraints" not in pod_of(VALUE_SETS["bare"])


def test_serve_yaml_is_one_yaml_document() -> None:
    assert yaml.safe_load(serve_yaml(HUB, HUB_NAME))["kv_cache_bytes"] == 68719476736
