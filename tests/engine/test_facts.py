"""Facts that several files of a checkpoint state: which tokens end a text, what is sampled with by default,
how long the context is. Each is derived once, and holds for `LLM` as for the server."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch

from quire import LLM, SamplingParams
from quire.config import from_flat
from quire.engine.async_llm import AsyncLLM
from quire.engine.end_tokens import EosSource, end_tokens
from quire.engine.setup import ServedModel, locate, resolve, serve_model
from quire.errors import ConfigError, InvalidParameterError, PromptTooLongError
from quire.sampling_params import BeamSearchParams, StructuredOutputsParams
from tests.engine.checkpoints import SPECIAL, VOCAB_SIZE, write_checkpoint, write_tokenizer
from tests.models.variants import build_reference, save

OPTIONS = {"dtype": "float32", "max_num_seqs": 4, "kv_cache_memory_bytes": 16 << 20}
GREEDY = SamplingParams(temperature=0.0, max_tokens=24)
PROMPT = [7, 8]
EOS, IM_END = SPECIAL.index("<|eos|>"), SPECIAL.index("<|im_end|>")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint("llama", tmp_path_factory.mktemp("facts")).directory


@pytest.fixture(scope="module")
def free(base: Path) -> list[int]:
    """What follows PROMPT where nothing ends it."""
    with LLM(str(base), **OPTIONS) as llm:
        [output] = llm.generate([PROMPT], GREEDY.replace(ignore_eos=True), use_tqdm=False)
    return output.outputs[0].token_ids


def edit(path: Path, **fields: object) -> None:
    """Change fields of a JSON file; `...` removes one."""
    content = json.loads(path.read_text()) if path.is_file() else {}
    content |= fields
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))


def variant(base: Path, directory: Path, **files: dict[str, object]) -> Path:
    """A copy of the checkpoint with fields of config, generation_config, tokenizer_config changed."""
    shutil.copytree(base, directory, dirs_exist_ok=True)
    for name, fields in files.items():
        edit(directory / f"{name}.json", **fields)
    return directory


def served(directory: Path, **options: object) -> ServedModel:
    config = locate(from_flat({"model": str(directory), **OPTIONS, **options}))
    return serve_model(config, resolve(config))


# --- end tokens -----------------------------------------------------------------------------------


def first_at(tokens: list[int], end: int) -> list[int]:
    return tokens[: tokens.index(end) + 1]


@pytest.mark.parametrize("file", ["tokenizer_config", "generation_config", "config"])
def test_a_text_ends_at_what_any_file_names(
    base: Path, free: list[int], tmp_path: Path, file: str
) -> None:
    """A fine-tune that changed one file; the others keep the base's."""
    end = next(token for token in free[3:] if token > len(SPECIAL))
    files: dict[str, dict[str, object]] = {
        "generation_config": {"eos_token_id": EOS},
        "config": {"eos_token_id": [EOS]},
        "tokenizer_config": {"eos_token": "<|eos|>"},
    }
    if file == "tokenizer_config":
        text = served(base).tokenizer.token_str(end)
        files[file] = {"eos_token": {"content": text, "special": True}}
    else:
        files[file] = {"eos_token_id": end}
    directory = variant(base, tmp_path, **files)
    with LLM(str(directory), **OPTIONS) as llm:
        assert set(llm.model.eos_token_ids) == {EOS, end}
        [output] = llm.generate([PROMPT], GREEDY, use_tqdm=False)
        [completion] = output.outputs
        assert completion.token_ids == first_at(free, end)
        assert (completion.finish_reason, completion.stop_reason) == ("stop", None)
        assert completion.text == llm.model.tokenizer.decode(completion.token_ids[:-1])
        [ignored] = llm.generate([PROMPT], GREEDY.replace(ignore_eos=True), use_tqdm=False)
        assert ignored.outputs[0].token_ids == free
        [longer] = llm.generate([PROMPT], GREEDY.replace(min_tokens=20), use_tqdm=False)
        assert end not in longer.outputs[0].token_ids[:20]
        assert len(longer.outputs[0].token_ids) >= 20
        [beams] = llm.beam_search([PROMPT], BeamSearchParams(beam_width=1, max_tokens=24))
        assert beams.sequences[0].tokens[len(PROMPT) :] == first_at(free, end)


@pytest.mark.asyncio
async def test_the_server_side_ends_there_too(base: Path, free: list[int], tmp_path: Path) -> None:
    directory = variant(base, tmp_path, generation_config={"eos_token_id": [EOS, free[4], 10**6]})
    llm = await AsyncLLM.start(from_flat({"model": str(directory), **OPTIONS}))
    try:
        for params in (GREEDY, GREEDY.replace(min_tokens=12)):
            [*_, output] = [o async for o in llm.submit(PROMPT, params)]
            tokens = output.outputs[0].token_ids
            if params.min_tokens:
                assert len(tokens) >= 12 and free[4] not in tokens[:12]
            else:
                assert tokens == first_at(free, free[4])
    finally:
        await llm.shutdown()


