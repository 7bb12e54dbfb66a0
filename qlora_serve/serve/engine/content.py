"""What is known of an adapter without its weights: identity, kind, size, and what may be scaled."""

import hashlib
import os
import re
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_serve.adapters.describe import kind_of, ranks_of
from qlora_serve.adapters.files import CONFIG_FILE, WEIGHTS_FILE, AdapterFiles, read_adapter
from qlora_serve.adapters.fit import ExpectedAdapter, FitChecker
from qlora_serve.adapters.identity import content_identity
from qlora_serve.adapters.manifest import MANIFEST_FILE
from qlora_serve.adapters.tokens import AdapterTokens
from qlora_serve.adapters.weights import AdapterWeights, check_finite, check_settings_and_fit
from qlora_serve.base.source import cache_folder
from qlora_serve.errors import AdapterError, RequestError
from qlora_serve.serve.engine.embedding import held_weight, width_of

Signature = tuple[tuple[int, ...], ...]
"""Device, inode, size and times of an adapter's files."""

_SETTLED_NS = 2_000_000_000
"""A file that changed more recently may change again within the same tick of its time."""
_BLOCK = 16  # vectors.h's vector: outputs are filled up to it
_FLOAT32 = 4
_CACHE_FORMAT = 1
"""Goes up with every change of what an identity is a hash of."""
_IDENTITY = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(frozen=True)
class AdapterContent:
    """An adapter that was checked, but for what only its weights can show."""

    identity: str
    path: Path
    """Where it was found; symlinks resolved, so that a link which moves on does not lead here."""
    kind: str
    """See `describe.kind_of`."""
    rank: str
    """See `describe.ranks_of`."""
    size: int
    """Bytes on the device, at most."""
    fixed: str = ""
    """What cannot be scaled or summed, in words; empty where all can."""
    is_dora: bool = False
    vocabulary: int | None = None
    """The tokens that it knows, where that is more than the base's."""
    tokens: AdapterTokens | None = None
    """Its own tokenizer, where that is another than the base's."""

    def require_scale(self, name: str, scale: float) -> None:
        """Checks that the adapter can be applied with a scale.

        Raises:
            RequestError: only its low-rank part could be scaled.
        """
        if scale != 1 and self.fixed:
            raise RequestError(
                f"adapter {name!r} cannot be scaled by {scale:g}: it has {self.fixed}, for which "
                "a scale is not defined; use it with scale 1",
                param="adapter_scale",
            )

    def require_sum(self, name: str) -> None:
        """Checks that the adapter can be part of a composition.

        Raises:
            RequestError: a sum with others is not defined.
        """
        why = self.fixed or ("DoRA" if self.is_dora else "")
        if why:
            raise RequestError(
                f"adapter {name!r} cannot be part of a composition: it has {why}, for which a sum "
                "is not defined; ask for it alone",
                param="adapter",
            )


def examine(path: Path, fit: FitChecker, base: Any, item: int) -> AdapterContent:
    """Checks an adapter and finds its identity; its weights are read only if they must be.

    Args:
        path: the adapter's directory.
        fit: of the base.
        base: the model, for its layers' shapes.
        item: bytes of a number in the dtype that is computed in.

    Raises:
        AdapterError: it cannot be applied exactly to this base.
    """
    adapter = read_adapter(path)
    expected = check_settings_and_fit(adapter, fit)
    return describe_content(adapter, expected, known_identity(adapter), base, item)


def describe_content(
    adapter: AdapterFiles, expected: ExpectedAdapter, identity: str, base: Any, item: int
) -> AdapterContent:
    """What `examine` returns, for an adapter whose identity is known."""
    config = adapter.config
    return AdapterContent(
        identity=identity,
        path=adapter.path,
        kind=kind_of(config),
        rank=ranks_of(config),
        size=most_bytes(adapter, expected, base, item),
        fixed=_fixed_parts(config, expected),
        is_dora=bool(config.get("use_dora")),
        vocabulary=expected.vocabulary,
    )


