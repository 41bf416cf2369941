"""A LoRA adapter for the built-in model: made here, and served beside it. `python examples/lora.py`

An adapter is a small change to some of a model's matrices, W + s * B A, in two files. This trains one in a
few seconds with PyTorch and transformers; PEFT writes the same files (docs/lora.md). Then the model and the
adapter answer in one batch.
"""

import json
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from quire import LLM, LoRARequest, SamplingParams
from quire.builtin import MODEL_DIR

RANK, ALPHA = 8, 16
QUESTION = [{"role": "user", "content": "Who are you?"}]
ANSWER = "I am an adapter of rank 8."


def train(text: list[int], learned: int, directory: Path) -> None:
    """Write an adapter with which the last `learned` tokens of `text` follow from those before them."""
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
    model.requires_grad_(False)
    tensors = {}
    for name, module in model.named_modules():
        if name.endswith(("q_proj", "v_proj", "down_proj")):
            a = torch.nn.Parameter(torch.randn(RANK, module.in_features) / module.in_features**0.5)
            b = torch.nn.Parameter(torch.zeros(module.out_features, RANK))
            tensors[f"base_model.model.{name}.lora_A.weight"] = a
            tensors[f"base_model.model.{name}.lora_B.weight"] = b
            module.register_forward_hook(
                lambda module, x, y, a=a, b=b: y + ALPHA / RANK * (x[0] @ a.T @ b.T)
            )
    optimizer = torch.optim.AdamW(tensors.values(), lr=5e-3)
    tokens = torch.tensor([text])
    labels = tokens.clone()
    labels[:, :-learned] = -100  # not learned
    for _ in range(20):
        loss = model(tokens, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"loss {loss.item():.4f} after 20 steps")
    save_file(
        {name: tensor.detach() for name, tensor in tensors.items()},
        directory / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA}
    (directory / "adapter_config.json").write_text(json.dumps(config))


if __name__ == "__main__":
    greedy = SamplingParams(temperature=0, max_tokens=24)
    with tempfile.TemporaryDirectory() as directory, LLM(enable_lora=True) as llm:
        [before] = llm.chat(QUESTION, greedy, use_tqdm=False)
        answer = llm.get_tokenizer().encode(ANSWER, add_special_tokens=False)
        answer += llm.model.eos_token_ids[:1]
        train([*before.prompt_token_ids, *answer], len(answer), Path(directory))

        adapter = LoRARequest("mine", 1, directory)
        both = llm.chat([QUESTION] * 2, greedy, lora_request=[None, adapter], use_tqdm=False)
        for output in both:
            name = output.lora_request.name if output.lora_request else "the model itself"
            print(f"{name}: {output.outputs[0].text!r}")
