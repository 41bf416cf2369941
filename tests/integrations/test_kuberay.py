"""The manifests for KubeRay: fields that its schema has, and an application that Quire and Serve accept."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from quire.integrations.ray.options import read
from tests.deploy.kube import closed

jsonschema = pytest.importorskip("jsonschema")

ROOT = Path(__file__).resolve().parents[2]
MANIFESTS = sorted((ROOT / "deploy/kubernetes/kuberay").glob("*.yaml"))
SCHEMA = json.loads((ROOT / "tests/data/crds/rayservice.json").read_text())


VALIDATOR = jsonschema.Draft202012Validator(closed(SCHEMA))


def faults(manifest: Any) -> list[str]:
    return [f"{error.json_path}: {error.message}" for error in VALIDATOR.iter_errors(manifest)]


@pytest.fixture(params=MANIFESTS, ids=lambda path: path.stem)
def manifest(request: pytest.FixtureRequest) -> dict[str, Any]:
    return yaml.safe_load(request.param.read_text())


def test_there_is_one_for_cpus_and_one_for_gpus():
    assert [path.stem for path in MANIFESTS] == ["rayservice-cpu", "rayservice-gpu"]


def test_it_fits_kuberays_schema(manifest):
    assert faults(manifest) == []


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["spec", "rayClusterConfig", "rayVersoin"], "2.60.0", "'rayVersoin' was unexpected"),
        (["spec", "serveConfig"], "", "'serveConfig' was unexpected"),
        (["spec", "serveConfigV2"], {"applications": []}, "is not of type 'string'"),
        (["spec", "rayClusterConfig", "authOptions", "mode"], "none", "is not one of"),
        (
            ["spec", "rayClusterConfig", "headGroupSpec", "template", "spec", "volume"],
            [],
            "unexpected",
        ),
        (
            ["spec", "rayClusterConfig", "headGroupSpec", "rayStartParams", "num-cpus"],
            0,
            "not of type",
        ),
        (["spec", "rayClusterConfig", "workerGroupSpecs", 0, "replicas"], "1", "is not of type"),
        (["spec", "rayClusterConfig", "workerGroupSpecs", 0, "groupName"], None, "is not of type"),
    ],
)
def test_and_what_does_not_fit_is_noticed(manifest, path, value, message):
    wrong = copy.deepcopy(manifest)
    node = wrong
    for name in path[:-1]:
        node = node[name]
    node[path[-1]] = value
    assert any(message in fault for fault in faults(wrong)), faults(wrong)


def test_its_application_has_options_that_exist(manifest):
    (application,) = yaml.safe_load(manifest["spec"]["serveConfigV2"])["applications"]
    assert application["import_path"] == "quire.integrations.ray:app"
    config = read(application["args"])
    for group in manifest["spec"]["rayClusterConfig"]["workerGroupSpecs"]:
        assert group["maxReplicas"] == config.serve.max_replicas
        pod = group["template"]["spec"]
        limits = pod["containers"][0]["resources"]["limits"]
        assert limits.get("nvidia.com/gpu", 0) == (config.serve.num_gpus or 0)
        assert (config.engine.runtime.device == "cuda") == bool(config.serve.num_gpus)
        assert pod["terminationGracePeriodSeconds"] > config.server.shutdown_timeout


def test_serve_reads_its_application(manifest):
    schema = pytest.importorskip("ray.serve.schema", reason="Ray is not installed")
    schema.ServeDeploySchema.model_validate(yaml.safe_load(manifest["spec"]["serveConfigV2"]))


def test_ray_is_of_the_version_that_is_tested(manifest):
    locked = (ROOT / "requirements/dev-lock.txt").read_text().split()
    assert f"ray=={manifest['spec']['rayClusterConfig']['rayVersion']}" in locked
