"""A Llama small enough to train on two CPU cores, in the parameter names of `transformers`.

Query/key/value and gate/up stay fused while training (fewer, larger matrix products) and are split
only when the weights are exported.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shape of the model. Sizes in elements; `max_position` in tokens."""

    vocab_size: int = 4096
    dim: int = 192
    layers: int = 8
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 32
    ffn: int = 512
    max_position: int = 2048
    rope_theta: float = 10000.0
    eps: float = 1e-5

    def hf_config(self, *, bos: int, eos: int, pad: int) -> dict[str, object]:
        """`config.json` as `LlamaForCausalLM` reads it."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": bos,
            "eos_token_id": eos,
            "pad_token_id": pad,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.dim,
            "initializer_range": 0.02,
            "intermediate_size": self.ffn,
            "max_position_embeddings": self.max_position,
            "mlp_bias": False,
            "model_type": "llama",
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
            "rms_norm_eps": self.eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": None,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "vocab_size": self.vocab_size,
        }


MAIN = ModelConfig()
DRAFT = ModelConfig(dim=64, layers=2, heads=2, kv_heads=1, head_dim=32, ffn=128)


def rope_table(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each [max_position, head_dim], in the half-split layout of Llama."""
    inverse = config.rope_theta ** (-torch.arange(0, config.head_dim, 2).float() / config.head_dim)
    angle = torch.outer(torch.arange(config.max_position).float(), inverse)
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos(), angle.sin()


