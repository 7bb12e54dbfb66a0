"""A real server in a process of its own, for tests."""

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_LISTENING = re.compile(r"listening on (http://\S+?)/v1")


@contextmanager
def running_server(*arguments: str | Path) -> Iterator[str]:
    """Starts `qlora-serve serve` on a free port and gives its URL; ends it afterwards."""
    command = [sys.executable, "-m", "qlora_serve.cli", "serve", *map(str, arguments)]
    process = subprocess.Popen([*command, "--port", "0"], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    seen = []
    try:
        for line in process.stderr:
            seen.append(line)
            if found := _LISTENING.search(line):
                yield found[1]
                break
        else:
            raise AssertionError("the server did not start:\n" + "".join(seen))
    finally:
        process.terminate()
        process.communicate(timeout=60)
