"""Where documents come from: a folder of files, a Hugging Face dataset, or the corpus inside Python itself.

A source yields `(text, cursor)`. The cursor is a tuple of ints that says where to go on *after* that
document, so a killed cache fill goes on at the raw position and never counts kept documents against raw
ones. What cannot be read is skipped, counted and listed, never dropped in silence.
"""

from __future__ import annotations

import abc
import ast
import csv
import gzip
import hashlib
import inspect
import itertools
import json
import logging
import os
import stat
import sys
import sysconfig
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, cast

from ultra.errors import UserError

if TYPE_CHECKING:
    from ultra.config import RunConfig

log = logging.getLogger(__name__)

Cursor = tuple[int, ...]

TABLES = (".parquet", ".jsonl", ".csv", ".tsv")
SUFFIXES = (".txt", *TABLES)
# A .txt block longer than this is cut at a line end: files of one document a line have no blank lines at all,
# and as one document they could neither be split into training and validation nor be held in memory.
TEXT_BLOCK_BYTES = 64 * 1024
HASH_WHOLE_BYTES = 64 * 2**20  # a larger file is hashed at its head, its tail and its mtime
PEEK_ROWS = 100  # rows looked at to find the text column of a file without a schema
MIN_DOCSTRING = 40  # characters; shorter docstrings are mostly "Return x."


class Skipped:
    """Counts of what a source could not use, by place and reason."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()

    def add(self, where: str, reason: str, count: int = 1) -> None:
        self.counts[where, reason] += count

    def __str__(self) -> str:
        shown = [f"{where}: {reason} ({count})" for (where, reason), count in self.counts.most_common(20)]
        more = len(self.counts) - len(shown)
        return "; ".join(shown) + (f"; and {more} more places" if more > 0 else "")


class Source(abc.ABC):
    """Documents in a fixed order."""

    name: str  # for messages
    # False: the content may change while identity() stays (a remote dataset), so a cache that is to be filled
    # further is matched by fingerprint() again.
    exact_identity = True

    @abc.abstractmethod
    def identity(self) -> list[Any]:
        """What can be told without reading content (paths, sizes, mtimes), as JSON values."""

    @abc.abstractmethod
    def fingerprint(self) -> str:
        """Hash of the content, of what is read from it (the text column) and of the order.

        Raises UserError when the source or its text column is not there.
        """

    @abc.abstractmethod
    def _rows(self, cursor: Cursor | None, skipped: Skipped) -> Iterator[tuple[Any, Cursor, str]]:
        """(value, cursor after it, where it lies for messages); values may be anything."""

    def share_read(self, cursor: Cursor) -> float | None:
        """About how much of the source lies before `cursor`, 0 to 1; None when nobody knows."""
        return None

    def documents(self, cursor: Cursor | None, skipped: Skipped) -> Iterator[tuple[str, Cursor]]:
        """Usable texts after `cursor` (None = from the start); the others are counted in `skipped`."""
        for value, after, where in self._rows(cursor, skipped):
            if not isinstance(value, str):
                skipped.add(where, "null" if value is None else f"{type(value).__name__} instead of text")
            elif not value.strip():
                skipped.add(where, "empty")
            elif not _is_unicode(value):
                skipped.add(where, "not UTF-8")
            else:
                yield value, after


class Fields(NamedTuple):
    """What the user wrote a source with, for messages."""

    source: str
    column: str


SINGLE_PATH = Fields("training.local_parquet_dir", "training.text_column")
SINGLE_DATASET = Fields("training", "training.text_column")


def open_sources(cfg: RunConfig) -> list[Source]:
    """The sources that the config names: `sources`, else local_parquet_dir, else dataset_name, else the built-in
    corpus."""
    t = cfg.training
    if not t.sources:
        return [_open_source(t.local_parquet_dir, t.dataset_name, t.dataset_config, t.dataset_split, t.text_column)]
    return [
        _open_source(s.path, s.dataset_name, s.dataset_config, s.dataset_split, s.text_column, number=i)
        for i, s in enumerate(t.sources)
    ]


def _open_source(
    path: str | None, dataset: str | None, config: str | None, split: str, column: str | None, number: int | None = None
) -> Source:
    """number: its place in `sources`, for messages."""
    section = f"training.sources[{number}]"
    if path is not None:
        fields = SINGLE_PATH if number is None else Fields(f"{section}.path", f"{section}.text_column")
        return FileSource(Path(path).expanduser(), column, fields)
    if dataset is not None:
        fields = SINGLE_DATASET if number is None else Fields(section, f"{section}.text_column")
        return HuggingFaceSource(dataset, config, split, column, fields)
    return BuiltinSource()


def _is_unicode(text: str) -> bool:
    """False for lone surrogates, which undecodable bytes and broken JSON escapes become."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, ensure_ascii=True).encode()).hexdigest()


