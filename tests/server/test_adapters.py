"""LoRA adapters over HTTP: vLLM's routes and texts, every endpoint by `model`, and what no client sees."""

from __future__ import annotations

import json
import logging
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import anthropic
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families
from scripted_engine import ScriptedEngine
from test_openai_client import KEY, Server
from tests.weights.adapter_writer import write_adapter

from quire.builtin import MODEL_DIR
from quire.config import EngineConfig, LoRAConfig, from_flat
from quire.engine.setup import locate, resolve
from quire.errors import CheckpointError

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
QUESTION = [{"role": "user", "content": "What does os.path.join do?"}]
NAMES = ("sql", "poems", "json")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of adapters for the built-in model."""
    root = tmp_path_factory.mktemp("lora-dir")
    spec = resolve(locate(from_flat({}))).spec
    for seed, name in enumerate(NAMES):
        write_adapter(root / name, spec, ["_proj"], seed=seed)
    (root / "bad").mkdir()
    (root / "bad" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8}')
    (root / "elsewhere").symlink_to(MODEL_DIR)
    return root


# --- routes, over a scripted engine -----------------------------------------------------------------


@pytest.fixture
async def lora_client(root: Path, make_client, monkeypatch: pytest.MonkeyPatch):
    """A client of an app with admin routes, over a scripted engine that takes any adapter."""
    config = LoRAConfig(enable_lora=True, lora_dir=(str(root),))
    monkeypatch.setattr("quire.engine.adapters.check_adapter", _any_adapter)
    client = make_client(
        loaded=False, enable_admin_endpoints=True, engine_config=EngineConfig(lora=config)
    )
    client.engine = ScriptedEngine(lora=config)
    client.state.engine_loaded(client.engine)
    return client


class _Info:
    max_rank = 8

    def key(self, name: str) -> str:
        return f"{name}@0"


def _any_adapter(path: Path, spec: object, *, max_rank: int) -> _Info:
    if path.name == "bad":
        raise CheckpointError("the adapter has no adapter_model.safetensors")
    return _Info()


async def test_loading_and_unloading_have_vllms_texts(lora_client) -> None:
    async def post(path: str, **body: object) -> tuple[int, object]:
        response = await lora_client.post(path, json=body)
        if response.status_code == 200:
            assert response.headers["content-type"].startswith("text/plain")
            return 200, response.text
        error = response.json()["error"]
        assert error["code"] == response.status_code
        return response.status_code, (error["type"], error["message"])

    user = "InvalidUserInput"
    both = (user, "Both 'lora_name' and 'lora_path' must be provided.")
    assert await post(LOAD, lora_name="a") == (400, both)
    assert await post(LOAD, lora_path="sql") == (400, both)
    added = (200, "Success: LoRA adapter 'a' added successfully.")
    assert await post(LOAD, lora_name="a", lora_path="sql") == added
    duplicate = (
        "The lora adapter 'a' has already been loaded. If you want to load the adapter in place, "
        "set 'load_inplace' to True."
    )
    assert await post(LOAD, lora_name="a", lora_path="poems") == (400, (user, duplicate))
    assert await post(LOAD, lora_name="a", lora_path="poems", load_inplace=True) == added
    conflict = "The lora adapter 'tiny' conflicts with a served base model."
    assert await post(LOAD, lora_name="tiny", lora_path="sql") == (400, (user, conflict))
    missing = ("NotFoundError", "Loading lora b failed: No adapter found.")
    assert await post(LOAD, lora_name="b", lora_path="absent") == (404, missing)
    bad = "Loading lora b failed: the adapter has no adapter_model.safetensors"
    assert await post(LOAD, lora_name="b", lora_path="bad") == (400, (user, bad))
    status, (kind, message) = await post(LOAD, lora_name="b", lora_path="/etc")
    assert (status, kind) == (400, user) and "--lora-dir" in message
    nameless = (user, "'lora_name' needs to be provided to unload a LoRA adapter.")
    assert await post(UNLOAD, lora_int_id=1) == (400, nameless)
    removed = (200, "Success: LoRA adapter 'a' removed successfully.")
    assert await post(UNLOAD, lora_name="a", lora_int_id=7) == removed
    gone = ("NotFoundError", "The lora adapter 'a' cannot be found.")
    assert await post(UNLOAD, lora_name="a") == (404, gone)


async def test_the_name_reaches_the_engine_and_the_answer(lora_client) -> None:
    chat = {"messages": [{"role": "user", "content": "hi"}], "model": "sql", "max_tokens": 4}
    bodies = {
        "/v1/completions": {"prompt": "hi", "model": "sql"},
        "/v1/chat/completions": chat,
        "/v1/chat/completions/batch": chat | {"messages": [chat["messages"]] * 2},
        "/v1/responses": {"input": "hi", "model": "sql"},
        "/v1/messages": chat,
        "/v1/embeddings": {"input": "hi", "model": "sql"},
        "/pooling": {"input": "hi", "model": "sql"},
        "/v1/score": {"text_1": "hi", "text_2": "ho", "model": "sql"},
        "/v1/rerank": {"query": "hi", "documents": ["ho"], "model": "sql"},
    }
    for path, body in bodies.items():
        lora_client.engine.submitted.clear()
        response = await lora_client.post(path, json=body)
        assert response.status_code == 200, response.text
        assert response.json()["model"] == "sql", path
        assert {each.placement.adapter for each in lora_client.engine.submitted} == {"sql"}, path
        response = await lora_client.post(path, json=body | {"model": "nobody"})
        assert response.status_code == 404 and "`nobody` does not exist" in response.text, path
        lora_client.engine.submitted.clear()
        response = await lora_client.post(path, json=body | {"model": "alias"})
        assert response.json()["model"] == "tiny", path
        assert {each.placement.adapter for each in lora_client.engine.submitted} == {None}, path


async def test_names_that_are_not_there(lora_client, root: Path) -> None:
    for name in ("elsewhere", "bad", "..", "../lora-dir/sql", str(root / "sql"), "absent"):
        response = await lora_client.post("/v1/completions", json={"prompt": "a", "model": name})
        assert response.status_code == (400 if name == "bad" else 404), name
        assert str(root) not in response.text.replace(name, "")


async def test_routes_need_both_flags_and_the_key(make_client) -> None:
    lora = EngineConfig(lora=LoRAConfig(enable_lora=True))
    for path in (LOAD, UNLOAD):
        for client in (
            make_client(engine_config=lora), make_client(enable_admin_endpoints=True),
        ):  # fmt: skip
            assert (await client.post(path, json={"lora_name": "a"})).status_code == 404
        client = make_client(engine_config=lora, enable_admin_endpoints=True, api_keys=("k",))
        assert (await client.post(path, json={"lora_name": "a"})).status_code == 401


# --- a server ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(root: Path):
    running = Server(
        "--enable-lora", "--max-loras", "2", "--max-cpu-loras", "2", "--lora-modules",
        f"static={root / 'sql'}", json.dumps({"name": "org/other", "path": str(root / "poems")}),
        "--lora-dir", str(root), "--enable-admin-endpoints",
    )  # fmt: skip
    yield running
    running.stop()


def say(client: openai.OpenAI, model: str, max_tokens: int = 12) -> str:
    answer = client.chat.completions.create(
        model=model, messages=QUESTION, max_tokens=max_tokens, temperature=0,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    assert answer.model == model
    return answer.choices[0].message.content


def test_models_are_listed_with_their_parent(server: Server, root: Path) -> None:
    models = {model.id: model.model_extra for model in server.client.models.list().data}
    assert models.keys() >= {"quire-builtin", "static", "org/other"}
    assert models["static"]["parent"] == models["org/other"]["parent"] == "quire-builtin"
    assert models["static"]["root"] == "sql" and models["quire-builtin"]["parent"] is None
    assert server.client.models.retrieve("org/other").model_extra["root"] == "poems"
    assert str(root) not in server.http.get("/v1/models").text
    with pytest.raises(openai.NotFoundError):
        server.client.models.retrieve("nobody")


def test_every_dialect_answers_with_the_adapter(server: Server) -> None:
    texts = {model: say(server.client, model) for model in ("quire-builtin", "static", "org/other")}
    assert len(set(texts.values())) == 3
    assert say(server.client, "sql") == texts["static"], "the same files, found by name"
    response = server.client.responses.create(
        model="static", input=QUESTION[0]["content"], max_output_tokens=12, temperature=0,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    assert response.model == "static" and response.output_text == texts["static"]
    with anthropic.Anthropic(base_url=server.url, api_key=KEY, max_retries=0) as claude:
        message = claude.messages.create(
            model="static", messages=QUESTION, max_tokens=12,
            extra_body={"ignore_eos": True, "temperature": 0},
        )  # fmt: skip
    assert message.model == "static" and message.content[0].text == texts["static"]
    stream = server.client.chat.completions.create(
        model="static", messages=QUESTION, max_tokens=12, temperature=0, stream=True,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == texts["static"]
    vectors = [
        server.client.embeddings.create(model=model, input="a list").data[0].embedding
        for model in ("quire-builtin", "static", "static")
    ]
    assert vectors[0] != vectors[1] == vectors[2]


def test_more_adapters_than_room_under_load(server: Server) -> None:
    """Three adapters, two places: all are served, as they are alone; the gauge shows who waits."""
    names = ["quire-builtin", "static", "org/other", "json"]
    alone = {name: say(server.client, name, 40) for name in names}
    with ThreadPoolExecutor(16) as pool:
        asked = names * 8
        texts = list(pool.map(lambda name: say(server.client, name, 40), asked))
    assert texts == [alone[name] for name in asked]
    [family] = [
        family
        for family in text_string_to_metric_families(server.http.get("/metrics").text)
        if family.name == "vllm:lora_requests_info"
    ]
    [sample] = family.samples
    assert sample.labels["max_lora"] == "2" and sample.value > 1.7e9
    assert sample.labels["running_lora_adapters"] == sample.labels["waiting_lora_adapters"] == ""


def test_replacing_an_adapter_in_place(server: Server, root: Path, tmp_path: Path) -> None:
    def load(**body: object) -> None:
        response = server.http.post(LOAD, json={"lora_name": "mine", "lora_path": "mine", **body})
        assert response.status_code == 200, response.text

    shutil.copytree(root / "sql", root / "mine")
    load()
    assert say(server.client, "mine") == say(server.client, "static")
    shutil.rmtree(root / "mine")
    shutil.copytree(root / "poems", root / "mine")
    assert say(server.client, "mine") == say(server.client, "static"), "what was loaded is served"
    load(load_inplace=True)
    assert say(server.client, "mine") == say(server.client, "org/other")
    assert server.http.post(UNLOAD, json={"lora_name": "mine"}).status_code == 200
    shutil.rmtree(root / "mine")
    with pytest.raises(openai.NotFoundError):
        say(server.client, "mine")
    text = server.text()
    assert "loaded adapter mine" in text and "removed adapter mine" in text


def test_a_server_whose_adapter_is_broken_does_not_start(root: Path) -> None:
    from quire.cli.serve import run

    logging.getLogger("quire").setLevel(logging.WARNING)
    with pytest.raises(CheckpointError, match="lora_modules: broken"):
        run(["--enable-lora", "--lora-modules", f"broken={root / 'bad'}", "--port", "0"])
