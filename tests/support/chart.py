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
        "redis": {"enabled": True, "storageClass": "fast"},
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
        "redis": {"enabled": True, "existingSecret": "redis", "image": {"digest": "sha256:" + "1" * 64}},
    },
    "bare": {
        "server": {"hostMaxSkew": 0},
        "podDisruptionBudget": {"enabled": False},
        "networkPolicy": {"enabled": False},
        "redis": {"enabled": True},
    },
}


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


def objects(values: Values) -> list[Object]:
    return [found for found in yaml.safe_load_all(rendered(values)) if found]


def one(values: Values, kind: str, name: str = FULLNAME) -> Object:
    (found,) = [o for o in objects(values) if o["kind"] == kind and o["metadata"]["name"] == name]
    return found


def maybe(values: Values, kind: str, name: str = FULLNAME) -> Object | None:
    return next((o for o in objects(values) if o["kind"] == kind and o["metadata"]["name"] == name), None)


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