@pytest.mark.parametrize("end", [EOS, IM_END])
def test_a_grammar_may_end_with_any_of_them(base: Path, tmp_path: Path, end: int) -> None:
    tokenizer = {"eos_token": "<|im_end|>"}
    directory = variant(base, tmp_path, tokenizer_config=tokenizer)
    with LLM(str(directory), **OPTIONS) as llm:
        params = GREEDY.replace(
            structured_outputs=StructuredOutputsParams(choice=["abc"]), logit_bias={end: 100.0}
        )
        [output] = llm.generate([PROMPT], params, use_tqdm=False)
        assert output.outputs[0].text == "abc" and output.outputs[0].token_ids[-1] == end


SOURCES: list[tuple[dict[str, dict[str, object]], set[int]]] = [
    ({"config": {"eos_token_id": 9}, "generation_config": {"eos_token_id": [10, 11]}}, {EOS, 9, 10, 11}),
    ({"config": {"eos_token_id": None}, "generation_config": {"eos_token_id": None}}, {EOS}),
    ({"config": {"eos_token_id": ...}, "generation_config": {"eos_token_id": ...}}, {EOS}),
    ({"config": {"eos_token_id": "<|im_end|>"}}, {EOS, IM_END}),
    ({"config": {"eos_token_id": ["<|im_end|>", 9, "12"]}}, {EOS, IM_END, 9, 12}),
    ({"tokenizer_config": {"eos_token": "<|im_end|>"}}, {EOS, IM_END}),
    ({"tokenizer_config": {"eos_token": {"content": "<|im_end|>"}}}, {EOS, IM_END}),
    ({"tokenizer_config": {"eos_token": None}, "config": {"eos_token_id": 9},
      "generation_config": {"eos_token_id": ...}}, {9}),
    ({"tokenizer_config": {"eos_token": ...}, "special_tokens_map": {"eos_token": "<|im_end|>"},
      "config": {"eos_token_id": 9}, "generation_config": {"eos_token_id": ...}}, {IM_END, 9}),
    ({"tokenizer_config": {"eos_token": None}, "config": {"eos_token_id": ...},
      "generation_config": {"eos_token_id": ...}}, {2}),  # LlamaConfig's own default
    ({"tokenizer_config": {"eos_token": None}, "config": {"eos_token_id": None},
      "generation_config": {"eos_token_id": ...}}, set()),
]  # fmt: skip


@pytest.mark.parametrize(("files", "ids"), SOURCES, ids=lambda value: str(value)[:70])
def test_sources_of_end_tokens(
    base: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    files: dict[str, dict[str, object]],
    ids: set[int],
) -> None:
    with caplog.at_level(logging.WARNING):
        assert set(served(variant(base, tmp_path, **files)).eos_token_ids) == ids
    assert not caplog.records


def test_ends_inside_text_config_count_and_those_beside_it_before_them(tmp_path: Path) -> None:
    directory = write_checkpoint("gemma3-multimodal", tmp_path).directory
    text = json.loads((directory / "config.json").read_text())["text_config"]
    nested = {"text_config": {**text, "eos_token_id": 9}}
    edit(directory / "generation_config.json", eos_token_id=...)
    edit(directory / "tokenizer_config.json", eos_token=None)
    edit(directory / "config.json", **nested, eos_token_id=...)
    assert served(directory).eos_token_ids == (9,)
    edit(directory / "config.json", eos_token_id=[10, 11])
    assert served(directory).eos_token_ids == (10, 11)


def test_what_the_operator_names_counts_alone(base: Path) -> None:
    override = {"override_generation_config": {"eos_token_id": [9]}}
    assert served(base, **override).eos_token_ids == (9,)


BAD_IDS = [VOCAB_SIZE, 10**12, -1, True, 2.5, "<|nowhere|>", {"content": 3}, [[2]]]


@pytest.mark.parametrize("file", ["config", "generation_config"])
@pytest.mark.parametrize("bad", BAD_IDS, ids=str)
def test_what_is_no_token_is_dropped_with_a_warning(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, file: str, bad: object
) -> None:
    directory = variant(base, tmp_path, **{file: {"eos_token_id": [EOS, bad]}})
    assert served(directory).eos_token_ids == (EOS,)
    [record] = [r for r in caplog.records if r.levelno >= logging.WARNING]
    message = record.getMessage()
    assert message.startswith(f"{file}.json: eos_token_id {bad!r} is no token")


