"""A field that nobody reads is a bug: every one must occur as an attribute outside the consistency checks."""

from __future__ import annotations

import ast

from ultra.config import TrainingConfig, UltraConfig
from ultra.config.training import GROUPS, GroupOptim

from .conftest import ROOT


class Reads(ast.NodeVisitor):
    """Names read as attributes; `problems` methods only compare fields with one another."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        if node.name != "problems":
            self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if isinstance(node.ctx, ast.Load):
            self.names.add(node.attr)
        self.generic_visit(node)


def test_every_field_is_read() -> None:
    reads = Reads()
    for path in (ROOT / "ultra").rglob("*.py"):
        reads.visit(ast.parse(path.read_text(encoding="utf-8")))
    # lr_, wd_, betas_, eps_<group> are read together, by TrainingConfig.optim
    per_group = {f"{name}_{group}" for name in GroupOptim._fields for group in GROUPS}
    fields = (set(UltraConfig.model_fields) | set(TrainingConfig.model_fields)) - per_group
    assert fields - reads.names == set()
