"""What each template makes, and that selectors, ports and names lead from one object to the other."""

from __future__ import annotations

import base64

import pytest
import yaml

from tests.support.chart import CHART, FULLNAME, VALUE_SETS, Values, helm, maybe, one, pod_of, selects

pytestmark = pytest.mark.needs("helm")

HUB = VALUE_SETS["hub"]
HUB_NAME = "blue-moe"
SHARED = VALUE_SETS["shared"]
BARE = VALUE_SETS["bare"]


def test_a_deployment_replaces_pods_one_by_one() -> None:
    spec = one({}, "Deployment")["spec"]
    assert spec["replicas"] == 1
    assert spec["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}
    assert selects(spec["selector"]["matchLabels"], one({}, "Deployment"))
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
    assert selects(governing["selector"], found)


def test_the_cache_is_an_empty_folder_or_a_claim() -> None:
    volumes = {volume["name"]: volume for volume in pod_of({})["volumes"]}
    assert volumes["cache"] == {"name": "cache", "emptyDir": {"sizeLimit": "20Gi"}}
    volumes = {volume["name"]: volume for volume in pod_of(SHARED)["volumes"]}
    assert volumes["cache"]["persistentVolumeClaim"]["claimName"] == "models"


def test_the_service_leads_to_the_servers_port() -> None:
    service, workload = one({}, "Service"), one({}, "Deployment")
    assert service["spec"]["type"] == "ClusterIP"
    assert selects(service["spec"]["selector"], workload)
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
    from cluster.metrics.table import PREFIX, all_metrics

    (metric,) = one(HUB, "HorizontalPodAutoscaler", HUB_NAME)["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"] in {(PREFIX + spec.name).replace(":", "_") for spec in all_metrics()}


def test_the_disruption_budget_covers_the_servers() -> None:
    found = one({}, "PodDisruptionBudget")["spec"]
    assert found["maxUnavailable"] == 1
    assert selects(found["selector"]["matchLabels"], one({}, "Deployment"))
    assert one(HUB, "PodDisruptionBudget", HUB_NAME)["spec"]["maxUnavailable"] == "50%"
    assert maybe(BARE, "PodDisruptionBudget") is None


def test_the_network_policy_opens_the_client_port_alone() -> None:
    spec = one({}, "NetworkPolicy")["spec"]
    assert spec["policyTypes"] == ["Ingress"]
    assert selects(spec["podSelector"]["matchLabels"], one({}, "Deployment"))
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
    others = one(HUB, "Service", f"{HUB_NAME}-pods")["metadata"]["labels"]  # each pod would be scraped twice
    assert not selector.items() <= others.items()
    (endpoint,) = found["spec"]["endpoints"]
    credentials = {"name": f"{HUB_NAME}-keys", "key": "keys"}
    assert endpoint == {
        "port": service["spec"]["ports"][0]["name"],
        "path": "/metrics",
        "interval": "15s",
        "authorization": {"type": "Bearer", "credentials": credentials},
    }
    assert ":" not in base64.b64decode(one(HUB, "Secret", credentials["name"])["data"]["keys"]).decode()  # a key alone
    for metrics_key, expected in (("", "tenants"), ("prometheus", "prometheus")):
        keys = {"existingSecret": "llm-keys", "existingSecretKey": "tenants", "existingSecretMetricsKey": metrics_key}
        (endpoint,) = one({"serviceMonitor": {"enabled": True}, "apiKeys": keys}, "ServiceMonitor")["spec"]["endpoints"]
        assert endpoint["authorization"]["credentials"] == {"name": "llm-keys", "key": expected}


def test_helm_test_asks_the_service_whether_it_is_ready() -> None:
    found = one({}, "Pod", f"{FULLNAME}-ready")
    assert found["metadata"]["annotations"]["helm.sh/hook"] == "test"
    (container,) = found["spec"]["containers"]
    assert container["command"][-1] == f"http://{FULLNAME}:80/health/ready"
    assert container["image"] == pod_of({})["containers"][0]["image"]
    assert not selects(one({}, "Service")["spec"]["selector"], {"spec": {"template": found}})


@pytest.mark.parametrize("values", [{}, {"mode": "cluster", "redis": {"enabled": True}}])
def test_a_release_called_like_a_number_has_labels_that_are_texts(values: Values) -> None:
    done = helm("template", "123", str(CHART), values=values | {"fullnameOverride": "numbered"})
    assert done.returncode == 0, done.stderr
    for found in filter(None, yaml.safe_load_all(done.stdout)):
        assert found["metadata"]["labels"]["app.kubernetes.io/instance"] == "123"


def test_a_name_that_cannot_begin_a_services_is_refused_in_words() -> None:
    done = helm("template", "1x", str(CHART))
    assert done.returncode != 0
    assert "set fullnameOverride" in done.stderr
