"""The decoder layers' kernel calls, recorded once and made again by one call a step.

Between its kernels a step spends a tenth of a millisecond a layer in Python: modules, views, and
arguments that are the same each time. Nothing is known here of an architecture. The model's own
layers are run twice over tensors without meaning, with kernels that only note their arguments. What
is alike in both runs stays, what grows with the rows grows with them, and pointers lead to buffers
of ours or to the model's weights. A layer that does anything else than call kernels, look at
tensors in another shape and add two of them is not recorded, and everything runs as before.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qlora_serve.serve.engine.attention import NativeSpans, Span, StepContext
from qlora_serve.serve.engine.fused import engine_computes
from qlora_serve.serve.engine.host_memory import Arena
from qlora_serve.serve.engine.kernels.native import Kernels
from qlora_serve.serve.engine.lora import AdapterLinear
from qlora_serve.serve.engine.recording import (
    NotRecordableError,
    Recorded,
    Watch,
    goes_on,
    layer_inputs,
)

log = logging.getLogger(__name__)

MOST_ROWS = 256
"""Steps of more rows are not replayed: their kernels take far longer than Python."""

_KINDS = ("linear", "linear_panels", "linear_coded", "rms_norm", "silu_product", "rotate",
          "attention", "add")  # fmt: skip
# Where a linear kernel is told of adapters: their groups, and how many.
_UPDATES = {"linear": (7, 8), "linear_panels": (7, 8), "linear_coded": (14, 15)}
_SPANS, _SPAN_COUNT = 15, 16  # the same for attention
_CALL = np.dtype([("kind", np.int64), ("a", np.int64, 17), ("f", np.float32, 2)])  # replay.cpp


class _Layers(nn.ModuleList):
    """A model's layers, of which it is given the first alone while that replays all of them."""

    def __init__(self, layers: Iterable[nn.Module], is_active: Callable[[], bool]) -> None:
        super().__init__(layers)
        self._is_active = is_active

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self[:])

    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, slice):
            return super().__getitem__(index)
        chosen = range(len(self))[index]  # models go over a part, as a rule all
        return [self[number] for number in chosen if number == 0 or not self._is_active()]


