"""The keys file: who may ask this server, for what, and how much.

A key is 256 random bits, shown once; the file holds its SHA-256. A slow hash protects passwords,
which people choose and others can guess; nobody can try 2**256 keys, and a fast hash lets every
request be checked without costing the server more than it costs the sender.
"""

import hashlib
import json
import os
import secrets
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qlora_serve.errors import ConfigError
from qlora_serve.files import disk_errors, exclusive_lock, flush

Role = Literal["infer", "admin"]
KEY_PREFIX = "qls-"
_SECRET_BYTES = 32


class KeyRecord(BaseModel):
    """What the file says of one key; never the key itself."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    id: str = Field(pattern=r"^key_[0-9a-f]{12}$")
    """What logs call it."""
    name: str = Field(min_length=1, max_length=128)
    """Whose it is, for people."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Of the key."""
    created: str
    """When, in UTC."""
    revoked: str | None = None
    """Since when it opens nothing any more."""
    scopes: tuple[Role, ...] = ("infer",)
    """`infer` asks models, `admin` loads and unloads adapters."""
    adapters: tuple[str, ...] = ("*",)
    """Patterns of the names that it may use, such as `support-*`; others do not exist for it."""
    base: bool = True
    """Whether it may ask the base itself."""
    requests_per_minute: int | None = Field(default=None, ge=1)
    """No limit when null, as for all that follow."""
    tokens_per_minute: int | None = Field(default=None, ge=1)
    """Of prompts and answers together."""
    concurrent_requests: int | None = Field(default=None, ge=1)
    """Requests at once."""
    tokens_per_day: int | None = Field(default=None, ge=1)
    """Of prompts and answers together, from midnight to midnight in UTC."""

    def allows(self, adapter: str) -> bool:
        """Whether it may use an adapter of this name, be there one or not."""
        return any(fnmatchcase(adapter, pattern) for pattern in self.adapters)

    @property
    def sees_all(self) -> bool:
        """Whether there is no name that it may not use."""
        return "*" in self.adapters


class _KeysFile(BaseModel):
    model_config = ConfigDict(extra="forbid")

    version: Literal[1] = 1
    keys: tuple[KeyRecord, ...] = ()


def hash_key(key: str) -> str:
    """What the file holds of a key."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def read_keys(path: Path) -> tuple[KeyRecord, ...]:
    """Every key of a file, the revoked ones too.

    Raises:
        ConfigError: there is no such file, or it is not a keys file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        keys = _KeysFile.model_validate(content).keys
    except FileNotFoundError:
        raise ConfigError(
            f"no keys file at {path}; make one with `qlora-serve keys add NAME --keys {path}`"
        ) from None
    except OSError as error:
        raise ConfigError(f"cannot read the keys file {path}: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{path} is not a keys file: {where}: {first['msg']}") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not a keys file: {error}") from None
    for what in ("id", "sha256"):
        values = [getattr(key, what) for key in keys]
        if len(set(values)) < len(values):
            raise ConfigError(f"{path} is not a keys file: two keys have the same {what}")
    return keys


def add_key(path: Path, **fields: Any) -> tuple[str, KeyRecord]:
    """Makes a key and adds it to a file, which is made when it is not there.

    Args:
        path: the keys file.
        fields: of the `KeyRecord`.

    Returns:
        The key, which is nowhere else, and its record.

    Raises:
        ConfigError: a field does not fit, the name is taken, or the file is no keys file.
        OutputError: the file cannot be written.
    """
    key = KEY_PREFIX + secrets.token_urlsafe(_SECRET_BYTES)
    try:
        record = KeyRecord(
            id=f"key_{secrets.token_hex(6)}", sha256=hash_key(key), created=_now(), **fields
        )
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        raise ConfigError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    with _changing(path):
        keys = read_keys(path) if path.exists() else ()
        for other in keys:
            if other.name == record.name and other.revoked is None:
                raise ConfigError(
                    f"{path} already has a key called {record.name!r}; revoke it first, or choose "
                    "another name"
                )
        _write(path, (*keys, record))
    return key, record


def revoke_key(path: Path, wanted: str) -> KeyRecord:
    """Makes a key worthless; its record stays, so that logs can still be read.

    Args:
        path: the keys file.
        wanted: the key's id or name.

    Raises:
        ConfigError: no key that is in force is called that.
        OutputError: the file cannot be written.
    """
    with _changing(path):
        keys = read_keys(path)
        for place, key in enumerate(keys):
            if key.revoked is None and wanted in (key.id, key.name):
                revoked = key.model_copy(update={"revoked": _now()})
                _write(path, (*keys[:place], revoked, *keys[place + 1 :]))
                return revoked
    known = ", ".join(key.name for key in keys if key.revoked is None) or "none"
    raise ConfigError(f"no key in force is called {wanted!r} in {path}; there are: {known}")


@contextmanager
def _changing(path: Path) -> Iterator[None]:
    """Two changes at once would lose one of them."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.with_name(f".{path.name}.lock")
        with exclusive_lock(lock):
            yield


def _write(path: Path, keys: Iterable[KeyRecord]) -> None:
    """Puts the new file in the old one's place in one rename, readable for its owner only."""
    text = _KeysFile(keys=tuple(keys)).model_dump_json(indent=2) + "\n"
    # A link goes on pointing to where it did.
    target = path.resolve()
    descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        if target.exists():  # a server that runs as another user was allowed to read it
            old = target.stat()
            os.chmod(name, old.st_mode & 0o777)
            if (old.st_uid, old.st_gid) != (os.geteuid(), os.getegid()):
                os.chown(name, old.st_uid, old.st_gid)
        os.rename(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    flush(target.parent)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
