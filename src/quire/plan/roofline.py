"""The time of a step from a device's data sheet: the most that its arithmetic, memory and links allow.

    seconds = max(FLOP / peak, bytes / bandwidth, gathered bytes / link) + what the host does

* bytes: the matrices once a step (of a mixture of experts, those of the experts that some token chose), and
  the keys and values of all tokens that are attended to. An embedding that is not the head is not read:
  tokens are looked up in it.
* FLOP: 2 a parameter of the layers' matrices and token; 2 a parameter of the head and sampled row; of
  attention 4 a query head's dimension, layer and pair of a token and one that it attends to (`Work` counts
  pairs, so causal halving is in them).
* gathered bytes: after each of a layer's four stages every rank has the other ranks' columns of each token.

With `BOUND` each part runs at the data sheet's speed, all at once, and the host takes no time: no real step
is faster, and the result is called a *bound*. With `PUBLISHED` parts reach what others have measured on an
H100, and it is called an *estimate*: nobody has measured this model on this device. A *prediction* is only
what `quire bench fit` has fitted to measured steps.

Two simplifications. `Work` says how many tokens of prompts are computed, not of how many prompts, so the
keys and values that they read are counted as one prompt's. Layers with a window count the mean context of
all rows.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

from quire.dtypes import element_bytes
from quire.models.spec import ModelSpec
from quire.plan.devices import Gpu
from quire.scheduler.cost_model import Work


class Experts(NamedTuple):
    """Of each layer: how many there are, and to how many a token goes."""

    total: int = 1
    chosen: int = 1

    def touched(self, tokens: float) -> float:
        """The share of experts that at least one of so many tokens chose, if each is equally likely."""
        return 1.0 - (1.0 - self.chosen / self.total) ** tokens


DENSE = Experts()


@dataclass(frozen=True, slots=True)
class Shape:
    """A rank's part of a model, as far as it decides the time of a step."""

    matrix_bytes: float
    """Read in each step, without the experts' matrices."""
    expert_bytes: float
    matrix_params: float
    """Multiplied with each token, without the head: of a mixture, of the experts that a token goes to."""
    head_params: float
    windows: tuple[tuple[int | None, int], ...]
    """Of attention, and the number of layers that have it."""
    q_size: int
    kv_layer_bytes: int
    """Keys and values of one token in one layer."""
    gather_width: float
    """Elements of each token that a rank gets from others, in all layers."""
    gather_logits: float
    """The same of each sampled row."""
    dtype_bytes: int
    experts: Experts = DENSE

    @property
    def layers(self) -> int:
        return sum(count for _, count in self.windows)

    @classmethod
    def of(cls, spec: ModelSpec, *, dtype: str, kv_dtype: str, experts: Experts = DENSE) -> Shape:
        """spec: of a rank (`quire.runner.footprint.spec_of_rank`). dtype, kv_dtype: by torch's names.
        experts: if not one, the MLPs of `spec` are all experts', side by side."""
        size, method = element_bytes(dtype), spec.quantization
        heads, ranks = spec.heads, spec.share.size
        share = experts.chosen / experts.total
        matrix = expert = norms = params = 0.0
        for index in spec.own_layers:
            layer, prefix = spec.layers[index], f"model.layers.{index}"
            for linear in layer.attention.linears(
                f"{prefix}.self_attn", spec.hidden_size, spec.share
            ):
                matrix += method.weight_bytes(linear, size)
                params += linear.num_parameters
            for linear in layer.mlp.linears(f"{prefix}.mlp", spec.hidden_size, spec.share):
                expert += method.weight_bytes(linear, size)
                params += linear.num_parameters * share
        norms = spec.norm_parameters() * size
        head = method.weight_bytes(spec.head, size) if spec.has_logits else 0
        if experts.total == 1:
            matrix, expert = matrix + expert, 0.0
        whole = spec.layers[0].attention
        inner = spec.layers[0].mlp.intermediate_size * share
        others = (ranks - 1) / ranks
        return cls(
            matrix_bytes=matrix + norms + head,
            expert_bytes=expert,
            matrix_params=params,
            head_params=spec.head.num_parameters if spec.has_logits else 0,
            windows=tuple(Counter(spec.windows[index] for index in spec.own_layers).items()),
            q_size=heads.q_size,
            kv_layer_bytes=2 * heads.kv_size * element_bytes(kv_dtype),
            gather_width=others
            * len(spec.own_layers)
            * (whole.q_size + 2 * spec.hidden_size + inner),
            gather_logits=others * spec.vocab_size * 4,
            dtype_bytes=size,
            experts=experts,
        )


