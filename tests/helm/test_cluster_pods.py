"""A cluster's pods against the programs that they run: arguments, settings, names, probes and ends."""

from __future__ import annotations

import os
import stat
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import typer.main

from cluster.cli import app
from cluster.config import ENV_PREFIX, Settings, load
from cluster.gateway.health import router
from cluster.gateway.limits import FLUSH_S
from cluster.operate.controller import PULSE_NAME
from cluster.operate.pulse import Pulse
from cluster.operate.worker import STOP_EXTRA_S, name_of
from cluster.serve import HTTP_STOP_TIMEOUT_S
from tests.support.chart import CLUSTER_SETS, FULLNAME, VALUE_SETS, Object, Values, environment, every, one, pod_of
from tests.support.chart import serve_yaml as serve_yaml_of

pytestmark = pytest.mark.needs("helm")

PLAIN = VALUE_SETS["cluster"]
FULL = VALUE_SETS["cluster_full"]
FULL_NAME = "blue-moe"
SHARED = VALUE_SETS["cluster_shared"]
GATEWAY, CONTROLLER = f"{FULLNAME}-gateway", f"{FULLNAME}-controller"
ATTENTION, EXPERT = f"{FULLNAME}-attention-main", f"{FULLNAME}-expert-main"
CLUSTERS = pytest.mark.parametrize("values", [VALUE_SETS[name] for name in CLUSTER_SETS], ids=CLUSTER_SETS)


def _container(name: str, values: Values = PLAIN) -> Object:
    kind = "Deployment" if name.endswith(("-gateway", "-controller")) else "StatefulSet"
    (container,) = pod_of(values, kind, name)["containers"]
    return container


def _workers(values: Values) -> dict[str, Object]:
    found = every(values, "StatefulSet")
    return {name: workload for name, workload in found.items() if not name.endswith("-redis")}


def _processes(values: Values) -> dict[str, Object]:
    return every(values, "Deployment") | _workers(values)


def _parse(arguments: list[str]) -> tuple[str, dict[str, Any]]:
    """The command that the command line finds in `arguments`, and its parameters; nothing is called."""
    command: Any = typer.main.get_command(app)
    name, rest = "foretoken", list(arguments)
    while hasattr(command, "commands"):  # a group
        name = rest.pop(0)
        command = command.commands[name]
    return name, command.make_context(name, rest).params


