"""The only place where a step becomes tensors: chunks in, one sampled token a chunk out."""

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from qlora_serve.base.load import LoadedBase
from qlora_serve.base.skeleton import build_skeleton
from qlora_serve.errors import RequestError
from qlora_serve.serve.engine.attention import KvCache, NativeSpans, Span, StepContext, attach
from qlora_serve.serve.engine.embedding import tokens_of
from qlora_serve.serve.engine.flash import (
    PAGE_TOKENS,
    CudaPaths,
    FlashCache,
    FlashFunctions,
    FlashStep,
    choose_flash,
)
from qlora_serve.serve.engine.fused import engine_computes, use_fused
from qlora_serve.serve.engine.graphs import Capture, DecodeGraphs, GraphSlots, capture_cuda
from qlora_serve.serve.engine.host_memory import Arena, own_memory
from qlora_serve.serve.engine.int8 import use_rows_of_int8
from qlora_serve.serve.engine.kernels.native import load_kernels
from qlora_serve.serve.engine.linear import NativeLinear, use_fast_linears
from qlora_serve.serve.engine.lora import (
    AdapterLayers,
    linear_names,
    rows_by_adapter,
)
from qlora_serve.serve.engine.replay import MOST_ROWS, LayerReplay, record
from qlora_serve.serve.engine.request import Sequence
from qlora_serve.serve.engine.sampler import sample
from qlora_serve.serve.engine.scheduler import BLOCK_TOKENS, Chunk, Limits, Step
from qlora_serve.serve.engine.scoring import Scoring
from qlora_serve.serve.engine.updates import UpdatesInTurn


