"""A file of requests in OpenAI's batch format, answered by `quire run-batch`. `python examples/run_batch.py`

Run again after an interruption, it asks only what its output file does not hold yet.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

source = Path(__file__).with_name("batch.jsonl")

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory, "out.jsonl")
        command = [sys.executable, "-m", "quire", "run-batch", "-i", str(source), "-o", str(output)]
        done = subprocess.run(command)
        print("exit code", done.returncode, "(1: a request failed)")
        for line in output.read_text().splitlines():
            result = json.loads(line)
            print(result["custom_id"], result["response"]["status_code"], result["error"] or "")
