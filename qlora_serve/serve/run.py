"""Starting a server: base, adapters, engine, HTTP."""

import logging
import socket
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from qlora_serve.adapters.files import read_adapter
from qlora_serve.adapters.fit import FitChecker
from qlora_serve.adapters.folder import check_name, find_adapters
from qlora_serve.base.load import LoadedBase, load_base
from qlora_serve.base.source import locate_base
from qlora_serve.errors import ConfigError
from qlora_serve.progress import console, progress
from qlora_serve.serve.api.app import create_app
from qlora_serve.serve.api.service import BASE_ALIAS, Service
from qlora_serve.serve.config import ServeSettings
from qlora_serve.serve.engine.engine import Engine
from qlora_serve.serve.engine.registry import AdapterRegistry
from qlora_serve.serve.engine.runner import Runner
from qlora_serve.serve.engine.scheduler import BLOCK_TOKENS, Limits
from qlora_serve.settings import parse_bytes

_FREE_MEMORY_SHARE = 0.25
_GRACEFUL_SECONDS = 10
# On a CPU a step of 256 tokens takes a good part of a second, and a request that comes waits for
# the one that is running.
_STEP_TOKENS = (256, 2048)


def serve(settings: ServeSettings) -> None:
    """Serves until it is told to stop.

    Raises:
        ConfigError: the address is taken, or two adapters share a name.
        BaseModelError: the base cannot be loaded.
        AdapterError: an adapter cannot be applied exactly.
    """
    import uvicorn

    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    # Before the slow part, so that a taken port is known at once.
    listener = _listen(settings.host, settings.port)
    with listener:
        service = build_service(settings)
        app = create_app(service)
        _announce(service, listener)
        config = uvicorn.Config(
            app, log_level="warning", timeout_graceful_shutdown=_GRACEFUL_SECONDS
        )
        uvicorn.Server(config).run(sockets=[listener])


def build_service(settings: ServeSettings) -> Service:
    """Loads base and adapters; the engine is not started yet."""
    paths = _adapter_paths(settings)
    source = locate_base(settings.base)
    taken = {BASE_ALIAS, source.display_name, source.name} & paths.keys()
    if taken:
        raise ConfigError(f"the adapter name {taken.pop()!r} means the base; choose another")
    # Config and headers are enough to find most faults, minutes before a large base is loaded.
    fit = FitChecker(source)
    for path in paths.values():
        fit.check(read_adapter(path))
    with progress(f"loading {settings.base}"):
        base = load_base(
            settings.base, settings.quantization, settings.dtype, device=settings.device
        )
    runner = Runner(base)
    registry = AdapterRegistry(runner, fit)
    if paths:
        with progress("loading adapters", len(paths)) as bar:
            for done, (name, path) in enumerate(paths.items(), 1):
                adapter = registry.load(name, path)
                bar.update(done, f"{name} {adapter.identity[7:19]}")
    return Service(base, Engine(runner, _limits(settings, runner)), registry)


def _adapter_paths(settings: ServeSettings) -> dict[str, Any]:
    paths = {check_name(name): path for name, path in settings.adapter.items()}
    if settings.adapters_dir is not None:
        found = find_adapters(settings.adapters_dir)
        twice = sorted(found.keys() & paths.keys())
        if twice:
            raise ConfigError(
                f"the adapter name {twice[0]!r} is given with --adapter and is in "
                f"{settings.adapters_dir} too"
            )
        paths = {**found, **paths}
    return paths


def _limits(settings: ServeSettings, runner: Runner) -> Limits:
    base = runner.base
    config = base.model.config.get_text_config()
    trained_for = int(config.max_position_embeddings)
    longest = settings.max_model_len or trained_for
    if longest > trained_for:
        raise ConfigError(
            f"--max-model-len {longest} is more than the {trained_for} tokens that the base was "
            "trained for"
        )
    step_tokens = settings.max_step_tokens or _STEP_TOKENS[base.device.type != "cpu"]
    limits = Limits(
        settings.max_sequences, 0, step_tokens, longest, runner.windows, settings.prefix_cache
    )
    limits = limits_within(limits, _kv_bytes(settings, base), runner.token_bytes)
    if limits.longest < 2:
        one = sum(map(runner.token_bytes, runner.windows)) * BLOCK_TOKENS
        raise ConfigError(
            f"--kv-memory {settings.kv_memory} does not hold one block of {BLOCK_TOKENS} tokens, "
            f"which takes {one} bytes"
        )
    return limits


def limits_within(limits: Limits, memory: int, token_bytes: Callable[[int | None], int]) -> Limits:
    """The limits with as many tokens in the cache as `memory` bytes hold.

    Args:
        limits: of which `cache_tokens` is to be found.
        memory: bytes for keys and values.
        token_bytes: bytes of one token in all layers of a window.
    """

    def takes(tokens: int) -> int:
        trial = replace(limits, cache_tokens=tokens)
        return sum(
            group.blocks * BLOCK_TOKENS * token_bytes(group.window) for group in trial.groups
        )

    # More than this never pays: windowed layers are full by then, and others take the memory.
    low, high = 0, memory // max(1, token_bytes(None)) + limits.max_sequences * limits.max_length
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if takes(middle) <= memory else (low, middle - 1)
    return replace(limits, cache_tokens=low)


def _kv_bytes(settings: ServeSettings, base: LoadedBase) -> int:
    if settings.kv_memory != "auto":
        return parse_bytes(settings.kv_memory)
    import psutil
    import torch

    if base.device.type == "cuda":
        free = torch.cuda.mem_get_info(base.device)[0]
    else:
        free = psutil.virtual_memory().available
    return int(free * _FREE_MEMORY_SHARE)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(1024)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"cannot listen on {host}:{port} ({error.strerror or error}); choose another --port"
        ) from None
    return listener


def _announce(service: Service, listener: socket.socket) -> None:
    host, port = listener.getsockname()[:2]
    names = ", ".join(service.adapters.names()) or "none"
    console.print(f"base: {service.base_name} ({service.base.quantization}, {service.base.dtype})")
    console.print(f"adapters: {names}", soft_wrap=True)
    console.print(f"listening on http://{host}:{port}/v1", soft_wrap=True)
