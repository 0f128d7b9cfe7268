"""LAMBADA and MMLU from local files, and as tasks of lm-evaluation-harness that read local files.

`write_tasks` writes what `lm_eval --include_path` takes; the form of a task, its prompt and metrics, is copied from
the task of the same name that the installed lm-eval ships, so that only the place of the data differs.
"""

from __future__ import annotations

import csv
import io
import json
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ...latents.optional_packages import needs

LETTERS = "ABCD"
LAMBADA = "local_lambada"
MMLU = "local_mmlu"
SOURCES = {LAMBADA: "lambada/lambada_openai.yaml", MMLU: "mmlu/default/_default_template_yaml"}


class MultipleChoice(NamedTuple):
    """question, its four choices, and the index of the right one."""

    question: str
    choices: tuple[str, ...]
    answer: int


class MmluSubject(NamedTuple):
    """The questions of one subject. shots: questions to show with their answers, in order (MMLU's dev split)."""

    test: Sequence[MultipleChoice]
    shots: Sequence[MultipleChoice] = ()


def read_lambada(path: str | Path) -> list[str]:
    """The passages of a LAMBADA file of JSON lines with a field `text` each.

    Raises:
        ValueError: a line is no such object.
    """
    texts = []
    with Path(path).open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            row = json.loads(line) if line.strip() else None
            if row is None:
                continue
            if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                raise ValueError(f"{path}:{number}: expected an object with a `text`. Received: {type(row).__name__}.")
            texts.append(row["text"])
    return texts


def read_mmlu(path: str | Path, subjects: Iterable[str] | None = None) -> dict[str, MmluSubject]:
    """Subjects of MMLU's official files: question, four choices and the letter of the answer, no header.

    "Measuring Massive Multitask Language Understanding" (https://huggingface.co/papers/2009.03300).

    Args:
        path: the archive (zip), or its unpacked folder, with `test/SUBJECT_test.csv` and `dev/SUBJECT_dev.csv`.
        subjects: such as `abstract_algebra`; all by default.

    Raises:
        ValueError: a subject that is not there, or a row that is no question.
    """
    path = Path(path)
    if path.is_dir():
        files = {file.name: file.read_text(encoding="utf-8") for file in sorted(path.rglob("*.csv"))}
    else:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith(".csv")]
            files = {Path(name).name: archive.read(name).decode("utf-8") for name in names}
    known = sorted(name.removesuffix("_test.csv") for name in files if name.endswith("_test.csv"))
    chosen = known if subjects is None else list(subjects)
    if unknown := [subject for subject in chosen if subject not in known] or not chosen:
        raise ValueError(f"Expected subjects of {path.name}, such as {known[:5]}. Received: {unknown or chosen!r}.")
    return {
        subject: MmluSubject(
            _questions(files[f"{subject}_test.csv"], f"{subject}_test.csv"),
            _questions(files.get(f"{subject}_dev.csv", ""), f"{subject}_dev.csv"),
        )
        for subject in chosen
    }


def write_tasks(
    folder: str | Path, lambada: Sequence[str] = (), mmlu: Mapping[str, MmluSubject] | None = None, *, shots: int = 5
) -> list[str]:
    """Write task files of lm-eval, and the data they read, into a folder.

        lm_eval --model hf --model_args pretrained=MODEL,trust_remote_code=True --include_path FOLDER --tasks NAME

    Args:
        folder: made where there is none. The task files name their data by absolute path: move nothing afterwards.
        lambada: passages; none for no such task.
        mmlu: subject -> questions.
        shots: questions with answers before each question of MMLU.

    Returns:
        The names of the tasks: `local_lambada`, `local_mmlu_SUBJECT`.

    Raises:
        ImportError: lm-eval is not installed.
        ValueError: there is nothing to ask, a passage of one word, or a subject with fewer examples than `shots`.
    """
    folder = Path(folder).resolve()
    if not lambada and not mmlu:
        raise ValueError("Expected passages of LAMBADA, or subjects of MMLU, or both. Received: neither.")
    if any(" " not in text.strip() for text in lambada):
        raise ValueError(f"A passage has two words or more. Received: a shorter one among {len(lambada)}.")
    if shots < 0:
        raise ValueError(f"`shots` must be 0 or more. Received: shots={shots!r}.")
    for name, subject in (mmlu or {}).items():
        if not subject.test or len(subject.shots) < shots:
            raise ValueError(
                f"Subject {name!r} needs questions, and {shots} more to show. "
                f"Received: {len(subject.test)} and {len(subject.shots)}."
            )
        if not re.fullmatch(r"\w+", name):
            raise ValueError(f"The name of a subject has letters, digits and _. Received: {name!r}.")
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    if lambada:
        files = {"test": [{"text": text} for text in lambada]}
        names.append(_write_task(folder, LAMBADA, shipped_task(LAMBADA), files))
    for name, subject in (mmlu or {}).items():
        files = {"test": [one._asdict() for one in subject.test]}
        if subject.shots:
            files["dev"] = [one._asdict() for one in subject.shots]
        form = shipped_task(MMLU) | {"num_fewshot": shots, "description": _description(name), "tag": MMLU}
        if not subject.shots:
            form.pop("fewshot_split", None)
            form.pop("fewshot_config", None)
        names.append(_write_task(folder, f"{MMLU}_{name}", form, files))
    return names


def shipped_task(name: str) -> dict[str, Any]:
    """The form of lm-eval's own task behind one of ours, without the place of its data.

    Raises:
        ImportError: lm-eval is not installed.
    """
    import yaml

    require_lm_eval()
    import lm_eval.tasks

    path = Path(next(iter(lm_eval.tasks.__path__))) / SOURCES[name]
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    return {key: value for key, value in form.items() if key not in ("dataset_path", "dataset_name", "task", "tag")}


def require_lm_eval() -> str:
    """The installed version of lm-eval.

    Raises:
        ImportError: it is not installed.
    """
    with needs("Measuring capability", "lm-eval", "capability"):
        import lm_eval
    return lm_eval.__version__


def _questions(text: str, name: str) -> list[MultipleChoice]:
    rows = []
    for number, row in enumerate(csv.reader(io.StringIO(text)), 1):
        if not row:
            continue
        if len(row) != 2 + len(LETTERS) or row[-1].strip() not in LETTERS:
            raise ValueError(
                f"{name}, row {number}: expected a question, {len(LETTERS)} choices and a letter of {LETTERS}. "
                f"Received: {len(row)} columns, answer {row[-1]!r}."
            )
        rows.append(MultipleChoice(row[0], tuple(row[1:-1]), LETTERS.index(row[-1].strip())))
    return rows


def _description(subject: str) -> str:
    """What lm-eval's task of a subject says before its first question."""
    topic = subject.replace("_", " ")
    return f"The following are multiple choice questions (with answers) about {topic}.\n\n"


def _write_task(folder: Path, name: str, form: Mapping[str, Any], files: Mapping[str, Sequence[Any]]) -> str:
    import yaml

    data = {}
    for split, rows in files.items():
        path = folder / f"{name}_{split}.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        data[split] = str(path)
    reading = {"data_files": data, "cache_dir": str(folder / "cache")}
    place = {"task": name, "dataset_path": "json", "dataset_kwargs": reading}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({**place, **form}, sort_keys=False), encoding="utf-8")
    return name
