"""Runner of transformers: one static batch, or (option `continuous`) its continuous batching."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from bench.peers import cpu, runner
from bench.peers.workloads import Request, Timing


class Transformers:
    def __init__(self, args: runner.RunnerArgs) -> None:
        import torch
        import transformers

        torch.set_num_threads(args.threads)
        self.version = transformers.__version__
        self.continuous = "continuous" in args.options
        self.settings: dict[str, object] = {
            "dtype": cpu.compute_dtype(),
            "threads": args.threads,
            "batching": "continuous" if self.continuous else "one batch, padded on the left",
        }
        self.model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            args.models / args.model.name, dtype=getattr(torch, cpu.compute_dtype())
        ).eval()
        self.model.generation_config.eos_token_id = None
        self.manager: Any = None
        self.count = 0
        if self.continuous:
            self._start_manager(args)

    def _start_manager(self, args: runner.RunnerArgs) -> None:
        from transformers import ContinuousBatchingConfig, GenerationConfig

        page = 32
        sizes = {
            "page_size": page,
            "num_blocks": args.model.kv_cache_tokens // page,
            "max_batch_tokens": 2048,
            "max_requests_per_batch": 64,
        }
        self.settings |= sizes
        self.manager = self.model.init_continuous_batching(
            generation_config=GenerationConfig(do_sample=False, eos_token_id=None, pad_token_id=0),
            continuous_batching_config=ContinuousBatchingConfig(**sizes),
        )
        self.manager.start()

    def generate(self, requests: Sequence[Request]) -> Timing:
        return self._continuous(requests) if self.continuous else self._static(requests)

    def _static(self, requests: Sequence[Request]) -> Timing:
        import torch

        width = max(len(request.prompt) for request in requests)
        rows = [[0] * (width - len(request.prompt)) + request.prompt for request in requests]
        mask = [
            [0] * (width - len(request.prompt)) + [1] * len(request.prompt) for request in requests
        ]
        steps = max(request.max_tokens for request in requests)
        watch = _Watch()
        with torch.inference_mode():
            started = time.perf_counter()
            out = self.model.generate(
                input_ids=torch.tensor(rows),
                attention_mask=torch.tensor(mask),
                max_new_tokens=steps,
                do_sample=False,
                pad_token_id=0,
                streamer=watch if len(requests) == 1 else None,
            )
            seconds = time.perf_counter() - started
        done = out.shape[1] - width
        first = watch.times[1] - started if len(watch.times) > 1 else None
        # A static batch runs as long as its longest request; only what was asked for counts.
        return Timing(seconds, first, [min(done, request.max_tokens) for request in requests])

    def _continuous(self, requests: Sequence[Request]) -> Timing:
        generated: dict[str, int] = {}
        first = None
        started = time.perf_counter()
        for request in requests:
            self.count += 1
            name = self.manager.add_request(
                request.prompt,
                request_id=f"r{self.count}",
                max_new_tokens=request.max_tokens,
                streaming=len(requests) == 1,
                eos_token_id=-1,
            )
            generated[name] = -1
        while min(generated.values()) < 0:
            result = self.manager.get_result(timeout=1)
            if result is None:
                if not self.manager.is_running():
                    raise RuntimeError("continuous batching stopped before it was done.")
                continue
            if result.error is not None:
                raise RuntimeError(result.error)
            if first is None:
                first = time.perf_counter() - started
            if result.is_finished():
                generated[result.request_id] = len(result.generated_tokens)
        return Timing(time.perf_counter() - started, first, list(generated.values()))

    def peak_rss_mib(self) -> float:
        return runner.peak_rss_mib()

    def close(self) -> None:
        if self.manager is not None:
            self.manager.stop(block=True)


class _Watch:
    """A streamer that only notes when tokens came: the prompt first, then each new one."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: object) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


if __name__ == "__main__":
    runner.main(Transformers)
