"""Options of several devices: how the model is divided among them, and how many copies of it are served."""

from __future__ import annotations

import os
from dataclasses import dataclass

from quire.config.options import option
from quire.errors import ConfigError

LAYER_PARTITION = "VLLM_PP_LAYER_PARTITION"


@dataclass(frozen=True, slots=True)
class ParallelConfig:
    """A rank is one device with its part of the model; a replica is all ranks of one copy."""

    tensor_parallel_size: int = option(
        1,
        "Devices that share every layer: each computes some of the heads and of the results of each matrix.",
        aliases=("-tp",),
    )
    pipeline_parallel_size: int = option(
        1, "Stages of consecutive layers, each on devices of its own.", aliases=("-pp",)
    )
    pipeline_layer_partition: str = option(
        "",
        "Layers of each stage, like 20,12. Default: stages of equal weight. Also VLLM_PP_LAYER_PARTITION.",
    )
    data_parallel_size: int = option(
        1,
        "Copies of the model behind one server, which sends each request to one of them. They share the "
        "machine's cores and memory; limits such as --max-num-seqs are each one's.",
        aliases=("-dp",),
    )
    distributed_executor_backend: str = option(
        "auto",
        "Who starts the ranks. auto: mp if there are several; uni: one rank, in the engine's process; "
        "mp: processes of this machine, or of --nnodes; ray: actors of a Ray cluster.",
        choices=("auto", "uni", "mp", "ray"),
    )
    nnodes: int = option(
        1, "Machines that the ranks are on, with mp. Each runs this command.", aliases=("-n",)
    )
    node_rank: int = option(
        0, "Number of this machine, from 0. The first one answers requests.", aliases=("-r",)
    )
    master_addr: str = option("127.0.0.1", "Address of the first machine.")
    master_port: int = option(29501, "Port there that the others connect to.")
    node_key_file: str | None = option(
        None,
        "File with the key that all machines share (16 bytes or more). Default: QUIRE_NODE_KEY. Only "
        "machines at a loopback address need none.",
    )
    headless: bool = option(
        False, "No HTTP server on this machine. It is so wherever --node-rank is above 0."
    )
    worker_timeout: float = option(
        60.0,
        "Seconds that a rank may be late within a step. Then the engine ends, and names it.",
    )

    def __post_init__(self) -> None:
        if not self.pipeline_layer_partition:
            object.__setattr__(
                self, "pipeline_layer_partition", os.environ.get(LAYER_PARTITION, "")
            )
        sizes = [f"{name}_parallel_size" for name in ("tensor", "pipeline", "data")]
        for name in (*sizes, "nnodes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if not 0 <= self.node_rank < self.nnodes:
            raise ConfigError(
                f"node_rank must be from 0 to {self.nnodes - 1} (nnodes is {self.nnodes}), "
                f"got {self.node_rank}."
            )
        if self.world_size % self.nnodes:
            raise ConfigError(
                f"{self.world_size} ranks (tensor_parallel_size x pipeline_parallel_size) cannot be divided "
                f"evenly among {self.nnodes} nodes; change nnodes or the sizes."
            )
        if self.data_parallel_size > 1 and self.nnodes > 1:
            raise ConfigError(
                f"data_parallel_size is {self.data_parallel_size} and nnodes {self.nnodes}: copies are on "
                "one machine. Start one server on each machine, behind a balancer."
            )
        if self.headless and not self.node_rank:
            raise ConfigError("headless is for node_rank 1 and above: the first node answers.")
        if self.distributed_executor_backend == "uni" and self.world_size > 1:
            raise ConfigError(
                f"distributed_executor_backend uni is for one rank, but tensor_parallel_size x "
                f"pipeline_parallel_size is {self.world_size}; use mp."
            )
        if not 0 < self.master_port < 65536:
            raise ConfigError(f"master_port must be from 1 to 65535, got {self.master_port}.")
        if not self.worker_timeout > 0:
            raise ConfigError(f"worker_timeout must be above 0, got {self.worker_timeout}.")

    @property
    def world_size(self) -> int:
        """Ranks of one replica."""
        return self.tensor_parallel_size * self.pipeline_parallel_size
