"""What the routes share: the engine, the adapters and the tokenizer."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from qlora_serve.base.load import LoadedBase
from qlora_serve.base.tokenizer import encode_text, render_chat
from qlora_serve.errors import BaseModelError, RequestError, UnknownAdapterError
from qlora_serve.serve.engine.engine import Engine
from qlora_serve.serve.engine.lora import ResidentAdapter
from qlora_serve.serve.engine.registry import AdapterRegistry
from qlora_serve.serve.engine.request import Delta, Event, GenerationRequest

BASE_ALIAS = "base"


@dataclass
class Service:
    """One base, its adapters, and the engine that serves them."""

    base: LoadedBase
    engine: Engine
    adapters: AdapterRegistry
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

    def choose(self, model: str | None, adapter: str | None) -> ResidentAdapter | None:
        """The adapter that a request means; None is the base itself.

        `adapter` wins over `model`; a name that nobody knows is refused wherever it stands.

        Raises:
            UnknownAdapterError: with the known names.
        """
        named_by_model = self._resolve(model)
        return self._resolve(adapter) if adapter is not None else named_by_model

    def _resolve(self, name: str | None) -> ResidentAdapter | None:
        if name is None or name in (self.base_name, self.base.source.name, BASE_ALIAS):
            return None
        try:
            return self.adapters.resolve(name)
        except UnknownAdapterError as error:
            raise UnknownAdapterError(name, [self.base_name, *error.known]) from None

    async def tokenize_chat(self, messages: Sequence[dict[str, Any]]) -> tuple[int, ...]:
        """Prompt token ids of a chat, ready for the assistant's turn.

        Raises:
            RequestError: the base's chat template refuses the messages.
        """
        return await asyncio.get_running_loop().run_in_executor(
            self._tokenizing, self._tokenize, messages
        )

    def _tokenize(self, messages: Sequence[dict[str, Any]]) -> tuple[int, ...]:
        try:
            text = render_chat(self.base.tokenizer, messages, add_generation_prompt=True)
        except BaseModelError as error:
            raise RequestError(str(error), param="messages") from None
        return tuple(encode_text(self.base.tokenizer, text))

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

    def close(self) -> None:
        """Stops the engine and the tokenizing thread."""
        self.engine.stop()
        self._tokenizing.shutdown(wait=False, cancel_futures=True)


async def _until_ending(events: asyncio.Queue[Event]) -> Any:
    while True:
        event = await events.get()
        yield event
        if not isinstance(event, Delta):
            return
