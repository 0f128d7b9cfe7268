"""Which rows of a text are read, for verbs that read a text of any size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ...latents.output_files import locked_file as locked_file
from ...latents.output_files import locked_folder as locked_folder
from ...latents.settings import check_integers
from ...latents.text_files import read_lines as read_lines

if TYPE_CHECKING:
    from ...latents.texts import TextSource


@dataclass(frozen=True)
class TextSettings:
    """Which rows of a file, a folder or a Hub data set are read.

    Args:
        text_column: column of the text; a.b is field b of column a.
        txt_rows: what a row of a .txt file is: paragraph, line or file.
        split: part of a Hub data set.
        subset: configuration of a Hub data set.
        streaming: read a Hub data set as it is needed.
        max_rows: use the first rows only.
    """

    PANEL: ClassVar[str] = "Text"

    text_column: str = "text"
    txt_rows: str = "paragraph"
    split: str = "train"
    subset: str | None = None
    streaming: bool = False
    max_rows: int | None = None

    def __post_init__(self) -> None:
        check_integers(self, max_rows=1)

    def open(self, text: str, labels: Sequence[str] = (), images: str | None = None) -> TextSource:
        """The rows.

        Args:
            text: a file, a folder, a glob, a URL or a Hub data set, as `open_text` takes it.
            labels: columns of 0 and 1.
            images: column of a row's image or images.
        """
        from ...latents.texts import open_text

        source = open_text(
            text, column=self.text_column, split=self.split, subset=self.subset, streaming=self.streaming,
            txt_rows=self.txt_rows, labels=labels, images=images,
        )  # fmt: skip
        return source if self.max_rows is None else source.first(self.max_rows)