def test_min_tokens_with_end_ids_beyond_the_vocabulary(base: Path, tmp_path: Path) -> None:
    """An end id is written to a row of logits: beyond it, the step failed and the engine with it."""
    bad = {"eos_token_id": [VOCAB_SIZE, 10**9]}
    directory = variant(base, tmp_path, generation_config=bad, config=bad)
    with LLM(str(directory), **OPTIONS) as llm:
        [output] = llm.generate([PROMPT], GREEDY.replace(min_tokens=24), use_tqdm=False)
        assert len(output.outputs[0].token_ids) == 24
        for ids in ([VOCAB_SIZE], [10**9], [-1]):
            with pytest.raises(InvalidParameterError, match="stop_token_ids"):
                llm.generate([PROMPT], GREEDY.replace(stop_token_ids=ids, min_tokens=4))


def test_a_default_only_where_no_file_names_an_end(base: Path) -> None:
    tokenizer = served(base).tokenizer
    for take_eos, default, expected in ((True, [5], (EOS,)), (False, [5], (5,)), (False, [], ())):
        found = end_tokens(
            [EosSource("x", None), EosSource("y", [])],
            tokenizer, vocab_size=VOCAB_SIZE, take_eos=take_eos, default=default,
        )  # fmt: skip
        assert found.ids == expected and not found.warnings


def test_a_tokenizer_larger_than_the_model_is_named(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    added = {"added_tokens_decoder": {str(VOCAB_SIZE): {"content": "<|new|>", "special": True}}}
    directory = variant(base, tmp_path, tokenizer_config=added)
    with LLM(str(directory), **OPTIONS) as llm:
        assert f"token ids up to {VOCAB_SIZE}, but config.json's vocab_size" in caplog.text
        with pytest.raises(InvalidParameterError, match=f"prompt holds '{VOCAB_SIZE}'"):
            llm.generate("a<|new|>")


# --- default sampling -----------------------------------------------------------------------------


def test_do_sample_is_not_read(base: Path, tmp_path: Path) -> None:
    """As in vLLM: a request samples or not by its temperature."""
    directory = variant(base, tmp_path, generation_config={"do_sample": False})
    assert served(directory).default_sampling == {}
    edit(tmp_path / "generation_config.json", temperature=0.6, top_k=20, top_p=0.95)
    expected = {"temperature": 0.6, "top_k": 20, "top_p": 0.95}
    assert served(directory).default_sampling == expected
    assert served(directory, generation_config="vllm").default_sampling == {}


def test_every_field_that_is_read(base: Path, tmp_path: Path) -> None:
    fields = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 40.0, "min_p": 0.1, "repetition_penalty": 1.1,
        "max_new_tokens": 64, "max_length": 4096, "num_beams": 4, "typical_p": 0.5,
    }  # fmt: skip
    model = served(variant(base, tmp_path, generation_config=fields))
    assert model.default_sampling == {
        "temperature": 0.5, "top_p": 0.9, "top_k": 40, "min_p": 0.1, "repetition_penalty": 1.1,
        "max_tokens": 64,
    }  # fmt: skip
    assert type(model.default_sampling["top_k"]) is int
    model = served(tmp_path, override_generation_config={"top_p": None, "min_p": 0.2})
    assert "top_p" not in model.default_sampling and model.default_sampling["min_p"] == 0.2


NEUTRAL = [
    ("top_k", 0, 0),
    ("top_k", -1, -1),
    ("temperature", 0, 0),
    ("top_p", 1, 1),
    ("min_p", 0, 0),
]


@pytest.mark.parametrize(("field", "value", "expected"), NEUTRAL)
def test_neutral_values_are_no_mistakes(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, field: str, value: object, expected: object
) -> None:  # fmt: skip
    directory = variant(base, tmp_path, generation_config={field: value})
    assert served(directory).default_sampling == {field: expected}
    assert not caplog.records


BAD_DEFAULTS = [
    ("temperature", -1), ("temperature", 3), ("temperature", "0.7"), ("temperature", [1]),
    ("temperature", True), ("top_p", 0), ("top_p", 1.5), ("top_p", -0.1), ("top_p", "1"),
    ("top_k", -5), ("top_k", "50"), ("top_k", 2.5),
    ("min_p", 2), ("min_p", -1), ("repetition_penalty", 0), ("repetition_penalty", -1.2),
    ("repetition_penalty", {}), ("max_new_tokens", 0), ("max_new_tokens", -1), ("max_new_tokens", "20"),
    ("max_new_tokens", True), ("max_new_tokens", 10**30),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), BAD_DEFAULTS, ids=str)
def test_a_default_that_no_request_may_have_is_dropped_with_a_warning(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, field: str, value: object
) -> None:
    directory = variant(base, tmp_path, generation_config={field: value, "bos_token_id": 1})
    assert served(directory).default_sampling == {}
    [record] = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert record.getMessage().startswith(f"generation_config.json: {field} is {value!r:.80}: ")
    with pytest.raises(ConfigError, match=f"override_generation_config: {field} is"):
        served(base, override_generation_config={field: value})


