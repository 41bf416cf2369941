"""What is in deploy/ besides the chart: manifests, Dockerfiles, compose, systemd."""

from __future__ import annotations

import configparser
import copy
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from tests.deploy.kube import CHART, DEPLOY, ROOT, VERSIONS, faults, of_kind, pods, run, tools
from tests.deploy.pod import Image, guide
from tests.deploy.test_chart import check_environment, restricted

from quire.cli import serve

DOCKERFILES = sorted((DEPLOY / "docker").iterdir())


@pytest.mark.parametrize("version", VERSIONS)
def test_the_guides_manifest_is_valid(version: str) -> None:
    assert [found for each in guide() for found in faults(each, version)] == []


def test_it_keeps_the_guides_names_and_ports() -> None:
    manifests = guide()
    ((_, pod),) = pods(manifests)
    (container,) = pod["containers"]
    (claim,) = of_kind(manifests, "PersistentVolumeClaim")
    (service,) = of_kind(manifests, "Service")
    probe = container["readinessProbe"]
    assert probe["httpGet"] == {"path": "/health", "port": 8000}
    assert (probe["initialDelaySeconds"], probe["periodSeconds"]) == (120, 10)
    resources = container["resources"]
    assert (resources["limits"]["memory"], resources["requests"]["memory"]) == ("32Gi", "24Gi")
    assert {each["nvidia.com/gpu"] for each in resources.values()} == {"1"}
    assert claim["metadata"]["name"] == "model-cache-pvc"
    mounts = {each["name"]: each["mountPath"] for each in container["volumeMounts"]}
    (volume,) = (each for each in pod["volumes"] if "persistentVolumeClaim" in each)
    assert volume["persistentVolumeClaim"] == {"claimName": "model-cache-pvc"}
    assert mounts[volume["name"]] == "/root/.cache/huggingface"
    assert service["spec"]["type"] == "ClusterIP"
    assert [(each["port"], each["targetPort"]) for each in service["spec"]["ports"]] == [(80, 8000)]
    assert service["spec"]["selector"].items() <= {"app": "quire"}.items()


def test_the_shape_of_other_guides_is_valid_too() -> None:
    """Their manifest, before what is marked CHANGED, still validates."""
    manifests = copy.deepcopy(guide())
    ((_, pod),) = pods(manifests)
    for key in ("securityContext", "terminationGracePeriodSeconds", "automountServiceAccountToken"):
        del pod[key]
    for key in ("startupProbe", "livenessProbe", "lifecycle", "securityContext"):
        del pod["containers"][0][key]
    assert [found for each in manifests for found in faults(each, "1.37")] == []


def test_its_command_exists_and_its_pod_is_restricted() -> None:
    ((_, pod),) = pods(guide())
    (container,) = pod["containers"]
    engine, server = serve.configs(container["args"][1:])
    assert (server.port, engine.runtime.device) == (8000, "cuda")
    sleep = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert (
        pod["terminationGracePeriodSeconds"]
        >= sleep + server.drain_delay + server.shutdown_timeout + 5
    )
    check_environment(container["env"])
    assert restricted(pod) == []


def test_kustomize_builds_it() -> None:
    built = tuple(yaml.safe_load_all(run("kubectl", "kustomize", DEPLOY / "kubernetes")))
    key = lambda each: each["kind"]  # noqa: E731
    assert sorted(built, key=key) == sorted(guide(), key=key)


def test_yaml_is_tidy() -> None:
    rules = "{extends: relaxed, rules: {line-length: {max: 140}, commas: disable, indentation: disable}}"
    files = [path for path in DEPLOY.rglob("*.yaml") if "templates" not in path.parts]
    command = ["python", "-m", "yamllint", "--strict", "-d", rules, *map(str, files)]
    import sys

    command[0] = sys.executable
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(tools() / "python"), "PATH": ""},
    )
    assert done.returncode == 0, done.stdout + done.stderr