def _fixed_parts(config: Mapping[str, Any], expected: ExpectedAdapter) -> str:
    parts = []
    if expected.saved_modules:
        parts.append("replaced modules (modules_to_save)")
    if config.get("bias") not in (None, "none"):
        parts.append(f"trained biases (bias={config['bias']})")
    if expected.vocabulary is not None:
        parts.append("an enlarged vocabulary")
    if expected.token_rows:
        parts.append("trained tokens (trainable_token_indices)")
    return " and ".join(parts)


def most_bytes(adapter: AdapterFiles, expected: ExpectedAdapter, base: Any, item: int) -> int:
    """An upper bound of the bytes that an adapter takes on the device.

    Matrices in the dtype that is computed in, outputs filled up to a multiple of 16; vectors as if
    in float32; trained tokens cost the whole matrix that they are rows of.
    """
    total = 0
    for name, info in adapter.tensors.items():
        shape = info.shape
        if name.endswith(".base_layer.weight") and expected.vocabulary is None:
            continue  # a copy of the base's own, only compared
        if name.endswith("lora_B.weight"):
            out, rank = shape
            total += (out + -out % _BLOCK) * rank * item
            total += out * _FLOAT32 * 2 * bool(adapter.config.get("use_dora"))  # gain, offset
        elif name.endswith("lora_embedding_B"):
            out, rank = shape
            total += ((out + -out % _BLOCK) * rank + rank * (rank + _BLOCK)) * item
        else:
            count = 1
            for length in shape:
                count *= length
            total += count * (item if len(shape) == 2 else _FLOAT32)
    if expected.vocabulary is not None:  # both embeddings, also where the file has one
        total += 2 * expected.vocabulary * width_of(base.get_input_embeddings()) * item
    weights = [held_weight(base.get_submodule(name)) for name in expected.token_rows]
    return total + sum({weight.data_ptr(): weight.nbytes for weight in weights}.values())


def signature(path: Path) -> Signature | None:
    """Changes whenever an adapter's files do; None while they are not there.

    The time of the inode's change (ctime) cannot be set by a program, unlike that of its content.
    """
    found: list[tuple[int, ...]] = []
    for name in (CONFIG_FILE, WEIGHTS_FILE, MANIFEST_FILE):
        try:
            stat = (path / name).stat()
        except OSError:
            found.append(())
            continue
        found.append((stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))
    return tuple(found) if any(found) else None


def known_identity(adapter: AdapterFiles) -> str:
    """An adapter's identity, from the cache where its files have not changed since.

    Hashing a thousand adapters would make every start slow. The cache need not be trusted for
    what is served: weights are hashed again whenever they are read.

    Raises:
        AdapterError: the weights cannot be read, or hold NaN or infinite values.
    """
    before = signature(adapter.path)
    file = _cache_file(adapter.path, before)
    try:
        cached = file.read_text(encoding="ascii")
        if _IDENTITY.fullmatch(cached):
            return cached
    except (OSError, UnicodeDecodeError):
        pass
    tensors = adapter.load_tensors()
    check_finite(adapter, tensors)
    identity = content_identity(adapter, tensors)
    remember_identity(adapter.path, before, identity)
    return identity


def remember_identity(path: Path, before: Signature | None, identity: str) -> None:
    """Caches the identity of finite weights that were read while the files had this signature."""
    newest = max((max(stat[3:]) for stat in before or () if stat), default=0)
    if before != signature(path) or time.time_ns() - newest < _SETTLED_NS:
        return
    file = _cache_file(path, before)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", encoding="ascii", dir=file.parent, prefix=".", delete=False
        ) as fresh:
            fresh.write(identity)
        os.replace(fresh.name, file)
    except OSError:
        return  # a cache that cannot be written costs time only


def _cache_file(path: Path, found: Signature | None) -> Path:
    text = repr((_CACHE_FORMAT, str(path), found))
    return cache_folder() / "identities" / hashlib.sha256(text.encode()).hexdigest()[:32]


def read_verified(content: AdapterContent, weights: AdapterWeights) -> AdapterWeights:
    """Returns weights that were read for a content, if they are still that content.

    Raises:
        AdapterError: the directory holds something else by now.
    """
    if weights.identity != content.identity:
        raise AdapterError(
            f"{content.path} has changed since it was registered (it was "
            f"{content.identity[:19]}, it is {weights.identity[:19]}); load it again"
        )
    return weights
