"""Starting a server: base, adapters, engine, HTTP."""

import gc
import ipaddress
import logging
import socket
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from qlora_serve.adapters.files import read_adapter
from qlora_serve.adapters.fit import FitChecker
from qlora_serve.adapters.folder import check_name, scan_adapters
from qlora_serve.base.load import LoadedBase, load_base
from qlora_serve.base.source import locate_base
from qlora_serve.base.templates import TemplateProcess
from qlora_serve.errors import AdapterError, ConfigError
from qlora_serve.progress import console, progress
from qlora_serve.serve.api.access import KeyRing
from qlora_serve.serve.api.app import create_app
from qlora_serve.serve.api.feedback_log import FeedbackLog
from qlora_serve.serve.api.limits import ApiLimits
from qlora_serve.serve.api.service import BASE_ALIAS, Service
from qlora_serve.serve.config import ServeSettings
from qlora_serve.serve.engine.engine import Engine
from qlora_serve.serve.engine.host_memory import Arena, give_back
from qlora_serve.serve.engine.large_pages import PagesAhead
from qlora_serve.serve.engine.registry import AdapterRegistry
from qlora_serve.serve.engine.runner import Runner
from qlora_serve.serve.engine.scheduler import Limits
from qlora_serve.serve.engine.watch import AdapterFolder
from qlora_serve.serve.feedback.setup import begin_experiments, check_experiments
from qlora_serve.serve.logs import set_up_logging
from qlora_serve.settings import parse_bytes

log = logging.getLogger(__name__)

_FREE_MEMORY_SHARE = 0.25
_ADAPTER_SHARE = 0.125
# On a CPU, where a request that comes waits for the step that is running, and on a GPU.
_STEP_TOKENS = (192, 2048)


def serve(settings: ServeSettings, ahead: PagesAhead | None = None) -> None:
    """Serves until it is told to stop.

    Args:
        settings: how.
        ahead: memory for the base's weights, which takes it if there is any.

    Raises:
        ConfigError: the address is taken, or two adapters share a name.
        BaseModelError: the base cannot be loaded.
        AdapterError: with `strict`, an adapter cannot be applied exactly.
        EngineStoppedError: the engine broke down while serving.
    """
    from qlora_serve.serve.shutdown import run_until_told

    set_up_logging(settings.log_format)
    _need_keys_or_loopback(settings)
    # Before the slow part, so that a taken port is known at once.
    listener = _listen(settings.host, settings.port)
    with listener:
        service = build_service(settings, ahead)
        app = create_app(service)
        # All that is there now stays, and Python's collector need not look at it: a look at
        # everything stops all threads for a third of a second (docs/performance.md).
        gc.collect()
        gc.freeze()
        _announce(service, listener)
        run_until_told(app, service, listener, settings.drain_timeout)


def build_service(settings: ServeSettings, ahead: PagesAhead | None = None) -> Service:
    """Loads base and adapters; the engine is not started yet. `ahead` is memory for the base.

    An adapter that cannot be used is recorded with the reason, and the others are served.
    """
    keys = KeyRing(settings.keys) if settings.keys is not None else None
    experiments = begin_experiments(settings.experiment, settings.feedback)
    source = locate_base(settings.base, trust_remote_code=settings.trust_remote_code)
    taken = {BASE_ALIAS, source.display_name, source.name}
    _check_names(settings, taken)
    models = taken | _adapter_paths(settings).keys()
    check_experiments(experiments, models, taken)
    feedback = FeedbackLog(settings.feedback)
    feedback.restore(experiments, models)
    # Config and headers are enough to find most faults, minutes before a large base is loaded.
    fit = FitChecker(source)
    if settings.strict:
        for path in _adapter_paths(settings).values():
            fit.check(read_adapter(path))
    templates = TemplateProcess()
    templates.start()  # beside the loading
    with progress(f"loading {settings.base}"):
        base = load_base(
            settings.base,
            settings.quantization,
            settings.dtype,
            device=settings.device,
            trust_remote_code=settings.trust_remote_code,
            templates=templates,
        )
    arena = Arena() if ahead is None else Arena(first=ahead.take())
    runner = Runner(base, settings.cuda_paths, arena=arena)
    limits = _limits(settings, runner)
    memory, host_memory = (
        parse_bytes(size) if size != "auto" else int(free * _ADAPTER_SHARE)
        for size, free in (
            (settings.adapter_memory, _free_bytes(base)),
            (settings.adapter_host_memory, _free_host_bytes()),
        )
    )
    registry = AdapterRegistry(runner, fit, memory, host_memory, settings.adapter_templates)
    folder = _load_adapters(settings, registry, taken)
    if folder is not None:
        folder.also_reserved = lambda: tuple(feedback.experiments)
    engine = Engine(runner, limits, registry.residency)
    templates.close()  # which has said how answers end, and takes memory until chats come
    give_back()
    registry.residency.wake = engine.wake
    roots = tuple(root.resolve() for root in settings.adapter_root)
    return Service(
        base, engine, registry, folder, roots, settings.adapters_poll, _api_limits(settings), keys,
        feedback,
    )  # fmt: skip


