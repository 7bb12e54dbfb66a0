"""What the routes share: the engine, the adapters and the tokenizer."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora_serve.adapters.tokens import AdapterTokens
from qlora_serve.base.load import LoadedBase
from qlora_serve.base.tokenizer import encode_text, render_chat
from qlora_serve.errors import BaseModelError, RequestError, UnknownAdapterError
from qlora_serve.serve.engine.engine import Engine
from qlora_serve.serve.engine.registry import AdapterRegistry
from qlora_serve.serve.engine.request import Delta, Event, GenerationRequest
from qlora_serve.serve.engine.slots import AdapterSelection
from qlora_serve.serve.engine.watch import AdapterFolder

BASE_ALIAS = "base"
Wanted = str | Sequence[tuple[str, float]]
"""An adapter's name, or names with weights."""


@dataclass
class Service:
    """One base, its adapters, and the engine that serves them."""

    base: LoadedBase
    engine: Engine
    adapters: AdapterRegistry
    folder: AdapterFolder | None = None
    """`--adapters-dir`."""
    roots: tuple[Path, ...] = ()
    """Where else adapters may be loaded from at run time; resolved."""
    poll_seconds: float = 0.0
    """Between two looks at the folder; 0 for none."""
    started: int = field(default_factory=lambda: int(time.time()))
    # One thread: templates and tokenization stay off the event loop, and a fast tokenizer is not
    # meant to be used from several threads at once.
    _tokenizing: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="tokenize")
    )

    @property
    def base_name(self) -> str:
        """The name under which the base itself answers."""
        return self.base.source.display_name

    def choose(
        self, model: str | None, adapter: Wanted | None, scale: float | None = None
    ) -> AdapterSelection | None:
        """The adapters that a request means; None is the base itself.

        `adapter` wins over `model`; a name that nobody knows is refused wherever it stands.

        Args:
            model: the base's name or an adapter's.
            adapter: a name, or names with weights, which are applied together.
            scale: multiplies one adapter's update; None for the adapter's own default.

        Raises:
            UnknownAdapterError: with the known names.
            AdapterUnavailableError: an adapter that cannot be used; says why.
            RequestError: a scale without an adapter, or a kind that cannot be scaled or summed.
        """
        if isinstance(adapter, str | None):
            named_by_model = self._resolve(model, scale if adapter is None else None)
            chosen = self._resolve(adapter, scale) if adapter is not None else named_by_model
        else:
            self._resolve(model, None)
            chosen = self._compose(adapter)
        if scale is not None and (chosen is None or not isinstance(adapter, str | None)):
            what = "the base has nothing to scale" if chosen is None else "give weights in the list"
            raise RequestError(
                f"adapter_scale={scale:g} needs one adapter; {what}", param="adapter_scale"
            )
        return chosen

    def _compose(self, wanted: Sequence[tuple[str, float]]) -> AdapterSelection:
        for name, _ in wanted:
            if self._is_base(name):
                raise RequestError(
                    f"{name!r} is the base, which is in every composition; list adapters only",
                    param="adapter",
                )
        return self._select(list(wanted))

    def _resolve(self, name: str | None, scale: float | None) -> AdapterSelection | None:
        if name is None or self._is_base(name):
            return None
        return self._select([(name, scale)])

    def _select(self, wanted: Sequence[tuple[str, float | None]]) -> AdapterSelection:
        try:
            return self.adapters.select(wanted)
        except UnknownAdapterError as error:
            raise UnknownAdapterError(error.name, [self.base_name, *error.known]) from None

    def _is_base(self, name: str) -> bool:
        return name in self.reserved_names

    @property
    def reserved_names(self) -> frozenset[str]:
        """The names under which the base itself answers."""
        return frozenset({self.base_name, self.base.source.name, BASE_ALIAS})

    async def tokenize_chat(
        self, messages: Sequence[dict[str, Any]], tokens: AdapterTokens | None = None
    ) -> tuple[int, ...]:
        """Prompt token ids of a chat, ready for the assistant's turn.

        Args:
            messages: the chat.
            tokens: the adapter's own, if it has any.

        Raises:
            RequestError: the base's chat template refuses the messages.
        """
        return await asyncio.get_running_loop().run_in_executor(
            self._tokenizing, self._tokenize, messages, tokens
        )

    def _tokenize(
        self, messages: Sequence[dict[str, Any]], tokens: AdapterTokens | None
    ) -> tuple[int, ...]:
        tokenizer = (tokens or self.base).tokenizer
        try:
            text = render_chat(tokenizer, messages, add_generation_prompt=True)
        except BaseModelError as error:
            raise RequestError(str(error), param="messages") from None
        return tuple(encode_text(tokenizer, text))

    @asynccontextmanager
    async def generate(self, request: GenerationRequest) -> AsyncIterator[AsyncIterator[Event]]:
        """Submits a request and gives its events, the ending last.

        Leaving the block early, by an exception or because the client went away, aborts it.

        Raises:
            RequestError: it can never run.
            EngineStoppedError: the engine takes no more requests.
        """
        events: asyncio.Queue[Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def deliver(event: Event) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        self.engine.submit(request, deliver)
        try:
            async with aclosing(_until_ending(events)) as stream:
                yield stream
        finally:
            # Harmless when it has ended; and never awaited, since we may be being cancelled.
            self.engine.abort(request.request_id)

    def start(self) -> None:
        """Starts the engine, and the watch over the folder of adapters."""
        self.engine.start()
        if self.folder is not None and self.poll_seconds > 0:
            self.folder.start(self.poll_seconds)

    def close(self) -> None:
        """Stops the engine and every thread beside it."""
        if self.folder is not None:
            self.folder.stop()
        self.engine.stop()
        self.adapters.close()
        self._tokenizing.shutdown(wait=False, cancel_futures=True)


async def _until_ending(events: asyncio.Queue[Event]) -> Any:
    while True:
        event = await events.get()
        yield event
        if not isinstance(event, Delta):
            return
