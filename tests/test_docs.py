"""The documents stay true: paths exist, commands exist, the table of ops is the code's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = sorted(p for p in ROOT.glob("*.md")) + sorted(ROOT.glob("docs/*.md")) + sorted(ROOT.glob("bench/*.md"))
NAMED = re.compile(r"`((?:csrc|ultra|ultra_kernels|configs|tests|bench|docs|examples)/[\w./-]*)`")


@pytest.mark.parametrize("doc", DOCS, ids=lambda p: p.name)
def test_every_named_path_exists(doc: Path) -> None:
    missing = [path for path in NAMED.findall(doc.read_text()) if not (ROOT / path).exists()]
    assert not missing, missing


def test_links_lead_somewhere() -> None:
    for doc in DOCS:
        prose = re.sub(r"```.*?```", "", doc.read_text(), flags=re.S)
        for target in re.findall(r"\]\(([^)#:]+)\)", prose):
            assert (doc.parent / target).exists(), f"{doc.name}: {target}"


def test_commands_of_the_readme_exist() -> None:
    from ultra.cli import parser

    commands = next(a.choices for a in parser()._actions if a.choices)
    for word in re.findall(r"`?ultra ([a-z-]+)", (ROOT / "README.md").read_text()):
        assert word in commands, word
