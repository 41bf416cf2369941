"""Runner of OpenVINO GenAI: its continuous-batching pipeline on the converted checkpoint."""

from __future__ import annotations

import time
from collections.abc import Sequence

from bench.peers import cpu, runner
from bench.peers.workloads import Request, Timing


class OpenVINO:
    def __init__(self, args: runner.RunnerArgs) -> None:
        import openvino_genai as genai

        self.version = genai.__version__
        properties: dict[str, object] = {
            "INFERENCE_NUM_THREADS": args.threads,
            "INFERENCE_PRECISION_HINT": "bf16" if cpu.has_bf16() else "f32",
            "KV_CACHE_PRECISION": "u8",
            "PERFORMANCE_HINT": "LATENCY",
        }
        scheduler = genai.SchedulerConfig()
        scheduler.cache_size = max(1, args.model.kv_cache_bytes >> 30)
        scheduler.max_num_seqs = 64
        scheduler.max_num_batched_tokens = 4096
        scheduler.dynamic_split_fuse = True
        # Of no use here: contents are fresh, and it does not share among requests that arrive together.
        scheduler.enable_prefix_caching = False
        self.settings = {
            **properties,
            "cache_size": scheduler.cache_size,
            "max_num_seqs": 64,
            "max_num_batched_tokens": 4096,
            "dynamic_split_fuse": True,
            "enable_prefix_caching": False,
        }
        kind = args.option("file")
        folder = args.models / f"{args.model.name}-openvino{f'-{kind}' if kind else ''}"
        self.pipeline = genai.ContinuousBatchingPipeline(str(folder), scheduler, "CPU", properties)

    def generate(self, requests: Sequence[Request]) -> Timing:
        import numpy as np
        import openvino as ov
        import openvino_genai as genai

        configs = []
        for request in requests:
            config = genai.GenerationConfig()
            config.max_new_tokens = request.max_tokens
            config.ignore_eos = True
            config.do_sample = False
            configs.append(config)
        times: list[float] = []

        class Watch(genai.StreamerBase):
            def write(self, token: object) -> object:
                times.append(time.perf_counter())
                return genai.StreamingStatus.RUNNING

            def end(self) -> None:
                pass

        prompts = [ov.Tensor(np.array([request.prompt], dtype=np.int64)) for request in requests]
        started = time.perf_counter()
        if len(requests) == 1:
            outputs = self.pipeline.generate(prompts, configs, Watch())
        else:
            outputs = self.pipeline.generate(prompts, configs)
        seconds = time.perf_counter() - started
        return Timing(
            seconds,
            times[0] - started if times else None,
            [len(output.m_generation_ids[0]) for output in outputs],
        )

    def peak_rss_mib(self) -> float:
        return runner.peak_rss_mib()

    def close(self) -> None:
        pass


if __name__ == "__main__":
    runner.main(OpenVINO)
