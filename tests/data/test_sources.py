"""Reading documents: formats, damage, columns, cursors."""

from __future__ import annotations

import csv
import gzip
import json
import random
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ultra.data import open_data
from ultra.data.sources import TEXT_BLOCK_BYTES, BuiltinSource, FileSource, HuggingFaceSource, Skipped, Source
from ultra.errors import UserError


def read(source: Source) -> tuple[list[str], dict[tuple[str, str], int]]:
    skipped = Skipped()
    return [text for text, _ in source.documents(None, skipped)], dict(skipped.counts)


def write_parquet(path: Path, values: list[str | None], group: int, **options: object) -> None:
    table = pa.table({"text": pa.array(values, pa.string()), "n": list(range(len(values)))})
    pq.write_table(table, path, row_group_size=group, compression="none", use_dictionary=False, **options)


def test_every_format_gives_the_same_documents(tmp_path: Path) -> None:
    wanted = ['first, with "quotes"', "second\nover two lines", "dritter – naïve", "fourth"]
    plain = "\n\n".join(wanted)
    (tmp_path / "a.txt").write_text(plain + "\n", encoding="utf-8")
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbf" + plain.replace("\n", "\r\n").encode() + b"\r\n \t\r\n\r\n")
    with gzip.open(tmp_path / "c.txt.gz", "wt", encoding="utf-8") as f:
        f.write(plain)
    (tmp_path / "d.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in wanted))
    for name, delimiter in (("e.csv", ","), ("f.tsv", "\t")):
        with open(tmp_path / name, "w", newline="", encoding="utf-8") as f:
            csv.writer(f, delimiter=delimiter).writerows([["id", "text"], *([i, t] for i, t in enumerate(wanted))])
    write_parquet(tmp_path / "g.parquet", list(wanted), group=3)
    got, skipped = read(FileSource(tmp_path, None))
    assert got == wanted * 7
    assert skipped == {}


def test_nothing_is_lost_between_a_cursor_and_the_rest(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [f"row {i}" if i % 5 else None for i in range(23)], group=4)
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"text": f"line {i}"}) for i in range(5)) + "\n{oops\n")
    (tmp_path / "c.txt").write_text("\n\n".join(f"block {i}" for i in range(4)))
    everything = list(FileSource(tmp_path, None).documents(None, Skipped()))
    assert len(everything) == 18 + 5 + 4
    for i, (_, cursor) in enumerate(everything):
        rest = FileSource(tmp_path, None).documents(cursor, Skipped())
        assert list(rest) == everything[i + 1 :]


def test_bad_rows_are_skipped_and_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(
        b'{"text": "good"}\n{"text": null}\n{"text": ""}\n{"text": 5}\n[1]\nnot json\n{"other": "x"}\n'
        b'{"text": "\xff\xfe"}\n{"text": "\\ud800 alone"}\n\n{"text": "also good"}\n'
    )
    (tmp_path / "b.txt").write_bytes(b"fine\n\nb\xffd\n\nfine too\n")
    (tmp_path / "c.csv").write_bytes(b'text\nok\n""\n"b\xffd"\n')
    got, skipped = read(FileSource(tmp_path, "text"))
    assert got == ["good", "also good", "fine", "fine too", "ok"]
    assert skipped == {
        ("a.jsonl", "null"): 1,
        ("a.jsonl", "empty"): 1,
        ("a.jsonl", "int instead of text"): 1,
        ("a.jsonl", "line that is not a JSON object"): 1,
        ("a.jsonl", "line that is not JSON"): 1,
        ("a.jsonl", "row without column 'text'"): 1,
        ("a.jsonl", "not UTF-8"): 2,
        ("b.txt", "not UTF-8"): 1,
        ("c.csv", "empty"): 1,
        ("c.csv", "not UTF-8"): 1,
    }


def test_bad_utf8_in_parquet_costs_one_row(tmp_path: Path) -> None:
    raw = pa.array([b"good", b"b\xffd", b"fine"], pa.binary())
    strings = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
    pq.write_table(pa.table({"text": strings}), tmp_path / "a.parquet")
    got, skipped = read(FileSource(tmp_path, None))
    assert got == ["good", "fine"]
    assert skipped == {("a.parquet", "not UTF-8"): 1}


