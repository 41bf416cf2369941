"""The model calls a function of ours, and answers with what it returned.

A grammar gives the call its form. That its numbers are the question's takes a larger model than the built-in.

quire serve &
python examples/tools.py [http://127.0.0.1:8000/v1]
"""

import json
import sys

from openai import OpenAI


def multiply(a: int, b: int) -> int:
    return a * b


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "multiply",
            "description": "Multiply two whole numbers.",
            "parameters": {
                "type": "object",
                "properties": {
                    "a": {"type": "integer", "minimum": 0, "maximum": 999},
                    "b": {"type": "integer", "minimum": 0, "maximum": 999},
                },
                "required": ["a", "b"],
                "additionalProperties": False,
            },
        },
    }
]

if __name__ == "__main__":
    base_url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000/v1"
    with OpenAI(base_url=base_url, api_key="none") as client:
        model = client.models.list().data[0].id
        messages = [{"role": "user", "content": "what is 12 times 34?"}]
        answer = client.chat.completions.create(
            model=model, messages=messages, tools=TOOLS, tool_choice="required", temperature=0
        )
        message = answer.choices[0].message
        messages.append(message.model_dump(exclude_none=True))
        for call in message.tool_calls:
            result = multiply(**json.loads(call.function.arguments))
            print(f"{call.function.name}({call.function.arguments}) = {result}")
            messages.append({"role": "tool", "tool_call_id": call.id, "content": str(result)})
        answer = client.chat.completions.create(
            model=model, messages=messages, tools=TOOLS, max_tokens=40, temperature=0
        )
        print(answer.choices[0].message.content)
