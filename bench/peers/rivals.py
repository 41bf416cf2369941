"""Which engines are compared, in which environment each runs, and whether it is installed here."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

from bench.peers import cpu, servers
from bench.peers.workloads import ModelShape

REPOSITORY = Path(__file__).parents[2]


def peers_dir() -> Path:
    """Where `setup` puts environments, models and builds: $QUIRE_PEERS_DIR or ~/.cache/quire/peers."""
    return Path(os.environ.get("QUIRE_PEERS_DIR", "~/.cache/quire/peers")).expanduser()


@dataclass(frozen=True, slots=True)
class Spec:
    """One engine (or one way of using it) that a runner process measures."""

    name: str
    module: str
    venv: str | None
    """Folder below venvs/; None is the environment this script runs in (Quire's)."""
    model_file: str
    """What must exist below models/, with {model} for M1 or M2."""
    env: dict[str, str] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    workloads: tuple[str, ...] = ("W1", "W2", "W3", "W4")
    also: tuple[str, ...] = ()
    """What else must exist below the folder that `setup` fills."""
    apart_on: tuple[str, ...] = ()
    """Models with which it is measured after the others have left: not all fit into 24 GiB at once."""

    def python(self, root: Path) -> Path:
        return root / "venvs" / self.venv / "bin" / "python" if self.venv else Path(sys.executable)

    def missing(self, root: Path, model: str) -> str | None:
        """Why it cannot run here, or None."""
        needed = [self.python(root), root / "models" / self.model_file.format(model=model)]
        needed += [root / path for path in self.also]
        absent = [path for path in needed if not path.exists()]
        return f"not installed: no {absent[0]} (run bench/peers/setup)" if absent else None

    def command(self, root: Path, model: str, threads: int, *, smoke: bool) -> list[str]:
        words = [str(self.python(root)), "-m", self.module, "--model", model]
        words += ["--models", str(root / "models"), "--threads", str(threads)]
        for option in self.options:
            words += ["--option", option]
        return [*words, "--smoke"] if smoke else words


def vllm_env(root: Path, threads: int, *, in_process: bool) -> dict[str, str]:
    """Every core computes, and the allocator and OpenMP that vLLM's own guide asks to preload."""
    preload = [
        path
        for pattern in ("lib/**/libtcmalloc_minimal.so.4", "venvs/vllm/lib/libiomp5.so")
        for path in sorted(root.glob(pattern))[:1]
    ]
    env = {
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "OMP_NUM_THREADS": str(threads),
        "VLLM_CACHE_ROOT": str(root / "vllm-cache"),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "LD_PRELOAD": ":".join(str(path) for path in preload),
    }
    if in_process:
        env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    return env


ZENTORCH = "lib/zentorch"
"""Where `setup` puts AMD's plug-in. vLLM uses it if it can import it."""


def with_zentorch(root: Path, env: dict[str, str]) -> dict[str, str]:
    return {**env, "PYTHONPATH": str(root / ZENTORCH)}


def specs(root: Path, threads: int) -> list[Spec]:
    quire_env = {"PYTHONPATH": f"{REPOSITORY / 'src'}:{REPOSITORY}"}
    openmp = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    in_process = vllm_env(root, threads, in_process=True)
    too_large = () if cpu.has_bf16() else ("M1",)
    zentorch = Spec(
        name="vllm zentorch",
        module="bench.peers.run_vllm",
        venv="vllm",
        model_file="{model}",
        env=with_zentorch(root, in_process),
        also=(ZENTORCH,),
    )
    # Without bf16 in the processor, float32 is faster for prompts and bf16 for a lone decode: half the bytes.
    emulated = Spec(
        name="vllm bf16",
        module="bench.peers.run_vllm",
        venv="vllm",
        model_file="{model}",
        env=in_process,
        options=("bf16",),
        workloads=("W2",),
        apart_on=too_large,
    )
    return [
        Spec("quire", "bench.peers.run_quire", None, "{model}", quire_env),
        Spec(
            name="quire cache-off",
            module="bench.peers.run_quire",
            venv=None,
            model_file="{model}",
            env=quire_env,
            options=("cache-off",),
            workloads=("W3",),
        ),
        Spec(
            name="vllm",
            module="bench.peers.run_vllm",
            venv="vllm",
            model_file="{model}",
            env=in_process,
            apart_on=too_large,
        ),
        *([zentorch] if cpu.is_zen4() else []),
        *([] if cpu.has_bf16() else [emulated]),
        Spec("openvino", "bench.peers.run_openvino", "openvino", "{model}-openvino"),
        Spec(
            name="llama.cpp",
            module="bench.peers.run_llama_cpp",
            venv="llama_cpp",
            model_file=f"{{model}}-{cpu.gguf_dtype()}.gguf",
            also=("llama.cpp-build/bin/llama-server",),
        ),
        Spec(
            name="mistral.rs",
            module="bench.peers.run_mistralrs",
            venv="mistralrs",
            model_file="{model}-mistralrs",
            env={"RAYON_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"},
            apart_on=("M1",),
        ),
        Spec(
            name="transformers",
            module="bench.peers.run_transformers",
            venv="transformers",
            model_file="{model}",
            env=openmp,
            apart_on=("M1",),
        ),
        Spec(
            name="transformers continuous",
            module="bench.peers.run_transformers",
            venv="transformers",
            model_file="{model}",
            env=openmp,
            options=("continuous",),
            apart_on=("M1",),
        ),
    ]


def server_makers(root: Path, model: ModelShape, threads: int) -> dict[str, servers.ServerMaker]:
    """Name -> how to start that server on a port, for W5 and W6.

    OpenVINO, mistral.rs (from PyPI) and transformers bring none.
    """
    served = vllm_env(root, threads, in_process=False)
    zentorch = {
        "vllm zentorch": lambda port: servers.vllm_server(
            root, model, port, with_zentorch(root, served)
        )
    }
    return {
        "quire": lambda port: servers.quire_server(root, model, port, threads),
        "vllm": lambda port: servers.vllm_server(root, model, port, served),
        **(zentorch if cpu.is_zen4() and (root / ZENTORCH).exists() else {}),
        "vllm as shipped": lambda port: servers.vllm_server(
            root, model, port, {"VLLM_CACHE_ROOT": str(root / "vllm-cache"), "HF_HUB_OFFLINE": "1"}
        ),
        "llama.cpp": lambda port: servers.Server(
            servers.llama_server(
                root,
                model,
                port,
                slots=model.server_slots,
                slot_tokens=model.slot_tokens,
                threads=threads,
            ),
            session_field="id_slot",
        ),
    }
