"""The documents stay true: paths exist, commands exist, the table of ops is the code's."""

from __future__ import annotations

import argparse
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

    commands = below(parser())
    for word in re.findall(r"`?ultra ([a-z-]+)", (ROOT / "README.md").read_text()):
        assert word in commands, word


def below(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The commands of a parser by name."""
    found = [a.choices for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    return dict(found[0]) if found else {}


def test_options_named_in_documents_exist() -> None:
    """`ultra COMMAND … --option` in a code block or in backticks: the command takes it."""
    from ultra.cli import parser

    commands = below(parser())
    seen = 0
    for doc in DOCS:
        text = doc.read_text(encoding="utf-8")
        code = re.findall(r"```\w*\n(.*?)```", text, re.S) + re.findall(
            r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.S)
        )
        for line in "\n".join(code).splitlines():
            for name, rest in re.findall(r"(?:^|[\s(])ultra ([a-z-]+)([^#&|;>]*)", line):
                if name in commands:
                    command = below(commands[name]).get(rest.split()[0] if rest.split() else "", commands[name])
                    known = {option for action in command._actions for option in action.option_strings}
                    for option in re.findall(r"(?<!\S)\[?(--[a-z][a-z-]*)", rest):
                        seen += 1
                        assert option in known, f"{doc.name}: ultra {name} {option}"
    assert seen >= 3


READS = re.compile(r"""environ(?:\.get\(|\.setdefault\(|\[)\s*["']((?:ULTRA_)\w+)["']""")


def test_variables_of_the_environment_are_read_and_documented() -> None:
    sources = [
        ROOT / "setup.py",
        *(p for top in ("ultra", "ultra_kernels", "bench") for p in (ROOT / top).rglob("*.py")),
    ]
    read = {name for p in sources for name in READS.findall(p.read_text(encoding="utf-8"))}
    assert {"ULTRA_BACKEND", "ULTRA_REQUIRE_EXT"} <= read
    texts = {str(doc.relative_to(ROOT)): doc.read_text(encoding="utf-8") for doc in DOCS}
    named = {(name, doc) for doc, text in texts.items() for name in re.findall(r"\bULTRA_[A-Z_]+\b", text)}
    assert not [(name, doc) for name, doc in named if name not in read]
    told = "\n".join([*texts.values(), (ROOT / "setup.py").read_text(encoding="utf-8").split('"""')[1]])
    assert not [name for name in read if name not in told]