class Runner:
    """Runs the transformers model's own forward over a mixed batch.

    Args:
        base: the model.
        cuda_paths: whether flash-attn and CUDA graphs are used: where they can be, always, never.
        flash: takes the place of flash-attn's functions, wherever the model is.
        capture: makes graphs of decoding steps, where flash-attn attends; None for none.
        arena: the memory for weights that are laid out anew.

    Raises:
        ConfigError: `cuda_paths` is on, and flash-attn cannot be used.
    """

    def __init__(
        self,
        base: LoadedBase,
        cuda_paths: CudaPaths = "auto",
        flash: FlashFunctions | None = None,
        capture: Capture | None = None,
        arena: Arena | None = None,
    ) -> None:
        self.base = base
        self._context, self._device = StepContext(), base.device
        self._updates, self._output_updates = UpdatesInTurn(), UpdatesInTurn()
        names = linear_names(build_skeleton(base.source))
        if base.dtype == "float32" and base.device.type == "cpu":
            self._context.kernels = load_kernels()
        arena = arena or Arena()
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
        self.replay: LayerReplay | None = None
        """Of the layers' kernel calls, where they can be recorded."""
        self._flash, self.attention = flash, "flash-attn"
        self._capture = capture
        self.graphs: DecodeGraphs | None = None
        """Of decoding steps, where there are any."""
        if flash is None:
            self._flash, self.attention = choose_flash(cuda_paths, self._context.shapes)
            # The layers of an int8 base ask the device for numbers on the way.
            if self._flash is not None and base.quantization != "int8":
                self._capture = capture_cuda
        self._vocabulary = tokens_of(base.model.get_output_embeddings())

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

    @property
    def block_tokens(self) -> int:
        """Tokens of a block of the cache."""
        return BLOCK_TOKENS if self._flash is None else PAGE_TOKENS

    def release_threads(self) -> None:
        """Ends the calling thread's team of OpenMP threads, so that the engine's is the only one.

        To be called by a thread that has computed something, when it is done.
        """
        if self._context.kernels is not None:
            self._context.kernels.release_threads()

    def begin_steps(self) -> None:
        """To be called by the thread that will run steps, before the first."""
        kernels = self._context.kernels
        linears = [m for m in self.base.model.modules() if isinstance(m, nn.Linear)]
        if kernels is not None and not linears:
            # All that takes long is the kernels', which have threads of their own. torch's would
            # spin on the same cores for milliseconds after each of its small operators.
            _settle_threads()
            kernels.torch_alone()

    def compute_alone(self) -> None:
        """Lets the calling thread compute without helpers from now on, beside the engine's.

        A team of its own would slow each of the engine's steps, see `begin_steps`.
        """
        if self._context.kernels is not None:
            _settle_threads()
            self._context.kernels.compute_alone()

    def allocate(self, limits: Limits) -> Limits:
        """Makes room for keys and values; returns the limits with this model's windows."""
        limits = replace(limits, windows=self.windows, block_tokens=self.block_tokens)
        blocks = [group.blocks for group in limits.groups]
        kind = KvCache if self._flash is None else FlashCache
        self._context.cache = kind(self._context.shapes, self.windows, blocks)
        if self._context.kernels is not None and self._flash is None:
            if self.replay is not None:
                self.replay.remove()
            self.replay = self._record(min(limits.step_tokens, MOST_ROWS))
        if self._flash is not None and self._capture is not None:
            device = self._device
            slots = GraphSlots(self.layers.shapes, limits.max_sequences, self._dtype, device)
            self.graphs = DecodeGraphs(
                self._logits, self._context, limits, slots, self._flash.with_cache, self._capture
            )
        return limits

    @torch.inference_mode()
    def _record(self, rows: int) -> LayerReplay | None:
        every = torch.arange(3)
        return record(
            self.base.model, self._context, rows, lambda ids, at: self._logits(ids, at, every)
        )

    @torch.inference_mode()
    def _find_shapes(self) -> None:
        """Runs one token through the model, so that each layer shows what attention it wants."""
        one = torch.zeros(1, 1, dtype=torch.long, device=self._device)
        self.base.model(input_ids=one, position_ids=one, use_cache=False)

    def resident(self, name: str, weights: Any) -> Any:
        """See `AdapterLayers.make_resident`; not for the engine's own thread."""
        device = self._device
        if device.type == "cuda":
            # Copies in a stream of their own run beside decoding; whole before anyone reads them.
            stream = torch.cuda.Stream(device)
            with torch.cuda.stream(stream):
                resident = self.layers.make_resident(name, weights, self._dtype, device)
            stream.synchronize()
            return resident
        self.compute_alone()
        return self.layers.make_resident(name, weights, self._dtype, device)

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
        samplers = [chunk.sequence.sampler for chunk in sampling]
        tokens = sample(logits, samplers, self._context.kernels)
        chosen = [(chunk.sequence, token) for chunk, token in zip(sampling, tokens, strict=True)]
        return [*faulty, *chosen]

    @property
    def cache(self) -> KvCache | FlashCache:
        """The keys and values."""
        assert self._context.cache is not None, "allocate() comes first"
        return self._context.cache

    @torch.inference_mode()
    def forward(self, chunks: list[Chunk]) -> Tensor:
        """Logits [sampling chunks, vocabulary] at the last token of each chunk that samples.

        Chunks that are scored leave what was found in their requests' `score`.
        """
        if self.graphs is not None and (found := self.graphs.run(chunks)) is not None:
            return found
        context, device = self._context, self._device
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
        if self._flash is not None:
            context.flash = FlashStep(spans, len(self.windows), device, self._flash)
        elif context.kernels is not None:
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
            context.adapter_updates = self._updates.of(context.adapter_rows)
            context.output_updates = self._output_updates.of(context.output_rows)
        residents = [adapter.resident for *_, adapter in context.adapter_rows]
        with self.replay.step(len(ids), residents) if self.replay else nullcontext():
            logits = self._logits(
                torch.tensor([ids], device=device),
                torch.tensor([positions], device=device),
                torch.tensor(kept, dtype=torch.long, device=device),
            )
        if self._scoring.is_needed:
            logits = self._scoring.finish(chunks, logits, self._vocabulary)
        if logits.shape[-1] > self._vocabulary:
            # Only now: some families bend all logits into a range (softcapping) as the last thing.
            for row, chunk in enumerate(chunk for chunk in chunks if chunk.samples):
                known = self.vocabulary(chunk.sequence.request.adapter)
                logits[row, known:] = torch.finfo(logits.dtype).min
        return logits

    def _logits(self, ids: Tensor, positions: Tensor, kept: Tensor) -> Tensor:
        """The model's own forward: [1, tokens] ids and positions → logits of the rows to keep."""
        with engine_computes():
            output = self.base.model(
                input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=kept
            )
        logits: Tensor = output.logits[0]
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


def _settle_threads() -> None:
    """Lets torch choose the number of this thread's helpers, which it does once, when asked first.

    Later it would undo what was set before.
    """
    torch.get_num_threads()


def _adapter_order(chunk: Chunk) -> tuple[tuple[str, float], ...]:
    adapter = chunk.sequence.request.adapter
    return () if adapter is None else adapter.key
