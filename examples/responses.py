"""OpenAI's Responses: events, a response that goes on with another, one in the background.

quire serve &
python examples/responses.py [http://127.0.0.1:8000/v1]
"""

import sys
import time

from openai import OpenAI

if __name__ == "__main__":
    base_url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000/v1"
    with OpenAI(base_url=base_url, api_key="none") as client:
        model = client.models.list().data[0].id
        with client.responses.stream(
            model=model, input="what does os.path.join do?", max_output_tokens=40, temperature=0
        ) as stream:
            for event in stream:
                if event.type == "response.output_text.delta":
                    print(event.delta, end="", flush=True)
        print()

        first = client.responses.create(
            model=model, input="what does os.path.join do?", max_output_tokens=40, temperature=0
        )
        second = client.responses.create(
            model=model, input="show me an example", previous_response_id=first.id,
            max_output_tokens=40, temperature=0,
        )  # fmt: skip
        cached = second.usage.input_tokens_details.cached_tokens
        print(second.output_text)
        print(f"({cached} of {second.usage.input_tokens} input tokens cached)")

        waiting = client.responses.create(
            model=model, input="what is a KV cache?", background=True, max_output_tokens=40
        )
        while waiting.status in ("queued", "in_progress"):
            time.sleep(0.1)
            waiting = client.responses.retrieve(waiting.id)
        print(f"{waiting.id} is {waiting.status}: {waiting.output_text}")
