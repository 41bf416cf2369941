"""Runner of mistral.rs: its Python package, in process. (Its server is a program that PyPI does not have.)

The package takes text only. Its model folder has a tokenizer whose words are the ids in decimal
(`models.mistralrs`), so a prompt is exactly the tokens asked for.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from importlib.metadata import version

from bench.peers import runner
from bench.peers.workloads import Request, Timing


class MistralRs:
    def __init__(self, args: runner.RunnerArgs) -> None:
        import mistralrs

        self.version = version("mistralrs")
        self.settings: dict[str, object] = {"dtype": "F32", "max_seqs": 64}
        self.engine = mistralrs.Runner(
            mistralrs.Which.Plain(
                str(args.models / f"{args.model.name}-mistralrs"),
                dtype=mistralrs.ModelDType.F32,
            ),
            max_seqs=64,
            in_situ_quant=args.option("isq"),
        )

    def generate(self, requests: Sequence[Request]) -> Timing:
        import mistralrs

        first_token = None
        generated = []
        started = time.perf_counter()
        # A stream's request is sent at once; a plain one would block until it is answered.
        streams = [
            self.engine.send_chat_completion_request(
                mistralrs.ChatCompletionRequest(
                    messages=" ".join(str(token) for token in request.prompt),
                    model="default",
                    max_tokens=request.max_tokens,
                    temperature=0.0,
                    ignore_eos=True,
                    stream=True,
                )
            )
            for request in requests
        ]
        for stream in streams:
            for chunk in stream:
                if first_token is None:
                    first_token = time.perf_counter() - started
                usage = chunk.usage
            generated.append(usage.completion_tokens)
        return Timing(time.perf_counter() - started, first_token, generated)

    def peak_rss_mib(self) -> float:
        return runner.peak_rss_mib()

    def close(self) -> None:
        pass


if __name__ == "__main__":
    runner.main(MistralRs)
