"""The rules of the folders, read from the source with `ast`: who imports whom, in which form, and how long a file is.

`modeling/` is published as remote code. Its rules are what the copier of transformers can do: other forms are left out
of the upload or refused, at the user's and not here.
"""

import ast
import functools
import io
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "sae_transformers"
MAX_LINES = 400
MAX_CLI_LINES = 2000  # all of cli/
MAY_IMPORT: dict[str, set[str]] = {
    "modeling": set(),
    "latents": {"modeling"},
    "evaluation": {"latents", "modeling"},
    "training": {"evaluation", "latents", "modeling"},
    "create_training_data": {"latents", "modeling"},
    "hub_cards": {"create_training_data", "evaluation", "latents"},
    "serving": {"latents", "modeling"},
    "vllm": {"latents", "modeling", "serving"},
    "workflows": {
        "create_training_data",
        "evaluation",
        "hub_cards",
        "latents",
        "modeling",
        "serving",
        "training",
        "vllm",
    },
    # tools for agents; only here is the package mcp imported
    "mcp_server": {"evaluation", "latents", "modeling", "serving", "workflows"},
    # only cli uses it
    "quickstart": {"create_training_data", "evaluation", "hub_cards", "latents", "modeling", "training"},
}
TOP_FILES = {"__init__", "__main__"}  # these may import every folder
MAY_IMPORT["cli"] = {"mcp_server", "modeling", "quickstart", "workflows"}  # parses and shows; no folder uses it
MODELING_NEEDS = {"torch", "transformers", "safetensors", "huggingface_hub", "accelerate", *sys.stdlib_module_names}
MODELING_NEEDS |= {"filelock"}  # torch and huggingface_hub bring it
MODELING_MAY_TRY = {"peft"}  # inside `try:` only: the user's machine may not have it
CONVERSION = "conversion"  # modeling/conversion is not published, so it may be a folder
TEACH = "(see CONTRIBUTING.md)"


def source_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


@functools.cache
def parsed(source: str) -> ast.Module:
    """Once for all rules. Nobody changes it."""
    return ast.parse(source)


@functools.cache
def called(call: ast.Call) -> str:
    return ast.unparse(call.func)


def source_of(file: Path) -> ast.Module:
    return parsed(file.read_text(encoding="utf-8"))


