"""Progress of a batch, on the terminal or in a notebook."""

from __future__ import annotations

from quire.outputs import RequestOutput


class Progress:
    """tqdm with tokens per second, or nothing."""

    def __init__(self, count: int, *, enabled: bool) -> None:
        self._bar = None
        self._tokens = 0
        if enabled:
            import warnings

            # A widget, in a notebook that can show one; no warning if it cannot.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                from tqdm.auto import tqdm

            self._bar = tqdm(total=count, desc="Processed prompts", dynamic_ncols=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, count: int, output: RequestOutput | None = None) -> None:
        if self._bar is None:
            return
        if output is not None:
            self._tokens += sum(len(sequence.token_ids) for sequence in output.outputs)
            elapsed = self._bar.format_dict["elapsed"]
            if elapsed > 0 and self._tokens:
                rate = f"{self._tokens / elapsed:.1f} output tok/s"
                self._bar.set_postfix_str(rate, refresh=False)
        self._bar.update(count)
