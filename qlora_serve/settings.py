"""Settings: built once from flags and a YAML file, checked, then frozen."""

import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from qlora_serve.errors import ConfigError, UsageError

SettingsT = TypeVar("SettingsT", bound="Settings")


class Settings(BaseModel):
    """A frozen group of settings; the sentence beneath a field is its help text."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


def load_settings(
    kind: type[SettingsT],
    file: Path | None,
    flags: Mapping[str, Any],
    positional: Collection[str] = (),
) -> SettingsT:
    """Builds `kind` from a YAML file and the flags that were given; flags win.

    Args:
        kind: the settings class.
        file: a YAML file whose keys are the flags' names, with dashes or underscores.
        flags: the given flags; a value of None means "not given".
        positional: those that the command line takes without a flag.

    Raises:
        UsageError: required settings are missing.
        ConfigError: the file cannot be read, or a key or value does not fit. All wrong keys are
            named at once.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    values = (_read_yaml(file, kind) if file is not None else {}) | given
    try:
        return kind(**values)
    except ValidationError as error:
        missing = [item["loc"][0] for item in error.errors() if item["type"] == "missing"]
        if missing:
            needed = ", ".join(
                str(name).upper() if name in positional else "--" + str(name).replace("_", "-")
                for name in missing
            )
            raise UsageError(
                f"missing: {needed} (on the command line, or as a key of the --config file)"
            ) from None
        reasons = (_describe(item, kind, file, given) for item in error.errors())
        raise ConfigError("; ".join(dict.fromkeys(reasons))) from None


def as_mapping(value: Any, split: Callable[[str, str], tuple[str, str, str]], expected: str) -> Any:
    """`NAME=VALUE`, once or several times, as a mapping; a mapping stays as it is.

    Args:
        value: what a flag or a YAML file gave.
        split: `str.partition`, or `str.rpartition` where names may hold a sign of equality.
        expected: the form of an item and an example of it, for the message.

    Raises:
        ValueError: an item is no pair, or a name is given twice.
    """
    if isinstance(value, dict):
        return value
    pairs: dict[str, str] = {}
    for item in [value] if isinstance(value, str) else value:
        name, equals, given = split(str(item), "=")
        if not (name and equals and given):
            raise ValueError(f"expected {expected}, not {item!r}")
        if name in pairs:
            raise ValueError(f"{name!r} is given twice")
        pairs[name] = given
    return pairs


def _read_yaml(file: Path, kind: type[Settings]) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"no config file at {file}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {file}: {error}") from None
    except yaml.YAMLError as error:
        line = " ".join(str(error).split())
        raise ConfigError(f"{file} is not YAML: {line}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(
            f"{file} holds a {type(content).__name__}; expected keys and values, like `rank: 16`"
        )
    return {str(key).replace("-", "_"): value for key, value in content.items()}


def _describe(item: Any, kind: type[Settings], file: Path | None, flags: Mapping[str, Any]) -> str:
    """One thing that is wrong, under the name that the user gave it: a flag, or a file's key."""
    name = ".".join(str(part) for part in item["loc"])
    is_flag = bool(item["loc"]) and item["loc"][0] in flags
    where = f"{file}: " if file is not None and not is_flag else ""
    if item["type"] == "extra_forbidden":
        known = ", ".join(sorted(kind.model_fields))
        return f"{where}{name!r} is not a setting; expected one of: {known}"
    message = item["msg"].removeprefix("Value error, ")
    if not name:
        return where + message
    if is_flag:
        name = "--" + str(item["loc"][0]).replace("_", "-")
    return f"{where}{name}: {message[0].lower() + message[1:]}, got {item['input']!r}"


_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_bytes(text: str) -> int:
    """A number of bytes from text such as `2GB`, `512MiB` or `1000000`.

    Raises:
        ValueError: the text is no size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in _UNITS:
        raise ValueError(f"expected a size such as 2GB or 512MiB, not {text!r}")
    return int(float(match[1]) * _UNITS[match[2].upper()])