def imports(tree: ast.AST, in_try: bool = False) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """Every import at any depth, with whether the body of a `try` that catches ImportError holds it."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node, in_try
        elif isinstance(node, ast.Try):
            guarded = in_try or any("ImportError" in ast.unparse(h.type) for h in node.handlers if h.type)
            for child in node.body:
                yield from imports(ast.Module([child], []), guarded)
            for child in [*node.handlers, *node.orelse, *node.finalbody]:
                yield from imports(ast.Module([child], []) if isinstance(child, ast.stmt) else child, in_try)
        else:
            yield from imports(node, in_try)


def absolute_names(node: ast.Import | ast.ImportFrom) -> list[str]:
    """Top-level packages that an absolute import names."""
    if isinstance(node, ast.Import):
        return [alias.name.split(".")[0] for alias in node.names]
    return [(node.module or "").split(".")[0]] if node.level == 0 else []


def relative_target(node: ast.ImportFrom, location: tuple[str, ...]) -> list[str]:
    """Path inside the package that a relative import reaches; `location` is the folder of the importing file."""
    base = location[: len(location) - node.level + 1]
    return [*base, *(node.module or "").split(".")] if node.module else [*base, node.names[0].name]


def import_problems(path: str, source: str) -> list[str]:
    """What is wrong with the imports of the file at `path`, which is relative to the package."""
    *folders, name = Path(path).with_suffix("").parts
    room = folders[0] if folders else None
    published = folders == ["modeling"]
    problems = []
    for node, in_try in imports(parsed(source)):
        where, text = f"{path}:{node.lineno}", ast.unparse(node)
        if "sae_transformers" in absolute_names(node):
            problems.append(f"{where}: imports inside the package are relative. Received: {text}")
        if isinstance(node, ast.ImportFrom) and node.level > len(folders) + 1:
            problems.append(f"{where}: no higher than the package. Received: {text}")
        elif isinstance(node, ast.ImportFrom) and node.level:
            for alias in node.names:
                if alias.name.startswith("_") and not alias.name.startswith("__"):
                    problems.append(f"{where}: a name with an underscore is its file's own. Received: {text}")
            target = relative_target(node, tuple(folders))[0]
            if room is None:
                allowed = set(MAY_IMPORT) | TOP_FILES if name in TOP_FILES else set()
            else:
                allowed = MAY_IMPORT.get(room, set()) | {room}
            if target not in allowed:
                problems.append(f"{where}: {room or name} may import {sorted(allowed)}. Received: {text}")
            if published and name != "__init__" and node.module == CONVERSION:
                problems.append(f"{where}: {CONVERSION}/ is not published, the copier looks for it. Received: {text}")
            if published and (node.level != 1 or not node.module or "." in node.module):
                problems.append(f"{where}: in modeling/ only `from .name import x` is copied. Received: {text}")
        shows = {"rich", "typer"} & set(absolute_names(node))
        if shows and room not in ("cli", "quickstart"):
            problems.append(f"{where}: only cli/ shows things on a terminal. Received: {text}")
        if room == "modeling":
            for package in absolute_names(node):
                if CONVERSION in folders and package in ("numpy", "yaml"):
                    continue  # both come with transformers
                if package not in MODELING_NEEDS and not (in_try and package in MODELING_MAY_TRY):
                    needs = "modeling/ needs torch, transformers and what comes with them; peft inside try"
                    problems.append(f"{where}: {needs}. Received: {text}")
    return problems


def text_problems(path: str, source: str) -> list[str]:
    """Length, `assert`, `print`, and string lines that the copier takes for imports."""
    problems = []
    lines = len(source.splitlines())
    if lines > MAX_LINES:
        problems.append(f"{path}: at most {MAX_LINES} lines. Received: {lines}; split it")
    for node in ast.walk(parsed(source)):
        if isinstance(node, ast.Assert):
            problems.append(f"{path}:{node.lineno}: `python -O` removes assert; raise an exception")
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "print":
            problems.append(f"{path}:{node.lineno}: nothing here prints; return the value")
    if path.startswith("modeling/"):
        for node in ast.walk(parsed(source)):
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                for one in ast.walk(node):
                    if isinstance(one, ast.FunctionDef) and one.name == "__getattr__":
                        problems.append(f"{path}:{one.lineno}: a `__getattr__` for type checkers hides misspelt names")
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            # The copier searches the text for lines that start with `from .`, in docstrings and other strings too.
            is_string = token.type == tokenize.STRING or tokenize.tok_name[token.type] == "FSTRING_MIDDLE"
            for offset, line in enumerate(token.string.splitlines() if is_string else []):
                if line.lstrip(" \t\"'").startswith("from ."):
                    problems.append(f"{path}:{token.start[0] + offset}: no line of a string starts with `from .`")
    return problems


def tree_problems(paths: list[str]) -> list[str]:
    """Folders that are not in the plan, and folders inside the flat `modeling/`."""
    problems = []
    for path in paths:
        folders = Path(path).parts[:-1]
        if folders and folders[0] not in MAY_IMPORT:
            problems.append(f"{path}: the folders are {sorted(MAY_IMPORT)}; add a new one to MAY_IMPORT")
        if folders[:1] == ("modeling",) and len(folders) > 1 and folders[1] != CONVERSION:
            problems.append(f"{path}: modeling/ is flat, only modeling/{CONVERSION}/ is a folder")
    return problems


@pytest.mark.parametrize("path", [file.relative_to(PACKAGE).as_posix() for file in source_files()])
def test_file_keeps_the_rules(path: str) -> None:
    source = (PACKAGE / path).read_text(encoding="utf-8")
    problems = import_problems(path, source) + text_problems(path, source)
    assert not problems, "\n".join([TEACH, *problems])


def test_tree_keeps_the_rules() -> None:
    files = [file.relative_to(PACKAGE).as_posix() for file in source_files()]
    assert "__init__.py" in files
    assert not tree_problems(files)


def test_the_command_line_stays_thin() -> None:
    lines = sum(len(file.read_text(encoding="utf-8").splitlines()) for file in (PACKAGE / "cli").glob("*.py"))
    assert lines <= MAX_CLI_LINES, f"{TEACH} what a verb does belongs into workflows/. Received: {lines} lines"


# The rules themselves, on sources that break or keep them: a check that cannot fail would pass here too.

BROKEN_IMPORTS = {
    "modeling imports another folder": ("modeling/a.py", "from ..training.x import f", "may import"),
    "the same inside a function": ("modeling/a.py", "def g():\n    from ..training.x import f", "may import"),
    "evaluation imports training": ("evaluation/a.py", "from ..training import f", "may import"),
    "data imports training": ("create_training_data/a.py", "from ..training import f", "may import"),
    "training imports data": ("training/a.py", "from ..create_training_data import f", "may import"),
    "cards import modeling": ("hub_cards/a.py", "from ..modeling import f", "may import"),
    "cards import the package": ("hub_cards/a.py", "from .. import modeling", "may import"),
    "a folder imports the command line": ("training/a.py", "from ..cli import app", "may import"),
    "a folder imports a verb": ("training/a.py", "from ..cli.spans import register", "may import"),
    "the command line imports what is below workflows": ("cli/a.py", "from ..training import f", "may import"),
    "a name of another file's own": ("cli/a.py", "from .b import _name", "its file's own"),
    "a terminal below the command line": ("workflows/a.py", "from rich.console import Console", "only cli/"),
    "another top file": ("helpers.py", "from .modeling import f", "may import"),
    "absolute": ("training/a.py", "from sae_transformers.modeling import f", "are relative"),
    "absolute module": ("cli/a.py", "import sae_transformers.modeling", "are relative"),
    "out of the package": ("__main__.py", "from ..x import f", "no higher"),
    "out of the package from a room of a room": ("workflows/settings/a.py", "from ....x import f", "no higher"),
    "module from the folder": ("modeling/a.py", "from . import act", "only `from .name import x`"),
    "subfolder": ("modeling/a.py", "from .conversion.act import f", "only `from .name import x`"),
    "subfolder by its name": ("modeling/a.py", "from .conversion import f", "is not published"),
    "third party": ("modeling/a.py", "import numpy as np", "modeling/ needs"),
    "third party under TYPE_CHECKING": ("modeling/a.py", "if TYPE_CHECKING:\n    from scipy import f", "needs"),
    "peft outside try": ("modeling/a.py", "from peft import f", "modeling/ needs"),
    "peft in a try that catches another error": ("modeling/a.py", "try: import peft\nexcept KeyError: pass", "needs"),
    "peft in the handler": ("modeling/a.py", "try: x\nexcept ImportError: import peft", "modeling/ needs"),
}


@pytest.mark.parametrize("case", BROKEN_IMPORTS)
def test_a_broken_import_is_found(case: str) -> None:
    path, source, expected = BROKEN_IMPORTS[case]
    problems = import_problems(path, source)
    assert any(expected in problem for problem in problems), problems


def test_a_problem_names_its_line() -> None:
    problems = import_problems("modeling/a.py", "def g():\n\n    from ..training.x import f")
    assert problems[0].startswith("modeling/a.py:3: ")


GOOD_IMPORTS = [
    ("modeling/a.py", "from .act import (\n    f,\n    g,\n)\nimport math, torch.nn\nfrom transformers.x import y"),
    ("modeling/a.py", "if TYPE_CHECKING:\n    from .act import f"),
    ("modeling/a.py", "try:\n    import peft\nexcept ImportError:\n    peft = None"),
    (
        "modeling/conversion/a.py",
        "from ..sparse_autoencoder import f\nfrom .tensors import g\nimport safetensors.torch",
    ),
    (
        "training/a.py",
        "from ..evaluation.metrics import f\nfrom ..modeling import g\nfrom . import losses\nimport numpy",
    ),
    ("create_training_data/a.py", "from ..modeling import f"),
    ("hub_cards/a.py", "from ..evaluation.results import f"),
    ("cli/a.py", "def verb():\n    from ..modeling import f\n    from ..workflows.detect import g"),
    ("cli/__init__.py", "from . import spans, steer"),
    ("cli/spans.py", "from .errors import fail"),
    ("__init__.py", "if TYPE_CHECKING:\n    from .modeling import f"),
    ("__main__.py", "from .cli import app"),
]


@pytest.mark.parametrize(("path", "source"), GOOD_IMPORTS)
def test_a_good_import_passes(path: str, source: str) -> None:
    assert import_problems(path, source) == []


@pytest.mark.parametrize(
    ("path", "source", "expected"),
    [
        ("training/a.py", "x = 1\n" * (MAX_LINES + 1), f"Received: {MAX_LINES + 1}"),
        ("training/a.py", "def f(x):\n    assert x", "training/a.py:2"),
        ("evaluation/a.py", "print(1)", "nothing here prints"),
        ("modeling/a.py", '"""Text.\n\nfrom .nowhere import g\n"""', "modeling/a.py:3"),
        ("modeling/a.py", 'def f():\n    """\n    from .nowhere import g\n    """', "modeling/a.py:3"),
        ("modeling/a.py", '"""from .nowhere import g"""', "modeling/a.py:1"),
        (
            "modeling/a.py",
            "class A:\n    if TYPE_CHECKING:\n        def __getattr__(self, name): ...",
            "a.py:3: a `__get",
        ),
    ],
)
def test_a_broken_text_is_found(path: str, source: str, expected: str) -> None:
    assert expected in "\n".join(text_problems(path, source))


def test_a_good_text_passes() -> None:
    assert text_problems("training/a.py", "x = 1\n" * MAX_LINES) == []
    assert text_problems("modeling/a.py", '"""Text: from .act import f."""\nfrom .act import f\n') == []


def test_a_broken_tree_is_found() -> None:
    assert len(tree_problems(["modeling/core/a.py", "utils/a.py"])) == 2
    assert tree_problems(["cli/a.py", "modeling/a.py", "modeling/conversion/a.py", "training/plans/a.py"]) == []


# -- the shape of the whole -------------------------------------------------------------------------------------------

MAX_FILES = 20  # in a folder; `modeling` is flat by force, `cli` has a file for each verb
FULL_FOLDERS = {"modeling", "cli"}
MAX_PARAMETERS = 8
# The one circle, for a type checker alone: the base class of the heads names them in its annotations.
HEADS = [f"modeling.modeling_sae{head}" for head in ("", "_causal_lm", "_sequence_classification")]
# Signatures of transformers; kernels, whose sizes are constants of the compiler; the client of a server; and what
# joins objects that belong to nobody else. The list may only become shorter. A verb of `cli/` has one an option.
MANY_PARAMETERS = {
    "create_training_data/harvest/store.py: harvest_to_store",
    "create_training_data/llm/client.py: __init__",
    "latents/texts.py: open_text",
    "modeling/configuration_sae.py: __init__",
    "modeling/modeling_sae_causal_lm.py: forward",
    "training/sae/triton_ops.py: _bag_sums",
    "training/steering/calibration.py: calibrate",
    "training/steering/topic_scores.py: topic_steering",
    "workflows/harvest.py: harvest",
    "workflows/train.py: train",
    "workflows/train.py: train_concept",
}


def module_imports() -> dict[str, set[str]]:
    """Module -> the modules of the package that it imports anywhere, for types too."""
    files = {}
    for file in source_files():
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        files[parts[:-1] if parts[-1] == "__init__" else parts] = file
    graph: dict[str, set[str]] = {}
    for module, file in files.items():
        folder = module if file.name == "__init__.py" else module[:-1]
        graph[".".join(module)] = reached = set()
        for node, _ in imports(source_of(file)):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = (*folder[: len(folder) - node.level + 1], *(node.module.split(".") if node.module else ()))
                for alias in node.names:
                    target = (*base, alias.name) if (*base, alias.name) in files else base
                    if target in files and target != module:
                        reached.add(".".join(target))
    return graph


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Modules that import one another, directly or by others."""
    reach = {module: set(targets) for module, targets in graph.items()}
    for middle in graph:
        for targets in reach.values():
            if middle in targets:
                targets |= reach[middle]
    found = {frozenset(b for b in reach[a] if a in reach[b]) for a in graph if a in reach[a]}
    return sorted(sorted(one) for one in found)


