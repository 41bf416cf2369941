"""How fast KV goes from one instance to another on one machine, over TCP and through shared memory.

    python -m bench.kv_peers [--model DIR] [--blocks 128] [--rounds 7] [--json FILE]

A process of its own holds the KV of a prompt of 2,048 tokens of M2 (12 layers, 4 KV heads of 64, blocks of 16
tokens: 196,608 bytes each). This one fetches it, from one rank or from two, with one call or in the calls of
1 MiB that a load makes. "save" is the copy into the memory that holds it, for which a step waits. Medians;
the first fetch, with the connection's hello, is apart.

With --model: the time to the first token of a new prompt of so many blocks and 8 tokens, computed, and with
its KV at an engine in the other process. They take turns.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from quire import LLM, SamplingParams
from quire.bench.record import run_record
from quire.config import KVTransfer
from quire.kvtransfer.peering import create_peering
from quire.kvtransfer.share import KVShare
from quire.messages import BlockName, KVSource
from quire.outputs import RequestOutput

LAYERS, HEADS, HEAD_BYTES = 12, 4, 2048
KEY = b"k" * 32
PORT = 18_700
CHUNK = 5
"""Blocks of a call: 1 MiB."""
CASES = {
    "TCP": ("TCPConnector", 1, None),
    "TCP, calls of 1 MiB": ("TCPConnector", 1, CHUNK),
    "TCP, from two ranks": ("TCPConnector", 2, None),
    "shared memory": ("SharedMemoryConnector", 1, None),
    "shared memory, calls of 1 MiB": ("SharedMemoryConnector", 1, CHUNK),
    "shared memory, from two ranks": ("SharedMemoryConnector", 2, None),
}
"""The connector, the ranks that hold KV, and the blocks of a call."""


class Filled:
    def wait(self) -> None:
        pass


def names(seed: int, count: int) -> list[BlockName]:
    return [(hashlib.sha256(b"%d %d" % (seed, index)).digest(), 0) for index in range(count)]


def share(rank: int, ranks: int) -> KVShare:
    heads = rank * HEADS // ranks, (rank + 1) * HEADS // ranks
    return KVShare((tuple(range(LAYERS)),), heads, HEAD_BYTES)


def transfer(connector: str, folder: str, role: str) -> KVTransfer:
    host = "127.0.0.1" if connector == "TCPConnector" else f"unix:{folder}/kv"
    return KVTransfer(kv_connector=connector, kv_role=role, kv_ip=host, kv_port=PORT, peers=(host,))


def hold(connector: str, folder: str, ranks: int, blocks: int) -> None:
    """The other process: for each line with a number, hold that prompt's KV; answer with its ticket."""
    with ExitStack() as stack:
        made = []
        for rank in range(ranks):
            own = share(rank, ranks)
            one = create_peering(
                transfer(connector, folder, "kv_producer"),
                own,
                b"f",
                key=KEY,
                engine_id="P",
                rank=rank,
            )
            stack.callback(one.close)
            data = np.random.default_rng(rank).integers(0, 256, (blocks, own.block_bytes), np.uint8)
            made.append((one.exports, data))
        for line in sys.stdin:
            wanted = names(int(line), blocks)
            assert made[0][0] is not None
            ticket = made[0][0].issue(wanted)
            began = time.perf_counter()
            for exports, data in made:
                assert exports is not None and ticket is not None
                for row, block in zip(exports.reserve(ticket, wanted) or (), data, strict=True):
                    row[:] = block
                exports.ready(ticket, Filled())
            print(ticket, time.perf_counter() - began, flush=True)


