"""The chart as Helm renders it, without a cluster."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "helm" / "foretoken"
RELEASE = "blue"
FULLNAME = "blue-foretoken"
TIMEOUT_S = 60

Values = Mapping[str, Any]
Object = dict[str, Any]

VALUE_SETS: dict[str, Values] = {
    "default": {},
    "hub": {  # a gated model on GPUs, a volume for each pod, everything optional switched on
        "nameOverride": "moe",
        "model": {"name": "Qwen/Qwen3-30B-A3B", "revision": "main", "servedName": "qwen"},
        "huggingFace": {"token": "hf_secret", "endpoint": "https://mirror.example"},
        "settings": {"kv_cache_bytes": 68719476736, "drain_timeout_s": 2.5, "prefix_cache": False},
        "server": {"gpus": 1, "runtimeClassName": "nvidia", "resources": {"limits": {"cpu": 8, "memory": "64Gi"}}},
        "cache": {"kind": "perPod", "size": "100Gi", "storageClass": "fast"},
        "service": {"type": "LoadBalancer", "annotations": {"example.com/internal": "true"}},
        "ingress": {
            "enabled": True,
            "className": "nginx",
            "annotations": {"nginx.ingress.kubernetes.io/proxy-buffering": "off"},
            "hosts": ["llm.example.com", "*.llm.example.com"],
            "tlsSecret": "llm-tls",
        },
        "autoscaling": {"enabled": True, "maxReplicas": 8},
        "podDisruptionBudget": {"maxUnavailable": "50%"},
        "networkPolicy": {
            "from": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "ingress"}}}],
            "restrictEgress": True,
            "egress": [{"to": [{"ipBlock": {"cidr": "10.0.0.0/8"}}], "ports": [{"port": 8443, "protocol": "TCP"}]}],
        },
        "serviceAccount": {"annotations": {"example.com/role": "reader"}},
        "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
    },
    "shared": {  # what a platform team has already: claims, secrets, accounts, taints
        "fullnameOverride": "blue-foretoken",
        "image": {
            "repository": "registry.example:5000/team/foretoken",
            "digest": "sha256:" + "0" * 64,
            "pullPolicy": "Always",
            "pullSecrets": ["registry"],
        },
        "huggingFace": {"existingSecret": "hub", "existingSecretKey": "hf", "offline": True},
        "apiKeys": {
            "existingSecret": "llm-keys",
            "existingSecretKey": "tenants",
            "existingSecretAdminKey": "root",
            "existingSecretMetricsKey": "prometheus",
        },
        "server": {
            "replicas": 3,
            "surge": 0,
            "preStopSeconds": 0,
            "podAnnotations": {"example.com/team": "ml"},
            "podLabels": {"team": "ml"},
            "nodeSelector": {"gpu": "h100"},
            "tolerations": [{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}],
            "affinity": {
                "nodeAffinity": {
                    "requiredDuringSchedulingIgnoredDuringExecution": {
                        "nodeSelectorTerms": [{"matchExpressions": [{"key": "gpu", "operator": "Exists"}]}]
                    }
                }
            },
            "priorityClassName": "high",
            "extraEnv": [{"name": "HTTPS_PROXY", "value": "http://proxy:3128"}],
        },
        "cache": {"kind": "existingClaim", "existingClaim": "models"},
        "service": {"type": "NodePort"},
        "serviceAccount": {"create": False},
    },
    "bare": {
        "server": {"hostMaxSkew": 0},
        "podDisruptionBudget": {"enabled": False},
        "networkPolicy": {"enabled": False},
    },
    "cluster": {"mode": "cluster", "redis": {"enabled": True}},  # the demo model, on CPUs
    "cluster_example": yaml.safe_load((CHART / "values-cluster.yaml").read_text()),
    "cluster_full": {  # everything optional switched on; groups of several kinds
        "mode": "cluster",
        "nameOverride": "moe",
        "huggingFace": {"token": "hf_secret"},
        "model": {"name": "Qwen/Qwen3-30B-A3B"},
        "settings": {"drain_timeout_s": 2.5, "lease_s": 0.5},
        "gateway": {
            "hostMaxSkew": 0,
            "preStopSeconds": 0,
            "podAnnotations": {"example.com/team": "ml"},
            "podLabels": {"team": "ml"},
            "nodeSelector": {"pool": "front"},
            "extraEnv": [{"name": "HTTPS_PROXY", "value": "http://proxy:3128"}],
        },
        "controller": {"replicas": 2, "nodeSelector": {"pool": "system"}},
        "worker": {
            "startupSeconds": 7200,
            "podLabels": {"team": "ml"},
            "priorityClassName": "high",
            "runtimeClassName": "nvidia",
            "extraEnv": [{"name": "NCCL_DEBUG", "value": "WARN"}],
        },
        "workerGroups": [
            {
                "name": "main",
                "role": "attention",
                "replicas": 2,
                "resources": {"requests": {"cpu": 4, "memory": "32Gi"}, "limits": {"memory": "32Gi"}},
                "cache": {"kind": "perPod", "size": "20Gi", "storageClass": "fast"},
            },
            {
                "name": "h100",
                "role": "expert",
                "replicas": 3,
                "gpus": 1,
                "hostMaxSkew": 2,
                "resources": {"requests": {"cpu": 8, "memory": "64Gi"}, "limits": {"cpu": 8, "memory": "64Gi"}},
                "nodeSelector": {"gpu": "h100"},
                "tolerations": [{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}],
                "affinity": {"podAntiAffinity": {}},
            },
            {
                "name": "main",
                "role": "expert",
                "replicas": 2,
                "gpus": 1,
                "hostMaxSkew": 0,
                "resources": {"requests": {"cpu": 16, "memory": "128Gi"}, "limits": {"memory": "128Gi"}},
                "cache": {"kind": "existingClaim", "existingClaim": "models"},
            },
        ],
        "service": {"type": "LoadBalancer"},
        "ingress": {"enabled": True, "hosts": ["llm.example.com"]},
        "autoscaling": {"enabled": True, "maxReplicas": 8},
        "podDisruptionBudget": {"maxUnavailable": "50%"},
        "networkPolicy": {
            "restrictEgress": True,
            "egress": [{"to": [{"ipBlock": {"cidr": "10.0.0.0/8"}}], "ports": [{"port": 8443, "protocol": "TCP"}]}],
        },
        "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
        "redis": {"enabled": True, "storageClass": "fast", "image": {"digest": "sha256:" + "1" * 64}},
    },
    "cluster_shared": {  # what a platform team has already: a Redis, secrets, a claim with the model in a folder
        "mode": "cluster",
        "image": {"pullSecrets": ["registry"]},
        "model": {"name": "/var/lib/foretoken/models/qwen3"},
        "apiKeys": {"existingSecret": "llm-keys"},
        "clusterToken": {"existingSecret": "tokens", "existingSecretKey": "cluster"},
        "store": {"existingSecret": "store", "existingSecretKey": "redis", "namespace": "llm-blue"},
        "cache": {"kind": "existingClaim", "existingClaim": "models"},
        "podDisruptionBudget": {"enabled": False},
        "networkPolicy": {"restrictEgress": True},
        "serviceAccount": {"create": False},
    },
    "cluster_bare": {
        "mode": "cluster",
        "networkPolicy": {"enabled": False},
        "redis": {"enabled": True, "existingSecret": "redis"},
    },
}
SERVER_SETS = [name for name in VALUE_SETS if not name.startswith("cluster")]
CLUSTER_SETS = [name for name in VALUE_SETS if name.startswith("cluster")]


def helm(*arguments: str, values: Values | None = None) -> subprocess.CompletedProcess[str]:
    """Run Helm with these values, with no cluster and nothing of this user's to ask."""
    program = shutil.which("helm")
    assert program is not None
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "values.json"  # JSON is YAML
        file.write_text(json.dumps(values or {}))
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("HELM_", "KUBE", "XDG_"))}
        return subprocess.run(
            [program, *arguments, "--values", str(file)],
            env=clean | {"HOME": folder},
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )


