"""The same answers in fewer steps, by verified guesses. `python examples/speculation.py`

The built-in model has a built-in draft. For other models: {"method": "suffix"}, which needs no second model.
"""

from time import perf_counter

from quire import LLM, SamplingParams

questions = ["What does json.dumps do?", "What does itertools.chain do?", "What is a block table?"]
conversations = [[{"role": "user", "content": question}] for question in questions]
params = [SamplingParams(max_tokens=60, temperature=0.7, seed=seed) for seed in range(3)]


def answers(**options: object) -> tuple[list[str], float]:
    with LLM(**options) as llm:
        started = perf_counter()
        outputs = [
            llm.chat(conversation, chosen, use_tqdm=False)[0].outputs[0].text
            for conversation, chosen in zip(conversations, params, strict=True)
        ]
        return outputs, perf_counter() - started


if __name__ == "__main__":
    plain, seconds = answers()
    drafted, faster = answers(speculative_config={"method": "draft_model"})
    print(plain[0])
    print(f"{seconds:.2f} s without drafts, {faster:.2f} s with")
    print("the same answers" if drafted == plain else "other answers")
