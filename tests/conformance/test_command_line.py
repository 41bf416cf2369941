"""A vLLM user's command line: every flag of vLLM 0.32 that users set works, or says what to do."""

from __future__ import annotations

import json

import pytest

from quire.cli.serve import _given, configs
from quire.config import engine_options, from_flat, server_options, without_foreign
from quire.config.foreign import FOREIGN, foreign_flags
from quire.errors import ConfigError

OURS = {info.name: info for info in [*engine_options(), *server_options()]}

WORKS = """
-q awq --quantization fp8
some/model --model=m --served-model-name a b
--host ::1 --port 8001 --uds /tmp/s --api-key k1 k2 --root-path /llm
--allowed-origins ["https://a"] --allowed-methods ["GET"] --allowed-headers ["*"] --allow-credentials
--ssl-keyfile k --ssl-certfile c --ssl-ca-certs ca --ssl-cert-reqs 2
--uvicorn-log-level warning --disable-uvicorn-access-log --disable-access-log-for-endpoints /a,/b
--enable-log-requests --disable-log-stats --disable-fastapi-docs --otlp-traces-endpoint http://h
--tokenizer t --revision main --dtype bfloat16 --max-model-len 25.6k --max-model-len auto
--gpu-memory-utilization 0.9 --kv-cache-memory-bytes 1G --num-gpu-blocks-override 64 --block-size 32
--kv-cache-dtype fp8 --enable-prefix-caching --no-enable-prefix-caching
--max-num-seqs 64 --max-num-batched-tokens 4k --enable-chunked-prefill --no-enable-chunked-prefill
--long-prefill-token-threshold 128 --scheduling-policy priority
--max-num-queued-reqs 5 --max-num-queued-tokens 4k --async-scheduling --no-async-scheduling
--stream-interval 4 --enforce-eager --load-format dummy --download-dir /d --hf-token x
--hf-overrides {"a":1} --seed 3 --max-logprobs -1 --logprobs-mode processed_logits
--generation-config vllm --override-generation-config {"temperature":0.5}
--chat-template t.jinja --chat-template-content-format openai --response-role bot
--enable-auto-tool-choice --tool-call-parser hermes --reasoning-parser qwen3
--return-tokens-as-token-ids --enable-tokenizer-info-endpoint --enable-force-include-usage
--enable-lora --no-enable-lora --max-loras 4 --max-cpu-loras 9 --max-lora-rank 320
--sse-keep-alive-interval 5 --shutdown-timeout 0 --attention-backend FLASH_ATTN
--speculative-config {"method":"ngram","num_speculative_tokens":5,"prompt_lookup_max":4,"prompt_lookup_min":2}
--spec-method suffix --spec-model d --speculative-model [ngram] --speculative-model owner/draft
--tensor-parallel-size 2 -tp 1 -tp 2 -pp 2 -dp=2 --distributed-executor-backend mp
--distributed-executor-backend ray --master-addr 10.0.0.1 --master-port 29502
--kv-transfer-config {"kv_connector":"TCPConnector","kv_role":"kv_both"}
--swap-space 4 --kv-offloading-size 4 --kv-offloading-size 0 --kv-offloading-backend native
--kv-load-failure-policy fail
"""

SILENT = """
--tokenizer-mode auto --runner auto --runner generate --convert none --task generate
--no-enable-expert-parallel --data-parallel-backend mp -dpr 0 -dcp 1
--cpu-offload-gb 0
--structured-outputs-config {"backend":"auto"} --lora-dtype auto -O2
--compilation-config {} --prefix-caching-hash-algo sha256 --limit-mm-per-prompt {}
--no-skip-tokenizer-init
"""

WARNS = """
--trust-remote-code --max-log-len 100 --prefix-caching-hash-algo xxhash -O3 -O 0 --optimization-level 1
-cc {"mode":3} --compilation-config {"level":3}
--limit-mm-per-prompt {"image":2} --mm-processor-kwargs {"a":1}
--allowed-local-media-path /m --enable-prompt-tokens-details --enable-per-request-metrics
--enable-request-id-headers --enable-server-load-tracking
--collect-detailed-traces model worker --kv-cache-metrics --enable-sleep-mode
--num-scheduler-steps 8 --use-v2-block-manager --max-seq-len-to-capture 8192 --disable-log-requests
--guided-decoding-backend outlines --disable-custom-all-reduce
--enable-expert-parallel -ep --fully-sharded-loras --specialize-active-lora
"""

REFUSED = """
--middleware a.b --skip-tokenizer-init -dpl 1 -dpe --data-parallel-backend ray -dcp 2
--lora-modules n=p m=q --lora-target-modules q_proj --lora-dtype float16
--speculative-config {"method":"medusa"} --spec-method custom_class --spec-tokens 3
--kv-transfer-config {"kv_connector":"X"} --kv-offloading-backend lmcache --cpu-offload-gb 2.5
--structured-outputs-config {"disable_any_whitespace":true} --task classify --convert classify
--load-format tensorizer --logits-processors my.module --tokenizer-revision v1
"""


