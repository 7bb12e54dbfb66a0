"""What the routes share: the engine, the adapters and the tokenizer."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from qlora_serve.adapters.tokens import AdapterTokens
from qlora_serve.base.load import LoadedBase
from qlora_serve.base.tokenizer import encode_text
from qlora_serve.errors import BaseModelError, RequestError, UnknownAdapterError
from qlora_serve.serve.api.access import KeyRing
from qlora_serve.serve.api.caller import current_caller
from qlora_serve.serve.api.courier import Courier, Mailbox
from qlora_serve.serve.api.feedback_log import FeedbackLog
from qlora_serve.serve.api.limits import ApiLimits
from qlora_serve.serve.api.metrics import Metrics
from qlora_serve.serve.api.structured import GuideStore
from qlora_serve.serve.api.token_text import TokenTexts
from qlora_serve.serve.api.traffic import Passage, Traffic
from qlora_serve.serve.engine.engine import Engine
from qlora_serve.serve.engine.registry import AdapterRegistry, Registered
from qlora_serve.serve.engine.request import Delta, Event, GenerationRequest
from qlora_serve.serve.engine.slots import AdapterSelection
from qlora_serve.serve.engine.watch import AdapterFolder
from qlora_serve.serve.feedback.experiment import Experiment

BASE_ALIAS = "base"
Wanted = str | Sequence[tuple[str, float]]
"""An adapter's name, or names with weights."""
T = TypeVar("T")


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
    limits: ApiLimits = field(default_factory=ApiLimits)
    keys: KeyRing | None = None
    """Whose requests are answered; None for everybody's."""
    feedback: FeedbackLog = field(default_factory=FeedbackLog)
    """Experiments, votes and scores."""
    started: int = field(default_factory=lambda: int(time.time()))
    _courier: Courier = field(default_factory=Courier)
    # One thread: templates and tokenization stay off the event loop, and a fast tokenizer is not
    # meant to be used from several threads at once.
    _tokenizing: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="tokenize")
    )
    _own_templates: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="own-templates")
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

        What the caller's key may not use is unknown to it.
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
        if chosen is None and not current_caller().may_use_base:
            raise self.unknown(adapter if isinstance(adapter, str) else model or self.base_name)
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
        self.need_visible(*(name for name, _ in wanted))
        for name, _ in wanted:
            if self.experiment(name) is not None:
                raise RequestError(
                    f"{name!r} is an experiment, which answers chats, completions and responses "
                    "that name it as model, without adapter and adapter_scale",
                    param="model",
                )
        try:
            return self.adapters.select(wanted)
        except UnknownAdapterError as error:
            raise self.unknown(error.name) from None

    def need_visible(self, *names: str) -> None:
        """Refuses names that do not exist for the caller, before anything is looked up.

        Raises:
            UnknownAdapterError: with the names that the caller may use.
        """
        for name in names:
            if not current_caller().allows(name):
                raise self.unknown(name)

    def unknown(self, name: str) -> UnknownAdapterError:
        """That there is no such name, with those that the caller may use."""
        base = [self.base_name] if current_caller().may_use_base else []
        known = [entry.name for entry in self.entries()]
        return UnknownAdapterError(name, base + known + [one.name for one in self.experiments()])

    def sees(self, model: str) -> bool:
        """Whether a model of this name may be used by the caller; the base under any of its."""
        caller = current_caller()
        return caller.may_use_base if self._is_base(model) else caller.allows(model)

    def experiment(self, name: str) -> Experiment | None:
        """The running experiment of this name, if it exists for the caller: it may use the name
        and all who answer."""
        found = self.feedback.experiments.get(name) if current_caller().allows(name) else None
        return found if found is not None and all(map(self.sees, found.models)) else None

    def sees_experiment(self, name: str, models: Iterable[str]) -> bool:
        """Whether an experiment exists for the caller."""
        return current_caller().allows(name) and all(map(self.sees, models))

    def experiments(self) -> list[Experiment]:
        """The running experiments that exist for the caller, sorted."""
        names = sorted(self.feedback.experiments)
        return [found for name in names if (found := self.experiment(name)) is not None]

    def entries(self) -> list[Registered]:
        """The adapters that exist for the caller, sorted."""
        caller = current_caller()
        return [entry for entry in self.adapters.entries() if caller.allows(entry.name)]

    def entry(self, name: str) -> Registered:
        """What a name points to now.

        Raises:
            UnknownAdapterError: nothing that exists for the caller.
        """
        self.need_visible(name)
        try:
            return self.adapters.entry(name)
        except UnknownAdapterError:
            raise self.unknown(name) from None

    def _is_base(self, name: str) -> bool:
        return name in self.reserved_names

    @property
    def reserved_names(self) -> frozenset[str]:
        """The names under which the base itself answers."""
        return frozenset({self.base_name, self.base.source.name, BASE_ALIAS})

    @cached_property
    def metrics(self) -> Metrics:
        """What is counted."""
        return Metrics(self.engine, self.base_name, self.adapters)

    @cached_property
    def traffic(self) -> Traffic:
        """Answers on their way."""
        return Traffic(self.limits, self.engine.limits.max_sequences, self.metrics)

    @cached_property
    def guides(self) -> GuideStore:
        """Compiled grammars."""
        return GuideStore(self.base, self.limits)

    @cached_property
    def token_texts(self) -> TokenTexts:
        """What each token of the base says."""
        return TokenTexts(self.base.tokenizer)

    async def tokenize_chat(
        self,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[dict[str, Any]] = (),
        add_generation_prompt: bool = True,
        tokens: AdapterTokens | None = None,
    ) -> tuple[int, ...]:
        """Prompt token ids of a chat, ready for the assistant's turn.

        Args:
            messages: the chat.
            tokens: the adapter's own, if it has any.

        Raises:
            RequestError: the chat template refuses the messages, or takes too long or too much.
        """
        tokenizer = (tokens or self.base).tokenizer

        def text_by(render: Callable[..., str]) -> str:
            try:
                return render(messages, add_generation_prompt, tools)
            except BaseModelError as error:
                raise RequestError(str(error), param="messages") from None
            except (TypeError, ValueError, LookupError, AttributeError, RecursionError) as error:
                # A template that meets what it was not written for fails like any program.
                raise RequestError(
                    f"the chat template cannot render these messages: {error}", param="messages"
                ) from None

        template = None if tokens is None else tokens.template
        if template is None:
            render = self.base.renderer(tokenizer)
            return await self.off_the_loop(lambda: tuple(encode_text(tokenizer, text_by(render))))
        # In a thread of its own: it must not hold up everybody else.
        loop = asyncio.get_running_loop()
        text = await loop.run_in_executor(self._own_templates, text_by, template.render)
        return await self.off_the_loop(lambda: tuple(encode_text(tokenizer, text)))

    async def tokenize_text(
        self, text: str, add_special_tokens: bool = True, tokens: AdapterTokens | None = None
    ) -> tuple[int, ...]:
        """Token ids of a plain text, with the special tokens that the tokenizer adds."""
        tokenizer = (tokens or self.base).tokenizer

        return await self.off_the_loop(
            lambda: tuple(tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])
        )

    async def detokenize(
        self, tokens: Sequence[int], adapter: AdapterSelection | None = None
    ) -> str:
        """The text of token ids, special tokens included.

        Raises:
            RequestError: an id is not in the vocabulary.
        """
        self.check_token_ids(tokens, "tokens", adapter)
        tokenizer = (own_tokens(adapter) or self.base).tokenizer
        return str(
            await self.off_the_loop(
                lambda: tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False)
            )
        )

    def check_token_ids(
        self, tokens: Iterable[int], param: str, adapter: AdapterSelection | None = None
    ) -> None:
        """Refuses ids that the model has no embedding for.

        Raises:
            RequestError: naming the first such id.
        """
        known = self.engine.runner.vocabulary(adapter)
        for token in tokens:
            if not 0 <= token < known:
                raise RequestError(f"there is no token {token}; ids are 0 to {known - 1}", param)

    def texts_of(self, adapter: AdapterSelection | None) -> TokenTexts:
        """What each token says in an adapter's answers."""
        own = own_tokens(adapter)
        return self.token_texts if own is None else TokenTexts(own.tokenizer)

    def guides_of(self, adapter: AdapterSelection | None) -> GuideStore:
        """Where grammars for an adapter's answers are compiled.

        Raises:
            RequestError: it has a tokenizer of its own, and grammars are made for the base's.
        """
        if own_tokens(adapter) is not None:
            assert adapter is not None
            raise RequestError(
                f"adapter {adapter.name!r} has a tokenizer of its own, and structured output "
                "works with the base's only",
                "response_format",
            )
        return self.guides

    async def off_the_loop(self, work: Callable[[], T]) -> T:
        """Runs what needs the tokenizer in its thread."""
        return await asyncio.get_running_loop().run_in_executor(self._tokenizing, work)

    @asynccontextmanager
    async def generate(self, request: GenerationRequest) -> AsyncIterator[AsyncIterator[Event]]:
        """Submits one request and gives its events, the ending last; see `generate_all`."""
        async with self.generate_all([request]) as numbered:

            async def events() -> AsyncIterator[Event]:
                async for batch in numbered:
                    for _, event in batch:
                        yield event

            yield events()

    @asynccontextmanager
    async def generate_all(
        self, requests: Sequence[GenerationRequest]
    ) -> AsyncIterator[AsyncIterator[list[tuple[int, Event]]]]:
        """Submits requests and gives their events, with the request's place, until all have ended:
        each time all that have come.

        Leaving the block early, by an exception or because the client went away, aborts them all.

        Raises:
            RequestError: one can never run.
            EngineStoppedError: the engine takes no more requests.
            OverloadedError: too many are waiting.
            RateLimitedError: the caller's key has used its tokens.
            RequestTimeoutError: from the events, when waiting or running took too long.
        """
        mailbox = Mailbox()
        loop = asyncio.get_running_loop()

        def deliver_as(number: int) -> Callable[[Event], None]:
            return lambda event: self._courier.send(loop, mailbox, (number, event))

        passage = self.traffic.enter(requests, mailbox.put, current_caller().quota)
        try:
            for number, request in enumerate(requests):
                self.engine.submit(request, deliver_as(number))
            async with aclosing(_until_all_end(mailbox, len(requests), passage)) as stream:
                yield stream
        finally:
            passage.leave()
            # Harmless for those that have ended or were never accepted; and never awaited, since
            # we may be being cancelled.
            for request in requests:
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
        self.feedback.close()
        self.guides.close()
        self._tokenizing.shutdown(wait=False, cancel_futures=True)
        self._own_templates.shutdown(wait=False, cancel_futures=True)
        if self.base.templates is not None:
            self.base.templates.close()


async def _until_all_end(mailbox: Mailbox, count: int, passage: Passage) -> Any:
    while count:
        batch: list[tuple[int, Event]] = []
        for item in await mailbox.take():
            if isinstance(item, Exception):
                if batch:
                    yield batch
                raise item
            passage.event(*item)
            count -= not isinstance(item[1], Delta)
            batch.append(item)
        yield batch


def own_tokens(adapter: AdapterSelection | None) -> AdapterTokens | None:
    """The tokenizer that an adapter brings along; None for the base's."""
    return None if adapter is None else adapter.tokens
