"""EAGLE, EAGLE-3 and MTP heads in plain PyTorch, and tiny checkpoints of them in their published formats.

The reference keeps no KV cache: it computes the whole sequence again for each draft, in float32.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

STD = 0.2


@dataclass
class Form:
    """What a checkpoint is like. The names of `layer` are those in the file."""

    method: str
    config: Mapping[str, Any] = field(default_factory=dict)
    """Fields of config.json besides those of the layer."""
    layer: str = "layers.0"
    has_embedding: bool = False
    has_head: bool = True
    draft_vocab: int | None = None
    prefix: str = ""
    join_bias: bool = False
    taps: tuple[int, ...] = ()
    tap_norms: tuple[str, ...] = ()
    qk_norm: bool = False
    speculators: bool = False

    @property
    def norm_before_residual(self) -> bool:
        return bool(self.config.get("norm_before_residual", self.speculators))


def tensors_of(
    form: Form, target: transformers.PretrainedConfig, *, seed: int = 0
) -> dict[str, Tensor]:
    """Random tensors under the names of a published file."""
    generator = torch.Generator().manual_seed(seed)
    hidden, inner = target.hidden_size, 48
    heads, kv_heads, dim = 4, 2, 16

    def random(*shape: int) -> Tensor:
        return torch.empty(shape).normal_(0.0, STD, generator=generator)

    def norm(size: int) -> Tensor:
        return 1.0 + random(size)

    made: dict[str, Tensor] = {}
    layer, width = form.layer, hidden
    if form.method == "eagle":
        made["fc.weight"] = random(hidden, 2 * hidden)
    elif form.method == "eagle3":
        width = 2 * hidden
        made["fc.weight"] = random(hidden, len(form.taps) * hidden)
        made[f"{layer}.input_layernorm.weight"] = norm(hidden)
        made[f"{layer}.hidden_norm.weight"] = norm(hidden)
        made["norm.weight"] = norm(hidden)
        for name in form.tap_norms:
            made[f"{name}.weight"] = norm(hidden * len(form.taps) // len(form.tap_norms))
        if form.has_head:
            made["lm_head.weight"] = random(form.draft_vocab or target.vocab_size, hidden)
        if form.draft_vocab is not None:
            ids = (
                torch.randperm(target.vocab_size, generator=generator)[: form.draft_vocab]
                .sort()
                .values
            )
            made["d2t"] = ids - torch.arange(form.draft_vocab)
            made["t2d"] = torch.zeros(target.vocab_size, dtype=torch.bool).index_fill(0, ids, True)
    elif form.config.get("kind") == "mimo":
        for name in ("token_layernorm", "hidden_layernorm", "input_layernorm", "final_layernorm"):
            made[f"{layer}.{name}.weight"] = norm(hidden)
        made[f"{layer}.input_proj.weight"] = random(hidden, 2 * hidden)
        inner = target.intermediate_size
    else:
        for name in ("enorm", "hnorm", "input_layernorm", "shared_head.norm"):
            made[f"{layer}.{name}.weight"] = norm(hidden)
        made[f"{layer}.eh_proj.weight"] = random(hidden, 2 * hidden)
        made[f"{layer}.shared_head.head.weight"] = random(target.vocab_size, hidden)
        made[f"{layer}.embed_tokens.weight"] = random(target.vocab_size, hidden)
        inner = target.intermediate_size
    if form.join_bias:
        made["fc.bias"] = random(hidden)
    if form.has_embedding:
        made["embed_tokens.weight"] = random(target.vocab_size, hidden)
    sizes = {"q_proj": heads * dim, "k_proj": kv_heads * dim, "v_proj": kv_heads * dim}
    for name, size in sizes.items():
        made[f"{layer}.self_attn.{name}.weight"] = random(size, width)
        if form.method == "mtp":  # the target's layers have biases, as Qwen2's
            made[f"{layer}.self_attn.{name}.bias"] = random(size)
    if form.qk_norm:
        made[f"{layer}.self_attn.q_norm.weight"] = norm(dim)
        made[f"{layer}.self_attn.k_norm.weight"] = norm(dim)
    made[f"{layer}.self_attn.o_proj.weight"] = random(hidden, heads * dim)
    made[f"{layer}.mlp.gate_proj.weight"] = random(inner, hidden)
    made[f"{layer}.mlp.up_proj.weight"] = random(inner, hidden)
    made[f"{layer}.mlp.down_proj.weight"] = random(hidden, inner)
    made[f"{layer}.post_attention_layernorm.weight"] = norm(hidden)
    return {form.prefix + name: tensor for name, tensor in made.items()}


def layer_config(form: Form, target: transformers.PretrainedConfig) -> dict[str, Any]:
    return {
        "model_type": "qwen3" if form.qk_norm else "llama",
        "vocab_size": target.vocab_size,
        "hidden_size": target.hidden_size,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 64,  # less than the target's, as in published files
        "rms_norm_eps": 1e-5,
        "rope_theta": 300.0,
        "hidden_act": "silu",
        "torch_dtype": "float32",
        "tie_word_embeddings": False,
    }


def save_head(
    form: Form, target: transformers.PretrainedConfig, directory: Path, *, seed: int = 0
) -> Path:
    """An EAGLE or EAGLE-3 head as a directory."""
    directory.mkdir(parents=True, exist_ok=True)
    layer = layer_config(form, target)
    if form.speculators:
        config = {
            "architectures": ["Eagle3Speculator"],
            "auto_map": {"": "eagle3.Eagle3SpeculatorConfig"},
            "draft_vocab_size": form.draft_vocab or target.vocab_size,
            "has_no_defaults_at_init": False,
            "speculators_config": {
                "algorithm": "eagle3",
                "default_proposal_method": "greedy",
                "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 3}],
                "verifier": {"architectures": ["LlamaForCausalLM"], "name_or_path": "somewhere"},
            },
            "speculators_model_type": "eagle3",
            "speculators_version": "0.1.0",
            "target_hidden_size": None,
            "torch_dtype": "float32",
            "transformer_layer_config": layer,
            "transformers_version": "4.53.2",
        }
    else:
        config = {"architectures": ["LlamaForCausalLM"], **layer}
        if form.draft_vocab is not None:
            config["draft_vocab_size"] = form.draft_vocab
    (directory / "config.json").write_text(json.dumps({**config, **form.config}))
    save_file(tensors_of(form, target, seed=seed), directory / "model.safetensors")
    return directory


class ReferenceHead:
    def __init__(
        self, form: Form, target: transformers.PreTrainedModel, tensors: Mapping[str, Tensor]
    ) -> None:
        self.form, self.target = form, target
        self._states: list[tuple[list[int], Tensor]] = []
        self.w = {
            name.removeprefix(form.prefix): each.float()
            for name, each in tensors.items()
            if name != "d2t"
        }
        self.offsets = tensors.get(form.prefix + "d2t")
        config = target.config
        is_mtp = form.method == "mtp"
        self.eps = config.rms_norm_eps if is_mtp else 1e-5
        self.theta = config.rope_parameters["rope_theta"] if is_mtp else 300.0

    @classmethod
    def load(
        cls, form: Form, target: transformers.PreTrainedModel, directory: Path
    ) -> ReferenceHead:
        return cls(form, target, load_file(directory / "model.safetensors"))

    def norm(self, x: Tensor, name: str) -> Tensor:
        return (
            self.w[f"{name}.weight"] * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        )

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.w[f"{name}.weight"], self.w.get(f"{name}.bias"))

    def target_states(self, tokens: Sequence[int]) -> Tensor:
        """What the head reads of the target, for each token. Ask for the longest sequences first."""
        for known, states in self._states:
            if known[: len(tokens)] == list(tokens):
                return states[: len(tokens)]
        self._states.append((list(tokens), self._target_states(tokens)))
        return self._states[-1][1]

    @torch.no_grad()
    def _target_states(self, tokens: Sequence[int]) -> Tensor:
        before: list[Tensor] = []
        model, form = self.target.model, self.form
        hook = model.norm.register_forward_pre_hook(lambda _, args: before.append(args[0]))
        out = self.target(torch.tensor([list(tokens)]), output_hidden_states=True)
        hook.remove()
        states = [*out.hidden_states[:-1], before[0]]
        if form.method == "eagle3":
            parts = [states[i][0] for i in form.taps]
            if len(form.tap_norms) == 1:
                return self.linear(self.norm(torch.cat(parts, -1), form.tap_norms[0]), "fc")
            if form.tap_norms:
                parts = [self.norm(x, name) for x, name in zip(parts, form.tap_norms, strict=True)]
            return self.linear(torch.cat(parts, -1), "fc")
        if form.config.get("kind") == "mimo":
            return before[0][0]
        return model.norm(before[0])[0]

    @torch.no_grad()
    def forward(self, next_ids: Sequence[int], states: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """(what becomes logits, the next state) for each token. first: position of the first."""
        form, layer = self.form, self.form.layer
        own = self.w.get("embed_tokens.weight")
        table = self.target.get_input_embeddings().weight if own is None else own
        embedded = table[torch.tensor(next_ids)]
        if form.method == "eagle3":
            state = self.norm(states, f"{layer}.hidden_norm")
            x = torch.cat((self.norm(embedded, f"{layer}.input_layernorm"), state), -1)
            residual = state if form.norm_before_residual else states
        elif form.method == "eagle":
            residual = x = self.linear(torch.cat((embedded, states), -1), "fc")
        elif form.config.get("kind") == "mimo":
            state = self.norm(states, f"{layer}.hidden_layernorm")
            both = torch.cat((state, self.norm(embedded, f"{layer}.token_layernorm")), -1)
            residual = self.linear(both, f"{layer}.input_proj")
            x = self.norm(residual, f"{layer}.input_layernorm")
        else:
            both = torch.cat(
                (self.norm(embedded, f"{layer}.enorm"), self.norm(states, f"{layer}.hnorm")), -1
            )
            residual = self.linear(both, f"{layer}.eh_proj")
            x = self.norm(residual, f"{layer}.input_layernorm")
        residual = residual + self.attention(x, first)
        inner = self.norm(residual, f"{layer}.post_attention_layernorm")
        gate = F.silu(self.linear(inner, f"{layer}.mlp.gate_proj"))
        residual = residual + self.linear(
            gate * self.linear(inner, f"{layer}.mlp.up_proj"), f"{layer}.mlp.down_proj"
        )
        if form.method == "eagle":
            return residual, residual
        if form.method == "eagle3":
            normed = self.norm(residual, "norm")
            return normed, normed if form.config.get("norm_output") else residual
        if form.config.get("kind") == "mimo":
            return self.norm(residual, f"{layer}.final_layernorm"), residual
        normed = self.norm(residual, f"{layer}.shared_head.norm")
        return normed, normed

    def attention(self, x: Tensor, first: int) -> Tensor:
        layer, count = f"{self.form.layer}.self_attn", len(x)
        q, k, v = (
            self.linear(x, f"{layer}.{name}").view(count, -1, 16).transpose(0, 1)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        if self.form.qk_norm:
            q, k = self.norm(q, f"{layer}.q_norm"), self.norm(k, f"{layer}.k_norm")
        angles = torch.outer(
            torch.arange(first, first + count).float(), self.theta ** (-torch.arange(0, 16, 2) / 16)
        )
        cos, sin = (torch.cat((f, f), -1) for f in (angles.cos(), angles.sin()))

        def rotate(y: Tensor) -> Tensor:
            return y * cos + torch.cat((-y[..., 8:], y[..., :8]), -1) * sin

        k, v = (each.repeat_interleave(len(q) // len(k), 0) for each in (rotate(k), v))
        out = F.scaled_dot_product_attention(rotate(q), k, v, is_causal=True)
        return self.linear(out.transpose(0, 1).reshape(count, -1), f"{layer}.o_proj")

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Of the target's tokens: [vocab_size]."""
        own = self.w.get("lm_head.weight")
        if own is None:
            return self.target.get_output_embeddings()(hidden)
        values = F.linear(hidden, own)
        if self.offsets is None:
            return values
        every = torch.full((self.target.config.vocab_size,), -torch.inf)
        every[torch.arange(len(values)) + self.offsets] = values
        return every

    def drafts(
        self, tokens: Sequence[int], count: int, *, context: int = 0, draw: Any = None
    ) -> list[int]:
        """After these tokens, with the inputs from `context` on. draw: (logits, position) -> token."""
        draw = draw or (lambda logits, position: int(logits.argmax()))
        states = self.target_states(tokens[:-1])[context:]
        ids, made = list(tokens[context + 1 :]), []
        while True:
            hidden, state = self.forward(ids, states, context)
            made.append(draw(self.logits(hidden[-1]), len(tokens) + len(made)))
            if len(made) == count:
                return made
            ids.append(made[-1])
            states = torch.cat((states, state[-1:]))