def measure(
    connector: str, ranks: int, chunk: int | None, blocks: int, rounds: int
) -> dict[str, float]:
    own, fetches, saves = share(0, 1), [], []
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        holder = [sys.executable, "-m", "bench.kv_peers", "--hold", connector, folder, str(ranks)]
        child = subprocess.Popen(
            [*holder, "--blocks", str(blocks)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        stack.enter_context(child)
        settings = transfer(connector, folder, "kv_consumer")
        here = create_peering(settings, own, b"f", key=KEY, engine_id="D")
        stack.callback(here.close)
        peers, out = here.peers, np.zeros((blocks, own.block_bytes), np.uint8)
        assert peers is not None and child.stdin is not None and child.stdout is not None
        for turn in range(rounds + 1):
            print(turn, file=child.stdin, flush=True)
            ticket, save = child.stdout.readline().split()
            source = KVSource(
                engine_id="P",
                host=settings.kv_ip,
                ports=tuple(PORT + rank for rank in range(ranks)),
                ticket=ticket,
                num_tokens=16 * blocks,
            )
            wanted, step = names(turn, blocks), chunk or blocks
            began = time.perf_counter()
            good = sum(
                peers.fetch(source, wanted[i : i + step], out[i : i + step], 10.0)
                for i in range(0, blocks, step)
            )
            fetches.append(time.perf_counter() - began)
            saves.append(float(save))
            assert good == blocks
            peers.done(source)
        child.stdin.close()
    median = statistics.median(fetches[1:])
    return {
        "first_ms": round(1000 * fetches[0], 1),
        "fetch_ms": round(1000 * median, 1),
        "save_ms": round(1000 * statistics.median(saves), 1),
        "GB_per_s": round(out.nbytes / median / 1e9, 2),
    }


def engine(connector: str, folder: str, role: str, model: str, blocks: int) -> LLM:
    place = "127.0.0.1" if connector == "TCPConnector" else f"unix:{folder}/kv"
    config = {
        "kv_connector": connector, "kv_role": role, "kv_ip": place, "kv_port": PORT,
        "kv_connector_extra_config": {"peers": [place]},
    }  # fmt: skip
    return LLM(
        model, kv_transfer_config=config, max_model_len=16 * blocks + 32,
        num_gpu_blocks_override=blocks + 4,
    )  # fmt: skip


def ask(llm: LLM, seed: int, blocks: int, kv: object = None) -> RequestOutput:
    prompt = random.Random(seed).choices(range(300, 4000), k=16 * blocks + 8)
    extra = {"kv_transfer_params": kv} if kv else None
    params = SamplingParams(temperature=0.0, max_tokens=1, extra_args=extra)
    [output] = llm.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)
    return output


def compute(connector: str, folder: str, model: str, blocks: int) -> None:
    """The other process with --model: for each line with a number, compute that prompt; answer who has its
    KV."""
    with engine(connector, folder, "kv_producer", model, blocks) as llm:
        for line in sys.stdin:
            output = ask(llm, int(line), blocks, {"do_remote_decode": True})
            print(json.dumps(output.kv_transfer_params), flush=True)


def time_to_first_token(connector: str, model: str, blocks: int, rounds: int) -> dict[str, float]:
    recomputed, loaded = [], []
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        words = ["--hold", connector, folder, "1", "--model", model, "--blocks", str(blocks)]
        child = stack.enter_context(
            subprocess.Popen(
                [sys.executable, "-m", "bench.kv_peers", *words],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
        assert child.stdin is not None and child.stdout is not None
        llm = stack.enter_context(engine(connector, folder, "kv_consumer", model, blocks))
        for turn in range(rounds + 1):
            began = time.perf_counter()
            output = ask(llm, -1 - turn, blocks)
            recomputed.append(time.perf_counter() - began)
            assert not output.num_cached_tokens
            print(turn, file=child.stdin, flush=True)
            params = json.loads(child.stdout.readline())
            began = time.perf_counter()
            output = ask(llm, turn, blocks, params)
            loaded.append(time.perf_counter() - began)
            assert output.num_cached_tokens == 16 * blocks, output.num_cached_tokens
        child.stdin.close()
    both = [1000 * statistics.median(each[1:]) for each in (recomputed, loaded)]
    return {"recompute_ms": both[0], "hit_ms": both[1], "ratio": both[1] / both[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--blocks", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--hold", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.hold and args.model:
        compute(args.hold[0], args.hold[1], args.model, args.blocks)
        return
    if args.hold:
        hold(args.hold[0], args.hold[1], int(args.hold[2]), args.blocks)
        return
    record: dict[str, object] = {"record": run_record(), "blocks": args.blocks}
    for connector in ("TCPConnector", "SharedMemoryConnector") if args.model else ():
        times = time_to_first_token(connector, args.model, args.blocks, args.rounds)
        record[f"time to first token, {connector}"] = times
        print(
            f"{connector:22} {times['hit_ms']:.0f} ms to the first token, computed "
            f"{times['recompute_ms']:.0f} ms: {times['ratio']:.3f}"
        )
    for name, case in CASES.items() if not args.model else ():
        record[name] = found = measure(*case, args.blocks, args.rounds)
        print(
            f"{name:30} fetch {found['fetch_ms']:6.1f} ms (first {found['first_ms']:.1f}), "
            f"{found['GB_per_s']:.2f} GB/s; save {found['save_ms']:.1f} ms"
        )
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