def _arguments_of_worker(container: Object, pod: str, folder: Path) -> list[str]:
    """What its command gives `foretoken` in the pod of that name, as a shell does it."""
    program = folder / "foretoken"
    program.write_text('#!/bin/sh\nfor word in "$@"; do printf "%s\\n" "$word"; done\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    tini, dashes, *shell = container["command"]
    assert (tini, dashes) == ("tini", "--")
    variables = {"PATH": f"{folder}:{os.environ['PATH']}", "POD_NAME": pod, "NODE_NAME": "gpu-7.example"}
    done = subprocess.run(shell, env=variables, capture_output=True, text=True, timeout=20, check=True)
    return done.stdout.splitlines()


@CLUSTERS
def test_the_command_line_takes_what_gateway_and_controller_are_given(values: Values) -> None:
    for name, workload in every(values, "Deployment").items():
        (container,) = workload["spec"]["template"]["spec"]["containers"]
        command, given = _parse(container["args"])
        assert name.endswith(f"-{command}")
        assert given["config"] == Path("/etc/foretoken/serve.yaml")
        own = {"pods": True, "folder": Path("/tmp")} if command == "controller" else {}
        assert given == {"config": given["config"]} | own


@CLUSTERS
def test_each_worker_has_a_place_of_its_own(values: Values, tmp_path: Path) -> None:
    workers = _workers(values)
    assert len(workers) >= 2
    names = list[str]()
    for name, workload in workers.items():
        (container,) = workload["spec"]["template"]["spec"]["containers"]
        for ordinal in range(workload["spec"]["replicas"]):
            command, given = _parse(_arguments_of_worker(container, f"{name}-{ordinal}", tmp_path))
            assert command == "worker"
            assert given["node"] == "gpu-7.example"
            assert given["config"] == Path("/etc/foretoken/serve.yaml")
            assert name_of(given["role"], given["name"]) == given["name"]
            names.append(given["name"])
        variables = environment(container)
        assert variables["POD_NAME"]["fieldRef"]["fieldPath"] == "metadata.name"
        assert variables["NODE_NAME"]["fieldRef"]["fieldPath"] == "spec.nodeName"
        assert variables["FORETOKEN_ADVERTISE"]["fieldRef"]["fieldPath"] == "status.podIP"
    assert len(set(names)) == len(names)
    assert {"attention-0", "expert-0"} <= set(names)


def test_a_worker_keeps_its_place_when_another_group_grows(tmp_path: Path) -> None:
    name = f"{FULL_NAME}-expert-main"
    more = {**FULL, "workerGroups": [group | {"replicas": 9} for group in FULL["workerGroups"]]}
    for values in (FULL, more):
        _, given = _parse(_arguments_of_worker(_container(name, values), f"{name}-8", tmp_path))
        assert given["name"] == "expert-1008"


def test_the_controller_counts_with_the_device_that_experts_are_on() -> None:
    devices = {
        name: environment(_container(f"{prefix}-controller", VALUE_SETS[name])).get("FORETOKEN_DEVICE")
        for name, prefix in (("cluster", FULLNAME), ("cluster_full", FULL_NAME))
    }
    assert devices == {"cluster": "cpu", "cluster_full": "cuda"}
    chosen = _container(CONTROLLER, {**PLAIN, "settings": {"device": "cuda"}})
    assert "FORETOKEN_DEVICE" not in environment(chosen)  # it would hide what the file says


@CLUSTERS
def test_every_process_takes_its_settings(values: Values, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (front,) = every(values, "ConfigMap")
    file = tmp_path / "serve.yaml"
    file.write_text(serve_yaml_of(values, front))
    for name in Settings.model_fields:
        monkeypatch.delenv(f"{ENV_PREFIX}{name.upper()}", raising=False)
    from_file = load(config=file)
    assert from_file.host == "0.0.0.0"
    assert from_file.cluster_name == values.get("store", {}).get("namespace", front)
    workloads = _processes(values)
    for name, workload in workloads.items():
        (container,) = workload["spec"]["template"]["spec"]["containers"]
        assert (
            container["ports"][0]["containerPort"] == from_file.port if "ports" in container else "controller" in name
        )
        given = {key: value for key, value in environment(container).items() if key.startswith(ENV_PREFIX)}
        from_pod = {"FORETOKEN_TOKEN": "secret", "FORETOKEN_ADVERTISE": "10.0.0.7", "FORETOKEN_STORE": "redis://h/0"}
        from_pod |= {"FORETOKEN_API_KEY": f"a:{'k' * 16}\n", "FORETOKEN_ADMIN_API_KEY": "a" * 16}
        with monkeypatch.context() as pod:
            for key, value in given.items():
                pod.setenv(key, value if isinstance(value, str) else from_pod[key])
            settings = load(config=file)
        assert settings.token is not None
        assert settings.token.get_secret_value() == "secret"
        assert settings.store is not None
        assert (settings.advertise is not None) == ("-attention-" in name or "-expert-" in name)
        assert set(given) <= {ENV_PREFIX + field.upper() for field in Settings.model_fields}


def test_a_setting_of_the_cluster_arrives() -> None:
    given = {"expert_copies": 2, "lease_s": 5, "peer_timeout_s": 3, "reroute_timeout_s": 61, "orphan_timeout_s": 75}
    text = serve_yaml_of({**PLAIN, "settings": given})
    assert {f"{name}: {value}" for name, value in given.items()} <= set(text.splitlines())


def test_the_controller_alone_knows_how_many_workers_there_are() -> None:
    variables = environment(_container(f"{FULL_NAME}-controller", FULL))
    counted = {"attention": 0, "expert": 0}
    for group in FULL["workerGroups"]:
        counted[group["role"]] += group["replicas"]
    assert variables["FORETOKEN_ATTENTION_WORKERS"] == str(counted["attention"]) == "2"
    assert variables["FORETOKEN_EXPERT_WORKERS"] == str(counted["expert"]) == "5"

    more = {**FULL, "workerGroups": [group | {"replicas": 7} for group in FULL["workerGroups"]]}
    for name, workload in _processes(FULL).items():
        again = _processes(more)[name]
        changes = workload["spec"]["template"] != again["spec"]["template"]
        assert changes == name.endswith("-controller")  # who is only counted is not restarted


def test_a_change_of_settings_restarts_every_process() -> None:
    before, after = _processes(PLAIN), _processes({**PLAIN, "settings": {"max_num_seqs": 8}})
    assert all(before[name]["spec"]["template"] != after[name]["spec"]["template"] for name in before)


def test_the_gateways_probes_ask_routes_that_it_has() -> None:
    container = _container(GATEWAY)
    asked = {kind: container[f"{kind}Probe"]["httpGet"] for kind in ("startup", "liveness", "readiness")}
    paths = {kind: probe["path"] for kind, probe in asked.items()}
    assert paths == {"startup": "/health/startup", "liveness": "/health/live", "readiness": "/health/ready"}
    assert set(paths.values()) <= {route.path for route in router.routes}  # type: ignore[attr-defined]
    assert {probe["port"] for probe in asked.values()} == {container["ports"][0]["name"]}


@pytest.mark.parametrize("name", [ATTENTION, EXPERT])
def test_a_workers_probes_knock_at_its_port(name: str) -> None:
    container = _container(name)
    (port,) = container["ports"]
    for kind in ("startup", "liveness", "readiness"):
        assert container[f"{kind}Probe"]["tcpSocket"] == {"port": port["name"]}


@pytest.mark.needs("linux")
def test_a_controllers_probes_look_at_its_pulse(tmp_path: Path) -> None:
    container = _container(CONTROLLER)
    _, given = _parse(container["args"])
    pulse = str(given["folder"] / PULSE_NAME)
    for kind in ("startup", "liveness"):
        *shell, script = container[f"{kind}Probe"]["exec"]["command"]
        assert pulse in script
        here = tmp_path / f"{kind}.pulse"

        def looks_well(command: tuple[str, ...] = (*shell, script.replace(pulse, str(here)))) -> bool:
            return subprocess.run(command, timeout=20, check=False, stderr=subprocess.DEVNULL).returncode == 0

        assert not looks_well()
        Pulse(here).beat()
        assert looks_well()
        past_s = time.time() - 60
        os.utime(here, (past_s, past_s))
        assert not looks_well()
    probe = container["livenessProbe"]
    assert probe["terminationGracePeriodSeconds"] == 1  # one that hangs does not end by itself
    assert probe["periodSeconds"] * probe["failureThreshold"] <= 10


@pytest.mark.parametrize("seconds", [10, 11, 1800])
def test_a_pod_may_start_for_as_long_as_the_values_say(seconds: int) -> None:
    values = {**PLAIN, "gateway": {"startupSeconds": seconds}, "worker": {"startupSeconds": seconds}}
    for name in (GATEWAY, ATTENTION, EXPERT):
        probe = _container(name, values)["startupProbe"]
        assert seconds <= probe["periodSeconds"] * probe["failureThreshold"] < seconds + probe["periodSeconds"]
    assert one(values, "Deployment", GATEWAY)["spec"]["progressDeadlineSeconds"] > seconds + 5


@pytest.mark.parametrize(("drain_s", "pre_stop_s"), [(60, 5), (0, 0), (2.5, 7), (600, 5)])
def test_the_grace_period_holds_the_whole_end(drain_s: float, pre_stop_s: int) -> None:
    values = {**PLAIN, "settings": {"drain_timeout_s": drain_s}, "gateway": {"preStopSeconds": pre_stop_s}}
    needed = pre_stop_s + drain_s + FLUSH_S + HTTP_STOP_TIMEOUT_S
    assert needed < pod_of(values, "Deployment", GATEWAY)["terminationGracePeriodSeconds"] < needed + 15
    hook = _container(GATEWAY, values).get("lifecycle")
    assert hook == ({"preStop": {"exec": {"command": ["sleep", str(pre_stop_s)]}}} if pre_stop_s else None)
    for name in (ATTENTION, EXPERT):
        needed = drain_s + STOP_EXTRA_S
        assert needed < pod_of(values, "StatefulSet", name)["terminationGracePeriodSeconds"] < needed + 15


@CLUSTERS
def test_what_a_process_writes_lies_on_volumes(values: Values) -> None:
    for workload in _processes(values).values():
        pod = workload["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
        assert set(mounts) == {"/var/lib/foretoken", "/tmp", "/etc/foretoken"}
        assert environment(container)["HOME"] == "/var/lib/foretoken"
        claims = {claim["metadata"]["name"] for claim in workload["spec"].get("volumeClaimTemplates", [])}
        assert {mount["name"] for mount in mounts.values()} == claims | {volume["name"] for volume in pod["volumes"]}
        assert container["resources"]["requests"]["memory"] == container["resources"]["limits"]["memory"]


def test_a_groups_cache_is_the_common_one_or_its_own() -> None:
    def cache(name: str, values: Values) -> Object:
        spec = _processes(values)[name]["spec"]
        found = [claim["spec"] for claim in spec.get("volumeClaimTemplates", [])]
        found += [v for v in spec["template"]["spec"]["volumes"] if v["name"] == "cache"]
        (only,) = found
        return only

    own = cache(f"{FULL_NAME}-attention-main", FULL)
    assert (own["resources"]["requests"]["storage"], own["storageClassName"]) == ("20Gi", "fast")
    assert cache(f"{FULL_NAME}-expert-main", FULL)["persistentVolumeClaim"] == {"claimName": "models"}
    assert cache(f"{FULL_NAME}-expert-h100", FULL)["emptyDir"] == {"sizeLimit": "20Gi"}
    for name in (GATEWAY, CONTROLLER, ATTENTION, EXPERT):
        assert cache(name, SHARED)["persistentVolumeClaim"] == {"claimName": "models"}
    each = {**PLAIN, "cache": {"kind": "perPod", "size": "80Gi"}}
    assert cache(EXPERT, each)["resources"]["requests"]["storage"] == "80Gi"
    for name in (GATEWAY, CONTROLLER):  # a Deployment has no volume for each pod
        assert cache(name, each)["emptyDir"] == {"sizeLimit": "80Gi"}


def test_a_group_is_placed_where_it_says() -> None:
    group = FULL["workerGroups"][1]
    pod = pod_of(FULL, "StatefulSet", f"{FULL_NAME}-expert-h100")
    assert {key: pod[key] for key in ("nodeSelector", "tolerations", "affinity")} == {
        key: group[key] for key in ("nodeSelector", "tolerations", "affinity")
    }
    assert (pod["priorityClassName"], pod["runtimeClassName"]) == ("high", "nvidia")
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"cpu": 8, "memory": "64Gi", "nvidia.com/gpu": 1}
    assert environment(container)["NCCL_DEBUG"] == "WARN"
    (spread,) = pod["topologySpreadConstraints"]
    labels = one(FULL, "StatefulSet", f"{FULL_NAME}-expert-h100")["spec"]["template"]["metadata"]["labels"]
    assert spread["maxSkew"] == 2
    assert spread["labelSelector"]["matchLabels"].items() <= labels.items()
    assert labels["team"] == "ml"

    plain = pod_of(FULL, "StatefulSet", f"{FULL_NAME}-expert-main")
    assert "topologySpreadConstraints" not in plain
    assert "nodeSelector" not in plain
    attention = pod_of(FULL, "StatefulSet", f"{FULL_NAME}-attention-main")
    assert "nvidia.com/gpu" not in attention["containers"][0]["resources"]["limits"]
    assert attention["topologySpreadConstraints"][0]["maxSkew"] == 1


def test_gateways_and_controllers_are_placed_where_the_values_say() -> None:
    gateway = pod_of(FULL, "Deployment", f"{FULL_NAME}-gateway")
    assert gateway["nodeSelector"] == {"pool": "front"}
    assert "topologySpreadConstraints" not in gateway
    assert environment(gateway["containers"][0])["HTTPS_PROXY"] == "http://proxy:3128"
    template = one(FULL, "Deployment", f"{FULL_NAME}-gateway")["spec"]["template"]["metadata"]
    assert template["labels"]["team"] == "ml"
    assert template["annotations"]["example.com/team"] == "ml"
    controller = pod_of(FULL, "Deployment", f"{FULL_NAME}-controller")
    assert controller["nodeSelector"] == {"pool": "system"}
    assert controller["topologySpreadConstraints"]


@CLUSTERS
def test_the_hubs_token_goes_to_every_process_that_fetches(values: Values) -> None:
    wanted = "huggingFace" in values
    for workload in _processes(values).values():
        (container,) = workload["spec"]["template"]["spec"]["containers"]
        assert ("HF_TOKEN" in environment(container)) == wanted
