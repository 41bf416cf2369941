"""Write tests/data/kuberay/rayservice.json: KubeRay's schema of a RayService, small enough to commit.

    python scripts/kuberay_schema.py ray.io_rayservices.yaml VERSION

The file is the CRD in helm-chart/kuberay-operator/crds of github.com/ray-project/kuberay
at the tag VERSION. Descriptions and status are left out; a part that occurs several times is written once.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

TARGET = Path(__file__).resolve().parent.parent / "tests/data/kuberay/rayservice.json"
SHARED_CHARS = 300
NOTICE = (
    "From KubeRay {}, https://github.com/ray-project/kuberay: the v1 schema in "
    "helm-chart/kuberay-operator/crds/ray.io_rayservices.yaml, without descriptions and status. Licensed "
    "under the Apache License 2.0. Written by scripts/kuberay_schema.py."
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
    source, version = sys.argv[1:]
    crd = yaml.safe_load(Path(source).read_text(encoding="utf-8"))
    (v1,) = (each for each in crd["spec"]["versions"] if each["name"] == "v1")
    schema = without_texts(v1["schema"]["openAPIV3Schema"])
    del schema["properties"]["status"]
    counts: Counter[str] = Counter()
    count_parts(schema, counts)
    repeated = [text for text, count in counts.items() if count > 1]
    names = {text: f"part{index}" for index, text in enumerate(repeated)}
    small = {"$comment": NOTICE.format(version), **shared(schema, names)}
    small["$defs"] = {
        name: shared(json.loads(text), names, inside=False) for text, name in names.items()
    }
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    TARGET.write_text(json.dumps(small, separators=(",", ":")) + "\n", encoding="utf-8")
    print(f"{TARGET}: {TARGET.stat().st_size} bytes")


if __name__ == "__main__":
    main()
