"""The measured tables of SERVING.md: what each option of a server does to TTFT, ITL, throughput and memory.

    python -m bench.levers [LEVER ...] --model DIR [--rounds 3] [--json FILE]

DIR is M2 (`python -m bench.peers.models checkpoint M2 DIR`). In each round every setting of a lever gets a
new server, in another order each time, and the same two loads: requests at Poisson times (TTFT, ITL), then
all at once (throughput). A ratio is the setting's value over that of the lever's first setting, the default:
the median over the rounds of the ratio in one round. FILE keeps the levers that are not measured again.
`python -m bench.levers_plot` draws it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from bench.peers.servers import Server, free_port, start, wait_ready
from bench.speculation import CHAT as QUESTIONS

from quire.bench.datasets import BenchRequest, load_requests
from quire.bench.options import DatasetOptions, LoadOptions, TargetOptions
from quire.bench.record import run_record
from quire.bench.serve import Target, load_tokenizer, run_serve
from quire.text import Tokenizer

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "bench" / "results" / "cpu" / "levers-M2.json"
CACHE = "512M"
"""KV of a server that is not asked for less: room for 43,000 tokens of M2."""
MIB = 1 << 20
Figures = dict[str, float]


@dataclass(frozen=True, slots=True)
class Load:
    """`count` requests at Poisson times, then `burst` others at once."""

    about: str
    rate: float
    count: int
    burst: int
    dataset: Mapping[str, object] = field(default_factory=dict)
    long: int = 0
    """Prompt tokens of every fifth request, the third first; 0: none is long."""
    warm: int = 0
    """Requests that are sent before and not counted, with the prefixes of those that are."""

    def requests(self, tokenizer: Tokenizer, seed: int, count: int) -> list[BenchRequest]:
        if not self.dataset:  # the built-in model's questions
            texts = [QUESTIONS[(seed + index) % len(QUESTIONS)] for index in range(count)]
            return [BenchRequest(text, tokenizer.encode(text), 48) for text in texts]
        made = _dataset(tokenizer, seed, count, **self.dataset)
        if self.long:
            few = {"random_input_len": self.long, "random_output_len": 8}
            for place, request in enumerate(_dataset(tokenizer, seed, len(made) // 5 + 1, **few)):
                if place * 5 + 2 < count:
                    made[place * 5 + 2] = request
        return made


def _dataset(tokenizer: Tokenizer, seed: int, count: int, **options: Any) -> list[BenchRequest]:
    chosen = DatasetOptions(num_prompts=count, seed=seed, prompt_token_ids=True, **options)
    return load_requests(chosen, tokenizer)


SHORT: Mapping[str, object] = {
    "random_input_len": 256, "random_output_len": 64, "random_range_ratio": 0.75,
}  # fmt: skip


def _prefixes(length: int, count: int) -> Mapping[str, object]:
    return {
        "dataset_name": "prefix_repetition", "prefix_repetition_prefix_len": length,
        "prefix_repetition_num_prefixes": count, "prefix_repetition_suffix_len": 64,
        "prefix_repetition_output_len": 32,
    }  # fmt: skip


CHAT = Load("prompts of 64 to 448 tokens, answers of 16 to 112", 2.0, 14, 20, SHORT)
ANSWERS = Load(
    "prompts of 32 to 96 tokens, answers of 64 to 192", 1.2, 9, 16,
    {"random_input_len": 64, "random_output_len": 128, "random_range_ratio": 0.5},
)  # fmt: skip
MIXED = replace(
    ANSWERS,
    about=f"{ANSWERS.about}, every fifth prompt 2,500 tokens",
    count=15,
    burst=10,
    long=2500,
)
SHARED = Load(
    "prompts of 512 tokens from 4 that were sent before, and 64 of their own", 2.0, 12, 16,
    _prefixes(512, 4), warm=4,
)  # fmt: skip
RETURN = Load(
    "prompts of 1,024 tokens from 6 that were sent before, and 64 of their own", 1.2, 14, 12,
    _prefixes(1024, 6), warm=6,
)  # fmt: skip
ALONE = Load("questions to the built-in model, seldom two at once", 4.0, 24, 64)
TENANT = Load("one request a second beside 28 of another tenant at once", 1.0, 6, 0, SHORT)


@dataclass(frozen=True, slots=True)
class Lever:
    name: str
    load: Load
    settings: Mapping[str, Sequence[str]]
    """Flags by what the table says. The first one is the default, to which the others are compared."""
    common: Sequence[str] = ()
    built_in: bool = False


SMALL = ("--kv-cache-memory-bytes", "48M", "--max-model-len", "2048")
KEYS = ("--api-keys-file", "FOLDER/keys.toml", "--max-num-seqs", "4")
LEVERS = [
    Lever(
        "KV cache", CHAT,
        {
            f"{CACHE}: all fits": (),
            "32M": ("--kv-cache-memory-bytes", "32M"),
            "16M": ("--kv-cache-memory-bytes", "16M"),
        },
        ("--max-model-len", "1024"),
    ),
    Lever(
        "max-num-batched-tokens", MIXED,
        {
            "2048 (default)": (),
            "256": ("--max-num-batched-tokens", "256"),
            "512": ("--max-num-batched-tokens", "512"),
            "8192": ("--max-num-batched-tokens", "8192"),
            "2048, threshold 256": ("--long-prefill-token-threshold", "256"),
        },
    ),
    Lever(
        "max-num-seqs", CHAT,
        {
            "128 (default)": (),
            "16": ("--max-num-seqs", "16"),
            "4": ("--max-num-seqs", "4"),
        },
    ),
    Lever(
        "enable-prefix-caching", SHARED,
        {"on (default)": (), "off": ("--no-enable-prefix-caching",)},
    ),
    Lever(
        "tiers, cache of 48M", RETURN,
        {
            "none (default)": (),
            "swap-space 0.25": ("--swap-space", "0.25"),
            "kv-disk-path": ("--kv-disk-path", "FOLDER/kv", "--kv-disk-size", "1"),
        },
        SMALL,
    ),
    Lever(
        "block-size", SHARED,
        {
            "16 (default)": (),
            "32": ("--block-size", "32"),
            "128": ("--block-size", "128"),
        },
    ),
    Lever(
        "quantization", ANSWERS,
        {
            "bfloat16 (default)": (),
            "int8": ("--quantization", "int8"),
            "int8, inputs too": ("--quantization", "int8", "--cpu-activation-bits", "8"),
            "int4": ("--quantization", "int4"),
            "KV in fp8": ("--kv-cache-dtype", "fp8"),
        },
    ),
    Lever(
        "speculation", ALONE,
        {
            "none (default)": (),
            "draft_model": ("--spec-method", "draft_model"),
            "suffix": ("--spec-method", "suffix"),
        },
        built_in=True,
    ),
    Lever(
        "devices", CHAT,
        {
            "one (default)": (),
            "-dp 2": ("-dp", "2"),
            "-tp 2": ("-tp", "2"),
            "-pp 2": ("-pp", "2"),
        },
    ),
    Lever(
        "scheduling-policy", TENANT,
        {
            "fcfs": ("--scheduling-policy", "fcfs"),
            "priority": ("--scheduling-policy", "priority"),
            "fair (default with keys)": ("--scheduling-policy", "fair"),
        },
        KEYS,
    ),
]  # fmt: skip
"""FOLDER: this run's, for a disk tier and the keys of tenants."""