def test_a_default_length_is_cut_to_the_context(base: Path, tmp_path: Path) -> None:
    directory = variant(
        base, tmp_path, generation_config={"max_new_tokens": 1000, "temperature": 0}
    )
    with LLM(str(directory), **OPTIONS, max_model_len=32) as llm:
        [output] = llm.generate([[7] * 20], use_tqdm=False)
        assert len(output.outputs[0].token_ids) <= 12
        with pytest.raises(InvalidParameterError, match="maximum context length is 32"):
            llm.generate([[7] * 20], SamplingParams(max_tokens=1000))


# --- what the weights' files decide ---------------------------------------------------------------


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
def test_without_a_dtype_the_weights_decide(tmp_path: Path, stored: str) -> None:
    reference = build_reference("qwen2", vocab_size=VOCAB_SIZE, dtype=getattr(torch, stored))
    save(reference, tmp_path)
    edit(tmp_path / "config.json", dtype=..., torch_dtype=...)
    config = locate(from_flat({"model": str(tmp_path), **OPTIONS, "dtype": "auto"}))
    assert resolve(config).dtype == stored
    edit(tmp_path / "config.json", torch_dtype="bfloat16")
    assert resolve(config).dtype == "bfloat16"


@pytest.mark.parametrize("name", ["qwen3", "llama-mha-tied"])
def test_a_base_model_gives_embeddings(tmp_path: Path, name: str) -> None:
    """`AutoModel.save_pretrained`: text only where the embedding is the head too."""
    checkpoint = write_checkpoint(name, tmp_path / "whole")
    directory = save(checkpoint.reference.model, tmp_path / "base")
    write_tokenizer(directory)
    with LLM(str(directory), **OPTIONS) as llm:
        [output] = llm.embed([PROMPT], use_tqdm=False)
        with torch.inference_mode():
            hidden = checkpoint.reference.model(torch.tensor([PROMPT])).last_hidden_state[0, -1]
        expected = torch.nn.functional.normalize(hidden, dim=0)
        assert torch.allclose(torch.tensor(output.outputs.embedding), expected, atol=1e-4)
        if name == "qwen3":
            for ask in (
                lambda: llm.generate([PROMPT], GREEDY),
                lambda: llm.beam_search([PROMPT], BeamSearchParams(2, 4)),
            ):
                with pytest.raises(InvalidParameterError, match="without an output head"):
                    ask()
        else:
            [text] = llm.generate([PROMPT], GREEDY.replace(ignore_eos=True), use_tqdm=False)
            assert text.outputs[0].token_ids == checkpoint.greedy(PROMPT, 24)


# --- context length -------------------------------------------------------------------------------


def test_a_stretched_context_is_the_models_own(tmp_path: Path) -> None:
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}
    checkpoint = write_checkpoint(
        "llama", tmp_path, max_position_embeddings=64, rope_parameters=rope, eos_token_id=None
    )
    prompt = list(range(20, 120))
    expected = checkpoint.greedy(prompt, 100)
    for options in ({}, {"max_model_len": 256}):
        with LLM(str(tmp_path), **OPTIONS, **options) as llm:
            assert llm.model.max_model_len == llm.ready.max_model_len == 256
            params = GREEDY.replace(max_tokens=156, ignore_eos=True)
            [output] = llm.generate([prompt], params, use_tqdm=False)
            assert output.outputs[0].token_ids[:100] == expected
            assert len(output.outputs[0].token_ids) == 156
    with pytest.raises(
        ConfigError, match=r"257 exceeds the 256.*max_position_embeddings times the"
    ):
        LLM(str(tmp_path), **OPTIONS, max_model_len=257)


def test_yarn_added_as_model_cards_say(base: Path) -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
    assert served(base).max_model_len == 256
    assert served(base, hf_overrides={"rope_scaling": scaling}).max_model_len == 1024


@pytest.mark.asyncio
async def test_memory_is_planned_by_the_core_alone(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes that looked at memory would see two amounts, and with `auto` admit two lengths."""

    def fails(*arguments: object, **named: object) -> None:
        raise AssertionError("the front end planned memory")

    monkeypatch.setattr("quire.engine.memory.plan_memory", fails)
    monkeypatch.setattr("quire.engine.assemble.plan_ranks", fails)
    config = from_flat({"model": str(base), **OPTIONS, "max_model_len": -1,
                        "kv_cache_memory_bytes": None, "num_gpu_blocks_override": 1 + 5})  # fmt: skip
    llm = await AsyncLLM.start(config)
    try:
        assert llm.model.max_model_len == llm.ready.max_model_len == 80
        with pytest.raises(PromptTooLongError):
            llm.submit(list(range(20, 101)), GREEDY)
    finally:
        await llm.shutdown()