def half_turn(weight: Tensor, head_dim: int) -> Tensor:
    """The projection whose output is that of `weight`, halves of each head swapped and the first
    negated. Turning the weight is cheaper than turning the activations: it is far smaller."""
    left, right = weight.view(-1, 2, head_dim // 2, weight.shape[-1]).unbind(1)
    return torch.stack([-right, left], dim=1).view_as(weight)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention over [batch, heads, seq, head_dim]. Up to 512 positions the plain products
    are faster on a CPU, forward and backward together, than the fused kernel."""
    seq = q.shape[2]
    if seq > 512:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    future = torch.full((seq, seq), float("-inf"), dtype=q.dtype).triu(1)
    q, k, v = (t.reshape(-1, seq, t.shape[-1]) for t in (q, k, v))
    scores = torch.baddbmm(
        future.expand(q.shape[0], seq, seq), q, k.transpose(1, 2), alpha=q.shape[-1] ** -0.5
    )
    return torch.bmm(torch.softmax(scores, dim=-1, dtype=scores.dtype), v)


class TiedLoss(torch.autograd.Function):
    """Mean cross entropy of a tied head, its gradient made on the way: 256 positions at a time stay
    in the cache, where a full matrix of logits [positions, vocabulary] would not."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        head = weight.to(hidden.dtype)
        d_hidden, d_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        total = torch.zeros(())
        for rows in torch.arange(len(targets)).split(256):
            part, target = hidden[rows[0] : rows[-1] + 1], targets[rows]
            scores = (part @ head.t()).float()
            norm = scores.logsumexp(-1)
            total += (norm - scores.gather(1, target[:, None])[:, 0]).sum()
            scores.sub_(norm[:, None]).exp_()
            scores[torch.arange(len(target)), target] -= 1
            gradient = (scores / len(targets)).to(hidden.dtype)
            d_hidden[rows[0] : rows[-1] + 1] = gradient @ head
            d_weight += gradient.t() @ part
        ctx.save_for_backward(d_hidden, d_weight)
        return total / len(targets)

    @staticmethod
    def backward(ctx, scale: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[no-untyped-def]
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden * scale, d_weight * scale, None


class Layer(nn.Module):
    """Attention and feed-forward, each after an RMS norm and around a residual."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        c = self.config = config
        self.attn_norm = nn.Parameter(torch.ones(c.dim))
        self.ffn_norm = nn.Parameter(torch.ones(c.dim))
        self.qkv = nn.Linear(c.dim, (c.heads + 2 * c.kv_heads) * c.head_dim, bias=False)
        self.out = nn.Linear(c.heads * c.head_dim, c.dim, bias=False)
        self.gate_up = nn.Linear(c.dim, 2 * c.ffn, bias=False)
        self.down = nn.Linear(c.ffn, c.dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # x: [batch, seq, dim]
        c = self.config
        batch, seq, _ = x.shape
        normed = F.rms_norm(x, (c.dim,), self.attn_norm.to(x.dtype), c.eps)
        qk, v = self.qkv(normed).split(
            ((c.heads + c.kv_heads) * c.head_dim, c.kv_heads * c.head_dim), dim=-1
        )
        turned = F.linear(normed, half_turn(self.qkv.weight[: qk.shape[-1]], c.head_dim))
        heads = (batch, seq, -1, c.head_dim)
        qk = torch.addcmul(qk.view(heads) * cos, turned.view(heads), sin).transpose(1, 2)
        q, k = qk.split((c.heads, c.kv_heads), dim=1)
        groups = c.heads // c.kv_heads
        k = k.repeat_interleave(groups, dim=1)
        v = v.view(heads).transpose(1, 2).repeat_interleave(groups, dim=1)
        attended = attend(q, k, v)
        attended = attended.view(batch, c.heads, seq, c.head_dim).transpose(1, 2)
        x = x + self.out(attended.reshape(batch, seq, -1))
        gate, up = self.gate_up(F.rms_norm(x, (c.dim,), self.ffn_norm.to(x.dtype), c.eps)).chunk(
            2, dim=-1
        )
        return x + self.down(F.silu(gate) * up)


class Llama(nn.Module):
    """The whole model; `loss` looks only at the positions that carry a target."""

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = nn.Parameter(torch.ones(config.dim))
        cos, sin = rope_table(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                deep = name.endswith(("out.weight", "down.weight"))
                std = 0.02 / (2 * config.layers) ** 0.5 if deep else 0.02
                nn.init.normal_(p, std=std if "embed" in name else std * 2, generator=generator)

    def hidden(self, ids: Tensor) -> Tensor:
        """Final hidden states [batch, seq, dim] of ids [batch, seq]."""
        x = self.embed(ids)
        if torch.is_autocast_enabled("cpu"):
            x = x.to(torch.bfloat16)
        cos = self.cos[: ids.shape[1], None].to(x.dtype)  # [seq, 1, head_dim]
        sin = self.sin[: ids.shape[1], None].to(x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return F.rms_norm(x, (self.config.dim,), self.norm.to(x.dtype), self.config.eps)

    def loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Mean cross entropy in nats; targets [batch, seq] hold -100 where nothing is learnt."""
        flat = targets.view(-1)
        where = (flat != -100).nonzero().squeeze(1)
        hidden = self.hidden(ids).view(-1, self.config.dim)[where]
        loss: Tensor = TiedLoss.apply(hidden, self.embed.weight, flat[where])
        return loss


def export_weights(model: Llama) -> dict[str, Tensor]:
    """bf16 tensors under the names of `LlamaForCausalLM`; the output head is tied, hence absent."""
    c = model.config
    out: dict[str, Tensor] = {
        "model.embed_tokens.weight": model.embed.weight,
        "model.norm.weight": model.norm,
    }
    for i, layer in enumerate(model.layers):
        p = f"model.layers.{i}."
        q, k, v = layer.qkv.weight.split(
            [n * c.head_dim for n in (c.heads, c.kv_heads, c.kv_heads)]
        )
        gate, up = layer.gate_up.weight.chunk(2)
        out |= {
            p + "self_attn.q_proj.weight": q,
            p + "self_attn.k_proj.weight": k,
            p + "self_attn.v_proj.weight": v,
            p + "self_attn.o_proj.weight": layer.out.weight,
            p + "mlp.gate_proj.weight": gate,
            p + "mlp.up_proj.weight": up,
            p + "mlp.down_proj.weight": layer.down.weight,
            p + "input_layernorm.weight": layer.attn_norm,
            p + "post_attention_layernorm.weight": layer.ffn_norm,
        }
    return {name: t.detach().to(torch.bfloat16).contiguous().clone() for name, t in out.items()}


def import_weights(model: Llama, weights: Mapping[str, Tensor]) -> None:
    """The way back from `export_weights`, so that a run can go on from a checkpoint."""
    with torch.no_grad():
        model.embed.weight.copy_(weights["model.embed_tokens.weight"])
        model.norm.copy_(weights["model.norm.weight"])
        for i, layer in enumerate(model.layers):
            p = f"model.layers.{i}."
            projections = [weights[f"{p}self_attn.{x}_proj.weight"] for x in "qkv"]
            layer.qkv.weight.copy_(torch.cat(projections))
            halves = [weights[f"{p}mlp.{x}_proj.weight"] for x in ("gate", "up")]
            layer.gate_up.weight.copy_(torch.cat(halves))
            layer.out.weight.copy_(weights[p + "self_attn.o_proj.weight"])
            layer.down.weight.copy_(weights[p + "mlp.down_proj.weight"])
            layer.attn_norm.copy_(weights[p + "input_layernorm.weight"])
            layer.ffn_norm.copy_(weights[p + "post_attention_layernorm.weight"])


def count_parameters(config: ModelConfig) -> int:
    return sum(p.numel() for p in Llama(config).parameters())
