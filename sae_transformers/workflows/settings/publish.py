"""Settings of `card`, `push`, `space` and `serve`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ...latents.settings import check_choice, check_integers
from ...serving.limits import ServeLimits

CARDS = ("model", "dataset", "metric")
REPOSITORIES = ("model", "dataset", "space")
ENGINES = ("own", "vllm")
LOG_LEVELS = ("critical", "error", "warning", "info", "debug")


@dataclass(frozen=True)
class CardSettings:
    """What a card holds.

    Args:
        kind: model, dataset or metric; by default what the folder holds.
        annotated_sae: number of the SAE that the annotations are of.
        features: rows of the table of features.
        examples: prompts shown of each way to steer.
        force: replace a README.md that was edited by hand.
    """

    kind: str | None = None
    annotated_sae: int = 0
    features: int = 50
    examples: int = 3
    force: bool = False

    def __post_init__(self) -> None:
        if self.kind is not None:
            check_choice(self, "kind", CARDS)
        check_integers(self, annotated_sae=0, features=0, examples=0)


@dataclass(frozen=True)
class PushSettings:
    """How a folder goes to the Hub.

    Args:
        kind: model, dataset or space; by default what the folder holds.
        base: the base's id on the Hub, which stands for a folder in what is sent.
        private: make a new repository private.
        revision: branch, which is made where there is none.
        create_pr: open a pull request.
        message: message of the commit.
        exclude: pattern of files or folders to leave out. Repeatable.
        allow_paths: publish absolute paths in files.
        force: replace a model of another kind that is there.
        dry_run: check, compare, say what would be sent, and end.
        verify: load the pushed revision back and compare it.
        local_base: folder with the base, for the verification; by default it is fetched.
    """

    kind: str | None = None
    base: str | None = None
    private: bool = False
    revision: str = "main"
    create_pr: bool = False
    message: str | None = None
    exclude: tuple[str, ...] | None = None
    allow_paths: bool = False
    force: bool = False
    dry_run: bool = False
    verify: bool = True
    local_base: Path | None = None

    def __post_init__(self) -> None:
        if self.kind is not None:
            check_choice(self, "kind", REPOSITORIES)
        if self.local_base is not None and not (Path(self.local_base) / "config.json").is_file():
            raise ValueError(f"`local_base` must be a model's folder. Received: local_base={str(self.local_base)!r}.")


@dataclass(frozen=True)
class SpaceSettings:
    """What a Space shows.

    Args:
        revision: commit of the model; by default the one that is there now.
        title: title of the page.
        licence: licence of the Space, as the Hub names it.
    """

    revision: str | None = None
    title: str | None = None
    licence: str | None = None


@dataclass(frozen=True)
class ServeSettings:
    """How a model is served.

    Args:
        engine: own, this library's, for one machine; or vllm, whose options follow the model after --.
        host: address to listen at; 0.0.0.0 is every one of this machine.
        port: port of the server; 0 takes a free one.
        api_key_env: environment variable of a key that requests must bring; by default none is asked.
        max_concurrent: answers that are written together; others wait.
        max_answer_tokens: tokens of an answer, where a request does not say.
        log_level: warning, or info for a line a request.
        limits: what clients are given.
    """

    engine: str = "own"
    host: str = "127.0.0.1"
    port: int = 8000
    api_key_env: str | None = None
    max_concurrent: int = 32
    max_answer_tokens: int = 512
    log_level: str = "warning"
    limits: ServeLimits = field(default_factory=ServeLimits)

    def __post_init__(self) -> None:
        check_integers(self, port=0, max_concurrent=1, max_answer_tokens=1)
        if self.port > 65535:
            raise ValueError(f"`port` must be at most 65535. Received: port={self.port!r}.")
        check_choice(self, "log_level", LOG_LEVELS)
        check_choice(self, "engine", ENGINES)


@dataclass(frozen=True)
class Served:
    """What is served.

    Args:
        model: a model with SAEs, or a base: a folder or a Hub id.
        saes: SAEs for a base, as `attach` takes them.
        name: of the model in requests; by default its folder or id.
        steering: default steering: JSON, a file of it or its name in the model's folder; by default the model's own.
        hook_point: where SAEs read that do not say it themselves.
        model_dtype: `auto`: float32 on a CPU, else as published.
        revision: of the model on the Hub.
    """

    model: str
    saes: tuple[str, ...] = ()
    name: str | None = None
    steering: str | None = None
    hook_point: str | None = None
    model_dtype: str = "auto"
    revision: str | None = None