class BuiltinSource(Source):
    """Python's own documentation: `pydoc_data.topics` and the docstrings of the standard library.

    Read with `ast` from the source files, never imported; topics by name, then docstrings by path and
    position. About 7,000 documents and 2 MB of technical English, the same for everyone with the same
    Python version.
    """

    name = "the built-in corpus (Python's documentation)"

    def __init__(self, root: Path | None = None) -> None:
        self.root = root or Path(sysconfig.get_path("stdlib"))
        self._documents: list[str] | None = None

    def _files(self) -> list[Path]:
        # site-packages differs from machine to machine; tests and character tables hold no prose
        left_out = {
            "site-packages",
            "dist-packages",
            "test",
            "tests",
            "idle_test",
            "encodings",
            "__pycache__",
        }
        files: list[Path] = []
        for folder, below, names in os.walk(self.root):
            below[:] = [name for name in below if name not in left_out]
            files += [Path(folder, name) for name in names if name.endswith(".py")]
        return sorted(files, key=lambda p: p.relative_to(self.root).as_posix())

    def identity(self) -> list[Any]:
        stats = [(p.relative_to(self.root).as_posix(), p.stat()) for p in self._files()]
        return ["builtin", sys.version, [[name, s.st_size, s.st_mtime_ns] for name, s in stats]]

    def fingerprint(self) -> str:
        return _hash(["builtin", self._collect()])

    def _collect(self) -> list[str]:
        if self._documents is None:
            topics = self.root / "pydoc_data" / "topics.py"
            texts = _topics(topics) if topics.is_file() else []
            for path in self._files():
                if path != topics:
                    texts += _docstrings(path)
            self._documents = list(dict.fromkeys(texts))  # a docstring copied between modules counts once
        if not self._documents:
            raise UserError(
                f"this Python has no source files under {self.root}, so there is no built-in corpus; "
                "set training.local_parquet_dir or training.dataset_name"
            )
        return self._documents

    def share_read(self, cursor: Cursor) -> float | None:
        return cursor[0] / len(self._collect())

    def _rows(self, cursor: Cursor | None, skipped: Skipped) -> Iterator[tuple[Any, Cursor, str]]:
        documents = self._collect()
        for i in range(cursor[0] if cursor else 0, len(documents)):
            yield documents[i], (i + 1,), "built-in corpus"


def _parse(path: Path) -> ast.Module | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old files have invalid escapes; they are not ours to fix
        try:
            return ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # templates and deliberate nonsense lie in the standard library too
            return None


def _topics(path: Path) -> list[str]:
    for node in getattr(_parse(path), "body", []):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            topics = ast.literal_eval(node.value)
            return [topics[name].strip() for name in sorted(topics)]
    return []


def _docstrings(path: Path) -> list[str]:
    tree = _parse(path)
    if tree is None:
        return []
    found = (ast.get_docstring(node, clean=False) for node in _documented(tree))
    texts = (inspect.cleandoc(text).strip() for text in found if text)
    return [text for text in texts if len(text) >= MIN_DOCSTRING]


