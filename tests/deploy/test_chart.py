"""The chart: it renders for each version of Kubernetes what schemas allow, with options that exist."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest
import yaml
from tests.deploy.kube import (
    CHART,
    IMAGE_VOLUME,
    ROOT,
    VALUES,
    VERSIONS,
    command,
    faults,
    of_kind,
    pods,
    render,
    rendered,
    run,
)

from quire.cli import pd_proxy, serve
from quire.errors import ConfigError

SETS = [*VALUES, "image-volume"]


@pytest.mark.parametrize("name", SETS)
def test_it_is_valid_for_each_version(name: str) -> None:
    for version in VERSIONS:
        if name == "image-volume" and version < "1.35":
            error = run("helm", *command(IMAGE_VOLUME, version), fails=True)
            assert "model.image needs Kubernetes 1.35" in error
            continue
        manifests = rendered(name, version)
        wrong = {
            f"{version} {each['kind']}": found
            for each in manifests
            if (found := faults(each, version))
        }
        assert wrong == {}


def test_faults_are_noticed() -> None:
    manifests = copy.deepcopy(rendered("gateway")) + copy.deepcopy(rendered("monitored"))
    for each in manifests:
        each["spec" if "spec" in each else "metadata"]["nonsense"] = 1
        assert faults(each, "1.33"), each["kind"]
    (deployment,) = of_kind(copy.deepcopy(rendered("default")), "Deployment")
    deployment["spec"]["template"]["spec"]["containers"][0]["readinessProb"] = {}
    assert "readinessProb" in str(faults(deployment, "1.30"))
    (pod,) = (spec for _, spec in pods(rendered("image-volume")) if "volumes" in spec)
    deployment["spec"]["template"]["spec"] = pod
    assert faults(deployment, "1.30") and not faults(deployment, "1.37")


def test_each_kind_is_rendered_by_some_values() -> None:
    kinds = {each["kind"] for name in SETS for each in rendered(name)}
    templates = {path.read_text() for path in (CHART / "templates").rglob("*.yaml")}
    assert kinds == {kind for text in templates for kind in re.findall(r"^kind: (\w+)", text, re.M)}


def test_lint_finds_nothing(tmp_path: Path) -> None:
    for name in SETS:
        path = tmp_path / "values.yaml"
        path.write_text(yaml.safe_dump(VALUES.get(name, IMAGE_VOLUME)))
        run("helm", "lint", "--strict", CHART, "--kube-version", VERSIONS[-1], "--values", path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"replicas": 2}, "additional properties 'replicas' not allowed"),
        ({"profile": "tpu"}, "must be one of 'cpu', 'gpu'"),
        ({"replicaCount": -1}, "minimum: got -1, want 0"),
        ({"config": {"max_num_sequences": 1}}, "invalid propertyName 'max_num_sequences'"),
        ({"config": {"api_key": ["secret"]}}, "invalid propertyName 'api_key'"),
        ({"admin": {"enabled": True, "host": "0.0.0.0"}}, "admin.existingSecret"),
        ({"image": {"digest": "latest"}}, "does not match pattern"),
        ({"prometheusRule": {"enabled": True, "alerts": {"Typo": {}}}}, "there is no alert Typo"),
        ({"inferencePool": {"enabled": True}}, "inferencePool.endpointPicker"),
        ({"disaggregation": {"enabled": True, "podNetwork": "10.0.0.0/8"}}, "kvKey.existingSecret"),
        (
            {"disaggregation": {"enabled": True, "kvKey": {"existingSecret": "k"}}},
            "disaggregation.podNetwork",
        ),
        (
            VALUES["disaggregation"] | {"autoscaling": {"enabled": True}},
            "goes with neither autoscaling nor inferencePool",
        ),
    ],
)
def test_wrong_values_are_refused(values, message: str) -> None:
    assert message in run("helm", *command(values), fails=True)


# --- the command --------------------------------------------------------------------------------------

VARIABLES = {
    "HOME", "HF_HOME", "HF_HUB_OFFLINE", "HF_TOKEN", "TRITON_CACHE_DIR", "POD_IP",
}  # fmt: skip
"""Known to others than Quire."""


def config_of(manifests, pod) -> dict[str, object]:
    (volume,) = (each for each in pod["volumes"] if each["name"] == "config")
    (found,) = (
        each
        for each in of_kind(manifests, "ConfigMap")
        if each["metadata"]["name"] == volume["configMap"]["name"]
    )
    return found["data"]


@pytest.mark.parametrize("name", SETS)
def test_the_command_line_exists(name: str, tmp_path: Path, monkeypatch) -> None:
    manifests = rendered(name)
    seen = 0
    for _, pod in pods(manifests):
        (container,) = pod["containers"]
        command, *words = container["args"] if "command" not in container else ["python"]
        ports = {each["name"]: each["containerPort"] for each in container.get("ports", [])}
        if command == "serve":
            (tmp_path / "config.yaml").write_text(config_of(manifests, pod)["config.yaml"])
            words[words.index("/etc/quire/config.yaml")] = str(tmp_path / "config.yaml")
            engine, server = serve.configs(
                [word.replace("$(POD_IP)", "10.0.0.1") for word in words]
            )
            assert server.port == ports["http"] and server.host in (None, "0.0.0.0")
            assert ports.get("admin") == server.admin_port
            delays = server.drain_delay + server.shutdown_timeout
            gpus = int(container["resources"].get("limits", {}).get("nvidia.com/gpu", 0))
            assert engine.runtime.device == ("cuda" if gpus else "cpu")
            assert gpus in (0, engine.parallel.world_size)
            if not gpus:
                assert engine.runtime.cpu_threads == int(container["resources"]["requests"]["cpu"])
            assert ("kv" in ports) == (
                engine.kv_transfer is not None and "kv_producer" in str(words)
            )
            seen += 1
        elif command == "pd-proxy":
            monkeypatch.setattr("quire.bench.load.run_async", lambda work: work.close())
            assert pd_proxy.run(words) is None
            delays = float(words[-2].split("=")[1]) + float(words[-1].split("=")[1])
            assert ports == {"http": 8000} and "--port=8000" in words
        else:
            continue
        sleep = container["lifecycle"]["preStop"]["sleep"]["seconds"]
        assert pod["terminationGracePeriodSeconds"] >= sleep + delays + 5
        check_environment(container["env"])
    assert seen


def check_environment(env) -> None:
    sources = "".join(path.read_text() for path in (ROOT / "src/quire").rglob("*.py"))
    for each in env:
        name = each["name"]
        assert name in VARIABLES or (name.startswith("QUIRE_") and f'"{name}"' in sources), name


@pytest.mark.parametrize(
    ("cpu", "threads"), [("3", 3), (2, 2), ("2500m", 3), ("500m", 1), (1.5, 2), (None, None)]
)
def test_threads_are_the_requested_cores(cpu, threads) -> None:
    requests = {"memory": "1Gi"} | ({} if cpu is None else {"cpu": cpu})
    manifests = render({"resources": {"requests": requests}})
    ((_, pod),) = ((name, pod) for name, pod in pods(manifests) if name == "llm-quire")
    config = yaml.safe_load(config_of(manifests, pod)["config.yaml"])
    assert config.get("cpu_threads") == threads


def test_an_option_that_does_not_exist_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("nonsense: 1\n")
    with pytest.raises(ConfigError, match="nonsense"):
        serve.configs(["--config", str(tmp_path / "config.yaml")])


def test_routes_exist_and_leave_out_what_is_for_operators() -> None:
    from quire.server.app import build_app
    from quire.server.state import ServerState

    engine, server = serve.configs(["--enable-admin-endpoints", "--enable-lora"])
    state = ServerState(server, engine)
    served = set(build_app(state, api_keys=()).openapi()["paths"])
    (route,) = of_kind(rendered("gateway"), "HTTPRoute")
    paths = [each["path"] for each in route["spec"]["rules"][0]["matches"]]
    for each in paths:
        value = each["value"]
        assert any(path == value or path.startswith(value) for path in served), value
        assert (each["type"] == "PathPrefix") == value.endswith("/")
    private = {
        path
        for path in served
        if re.search(r"metrics|health|ready|sleep|wake|lora|reset|info", path)
    }
    assert {"/metrics", "/sleep", "/v1/load_lora_adapter", "/reset_prefix_cache"} <= private
    reached = {
        path for path in private for each in paths
        if path == each["value"] or (each["type"] == "PathPrefix" and path.startswith(each["value"]))
    }  # fmt: skip
    assert reached == set()


# --- security -----------------------------------------------------------------------------------------


def test_no_service_and_no_network_policy_opens_the_admin_port() -> None:
    ((_, pod),) = ((name, pod) for name, pod in pods(rendered("cpu")) if name == "llm-quire")
    (container,) = pod["containers"]
    assert {"name": "admin", "containerPort": 8001} in container["ports"]
    assert "QUIRE_ADMIN_API_KEY" in {each["name"] for each in container["env"]}
    for each in of_kind(rendered("cpu"), "Service", "NetworkPolicy"):
        assert "admin" not in str(each["spec"]) and "8001" not in str(each["spec"])
    ((_, pod),) = (
        found for found in pods(render({"admin": {"enabled": True}})) if found[0] == "llm-quire"
    )
    assert "QUIRE_ADMIN_API_KEY" not in str(pod)


def restricted(pod) -> list[str]:
    """What the Pod Security Standard "restricted" forbids, and a little more."""
    found = []
    security = pod.get("securityContext", {})
    if security.get("runAsNonRoot") is not True or security.get("runAsUser") != 10001:
        found.append("root")
    if security.get("seccompProfile") != {"type": "RuntimeDefault"}:
        found.append("seccomp")
    if pod.get("automountServiceAccountToken") is not False:
        found.append("token")
    found += [f"host: {key}" for key in pod if key.startswith("host")]
    allowed = {"configMap", "emptyDir", "persistentVolumeClaim", "secret", "image"}
    found += [
        f"volume {each['name']}"
        for each in pod.get("volumes", [])
        if not set(each) - {"name"} <= allowed
    ]
    for each in pod["containers"]:
        own = each.get("securityContext", {})
        if own != {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }:
            found.append(f"container {each['name']}")
        memory = each["resources"].get("limits", {}).get("memory")
        if memory is None and "kv" not in {port["name"] for port in each.get("ports", [])}:
            found.append("no memory limit")
        found += [
            f"subPath {mount}" for mount in each.get("volumeMounts", []) if "subPath" in mount
        ]
    return found


@pytest.mark.parametrize("name", [each for each in SETS if each != "disaggregation"])
def test_pods_are_restricted(name: str) -> None:
    assert {pod: found for pod, spec in pods(rendered(name)) if (found := restricted(spec))} == {}


def test_what_is_not_restricted_is_noticed() -> None:
    (pod,) = [
        copy.deepcopy(spec) for name, spec in pods(rendered("default")) if name == "llm-quire"
    ]
    pod["volumes"].append({"name": "host", "hostPath": {"path": "/"}})
    pod["hostNetwork"] = True
    pod["securityContext"]["runAsUser"] = 0
    pod["containers"][0]["securityContext"]["readOnlyRootFilesystem"] = False
    assert restricted(pod) == ["root", "host: hostNetwork", "volume host", "container quire"]


@pytest.mark.parametrize("name", SETS)
def test_no_secret_is_rendered(name: str) -> None:
    manifests = rendered(name)
    assert not of_kind(manifests, "Secret")
    for _, pod in pods(manifests):
        for container in pod["containers"]:
            for each in container.get("env", []):
                if re.search("KEY|TOKEN|SECRET|PASSWORD", each["name"]):
                    assert set(each) == {"name", "valueFrom"}, each
            assert not re.search("api-key|hf-token", " ".join(container.get("args", [])))


def test_network_policy() -> None:
    def policy(name: str):
        (found,) = of_kind(rendered(name), "NetworkPolicy")
        return found["spec"]

    assert policy("default")["egress"] == [
        {"ports": [{"port": 53, "protocol": "UDP"}, {"port": 53, "protocol": "TCP"}]}
    ]
    assert {"ports": [{"port": 443}]} in policy("gpu")["egress"]
    assert {"ports": [{"port": 443}]} not in policy("gpu-tensor-parallel")["egress"]
    for name in SETS:
        if name != "minimal":
            assert all(rule.get("from") for rule in policy(name)["ingress"]), "open to everyone"
    (kv,) = (
        rule for rule in policy("disaggregation")["ingress"] if rule["ports"] == [{"port": 14579}]
    )
    (peers,) = kv["from"]
    assert peers["podSelector"]["matchLabels"]["app.kubernetes.io/component"] == "decode"


# --- what belongs together ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", SETS)
def test_selectors_select(name: str) -> None:
    manifests = rendered(name)
    labels = {
        each["metadata"]["name"]: each["spec"]["template"]["metadata"]["labels"]
        for each in of_kind(manifests, "Deployment", "StatefulSet")
    }

    def selected(selector) -> set[str]:
        return {pod for pod, own in labels.items() if selector.items() <= own.items()}

    for each in of_kind(manifests, "Deployment", "StatefulSet"):
        assert selected(each["spec"]["selector"]["matchLabels"]) == {each["metadata"]["name"]}
    for each in of_kind(manifests, "Service"):
        assert len(selected(each["spec"]["selector"])) == 1
    for each in of_kind(manifests, "PodDisruptionBudget", "InferencePool"):
        assert len(selected(each["spec"]["selector"]["matchLabels"])) == 1
    for each in of_kind(manifests, "NetworkPolicy"):
        assert selected(each["spec"]["podSelector"]["matchLabels"]) == set(labels)
    services = of_kind(manifests, "Service")
    for each in of_kind(manifests, "ServiceMonitor"):
        wanted = each["spec"]["selector"]["matchLabels"].items()
        assert all(wanted <= service["metadata"]["labels"].items() for service in services)
        assert each["spec"]["endpoints"][0]["port"] == "http"
    for each in of_kind(manifests, "ScaledObject"):
        assert each["spec"]["scaleTargetRef"]["name"] in labels
        (deployment,) = of_kind(manifests, "Deployment")
        assert "replicas" not in deployment["spec"], "an upgrade would undo the scaling"
    for _, pod in pods(manifests):
        for container in pod["containers"]:
            mounts = {mount["name"] for mount in container.get("volumeMounts", [])}
            assert mounts == {volume["name"] for volume in pod.get("volumes", [])}


def test_a_changed_option_replaces_the_pods() -> None:
    def checksum(config) -> str:
        (deployment,) = of_kind(render({"config": config}), "Deployment")
        return deployment["spec"]["template"]["metadata"]["annotations"]["checksum/config"]

    assert checksum({"max_num_seqs": 8}) != checksum({"max_num_seqs": 9})


def test_the_proxy_knows_every_pod() -> None:
    manifests = rendered("disaggregation")
    (proxy,) = of_kind(manifests, "Deployment")
    args = proxy["spec"]["template"]["spec"]["containers"][0]["args"]
    for each in of_kind(manifests, "StatefulSet"):
        name, service = each["metadata"]["name"], each["spec"]["serviceName"]
        for number in range(each["spec"]["replicas"]):
            assert f"http://{name}-{number}.{service}:8000" in args
        assert service in {found["metadata"]["name"] for found in of_kind(manifests, "Service")}
    assert sum(word.startswith("http://") for word in args) == 5


def test_values_of_alerts_change_them() -> None:
    def alerts(name: str):
        (rule,) = of_kind(rendered(name) if name in VALUES else render(MONITORED), "PrometheusRule")
        return {each["alert"]: each for group in rule["spec"]["groups"] for each in group["rules"]}

    plain, changed = alerts("plain"), alerts("monitored")
    assert set(plain) - set(changed) == {"QuireTierOff"}
    long = changed["QuireQueueLong"]
    assert (long["for"], long["labels"]["severity"]) == ("20m", "critical")
    assert long["expr"] == plain["QuireQueueLong"]["expr"].replace("> 20", "> 50")
    assert long["annotations"]["runbook_url"] == "https://runbooks.example/quire#quirequeuelong"
    assert changed["QuireDown"]["expr"] == plain["QuireDown"]["expr"]


MONITORED = {"prometheusRule": {"enabled": True}}


def test_dashboards_are_packed() -> None:
    boards = [
        each
        for each in of_kind(rendered("monitored"), "ConfigMap")
        if "grafana_dashboard" in str(each)
    ]
    assert {json.loads(text)["uid"] for each in boards for text in each["data"].values()} == {
        "quire-serving",
        "quire-kv",
    }
