from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import ultra
from ultra.cli import main
from ultra_kernels._version import __version__

from .conftest import ROOT

BAD = {
    "typo": ("training:\n  lr_embedings: 1e-3\n", "2:3", "did you mean 'lr_embeddings'?"),
    "wrong type": ("model:\n  hidden_size: wide\n", "2:3", "allowed: an integer >= 1"),
    "out of range": ("model:\n  dropout: 1.5\n", "2:3", "allowed: a number >= 0 and < 1"),
    "unknown mixer": ("model:\n  layer_pattern: [rettnet]\n", "2:19", "did you mean 'retnet'?"),
    "duplicate key": ("model:\n  hidden_size: 64\n  hidden_size: 64\n", "3:3", "delete one of the two"),
    "heads": ("model:\n  num_heads: 7\n", "2:3", "num_heads may be 4, 6, 8"),
    "heads left out": ("model:\n  hidden_size: 100\n", "1:1", "num_heads may be 2, 5, 10"),
    "empty file": ("", "1:1", "such as `training: {batch_size: 4}`"),
    "list instead of map": ("- model\n- training\n", "1:1", "such as `training: {batch_size: 4}`"),
}


@pytest.mark.parametrize("command", ["train", "estimate"])
@pytest.mark.parametrize("case", BAD)
def test_bad_files_exit_2_with_place_and_hint(
    case: str, command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, place, hint = BAD[case]
    path = tmp_path / "bad.yaml"
    path.write_text(text, encoding="utf-8")
    assert main([command, str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"{path}:{place}: ")
    assert hint in err
    assert "Traceback" not in err


def run(*args: str, code: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code] if code else [sys.executable, "-m", "ultra", *args]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, check=False)


def test_bad_override_in_a_process_of_its_own() -> None:
    done = run("train", "mini", "--run-dir", "unused", "training.batchsize=2")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        "override 'training.batchsize=2': training.batchsize: unknown field; did you mean 'batch_size'?\n"
    )


def test_help_needs_neither_torch_nor_pydantic() -> None:
    code = (
        "import sys; from ultra.cli import main\n"
        "assert main(['--help']) == main(['train', '--help']) == 0\n"
        "heavy = {'torch', 'numpy', 'pydantic', 'yaml', 'tokenizers', 'triton'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    done = run(code=code)
    assert done.returncode == 0, done.stderr
    for command in ("train", "eval", "fill-mask", "embed", "estimate", "doctor", "schema", "config"):
        assert f"    {command}" in done.stdout


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["trian", "mini"],
        ["train"],
        ["train", "mini", "--lr", "3"],
        ["train", "no/such/file.yaml"],
        ["fill-mask", "run", "text", "--top-k", "0"],
        ["schema", "extra"],
        ["config", "explain", "nothing_like_it"],
        ["embed", "run"],
        ["embed", "run", "text", "--output", "vectors.csv"],
        ["embed", "run", "--input", "no/such/file"],
    ],
)
def test_usage_errors_exit_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    assert capsys.readouterr().err


def test_schema_prints_the_committed_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    assert capsys.readouterr().out == (ROOT / "configs" / "schema.yaml").read_text(encoding="utf-8")


def test_explain(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "explain", "training.lr_ode"]) == 0
    assert capsys.readouterr().out.startswith("training.lr_ode\n  Peak learning rate of the ode group.\n")


def test_version_is_the_one_of_the_distribution(capsys: pytest.CaptureFixture[str]) -> None:
    assert ultra.__version__ == __version__
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"ultra {__version__}\n"


def test_overrides_before_and_after_options(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, list[str]]] = []

    def load_config(path: str, overrides: list[str]) -> None:
        seen.append((path, list(overrides)))
        raise KeyboardInterrupt

    monkeypatch.setattr("ultra.config.load.load_config", load_config)
    argv = ["train", "mini", "a.b=1", "--run-dir", "x", "c.d=2", "--resume", "never", "e.f=3"]
    assert main(argv) == 130
    assert seen == [("mini", ["a.b=1", "c.d=2", "e.f=3"])]
