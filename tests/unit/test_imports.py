"""Imports of the package go one way, and serving modules don't import the tools. Read from the sources."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "vllm_easyspec"
TOOLS = (f"{PACKAGE}.tune", f"{PACKAGE}.bench")


def imported(source: str, known: set[str]) -> set[str]:
    """The modules among `known` that a module imports anywhere, except for typing only."""
    found: set[str] = set()
    for node in statements(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            prefixes = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
            found.update([next((prefix for prefix in prefixes if prefix in known), "")])
    return found - {""}


def statements(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        yield node
        if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
            yield from statements(node)


def sources() -> dict[str, str]:
    """By module."""
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text()
    return found


def graph(modules: dict[str, str]) -> dict[str, set[str]]:
    return {module: imported(source, set(modules)) - {module} for module, source in modules.items()}


def users_of_tools(modules: dict[str, set[str]]) -> dict[str, set[str]]:
    """Serving modules (all but the tools and their command) that import a tool."""
    serving = {name: uses for name, uses in modules.items() if not name.startswith((*TOOLS, f"{PACKAGE}.cli"))}
    return {name: found for name, uses in serving.items() if (found := {use for use in uses if use.startswith(TOOLS)})}


def test_there_are_no_circles():
    modules = graph(sources())
    assert len(modules) > 30 and modules[f"{PACKAGE}.speculator"] >= {f"{PACKAGE}.runtime", f"{PACKAGE}.settings"}
    TopologicalSorter(modules).prepare()


def test_what_serves_does_not_import_the_tools():
    modules = graph(sources())
    assert modules[f"{PACKAGE}.cli"] > {f"{PACKAGE}.tune.command", f"{PACKAGE}.bench.command"}
    assert users_of_tools(modules) == {}


def test_circles_and_users_of_tools_are_found_wherever_they_hide():
    modules = graph(
        {
            f"{PACKAGE}.a": f"def late():\n    from {PACKAGE} import b\n",
            f"{PACKAGE}.b": f"import {PACKAGE}.c\n",
            f"{PACKAGE}.c": f"if TYPE_CHECKING:\n    from {PACKAGE}.a import A\n",
            f"{PACKAGE}.tune.d": "",
            f"{PACKAGE}.e": f"try:\n    from {PACKAGE}.tune.d import D\nexcept ImportError:\n    pass\n",
        }
    )
    TopologicalSorter(modules).prepare()
    assert users_of_tools(modules) == {f"{PACKAGE}.e": {f"{PACKAGE}.tune.d"}}
    with pytest.raises(CycleError):
        TopologicalSorter(modules | {f"{PACKAGE}.c": {f"{PACKAGE}.a"}}).prepare()
