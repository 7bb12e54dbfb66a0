"""A folder of adapters: each sub-directory is one, and its name is the adapter's name."""

import re
from pathlib import Path

from qlora_serve.adapters.files import CONFIG_FILE
from qlora_serve.errors import ConfigError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")


def check_name(name: str) -> str:
    """Returns `name` when it can name an adapter.

    Raises:
        ConfigError: it is empty, too long, or has a character that does not fit in a URL.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{name!r} cannot name an adapter; use letters, digits, '.', '_', ':' and '-', "
            "at most 128, beginning with a letter or digit"
        )
    return name


def find_adapters(folder: Path) -> dict[str, Path]:
    """The adapters in a folder, by name.

    Raises:
        ConfigError: the folder is missing, or a directory's name cannot name an adapter.
    """
    found, problems = find_usable(folder)
    if problems:
        raise ConfigError(problems[0])
    return found


def find_usable(folder: Path) -> tuple[dict[str, Path], list[str]]:
    """The adapters in a folder, by name, and what is wrong with the names of others.

    Raises:
        ConfigError: the folder is missing.
    """
    if not folder.is_dir():
        raise ConfigError(f"no folder of adapters at {folder}")
    found, problems = {}, []
    for path in sorted(folder.iterdir()):
        # Hidden directories are adapters that are still being written.
        if path.name.startswith(".") or not (path / CONFIG_FILE).is_file():
            continue
        try:
            found[check_name(path.name)] = path
        except ConfigError as error:
            problems.append(str(error))
    return found, problems
