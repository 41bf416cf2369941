"""Anthropic's Messages: a stream, and a function that the model calls.

quire serve &
python examples/anthropic_messages.py [http://127.0.0.1:8000]
"""

import sys

from anthropic import Anthropic

TOOLS = [
    {
        "name": "multiply",
        "description": "Multiply two whole numbers.",
        "input_schema": {
            "type": "object",
            "properties": {
                "a": {"type": "integer", "minimum": 0, "maximum": 999},
                "b": {"type": "integer", "minimum": 0, "maximum": 999},
            },
            "required": ["a", "b"],
            "additionalProperties": False,
        },
    }
]

if __name__ == "__main__":
    base_url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
    base_url = base_url.removesuffix("/v1")  # this client adds it
    with Anthropic(base_url=base_url, api_key="none") as client:
        model = "quire-builtin"
        messages = [{"role": "user", "content": "what does os.path.join do?"}]
        count = client.messages.count_tokens(model=model, messages=messages).input_tokens
        print(f"a prompt of {count} tokens")
        with client.messages.stream(model=model, messages=messages, max_tokens=40) as stream:
            for text in stream.text_stream:
                print(text, end="", flush=True)
        print()

        messages = [{"role": "user", "content": "what is 12 times 34?"}]
        answer = client.messages.create(
            model=model, messages=messages, tools=TOOLS, tool_choice={"type": "any"}, max_tokens=100
        )
        results = []
        for block in answer.content:
            if block.type == "tool_use":
                result = block.input["a"] * block.input["b"]
                print(f"{block.name}({block.input}) = {result}")
                results.append(
                    {"type": "tool_result", "tool_use_id": block.id, "content": str(result)}
                )
        messages += [
            {"role": "assistant", "content": answer.content},
            {"role": "user", "content": results},
        ]
        answer = client.messages.create(model=model, messages=messages, tools=TOOLS, max_tokens=40)
        print(answer.stop_reason, answer.content)