def _write_keys(folder: Path) -> None:
    """Two tenants, `polite` and `flood`, whose keys are their names."""
    parts = [
        f'[[keys]]\nsha256 = "{sha256(name.encode()).hexdigest()}"\ntenant = "{name}"\n'
        for name in ("polite", "flood")
    ]
    (folder / "keys.toml").write_text("[tenants.polite]\nbest_priority = -1\n" + "".join(parts))


# --- one server ------------------------------------------------------------------------------------


class Bench:
    def __init__(self, model: Path, folder: Path) -> None:
        self.model, self.folder = model, folder
        self.tokenizers = {False: load_tokenizer(str(model)), True: load_tokenizer("quire-builtin")}

    def measure(self, lever: Lever, flags: Sequence[str], seed: int) -> Figures:
        port = free_port()
        model = [] if lever.built_in else [str(self.model)]
        command = [
            *(sys.executable, "-m", "quire", "serve", *model, "--served-model-name", "model"),
            *("--host", "127.0.0.1", "--port", str(port), "--shutdown-timeout", "0"),
            *("--disable-log-stats", "--disable-uvicorn-access-log"),
            *(("--kv-cache-memory-bytes", CACHE) if not _sizes_cache(lever, flags) else ()),
            *(flag.replace("FOLDER", str(self.folder)) for flag in (*lever.common, *flags)),
        ]  # fmt: skip
        server = Server(command, {"PYTHONPATH": str(ROOT / "src")})
        process = start(server, self.folder / "server.log")
        try:
            wait_ready(port, process, timeout=120)
            for pid in _tree(process.pid):
                _prefer(pid)
            ask = self._tenants if lever.load is TENANT else self._two_loads
            figures = ask(lever, port, seed)
            return figures | _memory(process.pid) | _counters(port)
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=20)
            process.kill()
            process.wait()

    def _two_loads(self, lever: Lever, port: int, seed: int) -> Figures:
        load, tokenizer = lever.load, self.tokenizers[lever.built_in]
        target = _target(port, tokenizer, ask_chat=lever.built_in)
        requests = load.requests(tokenizer, seed, load.count + load.burst)
        if load.warm:
            _run(target, load.requests(tokenizer, seed, load.warm), seed, LoadOptions())
        timed, rest = requests[: load.count], requests[load.count :]
        result = _run(target, timed, seed, LoadOptions(request_rate=load.rate, num_warmups=3))
        burst = _run(target, rest, seed, LoadOptions())
        at_once = {
            "burst_ttft_ms": burst["median_ttft_ms"],
            "burst_itl_p99_ms": burst["p99_itl_ms"],
        }
        return _latencies(result) | at_once | {"output_tok_s": burst["output_throughput"]}

    def _tenants(self, lever: Lever, port: int, seed: int) -> Figures:
        """TTFT and ITL are the polite tenant's, throughput is that of both."""
        load, tokenizer = lever.load, self.tokenizers[False]
        flood = _target(port, tokenizer, key="flood")
        polite = _target(port, tokenizer, key="polite", extra_body={"priority": -1})
        many = load.requests(tokenizer, 2 * seed, 30)
        few = load.requests(tokenizer, 2 * seed + 1, load.count)
        found: dict[str, dict[str, Any]] = {}
        _run(flood, many[:2], seed, LoadOptions())  # warm

        def send() -> None:
            found["flood"] = _run(flood, many[2:], seed, LoadOptions())

        beside = threading.Thread(target=send)
        began = time.perf_counter()
        beside.start()
        time.sleep(0.5)
        found["polite"] = _run(polite, few, seed, LoadOptions(request_rate=load.rate))
        beside.join()
        seconds = time.perf_counter() - began
        tokens = sum(each["total_output_tokens"] for each in found.values())
        return _latencies(found["polite"]) | {"output_tok_s": tokens / seconds}


