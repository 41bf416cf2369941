"""Outputs that follow a schema, a regex or a list of choices. `python examples/structured_output.py [MODEL]`

The model chooses among the tokens that the grammar allows, so the form is certain; the sense is the model's.
"""

import json
import sys

from quire import LLM, SamplingParams, StructuredOutputsParams

schema = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 20}, "stars": {"enum": [1, 2, 3, 4, 5]}},
    "required": ["name", "stars"],
    "additionalProperties": False,
}
wanted = {
    "Review as JSON: ": StructuredOutputsParams(json=schema, disable_any_whitespace=True),
    "Is os.path.join a function? ": StructuredOutputsParams(choice=["yes", "no"]),
    "The date is ": StructuredOutputsParams(regex=r"20[0-9]{2}-[0-9]{2}-[0-9]{2}"),
}

if __name__ == "__main__":
    params = [
        SamplingParams(temperature=0, max_tokens=64, structured_outputs=each)
        for each in wanted.values()
    ]
    with LLM(model=sys.argv[1] if len(sys.argv) > 1 else None) as llm:
        for output in llm.generate(list(wanted), params, use_tqdm=False):
            print(output.prompt, output.outputs[0].text)
            if "JSON" in output.prompt:
                assert json.loads(output.outputs[0].text)["stars"] in range(1, 6)
