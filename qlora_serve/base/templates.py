"""Chat templates rendered where they can do no harm.

A template is a program, which a model or an adapter brings along, and its input is anybody's.
Jinja's sandbox keeps it from files and from Python's insides, but not from running for ever or from
asking for all memory in one operation, which holds every thread of a process. So a server renders
in a process of its own with limits on both.
"""

import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_serve.errors import BaseModelError

_WORKER = Path(__file__).with_name("template_worker.py")
_START_SECONDS = 120.0
_SECONDS = 2.0
# The worker counts its own processor time, so that a busy machine refuses nobody. This many times
# as long is waited for one that is no longer able to.
_PATIENCE = 10
_MEMORY = 256 << 20
LONGEST = 16 << 20
"""Characters that a template may write."""


class TemplateProcess:
    """Renders templates in a process that is started when the first one is asked for.

    Safe to use from any thread; one rendering at a time.
    """

    def __init__(
        self,
        whose: str = "the chat template",
        seconds: float = _SECONDS,
        memory: int = _MEMORY,
        longest: int = LONGEST,
    ) -> None:
        """
        Args:
            whose: what errors call it.
            seconds: of a processor that one rendering may take.
            memory: bytes that renderings may take.
            longest: characters of a text.
        """
        self._whose = whose
        self._seconds, self._memory, self._longest = seconds, memory, longest
        self._process: subprocess.Popen[bytes] | None = None
        self._ready = False
        self._lock = threading.Lock()

    def render(self, **wanted: Any) -> str:
        """A text.

        Args:
            wanted: the arguments of transformers' `render_jinja_template`, as JSON can carry them.

        Raises:
            BaseModelError: the template refuses, or takes more than its limits allow.
        """
        line = json.dumps(wanted).encode() + b"\n"
        with self._lock:
            process = self._running()
            answer = self._ask(process, line)
            if answer is None:
                self._end()
                raise BaseModelError(
                    f"{self._whose} did not end within {self._seconds:g} s and "
                    f"{self._memory >> 20} MiB, for these messages"
                )
        if "error" in answer:
            raise BaseModelError(f"{self._whose} refuses these messages: {answer['error']}")
        return str(answer["text"])

    def start(self) -> None:
        """Starts the process without waiting for it."""
        with self._lock:
            self._started()

    def close(self) -> None:
        """Ends the process; another rendering starts it again."""
        with self._lock:
            self._end()

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self._end()
        kept = {n: os.environ[n] for n in ("PATH", "LD_LIBRARY_PATH", "TZ") if n in os.environ}
        limits = [str(self._memory), str(self._seconds), str(self._longest)]
        self._ready = False
        self._process = subprocess.Popen(
            [sys.executable, "-I", str(_WORKER), *limits],
            env=kept | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # a Ctrl-C is the server's, which finishes what it has begun
        )
        return self._process

    def _running(self) -> subprocess.Popen[bytes]:
        process = self._started()
        if not self._ready:
            if self._read_line(process, time.monotonic() + _START_SECONDS) != b"ready":
                self._end()
                raise BaseModelError("the process that renders chat templates did not start")
            self._ready = True
        return process

    def _ask(self, process: subprocess.Popen[bytes], line: bytes) -> dict[str, Any] | None:
        """The answer; None when none came in time."""
        deadline = time.monotonic() + _PATIENCE * self._seconds
        assert process.stdin is not None
        try:
            process.stdin.write(line)  # it reads all of a line before it works on it
            process.stdin.flush()
        except BrokenPipeError:
            return None
        answer = self._read_line(process, deadline)
        return None if answer is None else json.loads(answer)

    def _read_line(self, process: subprocess.Popen[bytes], deadline: float) -> bytes | None:
        assert process.stdout is not None
        parts: list[bytes] = []
        while True:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([process.stdout], [], [], left)[0]:
                return None
            part = os.read(process.stdout.fileno(), 1 << 16)
            if not part:
                return None
            parts.append(part)
            if part.endswith(b"\n"):  # one line is asked for at a time
                return b"".join(parts)[:-1]

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.communicate()


@dataclass(frozen=True, eq=False)
class ChatTemplate:
    """A tokenizer's chat template, within limits."""

    tokenizer: Any
    """Which holds it."""
    process: TemplateProcess

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The text of a chat, the same as `tokenizer.render_chat` makes.

        Raises:
            BaseModelError: see `TemplateProcess.render`.
        """
        tokenizer = self.tokenizer
        offered = list(tools) if tools else None
        # What `apply_chat_template` does around the rendering itself.
        chat = [{k: v for k, v in m.items() if v is not None} for m in messages]
        return self.process.render(
            conversations=[chat],
            tools=offered,
            chat_template=tokenizer.get_chat_template(None, offered),
            add_generation_prompt=add_generation_prompt,
            **tokenizer.special_tokens_map,
        )
