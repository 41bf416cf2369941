"""Runner of Quire, through its public interface.

Options: `cache-off`, without the prefix cache (for W3); `file=TYPE`, the GGUF file of that type;
`quantization=NAME`, quantized at load.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from bench.peers import runner
from bench.peers.workloads import Request, Timing


class Quire:
    def __init__(self, args: runner.RunnerArgs) -> None:
        from quire import LLM, __version__

        self.version = __version__
        self.settings: dict[str, object] = {
            "dtype": "bfloat16",
            "cpu_threads": args.threads,
            "max_num_seqs": 64,
            "max_model_len": args.model.max_model_len,
            "kv_cache_memory_bytes": args.model.kv_cache_bytes,
            "enable_prefix_caching": "cache-off" not in args.options,
        }
        model = args.models / args.model.name
        if kind := args.option("file"):
            self.settings["tokenizer"] = str(model)
            model = args.models / f"{args.model.name}-{kind}.gguf"
        if name := args.option("quantization"):
            self.settings["quantization"] = name
        self.llm = LLM(str(model), **self.settings)

    def generate(self, requests: Sequence[Request]) -> Timing:
        from quire import SamplingParams

        prompts = [{"prompt_token_ids": request.prompt} for request in requests]
        params = [
            SamplingParams(temperature=0.0, max_tokens=request.max_tokens, ignore_eos=True)
            for request in requests
        ]
        started = time.perf_counter()
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - started
        return Timing(
            seconds,
            min(output.metrics.first_token_latency for output in outputs),
            [len(output.outputs[0].token_ids) for output in outputs],
        )

    def peak_rss_mib(self) -> float:
        return runner.peak_rss_mib()

    def close(self) -> None:
        self.llm.close()


if __name__ == "__main__":
    runner.main(Quire)
