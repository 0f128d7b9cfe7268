"""The package's front door: public names, laziness, version."""

import importlib.metadata
import subprocess
import sys

import pytest

import sae_transformers


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, sae_transformers; print('torch' in sys.modules, 'transformers' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "False"]


HELP = """
import contextlib, io, sys
from sae_transformers.cli import VERBS, app

def asked(*words):
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as shown:
        app(words)
    assert "Usage:" in shown.getvalue(), words
    print(*words, *sorted(name for name in sys.modules if "." not in name or name.startswith("sae_transformers.")))

asked("--help")
for verb in " ".join(VERBS.values()).split():
    asked(verb.replace("_", "-"), "--help")
"""
HEAVY = {
    "torch", "transformers", "numpy", "scipy", "pandas", "datasets", "huggingface_hub", "httpx", "openai", "sklearn",
    "matplotlib",
}  # fmt: skip


def test_asking_for_help_imports_nothing_that_works() -> None:
    """And `--help` alone no verb's file."""
    run = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, check=True)
    first, *others = run.stdout.splitlines()
    assert [name for name in first.split() if name.startswith("sae_transformers.")] == [
        "sae_transformers.cli",
        "sae_transformers.cli.errors",
    ]
    for line in (first, *others):
        assert not HEAVY & set(line.split()), line.split("--help")[0]
    assert "sae_transformers.cli.steer" in others[-1].split() and len(others) > 20


@pytest.mark.parametrize("name", sae_transformers.__all__)
def test_every_public_name_resolves(name: str) -> None:
    assert getattr(sae_transformers, name) is not None
    assert name in dir(sae_transformers)


def test_dir_lists_public_names_only() -> None:
    listed = {name for name in dir(sae_transformers) if not name.startswith("__")}
    assert listed == {name for name in sae_transformers.__all__ if not name.startswith("__")}


def test_an_unknown_name_is_refused_with_the_names_that_exist() -> None:
    with pytest.raises(AttributeError, match=r"SaeForCasualLM.*SaeForCausalLM"):
        sae_transformers.SaeForCasualLM  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]


def test_the_installed_version_is_the_one_in_the_source() -> None:
    try:
        installed = importlib.metadata.version("sae-transformers")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package is not installed: it runs from the checkout")
    assert installed == sae_transformers.__version__
