"""The page on security names tests that there are."""

from __future__ import annotations

import ast
import re

from testbed import paths

PAGE = (paths.ROOT / "docs/security.md").read_text()


def test_every_claim_has_a_test() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)
    assert len(named) >= 20
    rows = [line for line in PAGE.splitlines() if line.startswith("| a") and line.count("|") == 4]
    assert [row for row in rows if not re.search(r"`tests/[\w/]+\.py::\w+`", row)] == []
    for file, name in named:
        tree = ast.parse((paths.ROOT / file).read_text())
        assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
