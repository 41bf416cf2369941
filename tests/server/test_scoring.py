"""/score and /rerank: cosines of embeddings, in vLLM's, Jina's and Cohere's shapes."""

from __future__ import annotations

import pytest

from quire.sampling_params import PoolingParams
from quire.server.scoring import cosines


async def post(client, path: str, status: int = 200, **body) -> dict:
    response = await client.post(path, json=body)
    assert response.status_code == status, response.text
    return response.json()


async def refused(client, path: str, param: str, **body) -> None:
    error = (await post(client, path, 400, **body))["error"]
    assert error["param"] == param, error


def cosine(engine, left: str, right: str) -> float:
    """By hand, of vectors whose length is not 1."""
    raw = PoolingParams(normalize=False)
    a, b = (engine.embed(engine.model.tokenizer.encode(text), raw) for text in (left, right))
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / (sum(x * x for x in a) * sum(y * y for y in b)) ** 0.5


@pytest.mark.parametrize("path", ["/score", "/v1/score"])
@pytest.mark.parametrize(
    ("left", "right", "pairs"),
    [
        ("a b", "b a a", [("a b", "b a a")]),
        ("a b", ["a c", "b", "a b"], [("a b", "a c"), ("a b", "b"), ("a b", "a b")]),
        (["a b"], ["a c", "b"], [("a b", "a c"), ("a b", "b")]),
        (["a b", "c a"], ["a c", "b"], [("a b", "a c"), ("c a", "b")]),
    ],
)
async def test_scores(client, engine, path, left, right, pairs):
    body = await post(client, path, model="tiny", text_1=left, text_2=right)
    assert body["id"].startswith("score-") and body["object"] == "list"
    assert [(d["index"], d["object"]) for d in body["data"]] == [
        (i, "score") for i in range(len(pairs))
    ]
    expected = [cosine(engine, *pair) for pair in pairs]
    assert [d["score"] for d in body["data"]] == pytest.approx(expected)
    tokens = sum(len(s.prompt) for s in engine.submitted)
    assert body["usage"]["prompt_tokens"] == body["usage"]["total_tokens"] == tokens


@pytest.mark.parametrize(
    ("one", "other"), [("data_1", "data_2"), ("queries", "documents"), ("queries", "items")]
)
async def test_the_other_names_of_the_sides(client, one, other):
    named = await post(client, "/score", **{one: "a b", other: ["b", "a"]})
    plain = await post(client, "/score", text_1="a b", text_2=["b", "a"])
    assert named["data"] == plain["data"]


async def test_scores_refused(make_client, engine):
    client = make_client(max_prompts_per_request=3)
    await refused(client, "/score", "body.text_1", text_1="a")
    await refused(client, "/score", "text_2", text_1=["a", "b"], text_2="c")
    await refused(client, "/score", "items", queries=["a", "b"], items=["c"])
    await refused(client, "/score", "text_2", text_1="a", text_2=["b", "c", "d"])
    await refused(client, "/score", "body.text_2", text_1="a", text_2=[])
    await refused(client, "/score", "body.text_1", text_1={"content": []}, text_2="b")
    await refused(client, "/score", "label_token_ids", text_1="a", text_2="b", label_token_ids=[1])
    assert (await post(client, "/score", 404, text_1="a", text_2="b", model="x"))["error"]
    assert engine.submitted == []


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank"])
async def test_rerank(client, engine, path):
    texts = ["c", "a b", "d b", "a b"]
    documents = [texts[0], {"text": texts[1]}, *texts[2:]]
    asked = {"query": "a b", "documents": documents, "pooling": "mean"}
    body = await post(client, path, **asked)
    assert body["id"].startswith("rerank-") and body["model"] == "tiny"
    assert {s.params.pooling for s in engine.submitted} == {"mean"}
    scores = [cosine(engine, "a b", text) for text in texts]
    order = [r["index"] for r in body["results"]]
    assert order == sorted(range(4), key=lambda i: (-scores[i], i))
    assert order[:2] == [1, 3] and len(set(scores)) == 3  # of equals, the earlier
    for result in body["results"]:
        assert result["document"] == {"text": texts[result["index"]]}
        assert result["relevance_score"] == pytest.approx(scores[result["index"]])
    best = await post(client, path, **asked, top_n=1, return_documents=False)
    assert best["results"] == [
        {"index": 1, "relevance_score": body["results"][0]["relevance_score"]}
    ]
    assert len((await post(client, path, **asked, top_n=9))["results"]) == 4
    assert len((await post(client, path, **asked, top_n=0))["results"]) == 4


async def test_rerank_refused(make_client, engine):
    client = make_client(max_prompts_per_request=2)
    await refused(client, "/rerank", "body.documents", query="a")
    await refused(client, "/rerank", "body.documents", query="a", documents=[])
    await refused(client, "/rerank", "body.query", documents=["a"])
    await refused(client, "/rerank", "documents", query="a", documents=["a", "b", "c"])
    await refused(client, "/rerank", "top_n", query="a", documents=["b"], top_n=-1)
    await refused(client, "/rerank", "max_tokens_per_doc", query="a", documents=["b"],
                  max_tokens_per_doc=4)  # fmt: skip
    assert engine.submitted == []


async def test_cosines_stay_within_one():
    almost = [0.6000000001, 0.8]
    assert await cosines([almost], [almost, [-x for x in almost]]) == [1.0, -1.0]