def test_a_damaged_row_group_costs_that_group_only(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_parquet(path, [f"document number {i}" for i in range(40)], group=10, write_page_checksum=True)
    column = pq.ParquetFile(path).metadata.row_group(2).column(0)
    content = bytearray(path.read_bytes())
    at = column.data_page_offset + column.total_compressed_size - 5
    content[at] ^= 0xFF
    path.write_bytes(content)
    got, skipped = read(FileSource(path, None))
    assert got == [f"document number {i}" for i in range(40) if not 20 <= i < 30]
    [(where, reason)] = skipped
    assert where == "a.parquet" and "row group 2" in reason


def test_a_damaged_file_costs_that_file_only(tmp_path: Path) -> None:
    write_parquet(tmp_path / "b.parquet", ["good"], group=1)
    (tmp_path / "a.parquet").write_bytes((tmp_path / "b.parquet").read_bytes()[:-20])
    (tmp_path / "c.parquet").write_bytes(b"")
    packed = gzip.compress("\n\n".join(f"block {i} " + "x" * 40 for i in range(2000)).encode())
    (tmp_path / "d.txt.gz").write_bytes(packed[: len(packed) // 2])
    got, skipped = read(FileSource(tmp_path, None))
    assert got[0] == "good" and 1 < len(got) < 2000
    assert got[1:] == [f"block {i} " + "x" * 40 for i in range(len(got) - 1)]
    assert {where for where, _ in skipped} == {"a.parquet", "c.parquet", "d.txt.gz"}


def test_column_errors_list_the_columns(tmp_path: Path) -> None:
    pq.write_table(pa.table({"title": ["t"], "body": ["b"], "n": [1]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"text_column='txt'.*'title', 'body', 'n'"):
        FileSource(tmp_path, "txt").fingerprint()
    with pytest.raises(UserError, match=r"several columns hold text.*'title', 'body', 'n'"):
        FileSource(tmp_path, None).fingerprint()
    assert read(FileSource(tmp_path, "body"))[0] == ["b"]
    (tmp_path / "a.parquet").unlink()
    (tmp_path / "a.csv").write_text("n,words\n1,one\n2,two\n")
    assert read(FileSource(tmp_path, None))[0] == ["one", "two"]


@pytest.mark.parametrize("content", [None, {"a.pdf": b"x"}, {"a.parquet": b"PAR1 nonsense"}, {"a.txt": b"\n \n"}])
def test_a_folder_with_nothing_readable_is_the_users_error(tmp_path, make_cfg, content) -> None:
    folder = tmp_path / "nothing"
    if content is not None:
        folder.mkdir()
        for name, data in content.items():
            (folder / name).write_bytes(data)
    cfg = make_cfg(local_parquet_dir=str(folder))
    for _ in range(2):  # also when the first try has left a cache behind
        with pytest.raises(UserError, match="nothing"):
            open_data(cfg)


def test_long_blocks_are_cut_at_line_ends(tmp_path: Path) -> None:
    lines = [f"line {i} " + "y" * 100 for i in range(3 * TEXT_BLOCK_BYTES // 100)]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    got, _ = read(FileSource(tmp_path, None))
    assert len(got) >= 3
    assert max(map(len, got)) < TEXT_BLOCK_BYTES + 200
    assert "\n".join(got).split("\n") == lines


def test_a_row_of_ten_megabytes(tmp_path: Path) -> None:
    big = "word " * 2_000_000
    with open(tmp_path / "a.csv", "w", newline="") as f:
        csv.writer(f).writerows([["text"], [big], ["small"]])
    write_parquet(tmp_path / "b.parquet", [big], group=1)
    assert [len(t) for t in read(FileSource(tmp_path, None))[0]] == [len(big), 5, len(big)]


def test_fingerprint_follows_content_and_column(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"x": "one", "y": "two"}\n')
    first = FileSource(tmp_path, "x").fingerprint()
    assert FileSource(tmp_path, "x").fingerprint() == first
    assert FileSource(tmp_path, "y").fingerprint() != first
    path.write_text('{"x": "0ne", "y": "two"}\n')
    assert FileSource(tmp_path, "x").fingerprint() != first


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "txt.gz", "builtin"])
def test_the_share_that_was_read_grows_to_one(tmp_path: Path, kind: str) -> None:
    numbers = random.Random(0)  # gzip must not make it one block
    rows = [f"row {i} " + numbers.randbytes(700).hex() for i in range(600)]
    if kind == "parquet":
        write_parquet(tmp_path / "a.parquet", list(rows), group=50)
    elif kind == "jsonl":
        (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in rows))
        (tmp_path / "b.txt").write_text("x" * 1000)
    else:
        with gzip.open(tmp_path / "a.txt.gz", "wt") as f:
            f.write("\n\n".join(rows))
    source = BuiltinSource() if kind == "builtin" else FileSource(tmp_path, None)
    shares = [source.share_read(cursor) for _, cursor in source.documents(None, Skipped())]
    assert all(share is not None for share in shares) and shares == sorted(shares)
    assert shares[0] < 0.15 and 0.3 < shares[len(shares) // 2] < 0.7 and 0.99 < shares[-1] <= 1


def test_a_file_that_goes_away_is_not_taken_for_damage(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("text")
    source = FileSource(tmp_path, None)
    (tmp_path / "b.txt").unlink()
    with pytest.raises(UserError, match=r"cannot read .*b\.txt"):
        read(source)


def test_builtin_corpus_is_prose_in_a_fixed_order() -> None:
    source = BuiltinSource()
    skipped = Skipped()
    documents = list(source.documents(None, skipped))
    assert len(documents) > 3000 and not skipped.counts
    assert sum(len(text) for text, _ in documents) > 1_000_000
    assert len({text for text, _ in documents}) == len(documents)
    assert list(source.documents(documents[99][1], skipped)) == documents[100:]


def test_builtin_corpus_reads_and_never_imports(tmp_path: Path) -> None:
    (tmp_path / "pydoc_data").mkdir()
    (tmp_path / "pydoc_data" / "topics.py").write_text("topics = {'b': 'B topic', 'a': 'A topic'}")
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "x.py").write_text('"""A module of somebody else, which must not be read."""')
    (tmp_path / "m.py").write_text(
        'raise SystemExit("imported")\n"""no docstring: it is not the first statement of this file"""\n'
        "class C:\n    def f(self):\n        '''A method docstring that is surely longer than forty.'''\n"
        "if 1:\n    def g():\n        'A function docstring under an if, longer than forty.'\n"
        "def h():\n    '''Too short.'''\n"
    )
    (tmp_path / "broken.py").write_text("def (")
    assert read(BuiltinSource(tmp_path))[0] == [
        "A topic",
        "B topic",
        "A method docstring that is surely longer than forty.",
        "A function docstring under an if, longer than forty.",
    ]


def test_builtin_corpus_missing_is_the_users_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="local_parquet_dir"):
        BuiltinSource(tmp_path).fingerprint()


def test_importing_data_does_not_import_datasets() -> None:
    code = "import ultra.data, sys; assert 'datasets' not in sys.modules and 'pyarrow' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_hugging_face_folder_streams_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))
    folder = tmp_path / "set"
    folder.mkdir()
    rows = [{"text": f"row {i}" if i != 3 else None, "n": i} for i in range(8)]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = HuggingFaceSource(str(folder), None, "train", None)
    skipped = Skipped()
    everything = list(source.documents(None, skipped))
    assert [t for t, _ in everything] == [f"row {i}" for i in range(8) if i != 3]
    assert skipped.counts.total() == 1
    assert list(source.documents(everything[3][1], skipped)) == everything[4:]
    assert source.fingerprint() == HuggingFaceSource(str(folder), None, "train", None).fingerprint()
    with pytest.raises(UserError, match="'nosuch'"):
        HuggingFaceSource(str(folder), None, "nosuch", None).fingerprint()
    with pytest.raises(UserError, match="'text', 'n'"):
        HuggingFaceSource(str(folder), None, "train", "body").fingerprint()
