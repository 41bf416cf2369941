"""Rotary position embedding (Su et al. 2021) as one table, with every supported method of scaling.

The frequencies are computed as transformers 5.23 computes them, operation for operation, so that the table
is equal to its cos and sin to the last bit. A table costs 4 * rotary_dim bytes per position and saves two
transcendental functions per element per step.
"""

from __future__ import annotations

import math

import torch

from quire.layers.spec import QueryTemperature, RopeSpec


def cos_sin_table(rope: RopeSpec, *, max_model_len: int, dtype: torch.dtype) -> torch.Tensor:
    """cos and sin for each position: [max_model_len, rotary_dim] float32, the cos half then the sin half.

    Values are rounded to `dtype`, the model's, before they are stored: in most families transformers
    multiplies by cos and sin in the model's dtype, and a bf16 model that rotates with more precise angles
    answers differently from the reference.
    """
    freqs = torch.outer(
        torch.arange(max_model_len, dtype=torch.float32),
        inverse_frequencies(rope, max_model_len=max_model_len),
    )
    # freqs: [max_model_len, rotary_dim / 2]
    table = torch.cat((freqs.cos(), freqs.sin()), dim=-1).mul_(rope.attention_factor)
    return table.to(dtype).to(torch.float32) if rope.rounded else table


def inverse_frequencies(rope: RopeSpec, *, max_model_len: int) -> torch.Tensor:
    """Radians per position of each pair of dimensions: [rotary_dim / 2] float32."""
    if rope.type == "yarn":
        return _yarn(rope)
    theta = _dynamic_theta(rope, max_model_len) if rope.type == "dynamic" else rope.theta
    powers = _powers(theta, rope.rotary_dim)
    if rope.type == "longrope":
        return 1.0 / (_longrope_factors(rope, max_model_len) * powers)
    inv_freq = 1.0 / powers
    if rope.type == "linear":
        return inv_freq / rope.factor
    if rope.type == "llama3":
        return _llama3(rope, inv_freq)
    return inv_freq


def _powers(theta: float, rotary_dim: int) -> torch.Tensor:
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.int64).to(torch.float32) / rotary_dim
    return torch.as_tensor(theta**exponents)


def _dynamic_theta(rope: RopeSpec, max_model_len: int) -> float:
    """NTK-aware scaling with one base for the life of the engine.

    transformers increases the base with the longest sequence of the batch, so a token's rotation depends
    on when it was computed and on its neighbours in the batch. Quire must not do this: a request's output
    depends on that request alone, and a cached block must be valid for every request that reuses it. So
    while `max_model_len` is within `max_position_embeddings`, the base is the plain one, as in
    transformers. Beyond it (the default: the context is `factor` times as long), every position, from the
    first, uses the base that transformers would use for a sequence of `max_model_len` tokens, as in vLLM.
    """
    trained = rope.original_max_position_embeddings
    dim = rope.rotary_dim
    if max_model_len <= trained or dim == 2:
        return rope.theta
    stretch = rope.factor * max_model_len / trained - (rope.factor - 1)
    return float(rope.theta * stretch ** (dim / (dim - 2)))


def _longrope_factors(rope: RopeSpec, max_model_len: int) -> torch.Tensor:
    """LongRoPE (Ding et al. 2024): one set of divisors for the life of the engine, [rotary_dim / 2].

    transformers uses the short ones until a sequence exceeds the original context. As with
    `_dynamic_theta`, a token's rotation must not depend on the final length of its request, so
    `max_model_len` decides, as in vLLM. Answers equal those of transformers if the sequence and
    `max_model_len` are on the same side of the original context.
    """
    beyond = max_model_len > rope.original_max_position_embeddings
    return torch.tensor(rope.long_factors if beyond else rope.short_factors, dtype=torch.float32)


def _llama3(rope: RopeSpec, inv_freq: torch.Tensor) -> torch.Tensor:
    """Llama 3.1: keep short wavelengths, divide long ones by the factor, blend between."""
    trained = rope.original_max_position_embeddings
    wavelength = 2 * math.pi / inv_freq
    is_long = wavelength > trained / rope.low_freq_factor
    is_short = wavelength < trained / rope.high_freq_factor
    share = (trained / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    blended = (1 - share) * inv_freq / rope.factor + share * inv_freq
    scaled = torch.where(is_long, inv_freq / rope.factor, inv_freq)
    return torch.where(is_long | is_short, scaled, blended)


def _yarn(rope: RopeSpec) -> torch.Tensor:
    """YaRN (Peng et al. 2023, section 3.2): interpolate the dimensions that never completed a turn
    in training.
    """
    dim, powers = rope.rotary_dim, _powers(rope.theta, rope.rotary_dim)

    def dimension_turning(rotations: float) -> float:
        trained = rope.original_max_position_embeddings
        return dim * math.log(trained / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension_turning(rope.beta_fast), dimension_turning(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    keep = 1 - ramp
    return 1.0 / (rope.factor * powers) * (1 - keep) + 1.0 / powers * keep


def query_temperatures(
    temperature: QueryTemperature, *, max_model_len: int, dtype: torch.dtype
) -> torch.Tensor:
    """Factors of the queries at each position: [max_model_len] float32, rounded to `dtype`, as in
    transformers' `get_llama_4_attn_scale`."""
    positions = torch.arange(max_model_len, dtype=torch.float32)
    turns = torch.floor(positions / temperature.original_length)
    return (1 + temperature.beta * torch.log(1 + turns)).to(dtype).to(torch.float32)
