"""The only place where a step becomes tensors: chunks in, one sampled token a chunk out."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from qlora_serve.base.load import LoadedBase
from qlora_serve.base.skeleton import build_skeleton
from qlora_serve.errors import RequestError
from qlora_serve.serve.engine.attention import KvCache, NativeSpans, Span, StepContext, attach
from qlora_serve.serve.engine.fused import engine_computes, use_fused
from qlora_serve.serve.engine.host_memory import Arena, own_memory
from qlora_serve.serve.engine.int8 import use_rows_of_int8
from qlora_serve.serve.engine.kernels.native import load_kernels
from qlora_serve.serve.engine.linear import NativeLinear, use_fast_linears
from qlora_serve.serve.engine.lora import (
    AdapterLayers,
    linear_names,
    native_updates,
    rows_by_adapter,
)
from qlora_serve.serve.engine.request import Sequence
from qlora_serve.serve.engine.sampler import sample
from qlora_serve.serve.engine.scheduler import Chunk, Limits, Step
from qlora_serve.serve.engine.scoring import Scoring


class Runner:
    """Runs the transformers model's own forward over a mixed batch."""

    def __init__(self, base: LoadedBase) -> None:
        self.base = base
        self._context = StepContext()
        names = linear_names(build_skeleton(base.source))
        if base.dtype == "float32" and base.device.type == "cpu":
            self._context.kernels = load_kernels()
        arena = Arena()
        if self._context.kernels is not None:
            use_fast_linears(base.model, self._context.kernels, arena)
        own_memory(base.model, arena)
        if self._context.kernels is not None:
            use_fused(base.model, self._context.kernels)
        use_rows_of_int8(base.model)
        self.layers = AdapterLayers(base.model, names, self._context)
        attach(base.model, self._context)
        self._scoring = Scoring(base.model.get_decoder())
        self._dtype = getattr(torch, base.dtype)
        self.item_bytes = self._dtype.itemsize
        """Bytes of a number in the dtype that is computed in."""
        self._find_shapes()
        self._vocabulary = int(base.model.get_output_embeddings().weight.shape[0])

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The sliding windows of the layers, each once; None for layers that see everything."""
        return tuple(dict.fromkeys(shape.window for shape in self._context.shapes.values()))

    def token_bytes(self, window: int | None) -> int:
        """Bytes of one token's keys and values in all layers of one window."""
        shapes = self._context.shapes.values()
        return sum(shape.token_bytes for shape in shapes if shape.window == window)

    @property
    def even_context(self) -> int:
        """Tokens of context at which attention takes as many products as the linear layers."""
        linear = sum(
            module.in_features * module.out_features
            for module in self.base.model.modules()
            if isinstance(module, nn.Linear | NativeLinear)
        )
        config = self.base.model.config.get_text_config()
        heads = config.num_attention_heads
        attention = sum(2 * heads * shape.head_dim for shape in self._context.shapes.values())
        return max(1, int(linear) // attention)

    def release_threads(self) -> None:
        """Ends the calling thread's team of OpenMP threads, so that the engine's is the only one.

        To be called by a thread that has computed something, when it is done.
        """
        if self._context.kernels is not None:
            self._context.kernels.release_threads()

    def allocate(self, limits: Limits) -> Limits:
        """Makes room for keys and values; returns the limits with this model's windows."""
        limits = replace(limits, windows=self.windows)
        blocks = [group.blocks for group in limits.groups]
        self._context.cache = KvCache(self._context.shapes, self.windows, blocks)
        return limits

    @torch.inference_mode()
    def _find_shapes(self) -> None:
        """Runs one token through the model, so that each layer shows what attention it wants."""
        one = torch.zeros(1, 1, dtype=torch.long, device=self.base.device)
        self.base.model(input_ids=one, position_ids=one, use_cache=False)

    def resident(self, name: str, weights: Any) -> Any:
        """See `AdapterLayers.make_resident`; not for the engine's own thread."""
        try:
            return self.layers.make_resident(name, weights, self._dtype, self.base.device)
        finally:
            self.release_threads()

    @torch.inference_mode()
    def run(self, step: Step) -> list[tuple[Sequence, int | None]]:
        """Computes a step; returns the next token of each sequence that reached its end.

        A token of None means that none could be chosen; the row's sampler says why.
        """
        self.cache.copy(step.copies)
        ordered = sorted(step.chunks, key=_adapter_order)  # an adapter's rows lie side by side
        logits = self.forward(ordered)
        faulty = [(c.sequence, None) for c in ordered if c.sequence in self._scoring.faulty]
        sampling = [chunk for chunk in ordered if chunk.samples]
        if not sampling:
            return [*faulty]
        tokens = sample(logits, [chunk.sequence.sampler for chunk in sampling])
        chosen = [(chunk.sequence, token) for chunk, token in zip(sampling, tokens, strict=True)]
        return [*faulty, *chosen]

    @property
    def cache(self) -> KvCache:
        """The keys and values."""
        assert self._context.cache is not None, "allocate() comes first"
        return self._context.cache

    @torch.inference_mode()
    def forward(self, chunks: list[Chunk]) -> Tensor:
        """Logits [sampling chunks, vocabulary] at the last token of each chunk that samples.

        Chunks that are scored leave what was found in their requests' `score`.
        """
        context, device = self._context, self.base.device
        ids: list[int] = []
        positions: list[int] = []
        spans: list[Span] = []
        for chunk in chunks:
            first = len(ids)
            ids += chunk.sequence.tokens(chunk.start, chunk.count)
            positions += range(chunk.start, chunk.start + chunk.count)
            spans.append(Span(first, len(ids), chunk.start, chunk.sequence.blocks.blocks))
        kept = [
            row
            for span, chunk in zip(spans, chunks, strict=True)
            for row in range(span.last - chunk.outputs, span.last)
        ]
        guests = self._scoring.begin(chunks, [span.last for span in spans])
        kept += range(len(ids), len(ids) + guests)
        context.spans = spans
        if context.kernels is not None:
            context.native_spans = NativeSpans(spans, len(self.windows))
        context.adapter_rows = rows_by_adapter(
            [(c.count, c.sequence.request.adapter) for c in chunks]
        )
        context.output_rows = rows_by_adapter(
            [
                *((c.outputs, c.sequence.request.adapter) for c in chunks if c.outputs),
                (guests, None),
            ]
        )
        if context.kernels is not None:
            context.adapter_updates = native_updates(context.adapter_rows)
            context.output_updates = native_updates(context.output_rows)
        with engine_computes():
            output = self.base.model(
                input_ids=torch.tensor([ids], device=device),
                position_ids=torch.tensor([positions], device=device),
                use_cache=False,
                logits_to_keep=torch.tensor(kept, dtype=torch.long, device=device),
            )
        logits: Tensor = output.logits[0]
        if self._scoring.is_needed:
            logits = self._scoring.finish(chunks, logits, self._vocabulary)
        if logits.shape[-1] > self._vocabulary:
            # Only now: some families bend all logits into a range (softcapping) as the last thing.
            for row, chunk in enumerate(chunk for chunk in chunks if chunk.samples):
                known = self.vocabulary(chunk.sequence.request.adapter)
                logits[row, known:] = torch.finfo(logits.dtype).min
        return logits

    def check_comparable(self, adapter: Any) -> None:
        """Refuses to compare distributions over different vocabularies.

        Raises:
            RequestError: the adapter knows tokens that the base does not.
        """
        known = self.vocabulary(adapter)
        if known != self._vocabulary:
            raise RequestError(
                f"the adapter knows {known} tokens and the base {self._vocabulary}: there is no "
                "divergence between their distributions",
                param="divergence",
            )

    def vocabulary(self, adapter: Any) -> int:
        """How many tokens a request with this adapter, or with the base, may use."""
        own = None if adapter is None else adapter.vocabulary
        return self._vocabulary if own is None else own


def _adapter_order(chunk: Chunk) -> tuple[tuple[str, float], ...]:
    adapter = chunk.sequence.request.adapter
    return () if adapter is None else adapter.key
