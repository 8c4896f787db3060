"""What mode cluster makes of each template, and who may talk to whom."""

from __future__ import annotations

import base64

import pytest

from tests.support.chart import (
    CLUSTER_SETS,
    FULLNAME,
    SERVER_SETS,
    VALUE_SETS,
    Object,
    Values,
    environment,
    every,
    maybe,
    objects,
    one,
    selects,
)

pytestmark = pytest.mark.needs("helm")

PLAIN = VALUE_SETS["cluster"]
FULL = VALUE_SETS["cluster_full"]
FULL_NAME = "blue-moe"
SHARED = VALUE_SETS["cluster_shared"]
BARE = VALUE_SETS["cluster_bare"]
CLUSTERS = pytest.mark.parametrize("values", [VALUE_SETS[name] for name in CLUSTER_SETS], ids=CLUSTER_SETS)


def _component(found: Object) -> str:
    component: str = found["metadata"]["labels"]["app.kubernetes.io/component"]
    return component


def _container(workload: Object) -> Object:
    (container,) = workload["spec"]["template"]["spec"]["containers"]
    return container


def _workloads(values: Values) -> dict[str, Object]:
    return every(values, "Deployment") | every(values, "StatefulSet")


@pytest.mark.parametrize("name", SERVER_SETS)
def test_a_server_brings_nothing_of_a_cluster(name: str) -> None:
    values = VALUE_SETS[name]
    assert {_component(found) for found in objects(values)} <= {"server", "pods", "test"}
    assert len(_workloads(values)) == 1


@CLUSTERS
def test_a_cluster_brings_no_server(values: Values) -> None:
    components = {_component(found) for found in objects(values)}
    assert components - {"redis"} == {"gateway", "controller", "worker", "test"}
    assert len(_workloads(values)) >= 4