def _sizes_cache(lever: Lever, flags: Sequence[str]) -> bool:
    return "--kv-cache-memory-bytes" in (*lever.common, *flags)


def _target(
    port: int,
    tokenizer: Tokenizer,
    *,
    ask_chat: bool = False,
    key: str | None = None,
    extra_body: dict[str, object] | None = None,
) -> Target:
    options = TargetOptions(
        port=port,
        model="model",
        backend="openai-chat" if ask_chat else "openai",
        temperature=0.0,
        ignore_eos=not ask_chat,
        api_key=key,
        extra_body=extra_body or {},
    )
    return Target(options, "model", "model", tokenizer)


def _run(
    target: Target, requests: Sequence[BenchRequest], seed: int, load: LoadOptions
) -> dict[str, Any]:
    send_ids = not target.options.chat
    run = run_serve(
        target, requests, load, seed=seed, percentiles=(90, 99, 100), slos={}, send_ids=send_ids
    )
    if run.figures["failed"]:
        raise SystemExit(f"requests failed: {run.figures['error_counts']}")
    return run.figures


def _latencies(figures: Mapping[str, Any]) -> Figures:
    return {
        "ttft_ms": figures["median_ttft_ms"],
        "ttft_p90_ms": figures["p90_ttft_ms"],
        "tpot_ms": figures["median_tpot_ms"],
        "itl_p99_ms": figures["p99_itl_ms"],
        "itl_max_ms": figures["p100_itl_ms"],
        "cached": figures["cached_input_tokens"] / figures["total_input_tokens"],
    }


