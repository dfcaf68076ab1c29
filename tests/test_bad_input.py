"""Every command with input that a user gets wrong: a clear message on stderr, exit code 2, nothing lost."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import pytest

from ultra.cli import main, parser

RUN = "{run}"  # stands for a finished run folder
# command -> [(arguments, what the message must say)]; files are relative to a folder with an empty file `file`
BAD = {
    "train": [
        ("", "required: CONFIG"),
        ("nowhere.yaml", "no such file or preset; presets: embbert"),
        ("file", "file:1:1: empty file"),
        (".", "is a folder, not a YAML file"),
        ("quickstart model.num_layer=2", "unknown field; did you mean 'num_layers'?"),
        ("quickstart model.num_heads=5", "num_heads may be 3, 4, 6"),
        ("quickstart training.batch_size=two", "training.batch_size"),
        ("quickstart batch_size", "batch_size"),
        ("quickstart --run-dir file", "--run-dir file: File exists"),
        ("quickstart --run-dir file/below", "--run-dir file/below: Not a directory"),
        ("quickstart --run-dir new --resume nowhere", "nowhere: neither a run folder"),
        ("quickstart --run-dir {run} --resume never", "already holds checkpoints"),
        ("quickstart --run-dir new training.local_parquet_dir=nowhere", "training.local_parquet_dir=nowhere does not"),
        ("quickstart --run-dir new training.cache_dir=file/below", "training.cache_dir=file/below cannot be created"),
        ("quickstart --run-dir new training.tokenizer=file", "training.tokenizer=file is not a tokenizer.json"),
        ("quickstart --run-dir new training.device=mps", "training.device: mps is not available here"),
        ("quickstart --flag", "unrecognized arguments: --flag"),
    ],
    "eval": [("", "required: RUN"), ("nowhere", "no such folder"), ("{run} --samples 0", "not an integer above 0")],
    "fill-mask": [
        ("{run}", "required: TEXT"),
        ("nowhere x", "no such folder"),
        ("{run} text", "write [MASK]"),
        ("{run} [MASK] --top-k -1", "--top-k"),
    ],
    "embed": [
        ("{run}", "nothing to embed"),
        ("{run} --input nowhere", "--input nowhere"),
        ("{run} x --output vectors.txt", "name a .npy file"),
        ("{run} x --output no/such/folder/v.npy", "--output"),
    ],
    "export": [
        ("{run}", "required: OUT"),
        ("{run} --format onnx out", "invalid choice: 'onnx'"),
        ("nowhere --format ternary out", "no such folder"),
        ("{run} --format ternary out", "trained without BitNet"),
    ],
    "estimate": [("", "required: CONFIG"), ("nowhere", "no such file or preset"), ("mini model.x=1", "unknown field")],
    "verify": [("", "required: PATH"), ("nowhere", "no such folder"), ("file", "neither a run folder")],
    # these six at length in tests/data/test_commands.py
    "data inspect": [
        ("", "required: CONFIG"),
        ("nowhere", "no such file or preset"),
        ("mini --samples x", "--samples"),
    ],
    "data build": [("", "required: CONFIG"), ("mini training.cache_dir=file/x", "training.cache_dir=file/x cannot be")],
    "tokenizer train": [
        ("builtin", "required: --output"),
        ("nowhere --output t.json", "SOURCE=nowhere does not exist"),
    ],
    "cache ls": [("nowhere", "nowhere: no such folder"), ("file", "Not a directory")],
    "cache verify": [("nowhere", "nowhere: no such folder"), (".", "nothing to verify")],
    "cache rm": [("", "name what to remove"), (".", "give a KEY"), (". --all --yes", "nothing to remove")],
    "doctor": [("extra", "unrecognized arguments: extra")],
    "schema": [("extra", "unrecognized arguments: extra")],
    "config explain": [("", "required: FIELD"), ("hiden_size", "unknown field; did you mean 'model.hidden_size'?")],
}
CASES = [(command, *case) for command, cases in BAD.items() for case in cases]


def leaves(top: argparse.ArgumentParser, words: tuple[str, ...] = ()) -> Iterator[str]:
    """Every command of the parser, such as "config explain"."""
    below = [a.choices for a in top._actions if isinstance(a, argparse._SubParsersAction)]
    if not below:
        yield " ".join(words)
    for name, sub in below[0].items() if below else ():
        yield from leaves(sub, (*words, name))


def test_every_command_is_tried() -> None:
    assert set(BAD) == set(leaves(parser()))


@pytest.mark.parametrize(("command", "arguments", "message"), CASES, ids=[f"{c} {a}" for c, a, _ in CASES])
def test_bad_input(
    command: str, arguments: str, message: str, tiny_run: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    before = {p: p.stat().st_mtime_ns for p in tiny_run.rglob("*") if p.is_file() and p.suffix != ".lock"}
    words = [word.replace(RUN, str(tiny_run)) for word in arguments.split()]
    assert main([*command.split(), *words]) == 2
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err
    assert {p: p.stat().st_mtime_ns for p in before} == before
