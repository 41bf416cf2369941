"""Ranks on several machines of one command each: `quire serve MODEL -tp 4 --nnodes 2 --node-rank 0`, or 1.

The first node has the engine core, and so the rank that samples (`numbers_of`). On the others a process
without HTTP (`quire.engine.node`) says hello for each of its ranks, and starts them with their links:
a rank does not know where the other end is.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from quire.config import EngineConfig
from quire.config.parallel import ParallelConfig
from quire.distributed.hello import Facts, accept_all, listen, read_key
from quire.distributed.links import Link
from quire.errors import ConfigError
from quire.executor.processes import ProcessRanks
from quire.executor.ranks import Rank
from quire.runner.footprint import WorkerSpec
from quire.util.version import VERSION

START_SECONDS = 600.0
"""Until every node has been started."""
SAMPLE_BYTES = 64 << 10
"""Of each place of a file."""


def numbers_of(parallel: ParallelConfig, node: int) -> list[int]:
    """The ranks of a node. The rank that samples, the first of the last stage, is on the first node."""
    world, each = parallel.world_size, parallel.world_size // parallel.nnodes
    first = world - max(parallel.tensor_parallel_size, each) + node * each
    return [(first + index) % world for index in range(each)]


def facts(config: EngineConfig, dtype: str, directory: Path) -> Facts:
    """What every node must have alike; all other options are the first node's."""
    parallel = config.parallel
    return {
        "version": VERSION,
        "model": fingerprint(directory),
        "dtype": dtype,
        "tensor_parallel_size": parallel.tensor_parallel_size,
        "pipeline_parallel_size": parallel.pipeline_parallel_size,
        "nnodes": parallel.nnodes,
    }


def fingerprint(path: Path) -> str:
    """Of a checkpoint: its config, and the size, the ends and the middle of each file of weights. Their names
    may differ."""
    digest = hashlib.sha256()
    if not path.is_dir():
        files = [path]
    else:
        digest.update((path / "config.json").read_bytes())
        files = [file for file in path.iterdir() if file.suffix in (".safetensors", ".gguf")]
    samples = []
    for file in files:
        size = file.stat().st_size
        sample = hashlib.sha256(size.to_bytes(8))
        with file.open("rb") as opened:
            for place in (0, size // 2, size - SAMPLE_BYTES):
                opened.seek(max(0, place))
                sample.update(opened.read(SAMPLE_BYTES))
        samples.append(sample.digest())
    digest.update(b"".join(sorted(samples)))
    return digest.hexdigest()[:16]


@dataclass(slots=True)
class NodeRank:
    """A `Rank` of another node."""

    number: int
    name: str
    link: Link

    def reason(self) -> str:
        return "has ended, or its node cannot be reached"

    def end(self) -> None:
        self.link.close()


class NodeRanks:
    """`Ranks` of all nodes, at the first one."""

    group_memory = -1
    host = None
    """The ranks of a node share its cores, and meet at `master_addr`."""

    def __init__(self, config: EngineConfig, spec: WorkerSpec) -> None:
        """Returns when every node has come. Raises `ConfigError`."""
        parallel = config.parallel
        if parallel.node_rank:
            raise ConfigError(
                f"node_rank {parallel.node_rank} runs no engine of its own; start it with quire serve."
            )
        if spec.device != "cpu":
            raise ConfigError(
                f"nnodes {parallel.nnodes} is for --device cpu; use one node for GPUs."
            )
        key = read_key(parallel.node_key_file)
        same = facts(config, spec.dtype, spec.directory)
        sampling = parallel.world_size - parallel.tensor_parallel_size
        here = numbers_of(parallel, 0)
        others = [number for number in range(parallel.world_size) if number not in here]
        here.remove(sampling)
        with listen(parallel.master_addr, parallel.master_port, key) as listener:
            self._local = ProcessRanks(parallel, here)
            try:
                links = accept_all(listener, key, same, others, timeout=START_SECONDS)
            except BaseException:
                self._local.close()
                raise
        self.ranks: list[Rank] = [*self._local.ranks]
        self.ranks += [NodeRank(number, links[number].peer, links[number]) for number in others]

    def close(self) -> None:
        """Idempotent."""
        for rank in self.ranks:
            rank.link.close()
        self._local.close()
