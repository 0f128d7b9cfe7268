"""requirements-serve.txt is enough for a server: the packages that it leaves out are not there when this one runs."""

from __future__ import annotations

import importlib.metadata as metadata
import json
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
from packaging.requirements import Requirement

from tests.serving.running import offline, served_model, served_tokenizer, settles

ROOT = Path(__file__).parents[2]
LEFT_OUT = ("peft", "datasets", "evaluate", "openai")
RUN = """
import sys
sys.path[:0] = {places!r}
from importlib.util import find_spec
assert not [name for name in {absent!r} if find_spec(name)]
sys.argv = ["sae-transformers", "serve", {model!r}, "--port", "0", "--name", "small"]
from sae_transformers.cli import app
app()
"""


def listed(path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def name_of(text: str) -> str:
    return re.sub(r"[-_.]+", "-", text).lower()


def closure(requirements: Iterable[str]) -> set[str]:
    """Installed packages that these need, with all that those need."""
    found: set[str] = set()
    queue = [Requirement(one) for one in requirements]
    while queue:
        one = queue.pop()
        name = name_of(one.name)
        extras = one.extras or {""}
        if name in found or (one.marker and not one.marker.evaluate({"extra": ""})):
            continue
        try:
            needed = metadata.distribution(name).requires or ()
        except metadata.PackageNotFoundError:  # of another system
            continue
        found.add(name)
        for text in needed:
            inner = Requirement(text)
            if inner.marker is None or any(inner.marker.evaluate({"extra": extra}) for extra in extras):
                inner.marker = None
                queue.append(inner)
    return found


def linked(packages: set[str], folder: Path) -> Path:
    """A folder of links to the files of some installed packages."""
    folder.mkdir()
    for package in metadata.distributions():
        if name_of(package.metadata["Name"]) in packages:
            for top in {Path(file.parts[0]) for file in package.files or () if file.parts[0] != ".."}:
                place = Path(str(package.locate_file(top)))
                if place.suffix != ".pth" and place.exists() and not (folder / top).exists():
                    (folder / top).symlink_to(place)
    return folder


def test_the_file_has_what_the_package_has_but_what_it_leaves_out() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    lists = re.findall(r"^(?:dependencies|serve) = \[(.*?)^\]", text, re.DOTALL | re.MULTILINE)
    expected = [line for part in lists for line in re.findall(r'"([^"]+)"', part)]
    assert listed(ROOT / "requirements-serve.txt") == [
        line for line in expected if Requirement(line).name not in LEFT_OUT
    ]


def answers(address: str) -> bool:
    try:
        with urlopen(f"{address}/health", timeout=5):
            return True
    except OSError:
        return False


@pytest.mark.slow
def test_a_server_runs_with_these_alone(tmp_path: Path) -> None:
    model, tokenizer = served_model(), served_tokenizer()
    model.config.weights_scope = "full"
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    packages = closure(listed(ROOT / "requirements-serve.txt"))
    assert not packages & {*LEFT_OUT, "pyarrow", "pandas", "aiohttp"}
    places = [str(linked(packages, tmp_path / "packages")), str(ROOT)]
    script = RUN.format(places=places, absent=[*LEFT_OUT, "pyarrow", "pandas"], model=str(tmp_path / "model"))
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", script], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        told = ""
        assert process.stdout is not None
        for line in process.stdout:
            told += line
            if found := re.search(r"(http://127\.0\.0\.1:\d+)/v1", told):
                break
        else:
            pytest.fail(told)
        assert settles(lambda: answers(found[1]))
        steering = {"edits": [{"feature": 3, "op": "add", "value": 6.0}]}
        body = {"model": "small", "prompt": "w1 w2 w3", "max_tokens": 6, "temperature": 0, "steering": steering}
        request = Request(f"{found[0]}/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urlopen(request, timeout=60) as answer:
            text = json.loads(answer.read())["choices"][0]["text"]
        assert text == offline(model, tokenizer, "w1 w2 w3", steering, 6)
        assert text != offline(model, tokenizer, "w1 w2 w3", None, 6)
    finally:
        process.terminate()
        process.communicate(timeout=60)
