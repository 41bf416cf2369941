"""What LoRA adapters cost, here and in other engines: decoding of a batch and of one request.

    python -m bench.lora --models DIR [--model M2] [--peers DIR] [--repeats 5] [--json FILE]

Engines take turns in each repeat, so that what else runs on the machine disturbs all alike: Quire without
`enable_lora`, Quire with it, vLLM with it, and llama.cpp's server with all adapters loaded. Cases: no request
has an adapter; all have the same one; each has one of 16. A speed is generated tokens per second of the whole
run, prompts included. Adapters are random, of rank 16, for all seven matrices of a layer.

--lock FILE: held during each case. --realtime: an engine that is measured runs with SCHED_FIFO (needs root).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import fcntl
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.peers import cpu, rivals, servers

REPOSITORY = Path(__file__).resolve().parent.parent
RANK, ADAPTERS, PROMPT, NEW = 16, 16, 64, 64
BATCHES = (64, 16, 1)
CASES = ("base", "1 adapter", "16 adapters")


def write_adapters(model: Path, directory: Path) -> None:
    import torch
    from safetensors.torch import save_file

    config = json.loads((model / "config.json").read_text())
    hidden, inner, size = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * size, config["num_key_value_heads"] * size
    shapes = {
        "self_attn.q_proj": (q, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, q), "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }  # fmt: skip
    for index in range(ADAPTERS):
        folder = directory / str(index)
        folder.mkdir(parents=True, exist_ok=True)
        rng = torch.Generator().manual_seed(index)
        tensors = {}
        for layer in range(config["num_hidden_layers"]):
            for name, (n, k) in shapes.items():
                prefix = f"base_model.model.model.layers.{layer}.{name}"
                tensors[f"{prefix}.lora_A.weight"] = torch.randn(RANK, k, generator=rng) * 0.02
                tensors[f"{prefix}.lora_B.weight"] = torch.randn(n, RANK, generator=rng) * 0.02
        save_file(tensors, folder / "adapter_model.safetensors")
        targets = sorted({name.rpartition(".")[2] for name in shapes})
        fields = {"peft_type": "LORA", "r": RANK, "lora_alpha": 32, "target_modules": targets,
                  "task_type": "CAUSAL_LM", "bias": "none"}  # fmt: skip
        (folder / "adapter_config.json").write_text(json.dumps(fields))


def prompts(count: int, vocabulary: int, seed: int) -> list[list[int]]:
    chooser = random.Random(seed)
    return [[chooser.randrange(3, vocabulary) for _ in range(PROMPT)] for _ in range(count)]


def adapter_of(case: str, index: int) -> int | None:
    return {"base": None, "1 adapter": 0, "16 adapters": index % ADAPTERS}[case]


# ---- engines, each in a process of its own --------------------------------------------------------------


class Offline:
    """An engine with vLLM's `LLM.generate`."""

    llm: Any
    params: Any
    adapters: list[Any]

    def run(self, case: str, inputs: list[list[int]]) -> None:
        chosen = [adapter_of(case, i) for i in range(len(inputs))]
        loras = [None if i is None else self.adapters[i] for i in chosen]
        self.llm.generate(
            [{"prompt_token_ids": ids} for ids in inputs],
            self.params,
            lora_request=loras if any(loras) else None,
            use_tqdm=False,
        )


class Quire(Offline):
    def __init__(self, args: argparse.Namespace) -> None:
        import quire

        self.version = quire.__version__
        options: dict[str, Any] = {
            "max_num_seqs": 64,
            "max_model_len": 1024,
            "cpu_threads": args.threads,
        }
        if args.worker == "quire":
            options |= {
                "enable_lora": True,
                "max_loras": 16,
                "max_lora_rank": 16,
                "max_cpu_loras": 16,
            }
        self.llm = quire.LLM(
            str(args.models / args.model), dtype="bfloat16", enable_prefix_caching=False, **options
        )
        self.adapters = [
            quire.LoRARequest(f"a{i}", i + 1, str(args.adapters / str(i))) for i in range(ADAPTERS)
        ]

        self.params = quire.SamplingParams(temperature=0.0, max_tokens=NEW, ignore_eos=True)