class LayerReplay:
    """Makes the calls of a model's decoder layers.

    Args:
        model: whose layers are recorded; they are wrapped, and do what they did until `begin`.
        context: of its layers. The cache must be there.
        rows: the most rows of a step.

    Raises:
        NotRecordableError: the layers cannot be replayed.
    """

    def __init__(self, model: Any, context: StepContext, rows: int) -> None:
        assert context.kernels is not None
        self._context, self._kernels = context, context.kernels
        self._rows = rows
        self._decoder = model.get_decoder()
        self._list = getattr(self._decoder, "layers", None)
        if type(self._list) is not nn.ModuleList or not len(self._list):
            raise NotRecordableError("no list of layers")
        self._layers = list(self._list)
        self._forwards = [layer.forward for layer in self._layers]
        self._is_active = False
        self._recording: Recorded | None = None
        self._ready: Any = None
        self._ready_rows = 0
        self._model = model
        self.steps = 0
        """Steps that were replayed."""
        self._decoder.layers = _Layers(self._layers, lambda: self._is_active)
        for number, layer in enumerate(self._layers):
            layer.forward = self._wrapped(number)
        try:
            self._compile([self._record(count) for count in (2, 3)], (2, 3))
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Leaves the model as it was."""
        self._decoder.layers = self._list
        for layer in self._layers:
            layer.__dict__.pop("forward", None)

    @contextmanager
    def step(self, rows: int, residents: Sequence[Any]) -> Any:
        """Within it, the model's forward replays its layers, if it can for this step.

        Args:
            rows: of the step.
            residents: the adapters that its rows have.
        """
        can = rows <= self._rows and all(one.is_plain and not one.own for one in residents)
        self._is_active = can
        self.steps += can
        try:
            yield
        finally:
            self._is_active = False

    # --- recording

    def _wrapped(self, number: int) -> Callable[..., Any]:
        original = self._forwards[number]
        is_first, is_last = number == 0, number == len(self._layers) - 1

        def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self._is_active:
                return self._replay(layer_inputs(hidden, args, kwargs)) if is_first else hidden
            recorded = self._recording
            if recorded is None:
                return original(hidden, *args, **kwargs)
            given = layer_inputs(hidden, args, kwargs)
            if is_first:
                recorded.storages += given
                recorded.inputs, recorded.is_inside = len(given), True
            elif not goes_on(recorded, given):
                raise NotRecordableError("something happens between two layers")
            with Watch(recorded):
                output = original(hidden, *args, **kwargs)
            if not isinstance(output, Tensor) or not output.is_contiguous():
                raise NotRecordableError("a layer's output is not one tensor")
            recorded.output, recorded.is_inside = output, not is_last
            return output

        return forward

    @torch.inference_mode()
    def _record(self, rows: int) -> Recorded:
        """Runs the model over `rows` tokens without computing anything in its layers."""
        recorded = self._recording = Recorded()
        context, held = self._context, self._context.native_spans
        assert context.cache is not None
        groups = len(set(context.cache.group.values()))
        spans = [Span(row, row + 1, 0, [[0]] * groups) for row in range(rows)]
        context.native_spans = NativeSpans(spans, groups)
        context.adapter_rows, context.adapter_updates = [], None
        context.output_rows, context.output_updates = [], None
        whole = torch.arange(rows)
        try:
            with engine_computes(), self._noting(recorded, context.native_spans, groups):
                self._model(input_ids=whole[None], position_ids=whole[None], use_cache=False)
        finally:
            self._recording, context.native_spans = None, held
        return recorded

    @contextmanager
    def _noting(self, recorded: Recorded, spans: NativeSpans, groups: int) -> Any:
        """Puts functions that only note their arguments in the place of the kernels."""
        tables = {id(spans.group(number)): number for number in range(groups)}
        swapped: list[tuple[Any, str, Any]] = []

        def note(owner: Any, attribute: str, kind: str, index: int | None) -> None:
            kernel = getattr(owner, attribute)

            def noted(*args: Any) -> None:
                if not recorded.is_inside:
                    kernel(*args)
                    return
                own = index
                if kind == "attention":
                    own, args = tables[id(args[-2])], (*args[:-2], 0, args[-1])
                pairs = list(zip(args, kernel.argtypes, strict=True))
                integers = [int(arg or 0) for arg, form in pairs if form not in Kernels.FLOATS]
                floats = [float(arg) for arg, form in pairs if form in Kernels.FLOATS]
                recorded.calls.append((kind, own, integers, floats))

            swapped.append((owner, attribute, kernel))
            setattr(owner, attribute, noted)

        for name in ("silu_product", "rotate", "attention"):
            note(self._kernels, name, name, None)
        names = {id(getattr(self._kernels, kind)): kind for kind in (*_UPDATES, "rms_norm")}
        indices = {
            id(module.base): module.index
            for module in self._model.modules()
            if isinstance(module, AdapterLinear)
        }
        for module in self._model.modules():
            kernel = getattr(module, "_kernel", None)
            if kernel is not None:
                note(module, "_kernel", names[id(kernel)], indices.get(id(module)))
        try:
            yield
        finally:
            for owner, attribute, kernel in swapped:
                setattr(owner, attribute, kernel)

    # --- from two recordings to one that holds for any number of rows

    def _compile(self, runs: list[Recorded], rows: tuple[int, int]) -> None:
        one, two = runs
        one.sort()
        two.sort()
        shapes = [[call[:2] + call[3:] for call in run.calls] for run in runs]
        if str(shapes[0]) != str(shapes[1]) or len(one.storages) != len(two.storages):
            raise NotRecordableError("two runs made different calls")
        pairs = list(zip(one.calls, two.calls, strict=True))
        count = len(pairs)
        self._calls = np.zeros(count, dtype=_CALL)
        self._per_row = np.zeros((count, 17), dtype=np.int64)
        pointers: list[tuple[int, int, int, int]] = []  # call, argument, storage, offset
        for number, (call, other) in enumerate(pairs):
            kind, _, integers, floats = call
            self._calls[number]["kind"] = _KINDS.index(kind)
            self._calls[number]["f"][: len(floats)] = floats
            for at, (value, again) in enumerate(zip(integers, other[2], strict=True)):
                place = one.place(value)
                if place is not None:
                    if two.place(again) != place:
                        raise NotRecordableError(f"a pointer of {kind} moves with the rows")
                    pointers.append((number, at, *place))
                elif value == again:
                    self._calls[number]["a"][at] = value
                elif value * rows[1] == again * rows[0]:
                    self._per_row[number, at] = value // rows[0]
                else:
                    raise NotRecordableError(f"argument {at} of {kind} is neither fixed nor by row")
        assert one.output is not None
        final = one.place(one.output.data_ptr())
        if final is None or final[1] != 0:
            raise NotRecordableError("the layers' output is not their own")
        self._lay_out(one, rows[0], pointers, final[0])
        self._find_moving(one.calls)

    def _lay_out(
        self, run: Recorded, rows: int, pointers: list[tuple[int, int, int, int]], final: int
    ) -> None:
        """Gives each storage a buffer; one that nobody reads any more serves the next."""
        last = {storage: call for call, _, storage, _ in pointers}  # calls come in order
        last[final] = len(self._calls)
        inputs = range(run.inputs)
        arena = Arena(1 << 20)
        free: list[Tensor] = []
        held: dict[int, Tensor] = {}
        by_call: dict[int, list[tuple[int, int, int]]] = {}
        for call, at, storage, offset in pointers:
            by_call.setdefault(call, []).append((at, storage, offset))

        def size_of(storage: int) -> int:
            size, rest = divmod(run.storages[storage].untyped_storage().nbytes(), rows)
            if rest:
                raise NotRecordableError("a buffer does not grow with the rows")
            return size * self._rows

        def as_rows(storage: int) -> Tensor:
            used = held[storage][: size_of(storage)]  # of a buffer that may be larger
            return used.view(torch.float32).view(self._rows, -1)

        def hold(storage: int) -> None:
            size = size_of(storage)
            fitting = [one for one in free if one.numel() >= size]
            if fitting:
                chosen = min(fitting, key=Tensor.numel)
                free[:] = [one for one in free if one is not chosen]
            else:
                chosen = arena.empty(size, dtype=torch.uint8)
            held[storage] = chosen

        for storage in inputs:
            hold(storage)
        for call in range(len(self._calls)):
            own = by_call.get(call, [])
            for at, storage, offset in own:
                if storage not in held:
                    hold(storage)
                self._calls[call]["a"][at] = held[storage].data_ptr() + offset
            done = {s for _, s, _ in own if last[s] == call and s not in inputs and s != final}
            free += [held[storage] for storage in done]
        self._buffers = list(held.values())  # what the calls point into
        self._inputs = [as_rows(number) for number in inputs]
        self._output = as_rows(final)

    def _find_moving(self, calls: Sequence[tuple[str, int | None, list[int], list[float]]]) -> None:
        """Which arguments are set anew in each step."""
        linear = [(n, _UPDATES[kind], own) for n, (kind, own, *_) in enumerate(calls)
                  if kind in _UPDATES]  # fmt: skip
        if any(own is None for *_, own in linear):
            raise NotRecordableError("a linear layer without a place for adapters")
        self._linear = np.array([n for n, *_ in linear])
        self._linear_at = np.array([at for _, at, _ in linear]).T
        self._linear_index = np.array([own for *_, own in linear])
        attention = [(n, own) for n, (kind, own, *_) in enumerate(calls) if kind == "attention"]
        self._attention = np.array([n for n, _ in attention])
        self._attention_group = np.array([group for _, group in attention])

    # --- replaying

    def _replay(self, given: list[Tensor]) -> Tensor:
        """The layers' inputs → the last one's output, [1, rows, width]"""
        rows = given[0].shape[1]
        for kept, new in zip(self._inputs, given, strict=True):
            kept[:rows] = new[0]
        arguments = self._calls_for(rows)["a"]
        updates, spans = self._context.adapter_updates, self._context.native_spans
        assert spans is not None
        groups, count = self._linear_at
        if updates is None:
            arguments[self._linear, self._linear_at] = 0
        else:
            arguments[self._linear, groups] = updates.groups + self._linear_index * updates.stride
            arguments[self._linear, count] = updates.count
        arguments[self._attention, _SPANS] = np.array(spans.addresses)[self._attention_group]
        arguments[self._attention, _SPAN_COUNT] = spans.count
        self._kernels.replay(self._ready.ctypes.data, len(self._ready))
        return self._output[None, :rows].clone()

    def _calls_for(self, rows: int) -> Any:
        """The calls for a number of rows, which seldom changes from one step to the next."""
        if rows != self._ready_rows:
            self._ready, self._ready_rows = self._calls.copy(), rows
            self._ready["a"] += self._per_row * rows
        return self._ready


def record(
    model: Any, context: StepContext, rows: int, logits: Callable[[Tensor, Tensor], Tensor]
) -> LayerReplay | None:
    """A model's layers as a replay; None where they cannot be, or would not give the same bits.

    Args:
        model: whose layers are recorded.
        context: of its layers, with a cache that holds nothing yet.
        rows: the most rows of a step.
        logits: the model's own forward, from ids and positions [1, rows].
    """
    try:
        replay = LayerReplay(model, context, rows)
    except NotRecordableError as error:
        log.debug("layers are not replayed: %s", error)
        return None
    spans = [Span(0, 3, 0, [[0]] * len(set(context.cache.group.values())))]  # type: ignore[union-attr]
    context.spans, context.native_spans = spans, NativeSpans(spans, len(spans[0].blocks))
    ids = torch.arange(3)[None]
    expected = logits(ids, ids)
    with replay.step(3, ()):
        found = logits(ids, ids)
    replay.steps = 0
    if not torch.equal(found, expected):
        log.warning("the replayed layers differ from the model's own, which are used instead")
        replay.remove()
        return None
    return replay
