"""Grammars that requests bring: compiled off the event loop, within limits, and remembered."""

import asyncio
import json
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from qlora_serve.base.load import LoadedBase
from qlora_serve.errors import ConfigError, RequestError
from qlora_serve.serve.api.limits import ApiLimits
from qlora_serve.serve.api.schemas import StructuredOutputs
from qlora_serve.serve.engine.guide import Guide, GuideCompiler, GuideKind

_REMEMBERED = 64


class GuideStore:
    """Compiles and remembers grammars for one base.

    llguidance is imported, and its view of the vocabulary made, when the first grammar comes.
    """

    def __init__(self, base: LoadedBase, limits: ApiLimits) -> None:
        self._base = base
        self._limits = limits
        self._compiler: GuideCompiler | None = None
        self._making = threading.Lock()
        self._known: OrderedDict[tuple[GuideKind, str], Guide] = OrderedDict()
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="grammar")

    def close(self) -> None:
        """Ends the threads; nothing is waited for."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def get(self, kind: GuideKind, grammar: Any, param: str) -> Guide:
        """The compiled grammar.

        Args:
            kind: what `grammar` is.
            grammar: its text, or what is JSON.
            param: the field that it came in, for errors.

        Raises:
            RequestError: it is too large, wrong, or takes too long to compile.
        """
        text = grammar if isinstance(grammar, str) else json.dumps(grammar)
        self._limits.check(len(text.encode("utf-8", "replace")), self._limits.schema_bytes, param,
                           "bytes of grammar")  # fmt: skip
        key = (kind, text)
        if key in self._known:
            self._known.move_to_end(key)
            return self._known[key]
        guide = await self._compile(kind, text, param)
        self._known[key] = guide
        if len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)
        return guide

    async def _compile(self, kind: GuideKind, text: str, param: str) -> Guide:
        # The compiler comes first and outside of the time limit: it is this server's own work.
        loop = asyncio.get_running_loop()
        try:
            compiler = await loop.run_in_executor(self._threads, self._get_compiler)
        except ConfigError as error:
            raise RequestError(f"{param}: {error}", param) from None
        compiling = loop.run_in_executor(self._threads, compiler.compile, kind, text)
        seconds = self._limits.schema_seconds
        try:
            # llguidance cannot be interrupted; its own limits on work end it soon after.
            return await asyncio.wait_for(asyncio.shield(compiling), seconds)
        except TimeoutError:
            compiling.add_done_callback(lambda done: done.cancelled() or done.exception())
            raise RequestError(
                f"{param}: compiling the grammar took longer than the {seconds:g} s that this "
                "server allows; make it simpler", param
            ) from None  # fmt: skip
        except RequestError as error:
            raise RequestError(f"{param}: {error}", param) from None

    def _get_compiler(self) -> GuideCompiler:
        with self._making:
            if self._compiler is None:
                self._compiler = GuideCompiler(self._base)
            return self._compiler


async def structured_guide(store: GuideStore, wanted: StructuredOutputs | None) -> Guide | None:
    """The guide of `structured_outputs`."""
    if wanted is None:
        return None
    where = "structured_outputs"
    if wanted.json_schema is not None:
        return await store.get("json_schema", wanted.json_schema, where)
    if wanted.regex is not None:
        return await store.get("regex", wanted.regex, where)
    if wanted.grammar is not None:
        return await store.get("grammar", wanted.grammar, where)
    return await store.get("choice", wanted.choice, where)