class VLLM(Offline):
    def __init__(self, args: argparse.Namespace) -> None:
        import vllm
        from vllm.lora.request import LoRARequest

        self.version = vllm.__version__
        self.llm = vllm.LLM(
            str(args.models / args.model),
            dtype=cpu.compute_dtype(),
            max_num_seqs=64,
            max_model_len=1024,
            kv_cache_memory_bytes=2 << 30,
            enable_prefix_caching=False,
            enable_lora=True,
            max_loras=16,
            max_lora_rank=16,
            max_cpu_loras=16,
            disable_log_stats=True,
        )
        self.adapters = [
            LoRARequest(f"a{i}", i + 1, str(args.adapters / str(i))) for i in range(ADAPTERS)
        ]

        self.params = vllm.SamplingParams(
            temperature=0.0, max_tokens=NEW, ignore_eos=True, detokenize=False
        )


class LlamaCpp:
    def __init__(self, args: argparse.Namespace) -> None:
        self.version = "llama-server of llama-cpp-python 0.3.36"
        self.port = servers.free_port()
        file = args.peers / "models" / f"{args.model}-{cpu.gguf_dtype()}.gguf"
        command = [
            str(args.peers / "llama.cpp-build" / "bin" / "llama-server"),
            *("--model", str(file), "--host", "127.0.0.1", "--port", str(self.port)),
            *("--parallel", "64", "--ctx-size", str(64 * 192), "--threads", str(args.threads)),
            *("--threads-batch", str(args.threads), "--flash-attn", "on", "--no-kv-unified"),
            *("--cache-ram", "0", "--fit", "off", "--no-ui", "--log-verbosity", "1"),
            "--lora-init-without-apply",
        ]
        for i in range(ADAPTERS):
            command += ["--lora", str(args.adapters / f"{i}.gguf")]
        self.process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        servers.wait_ready(self.port, self.process, timeout=120)

    def run(self, case: str, inputs: list[list[int]]) -> None:
        async def one(index: int, ids: list[int]) -> None:
            adapter = adapter_of(case, index)
            fields = {"prompt": ids, "n_predict": NEW, "temperature": 0.0, "ignore_eos": True}
            lora = [{"id": i, "scale": float(i == adapter)} for i in range(ADAPTERS)]
            body = json.dumps({**fields, "cache_prompt": False, "lora": lora})
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
            head = "POST /completion HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
            head += f"Content-Length: {len(body)}\r\n\r\n"
            writer.write((head + body).encode())
            answer = await reader.read()
            writer.close()
            assert b'"tokens_predicted":64' in answer, answer[:300]

        async def every() -> None:
            await asyncio.gather(*(one(index, ids) for index, ids in enumerate(inputs)))

        asyncio.run(every())


