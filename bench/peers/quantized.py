"""Quantized weights: Quire and every rival that reads or makes the same format, interleaved in one run.

    bench/peers/setup                                        (once; then also the quantized files)
    .venv/bin/python -m bench.peers.quantized --model M2     (from the repository's root)

Q1 is one request's decoding, Q2 a prompt of 2,048 tokens, Q3 64 mixed requests: W2, W4 and W1 of `workloads`.
Every row has Quire and a rival on one file, or on the same scheme made from one checkpoint. `quire bf16` is
what quantization is measured against. Results: bench/results/cpu/<date>-<commit>-<model>-quantized.{json,md}.
"""

from __future__ import annotations

import signal
import statistics
import sys
from typing import Any

from bench.peers import cpu
from bench.peers.compare import Comparison, parse, write
from bench.peers.rivals import REPOSITORY, Spec, peers_dir

GGUF = ("q8_0", "q4_0", "q4_K_M")
WORKLOADS = {
    "Q1 decode, tok/s": ("W2", "decode_tok_s"),
    "Q2 prefill, tok/s": ("W4", "prefill_tok_s"),
    "Q3 64 requests, output tok/s": ("W1", "output_tok_s"),
}
PAIRS = {
    # what is compared: (Quire's engine, rivals)
    **{kind: (f"quire {kind}", (f"llama.cpp {kind}",)) for kind in GGUF},
    "int8": ("quire int8", ("openvino int8", "llama.cpp q8_0")),
    "int4": ("quire int4", ("openvino int4", "llama.cpp q4_0", "mistral.rs q4_K")),
}


def specs(threads: int) -> list[Spec]:
    ours = {"PYTHONPATH": f"{REPOSITORY / 'src'}:{REPOSITORY}"}
    rust = {"RAYON_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    work = ("W1", "W2", "W4")
    server = ("llama.cpp-build/bin/llama-server",)

    def quire(name: str, option: str, file: str = "{model}") -> Spec:
        options = (option,) if option else ()
        return Spec(
            f"quire {name}", "bench.peers.run_quire", None, file, ours, options, workloads=work
        )

    return [
        quire("bf16", ""),
        *(quire(kind, f"file={kind}", f"{{model}}-{kind}.gguf") for kind in GGUF),
        quire("int8", "quantization=int8"),
        quire("int4", "quantization=int4"),
        *(
            Spec(
                f"llama.cpp {kind}",
                "bench.peers.run_llama_cpp",
                "llama_cpp",
                f"{{model}}-{kind}.gguf",
                options=(f"file={kind}",),
                workloads=work,
                also=server,
            )
            for kind in GGUF
        ),
        *(
            Spec(
                f"openvino {kind}",
                "bench.peers.run_openvino",
                "openvino",
                f"{{model}}-openvino-{kind}",
                options=(f"file={kind}",),
                workloads=work,
            )
            for kind in ("int8", "int4")
        ),
        Spec(
            "mistral.rs q4_K",
            "bench.peers.run_mistralrs",
            "mistralrs",
            "{model}-mistralrs",
            rust,
            ("isq=Q4K",),
            workloads=("W2", "W4"),
        ),
    ]


def markdown(results: dict[str, Any]) -> str:
    """Medians, and ratios of Quire to the best rival of each row and to its own bf16."""

    def median(engine: str, workload: str, key: str) -> float | None:
        values = [
            sample["measures"][key]
            for sample in results["samples"]
            if (sample["engine"], sample["workload"]) == (engine, workload)
            and sample["repeat"] >= 0
        ]
        return statistics.median(values) if values else None

    record = results["record"]
    lines = [
        f"# Quantized weights, {results['title']}",
        "",
        f"`{record['command']}`, {results['repeats']} interleaved repeats, medians. "
        f"{record['date']}, commit {record['commit']}, {_processor()}.",
    ]
    for title, (workload, key) in WORKLOADS.items():
        bf16 = median("quire bf16", workload, key)
        lines += [
            "",
            f"## {title}",
            "",
            f"Quire in bf16: {bf16:.0f}." if bf16 else "Quire in bf16: not measured.",
            "",
            "| weights | Quire | to its bf16 | best rival | ratio | all rivals |",
            "|---|---|---|---|---|---|",
        ]
        for name, (engine, rivals) in PAIRS.items():
            mine = median(engine, workload, key)
            others = {rival: median(rival, workload, key) for rival in rivals}
            found = {rival: value for rival, value in others.items() if value}
            if mine is None:
                continue
            best = max(found, key=lambda rival: found[rival], default=None)
            ratio = f"{mine / found[best]:.2f}" if best else ""
            gain = f"{mine / bf16:.2f}" if bf16 else ""
            listed = ", ".join(f"{rival} {value:.0f}" for rival, value in found.items())
            lines.append(f"| {name} | {mine:.0f} | {gain} | {best or ''} | {ratio} | {listed} |")
    for engine, reason in results["skipped"].items():
        lines += ["", f"{engine}: {reason}"]
    return "\n".join(lines) + "\n"


def _processor() -> str:
    kinds = sorted(cpu.flags() & {"avx512f", "avx512_vnni", "avx512_bf16", "amx_int8"})
    return f"flags {' '.join(kinds)}" if kinds else "no AVX-512"


def main() -> None:
    args = parse(__doc__)
    args.workloads = [name for name in ("W2", "W4", "W1") if name in args.workloads]
    root = peers_dir()
    logs = root / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    run = Comparison(args, root, logs, specs(args.threads))
    try:
        run.measure()
    finally:
        run.abandon()
    write(run.results, args, markdown, "-quantized")
    print(markdown(run.results))


if __name__ == "__main__":
    main()