def _check_names(settings: ServeSettings, taken: set[str]) -> None:
    paths = _adapter_paths(settings)
    both = taken & paths.keys()
    if both:
        raise ConfigError(f"the adapter name {both.pop()!r} means the base; choose another")
    unknown = sorted(set(settings.pin) - paths.keys())
    if unknown:
        listed = ", ".join(sorted(paths)) or "none"
        raise ConfigError(f"--pin {unknown[0]}: no adapter has that name; known here: {listed}")
    for root in settings.adapter_root:
        if not root.is_dir():
            raise ConfigError(f"--adapter-root {root}: no such folder")


def _load_adapters(
    settings: ServeSettings, registry: AdapterRegistry, taken: set[str]
) -> AdapterFolder | None:
    """Adds every adapter to the registry; returns the folder that is to be watched, if any."""
    count = len(_adapter_paths(settings))
    if count == 0 and settings.adapters_dir is None:
        return None
    folder = None
    with progress("loading adapters", count) as bar:
        # The pinned ones first: they must have room.
        ordered = sorted(settings.adapter.items(), key=lambda item: item[0] not in settings.pin)
        for done, (name, path) in enumerate(ordered, 1):
            entry = registry.add(name, path, name in settings.pin)
            bar.update(done, name)
            if entry.reason:
                log.warning("adapter %r cannot be used: %s", name, entry.reason)
        if settings.adapters_dir is not None:
            reserved = taken | settings.adapter.keys()
            folder = AdapterFolder(registry, settings.adapters_dir, reserved)
            before = len(settings.adapter)
            folder.scan(settings.pin, lambda done, _, entry: bar.update(before + done, entry.name))
    failed = [entry for entry in registry.entries() if entry.reason]
    if failed and settings.strict:
        raise AdapterError(f"{failed[0].reason} (--strict: {len(failed)} cannot be used)")
    return folder


def _api_limits(settings: ServeSettings) -> ApiLimits:
    return ApiLimits(
        body_bytes=parse_bytes(settings.max_body_size),
        messages=settings.max_messages,
        output_tokens=settings.max_output_tokens,
        choices=settings.max_choices,
        variants=settings.max_variants,
        stop_texts=settings.max_stop_texts,
        logit_biases=settings.max_logit_biases,
        tools=settings.max_tools,
        schema_bytes=parse_bytes(settings.max_schema_size),
        schema_seconds=settings.schema_timeout,
        concurrent=settings.max_concurrent_requests,
        queued=settings.max_queued_answers,
        wait_seconds=settings.queue_timeout,
        run_seconds=settings.request_timeout,
        cors_origins=settings.cors_origins,
    )


