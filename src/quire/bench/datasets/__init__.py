"""The sources of a benchmark's requests: one file per kind; callers use `load_requests`.

base.py       BenchRequest, errors, reading JSON with line numbers
prompts.py    text of an exact number of tokens, for any tokenizer
sharegpt.py   ShareGPT files, and the stand-in with their lengths
synthetic.py  random, prefix_repetition
files.py      custom JSONL, timed traces
"""

from quire.bench.datasets.base import BenchRequest, DatasetError, load_requests

__all__ = ["BenchRequest", "DatasetError", "load_requests"]