@dataclass(frozen=True, slots=True)
class Efficiency:
    """What a device reaches of its data sheet, and what a step costs beside. Times in seconds."""

    prompts: float = 1.0
    """Of the peak FLOP/s, while prompts are computed (MFU)."""
    rows: float = 1.0
    """Of the peak, for tokens that are generated."""
    memory: float = 1.0
    link: float = 1.0
    gathers_wait: bool = False
    """Whether a rank computes nothing while it gathers."""
    step: float = 0.0
    """Schedule, messages, sampling."""
    layer: float = 0.0
    """Launches of a layer, in a step with prompts. Steps without are CUDA graphs."""
    row: float = 0.0
    request: float = 0.0
    """Until a request's first step: HTTP, template, tokenizing."""


BOUND = Efficiency()
PUBLISHED = Efficiency(
    prompts=0.45,
    rows=0.30,
    memory=0.8,
    link=0.8,
    gathers_wait=True,
    step=126e-6,
    layer=32e-6,
    row=4e-6,
    request=15.6e-3,
)
"""MFU and times of the host: fitted to vLLM on H100s by BLIS (inference-sim f90a1e3a). Of the bandwidth 0.8:
NVIDIA AIConfigurator, and the links' is taken to be the same."""


class Terms(NamedTuple):
    """Of one step, on one rank."""

    weight_bytes: float
    kv_bytes: float
    prompt_flop: float
    row_flop: float
    link_bytes: float
    arithmetic: float
    """Seconds, as the three below."""
    memory: float
    link: float
    host: float
    seconds: float
    """Of the step."""

    @property
    def limit(self) -> str:
        """What it waits for most."""
        parts = {"arithmetic": self.arithmetic, "memory": self.memory, "links": self.link}
        return max(parts, key=lambda name: parts[name])


class Roofline:
    """A `StepTime`."""

    def __init__(
        self, shape: Shape, gpu: Gpu, *, fp8: bool = False, efficiency: Efficiency = BOUND
    ) -> None:
        """fp8: whether the layers' matrices are multiplied in fp8, if the device can."""
        self.shape, self.gpu, self.efficiency = shape, gpu, efficiency
        self.peak = (gpu.fp8 or gpu.bf16) if fp8 else gpu.bf16
        self.is_bound = efficiency == BOUND

    def seconds(self, work: Work) -> float:
        return self.terms(work).seconds

    def terms(self, work: Work) -> Terms:
        shape, gpu, reached = self.shape, self.gpu, self.efficiency
        tokens = work.rows + work.prompt_tokens
        weights = shape.matrix_bytes + shape.expert_bytes * shape.experts.touched(tokens)
        mean = work.contexts / work.rows if work.rows else 0.0
        prompt = work.prompt_contexts / work.prompt_tokens if work.prompt_tokens else 0.0
        row_pairs = prompt_pairs = cached = 0.0
        for window, layers in shape.windows:
            most = float("inf") if window is None else window
            row_pairs += layers * work.rows * min(mean, most)
            prompt_pairs += layers * work.prompt_tokens * min(prompt, most)
            cached += layers * (work.rows * min(mean, most) + min(prompt, most))
        kv = cached * shape.kv_layer_bytes
        attention = 4 * shape.q_size
        rows = (
            2 * shape.matrix_params * work.rows / self.peak
            + (2 * shape.head_params * work.rows + attention * row_pairs) / gpu.bf16
        ) / reached.rows
        prompts = (
            2 * shape.matrix_params * work.prompt_tokens / self.peak
            + attention * prompt_pairs / gpu.bf16
        ) / reached.prompts
        gathered = shape.gather_width * tokens * shape.dtype_bytes + shape.gather_logits * work.rows
        layers = shape.layers if work.prompt_tokens else 0
        memory = (weights + kv) / (gpu.bandwidth * reached.memory)
        link = gathered / (gpu.link * reached.link)
        host = reached.step + reached.layer * layers + reached.row * work.rows
        busy = max(rows + prompts, memory)
        return Terms(
            weight_bytes=weights,
            kv_bytes=kv,
            prompt_flop=2 * shape.matrix_params * work.prompt_tokens + attention * prompt_pairs,
            row_flop=2 * (shape.matrix_params + shape.head_params) * work.rows
            + attention * row_pairs,
            link_bytes=gathered,
            arithmetic=rows + prompts,
            memory=memory,
            link=link,
            host=host,
            seconds=(busy + link if reached.gathers_wait else max(busy, link)) + host,
        )
