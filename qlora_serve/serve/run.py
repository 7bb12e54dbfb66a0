"""Starting a server: base, adapters, engine, HTTP."""

import logging
import socket
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
from qlora_serve.serve.engine.scheduler import Limits
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
    return Service(base, Engine(runner, _limits(settings, base)), registry)


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


def _limits(settings: ServeSettings, base: LoadedBase) -> Limits:
    config = base.model.config.get_text_config()
    trained_for = int(config.max_position_embeddings)
    longest = settings.max_model_len or trained_for
    if longest > trained_for:
        raise ConfigError(
            f"--max-model-len {longest} is more than the {trained_for} tokens that the base was "
            "trained for"
        )
    tokens = max(1, _kv_bytes(settings, base) // kv_bytes_per_token(base))
    if tokens < 2:
        raise ConfigError(
            f"--kv-memory {settings.kv_memory} does not hold two tokens; "
            f"one takes {kv_bytes_per_token(base)} bytes"
        )
    step_tokens = settings.max_step_tokens or _STEP_TOKENS[base.device.type != "cpu"]
    return Limits(settings.max_sequences, tokens, step_tokens, longest)


def kv_bytes_per_token(base: LoadedBase) -> int:
    """Bytes of keys and values that one token takes over all layers."""
    import torch

    config = base.model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    item = torch.empty(0, dtype=getattr(torch, base.dtype)).element_size()
    return int(2 * config.num_hidden_layers * heads * width * item)


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
