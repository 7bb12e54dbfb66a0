"""Where rows come from: files of four kinds, and data sets of a hub; read row by row.

Nothing is said here about what a row means: see `formats`. What cannot be read is a `Problem` with
its place, so that a check can list them all.
"""

import csv
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_serve.errors import DataError
from qlora_serve.wording import counted

FILE_KINDS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
_WEIGHTED = re.compile(r"(?P<name>.+):(?P<weight>\d+(?:\.\d+)?|\.\d+)")
_DATASET = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(?:@(?P<config>[^#]+))?(?:#(?P<split>.+))?")
_PARQUET_BATCH = 1024
_CELL_LIMIT = 2**31 - 1  # the csv module refuses cells of more than 128 KiB unless told


@dataclass(frozen=True)
class Problem:
    """A row that cannot be used."""

    where: str
    """The file and the line or row number."""
    reason: str

    def __str__(self) -> str:
        return f"{self.where} {self.reason}"


@dataclass(frozen=True)
class Source:
    """One `--data`: where to read, and how much of it to take."""

    name: str
    """A file, a directory, `org/name`, `hub:org/name` or `modelscope:org/name`."""
    weight: float = 1.0
    """How often its rows are taken: 0.3 is three tenths of them, 2 is each twice."""


@dataclass(frozen=True)
class RawRows:
    """An open source."""

    rows: Iterator["tuple[Any, str] | Problem"]
    """Each row as it was stored with its place, or why it could not be read."""
    sha256: str
    """Of the file's bytes, or of a data set's fingerprint, in hexadecimal."""


def parse_source(text: str) -> Source:
    """Reads `NAME` or `NAME:WEIGHT`.

    A name that exists as it stands is never split.

    Raises:
        ValueError: the weight is zero, or there is no name.
    """
    if not text.strip():
        raise ValueError("a data source needs a name")
    match = _WEIGHTED.fullmatch(text)
    if match is None or Path(text).exists():
        return Source(text)
    weight = float(match["weight"])
    if weight <= 0:
        raise ValueError(f"the weight of {match['name']} must be above 0; leave the source out")
    return Source(match["name"], weight)


def open_source(source: Source) -> RawRows:
    """Opens a source.

    Raises:
        DataError: there is nothing to read, or it is of a kind that is not known.
    """
    path = Path(source.name).expanduser()
    if path.is_file():
        return _open_file(path)
    if path.is_dir():
        if path.suffix in FILE_KINDS:
            raise DataError(f"cannot read {path}: it is a directory")
        return _open_dataset(str(path), None, "train", f"{path}")
    hub, _, rest = source.name.rpartition(":")
    match = _DATASET.fullmatch(rest)
    if hub not in ("", "hub", "modelscope") or match is None or _is_file_name(rest, hub):
        raise DataError(f"no data file at {source.name}")
    split = match["split"] or "train"
    if hub == "modelscope":
        return _open_modelscope(match["id"], match["config"], split)
    return _open_dataset(match["id"], match["config"], split, source.name)


def _is_file_name(name: str, hub: str) -> bool:
    return not hub and Path(name).suffix.lower() in FILE_KINDS


def _open_file(path: Path) -> RawRows:
    kind = path.suffix.lower()
    if kind not in FILE_KINDS:
        raise DataError(
            f"{path} is a {path.suffix or 'nameless'} file; expected one of: "
            f"{', '.join(FILE_KINDS)}"
        )
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None
    if not content.strip():
        raise DataError(f"{path} is empty")
    digest = hashlib.sha256(content).hexdigest()
    readers: dict[str, Callable[[Path, bytes], Iterator[tuple[Any, str] | Problem]]] = {
        ".jsonl": _lines,
        ".json": _json,
        ".csv": _table,
        ".tsv": _table,
        ".parquet": _parquet,
    }
    return RawRows(readers[kind](path, content), digest)


def _lines(path: Path, content: bytes) -> Iterator[tuple[Any, str] | Problem]:
    # Split at "\n" alone: JSON strings may hold other line separators, such as U+2028.
    for number, line in enumerate(content.split(b"\n"), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                yield _parse(_decode(line)), where
            except ValueError as error:
                yield Problem(where, str(error))


def _json(path: Path, content: bytes) -> Iterator[tuple[Any, str] | Problem]:
    try:
        text = _decode(content)
        if text.lstrip().startswith("{") and _is_json(text.lstrip().split("\n", 1)[0]):
            yield from _lines(path, content)  # JSON Lines under another name
            return
        items = _parse(text)
    except ValueError as error:
        raise DataError(f"{path} {error}") from None
    if not isinstance(items, list):
        raise DataError(
            f"{path} holds {kind_of(items)}; expected an array of rows, or one row a line"
        )
    for number, item in enumerate(items, start=1):
        yield item, f"{path}, row {number}"


def _table(path: Path, content: bytes) -> Iterator[tuple[Any, str] | Problem]:
    try:
        text = _decode(content)
    except ValueError as error:
        raise DataError(f"{path} {error}") from None
    csv.field_size_limit(_CELL_LIMIT)
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    columns: list[str] = []
    line = 1
    try:
        for cells in reader:
            where, line = f"{path}, line {line}", reader.line_num + 1
            if not any(cell.strip() for cell in cells):
                continue
            if not columns:
                columns = [name.strip().lower() for name in cells]
            elif len(cells) != len(columns):
                yield Problem(
                    where, f"has {counted(len(cells), 'cell', 'cells')}; expected {len(columns)}"
                )
            else:
                yield dict(zip(columns, cells, strict=True)), where
    except csv.Error as error:
        yield Problem(f"{path}, line {line}", f"is not CSV: {error}")


def _parquet(path: Path, content: bytes) -> Iterator[tuple[Any, str] | Problem]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(content))
        number = 0
        for batch in file.iter_batches(_PARQUET_BATCH):
            for row in batch.to_pylist():
                number += 1
                yield row, f"{path}, row {number}"
    except pyarrow.ArrowException as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{path} is not a Parquet file: {reason}") from None


def _open_dataset(name: str, config: str | None, split: str, where: str) -> RawRows:
    """A data set of the Hugging Face hub, or a local directory in one of its layouts."""
    import datasets

    datasets.disable_progress_bars()
    try:
        loaded = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # it raises a dozen kinds, and of any library below it
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"no data at {where!r}: not a file, and not to be loaded ({reason})") from (
            error
        )
    rows = ((row, f"{where}, row {number}") for number, row in enumerate(loaded, start=1))
    digest = hashlib.sha256()
    for table in loaded.data.table.to_batches():
        for column in table.columns:
            for buffer in column.buffers():
                digest.update(buffer or b"")
    return RawRows(rows, digest.hexdigest())


def _open_modelscope(name: str, config: str | None, split: str) -> RawRows:
    where = f"modelscope:{name}"
    try:
        from modelscope.msdatasets import MsDataset
    except ImportError:
        raise DataError(f"{where} needs modelscope: pip install 'modelscope[datasets]'") from None
    try:
        loaded = MsDataset.load(name, subset_name=config or "default", split=split)
        rows = [dict(row) for row in loaded]
    except Exception as error:  # as above
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"no data at {where!r}: ModelScope does not give it ({reason})") from error
    text = json.dumps(rows, ensure_ascii=False, sort_keys=True, default=str)
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    return RawRows(
        ((row, f"{where}, row {number}") for number, row in enumerate(rows, start=1)), digest
    )


def _decode(content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 text (byte {error.start})") from None


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        # Of one line of a file, the file's line has been named already.
        line = f"line {error.lineno}, " if "\n" in text else ""
        raise ValueError(f"is not JSON: {error.msg} ({line}column {error.colno})") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON: {error}") from None


def _is_json(text: str) -> bool:
    try:
        _parse(text)
    except ValueError:
        return False
    return True


def kind_of(value: Any) -> str:
    """What a JSON value is, in words."""
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean"}
    if value is None:
        return "nothing"
    return names.get(type(value), "a number")