# --- images -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_dockerfiles(path: Path) -> None:
    run("hadolint", "--strict-labels", path)
    image = Image(path)
    assert image.entrypoint == ["quire"]
    assert image.user == "10001:10001"
    serve.configs(image.command[1:])
    check_environment(
        [{"name": name} for name in image.environment if name in ("QUIRE_CACHE_DIR", "HF_HOME")]
    )
    text = path.read_text()
    assert "gcc" in text and text.count("\nFROM ") == 2
    copied = {
        word
        for line in re.findall(r"^COPY (?!--from)(.*)$", text, re.M)
        for word in line.split()[:-1]
    }
    for each in copied - {"."}:
        assert (ROOT / each).exists(), each
    # The chart's variables do not contradict the image's.
    ((_, pod),) = [(name, pod) for name, pod in pods(guide())]
    own = {each["name"]: each.get("value") for each in pod["containers"][0]["env"]}
    assert own["QUIRE_CACHE_DIR"] == image.environment["QUIRE_CACHE_DIR"]


def test_the_context_of_a_build_is_small_and_whole() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line]
    kept = {line[1:] for line in lines if line.startswith("!")}
    assert lines[0] == "*" and {"src", "pyproject.toml", "requirements"} <= kept
    project = (ROOT / "pyproject.toml").read_text()
    for name in re.findall(r'"(LICENSE|NOTICE)"|readme = "(.*)"', project):
        assert set(filter(None, name)) <= kept, "the package cannot be built without it"


def test_versions_are_one() -> None:
    from quire.util.version import VERSION

    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert VERSION.startswith(chart["appVersion"])
    images = re.findall(r"\bquire:(\d+\.[\d.]*\d)", "".join(
        path.read_text() for path in DEPLOY.rglob("*") if path.is_file() and "kuberay" not in path.parts
    ))  # fmt: skip
    assert images and set(images) == {chart["appVersion"]}


# --- compose, systemd ---------------------------------------------------------------------------------


def test_compose() -> None:
    folder = DEPLOY / "compose"
    services = yaml.safe_load((folder / "compose.yaml").read_text())["services"]
    quire = services["quire"]
    for model in ("", "org/model"):
        words = shlex.split(quire["command"].replace("${QUIRE_MODEL:-}", model))
        assert words[0] == "serve"
        _, server = serve.configs(words[1:])
    assert quire["read_only"] and quire["cap_drop"] == ["ALL"]
    assert int(quire["stop_grace_period"][:-1]) >= server.drain_delay + server.shutdown_timeout + 5
    assert quire["environment"]["QUIRE_API_KEY"].startswith("${QUIRE_API_KEY:?"), (
        "it starts without a key"
    )
    assert all(
        port.startswith("127.0.0.1:") for each in services.values() for port in each["ports"]
    )
    for name, each in services.items():
        for volume in each["volumes"]:
            source = volume.split(":")[0]
            assert not source.startswith(".") or (folder / source).exists(), (name, source)
    check_environment([{"name": name} for name in quire["environment"]])
    more = yaml.safe_load((folder / "compose.gpu.yaml").read_text())["services"]["quire"]
    for each in (quire, more):
        assert (folder / each["build"]["context"] / each["build"]["dockerfile"]).exists()


def test_prometheus_of_compose(tmp_path: Path) -> None:
    text = (DEPLOY / "compose/prometheus.yaml").read_text()
    path = tmp_path / "prometheus.yaml"
    path.write_text(text.replace("/etc/prometheus/alerts.yaml", str(CHART / "files/alerts.yaml")))
    assert "SUCCESS" in run("promtool", "check", "config", path)
    assert yaml.safe_load(text)["scrape_configs"][0]["job_name"] == "quire"


def test_systemd_unit() -> None:
    path = DEPLOY / "systemd/quire.service"
    unit = configparser.ConfigParser(strict=False, delimiters=("=",), interpolation=None)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read(path)
    service = unit["Service"]
    words = service["ExecStart"].split()
    assert words == ["/opt/quire/bin/quire", "serve", "--config", "/etc/quire/config.yaml"]
    _, server = serve.configs([])
    assert float(service["TimeoutStopSec"]) > server.drain_delay + server.shutdown_timeout
    names = [pair.split("=")[0] for pair in service["Environment"].split()]
    check_environment([{"name": name} for name in names])


def test_systemd_knows_each_word_of_it(tmp_path: Path) -> None:
    import shutil

    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze here")
    text = (
        (DEPLOY / "systemd/quire.service").read_text().replace("/opt/quire/bin/quire", "/bin/true")
    )
    (tmp_path / "quire.service").write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", tmp_path / "quire.service"],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