def serve(args: argparse.Namespace) -> None:
    """Answers lines of JSON, on a descriptor of its own: libraries print to stdout."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    engine = {"vllm": VLLM, "llama.cpp": LlamaCpp}.get(args.worker, Quire)(args)
    pids = [os.getpid()]
    if isinstance(engine, LlamaCpp):
        pids.append(engine.process.pid)
    print(json.dumps({"version": engine.version, "pids": pids}), file=answers, flush=True)
    vocabulary = json.loads((args.models / args.model / "config.json").read_text())["vocab_size"]
    try:
        for line in sys.stdin:
            job = json.loads(line)
            inputs = prompts(job["batch"], vocabulary, job["seed"])
            started = time.perf_counter()
            engine.run(job["case"], inputs)
            seconds = time.perf_counter() - started
            print(json.dumps({"tok_s": job["batch"] * NEW / seconds}), file=answers, flush=True)
    finally:
        if isinstance(engine, LlamaCpp):
            engine.process.kill()


# ---- the driver -------------------------------------------------------------------------------------------


class Engine:
    def __init__(self, name: str, args: argparse.Namespace) -> None:
        self.name, self._realtime = name, args.realtime
        python = (
            args.peers / "venvs" / "vllm" / "bin" / "python" if name == "vllm" else sys.executable
        )
        command = [str(python), __file__, "--worker", name, "--model", args.model]
        for option in ("models", "adapters", "peers", "threads"):
            command += [f"--{option}", str(getattr(args, option))]
        paths = [REPOSITORY] if name == "vllm" else [REPOSITORY / "src", REPOSITORY]
        environment = {**os.environ, "PYTHONPATH": ":".join(map(str, paths))}
        if name == "vllm":
            environment |= rivals.vllm_env(args.peers, args.threads, in_process=True)
        with (args.adapters / f"{name}.log").open("w") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
            )
        first = self._read()
        self.version, self._pids = first["version"], first["pids"]

    def run(self, case: str, batch: int, seed: int) -> float:
        assert self._process.stdin is not None
        self._schedule("-f", "1")
        self._process.stdin.write(json.dumps({"case": case, "batch": batch, "seed": seed}) + "\n")
        self._process.stdin.flush()
        speed = float(self._read()["tok_s"])
        self._schedule("-o", "0")
        return speed

    def _schedule(self, policy: str, priority: str) -> None:
        for pid in self._pids if self._realtime else ():
            subprocess.run(
                ["chrt", "-a", policy, "-p", priority, str(pid)], check=False, capture_output=True
            )

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended; its log is beside the adapters.")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()


@contextlib.contextmanager
def locked(path: Path | None) -> Iterator[None]:
    if path is None:
        yield
        return
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def convert(args: argparse.Namespace) -> None:
    """llama.cpp's form of the adapters, by its own script."""
    tool = next((args.peers / "src").glob("*/vendor/llama.cpp/convert_lora_to_gguf.py"))
    path = f"{tool.parent / 'gguf-py'}:{tool.parent}"
    for i in range(ADAPTERS):
        target = args.adapters / f"{i}.gguf"
        if not target.exists():
            subprocess.run(
                [sys.executable, tool, "--base", args.models / args.model, "--outtype", "f16", "--outfile",
                 target, args.adapters / str(i)],
                check=True, env={**os.environ, "PYTHONPATH": path}, capture_output=True,
            )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", type=Path, default=Path("/tmp/models"))
    parser.add_argument("--model", default="M2")
    parser.add_argument("--peers", type=Path, default=Path.home() / ".cache" / "quire" / "peers")
    parser.add_argument("--adapters", type=Path)
    parser.add_argument("--engines", default="quire-off,quire,vllm,llama.cpp")
    parser.add_argument("--batches", default=",".join(map(str, BATCHES)))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--lock", type=Path)
    parser.add_argument("--realtime", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.adapters = args.adapters or Path("/tmp") / f"quire-bench-adapters-{args.model}"
    if args.worker:
        serve(args)
        return
    if not (args.adapters / str(ADAPTERS - 1) / "adapter_config.json").exists():
        write_adapters(args.models / args.model, args.adapters)
    names = args.engines.split(",")
    if "llama.cpp" in names:
        convert(args)
    engines = [Engine(name, args) for name in names]
    speeds: dict[tuple[str, int, str], list[float]] = {}
    for repeat in range(args.repeats + 1):  # the first one warms up
        for batch in map(int, args.batches.split(",")):
            for case in CASES:
                with locked(args.lock):
                    for engine in engines:
                        if (engine.name == "quire-off" and case != "base") or (
                            batch == 1 and case == CASES[2]
                        ):
                            continue
                        speed = engine.run(case, batch, repeat)
                        if repeat:
                            speeds.setdefault((engine.name, batch, case), []).append(speed)
    table = []
    for (name, batch, case), values in speeds.items():
        of = "quire-off" if name == "quire" else name
        base = speeds.get((of, batch, "base"), values)
        ratio = statistics.median(v / b for v, b in zip(values, base, strict=True))
        row = {"engine": name, "batch": batch, "case": case, "tok_s": statistics.median(values)}
        table.append({**row, "of_base": ratio, "all": values})
        print(
            f"{name:10} {batch:3} {case:12} {table[-1]['tok_s']:8.1f} tok/s  {ratio:.3f} of its base"
        )
    if args.json:
        from quire.bench.record import run_record

        record = {**run_record(), "command": sys.argv, "versions": {e.name: e.version for e in engines},
                  "prompt": PROMPT, "new": NEW, "rank": RANK, "results": table}  # fmt: skip
        args.json.write_text(json.dumps(record, indent=1))
    for engine in engines:
        engine.close()


if __name__ == "__main__":
    main()
