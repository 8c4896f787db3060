"""What each template makes, and that selectors, ports and names lead from one object to the other."""

from __future__ import annotations

import base64
import os
import subprocess
from pathlib import Path

import pytest

from tests.support.chart import FULLNAME, VALUE_SETS, Object, environment, maybe, one, pod_of

pytestmark = pytest.mark.needs("helm")

HUB = VALUE_SETS["hub"]
HUB_NAME = "blue-moe"
SHARED = VALUE_SETS["shared"]
BARE = VALUE_SETS["bare"]


def _labels(workload: Object) -> dict[str, str]:
    labels: dict[str, str] = workload["spec"]["template"]["metadata"]["labels"]
    return labels


def _selects(selector: dict[str, str], workload: Object) -> bool:
    return bool(selector) and selector.items() <= _labels(workload).items()


def test_a_deployment_replaces_pods_one_by_one() -> None:
    spec = one({}, "Deployment")["spec"]
    assert spec["replicas"] == 1
    assert spec["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}
    assert _selects(spec["selector"]["matchLabels"], one({}, "Deployment"))
    without_spare = one(SHARED, "Deployment")["spec"]
    assert without_spare["replicas"] == 3
    assert without_spare["strategy"]["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": 1}


def test_a_volume_for_each_pod_makes_them_a_stateful_set() -> None:
    found = one(HUB, "StatefulSet", HUB_NAME)
    assert maybe(HUB, "Deployment", HUB_NAME) is None
    (claim,) = found["spec"]["volumeClaimTemplates"]
    assert claim["metadata"]["name"] == "cache"
    assert claim["spec"]["resources"]["requests"]["storage"] == "100Gi"
    assert claim["spec"]["storageClassName"] == "fast"
    assert "cache" not in {volume["name"] for volume in pod_of(HUB, "StatefulSet", HUB_NAME)["volumes"]}
    governing = one(HUB, "Service", found["spec"]["serviceName"])["spec"]
    assert governing["clusterIP"] == "None"
    assert _selects(governing["selector"], found)


def test_the_cache_is_an_empty_folder_or_a_claim() -> None:
    volumes = {volume["name"]: volume for volume in pod_of({})["volumes"]}
    assert volumes["cache"] == {"name": "cache", "emptyDir": {"sizeLimit": "20Gi"}}
    volumes = {volume["name"]: volume for volume in pod_of(SHARED)["volumes"]}
    assert volumes["cache"]["persistentVolumeClaim"]["claimName"] == "models"


def test_the_service_leads_to_the_servers_port() -> None:
    service, workload = one({}, "Service"), one({}, "Deployment")
    assert service["spec"]["type"] == "ClusterIP"
    assert _selects(service["spec"]["selector"], workload)
    (port,) = service["spec"]["ports"]
    assert port["targetPort"] == pod_of({})["containers"][0]["ports"][0]["name"]
    outside = one(HUB, "Service", HUB_NAME)
    assert outside["spec"]["type"] == "LoadBalancer"
    assert outside["metadata"]["annotations"] == {"example.com/internal": "true"}


def test_the_ingress_leads_each_host_to_the_service() -> None:
    assert maybe({}, "Ingress") is None
    found = one(HUB, "Ingress", HUB_NAME)
    service = one(HUB, "Service", HUB_NAME)
    assert found["spec"]["ingressClassName"] == "nginx"
    assert found["metadata"]["annotations"] == HUB["ingress"]["annotations"]
    assert [rule["host"] for rule in found["spec"]["rules"]] == HUB["ingress"]["hosts"]
    for rule in found["spec"]["rules"]:
        (path,) = rule["http"]["paths"]
        target = path["backend"]["service"]
        assert (path["path"], target["name"]) == ("/", service["metadata"]["name"])
        assert target["port"]["name"] == service["spec"]["ports"][0]["name"]
    assert found["spec"]["tls"] == [{"secretName": "llm-tls", "hosts": HUB["ingress"]["hosts"]}]


def test_the_autoscaler_takes_the_replicas_over() -> None:
    assert maybe({}, "HorizontalPodAutoscaler") is None
    spec = one(HUB, "HorizontalPodAutoscaler", HUB_NAME)["spec"]
    target = spec["scaleTargetRef"]
    scaled = one(HUB, target["kind"], target["name"])
    assert "replicas" not in scaled["spec"]  # else each upgrade would set it back
    assert (spec["minReplicas"], spec["maxReplicas"]) == (1, 8)
    (metric,) = spec["metrics"]
    assert metric["pods"]["metric"]["name"] == "foretoken_num_requests_waiting"
    assert metric["pods"]["target"] == {"type": "AverageValue", "averageValue": "4"}


def test_the_autoscalers_metric_is_one_of_ours() -> None:
    from cluster.metrics import ENGINE_METRICS, PREFIX

    (metric,) = one(HUB, "HorizontalPodAutoscaler", HUB_NAME)["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"] in {(PREFIX + metric.name).replace(":", "_") for metric in ENGINE_METRICS}


def test_the_disruption_budget_covers_the_servers() -> None:
    found = one({}, "PodDisruptionBudget")["spec"]
    assert found["maxUnavailable"] == 1
    assert _selects(found["selector"]["matchLabels"], one({}, "Deployment"))
    assert one(HUB, "PodDisruptionBudget", HUB_NAME)["spec"]["maxUnavailable"] == "50%"
    assert maybe(BARE, "PodDisruptionBudget") is None


def test_the_network_policy_opens_the_client_port_alone() -> None:
    spec = one({}, "NetworkPolicy")["spec"]
    assert spec["policyTypes"] == ["Ingress"]
    assert _selects(spec["podSelector"]["matchLabels"], one({}, "Deployment"))
    assert spec["ingress"] == [{"ports": [{"port": "http", "protocol": "TCP"}], "from": [{"podSelector": {}}]}]
    everybody = one({"networkPolicy": {"from": []}}, "NetworkPolicy")["spec"]
    assert everybody["ingress"] == [{"ports": [{"port": "http", "protocol": "TCP"}]}]
    assert maybe(BARE, "NetworkPolicy") is None


def test_the_network_policy_can_hold_the_pods_in() -> None:
    spec = one(HUB, "NetworkPolicy", HUB_NAME)["spec"]
    assert spec["policyTypes"] == ["Ingress", "Egress"]
    ours, theirs = spec["egress"]
    assert [(port["port"], port["protocol"]) for port in ours["ports"]] == [(53, "UDP"), (53, "TCP"), (443, "TCP")]
    assert theirs == HUB["networkPolicy"]["egress"][0]
    assert spec["ingress"][0]["from"] == HUB["networkPolicy"]["from"]


def test_the_service_account_has_no_token() -> None:
    found = one({}, "ServiceAccount")
    assert found["automountServiceAccountToken"] is False
    assert pod_of({})["serviceAccountName"] == found["metadata"]["name"]
    assert maybe(SHARED, "ServiceAccount") is None
    assert pod_of(SHARED)["serviceAccountName"] == "default"


def test_the_hubs_token_lies_in_a_secret_alone() -> None:
    found = one(HUB, "Secret", f"{HUB_NAME}-hub")
    assert base64.b64decode(found["data"]["token"]) == b"hf_secret"
    assert "hf_secret" not in str([one(HUB, "StatefulSet", HUB_NAME), one(HUB, "ConfigMap", HUB_NAME)])


def test_the_service_monitor_finds_one_service() -> None:
    assert maybe({}, "ServiceMonitor") is None
    found = one(HUB, "ServiceMonitor", HUB_NAME)
    assert found["apiVersion"] == "monitoring.coreos.com/v1"
    assert found["metadata"]["labels"]["release"] == "prometheus"
    selector = found["spec"]["selector"]["matchLabels"]
    service = one(HUB, "Service", HUB_NAME)
    assert selector.items() <= service["metadata"]["labels"].items()
    for other in (f"{HUB_NAME}-pods", f"{HUB_NAME}-redis"):  # each pod would be scraped twice
        assert not selector.items() <= one(HUB, "Service", other)["metadata"]["labels"].items()
    (endpoint,) = found["spec"]["endpoints"]
    assert endpoint == {"port": service["spec"]["ports"][0]["name"], "path": "/metrics", "interval": "15s"}


def test_helm_test_asks_the_service_whether_it_is_ready() -> None:
    found = one({}, "Pod", f"{FULLNAME}-ready")
    assert found["metadata"]["annotations"]["helm.sh/hook"] == "test"
    (container,) = found["spec"]["containers"]
    assert container["command"][-1] == f"http://{FULLNAME}:80/health/ready"
    assert container["image"] == pod_of({})["containers"][0]["image"]
    assert not _selects(one({}, "Service")["spec"]["selector"], {"spec": {"template": found}})


def test_redis_is_off_unless_wanted() -> None:
    assert maybe({}, "StatefulSet", f"{FULLNAME}-redis") is None
    assert maybe({}, "Secret", f"{FULLNAME}-redis") is None
    assert maybe({}, "NetworkPolicy", f"{FULLNAME}-redis") is None


def test_redis_lets_the_servers_in_and_nobody_out() -> None:
    redis = one(HUB, "StatefulSet", f"{HUB_NAME}-redis")
    spec = one(HUB, "NetworkPolicy", f"{HUB_NAME}-redis")["spec"]
    assert _selects(spec["podSelector"]["matchLabels"], redis)
    (rule,) = spec["ingress"]
    (source,) = rule["from"]
    assert _selects(source["podSelector"]["matchLabels"], one(HUB, "StatefulSet", HUB_NAME))
    assert not _selects(source["podSelector"]["matchLabels"], redis)
    assert (spec["policyTypes"], spec["egress"]) == (["Ingress", "Egress"], [])
    service = one(HUB, "Service", f"{HUB_NAME}-redis")["spec"]
    assert _selects(service["selector"], redis)
    assert not _selects(one(HUB, "Service", HUB_NAME)["spec"]["selector"], redis)


def test_the_password_of_redis_is_random_or_theirs() -> None:
    def reference(values: object, name: str) -> dict[str, str]:
        (container,) = pod_of(values, "StatefulSet", name)["containers"]  # type: ignore[arg-type]
        found: dict[str, str] = environment(container)["REDISCLI_AUTH"]["secretKeyRef"]
        return found

    ours = reference(HUB, f"{HUB_NAME}-redis")
    password = base64.b64decode(one(HUB, "Secret", ours["name"])["data"][ours["key"]])
    assert len(password) == 32
    bare = reference(BARE, f"{FULLNAME}-redis")
    assert base64.b64decode(one(BARE, "Secret", bare["name"])["data"][bare["key"]]) != password
    assert reference(SHARED, f"{FULLNAME}-redis") == {"name": "redis", "key": "password"}
    assert maybe(SHARED, "Secret", f"{FULLNAME}-redis") is None


@pytest.mark.timeout(60)
@pytest.mark.needs("redis", "linux")
@pytest.mark.parametrize("password", ["plain", 'a"b\\c $d %s'])
def test_redis_asks_for_the_password_that_it_was_given(password: str, tmp_path: Path) -> None:
    """The container's own command and probe, with this test's folders and a socket for the port."""
    (container,) = pod_of(HUB, "StatefulSet", f"{HUB_NAME}-redis")["containers"]
    socket = tmp_path / "redis.sock"
    shell, flags, script = container["command"]
    script = script.replace("/tmp/", f"{tmp_path}/").replace("/data", str(tmp_path)).rstrip()
    with_password = {"PATH": os.environ["PATH"], "REDISCLI_AUTH": password}

    def probe(variables: dict[str, str]) -> int:
        *start, command = container["readinessProbe"]["exec"]["command"]
        ask = command.replace("redis-cli", f"redis-cli -s {socket}")
        return subprocess.run([*start, ask], env=variables, capture_output=True, timeout=20, check=False).returncode

    with subprocess.Popen(
        [shell, flags, f"{script} --port 0 --unixsocket {socket}"],
        env=with_password,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as redis:
        try:
            assert redis.stdout is not None
            assert any("ready to accept connections" in line for line in redis.stdout)  # ends when Redis does
            assert probe(with_password) == 0
            assert probe({"PATH": os.environ["PATH"]}) != 0
            assert (tmp_path / "redis.conf").stat().st_mode & 0o077 == 0
        finally:
            redis.terminate()
            redis.communicate(timeout=20)
