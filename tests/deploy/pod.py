"""A kubelet for tests: runs a rendered pod's container on this machine.

As its user and process 1, on a read-only root made of this machine's own folders, with the pod's variables
and its volumes as temporary folders that have the owners and modes that Kubernetes gives them. It probes as
the manifest says, and ends the pod as Kubernetes does: endpoint out, preStop, SIGTERM, exit in time.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import sysconfig
import time
from collections.abc import Mapping
from pathlib import Path

import httpx
import pytest
import yaml
from tests.deploy.kube import DEPLOY, ROOT, Manifest, of_kind
from tests.free_ports import free_port

USER = 10001


def why_not() -> str:
    """Why containers cannot be made here; "" if they can."""
    if os.geteuid() != 0:
        return "only root can start a process as another user"
    missing = [
        name for name in ("unshare", "setpriv", "chroot", "cc") if shutil.which(name) is None
    ]
    if missing:
        return f"no {', '.join(missing)}"
    words = ["unshare", "--mount", "--pid", "--fork", "mount", "-t", "tmpfs", "none", "/mnt"]
    tried = subprocess.run(words, capture_output=True, text=True)
    return "" if tried.returncode == 0 else f"unshare: {tried.stderr.strip()}"


def need_containers() -> None:
    if reason := why_not():
        pytest.skip(reason)


class Image:
    """What the last stage of a Dockerfile says."""

    def __init__(self, path: Path) -> None:
        text = path.read_text().replace("\\\n", " ")
        stage = text[text.rindex("\nFROM ") :]
        self.environment = dict(
            re.findall(r"(\w+)=(\S+)", " ".join(re.findall(r"^ENV (.*)$", stage, re.M)))
        )
        self.entrypoint, self.command, self.healthcheck = (
            json.loads(re.search(rf"^{name}.* ?(\[.*\])$", stage, re.M).group(1))
            for name in ("ENTRYPOINT", "CMD", "HEALTHCHECK[^\\[]*CMD")
        )
        self.user = re.search(r"^USER (\S+)$", stage, re.M).group(1)
        self.root_mode = "711" if "chmod 711 /root" in stage else "700"


CPU_IMAGE = Image(DEPLOY / "docker/Dockerfile")

SCRIPT = """
set -euo pipefail
root=$1; shift
mount -t tmpfs -o mode=755 none "$root"
cd "$root"
mkdir -p usr proc dev/shm sys opt/packages opt/src etc root
chmod {root_mode} root
for name in bin sbin lib lib64; do
    if [[ -L /$name ]]; then ln -s "$(readlink /$name)" $name
    elif [[ -d /$name ]]; then mkdir $name; mount --rbind /$name $name; fi
done
mount --rbind /usr usr
if [[ {python} != /usr* ]]; then mkdir -p .{python}; mount --bind {python} .{python}; fi
mount --bind {packages} opt/packages
mount --bind {source} opt/src
mount --rbind /sys sys
mount -t proc proc proc
mount -t tmpfs -o mode=1777,size=64m none dev/shm
for name in null zero full random urandom; do touch dev/$name; mount --bind /dev/$name dev/$name; done
for name in ld.so.cache alternatives ssl nsswitch.conf localtime hosts resolv.conf; do
    [[ -e /etc/$name ]] && cp -a /etc/$name etc/
done
echo 'quire:x:10001:10001::/tmp:/usr/sbin/nologin' > etc/passwd
echo 'quire:x:10001:' > etc/group
{mounts}
mount -o remount,ro "$root"
for name in usr .{python} opt/packages opt/src sys; do
    mount -o remount,ro,bind $name || [[ $name == sys ]]
done
exec chroot "$root" setpriv --reuid {user} --regid {user} --groups {user} --no-new-privs \\
    --bounding-set=-all --inh-caps=-all env -i "$@"
