import json

from bench.peers import models
from tokenizers import Tokenizer


def test_mistralrs_reads_prompts_of_ids_as_those_ids(tmp_path):
    source, target = tmp_path / "M", tmp_path / "M-mistralrs"
    source.mkdir()
    config = {"vocab_size": 400, "rope_parameters": {"rope_theta": 5e5}}
    (source / "config.json").write_text(json.dumps(config))
    (source / "tokenizer.json").write_text("not this one")
    (source / "model.safetensors").write_text("weights")

    models.mistralrs(source, target)

    tokenizer = Tokenizer.from_file(str(target / "tokenizer.json"))
    assert tokenizer.encode("399 3 300 300").ids == [399, 3, 300, 300]
    assert tokenizer.token_to_id("</s>") == 2
    assert json.loads((target / "config.json").read_text())["rope_theta"] == 5e5
    assert (target / "model.safetensors").read_text() == "weights"
