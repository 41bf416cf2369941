"""Reading a `quantization_config` strictly: a field is understood, known to change nothing, or an error."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TypeVar, cast

from quire.errors import UnsupportedModelError

T = TypeVar("T")

HARMLESS = frozenset(
    # Which tool made the file, and how: of AutoGPTQ, GPTQModel, AutoAWQ, AutoRound, compressed-tensors.
    "quant_method method meta provider version autoround_version quantizer model_name_or_path "
    "model_file_base_name damp_percent damp_auto_increment true_sequential static_groups act_group_aware "
    "mse dataset nsamples seqlen batch_size iters lr minmax_lr scale_dtype low_gpu_mem_usage amp "
    "enable_quanted_input enable_minmax_tuning enable_norm_bias_tuning enable_alg_ext super_bits "
    "super_group_size gradient_accumulate_steps dynamic_max_gap not_use_best_mse data_type "
    "to_quant_block_names block_name_to_quantize module_name_preceding_first_block cache_block_outputs "
    "model_seqlen pad_token_id tokenizer max_input_length offload_to_disk pack_impl pack_dtype "
    "quantization_status global_compression_ratio observer observer_kwargs producer "
    # How another engine multiplies.
    "backend exllama_config use_exllama disable_exllama use_cuda_fp16 do_fuse fuse_max_seq_len "
    "modules_to_fuse is_marlin_format dequantize run_compressed act_bits act_data_type act_dynamic "
    "act_group_size act_sym activation_scale_ub".split()
)


class Fields:
    """Typed access to a mapping. A null field counts as absent."""

    def __init__(
        self, config: Mapping[str, object], *, prefix: str = "quantization_config."
    ) -> None:
        self._config = config
        self._prefix = prefix
        self._read: set[str] = set()

    def raw(self, *names: str) -> object:
        """The first of the fields that is there."""
        self._read.update(names)
        return next((v for n in names if (v := self._config.get(n)) is not None), None)

    def get(self, kind: type[T], *names: str, default: T | None = None) -> T:
        """Raises `UnsupportedModelError` if it is of another type, or absent and there is no default."""
        value = self.raw(*names)
        if value is None:
            if default is None:
                raise self._missing(names[0])
            return default
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise self.bad(names[0], f"it must be of type {kind.__name__}", value=value)
        return value

    def names(self, *names: str) -> tuple[str, ...]:
        items = self.get(list, *names, default=[])
        if not all(isinstance(item, str) for item in items):
            raise self.bad(names[0], "it must be a list of names", value=items)
        return tuple(items)

    def group_size(self, *names: str, default: int | None = None) -> int:
        """As `CodeFormat.group`: 0 for -1, one group for all inputs."""
        size = self.get(int, *names, default=default)
        if size == -1:
            return 0
        if size <= 0 or size % 8:
            raise self.bad(
                names[0],
                "a group must have a multiple of 8 inputs; quantize the model with such a size",
            )
        return size

    def choice(self, allowed: Collection[T], *names: str, default: T | None = None) -> T:
        value = self.raw(*names)
        if value is None and default is None:
            raise self._missing(names[0])
        value = default if value is None else value
        if value not in allowed or isinstance(value, bool):
            known = ", ".join(map(str, allowed))
            raise self.bad(names[0], f"it must be one of {known}; use a checkpoint of that kind")
        return cast(T, value)

    def _missing(self, name: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"config.json: {self._prefix}{name} is missing; the download is incomplete, or another "
            "tool wrote the file"
        )

    def bad(self, name: str, rule: str, *, value: object = None) -> UnsupportedModelError:
        shown = repr(self._config.get(name) if value is None else value)
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        return UnsupportedModelError(f"config.json: {self._prefix}{name} is {shown}, but {rule}")

    def finish(self) -> None:
        """Reject what was not read, unless it is off or known to change nothing."""
        for name, value in self._config.items():
            if name in self._read or name in HARMLESS or name == "tensors" or not value:
                continue
            raise self.bad(
                name,
                "Quire does not know this field and will not guess what it changes; if it changes "
                "nothing, remove it from the file",
            )
