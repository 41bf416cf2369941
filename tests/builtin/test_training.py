"""What the model is trained on is what we say it is: no leak of the gates' wording, no wrong mask."""

import doctest
import json
import sys
from pathlib import Path
from random import Random

import jsonschema_rs
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from quire.builtin import MODEL_DIR

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from training import build, chat, data, fields, guided, shapes, stdlib, tools, words  # noqa: E402
from training.corpus import clean, render  # noqa: E402
from training.model import DRAFT, MAIN, Llama, export_weights, import_weights  # noqa: E402
from training.muon import Muon  # noqa: E402
from training.tokenizer import IM_END, save_tokenizer  # noqa: E402
from training.train import TrainJob, TrainOptions, schedule, train  # noqa: E402


@pytest.fixture(scope="module")
def table():
    return stdlib.build_table()


@pytest.fixture(scope="module")
def generators(table):
    names = stdlib.unlisted_names({e.name for e in table})
    return chat.Generators(table, chat.read_faq(), names)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))


def test_every_example_is_true() -> None:
    failed, tried = doctest.testfile(str(stdlib.EXAMPLES_FILE), module_relative=False)
    assert failed == 0 and tried > 150


def test_the_table_is_clean(table) -> None:
    assert 700 <= len(table) <= 1000
    assert len({e.name for e in table}) == len(table)
    for entry in table:
        assert 8 <= len(entry.text) <= stdlib.MAX_CHARS + 2, entry
        assert ">>>" not in entry.text and "\n" not in entry.text, entry


def test_the_faq_reads(generators) -> None:
    assert 80 <= len(generators.faq) <= 140
    answers: dict[str, str] = {}
    for item in generators.faq:
        for question in (*item.questions, *item.terms):
            assert answers.setdefault(question.lower(), item.answer) == item.answer, question


def test_the_gates_ask_in_words_never_trained_on() -> None:
    assert not set(chat.HELD_OUT_ASK) & set(chat.ASK)
    assert not set(chat.HELD_OUT_ASK_TERM) & set(chat.ASK_TERM)
    assert not set(chat.HELD_OUT_JSON_ASK) & set(chat.JSON_ASK)
    assert not set(words.HELD_OUT_LEAD_IN) & set(words.LEAD_IN)
    assert not set(shapes.HELD_OUT_WITH_KEYS) & set(shapes.JSON_WITH_KEYS)
    assert not set(shapes.HELD_OUT_WITHOUT_KEYS) & set(shapes.JSON_WITHOUT_KEYS)
    assert not set(shapes.HELD_OUT_INVENT) & set(shapes.INVENT)
    assert not set(tools.HELD_OUT_ASKS) & set(tools.ASKS)
    assert not set(tools.HELD_OUT_QUERIES) & set(tools.QUERIES)


def test_the_gates_use_names_never_trained_on(generators) -> None:
    assert not set(words.HELD_OUT_NAMES) & set(words.NAMES)
    assert not set(words.HELD_OUT_CITIES) & set(words.CITIES)
    assert not set(tools.HELD_OUT_NOUNS) & set(tools.NOUNS)
    assert not set(tools.HELD_OUT_VERBS) & set(tools.VERBS)
    assert not set(fields.HELD_OUT_KEYS) & ({*fields.BY_KEY} | set(words.WORDS))
    rng = Random(5)
    made = [m for _ in range(600) for m in generators.conversation(rng)]
    keys = {f'"{key}"' for key in fields.HELD_OUT_KEYS}
    names = {f'_{noun}"' for noun in tools.HELD_OUT_NOUNS}
    for message in made:
        assert not any(x in message["content"] for x in keys | names), message


def test_generation_is_a_function_of_the_seed(generators) -> None:
    def some(seed: int) -> list[str]:
        rng = Random(seed)
        return [render(generators.conversation(rng)) for _ in range(50)]

    assert some(1) == some(1) != some(2)


def test_our_rendering_is_the_chat_template(generators) -> None:
    hf, rng = AutoTokenizer.from_pretrained(MODEL_DIR), Random(3)
    for _ in range(30):
        messages = generators.conversation(rng)
        assert hf.apply_chat_template(messages, tokenize=False) == render(messages)


def test_tools_are_shown_as_the_chat_template_shows_them() -> None:
    hf, rng = AutoTokenizer.from_pretrained(MODEL_DIR), Random(4)
    for _ in range(20):
        task, result, answer = tools.round_trip(rng)
        call = {"function": {"name": task.name, "arguments": task.arguments}}
        after = [
            {"role": "tool", "content": result},
            {"role": "assistant", "content": answer},
        ]
        said = [
            *task.question,
            {"role": "assistant", "content": None, "tool_calls": [call]},
            *after,
        ]
        got = hf.apply_chat_template(said, tools=task.specs, tokenize=False)
        text = tools.write_call(task.name, json.dumps(task.arguments, ensure_ascii=False))
        system = {"role": "system", "content": tools.tool_system(task.specs)}
        called = {"role": "assistant", "content": text}
        assert got == render([system, *task.question, called, *after])


def test_an_object_fits_its_schema() -> None:
    rng = Random(6)
    for draw in (shapes.stated, shapes.to_invent):
        for held_out in (False, True):
            for _ in range(100):
                shape = draw(rng, held_out=held_out)
                jsonschema_rs.validate(shape.schema, shape.value)
                assert json.loads(shape.messages[-1]["content"]) == shape.value
    for _ in range(200):
        task = tools.make_task(rng, held_out=rng.random() < 0.5)
        [schema] = [
            s["function"]["parameters"] for s in task.specs if s["function"]["name"] == task.name
        ]
        jsonschema_rs.validate(schema, task.arguments)


