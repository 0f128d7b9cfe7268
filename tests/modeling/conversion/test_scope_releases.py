"""All releases of Gemma Scope 2, and Qwen Scope 3.5, by their short names, in bases that read images if theirs do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.loopback_hub import LoopbackHub

CHECKOUT = Path(__file__).parents[3]


@pytest.mark.hub
def test_each_release_is_attached_by_its_short_name_and_steers_as_by_hand(tmp_path):
    script = CHECKOUT / "tests" / "scripts" / "scope_releases.py"
    with LoopbackHub() as hub:
        run = subprocess.run(
            [sys.executable, str(script), str(tmp_path)],
            env=hub.environment(tmp_path / "home") | {"PYTHONPATH": str(CHECKOUT)},
            capture_output=True,
            text=True,
            check=False,
        )
    assert run.returncode == 0, run.stderr
    seen = json.loads(run.stdout.splitlines()[-1])
    sizes = [f"{size}-{kind}" for size in ("270m", "1b", "4b", "12b", "27b") for kind in ("pt", "it")]
    assert {f"gemma-scope-2-{size}" for size in sizes} <= set(seen)
    assert len([name for name in seen if name.startswith("qwen-scope-3.5-")]) == 3
    for release, saes in seen.items():
        assert all(all(checks) for checks in saes), (release, saes)
