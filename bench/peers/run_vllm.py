"""Runner of vLLM's CPU build, in process: the engine's own step loop, timed from inside.

Option `bf16`: in bf16 even on a processor without it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from bench.peers import cpu, runner
from bench.peers.workloads import Request, Timing


class VLLM:
    def __init__(self, args: runner.RunnerArgs) -> None:
        import vllm

        self.version = vllm.__version__
        dtype = "bfloat16" if "bf16" in args.options else cpu.compute_dtype()
        self.settings: dict[str, object] = {
            "dtype": dtype,
            "max_num_seqs": 64,
            "max_model_len": args.model.max_model_len,
            "max_num_batched_tokens": 4096,
            "kv_cache_memory_bytes": cpu.kv_cache_bytes(args.model, dtype),
            "enable_prefix_caching": True,
        }
        self.engine = vllm.LLM(
            str(args.models / args.model.name), disable_log_stats=True, **self.settings
        ).llm_engine
        self.count = 0

    def generate(self, requests: Sequence[Request]) -> Timing:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        generated: dict[str, int] = {}
        first_token = None
        started = time.perf_counter()
        for request in requests:
            params = SamplingParams(
                temperature=0.0,
                max_tokens=request.max_tokens,
                ignore_eos=True,
                detokenize=False,
                # A lone request is watched token by token; in a batch only the ends matter.
                output_kind=RequestOutputKind.DELTA
                if len(requests) == 1
                else RequestOutputKind.FINAL_ONLY,
            )
            name = str(self.count)
            self.count += 1
            generated[name] = 0
            self.engine.add_request(name, {"prompt_token_ids": request.prompt}, params)
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                if first_token is None:
                    first_token = time.perf_counter() - started
                key = output.request_id.split("-")[0]
                generated[key] += len(output.outputs[0].token_ids)
        return Timing(time.perf_counter() - started, first_token, list(generated.values()))

    def peak_rss_mib(self) -> float:
        return runner.peak_rss_mib()

    def close(self) -> None:
        pass


if __name__ == "__main__":
    runner.main(VLLM)