"""


class Pod:
    """One container of a pod spec, running."""

    numbers = itertools.count()

    def __init__(
        self,
        manifests: tuple[Manifest, ...],
        spec: Manifest,
        folder: Path,
        *,
        secrets: Mapping[str, Mapping[str, str]] | None = None,
        volumes: Mapping[str, Path] | None = None,
        replace: Mapping[str, str] | None = None,
        image: Image = CPU_IMAGE,
    ) -> None:
        """secrets: by name, the keys and values. volumes: folders that are used instead of new ones.
        replace: texts in arguments and configuration, such as addresses. Its port 8000 is a free one."""
        self.spec = spec
        (self.container,) = spec["containers"]
        self._manifests, self._secrets = manifests, secrets or {}
        self.folder = folder / f"pod{next(self.numbers)}"
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._replace = {"port: 8000": f"port: {self.port}", "port=8000": f"port={self.port}",
                         "$(POD_IP)": "127.0.0.1", **(replace or {})}  # fmt: skip
        # Kubernetes lets other users pass; pytest's folders do not.
        (self.folder / "root").mkdir(parents=True)
        self.volumes = dict(volumes or {})
        for volume in spec.get("volumes", ()):
            if volume["name"] not in self.volumes:
                self.volumes[volume["name"]] = self._volume(volume)
        mounts = []
        for mount in self.container.get("volumeMounts", ()):
            inner, source = mount["mountPath"].lstrip("/"), self.volumes[mount["name"]]
            mounts += [f"mkdir -p {inner}", f"mount --bind {shlex.quote(str(source))} {inner}"]
            if mount.get("readOnly"):
                mounts.append(f"mount -o remount,ro,bind {inner}")
        security = {**spec["securityContext"], **self.container["securityContext"]}
        assert security["readOnlyRootFilesystem"] and security["fsGroup"] == USER
        script = SCRIPT.format(
            python=shlex.quote(sys.base_prefix),
            packages=shlex.quote(sysconfig.get_path("purelib")), source=shlex.quote(str(ROOT / "src")),
            mounts="\n".join(mounts), user=security["runAsUser"], root_mode=image.root_mode,
        )  # fmt: skip
        words = [
            *self.container.get("command", image.entrypoint),
            *self.container.get("args", image.command),
        ]
        assert words[0] == "quire"
        python = str(Path(sys.executable).resolve())
        words = [python, "-m", "quire", *map(self._replaced, words[1:])]
        environment = image.environment | dict(map(self._variable, self.container.get("env", ())))
        environment["PATH"] = "/usr/local/bin:/usr/bin:/bin"
        environment["PYTHONPATH"] = "/opt/src:/opt/packages"  # not installed, as in the image
        pairs = [f"{name}={value}" for name, value in environment.items()]
        self._log = (self.folder / "log").open("wb")
        self.process = subprocess.Popen(
            ["unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child",
             "bash", "-c", script, "bash", str(self.folder / "root"), *pairs, *words],
            stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log,
        )  # fmt: skip

    def _replaced(self, text: str) -> str:
        for old, new in self._replace.items():
            text = text.replace(old, new)
        return text

    def _variable(self, each: Manifest) -> tuple[str, str]:
        if "value" in each:
            return each["name"], each["value"]
        if "fieldRef" in each["valueFrom"]:
            return each["name"], "127.0.0.1"
        secret = each["valueFrom"]["secretKeyRef"]
        return each["name"], self._secrets[secret["name"]][secret["key"]]

    def _volume(self, volume: Manifest) -> Path:
        path = self.folder / volume["name"]
        path.mkdir()
        if "configMap" in volume or "secret" in volume:
            files, mode = self._files(volume)
            (path / "..1").mkdir(0o755)  # the kubelet's way to change all files at once
            (path / "..data").symlink_to("..1")
            for name, text in files.items():
                (path / "..1" / name).write_text(self._replaced(text))
                os.chown(path / "..1" / name, 0, USER)
                (path / "..1" / name).chmod(mode)
                (path / name).symlink_to(f"..data/{name}")
            os.chown(path, 0, USER)
            path.chmod(0o755 | stat.S_ISGID)
        else:  # an emptyDir, or a claim: the owner is root, and fsGroup may write
            os.chown(path, 0, USER)
            path.chmod((0o777 if "emptyDir" in volume else 0o775) | stat.S_ISGID)
        return path

    def _files(self, volume: Manifest) -> tuple[Mapping[str, str], int]:
        if "configMap" in volume:
            name = volume["configMap"]["name"]
            (found,) = (
                m for m in of_kind(self._manifests, "ConfigMap") if m["metadata"]["name"] == name
            )
            return found["data"], 0o644
        secret = volume["secret"]
        data = self._secrets[secret["secretName"]]
        items = secret.get("items") or [{"key": key, "path": key} for key in data]
        return {item["path"]: data[item["key"]] for item in items}, secret.get("defaultMode", 0o644)

    # --- its life -------------------------------------------------------------------------------------

    @property
    def pid(self) -> int:
        """Of its process 1."""
        path = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return int(path.read_text().split()[0])

    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")

    async def probe(self, kind: str) -> int:
        """The status that a probe gets; 0 without an answer in time."""
        probe = self.container[kind]
        if "tcpSocket" in probe:
            return 200 if self.process.poll() is None else 0
        action = probe["httpGet"]
        ports = {each["name"]: each["containerPort"] for each in self.container["ports"]}
        assert ports.get(action["port"], action["port"]) == 8000
        try:
            async with httpx.AsyncClient(timeout=probe.get("timeoutSeconds", 1)) as client:
                return (await client.get(self.url + action["path"])).status_code
        except httpx.TransportError:
            return 0

    async def ready(self) -> float:
        """Waits for the startup probe, then for readiness. Returns the seconds since its start."""
        begun = time.monotonic()
        for kind in ("startupProbe", "readinessProbe"):
            if kind not in self.container:
                continue
            allowed = (
                self.container["startupProbe"]
                if "startupProbe" in self.container
                else self.container[kind]
            )
            until = begun + max(60, allowed["failureThreshold"] * allowed["periodSeconds"])
            while (status := await self.probe(kind)) != 200:
                assert self.process.poll() is None, self.log()
                assert time.monotonic() < until, f"{kind}: {status}\n{self.log()}"
                await asyncio.sleep(0.1)
        return time.monotonic() - begun

    async def terminate(self) -> float:
        """preStop, SIGTERM, and its end. Returns the seconds that it took; they are within the grace
        period, or it is killed, which fails."""
        begun, grace = time.monotonic(), self.spec["terminationGracePeriodSeconds"]
        await asyncio.sleep(self.container["lifecycle"]["preStop"]["sleep"]["seconds"])
        os.kill(self.pid, signal.SIGTERM)
        while self.process.poll() is None:
            if time.monotonic() - begun > grace:
                self.kill()
                raise AssertionError(f"it had to be killed after {grace} s\n{self.log()}")
            await asyncio.sleep(0.05)
        self._log.close()
        assert self.process.returncode == 0, self.log()
        return time.monotonic() - begun

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._log.close()


class Service:
    """Spreads connections over endpoints by turns. As with a Service, a connection stays where it is."""

    def __init__(self) -> None:
        self.urls: list[str] = []
        self._turn = 0
        self.answered: dict[str, int] = {}
        self.failures: list[str] = []
        self._stopped = asyncio.Event()
        self._clients: list[asyncio.Task[None]] = []

    def load(self, clients: int, headers: Mapping[str, str] | None = None) -> None:
        """Start clients that ask all the time: every other one for a stream."""
        for number in range(clients):
            self._clients.append(asyncio.create_task(self._client(number, headers or {})))

    async def stop(self) -> None:
        self._stopped.set()
        await asyncio.gather(*self._clients)

    async def _client(self, number: int, headers: Mapping[str, str]) -> None:
        connection, url = None, ""
        body = {
            "prompt": "Once upon a time",
            "max_tokens": 48,
            "ignore_eos": True,
            "stream": number % 2 == 1,
        }
        try:
            while not self._stopped.is_set():
                if connection is None:
                    if not self.urls:
                        return
                    self._turn += 1
                    url = self.urls[self._turn % len(self.urls)]
                    connection = httpx.AsyncClient(
                        base_url=url,
                        timeout=60,
                        headers=headers,
                        limits=httpx.Limits(max_connections=1),
                    )
                try:
                    answer = await connection.post("/v1/completions", json=body)
                except httpx.TransportError as error:
                    self.failures.append(f"{url}: {error!r}")
                    return
                whole = answer.status_code == 200 and (
                    answer.text.rstrip().endswith("data: [DONE]") and '"error"' not in answer.text
                    if body["stream"]
                    else answer.json()["usage"]["completion_tokens"] == 48
                )
                if not whole:
                    self.failures.append(f"{url}: {answer.status_code} {answer.text[-300:]}")
                    return
                self.answered[url] = self.answered.get(url, 0) + 1
                if answer.headers.get("connection") == "close":
                    await connection.aclose()
                    connection = None
        finally:
            if connection is not None:
                await connection.aclose()


def guide() -> tuple[Manifest, ...]:
    return tuple(yaml.safe_load_all((DEPLOY / "kubernetes/quire.yaml").read_text()))
