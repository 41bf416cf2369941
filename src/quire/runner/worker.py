"""One device's share of the engine: the model, its KV cache, and the runner over both."""

from __future__ import annotations

from collections.abc import Callable

import torch

from quire.attention.base import KVCache
from quire.config import EngineConfig
from quire.kernels.group import Channels, Group
from quire.kvtransfer.base import KVMemory
from quire.kvtransfer.fingerprint import Fingerprint
from quire.kvtransfer.mover import Mover
from quire.layers.kv_scales import give_scales
from quire.messages import StepPlan
from quire.models.decoder import DecoderModel
from quire.models.loader import load_model
from quire.runner.adapters import AdapterTable
from quire.runner.finished import FinishedStep
from quire.runner.footprint import Footprint, WorkerSpec
from quire.runner.kv_memory import open_memory
from quire.runner.platform import Platform
from quire.runner.runner import Runner, RunningStep
from quire.sampling.sampler import GrammarSource
from quire.speculative.base import DraftContext, Drafter
from quire.weights.source import open_source

CreateDrafter = Callable[[DecoderModel], Drafter]
CreateStore = Callable[[KVMemory], Mover]


class Worker:
    """The methods of an `Executor` for one device; see their docstrings there."""

    def __init__(
        self,
        config: EngineConfig,
        spec: WorkerSpec,
        *,
        grammars: GrammarSource | None = None,
        platform: Platform | None = None,
        create_drafter: CreateDrafter | None = None,
        group: Group | None = None,
        channels: Channels | None = None,
        create_store: CreateStore | None = None,
    ) -> None:
        """platform: if None, that of the spec's device. Raises `ConfigError` if it cannot be used. group: of
        the ranks of its stage, if they are several. create_drafter, create_store: called with
        the loaded model and with the open cache, instead of what the configuration says."""
        self._config = config
        self._spec = spec
        self._grammars = grammars
        self._create_drafter, self._make_store = create_drafter, create_store
        self._group, self._channels = group, channels
        self.platform = platform or _create_platform(config, spec)
        self.max_in_flight = self.platform.max_in_flight
        self.watched: int | None = None
        self.runner: Runner | None = None
        self.store: Mover | None = None
        self.adapters: AdapterTable | None = None
        """All None before loading, while asleep and when closed; the last two also if there is no such
        thing."""
        self._cache_size = (0, 0)
        self._kept: DecoderModel | None = None
        self._fingerprint: Fingerprint | None = None
        """Of the loaded weights, once it was needed. Their files may be others by now."""

    def load(self, model: DecoderModel | None = None) -> Footprint:
        """model: one that is loaded already, over the platform's kernels."""
        with self.platform.active():
            self.runner = self._start(model)
            return self.platform.footprint(self.runner.model)

    def open_cache(self, num_blocks: int, max_model_len: int) -> None:
        assert self.runner is not None, "load() first"
        self._cache_size = (num_blocks, max_model_len)
        with self.platform.active():
            cache = self.platform.cache(num_blocks)
            model = self.runner.model
            give_scales(cache, model.kv_scales, model.spec.kv.places())
            self.runner.open_cache(cache, max_model_len)
            self._close_store()
            self.store = self.runner.store = self._create_store(cache)

    def execute(self, plan: StepPlan) -> RunningStep | FinishedStep:
        assert self.runner is not None, "the worker is closed"
        return self.runner.launch(plan)

    def check(self) -> None:
        pass

    def prepare(self) -> bool:
        return self.runner is not None and self.runner.prepare()

    def sleep(self, level: int) -> None:
        assert self.runner is not None, "it sleeps already"
        self._kept = self.runner.model if level < 2 else None
        self._drop_runner()
        self.platform.release()

    def wake_up(self) -> None:
        assert self.runner is None, "it is awake"
        failure = None
        try:
            with self.platform.active():
                self.runner = self._start(self._kept)
            self.open_cache(*self._cache_size)
        except Exception as error:
            failure = error.with_traceback(None)  # its frames hold tensors
            failure.__context__ = None
        if failure is not None:
            self._drop_runner()
            self.platform.release()
            raise failure
        self._kept = None

    def close(self) -> None:
        self._drop_runner()
        self._kept = None

    def _drop_runner(self) -> None:
        if self.adapters is not None:
            self.adapters.close()
        self._close_store()
        self.runner = self.adapters = None

    def _create_store(self, cache: KVCache) -> Mover | None:
        if self._make_store is None and not self._config.moves_kv:
            return None
        spec = self._spec
        memory = open_memory(cache, spec.model.kv, self.platform.device)
        if self._make_store is not None:
            return self._make_store(memory)
        from quire.kvtransfer.create import create_store

        return create_store(
            self._config,
            spec.model,
            self._fingerprint or self._identify(),
            kv_cache_dtype=spec.kv_cache_dtype,
            rank=spec.rank,
            memory=memory,
        )

    def _identify(self) -> Fingerprint:
        from quire.kernels.select import numerics_of
        from quire.kvtransfer.fingerprint import fingerprint_of

        spec = self._spec
        self._fingerprint = fingerprint_of(
            self._config,
            spec.model,
            spec.directory,
            dtype=spec.dtype,
            kv_cache_dtype=spec.kv_cache_dtype,
            numerics=numerics_of(self.platform.kernels),
        )
        return self._fingerprint

    def _close_store(self) -> None:
        if self.store is not None:
            self.store.close()
        self.store = None

    def _start(self, model: DecoderModel | None) -> Runner:
        model = model or self._load_model()
        lora = self._config.lora
        if lora.enable_lora:
            self.adapters = AdapterTable(model, max_rank=lora.max_lora_rank, slots=lora.max_loras)
        runner = Runner(
            model,
            self.platform.backend(model),
            max_num_seqs=self._config.scheduler.max_num_seqs,
            grammars=self._grammars,
            adapters=self.adapters,
            drafter=self._drafter(model),
        )
        if not self._spec.samples:
            model.taps = self._spec.taps
        return runner

    def _drafter(self, model: DecoderModel) -> Drafter | None:
        if self._create_drafter is not None:
            return self._create_drafter(model)
        options = self._config.speculative.speculation
        if options is None or not self._spec.samples:
            return None
        from quire.speculative.create import create_drafter

        return create_drafter(
            DraftContext(
                options=options,
                target=model,
                draft=self._spec.draft,
                load_format=self._config.model.load_format,
                seed=self._config.model.seed,
            )
        )

    def _load_model(self) -> DecoderModel:
        spec, options = self._spec, self._config.model
        self._fingerprint = None
        model: DecoderModel = load_model(
            spec.model,
            open_source(spec.directory),
            dtype=getattr(torch, spec.dtype),
            kernels=self.platform.kernels,
            load_format=options.load_format,  # type: ignore[arg-type]
            attention=self.platform.attention(),
            max_model_len=spec.max_model_len,
            group=self._group,
            channels=self._channels,
            seed=options.seed,
        )
        return model


def _create_platform(config: EngineConfig, spec: WorkerSpec) -> Platform:
    if spec.device == "cuda":
        from quire.runner.gpu import GPU

        return GPU(config, spec)
    from quire.runner.cpu import CPU

    return CPU(config, spec)
