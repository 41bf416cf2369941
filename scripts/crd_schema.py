"""Write tests/data/crds: schemas of other projects' kinds, small enough to commit.

    python scripts/crd_schema.py CRD.yaml VERSION

CRD.yaml is the file that PROJECTS names, at the tag VERSION. Descriptions and status are left out; a part
that occurs several times is written once.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

TARGET = Path(__file__).resolve().parent.parent / "tests/data/crds"
SHARED_CHARS = 300
PROJECTS = {
    "RayService": ("ray-project/kuberay", "helm-chart/kuberay-operator/crds"),
    "ServiceMonitor": (
        "prometheus-operator/prometheus-operator",
        "example/prometheus-operator-crd",
    ),
    "PrometheusRule": (
        "prometheus-operator/prometheus-operator",
        "example/prometheus-operator-crd",
    ),
    "ScaledObject": ("kedacore/keda", "config/crd/bases"),
    "HTTPRoute": ("kubernetes-sigs/gateway-api", "config/crd/standard"),
    "InferencePool": ("kubernetes-sigs/gateway-api-inference-extension", "config/crd/bases"),
}
NOTICE = (
    "From https://github.com/{}, {}: the {} schema in {}, without descriptions and status. Licensed under "
    "the Apache License 2.0. Written by scripts/crd_schema.py."
)


def without_texts(node: Any) -> Any:
    if isinstance(node, dict):
        return {
            key: without_texts(value)
            for key, value in node.items()
            if not (key == "description" and isinstance(value, str))
        }
    return [without_texts(part) for part in node] if isinstance(node, list) else node


def count_parts(node: Any, counts: Counter[str]) -> None:
    if isinstance(node, dict):
        if "type" in node and len(text := json.dumps(node, sort_keys=True)) >= SHARED_CHARS:
            counts[text] += 1
        for value in node.values():
            count_parts(value, counts)


def shared(node: Any, names: dict[str, str], *, inside: bool = True) -> Any:
    """`node` with each part of `names` replaced by a reference."""
    if not isinstance(node, dict):
        return node
    name = names.get(json.dumps(node, sort_keys=True)) if inside else None
    if name is not None:
        return {"$ref": f"#/$defs/{name}"}
    return {key: shared(value, names) for key, value in node.items()}


def main() -> None:
    source, tag = Path(sys.argv[1]), sys.argv[2]
    crd = yaml.safe_load(source.read_text(encoding="utf-8"))
    kind = crd["spec"]["names"]["kind"]
    project, folder = PROJECTS[kind]
    (version,) = (each for each in crd["spec"]["versions"] if each["storage"])
    schema = without_texts(version["schema"]["openAPIV3Schema"])
    schema["properties"].pop("status", None)
    counts: Counter[str] = Counter()
    count_parts(schema, counts)
    repeated = [text for text, count in counts.items() if count > 1]
    names = {text: f"part{index}" for index, text in enumerate(repeated)}
    notice = NOTICE.format(project, tag, version["name"], f"{folder}/{source.name}")
    small = {"$comment": notice, **shared(schema, names)}
    small["$defs"] = {
        name: shared(json.loads(text), names, inside=False) for text, name in names.items()
    }
    target = TARGET / f"{kind.lower()}.json"
    target.write_text(json.dumps(small, separators=(",", ":")) + "\n", encoding="utf-8")
    print(f"{target}: {target.stat().st_size} bytes")


if __name__ == "__main__":
    main()
