"""Reads a pickled checkpoint and writes it as safetensors; run by `convert` as a process.

It is started as a bare file in Python's isolated mode and imports nothing of this package. The
limits are set after torch is loaded and before a byte of the file is read. It prints one JSON
object: {"tensors": N} or {"error": "..."}.
"""

import json
import os
import resource
import sys
from typing import Any


def main() -> None:
    """Arguments: the pickle, the output, bytes of memory beside torch's own, CPU seconds."""
    source, target = sys.argv[1:3]
    memory, seconds = int(sys.argv[3]), int(sys.argv[4])
    import torch  # noqa: F401
    from safetensors.torch import save_file  # noqa: F401

    _limit(memory, seconds)
    print(json.dumps(convert(source, target)), flush=True)


def convert(source: str, target: str) -> dict[str, Any]:
    """Writes the tensors of a pickle as safetensors; the answer that `main` prints."""
    import torch
    from safetensors.torch import save_file

    try:
        tensors = _check(torch.load(source, map_location="cpu", weights_only=True))
        save_file(tensors, target, {"format": "pt"})
    except MemoryError:
        return {"error": "it needs more memory than its size allows"}
    except Exception as error:
        text = " ".join(str(error).split())
        if "allocate memory" in text:  # what torch says instead of MemoryError
            return {"error": "it needs more memory than its size allows"}
        # torch's own advice here is to read the file without the protection: not to be passed on.
        for advice in (" (1) ", " This file can still be loaded", " Please file an issue"):
            text = text.split(advice)[0]
        return {"error": text[:300]}
    return {"tensors": len(tensors)}


def _limit(memory: int, seconds: int) -> None:
    # Libraries map gigabytes of addresses that they never use, so what is there is counted first.
    # Only Linux says how much that is, and only Linux keeps this limit.
    if os.path.exists("/proc/self/statm"):
        with open("/proc/self/statm") as file:
            mapped = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + memory, mapped + memory))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_FSIZE, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _check(loaded: Any) -> dict[str, Any]:
    import torch

    if not isinstance(loaded, dict) or not loaded:
        raise ValueError(f"it holds a {type(loaded).__name__}, expected names and tensors")
    tensors = {}
    for name, tensor in loaded.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise ValueError(f"it holds {name!r}: {type(tensor).__name__}, expected a tensor")
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            raise ValueError(f"{name} is no plain tensor")
        # A clone, as pickles may share storage between tensors, and safetensors may not.
        tensors[name] = tensor.detach().clone().contiguous()
    return tensors


if __name__ == "__main__":
    main()