def test_only_the_assistant_is_learnt(tokenizer) -> None:
    messages = [
        {"role": "system", "content": "S s"},
        *chat.turn("hi", "Hello!"),
        *chat.turn("x", "y"),
    ]
    (document,) = data.encode_chat(tokenizer, [messages])
    assert document.ids[:-1].tolist() == tokenizer.encode(render(messages)).ids
    learnt = document.ids[document.learn].tolist()
    answers = [tokenizer.encode(a).ids for a in ("Hello!", "y")]
    assert learnt == [*answers[0], IM_END, *answers[1], IM_END]


def test_what_a_grammar_forces_is_not_learnt(tokenizer) -> None:
    given = '{"'
    messages = [*words.turn("hi", '{"name": "Ana"}', given), *words.turn("x", "y")]
    (document,) = data.encode_chat(tokenizer, [messages])
    learnt = document.ids[document.learn].tolist()
    answer = tokenizer.encode('{"name": "Ana"}').ids
    assert tokenizer.encode(given).ids == answer[:1]
    assert learnt == [*answer[1:], IM_END, *tokenizer.encode("y").ids, IM_END]


def test_fine_tuning_keeps_the_tokenizer(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(build, "OUT", tmp_path)
    save_tokenizer(build.start_from(build.PACKAGE), tmp_path / "again")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        assert (tmp_path / "again" / name).read_bytes() == (MODEL_DIR / name).read_bytes()
    for folder in ("model", "draft"):
        weights = load_file(tmp_path / folder / "model.safetensors")
        model = Llama(MAIN if folder == "model" else DRAFT)
        import_weights(model, weights)
        again = export_weights(model)
        assert again.keys() == weights.keys()
        assert all(torch.equal(again[k], weights[k]) for k in weights)


def test_a_wrong_answer_misses_its_gate() -> None:
    want = {"name": "Ann", "age": 31}
    stated = guided.Case("stated", "", None, want)
    assert guided.is_right(stated, '{"name":"Ann",\n"age":31}')
    for wrong in ('{"name": "Ann", "age": 3', '{"name": "Ann", "age": 32}', "Ann is 31."):
        assert not guided.is_right(stated, wrong)
    call = guided.Case("call", "", None, {"name": "f", "arguments": {"a": 1}})
    assert guided.is_right(call, tools.write_call("f", '{"a": 1}'))
    assert not guided.is_right(call, tools.write_call("g", '{"a": 1}'))
    assert not guided.is_right(guided.Case("no_call", "", None, "Hello!"), "<tool_call>")


def test_rows_predict_the_next_token(tokenizer) -> None:
    document = data.encode_prose(tokenizer, ["some prose to be learnt as a whole"])
    ids, targets = data.Packer(document, seed=0).row(64)
    assert ids[1:].tolist() == targets[:-1].tolist()


def test_clean_drops_doctests_and_markup() -> None:
    doc = "Return the :class:`Path` of a file, whatever ``x`` may be.\n\n>>> f(1)\n2\n\nshort"
    assert clean(doc) == "Return the Path of a file, whatever x may be."


def test_the_learning_rate_warms_up_and_decays() -> None:
    assert schedule(0.0) < schedule(0.01) < schedule(0.3) == 1.0 > schedule(0.8) > schedule(1.0) > 0


def test_muon_steps_as_pytorchs_does() -> None:
    """Theirs works in bf16, hence the room: a part in fifty of the step."""
    rng = torch.Generator().manual_seed(0)
    start = [torch.randn(s, generator=rng) for s in ((320, 192), (192, 512), (320, 192))]
    ours, theirs = ([torch.nn.Parameter(p.clone()) for p in start] for _ in range(2))
    optimizers = [
        Muon(ours, lr=1e-2, weight_decay=0.02),
        torch.optim.Muon(theirs, lr=1e-2, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
    ]
    for _ in range(3):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=rng)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b, p in zip(ours, theirs, start, strict=True):
        assert (a - b).norm() < 0.02 * (b - p).norm()


def test_the_exported_model_is_the_trained_one(tmp_path: Path, tokenizer) -> None:
    """Own forward, own loss and its hand-made gradient against `transformers` and autograd."""
    tokens = tmp_path / "tokenizer.json"
    tokenizer.save(str(tokens))
    documents = data.encode_prose(tokenizer, ["a few words, again and again, to be learnt"] * 40)
    data.save_documents(documents, tmp_path / "documents.npz")
    job = TrainJob(
        DRAFT,
        tmp_path / "documents.npz",
        tokens,
        tmp_path / "model",
        TrainOptions(minutes=0.02, workers=1),
    )
    assert train(job)["steps"] >= 2

    model = Llama(DRAFT, seed=1)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.bfloat16().float())
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    missing = theirs.load_state_dict(
        {k: v.float() for k, v in export_weights(model).items()}, strict=False
    )
    assert missing.missing_keys in ([], ["lm_head.weight"]) and not missing.unexpected_keys
    theirs.tie_weights()
    ids = torch.randint(0, 4096, (2, 40), generator=torch.Generator().manual_seed(0))
    logits = F.linear(model.hidden(ids), model.embed.weight)
    torch.testing.assert_close(logits, theirs(ids).logits, atol=1e-4, rtol=1e-3)

    model.loss(ids, ids).backward()
    ours = model.embed.weight.grad.clone()
    model.zero_grad()
    logits = F.linear(model.hidden(ids), model.embed.weight)
    F.cross_entropy(logits.view(-1, 4096), ids.view(-1)).backward()
    torch.testing.assert_close(ours, model.embed.weight.grad, atol=1e-5, rtol=1e-3)
