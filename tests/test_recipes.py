"""CONTRIBUTING's recipes, followed to the letter in a copy of the tree: a new op, mixer, norm and preset.

The copy gets the blocks of CONTRIBUTING.md and nothing else, so the document cannot drift from the code.
"""

from __future__ import annotations

import filecmp
import json
import os
import re
import shutil
import subprocess
import sys
from itertools import groupby
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COPIED = (
    "ultra",
    "ultra_kernels",
    "configs",
    "tests",
    "bench",
    "csrc",
    "README.md",
    "ARCHITECTURE.md",
    "pyproject.toml",
)
HEADER = re.compile(r"^# ((?:ultra_kernels|ultra|tests|configs)/[\w/]+\.\w+).*$", re.MULTILINE)


def blocks(language: str) -> list[str]:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def new_files() -> dict[str, str]:
    """Path -> text of the files that the recipes write out."""
    found = {}
    for block in (*blocks("python"), *blocks("yaml")):
        _, *parts = HEADER.split(block)
        found |= dict(zip(parts[::2], parts[1::2], strict=True))
    return found


def changed_files(tree: Path) -> dict[str, str]:
    """Path -> new text of the files that the recipes change.

    New lines go after the line before them; at the start of a block, before the line after them.
    """
    changed: dict[str, str] = {}
    for block in blocks("diff"):
        for part in re.split(r"^--- ", block, flags=re.MULTILINE)[1:]:
            name, *lines = part.splitlines()
            text = changed.get(name) or (tree / name).read_text(encoding="utf-8")
            # in turn: lines that stay or go, lines that are new
            groups = [(new, list(group)) for new, group in groupby(lines, key=lambda line: line[0] == "+")]
            for i, (new, group) in enumerate(groups):
                if new:
                    anchor = groups[i - 1][1][-1] if i else groups[i + 1][1][0]
                    old = f"\n{anchor[1:]}\n"
                    assert text.count(old) == 1, f"{name}: {old!r} is not there exactly once"
                    added = "".join(line[1:] + "\n" for line in group)
                    parts = (old, added) if i else ("\n", added, old[1:])
                    text = text.replace(old, "".join(("\n", added) if anchor[0] == "-" else parts))
            changed[name] = text
    return changed


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository after the recipes, their commands included."""
    tree = tmp_path_factory.mktemp("recipes") / "tree"
    tree.mkdir()
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "build"))
        else:
            shutil.copy(ROOT / name, tree / name)
    for name, text in {**new_files(), **changed_files(tree)}.items():
        (tree / name).parent.mkdir(exist_ok=True)
        (tree / name).write_text(text, encoding="utf-8")
    run(tree, "-m", "bench.table")
    (tree / "configs" / "schema.yaml").write_text(run(tree, "-m", "ultra", "schema"), encoding="utf-8")
    return tree


def run(tree: Path, *command: str) -> str:
    env = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], cwd=tree, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def test_the_recipes_are_what_the_test_reads() -> None:
    assert len(new_files()) == 8
    # one fence more in the document than blocks above: the commands at its top
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    fences = len(re.findall(r"^```", text, re.MULTILINE))
    assert fences == 2 * (1 + sum(len(blocks(language)) for language in ("python", "diff", "yaml")))


def test_nothing_else_is_touched(tree: Path) -> None:
    def files(root: Path) -> set[str]:
        paths = (p for name in COPIED for p in ([root / name] if (root / name).is_file() else (root / name).rglob("*")))
        return {p.relative_to(root).as_posix() for p in paths if p.is_file() and "__pycache__" not in p.parts}

    before, after = files(ROOT), files(tree)
    assert after - before == set(new_files())
    differ = {name for name in before & after if not filecmp.cmp(ROOT / name, tree / name, shallow=False)}
    assert differ == {*changed_files(ROOT), "README.md", "configs/schema.yaml"}


def test_the_suites_find_and_pass_the_new_parts(tree: Path) -> None:
    suites = [
        "tests/ops/test_all_ops.py", "tests/ops/test_softcap.py", "tests/model/test_invariants.py",
        "tests/config/test_fields.py", "tests/config/test_model_fields_act.py", "tests/test_layout.py",
        "tests/test_readme_table.py", "tests/config/test_cli.py::test_schema_prints_the_committed_file",
    ]  # fmt: skip
    own = "softcap or ema or affine or test_fields or every_field or table or schema or (layout and not import)"
    out = run(tree, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *suites, "-k", own, "--junitxml=report.xml")
    assert " passed" in out
    names = re.findall(r'testcase classname="[^"]*" name="([^"]*)"', (tree / "report.xml").read_text())
    counts = {part: sum(part in name for name in names) for part in ("[softcap", "[ema", "[norm-affine")}
    # op: 2 cases x 3 dtypes + the bench case, opcheck, contract, refusal; mixer and norm: the invariants
    assert counts["[softcap"] >= 10 and min(counts["[ema"], counts["[norm-affine"]) >= 7, counts


def test_the_new_preset_trains_by_name(tree: Path) -> None:
    overrides = ["training.device=cpu", "training.max_samples=60", "training.dataloader_workers=0",
                 "training.eval_samples=4", "training.num_workers=1", "training.cache_dir=cache"]  # fmt: skip
    run(tree, "-m", "ultra", "train", "pocket", "--run-dir", "run", *overrides)
    rows = [json.loads(line) for line in (tree / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 4 and all(5 < loss < 7.5 for loss in losses)  # ln 512 = 6.2
    schema = (tree / "configs" / "schema.yaml").read_text()
    assert "sigmoid_attn, ema]" in schema and "derf, affine]" in schema and "ema_window:" in schema