def _documented(
    node: ast.AST,
) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """Modules, classes and functions in the order of the text.

    Only statements are looked into: ast.walk visits every expression and takes as long as parsing.
    """
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        yield node
    for part in ("body", "handlers", "orelse", "finalbody"):
        for child in getattr(node, part, ()):
            if isinstance(child, (ast.stmt, ast.ExceptHandler)):
                yield from _documented(child)


class FileSource(Source):
    """A folder of .parquet, .txt, .jsonl, .csv or .tsv files (the last four also as .gz), read in the order
    of their paths; or one such file.

    .txt: a document is a block between blank lines. Tables: a document is a row's text column, which is
    `text_column` or, without it, "text" or the only column that holds text.
    """

    def __init__(
        self,
        path: Path,
        text_column: str | None,
        fields: Fields = SINGLE_PATH,
    ) -> None:
        self.path, self.text_column, self.fields = path, text_column, fields
        self.name = str(path)
        try:
            folder = stat.S_ISDIR(path.stat().st_mode)
        except FileNotFoundError:
            raise UserError(f"{fields.source}={path} does not exist; give a folder or a file") from None
        except OSError as error:
            raise UserError(f"{fields.source}={path} cannot be read: {error.strerror}") from error
        self.root = path if folder else path.parent
        visible = _visible_files(path) if folder else [path]
        self.files = sorted((p for p in visible if _kind(p)), key=lambda p: p.relative_to(self.root).as_posix())
        if not self.files:
            others = ", ".join(sorted({p.suffix or p.name for p in visible})[:10]) or "nothing"
            raise UserError(
                f"{fields.source}={path} holds no {', '.join(SUFFIXES)} file, nor a .gz of one "
                f"(but .parquet); found: {others}"
            )
        self._columns: dict[Path, str | None] | None = None
        self._sizes: list[int] = []
        self._reading: IO[bytes] | None = None  # the text file that documents() is at

    def identity(self) -> list[Any]:
        stats = [(self._where(p), p.stat()) for p in self.files]
        listed = [[name, s.st_size, s.st_mtime_ns] for name, s in stats]
        return ["files", str(self.path.resolve()), self.text_column, listed]

    def fingerprint(self) -> str:
        columns = self._resolve_columns()
        return _hash(["files", [[self._where(p), columns.get(p), _file_digest(p)] for p in self.files]])

    def _where(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    def share_read(self, cursor: Cursor) -> float | None:
        self._sizes = self._sizes or [path.stat().st_size for path in self.files]
        sizes = self._sizes
        at, group, row = cursor
        inside = 0.0
        if _kind(self.files[at]) == ".parquet":
            import pyarrow.parquet as pq

            with suppress(*_DAMAGE), pq.ParquetFile(self.files[at]) as file:
                rows = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
                inside = sizes[at] * (sum(rows[:group]) + row) / max(1, sum(rows))
        elif self._reading is not None and self._reading.name == str(self.files[at]):
            with suppress(ValueError):  # closed meanwhile
                inside = self._reading.tell()
        return (sum(sizes[:at]) + inside) / max(1, sum(sizes))

    def _resolve_columns(self) -> dict[Path, str | None]:
        """Every table's text column, looked up before any text is read: a wrong name must not take hours.

        A file that cannot be read has no entry; documents() counts it when it comes to it.
        """
        if self._columns is None:
            self._columns = {}
            for path in self.files:
                if _kind(path) == ".txt":
                    self._columns[path] = None
                    continue
                try:
                    names, texts = _columns(path)
                except _DAMAGE as error:
                    _reraise_if_not_damage(error, path)
                    continue
                if names:
                    self._columns[path] = _choose_column(str(path), self.text_column, names, texts, self.fields.column)
        return self._columns

    def _rows(self, cursor: Cursor | None, skipped: Skipped) -> Iterator[tuple[Any, Cursor, str]]:
        columns = self._resolve_columns()
        first, group0, row0 = cursor or (0, 0, 0)
        for i in range(first, len(self.files)):
            path, where = self.files[i], self._where(self.files[i])
            group, row = (group0, row0) if i == first else (0, 0)
            if path not in columns:
                skipped.add(where, "unreadable or empty file")
                continue
            try:
                with ExitStack() as files:
                    if _kind(path) == ".parquet":
                        rows = _parquet_rows(path, str(columns[path]), group, row, where, skipped)
                    else:
                        self._reading = files.enter_context(open(path, "rb"))
                        rows = _text_rows(path, self._reading, columns[path], row, where, skipped)
                    for value, group, row in rows:
                        yield value, (i, group, row), where
            except _DAMAGE as error:
                _reraise_if_not_damage(error, path)
                skipped.add(where, f"unreadable from row {row} on: {_first_line(error)}")


def _visible_files(folder: Path) -> list[Path]:
    """Every file below `folder` but hidden ones. A folder that cannot be read is an error: without it the corpus would
    be another one."""

    def refuse(error: OSError) -> None:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from error

    found: list[Path] = []
    for root, below, names in os.walk(folder, onerror=refuse):
        below[:] = [name for name in below if not name.startswith(".")]
        found += [Path(root, name) for name in names if not name.startswith(".")]
    return [path for path in found if path.is_file()]


def _choose_column(where: str, wanted: str | None, names: list[str], texts: list[str], field: str) -> str:
    """The column to read: `wanted`; without it "text", or else the only one of `names` that holds text."""
    listed = ", ".join(repr(name) for name in names)
    if wanted is not None:
        if wanted not in names:
            raise UserError(f"{where}: no column {field}={wanted!r}; its columns are {listed}")
        return wanted
    if "text" in texts:
        return "text"
    if len(texts) != 1:
        what = "several columns hold text" if texts else "no column holds text"
        raise UserError(f"{where}: {what}; set {field} to one of {listed}")
    return texts[0]


# pyarrow's errors are OSError, ValueError or their subclasses; csv.Error and zlib.error stand alone
_DAMAGE = (OSError, EOFError, ValueError, NotImplementedError, zlib.error, csv.Error)


def _reraise_if_not_damage(error: Exception, path: Path) -> None:
    """A file that is gone or a disk that fails is no bad data: skipping it would change the corpus unseen.

    pyarrow and gzip report damaged content as OSError without an errno.
    """
    if isinstance(error, OSError) and error.errno is not None:
        raise UserError(f"cannot read {path}: {error}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _kind(path: Path) -> str | None:
    """The format by suffix, .gz aside; None when it is not one of ours."""
    name = path.name.lower()
    suffix = Path(name.removesuffix(".gz")).suffix
    if suffix not in SUFFIXES or (suffix == ".parquet" and name.endswith(".gz")):
        return None
    return suffix


def _file_digest(path: Path) -> str:
    size, digest = path.stat().st_size, hashlib.sha256()
    with open(path, "rb") as f:
        if size <= HASH_WHOLE_BYTES:
            while block := f.read(1 << 20):
                digest.update(block)
        else:
            digest.update(f"{size} {path.stat().st_mtime_ns} ".encode())
            digest.update(f.read(HASH_WHOLE_BYTES // 2))
            f.seek(-HASH_WHOLE_BYTES // 2, 2)
            digest.update(f.read())
    return digest.hexdigest()


def _decompressed(path: Path, raw: IO[bytes]) -> IO[bytes]:
    return cast("IO[bytes]", gzip.GzipFile(fileobj=raw)) if path.name.lower().endswith(".gz") else raw


def _records(path: Path, raw: IO[bytes]) -> Iterator[Any]:
    file = _decompressed(path, raw)
    if _kind(path) == ".txt":
        return _blocks(file)
    return _json_records(file) if _kind(path) == ".jsonl" else _csv_records(file, _delimiter(path))


def _delimiter(path: Path) -> str:
    return "\t" if ".tsv" in path.name.lower() else ","


def _columns(path: Path) -> tuple[list[str], list[str]]:
    """(all column names, those that hold text)."""
    kind = _kind(path)
    if kind == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        def is_text(t: Any) -> bool:
            if pa.types.is_dictionary(t):
                t = t.value_type
            return bool(pa.types.is_string(t) or pa.types.is_large_string(t))

        schema = pq.read_schema(path)
        return list(schema.names), [f.name for f in schema if is_text(f.type)]
    names: dict[str, None] = {}  # in order of appearance
    texts: dict[str, None] = {}
    with open(path, "rb") as raw:
        for record in itertools.islice((r for r in _records(path, raw) if isinstance(r, dict)), PEEK_ROWS):
            for key, value in record.items():
                names[key] = None
                if isinstance(value, str) and value and (kind == ".jsonl" or not _is_number(value)):
                    texts[key] = None
    return list(names), list(texts)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _parquet_rows(
    path: Path, column: str, group: int, row: int, where: str, skipped: Skipped
) -> Iterator[tuple[Any, int, int]]:
    """(value, row group, row after it). A damaged row group costs that group only."""
    import pyarrow.parquet as pq

    # pyarrow.dataset would be shorter, but it can hang at interpreter exit; ParquetFile does not
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        for g in range(group, file.num_row_groups):
            skip, at = (row, row) if g == group else (0, 0)
            try:
                for batch in file.iter_batches(batch_size=1024, row_groups=[g], columns=[column]):
                    values = batch.column(0)
                    if skip >= len(values):
                        skip -= len(values)
                        continue
                    for value in _strings(values[skip:]):
                        at += 1
                        yield value, g, at
                    skip = 0
            except _DAMAGE as error:
                _reraise_if_not_damage(error, path)
                skipped.add(where, f"row group {g} unreadable from row {at} on: {_first_line(error)}")


def _strings(values: Any) -> list[Any]:
    """An arrow array as Python values; undecodable strings become text with lone surrogates, a bad row
    each.
    """
    import pyarrow as pa

    try:
        return list(values.to_pylist())
    except UnicodeDecodeError:
        if pa.types.is_dictionary(values.type):
            values = values.dictionary_decode()
        raw = values.cast(pa.large_binary()).to_pylist()
        return [None if b is None else b.decode("utf-8", "surrogateescape") for b in raw]


def _text_rows(
    path: Path, raw: IO[bytes], column: str | None, row: int, where: str, skipped: Skipped
) -> Iterator[tuple[Any, int, int]]:
    """(value, 0, row after it) of .txt, .jsonl and .csv files, opened as `raw`, from raw row number `row` on.

    The rows before it are read again and dropped: gzip cannot seek, and parsing is cheap beside tokenising.
    """
    kind = _kind(path)
    for number, record in enumerate(_records(path, raw)):
        if number < row:
            continue
        if kind == ".txt":
            yield record, 0, number + 1
        elif isinstance(record, dict) and column in record:
            yield record[column], 0, number + 1
        else:
            skipped.add(where, record if isinstance(record, str) else f"row without column {column!r}")


def _blocks(file: IO[bytes]) -> Iterator[str]:
    block: list[bytes] = []
    size = 0
    for i, line in enumerate(file):
        line = line.removeprefix(b"\xef\xbb\xbf") if i == 0 else line
        blank = not line.strip()
        if not blank:
            block.append(line)
            size += len(line)
        if block and (blank or size >= TEXT_BLOCK_BYTES):
            yield _block_text(block)
            block, size = [], 0
    if block:
        yield _block_text(block)


def _block_text(lines: list[bytes]) -> str:
    return b"".join(lines).decode("utf-8", "surrogateescape").replace("\r\n", "\n").strip()


def _json_records(file: IO[bytes]) -> Iterator[Any]:
    """One object a line; a line that is none becomes a string with the reason."""
    for i, line in enumerate(file):
        line = line.removeprefix(b"\xef\xbb\xbf") if i == 0 else line
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
            yield "not UTF-8" if isinstance(error, UnicodeDecodeError) else "line that is not JSON"
            continue
        yield record if isinstance(record, dict) else "line that is not a JSON object"


def _csv_records(file: IO[bytes], delimiter: str) -> Iterator[Any]:
    """One dict a row, keyed by the header; a row that cannot be parsed becomes a string with the reason."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the default refuses documents above 128 KiB
    text = (line.decode("utf-8", "surrogateescape") for line in file)
    reader = csv.reader(text, delimiter=delimiter)
    header = next(reader, None)
    if header is None:
        return
    header[0] = header[0].removeprefix("\ufeff")
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield f"row that is not CSV: {_first_line(error)}"
            continue
        if row:
            yield dict(zip(header, row, strict=False))


class HuggingFaceSource(Source):
    """A dataset of the Hugging Face hub or a local dataset folder, streamed row by row to fill the cache.

    Nothing of `datasets` beyond plain iteration and skip is used: its shuffle buffer loses rows on resume.
    """

    exact_identity = False

    def __init__(
        self,
        dataset: str,
        config: str | None,
        split: str,
        text_column: str | None,
        fields: Fields = SINGLE_DATASET,
    ) -> None:
        self.dataset, self.config, self.split, self.text_column = dataset, config, split, text_column
        self.fields = fields
        self.name = f"the Hugging Face dataset {dataset!r} (config {config!r}, split {split!r})"

    def identity(self) -> list[Any]:
        return ["huggingface", self.dataset, self.config, self.split, self.text_column]

    def fingerprint(self) -> str:
        datasets = _import_datasets()
        column, _ = self._open()
        try:
            builder = datasets.load_dataset_builder(self.dataset, self.config)
        except Exception as error:
            raise self._failure(error) from error
        files = (builder.config.data_files or {}).get(self.split)
        # the hub's commit and etags, or the paths and mtimes of local files
        content = [str(f) for f in files] + [repr(files.origin_metadata)] if files is not None else []
        return _hash([self.identity(), builder.hash, content, column])

    def _open(self) -> tuple[str, Any]:
        """(text column, streaming dataset)."""
        datasets = _import_datasets()
        try:
            stream = datasets.load_dataset(self.dataset, self.config, split=self.split, streaming=True)
            features = stream.features
            row: dict[str, Any] = next(iter(stream), {}) if features is None else {}
        except Exception as error:
            raise self._failure(error) from error
        if features is not None:
            names = list(features)
            texts = [n for n in names if getattr(features[n], "dtype", None) in ("string", "large_string")]
        else:
            names = list(row)
            texts = [n for n in names if isinstance(row[n], str)]
        return _choose_column(self.name, self.text_column, names, texts, self.fields.column), stream

    def _failure(self, error: Exception) -> UserError:
        """`datasets` raises errors of four libraries, which differ between its versions; all say what went
        wrong.
        """
        return UserError(
            f"cannot read {self.name}: {_first_line(error)}. Check dataset_name, dataset_config and dataset_split of "
            f"{self.fields.source} and the network (HF_HUB_OFFLINE is respected); what the cache holds is kept, and "
            "a new start goes on from there. Without a network name a folder of files instead"
        )

    def _rows(self, cursor: Cursor | None, skipped: Skipped) -> Iterator[tuple[Any, Cursor, str]]:
        column, stream = self._open()
        at = cursor[0] if cursor else 0
        try:
            for row in stream.skip(at) if at else stream:
                at += 1
                yield row.get(column), (at,), self.dataset
        except UserError:
            raise
        except Exception as error:
            raise self._failure(error) from error


def _import_datasets() -> Any:
    # 1-2 s to import, and only this source needs it
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"training.dataset_name needs the package 'datasets' ({error}): pip install datasets"
        ) from error
    return datasets
