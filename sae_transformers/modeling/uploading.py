"""From a model to a repository on the Hub, in one commit."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import HfApi

from .repository_files import model_card, write_whole

UPLOAD_OPTIONS = ("private", "token", "revision", "commit_message", "commit_description", "create_pr")
# A folder may hold a Trainer's checkpoints too, whose pickles have no place in a repository.
NOT_UPLOADED = ["*.bin", "*.pt", "*.pth", "*.pkl", "*.part", "checkpoint-*/*"]


class UploadMixin:
    """Publishing of what `save_pretrained` writes."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:  # pyright: ignore
        """Save as `save_pretrained` does and upload it in one commit; returns the commit's information.

        Args:
            repo_id: `user/name` on the Hub.
            kwargs: `private`, `token`, `revision`, `commit_message`, `commit_description`, `create_pr`,
                `max_shard_size`.
        """
        options = {k: kwargs.pop(k) for k in UPLOAD_OPTIONS if k in kwargs}
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / repo_id.rsplit("/", 1)[-1]
            self.save_pretrained(path, **kwargs)
            write_whole(path / "README.md", model_card(self, repo_id))
            return self._upload(str(path), repo_id, **options)

    def _upload(self, folder: str, repo_id: str, **options: Any) -> Any:
        return upload(folder, repo_id, type(self).__name__, **options)


def upload(
    folder: str, repo_id: str, what: str, private: bool | None = None, token: Any = None, **options: Any
) -> Any:
    """Upload a folder in one commit; the repository is made where it is not there."""
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    options = {k: v for k, v in options.items() if v is not None}
    options.setdefault("commit_message", f"Upload {what}")
    return api.upload_folder(folder_path=folder, repo_id=repo_id, ignore_patterns=NOT_UPLOADED, **options)
