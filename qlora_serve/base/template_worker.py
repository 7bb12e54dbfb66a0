"""Renders chat templates; run by `templates` as a process.

It is started as a bare file in Python's isolated mode and imports nothing of this package. Each
line on stdin is one rendering, each line on stdout its result: {"text": ...} or {"error": ...}.
Memory is limited once everything is imported, and processor time anew for each rendering: whatever
it is doing, the kernel ends this process when that is over, even if the parent has died.
"""

import importlib
import importlib.util
import json
import os
import resource
import signal
import sys
from types import ModuleType
from typing import Any


def main() -> None:
    """Arguments: bytes of memory beside the libraries' own, CPU seconds, the longest text."""
    memory, seconds, longest = int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
    render = _renderer()
    _limit_memory(memory)
    print("ready", flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, seconds)  # its signal ends the process
        answer = json.dumps(_render(render, json.loads(line), longest))
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(answer, flush=True)


def _renderer() -> Any:
    """transformers' own, so that the text is what training and others make of a template.

    Its module alone takes 0.15 s to import, and all of transformers' `__init__` modules 1 s: they
    are replaced by empty ones.
    """
    spec = importlib.util.find_spec("transformers")
    assert spec is not None
    assert spec.origin is not None
    folder = os.path.dirname(spec.origin)
    packages = {"transformers": folder, "transformers.utils": os.path.join(folder, "utils")}
    for name, path in packages.items():
        sys.modules[name] = package = ModuleType(name)
        package.__path__ = [path]
    try:
        module = importlib.import_module("transformers.utils.chat_template_utils")
    except ImportError:  # a version whose modules need more
        for name in [n for n in sys.modules if n.split(".")[0] == "transformers"]:
            del sys.modules[name]
        module = importlib.import_module("transformers.utils.chat_template_utils")
    return module.render_jinja_template


def _render(render: Any, wanted: dict[str, Any], longest: int) -> dict[str, str]:
    try:
        [text] = render(**wanted)[0]
    except MemoryError:
        return {"error": "it needs more memory than a template is given"}
    except RecursionError:
        return {"error": "it calls itself without an end"}
    except Exception as error:  # a template fails like any program
        return {"error": " ".join(str(error).split())[:300] or type(error).__name__}
    if len(text) > longest:
        return {"error": f"it writes {len(text)} characters; {longest} are allowed"}
    return {"text": text}


def _limit_memory(memory: int) -> None:
    # Libraries map gigabytes of addresses that they never use, so what is there is counted first.
    # Only Linux says how much that is, and only Linux keeps this limit.
    if os.path.exists("/proc/self/statm"):
        with open("/proc/self/statm") as file:
            mapped = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + memory, mapped + memory))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


if __name__ == "__main__":
    main()