def rows(text: str) -> list[list[str]]:
    """The words of a table, cut before each flag."""
    cut: list[list[str]] = []
    for word in text.split():
        number = word[1:].isdigit()
        if (word.startswith("-") and not number) or not cut:
            cut.append([])
        cut[-1].append(word)
    return cut


@pytest.mark.parametrize("words", rows(WORKS), ids=" ".join)
def test_works(words: list[str]) -> None:
    if words[0].startswith("--ssl"):
        words = [*words, "--ssl-keyfile", "k", "--ssl-certfile", "c"]
    values, notes = _given(words)
    assert values and notes == []
    configs(words)
    assert set(values) <= set(OURS)


@pytest.mark.parametrize("words", rows(SILENT), ids=" ".join)
def test_asks_for_what_is_so_anyway(words: list[str]) -> None:
    assert _given(words) == ({}, [])


@pytest.mark.parametrize("words", rows(WARNS), ids=" ".join)
def test_has_no_effect_and_says_so(words: list[str]) -> None:
    values, [note] = _given(words)
    assert values == {}
    assert " has no effect: " in note and note.endswith(".") and "\n" not in note


@pytest.mark.parametrize("words", rows(REFUSED), ids=" ".join)
def test_is_refused_with_a_remedy(words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        configs(words)
    message = str(caught.value)
    assert message.partition("=")[0].partition(" ")[0] in FOREIGN.keys() | OURS.keys()
    assert message.endswith(".") and "\n" not in message


def test_values_reach_their_options() -> None:
    _, server = configs(["--allowed-origins", '["https://a", "https://b"]'])
    assert server.allowed_origins == ("https://a", "https://b")
    assert configs(["--served-model-name", "[a"])[0].model.served_model_name == ("[a",)


def test_a_yaml_file_may_hold_them(tmp_path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(
        "port: 9000\ndecode-context-parallel-size: 1\ntrust-remote-code: true\nlora_modules: []\n"
    )
    assert configs(["--config", str(path)])[1].port == 9000
    assert _given(["--config", str(path)])[1] == [
        "trust_remote_code has no effect: no code of a checkpoint is ever run."
    ]
    path.write_text("speculative_config: {method: ngram}\nnum-speculative-tokens: 3\n")
    assert configs(["--config", str(path)])[0].speculative.speculation.num_speculative_tokens == 3
    path.write_text("speculative_config: {method: ngam}\n")
    with pytest.raises(ConfigError, match="speculative"):
        configs(["--config", str(path)])


def test_names_are_ours_or_foreign_and_no_flag_is_used_twice() -> None:
    assert not FOREIGN.keys() & OURS.keys()
    flags = [
        flag for info in [*OURS.values(), *foreign_flags()] for flag in (info.flag, *info.aliases)
    ]
    assert len(flags) == len(set(flags))


@pytest.mark.parametrize("name", FOREIGN)
def test_every_row_is_a_sentence_and_its_default_passes(name: str) -> None:
    option = FOREIGN[name]
    assert option.why[-1] != "." and "\n" not in option.why
    default = list(option.default) if isinstance(option.default, tuple) else option.default
    assert without_foreign({name: default}) == ({}, [])
    assert without_foreign({name: json.loads(json.dumps(default))}) == ({}, [])
    odd = object()
    if option.refused:
        with pytest.raises(ConfigError, match=f"^{name}="):
            without_foreign({name: odd})
    else:
        assert len(without_foreign({name: odd})[1]) == 1


def test_help_does_not_list_them(capsys) -> None:
    with pytest.raises(SystemExit):
        configs(["--help"])
    shown = capsys.readouterr().out
    assert "--port" in shown
    assert "expert-parallel" not in shown and "vLLM's options" not in shown


KEYWORDS = {
    "runner": "auto", "convert": "auto", "tokenizer": None, "tokenizer_mode": "auto",
    "skip_tokenizer_init": False, "trust_remote_code": False, "allowed_local_media_path": "",
    "allowed_media_domains": None, "tensor_parallel_size": 1, "dtype": "auto", "quantization": None,
    "revision": None, "tokenizer_revision": None, "chat_template": None, "seed": 0,
    "gpu_memory_utilization": 0.92, "cpu_offload_gb": 0, "enforce_eager": False,
    "disable_custom_all_reduce": False, "hf_token": None, "hf_overrides": None,
    "mm_processor_kwargs": None, "pooler_config": None, "structured_outputs_config": None,
    "profiler_config": None, "attention_config": None, "kv_cache_memory_bytes": None,
    "compilation_config": None, "quantization_config": None, "logits_processors": None,
    "spec_method": None, "spec_model": None, "spec_tokens": None,
}  # fmt: skip
"""`vllm.LLM`'s, with its defaults."""


@pytest.mark.parametrize("name", KEYWORDS)
def test_every_keyword_of_llm_passes_with_its_default(name: str) -> None:
    own, notes = without_foreign({name: KEYWORDS[name]})
    assert notes == []
    from_flat({key: value for key, value in own.items() if value is not None})
