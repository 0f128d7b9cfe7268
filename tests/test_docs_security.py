"""docs/security.md: every test that it names is there, and the library runs nothing that it reads."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
PACKAGE = ROOT / "sae_transformers"
# What would run a text or a file as code, or build it into a command.
RUNS = ("eval", "exec", "os.system", "os.popen", "pickle.load", "pickle.loads", "yaml.load", "yaml.unsafe_load",
        "yaml.full_load", "joblib.load", "marshal.loads", "dill.load", "cloudpickle.load")  # fmt: skip


def named() -> list[str]:
    return re.findall(r"`(tests/[\w/]+\.py::\w+)`", PAGE)


def test_each_promise_names_its_test() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith("| promise |")]
    assert len(rows) > 15 and all("`tests/" in row.split(" | ")[-1] for row in rows)


@pytest.mark.parametrize("name", sorted(set(named())))
def test_a_test_that_is_named_is_there(name: str) -> None:
    file, _, function = name.partition("::")
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    assert function in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def running_calls(source: str) -> list[str]:
    """Calls that run what they are given."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        called, given = ast.unparse(node.func), {one.arg: ast.unparse(one.value) for one in node.keywords}
        if called in RUNS or given.get("shell") == "True" or given.get("allow_pickle", "False") != "False":
            found.append(f"line {node.lineno}: {called}")
        if called in ("torch.load", "load") and "weights_only" in given and given["weights_only"] != "True":
            found.append(f"line {node.lineno}: {called}")
        if called == "torch.load" and "weights_only" not in given:
            found.append(f"line {node.lineno}: {called}")
    return found


CALLS = ("eval(x)", "yaml.load(f)", "run(x, shell=True)", "torch.load(f)", "pickle.load(f)",
         "torch.load(f, weights_only=False)", "numpy.load(f, allow_pickle=True)")  # fmt: skip


@pytest.mark.parametrize("call", CALLS)
def test_such_a_call_is_found(call: str) -> None:
    assert running_calls(call)


def test_the_library_runs_nothing_that_it_reads() -> None:
    found = {file.relative_to(ROOT).as_posix(): running_calls(file.read_text()) for file in PACKAGE.rglob("*.py")}
    assert not {name: calls for name, calls in found.items() if calls}
