"""The shipped model is small, loads in `transformers`, and answers its first question."""

import json
import subprocess
import sys
from pathlib import Path

import minijinja
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from quire import LLM, SamplingParams
from quire.builtin import DRAFT_DIR, MODEL_DIR, MODEL_NAME
from quire.sampling_params import StructuredOutputsParams

ROOT = Path(__file__).resolve().parents[2]
FILES = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
}
MB = 1_000_000
IM_END = 2


def size(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.iterdir())


def read(directory: Path, name: str) -> dict[str, object]:
    value: dict[str, object] = json.loads((directory / name).read_text())
    return value


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL_DIR)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32).eval()


def answer(model, tokenizer, question: str, *, tokens: int = 80) -> str:
    """Greedy answer through the chat template."""
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
    )
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        made = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            temperature=None,
            top_p=None,
            max_new_tokens=tokens,
        )
    return tokenizer.decode(made[0, ids.shape[1] :])


@pytest.mark.parametrize("directory", [MODEL_DIR, DRAFT_DIR])
def test_the_files_are_all_there(directory: Path) -> None:
    assert {path.name for path in directory.iterdir()} == FILES


def test_sizes_stay_under_their_limits() -> None:
    assert (MODEL_DIR / "model.safetensors").stat().st_size <= 8 * MB
    assert size(MODEL_DIR) + size(DRAFT_DIR) < 10 * MB


def test_the_package_imports_nothing_heavy() -> None:
    code = (
        "import sys, quire.builtin as b; "
        "assert b.MODEL_DIR.is_dir() and b.DRAFT_DIR.is_dir(); "
        "sys.exit(bool({'torch', 'tokenizers', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)
    assert MODEL_NAME == "quire-builtin"


def test_parameter_counts(model) -> None:
    draft = AutoModelForCausalLM.from_pretrained(DRAFT_DIR)
    assert 3e6 <= model.num_parameters() <= 4e6
    assert 0.25e6 <= draft.num_parameters() <= 0.4e6


@pytest.mark.parametrize("directory", [MODEL_DIR, DRAFT_DIR])
def test_vocabulary_and_special_ids_agree(directory: Path, tokenizer) -> None:
    config, generation = (read(directory, f"{n}.json") for n in ("config", "generation_config"))
    assert config["vocab_size"] == len(tokenizer) == 4096
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == IM_END == config["eos_token_id"]
    assert tokenizer.eos_token_id == IM_END
    assert config["pad_token_id"] == tokenizer.pad_token_id == 0
    assert generation["eos_token_id"] == [IM_END, tokenizer.convert_tokens_to_ids("<|endoftext|>")]
    assert tokenizer.model_max_length == config["max_position_embeddings"] == 2048


def test_the_draft_shares_the_tokenizer() -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        assert (MODEL_DIR / name).read_bytes() == (DRAFT_DIR / name).read_bytes()


@pytest.mark.parametrize("marker", ["<|im_start|>", "<think>", "</think>", "<tool_call>"])
def test_markers_are_single_tokens(tokenizer, marker: str) -> None:
    assert len(tokenizer(marker)["input_ids"]) == 1


def test_thinking_and_tool_markers_survive_decoding(tokenizer) -> None:
    text = "<think>x</think><tool_call>y</tool_call>"
    ids = tokenizer(f"<|im_start|>{text}<|im_end|>")["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_any_text_survives_the_tokenizer(tokenizer) -> None:
    for text in (
        "naïve café",
        "日本語 🙂",
        "a\n\n  b\tc",
        "x = {'k': [1, 2]}",
        "\x00\x7f",
        "  lead",
    ):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


TOOL = {
    "type": "function",
    "function": {
        "name": "get_time",
        "description": "Get the time in a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}


def test_the_chat_template_is_chatml(tokenizer) -> None:
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "hi"}]
    want = "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
    render = tokenizer.apply_chat_template
    assert render(messages, tokenize=False) == want
    with_prompt = render(messages, tokenize=False, add_generation_prompt=True)
    assert with_prompt == want + "<|im_start|>assistant\n"


@pytest.mark.parametrize("tools", [None, [TOOL]])
def test_minijinja_renders_what_jinja_renders(tokenizer, tools) -> None:
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]},
    ]  # fmt: skip
    got = minijinja.Environment().render_str(
        tokenizer.chat_template, messages=messages, tools=tools, add_generation_prompt=True
    )
    want = tokenizer.apply_chat_template(
        messages, tools=tools, tokenize=False, add_generation_prompt=True
    )
    assert got == want


def test_it_knows_os_path_join(model, tokenizer) -> None:
    said = answer(model, tokenizer, "what does os.path.join do?")
    assert "os.path.join" in said
    assert "Join two or more pathname components" in said
    assert said.endswith("<|im_end|>")


def test_it_knows_what_it_runs_on(model, tokenizer) -> None:
    assert "quire serve" in answer(model, tokenizer, "how do I start the server?")


def test_it_writes_json(model, tokenizer) -> None:
    said = answer(model, tokenizer, "give me JSON with name and age for Ana, 31")
    assert json.loads(said.removesuffix("<|im_end|>")) == {"name": "Ana", "age": 31}


SHORT = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
}


@pytest.fixture(scope="module")
def llm():
    with LLM(max_model_len=1024) as llm:
        yield llm


@pytest.mark.parametrize("tight", [False, True])
@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize(
    ("question", "want"),
    [
        ("Bob is 7 years old. Give name and age as JSON.", {"name": "Bob", "age": 7}),
        ("name: Alice, age: 62. JSON please.", {"name": "Alice", "age": 62}),
        ("Wilhelmina is 19. Return name and age as JSON.", None),
        ("Invent a person.", None),
        ("hello", None),
        ("what is prefix caching?", None),
    ],
)
def test_it_closes_a_short_object(llm, question: str, want, closed: bool, tight: bool) -> None:
    schema = SHORT | ({"additionalProperties": False} if closed else {})
    params = SamplingParams(
        temperature=0,
        max_tokens=64,
        structured_outputs=StructuredOutputsParams(json=schema, disable_any_whitespace=tight),
    )
    [output] = llm.chat([{"role": "user", "content": question}], params, use_tqdm=False)
    [made] = output.outputs
    assert made.finish_reason == "stop", made.text
    value = json.loads(made.text)
    assert value == want or (want is None and value.keys() >= {"name", "age"})


def test_it_calls_a_tool_and_says_what_came_back(llm) -> None:
    messages = [{"role": "user", "content": "what time is it in Oslo?"}]
    params = SamplingParams(temperature=0, max_tokens=64)
    [output] = llm.chat(messages, params, tools=[TOOL], use_tqdm=False)
    text = output.outputs[0].text
    call = json.loads(text.strip().removeprefix("<tool_call>").removesuffix("</tool_call>"))
    assert call == {"name": "get_time", "arguments": {"city": "Oslo"}}
    messages += [
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function",
         "function": {"name": "get_time", "arguments": json.dumps(call["arguments"])}}]},
        {"role": "tool", "tool_call_id": "1", "content": "14:05"},
    ]  # fmt: skip
    [output] = llm.chat(messages, params, tools=[TOOL], use_tqdm=False)
    assert "14:05" in output.outputs[0].text and output.outputs[0].finish_reason == "stop"


def test_it_says_when_it_does_not_know(model, tokenizer) -> None:
    assert "I only know" in answer(model, tokenizer, "what is the capital of France?")
