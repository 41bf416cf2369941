"""Some tokens made less likely, some words forbidden, or only some tokens allowed.

`python examples/logit_bias.py`
"""

from quire import LLM, SamplingParams

prompt = "os.path.join is a"

if __name__ == "__main__":
    with LLM() as llm:
        greedy = SamplingParams(temperature=0, max_tokens=8)
        tokenizer = llm.get_tokenizer()
        digits = [tokenizer.encode(digit, add_special_tokens=False)[0] for digit in "0123456789"]
        [free] = llm.generate(prompt, greedy, use_tqdm=False)
        first = free.outputs[0].token_ids[0]
        word = free.outputs[0].text.split()[0]
        for name, params in {
            "as it is": greedy,
            "its first token less likely": greedy.replace(logit_bias={first: -100}),
            f"without the word {word!r}": greedy.replace(bad_words=[word]),
            "digits only": greedy.replace(allowed_token_ids=digits),
        }.items():
            [output] = llm.generate(prompt, params, use_tqdm=False)
            print(f"{name:>30}: {output.outputs[0].text!r}")
