"""`eval`, `fill-mask` and `embed` on a trained run, and what they say about bad input."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import ultra
from ultra.cli import main

TEXT = "The function returns a [MASK] of strings."


def test_eval_prints_json(tiny_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(tiny_run)]) == 0
    found = json.loads(capsys.readouterr().out)
    keys = "eval_loss eval_mask_loss eval_accuracy perplexity unigram_loss windows tokens eval_tokens"
    assert set(found) == set(keys.split())
    assert 4 < found["eval_loss"] < 7  # ln 512 = 6.2 at the start
    assert main(["eval", str(tiny_run), "--samples", "2", "--which", "best"]) == 0
    assert json.loads(capsys.readouterr().out)["windows"] == 2


def test_fill_mask_prints_ranked_tokens(tiny_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fill-mask", str(tiny_run), TEXT, "--top-k", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    values = [float(line.split()[0]) for line in lines]
    assert len(lines) == 3
    assert values == sorted(values, reverse=True)
    assert all(0 < value < 1 for value in values)
    for line, (token, _) in zip(lines, ultra.load(tiny_run).fill_mask(TEXT, top_k=3)[0], strict=True):
        assert line.split(maxsplit=1)[1] in (token.removeprefix(" "), repr(token))


def test_fill_mask_numbers_several_masks(tiny_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fill-mask", str(tiny_run / "checkpoints" / "step-00000003"), "[MASK] [MASK]"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [i for i, line in enumerate(lines) if line.startswith("mask")] == [0, 6]
    assert len(lines) == 12


def test_embed_prints_json_lines(tiny_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["embed", str(tiny_run), "one text", "zwölf"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["text"] for row in rows] == ["one text", "zwölf"]
    assert [len(row["embedding"]) for row in rows] == [32, 32]


def test_embed_reads_and_writes_files(tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines, out = tmp_path / "texts.txt", tmp_path / "vectors.npy"
    lines.write_text("first\nsecond text\n", encoding="utf-8")
    assert main(["embed", str(tiny_run), "zeroth", "--input", str(lines), "--output", str(out)]) == 0
    assert capsys.readouterr().out == f"3 embeddings in {out}\n"
    expected = ultra.load(tiny_run).embed(["zeroth", "first", "second text"])
    np.testing.assert_array_equal(np.load(out), expected)


def test_embed_takes_a_line_for_a_text(tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Lines end with a line feed alone: other separators of Unicode are part of a text. A byte order mark is not."""
    lines = tmp_path / "texts.txt"
    lines.write_bytes("\ufeffone\r\ntwo\u2028still two\x0cand still\nthree".encode())
    assert main(["embed", str(tiny_run), "--input", str(lines)]) == 0
    texts = [json.loads(line)["text"] for line in capsys.readouterr().out.split("\n") if line]
    assert texts == ["one", "two\u2028still two\x0cand still", "three"]
    lines.write_text("one\n \nthree\n")
    assert main(["embed", str(tiny_run), "--input", str(lines)]) == 2
    assert f"{lines}:2: the line is empty; remove it" in capsys.readouterr().err


@pytest.mark.parametrize(("backend", "said"), [("foo", "is unknown"), ("triton", "cannot run")])
def test_a_backend_that_cannot_run(
    backend: str, said: str, tiny_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("ULTRA_BACKEND", backend)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    code = main(["fill-mask", str(tiny_run), "a [MASK]"])
    err = capsys.readouterr().err
    assert code == 2 and said in err and f"ULTRA_BACKEND is {backend} in this environment" in err


def bad_run(kind: str, tiny_run: Path, folder: Path) -> Path:
    if kind == "missing":
        return folder / "nowhere"
    if kind == "empty":
        folder.mkdir()
        return folder
    shutil.copytree(tiny_run, folder)
    newest = folder / "checkpoints" / "step-00000006"
    shutil.rmtree(folder / "checkpoints" / "step-00000003")
    if kind == "no checkpoint":
        shutil.rmtree(newest)
    elif kind == "no checkpoints folder":
        shutil.rmtree(folder / "checkpoints")
    elif kind in ("flipped byte", "flipped byte, named"):
        weights = newest / "model.safetensors"
        content = bytearray(weights.read_bytes())
        content[len(content) // 2] ^= 1
        weights.write_bytes(content)
        return newest if kind == "flipped byte, named" else folder
    elif kind == "no manifest":
        (newest / "manifest.json").unlink()
        return newest
    return folder


BAD_RUNS = {
    "missing": "no such folder",
    "empty": "neither a run folder",
    "no checkpoint": "no whole checkpoint",
    "no checkpoints folder": "neither a run folder",
    "flipped byte": "no whole checkpoint",
    "flipped byte, named": "model.safetensors does not match its checksum",
    "no manifest": "manifest",
}


@pytest.mark.parametrize("kind", BAD_RUNS)
@pytest.mark.parametrize("command", [["eval"], ["fill-mask", TEXT], ["embed", "text"]], ids=lambda c: c[0])
def test_a_run_that_cannot_be_loaded(
    command: list[str], kind: str, tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = bad_run(kind, tiny_run, tmp_path / "run")
    assert main([command[0], str(run), *command[1:]]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(str(run))
    assert BAD_RUNS[kind] in err
    assert "Traceback" not in err


BAD_INPUT = {
    "no mask": (["fill-mask", "no mask here"], "write [MASK]"),
    "no text to fill": (["fill-mask", ""], "write [MASK]"),
    "too long": (["fill-mask", "é ö " * 70 + "[MASK]"], "this model takes 62"),
    "empty text": (["embed", "fine", ""], "text 2 of 2 is empty"),
    "blank text": (["embed", " "], "text 1 of 1 is empty"),
    "no text": (["embed"], "--input FILE"),
    "not an array": (["embed", "x", "--output", "out.json"], "name a .npy file"),
    "folder that is not there": (["embed", "x", "--output", "no/such/folder/out.npy"], "--output"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(case: str, tiny_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (command, *rest), message = BAD_INPUT[case]
    assert main([command, str(tiny_run), *rest]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert "Traceback" not in err


def test_a_reader_may_stop_early() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "ultra", "schema"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


ALLOCATOR = """
import resource, sys
sys.path.insert(0, sys.argv[1])
from ultra.cli import keep_freed_memory
done = sys.argv[2] == "yes" and keep_freed_memory()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
first = bytearray(64 * 2**20); del first
before = faults()
for _ in range(5):
    block = bytearray(64 * 2**20); del block
print(done, faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator is not glibc's")
def test_freed_memory_is_kept_unless_the_user_has_chosen() -> None:
    def run(wanted: str, **chosen: str) -> tuple[str, int]:
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "LD_PRELOAD", "GLIBC_"))}
        command = [sys.executable, "-c", ALLOCATOR, str(Path(__file__).parents[1]), wanted]
        done = subprocess.run(command, env=environment | chosen, capture_output=True, text=True, check=True)
        kept, faults = done.stdout.split()
        return kept, int(faults)

    # 64 MiB are 16384 pages of 4 KiB, or 32 of 2 MiB; kept, they are never touched for the first time again
    assert run("yes") == ("True", pytest.approx(0, abs=10))
    assert run("no")[1] > 100
    assert run("yes", MALLOC_ARENA_MAX="2")[0] == "False" == run("yes", GLIBC_TUNABLES="glibc.malloc.check=0")[0]
