"""Prefill/decode disaggregation on one machine: a server for prompts, one for answers, and their proxy.

python examples/disaggregation.py [MODEL]

With two cores each server gets one. On several machines the commands are the same, with their addresses
instead of 127.0.0.1, and a key that all know in QUIRE_KV_KEY (see docs/disaggregation.md).
"""

import json
import shlex
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from urllib.error import URLError


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [probe.getsockname()[1] for probe in probes]


P, D, PROXY, KV = free_ports(4)
P_URL, D_URL, URL = (f"http://127.0.0.1:{port}" for port in (P, D, PROXY))
P_KV, D_KV = (
    json.dumps({"kv_connector": "TCPConnector", **config})
    for config in (
        {"kv_role": "kv_producer", "kv_port": KV},
        {"kv_role": "kv_consumer", "kv_connector_extra_config": {"peers": [f"127.0.0.1:{KV}"]}},
    )
)
SERVE = ["serve", *sys.argv[1:2], "--host", "127.0.0.1", "--cpu-threads", "1"]
COMMANDS = {
    "prefill server": [*SERVE, "--port", str(P), "--kv-transfer-config", P_KV],
    "decode server": [*SERVE, "--port", str(D), "--kv-transfer-config", D_KV],
    "proxy": ["pd-proxy", "--prefill", P_URL, "--decode", D_URL, "--port", str(PROXY)],
}
STORY = "Once upon a time there was a lighthouse keeper who counted ships. " * 60


def start(name: str, folder: str) -> subprocess.Popen[bytes]:
    print(f"  {name + ':':16}quire {shlex.join(COMMANDS[name])}", flush=True)
    with Path(folder, name).open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "quire", *COMMANDS[name]],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C is for this script, which ends them
        )


def stop(processes: dict[str, subprocess.Popen[bytes]]) -> None:
    for process in processes.values():
        process.terminate()
    for process in processes.values():
        process.wait(60)


def wait_ready(processes: dict[str, subprocess.Popen[bytes]], folder: str) -> None:
    while True:
        for name, process in processes.items():
            if process.poll() is not None:
                sys.exit(f"The {name} has ended:\n{Path(folder, name).read_text()}")
        try:
            with urllib.request.urlopen(URL + "/health", timeout=10) as answer:
                if json.load(answer)["status"] == "ok":
                    return
        except (URLError, ConnectionError):
            pass
        time.sleep(0.1)


def ask(prompt: str) -> dict:
    body = {"prompt": prompt, "max_tokens": 16, "temperature": 0}
    request = urllib.request.Request(
        URL + "/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        print("Starting, in a few seconds:")
        processes: dict[str, subprocess.Popen[bytes]] = {}
        stack.callback(stop, processes)
        for name in COMMANDS:
            processes[name] = start(name, folder)
        wait_ready(processes, folder)
        print(f"Ready. Clients use {URL}/v1 as that of one server.")
        completion = ask(STORY)
        usage = completion["usage"]
        count, moved = usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]
        print(f"A prompt of {count} tokens, and the answer {completion['choices'][0]['text']!r}:")
        print(f"  the KV of {moved} tokens came from the prefill server;")
        print(f"  the decode server computed the other {count - moved}, and the answer.")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
