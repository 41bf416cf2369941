"""Rendered pods, run: see pod.py."""

from __future__ import annotations

import asyncio
import copy
import subprocess
import sys
from pathlib import Path

import httpx
from tests.deploy.kube import Manifest, pods, render
from tests.deploy.pod import CPU_IMAGE, Pod, Service, guide

from quire.server.keys import entry_for

SMALL = {"requests": {"cpu": "1", "memory": "2Gi"}, "limits": {"memory": "2Gi"}}
QUICK = {"preStopSeconds": 1, "drainDelaySeconds": 4, "timeoutSeconds": 20}
KEY, ANNS_KEY = "a-key-of-the-test", "sk-another-one-in-the-file"


async def lives_and_ends(pod: Pod, *, headers: dict[str, str] | None = None) -> dict[str, float]:
    """From the start to the end of a pod under load; returns seconds. No request may fail."""
    try:
        seconds = {"ready": await pod.ready()}
        service = Service()
        service.urls = [pod.url]
        service.load(6, headers)
        while sum(service.answered.values()) < 30 and not service.failures:
            await asyncio.sleep(0.05)
            assert await pod.probe("livenessProbe") == 200
        service.urls = []  # its endpoint is taken out while preStop runs; open connections go on
        seconds["end"] = await pod.terminate()
        await service.stop()
        assert service.failures == []
        return seconds
    finally:
        pod.kill()


async def test_a_rendered_pod_compiles_serves_and_drains(folder: Path) -> None:
    values = {
        "resources": SMALL,
        "shutdown": QUICK,
        "apiKey": {"existingSecret": "key"},
        "apiKeysFile": {"existingSecret": "keys"},
        "kvDisk": {"enabled": True, "size": 1},
    }
    manifests = render(values)
    (spec,) = (spec for name, spec in pods(manifests) if name == "llm-quire")
    pod = Pod(
        manifests,
        spec,
        folder,
        secrets={"key": {"api-key": KEY}, "keys": {"keys.toml": entry_for(ANNS_KEY, tenant="ann")}},
    )
    seconds = await lives_and_ends(pod, headers={"authorization": f"Bearer {ANNS_KEY}"})
    print({name: round(each, 1) for name, each in seconds.items()})
    # The kernels were compiled, in a directory that is the user's alone: not the slow fallback.
    (library,) = (pod.volumes["cache"] / "quire/kernels").glob("*.so")
    assert (library.stat().st_uid, library.parent.stat().st_mode & 0o777) == (10001, 0o700)
    assert (pod.volumes["kv"] / "tier").stat().st_mode & 0o077 == 0
    assert list(pod.volumes["tmp"].iterdir()) == []
    bad = [line for line in pod.log().splitlines() if "WARNING" in line or "ERROR" in line]
    assert bad == [], bad


async def test_the_guides_manifest(folder: Path, kernels: Path) -> None:
    """As it is, but for what this machine lacks: the GPU and the model."""
    manifests = guide()
    ((_, spec),) = pods(manifests)
    spec = copy.deepcopy(spec)
    (container,) = spec["containers"]
    container["args"].remove("Qwen/Qwen3-8B")
    container["args"][container["args"].index("--device=cuda")] = "--device=cpu"
    container["args"][container["args"].index("--drain-delay=5")] = "--drain-delay=1"
    container["lifecycle"]["preStop"]["sleep"]["seconds"] = 1
    pod = Pod(
        manifests, spec, folder,
        secrets={"quire-api-key": {"api-key": KEY}}, volumes={"cache": kernels},
    )  # fmt: skip
    try:
        await pod.ready()
        async with httpx.AsyncClient(base_url=pod.url) as client:
            assert (await client.get("/v1/models")).status_code == 401
        run = [
            "nsenter",
            "--target",
            str(pod.pid),
            "--mount",
            "--",
            "chroot",
            f"/proc/{pod.pid}/root",
        ]
        for command in ("touch /root/.cache/huggingface/x", "touch /cache/x", "touch /tmp/x"):
            subprocess.run([*run, "setpriv", "--reuid", "10001", "--regid", "10001", "--clear-groups",
                            *command.split()], check=True)  # fmt: skip
        check = [word.replace("8000", str(pod.port)) for word in CPU_IMAGE.healthcheck]
        assert subprocess.run([sys.executable, *check[1:]]).returncode == 0
        await pod.terminate()
    finally:
        pod.kill()


async def test_a_rolling_restart_of_two_replicas_loses_no_request(
    folder: Path, kernels: Path
) -> None:
    manifests = render({"resources": SMALL, "shutdown": QUICK, "replicaCount": 2})
    ((_, spec),) = ((name, spec) for name, spec in pods(manifests) if name == "llm-quire")
    service, running = Service(), []
    try:
        running = [start(manifests, spec, folder, kernels) for _ in range(2)]
        await asyncio.gather(*(pod.ready() for pod in running))
        service.urls = [pod.url for pod in running]
        service.load(8)
        for old in list(running):  # maxSurge 1, maxUnavailable 0
            new = start(manifests, spec, folder, kernels)
            running.append(new)
            await new.ready()
            service.urls = [*service.urls, new.url]
            ending = asyncio.create_task(old.terminate())
            await asyncio.sleep(0.5)  # until the endpoint is gone everywhere
            service.urls = [url for url in service.urls if url != old.url]
            await ending
        answered = dict(service.answered)
        while any(service.answered.get(url, 0) <= answered.get(url, 0) for url in service.urls):
            await asyncio.sleep(0.05)
        await service.stop()
        assert service.failures == []
        assert set(service.answered) == {pod.url for pod in running}
        print(service.answered)
    finally:
        for pod in running:
            pod.kill()


def start(manifests: tuple[Manifest, ...], spec: Manifest, folder: Path, kernels: Path) -> Pod:
    return Pod(manifests, spec, folder, volumes={"cache": kernels})