def _memory(pid: int) -> Figures:
    """Of the server and its processes, what they share counted once."""
    total = 0
    for each in _tree(pid):
        with contextlib.suppress(OSError):  # it ended meanwhile
            lines = Path(f"/proc/{each}/smaps_rollup").read_text().splitlines()
            total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return {"memory_mib": total / 1024}


def _counters(port: int) -> Figures:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    found = [line for line in lines if line.startswith("vllm:num_preemptions_total{")]
    return {"preemptions": sum(float(line.rpartition(" ")[2]) for line in found)}


def _tree(pid: int) -> list[int]:
    """The process and its descendants, which may have sessions of their own."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    found = [pid]
    for each in found:
        found += [child for child, parent in parents.items() if parent == each]
    return found


def _prefer(pid: int, nice: int = -10) -> None:
    """Before other work on the machine, where the system has autogroups and this user may."""
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/autogroup").write_text(str(nice))


# --- rounds ----------------------------------------------------------------------------------------


def measure(bench: Bench, lever: Lever, rounds: int) -> dict[str, Any]:
    names = list(lever.settings)
    found: dict[str, list[Figures]] = {name: [] for name in names}
    for round_ in range(rounds):
        for name in names[round_ % len(names) :] + names[: round_ % len(names)]:
            began = time.perf_counter()
            found[name].append(bench.measure(lever, lever.settings[name], round_))
            figures = {key: round(value, 2) for key, value in found[name][-1].items()}
            print(
                f"{lever.name}: {name} ({time.perf_counter() - began:.0f} s)", figures, flush=True
            )
    first = found[names[0]]
    return {
        "load": lever.load.about,
        "model": "quire-builtin" if lever.built_in else bench.model.name,
        "record": run_record() | {"measured_at": "autogroup -10"},
        "settings": [
            {
                "name": name,
                "flags": " ".join(lever.settings[name]),
                "rounds": found[name],
                **summary(found[name], first),
            }
            for name in names
        ],
    }


def summary(values: Sequence[Figures], default: Sequence[Figures]) -> dict[str, Figures]:
    """Medians, and medians of the ratios to the default in the same round, where that is not 0."""
    medians = {key: statistics.median(each[key] for each in values) for key in values[0]}
    ratios = {}
    for key in medians:
        pairs = [(each[key], base[key]) for each, base in zip(values, default, strict=True)]
        if all(base for _, base in pairs):
            ratios[key] = statistics.median(value / base for value, base in pairs)
    return {"medians": medians, "ratios": ratios}


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="quire-levers-") as name:
        yield Path(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("levers", nargs="*", metavar="LEVER")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, default=RESULT)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the server ends too
    _prefer(os.getpid())
    with _folder() as folder:
        _write_keys(folder)
        known = {lever.name: lever for lever in LEVERS}
        if unknown := set(args.levers) - set(known):
            parser.error(f"no lever {sorted(unknown)}; there are {list(known)}")
        bench = Bench(args.model, folder)
        for name in args.levers or known:
            result = measure(bench, known[name], args.rounds)
            kept = json.loads(args.json.read_text()) if args.json.exists() else {}
            kept[name] = result
            ordered = {each: kept[each] for each in known if each in kept}
            args.json.write_text(json.dumps(ordered, indent=1) + "\n")


if __name__ == "__main__":
    main()