def _adapter_paths(settings: ServeSettings) -> dict[str, Any]:
    paths = {check_name(name): path for name, path in settings.adapter.items()}
    if settings.adapters_dir is not None:
        scan = scan_adapters(settings.adapters_dir)
        for problem in scan.refused.values() if settings.strict else ():
            raise ConfigError(f"{problem} (--strict)")
        found = {name: entry.path for name, entry in scan.entries.items()}
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
        settings.max_sequences, 0, step_tokens, longest, runner.windows, runner.even_context,
        settings.prefix_cache, runner.block_tokens,
    )  # fmt: skip
    limits = limits_within(limits, _kv_bytes(settings, base), runner.token_bytes)
    if limits.longest < 2:
        one = sum(map(runner.token_bytes, runner.windows)) * limits.block_tokens
        raise ConfigError(
            f"--kv-memory {settings.kv_memory} does not hold one block of {limits.block_tokens} "
            f"tokens, which takes {one} bytes"
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
            group.blocks * limits.block_tokens * token_bytes(group.window) for group in trial.groups
        )

    # More than this never pays: windowed layers are full by then, and others take the memory.
    low, high = 0, memory // max(1, token_bytes(None)) + limits.max_sequences * limits.max_length
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if takes(middle) <= memory else (low, middle - 1)
    return replace(limits, cache_tokens=low)


def _kv_bytes(settings: ServeSettings, base: LoadedBase) -> int:
    if settings.kv_memory != "auto":
        wanted, there = parse_bytes(settings.kv_memory), _device_bytes(base)
        if wanted > there:  # Linux would promise it, and end the process when it is used
            raise ConfigError(
                f"--kv-memory {settings.kv_memory} is more than all memory of the device, "
                f"{there / 1e9:.1f}GB; give less, or auto"
            )
        return wanted
    return int(_free_bytes(base) * _FREE_MEMORY_SHARE)


def _device_bytes(base: LoadedBase) -> int:
    """All memory of the device that computes."""
    import psutil
    import torch

    if base.device.type == "cuda":
        return int(torch.cuda.mem_get_info(base.device)[1])
    return int(psutil.virtual_memory().total)


def _free_bytes(base: LoadedBase) -> int:
    """Free memory of the device that computes."""
    import torch

    if base.device.type == "cuda":
        return int(torch.cuda.mem_get_info(base.device)[0])
    return _free_host_bytes()


def _free_host_bytes() -> int:
    import psutil

    return int(psutil.virtual_memory().available)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Named as TCP: asyncio sends at once (TCP_NODELAY) only on sockets that say so. Without it each
    # answer's second piece waits 40 ms for the client's word that the first has come.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
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


def _need_keys_or_loopback(settings: ServeSettings) -> None:
    """Refuses to be open to other machines by accident."""
    if settings.keys is not None or settings.allow_unauthenticated or is_loopback(settings.host):
        return
    raise ConfigError(
        f"--host {settings.host} can be reached from other machines, and without keys everybody "
        "there may use this server and manage its adapters; give --keys FILE (`qlora-serve keys "
        "add NAME` makes one), or --allow-unauthenticated if that is meant"
    )


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine only."""
    try:
        found = socket.getaddrinfo(host or None, None, flags=socket.AI_PASSIVE)
    except OSError:
        return False
    return all(ipaddress.ip_address(str(item[4][0])).is_loopback for item in found)


def _announce(service: Service, listener: socket.socket) -> None:
    host, port = listener.getsockname()[:2]
    names = ", ".join(service.adapters.names()) or "none"
    failed = [entry for entry in service.adapters.entries() if entry.content is None]
    console.print(f"base: {service.base_name} ({service.base.quantization}, {service.base.dtype})")
    if service.base.device.type != "cpu":
        console.print(f"attention: {service.engine.runner.attention}")
    console.print(f"adapters: {names}", soft_wrap=True)
    for experiment in service.feedback.experiments.values():
        shares = ", ".join(f"{label} {share:.0%}" for label, share in experiment.shares)
        console.print(f"experiment {experiment.name}: {shares}", soft_wrap=True, markup=False)
    for entry in failed:
        console.print(f"failed: {entry.name}: {entry.reason}", soft_wrap=True, markup=False)
    if service.keys is not None:
        console.print(f"keys: {len(service.keys)} in force")
    elif is_loopback(host):
        console.print("keys: none asked for; this machine only")
    else:
        console.print(
            "keys: none asked for; everybody who reaches this address may use and manage it",
            soft_wrap=True,
        )
    console.print(f"listening on http://{host}:{port}/v1", soft_wrap=True)
