"""The noxfile is a table of contents: it must read well, and what names it must be true."""

from __future__ import annotations

import ast
import re
import shlex
import tomllib
from pathlib import Path

import pytest

from tests.machines import fresh

ROOT = Path(__file__).parents[2]
SESSIONS = {
    node.name: node
    for node in ast.parse((ROOT / "noxfile.py").read_text()).body
    if isinstance(node, ast.FunctionDef)
    and any(ast.unparse(d).startswith("nox.session") for d in node.decorator_list)
}


def test_what_the_project_promises_is_there() -> None:
    assert set(SESSIONS) >= {"experiments", "figures", "tests", "lint", "bench", "history", "fresh"}


@pytest.mark.parametrize("name", SESSIONS)
def test_a_session_has_a_docstring_of_one_line(name: str) -> None:
    docstring = ast.get_docstring(SESSIONS[name])
    assert docstring is not None
    assert "\n" not in docstring
    assert docstring.endswith((".", ")."))


@pytest.mark.parametrize("name", SESSIONS)
def test_a_session_is_a_few_lines_and_only_runs_tools(name: str) -> None:
    session = SESSIONS[name]
    assert session.end_lineno is not None
    assert session.end_lineno - session.lineno < 12
    calls = [ast.unparse(c.func) for c in ast.walk(session) if isinstance(c, ast.Call)]
    assert {"run", "become"} & set(calls)
    assert not any(call.startswith("session.install") for call in calls)


@pytest.mark.parametrize(
    "text", ["README.md", "CONTRIBUTING.md", ".ci/run", ".github/workflows/ci.yml"]
)
def test_texts_name_only_sessions_that_exist(text: str) -> None:
    named = re.findall(r"nox (?:-\w+ )*-s ((?:\w+ ?)+)", (ROOT / text).read_text())
    assert {session for line in named for session in line.split()} <= set(SESSIONS)


def test_lint_compiles_all_c_that_nothing_else_checks() -> None:
    """tests.bpf.syntax compiles bpf/, and test_shim.py the shim, which needs macros."""
    [compiled] = re.findall(r"compiled = (\(.*\))", (ROOT / "noxfile.py").read_text())
    folders = ("agent", "bpf", "deploy", "osv")
    sources = [file for folder in folders for file in (ROOT / folder).rglob("*.c")]
    found = {str(file.parent.relative_to(ROOT)) for file in sources}
    assert found == {*ast.literal_eval(compiled), "bpf", "osv/shim"}


def test_contributors_are_told_of_all_sessions() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text().partition("\n## Sessions\n")[2]
    assert set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)) == set(SESSIONS)


def test_ci_runs_what_the_readme_says() -> None:
    assert "tests.machines fresh" in (ROOT / ".ci/run").read_text()
    assert f"# {shlex.join(fresh.COMMAND)} " in (ROOT / "README.md").read_text()


def test_every_python_dependency_says_why() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    lines = (ROOT / "pyproject.toml").read_text().splitlines()
    for requirement in wanted:
        assert any(re.match(rf'\s*"{re.escape(requirement)}",\s*# \w', line) for line in lines)