def refusal(values: Values) -> str:
    """What Helm says to values that it must not take."""
    done = helm("template", RELEASE, str(CHART), values=values)
    assert done.returncode != 0, "Helm took the values"
    return done.stderr


@functools.cache
def _rendered(values: str) -> str:
    done = helm("template", RELEASE, str(CHART), "--namespace", "llm", values=json.loads(values))
    assert done.returncode == 0, done.stderr
    return done.stdout


def rendered(values: Values) -> str:
    """Every object as YAML, each with a comment that names its template."""
    return _rendered(json.dumps(values, sort_keys=True))


@functools.cache
def _parsed(text: str) -> list[Object]:
    return [found for found in yaml.load_all(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader)) if found]


def objects(values: Values) -> list[Object]:
    """What is rendered; to be read, not written."""
    return _parsed(rendered(values))


def one(values: Values, kind: str, name: str = FULLNAME) -> Object:
    (found,) = [o for o in objects(values) if o["kind"] == kind and o["metadata"]["name"] == name]
    return found


def every(values: Values, kind: str) -> dict[str, Object]:
    """All objects of a kind, by name."""
    return {o["metadata"]["name"]: o for o in objects(values) if o["kind"] == kind}


def maybe(values: Values, kind: str, name: str = FULLNAME) -> Object | None:
    return next((o for o in objects(values) if o["kind"] == kind and o["metadata"]["name"] == name), None)


def selects(selector: Mapping[str, Any], workload: Object) -> bool:
    """Whether a selector (labels, or what a NetworkPolicy or a workload has) picks this workload's pods."""
    labels: dict[str, str] = workload["spec"]["template"]["metadata"]["labels"]
    if not {"matchLabels", "matchExpressions"} & set(selector):
        selector = {"matchLabels": selector}
    wanted, expressions = selector.get("matchLabels", {}), selector.get("matchExpressions", [])
    assert wanted or expressions, "it would pick every pod of the namespace"
    assert {expression["operator"] for expression in expressions} <= {"In"}
    return wanted.items() <= labels.items() and all(labels.get(e["key"]) in e["values"] for e in expressions)


def pod_of(values: Values, kind: str = "Deployment", name: str = FULLNAME) -> Object:
    """The pod template's `spec`."""
    spec: Object = one(values, kind, name)["spec"]["template"]["spec"]
    return spec


def serve_yaml(values: Values, name: str = FULLNAME) -> str:
    text: str = one(values, "ConfigMap", name)["data"]["serve.yaml"]
    return text


def environment(container: Object) -> dict[str, Any]:
    """Name -> value, or what it is taken from."""
    return {entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in container["env"]}