def test_the_front_door_leads_to_the_gateways() -> None:
    gateway = one(FULL, "Deployment", f"{FULL_NAME}-gateway")
    service = one(FULL, "Service", FULL_NAME)
    chosen = [name for name, found in _workloads(FULL).items() if selects(service["spec"]["selector"], found)]
    assert chosen == [f"{FULL_NAME}-gateway"]
    assert service["spec"]["ports"][0]["targetPort"] == _container(gateway)["ports"][0]["name"]
    assert service["spec"]["type"] == "LoadBalancer"
    (rule,) = one(FULL, "Ingress", FULL_NAME)["spec"]["rules"]
    assert rule["http"]["paths"][0]["backend"]["service"]["name"] == FULL_NAME
    assert gateway["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}


def test_the_autoscaler_follows_the_gateways_open_requests() -> None:
    from prometheus_client import CollectorRegistry, generate_latest

    from cluster.metrics import GatewayMetrics

    spec = one(FULL, "HorizontalPodAutoscaler", f"{FULL_NAME}-gateway")["spec"]
    target = spec["scaleTargetRef"]
    assert "replicas" not in one(FULL, target["kind"], target["name"])["spec"]
    assert one(PLAIN, "Deployment", f"{FULLNAME}-gateway")["spec"]["replicas"] == 2
    (metric,) = spec["metrics"]
    assert metric["pods"]["target"] == {"type": "AverageValue", "averageValue": "256"}
    registry = CollectorRegistry()
    GatewayMetrics(registry, model_name="m")
    assert f"{metric['pods']['metric']['name']}{{".encode() in generate_latest(registry).replace(b":", b"_")
    chosen = {**FULL, "autoscaling": {"enabled": True, "metric": "requests", "targetPerPod": 9}}
    (metric,) = one(chosen, "HorizontalPodAutoscaler", f"{FULL_NAME}-gateway")["spec"]["metrics"]
    assert (metric["pods"]["metric"]["name"], metric["pods"]["target"]["averageValue"]) == ("requests", "9")


def test_the_service_monitor_finds_the_gateways_alone() -> None:
    selector = one(FULL, "ServiceMonitor", FULL_NAME)["spec"]["selector"]["matchLabels"]
    found = [n for n, s in every(FULL, "Service").items() if selector.items() <= s["metadata"]["labels"].items()]
    assert found == [FULL_NAME]


def test_one_controller_is_replaced_and_two_take_turns() -> None:
    assert one(PLAIN, "Deployment", f"{FULLNAME}-controller")["spec"]["strategy"] == {"type": "Recreate"}
    two = one(FULL, "Deployment", f"{FULL_NAME}-controller")["spec"]
    assert two["replicas"] == 2
    assert two["strategy"]["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": 1}


@CLUSTERS
def test_each_group_of_workers_is_a_stateful_set_of_its_own(values: Values) -> None:
    sets = {name: found for name, found in every(values, "StatefulSet").items() if _component(found) == "worker"}
    for found in sets.values():
        spec = found["spec"]
        mine = [name for name, other in _workloads(values).items() if selects(spec["selector"], other)]
        assert mine == [found["metadata"]["name"]]
        governing = one(values, "Service", spec["serviceName"])["spec"]
        assert governing["clusterIP"] == "None"
        assert governing["publishNotReadyAddresses"] is True
        assert selects(governing["selector"], found)
        assert spec["podManagementPolicy"] == "Parallel"
        assert spec["minReadySeconds"] > 0
    if "workerGroups" in values:
        groups = [(f"{group['role']}-{group['name']}", group["replicas"]) for group in values["workerGroups"]]
        assert [(name.split("-", 2)[2], found["spec"]["replicas"]) for name, found in sets.items()] == groups


def test_each_group_has_a_disruption_budget() -> None:
    budgets = every(FULL, "PodDisruptionBudget")
    workloads = {name: found for name, found in _workloads(FULL).items() if _component(found) in ("worker", "gateway")}
    assert set(budgets) == set(workloads)
    for name, budget in budgets.items():
        assert budget["spec"]["maxUnavailable"] == "50%"
        assert [n for n, w in _workloads(FULL).items() if selects(budget["spec"]["selector"], w)] == [name]
    assert every(SHARED, "PodDisruptionBudget") == {}


def _let_in(values: Values, policy: str) -> list[tuple[set[str], list[str | int]]]:
    """Each rule of a policy: which workloads it lets in, at which ports (none: all)."""
    rules = one(values, "NetworkPolicy", policy)["spec"]["ingress"]
    return [
        (
            {n for n, w in _workloads(values).items() for source in rule["from"] if selects(source["podSelector"], w)},
            [port["port"] for port in rule.get("ports", [])],
        )
        for rule in rules
    ]


def test_workers_are_open_to_this_release_alone() -> None:
    workers = {name for name, found in _workloads(FULL).items() if _component(found) == "worker"}
    policy = one(FULL, "NetworkPolicy", f"{FULL_NAME}-worker")["spec"]
    assert {n for n, w in _workloads(FULL).items() if selects(policy["podSelector"], w)} == workers
    callers, peers = _let_in(FULL, f"{FULL_NAME}-worker")
    assert callers == ({f"{FULL_NAME}-gateway", f"{FULL_NAME}-controller"}, ["grpc"])
    assert peers == (workers, [])  # tensor links take any port
    for rule in policy["ingress"]:
        for source in rule["from"]:
            assert set(source) == {"podSelector"}  # of this namespace
            assert source["podSelector"]["matchLabels"]["app.kubernetes.io/instance"] == "blue"


def test_nobody_connects_to_the_controller() -> None:
    policy = one(PLAIN, "NetworkPolicy", f"{FULLNAME}-controller")["spec"]
    chosen = [name for name, found in _workloads(PLAIN).items() if selects(policy["podSelector"], found)]
    assert chosen == [f"{FULLNAME}-controller"]
    assert (policy["policyTypes"], policy["ingress"]) == (["Ingress"], [])


def test_clients_reach_the_gateways_alone() -> None:
    policy = one(PLAIN, "NetworkPolicy")["spec"]
    chosen = [name for name, found in _workloads(PLAIN).items() if selects(policy["podSelector"], found)]
    assert chosen == [f"{FULLNAME}-gateway"]
    assert policy["ingress"] == [{"ports": [{"port": "http", "protocol": "TCP"}], "from": [{"podSelector": {}}]}]
    assert every(BARE, "NetworkPolicy") == {}


@pytest.mark.parametrize("policy", ["", "-worker", "-controller"])
def test_processes_that_are_held_in_still_reach_each_other(policy: str) -> None:
    def ways(values: Values, name: str) -> list[tuple[set[str], list[int]]]:
        """The workloads of this release that each rule leads to, and at which ports (none: all)."""
        spec = one(values, "NetworkPolicy", name + policy)["spec"]
        assert spec["policyTypes"] == ["Ingress", "Egress"]
        to_pods = [rule for rule in spec["egress"] if "podSelector" in rule.get("to", [{}])[0]]
        return [
            (
                {n for n, w in _workloads(values).items() for to in rule["to"] if selects(to["podSelector"], w)},
                [port["port"] for port in rule.get("ports", [])],
            )
            for rule in to_pods
        ]

    workers = {name: found for name, found in _workloads(FULL).items() if _component(found) == "worker"}
    listening = {_container(found)["ports"][0]["containerPort"] for found in workers.values()}
    ours = [({*workers}, [*listening]), ({f"{FULL_NAME}-redis"}, [6379])]
    tensor_links: list[tuple[set[str], list[int]]] = [({*workers}, [])] if policy == "-worker" else []
    assert ways(FULL, FULL_NAME) == tensor_links + ours
    egress = one(FULL, "NetworkPolicy", FULL_NAME + policy)["spec"]["egress"]
    everywhere = [rule for rule in egress if "to" not in rule]
    assert [[port["port"] for port in rule["ports"]] for rule in everywhere] == [[53, 53, 443]]
    assert FULL["networkPolicy"]["egress"][0] in egress
    assert len(ways(SHARED, FULLNAME)) == len(tensor_links) + 1  # a Redis of theirs is named in networkPolicy.egress


def test_the_token_is_random_or_theirs() -> None:
    def references(values: Values) -> list[dict[str, str]]:
        processes = [found for found in _workloads(values).values() if _component(found) != "redis"]
        return [environment(_container(found))["FORETOKEN_TOKEN"]["secretKeyRef"] for found in processes]

    def token(values: Values) -> bytes:
        ours = references(values)
        assert all(reference == ours[0] for reference in ours)
        return base64.b64decode(one(values, "Secret", ours[0]["name"])["data"][ours[0]["key"]])

    assert len(token(PLAIN)) == 48
    assert token(FULL) != token(PLAIN)
    assert all(reference == {"name": "tokens", "key": "cluster"} for reference in references(SHARED))
    assert every(SHARED, "Secret") == {}


def test_a_store_of_theirs_is_named_in_a_secret() -> None:
    for workload in _workloads(SHARED).values():
        variables = environment(_container(workload))
        assert variables["FORETOKEN_STORE"] == {"secretKeyRef": {"name": "store", "key": "redis"}}
        assert "REDIS_PASSWORD" not in variables


@CLUSTERS
def test_a_pod_gets_the_secrets_that_it_needs(values: Values) -> None:
    store = "REDIS_PASSWORD" if values.get("redis", {}).get("enabled") else "FORETOKEN_STORE"
    for workload in _workloads(values).values():
        variables = environment(_container(workload))
        given = {name for name, value in variables.items() if isinstance(value, dict) and "secretKeyRef" in value}
        if _component(workload) == "redis":
            assert given == {"REDISCLI_AUTH"}
        else:
            keys = {"FORETOKEN_API_KEY", "FORETOKEN_ADMIN_API_KEY"}
            assert given - {"HF_TOKEN"} - keys == {"FORETOKEN_TOKEN", store}
            assert ("FORETOKEN_API_KEY" in given) == (_component(workload) == "gateway")
            assert ("FORETOKEN_ADMIN_API_KEY" in given) == (_component(workload) == "gateway" and values is not SHARED)


@CLUSTERS
def test_no_secret_stands_outside_of_a_secret(values: Values) -> None:
    secrets = [base64.b64decode(v).decode() for s in every(values, "Secret").values() for v in s["data"].values()]
    assert len(set(secrets)) == len(secrets)
    rest = str([found for found in objects(values) if found["kind"] != "Secret"])
    assert not [secret for secret in secrets if secret in rest]


def test_helm_test_asks_the_gateways_service() -> None:
    found = one(PLAIN, "Pod", f"{FULLNAME}-ready")
    assert found["spec"]["containers"][0]["command"][-1] == f"http://{FULLNAME}:80/health/ready"
    assert maybe(PLAIN, "Service") is not None
