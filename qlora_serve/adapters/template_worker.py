"""Renders chat templates of adapters; run by `templates` as a process.

It is started as a bare file in Python's isolated mode and imports nothing of this package. Each
line on stdin is one rendering, each line on stdout its result: {"text": ...} or {"error": ...}.
Memory is limited once everything is imported, and processor time anew for each rendering, so that
a template which never ends does not outlive even a parent that died.
"""

import json
import os
import resource
import sys
from typing import Any


def main() -> None:
    """Arguments: bytes of memory beside the libraries' own, CPU seconds, the longest text."""
    memory, seconds, longest = map(int, sys.argv[1:4])
    # transformers' own renderer, so that the text is what training and others make of a template.
    from transformers.utils.chat_template_utils import render_jinja_template

    _limit_memory(memory)
    print("ready", flush=True)
    for line in sys.stdin:
        _limit_time(seconds)
        print(json.dumps(_render(render_jinja_template, json.loads(line), longest)), flush=True)


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


def _limit_time(seconds: int) -> None:
    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = int(used.ru_utime + used.ru_stime) + seconds + 1
    resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.RLIM_INFINITY))


if __name__ == "__main__":
    main()
