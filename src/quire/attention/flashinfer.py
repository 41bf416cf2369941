"""FlashInfer (Ye et al. 2025) over our cache, which is its "HND" layout, where its package is installed.

Its wrappers plan on the host, which would have to wait for lengths that only the device has. So we use
its functions that read them on the device: for decoding, the kernels of TensorRT-LLM on compute
capability 10 and XQA on 9 and 12; for steps with prompts, those of TensorRT-LLM, which exist only for 10.
On 9 and 12 our own kernels compute steps with prompts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from quire.attention.base import AttentionMetadata, AttentionTask, LayerCache, TaskLimits
from quire.attention.paged import PagedAttention
from quire.errors import ConfigError
from quire.kernels.base import LayerKernels
from quire.kernels.ops import AttentionLayer

WORKSPACE_BYTES = 256 << 20
"""For partial results of split sequences: 128 MiB in the examples of its documentation, 256 MiB in its
tests."""


class FlashInferAttention:
    name = "FlashInfer"

    def __init__(self, task: AttentionTask, kernels: LayerKernels) -> None:
        """Raises `ConfigError` if it cannot be imported or does not support the task."""
        TaskLimits(self.name, (9, 10, 12), (64, 128, 256), block_sizes=(16, 32, 64)).check(task)
        try:
            from flashinfer.decode import trtllm_batch_decode_with_kv_cache
            from flashinfer.prefill import trtllm_batch_context_with_kv_cache
        except ImportError as error:
            raise ConfigError(
                f"attention_backend 'flashinfer' needs FlashInfer ({error}): pip install flashinfer-python, "
                "or use --attention-backend triton."
            ) from None
        self._decode = trtllm_batch_decode_with_kv_cache
        blackwell = task.capability[0] == 10
        self._prefill = trtllm_batch_context_with_kv_cache if blackwell else None
        self.division = "all steps" if blackwell else "decoding; steps with prompts by Quire's own"
        self._own = PagedAttention(kernels)
        # Zeros: the kernels count finished parts of a sequence in it, and reset the counts.
        self._workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=kernels.device)

    def forward(
        self,
        q: torch.Tensor,
        *,
        layer: AttentionLayer,
        cache: LayerCache,
        metadata: AttentionMetadata,
        out: torch.Tensor,
    ) -> torch.Tensor:
        # As many tokens as requests, padding included: row i of q belongs to request i.
        decoding = metadata.max_query_len == 1 and q.shape[0] == metadata.seq_lens.shape[0]
        if not decoding and self._prefill is None:
            return self._own.forward(q, layer=layer, cache=cache, metadata=metadata, out=out)
        # An upper bound for all steps, since a graph is replayed when sequences have grown. And one that
        # never changes: the package's results depend on it (its issue 4647).
        longest = metadata.block_table.shape[1] * cache.k.shape[2]
        window_left = layer.window - 1 if layer.window else -1
        if decoding:
            self._decode(
                q.contiguous(),  # XQA needs dense rows
                (cache.k, cache.v),
                self._workspace,
                metadata.block_table,
                metadata.seq_lens,
                longest,
                bmm1_scale=layer.scale,
                bmm2_scale=1.0,
                window_left=window_left,
                out=out,
                kv_layout="HND",
            )
            return out
        assert self._prefill is not None
        key_start_loc = F.pad(metadata.seq_lens.cumsum(0, dtype=torch.int32), (1, 0))
        self._prefill(
            q.contiguous(),
            (cache.k, cache.v),
            self._workspace,
            metadata.block_table,
            metadata.seq_lens,
            metadata.max_query_len or q.shape[0],
            longest,
            bmm1_scale=layer.scale,
            bmm2_scale=1.0,
            batch_size=metadata.seq_lens.shape[0],
            cum_seq_lens_q=metadata.query_start_loc,
            cum_seq_lens_kv=key_start_loc,
            window_left=window_left,
            out=out,
            kv_layout="HND",
        )
        return out
