"""The engine: submit a request, receive its events, exactly one of them its ending."""

import logging
import queue
import threading
from typing import Any

from qlora_serve.errors import EngineStoppedError, RequestError
from qlora_serve.serve.engine.request import (
    Deliver,
    Event,
    Failed,
    Finished,
    FinishReason,
    GenerationRequest,
    Sequence,
)
from qlora_serve.serve.engine.runner import Runner
from qlora_serve.serve.engine.sampler import RowSampler
from qlora_serve.serve.engine.scheduler import Chunk, Limits, Scheduler, Step
from qlora_serve.serve.engine.slots import AdapterSlots
from qlora_serve.serve.engine.text import AnswerStream

log = logging.getLogger(__name__)


class _Wake:
    """Put into the inbox to make the engine look again."""


class Engine:
    """Runs requests in one thread of its own.

    `submit` and `abort` may be called from any thread; events are delivered on the engine's. For
    every request that `submit` accepts, `deliver` is called with any number of `Delta`s and then
    exactly once with `Finished` or `Failed`, after which it is never called again.
    """

    def __init__(
        self, runner: Runner, limits: Limits, adapters: AdapterSlots | None = None
    ) -> None:
        self.runner = runner
        self.limits = runner.allocate(limits)
        self._adapters = adapters
        self.scheduler = Scheduler(self.limits, adapters)
        self._stop_ids = runner.base.stop_token_ids
        self._inbox: queue.SimpleQueue[Sequence | str | _Wake | None] = queue.SimpleQueue()
        self._live: dict[str, Sequence] = {}
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._door = threading.Lock()
        self._open = True
        self._is_busy = False
        self.failure: BaseException | None = None
        """What ended the engine's thread, if something did."""

    def start(self) -> None:
        """Starts the engine's thread."""
        self.runner.release_threads()  # of the thread that loaded the base
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread; whatever still runs fails with an error. Returns when it is done."""
        with self._door:
            self._open = False
            self._inbox.put(None)
        if self._thread.is_alive():
            self._thread.join()

    @property
    def is_alive(self) -> bool:
        """Whether requests are being worked on."""
        return self._open and self._thread.is_alive()

    def submit(self, request: GenerationRequest, deliver: Deliver) -> None:
        """Accepts a request, whose events go to `deliver`.

        Raises:
            RequestError: it can never run (too long, empty, or its id is in use).
            EngineStoppedError: the engine takes no more requests.
        """
        reason = self.limits.refusal(len(request.prompt), request.sampling.max_tokens)
        if reason is not None:
            raise RequestError(reason, param="messages")
        known = self.runner.vocabulary(request.adapter)
        if max(request.prompt) >= known:
            raise RequestError(
                f"the prompt holds token {max(request.prompt)}, and the model knows {known}",
                param="messages",
            )
        if request.score is not None and request.score.against is not None:
            self.runner.check_comparable(request.adapter)
        sequence = Sequence(request, deliver)
        with self._door:
            if not self._open:
                raise EngineStoppedError("the server is shutting down")
            if request.request_id in self._live:
                raise RequestError(f"request id {request.request_id!r} is in use")
            self._live[request.request_id] = sequence
            self._inbox.put(sequence)
        adapters, adapter = self._adapters, request.adapter
        # A step may be running, and loading need not wait for its end. Where others wait for a
        # place already, the scheduler asks in turn.
        if adapters is not None and adapter is not None and self.scheduler.waiting == 0:
            adapters.prefetch([adapter])

    def abort(self, request_id: str) -> None:
        """Ends a request early, with `Finished("abort")`; nothing happens if it has ended."""
        self._inbox.put(request_id)

    def wake(self) -> None:
        """Lets the engine look again whether something can run: an adapter has been loaded."""
        self._inbox.put(_Wake())

    def placed(self) -> dict[str | None, bool]:
        """Whose requests are on their way: an adapter's name, None for the base → has one a place?

        May be called from any thread; the answer is of some moment while it is made.
        """
        found: dict[str | None, bool] = {}
        for sequence in list(self._live.values()):
            adapter = sequence.request.adapter
            name = None if adapter is None else str(adapter.name)
            found[name] = found.get(name, False) or sequence.blocks is not None
        return found

    def step(self) -> bool:
        """Schedule, run, record; returns whether there was anything to do."""
        step = self.scheduler.schedule()
        for sequence, reason in step.failed:
            self._end(sequence, Failed(reason, sequence.usage))
        if not step.chunks:
            return bool(step.failed)
        try:
            tokens = self.runner.run(step)
        except Exception as error:  # a fault in one step must not reach the other requests
            self._fail_step(step, error)
        else:
            self._record(step.chunks, tokens)
        return True

    def _run(self) -> None:
        try:
            self.runner.begin_steps()
            while self._take_inbox():
                self._is_busy = self.step()
        except BaseException as error:
            log.exception("the engine ended")
            self.failure = error
        finally:
            self._close()

    def _take_inbox(self) -> bool:
        """Handles what came in; sleeps while nothing can run. False ends the thread."""
        waits = not self._is_busy
        while waits or not self._inbox.empty():
            item = self._inbox.get()
            if item is None:
                return False
            if not isinstance(item, _Wake):
                self._handle(item)
            waits = False
        return True

    def _handle(self, item: Sequence | str) -> None:
        if isinstance(item, str):
            aborted = self._live.get(item)
            if aborted is not None:
                self._finish(aborted, "abort")
            return
        request = item.request
        try:
            tokens = request.tokens or self.runner.base
            item.text = AnswerStream(tokens.tokenizer, request.sampling.stop, request.visible_ids)
            item.sampler = RowSampler(request, self._stops(request))
            self.scheduler.add(item)
        except Exception as error:  # a request that cannot even begin ends alone
            log.exception("request %s could not begin", request.request_id)
            self._end(item, Failed(f"internal error: {error}", item.usage))

    def _stops(self, request: GenerationRequest) -> frozenset[int]:
        own: frozenset[int] | None = request.tokens and request.tokens.stop_token_ids
        return self._stop_ids if own is None else own

    def _record(self, chunks: list[Chunk], tokens: list[tuple[Sequence, int | None]]) -> None:
        for sequence, token in tokens:
            if token is None:
                # Its keys and values may be what is wrong: nobody else shall get them.
                self._end(sequence, Failed(sequence.sampler.fault, sequence.usage), keep=False)
        for chunk in chunks:
            if not chunk.sequence.ended:
                self.scheduler.record(chunk)
                if chunk.completes and chunk.sequence.request.score is not None:
                    self._end(chunk.sequence, Finished("scored", chunk.sequence.usage))
        for sequence, token in tokens:
            if token is None:
                continue
            try:
                self._advance(sequence, token)
            except Exception as error:
                log.exception("request %s failed", sequence.request.request_id)
                self._end(sequence, Failed(f"internal error: {error}", sequence.usage))

    def _advance(self, sequence: Sequence, token: int) -> None:
        """Appends one token to a sequence and ends it when it is complete."""
        sampling = sequence.request.sampling
        sequence.generated.append(token)
        if token in self._stops(sequence.request) and not sampling.ignore_eos:
            self._finish(sequence, "stop")
            return
        may_stop = len(sequence.generated) > sampling.min_tokens
        delta = sequence.text.push(token, sequence.sampler.logprobs, may_stop)
        if delta is not None:
            sequence.deliver(delta)
        if sequence.text.stopped or sequence.sampler.is_complete:
            self._finish(sequence, "stop")
        elif len(sequence.generated) >= sampling.max_tokens:
            self._finish(sequence, "length")

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        if sequence.text is not None and reason != "abort":
            rest = sequence.text.finish()
            if rest is not None:
                sequence.deliver(rest)
            if sequence.text.stopped and reason == "length":
                reason = "stop"  # the held-back text completed a stop text
        self._end(sequence, Finished(reason, sequence.usage))

    def _fail_step(self, step: Step, error: Exception) -> None:
        log.error("a step failed", exc_info=error)
        for chunk in step.chunks:
            ending = Failed(f"internal error: {error}", chunk.sequence.usage)
            self._end(chunk.sequence, ending, keep=False)
        for sequence in step.admitted:  # the blocks that were to be copied for it may be empty
            if not sequence.ended and sequence.blocks is not None:
                self.scheduler.preempt(sequence)

    def _end(self, sequence: Sequence, ending: Event, keep: bool = True) -> None:
        if sequence.ended:
            return
        sequence.ended = True
        self.scheduler.remove(sequence, keep)
        self._live.pop(sequence.request.request_id, None)
        try:
            sequence.deliver(ending)
        except Exception:
            log.exception("the ending of %s was not taken", sequence.request.request_id)

    def _close(self) -> None:
        """Takes no more requests, and fails those that are left."""
        with self._door:
            self._open = False
        while not self._inbox.empty():
            item: Any = self._inbox.get()
            if isinstance(item, Sequence):
                self.scheduler.add(item)
        reason = "the engine broke down" if self.failure else "the server is shutting down"
        for sequence in self.scheduler.sequences():
            self._end(sequence, Failed(reason, sequence.usage))
