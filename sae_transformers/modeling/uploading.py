"""From a folder to a repository on the Hub, in one commit."""

from __future__ import annotations

from typing import Any

from huggingface_hub import HfApi

UPLOAD_OPTIONS = ("private", "token", "revision", "commit_message", "commit_description", "create_pr")
# A folder may hold a Trainer's checkpoints too, whose pickles have no place in a repository.
NOT_UPLOADED = ["*.bin", "*.pt", "*.pth", "*.pkl", "*.draft", "*.lock", "checkpoint-*/*"]


def upload(
    folder: str, repo_id: str, what: str, private: bool | None = None, token: Any = None, **options: Any
) -> Any:
    """Upload a folder in one commit; the repository is made where it is not there."""
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    options = {k: v for k, v in options.items() if v is not None}
    options.setdefault("commit_message", f"Upload {what}")
    return api.upload_folder(folder_path=folder, repo_id=repo_id, ignore_patterns=NOT_UPLOADED, **options)
