"""helm, Kubernetes' schemas, and what a manifest says, for the tests beside this file."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
CHART = DEPLOY / "helm/quire"
VERSIONS = tuple(f"1.{minor}" for minor in range(30, 38))
Manifest = dict[str, Any]


@functools.cache
def tools() -> Path:
    """The folder with the programs. Skips without it, but fails in CI."""
    environment = os.environ | {"VENV": sys.prefix}
    made = subprocess.run(
        [ROOT / "scripts/install-deploy-tools"], capture_output=True, text=True, env=environment
    )
    if made.returncode:
        if os.environ.get("CI"):
            raise AssertionError(made.stderr)
        pytest.skip(f"scripts/install-deploy-tools: {made.stderr.strip()[-300:]}")
    folder = Path(made.stdout.split()[-1])
    if str(folder / "python") not in sys.path:
        sys.path.append(str(folder / "python"))
    return folder


def run(name: str, *words: str | Path, fails: bool = False, cwd: Path | None = None) -> str:
    """The output of one of the programs, errors included."""
    command = [tools() / "bin" / name, *words]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=cwd, timeout=120
    )
    assert (done.returncode != 0) == fails, done.stdout
    return done.stdout


VALUES: dict[str, Manifest] = {
    "default": {},
    "cpu": {
        "replicaCount": 2,
        "model": {"name": "HuggingFaceTB/SmolLM2-135M-Instruct", "servedName": "smol"},
        "config": {"max_num_seqs": 32, "max_model_len": "4k", "swap_space": 1},
        "apiKey": {"existingSecret": "quire-api-key"},
        "apiKeysFile": {"existingSecret": "quire-keys", "key": "tenants.toml"},
        "admin": {"enabled": True, "host": "0.0.0.0", "existingSecret": "quire-admin-key"},
        "resources": {
            "requests": {"cpu": "8", "memory": "16Gi"},
            "limits": {"memory": "16Gi"},
        },
        "persistence": {"accessModes": ["ReadWriteMany"], "storageClass": "nfs"},
        "kvDisk": {"enabled": True},
        "podAnnotations": {"team": "search"},
    },
    "gpu": {
        "profile": "gpu",
        "model": {"name": "meta-llama/Llama-3.1-8B-Instruct"},
        "hfToken": {"existingSecret": "hub"},
        "nodeSelector": {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"},
        "tolerations": [{"key": "dedicated", "operator": "Exists"}],
        "runtimeClassName": "nvidia",
    },
    "gpu-tensor-parallel": {
        "profile": "gpu",
        "model": {"name": "/models/llama-70b", "servedName": "llama", "download": False},
        "persistence": {"existingClaim": "weights"},
        "config": {"tensor_parallel_size": 4, "gpu_memory_utilization": 0.92},
        "resources": {
            "requests": {"cpu": "16", "memory": "200Gi", "nvidia.com/gpu": "4"},
            "limits": {"memory": "200Gi", "nvidia.com/gpu": "4"},
        },
        "startupSeconds": 1800,
        "updateStrategy": {"type": "Recreate"},
    },
    "monitored": {
        "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
        "prometheusRule": {
            "enabled": True,
            "alerts": {
                "QuireQueueLong": {"threshold": 50, "for": "20m", "severity": "critical"},
                "QuireTierOff": {"enabled": False},
            },
            "runbookUrl": "https://runbooks.example/quire",
        },
        "dashboards": {"enabled": True, "annotations": {"grafana_folder": "Inference"}},
        "autoscaling": {"enabled": True, "authenticationRef": "prometheus"},
        "model": {"servedName": 'a "model"'},
    },
    "gateway": {
        "httpRoute": {
            "enabled": True,
            "parentRefs": [{"name": "gateway", "namespace": "gateway"}],
            "hostnames": ["llm.example"],
            "timeout": "0s",
        },
        "inferencePool": {"enabled": True, "endpointPicker": "quire-epp"},
        "networkPolicy": {
            "clients": [{"namespaceSelector": {"matchLabels": {"name": "gateway"}}}],
            "extraEgress": [{"ports": [{"port": 4318}]}],
        },
    },
    "disaggregation": {
        "model": {"name": "org/model"},
        "apiKey": {"existingSecret": "quire-api-key", "key": "k"},
        "disaggregation": {
            "enabled": True,
            "kvKey": {"existingSecret": "quire-kv"},
            "podNetwork": "10.244.0.0/16",
            "prefill": {"replicas": 2, "config": {"max_num_batched_tokens": 8192}},
            "decode": {"replicas": 3, "resources": {"requests": {"cpu": "2", "memory": "4Gi"}}},
        },
        "serviceMonitor": {"enabled": True},
    },
    "minimal": {
        "serviceAccount": {"create": False},
        "networkPolicy": {"enabled": False},
        "podDisruptionBudget": {"enabled": False},
        "persistence": {"enabled": False},
        "model": {"name": "org/model"},
        "config": {"revision": "abc123"},
        "fullnameOverride": "llm",
        "extraArgs": ["--enable-lora", "--lora-modules=a=/models/a"],
        "extraEnv": [{"name": "QUIRE_LOG_LEVEL", "value": "DEBUG"}],
        "extraVolumes": [{"name": "more", "emptyDir": {}}],
        "extraVolumeMounts": [{"name": "more", "mountPath": "/more"}],
        "image": {"digest": "sha256:" + "0" * 64, "repository": "registry.example/quire"},
        "imagePullSecrets": [{"name": "pull"}],
    },
}
IMAGE_VOLUME = {"model": {"name": "/model", "image": "registry.example/model@sha256:" + "1" * 64}}
"""Needs Kubernetes 1.35."""


@functools.cache
def rendered(name: str, version: str = VERSIONS[-1]) -> tuple[Manifest, ...]:
    """What the chart makes of one of VALUES. Do not change it."""
    return render(IMAGE_VOLUME if name == "image-volume" else VALUES[name], version)


def render(values: Manifest, version: str = VERSIONS[-1]) -> tuple[Manifest, ...]:
    text = run("helm", *command(values, version))
    return tuple(part for part in yaml.safe_load_all(text) if part)


def command(values: Manifest, version: str = VERSIONS[-1]) -> list[str]:
    pairs = [
        word
        for name, value in values.items()
        for word in ("--set-json", f"{name}={json.dumps(value)}")
    ]
    return [
        "template",
        "llm",
        str(CHART),
        "--namespace",
        "serving",
        "--kube-version",
        version,
        *pairs,
    ]


def of_kind(manifests: tuple[Manifest, ...], *kinds: str) -> list[Manifest]:
    return [each for each in manifests if each["kind"] in kinds]


def pods(manifests: tuple[Manifest, ...]) -> Iterator[tuple[str, Manifest]]:
    """Name and pod spec of each workload."""
    for each in of_kind(manifests, "Deployment", "StatefulSet"):
        yield each["metadata"]["name"], each["spec"]["template"]["spec"]
    for each in of_kind(manifests, "Pod"):
        yield each["metadata"]["name"], each["spec"]


def closed(node: Any) -> Any:
    """A schema that allows only the fields that it names, as `kubectl apply --validate=strict` does."""
    if isinstance(node, list):
        return [closed(part) for part in node]
    if not isinstance(node, dict):
        return node
    inner = {key: closed(value) for key, value in node.items()}
    named = isinstance(node.get("properties"), dict) and node.get("type") == "object"
    if named and not node.get("x-kubernetes-preserve-unknown-fields"):
        inner.setdefault("additionalProperties", False)
    return inner


@functools.cache
def crd(kind: str) -> Any:
    import jsonschema

    schema = json.loads((ROOT / f"tests/data/crds/{kind.lower()}.json").read_text())
    return jsonschema.Draft202012Validator(closed(schema))


OTHERS = {
    "ServiceMonitor",
    "PrometheusRule",
    "ScaledObject",
    "HTTPRoute",
    "InferencePool",
    "RayService",
}
"""Kinds of other projects, whose schemas are in tests/data/crds."""


def faults(manifest: Manifest, version: str) -> list[str]:
    """What the schema of its kind, in a version of Kubernetes, finds wrong with it."""
    kind = manifest["kind"]
    if kind in OTHERS:
        return [f"{error.json_path}: {error.message}" for error in crd(kind).iter_errors(manifest)]
    tools()
    import kubernetes_validate

    try:
        kubernetes_validate.validate(manifest, version, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{kind}: {error.message}"]
    return []