def test_circles_are_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c"]]


def test_no_module_imports_itself_by_others() -> None:
    assert circles(module_imports()) == [HEADS]


def test_no_folder_is_a_heap() -> None:
    counts = {
        folder.relative_to(PACKAGE).as_posix(): len(list(folder.glob("*.py"))) - 1  # __init__
        for folder in {file.parent for file in source_files()}
    }
    assert not {name: n for name, n in counts.items() if n > MAX_FILES and name not in FULL_FOLDERS}


def test_options_do_not_travel_as_a_bag() -> None:
    for file in source_files():
        for node in ast.walk(source_of(file)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("locals", "vars", "globals"):
                allowed = file == PACKAGE / "__init__.py" and ast.unparse(node.func) == "globals"
                # `vars(module)` lists what a module has.
                allowed = allowed or (ast.unparse(node.func) == "vars" and node.args)
                assert allowed, f"{file.name}:{node.lineno}: name the values; a dataclass if they are many"


def test_long_parameter_lists_are_settings() -> None:
    found = set()
    for file in source_files():
        path = file.relative_to(PACKAGE).as_posix()
        for node in ast.walk(source_of(file)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not path.startswith("cli/"):
                arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                if len([one for one in arguments if one.arg not in ("self", "cls")]) > MAX_PARAMETERS:
                    found.add(f"{path}: {node.name}")
    assert found == MANY_PARAMETERS


def test_models_tokenizers_and_settings_have_types() -> None:
    """Where people read a signature first, `Any` would tell them, and pyright, nothing."""
    untyped = []
    for file in [*(PACKAGE / "latents").rglob("*.py"), *(PACKAGE / "workflows").rglob("*.py")]:
        for node in ast.walk(source_of(file)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                for one in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs):
                    if one.arg in ("model", "base", "tokenizer", "processor", "settings", "config"):
                        kind = ast.unparse(one.annotation) if one.annotation else "nothing"
                        if kind in ("nothing", "Any", "Any | None", "object"):
                            untyped.append(f"{file.relative_to(PACKAGE)}:{node.lineno}: {one.arg}: {kind}")
    assert not untyped
