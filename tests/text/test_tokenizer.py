"""The tokenizer against transformers' AutoTokenizer, and what it does with bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.errors import CheckpointError, InvalidParameterError
from quire.text import ChatTemplate, Tokenizer
from tests.text import builders

BACKENDS: dict[str, Callable[[], object]] = {
    "byte_level": builders.byte_level,
    "byte_level_bos": lambda: builders.byte_level(add_bos=True),
    "sentencepiece": builders.sentencepiece,
    "metaspace": builders.metaspace,
    "wordpiece": builders.wordpiece,
}
CONFIGS: dict[str, dict[str, object]] = {
    "bare": {},
    "named": {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"},
    "bos_flag_is_ignored": {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True},
    "eos_flag_is_ignored": {"bos_token": "<s>", "eos_token": "</s>", "add_eos_token": True},
    "new_tokens": {
        "eos_token": {"__type": "AddedToken", "content": "<eos!>", "lstrip": True},
        "pad_token": "<pad!>",
        "additional_special_tokens": ["<x1>", "<x2>", "[INST]"],
    },
    "added_tokens_decoder": {
        "eos_token": "<e2>",
        "added_tokens_decoder": {
            "1000": {"content": "<plain>", "special": False, "normalized": True},
            "1001": {"content": "<e2>", "special": True, "rstrip": True},
        },
    },
    "special_token_from_vocabulary": {"eos_token": "the"},
    "split_special": {"eos_token": "</s>", "split_special_tokens": True},
}


def reference(directory: Path):  # type: ignore[no-untyped-def]
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(directory))


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_same_as_auto_tokenizer(backend: str, config: str, tmp_path: Path) -> None:
    directory = builders.save(BACKENDS[backend](), tmp_path, config=CONFIGS[config])
    ours, theirs = Tokenizer.from_directory(directory), reference(directory)
    assert ours.vocab() == theirs.get_vocab()
    assert ours.vocab_size == len(theirs)
    assert ours.eos_token_id == theirs.eos_token_id
    assert ours.bos_token_id == theirs.bos_token_id
    assert set(theirs.all_special_ids) <= ours.special_ids
    for sample in [*builders.SAMPLES, "the <eos!> <x1>the<plain> <e2> [INST]"]:
        for special in (True, False):
            ids = ours.encode(sample, add_special_tokens=special)
            assert ids == theirs.encode(sample, add_special_tokens=special), sample
            assert ours.decode(ids, skip_special_tokens=special) == theirs.decode(
                ids, skip_special_tokens=special
            )


def test_special_tokens_map_overrides_config(tmp_path: Path) -> None:
    directory = builders.save(
        builders.byte_level(),
        tmp_path,
        config={"eos_token": "<|endoftext|>"},
        special_tokens_map={"eos_token": {"content": "<|im_end|>"}, "pad_token": "<p>"},
    )
    ours, theirs = Tokenizer.from_directory(directory), reference(directory)
    assert ours.eos_token == theirs.eos_token == "<|im_end|>"
    assert ours.vocab() == theirs.get_vocab()


def test_stored_truncation_and_padding_do_not_cut_prompts(tmp_path: Path) -> None:
    backend = builders.byte_level()
    backend.enable_truncation(3)
    backend.enable_padding(length=64)
    tokenizer = Tokenizer.from_directory(builders.save(backend, tmp_path))
    text = "a prompt of more than three tokens"
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("side", ["left", "right"])
def test_truncation_keeps_special_tokens(sentencepiece: Tokenizer, side: str) -> None:
    text = "the quick brown fox jumps over the lazy dog"
    whole = sentencepiece.encode(text)
    cut = sentencepiece.encode(text, truncate_to=5, truncation_side=side)  # type: ignore[arg-type]
    body = whole[1:]
    assert cut == [whole[0], *(body[-4:] if side == "left" else body[:4])]
    bare = sentencepiece.encode(text, truncate_to=4, add_special_tokens=False)
    assert bare == body[-4:]
    assert sentencepiece.encode(text, truncate_to=1000) == whole


def test_truncation_without_room_is_refused(sentencepiece: Tokenizer) -> None:
    with pytest.raises(InvalidParameterError, match="at least 2") as caught:
        sentencepiece.encode("hello", truncate_to=1)
    assert caught.value.param == "truncate_prompt_tokens"


@pytest.mark.parametrize("text", ["a\ud800b", "\udfff", "😀"[0] + "\ud83d", None, 5, b"bytes"])
def test_bad_text_is_a_typed_error(byte_level: Tokenizer, text: object) -> None:
    with pytest.raises(InvalidParameterError) as caught:
        byte_level.encode(text)  # type: ignore[arg-type]
    assert caught.value.param == "prompt"
    with pytest.raises(InvalidParameterError):
        byte_level.encode_batch(["fine", text])  # type: ignore[list-item]


@pytest.mark.parametrize("ids", [[-1], [1 << 40], ["a"], [1.5], [None]])
def test_bad_ids_are_a_typed_error(byte_level: Tokenizer, ids: list[object]) -> None:
    with pytest.raises(InvalidParameterError):
        byte_level.decode(ids)  # type: ignore[arg-type]


def test_ids_outside_the_vocabulary_have_no_text(any_tokenizer: Tokenizer) -> None:
    beyond = any_tokenizer.max_token_id + 1
    assert any_tokenizer.token_str(beyond) is None
    assert any_tokenizer.token_str(-1) is None
    assert any_tokenizer.token_bytes(beyond) == b""
    assert any_tokenizer.decode_token(1 << 31) == ""
    assert any_tokenizer.max_token_id == max(any_tokenizer.vocab().values())


def test_encode_batch_is_encode(any_tokenizer: Tokenizer) -> None:
    batch = any_tokenizer.encode_batch(builders.SAMPLES)
    assert batch == [any_tokenizer.encode(text) for text in builders.SAMPLES]


@given(text=st.text(max_size=60))
def test_token_bytes_join_to_the_text(byte_level: Tokenizer, text: str) -> None:
    ids = byte_level.encode(text)
    assert b"".join(byte_level.token_bytes(i) for i in ids) == text.encode()


@given(text=st.text(max_size=60))
def test_token_bytes_join_to_the_text_with_byte_fallback(
    sentencepiece: Tokenizer, text: str
) -> None:
    text = text.replace("▁", "")  # the tokenizer itself reads it as a space
    ids = sentencepiece.encode(text, add_special_tokens=False)
    joined = b"".join(sentencepiece.token_bytes(i) for i in ids)
    assert joined == (b" " + text.encode() if text else b"")


def test_single_tokens(byte_level: Tokenizer, sentencepiece: Tokenizer) -> None:
    first_byte = sentencepiece.token_id("<0xF0>")
    assert first_byte is not None
    assert sentencepiece.token_bytes(first_byte) == b"\xf0"
    assert sentencepiece.decode_token(first_byte) == "\ufffd"
    the = sentencepiece.token_id("▁the")
    assert the is not None
    assert sentencepiece.decode_token(the) == " the"
    assert sentencepiece.token_str(the) == "▁the"
    space_the = byte_level.token_id("Ġthe")
    assert space_the is not None
    assert byte_level.decode_token(space_the) == " the"
    byte = byte_level.token_id("ð")
    assert byte is not None
    assert byte_level.token_bytes(byte) == b"\xf0"
    added = byte_level.token_id("<tool call>")
    assert added is not None
    assert byte_level.decode_token(added) == "<tool call>"


def test_chat_templates_from_config_and_files(tmp_path: Path) -> None:
    backend = builders.byte_level()
    plain = builders.save(backend, tmp_path / "a", config={"chat_template": "A"})
    assert Tokenizer.from_directory(plain).chat_template == "A"
    entries = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    listed = builders.save(backend, tmp_path / "b", config={"chat_template": entries})
    tokenizer = Tokenizer.from_directory(listed)
    assert tokenizer.chat_template == "D"
    assert tokenizer.config.chat_templates == {"tool_use": "T", "default": "D"}
    assert tokenizer.tool_chat_template == "T"
    assert Tokenizer.from_directory(plain).tool_chat_template is None
    (listed / "chat_template.jinja").write_text("F {{ messages[0].content }}{{ eos_token }}")
    assert Tokenizer.from_directory(listed).chat_template == reference(listed).chat_template
    (listed / "additional_chat_templates").mkdir()
    (listed / "additional_chat_templates" / "rag.jinja").write_text("R")
    assert Tokenizer.from_directory(listed).config.chat_templates == reference(listed).chat_template


def test_chat_uses_the_tokenizers_special_tokens(tmp_path: Path) -> None:
    template = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}{{ unk_token }}"
    config = {"chat_template": template, "bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = Tokenizer.from_directory(
        builders.save(builders.sentencepiece(), tmp_path, config=config)
    )
    assert tokenizer.chat_template is not None
    chat = ChatTemplate.for_tokenizer(tokenizer.chat_template, tokenizer)
    assert chat.render([{"role": "user", "content": "x"}]) == "<s>x</s>"


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a directory"):
        Tokenizer.from_directory(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json.*--tokenizer") as caught:
        Tokenizer.from_directory(tmp_path)
    assert str(tmp_path) in str(caught.value)
    builders.save(builders.byte_level(), tmp_path)
    whole = (tmp_path / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="truncated"):
        Tokenizer.from_directory(tmp_path)
    (tmp_path / "tokenizer.json").write_text(whole)
    for bad in ("{", "[1]", '{"eos_token": 3}', '{"added_tokens_decoder": {"x": "y"}}'):
        (tmp_path / "tokenizer_config.json").write_text(bad)
        with pytest.raises(CheckpointError, match=r"tokenizer_config\.json"):
            Tokenizer.from_directory(tmp_path)


def test_vocab_and_merges_are_converted_by_transformers(tmp_path: Path) -> None:
    spec = json.loads(builders.byte_level().to_str())
    (tmp_path / "vocab.json").write_text(json.dumps(spec["model"]["vocab"]))
    merges = [" ".join(pair) for pair in spec["model"]["merges"]]
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    tokenizer, theirs = Tokenizer.from_directory(tmp_path), reference(tmp_path)
    for sample in builders.SAMPLES:
        assert tokenizer.encode(sample) == theirs.encode(sample)


def test_unconvertible_file_is_a_typed_error(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"not a sentencepiece model")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match=r"tokenizer\.model"):
        Tokenizer.from_directory(tmp_path)


def test_neither_import_nor_use_loads_torch(tmp_path: Path) -> None:
    directory = builders.save(
        builders.byte_level(), tmp_path, config={"chat_template": "{{ messages[0].content + '' }}"}
    )
    script = f"""
import sys
import quire.text
heavy = ("torch", "transformers", "tokenizers", "minijinja", "jinja2")
assert not [name for name in heavy if name in sys.modules], "at import"
from pathlib import Path
tokenizer = quire.text.Tokenizer.from_directory(Path({str(directory)!r}))
template = quire.text.ChatTemplate.for_tokenizer(tokenizer.chat_template, tokenizer)
prompt = template.render([{{"role": "user", "content": "hi"}}])
out = quire.text.IncrementalDetokenizer(tokenizer).push(tokenizer.encode(prompt), final=True)
assert out.delta == "hi"
assert not [name for name in ("torch", "transformers", "jinja2") if name in sys.modules], "in use"
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
