"""What is harvested from a model and a text. No torch is imported here: the command line uses it too."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from ...latents.settings import check_choice, check_integers
from ..template_texts import PLACEHOLDER, check_template

DTYPES = ("bfloat16", "float16", "float32")
POSITIONS = ("all", "last", "after_prefix")
IMAGE_TOKENS = ("keep", "drop", "only")


@dataclass(frozen=True)
class HarvestSettings:
    """Which hidden states are harvested, and how.

    Args:
        hook_points: where hidden states are read, such as `layers.14.resid_post`, or module paths.
        max_length: tokens of a sequence.
        pack: join short texts to full sequences; by default where a text's own bounds do not matter, which is without
            labels, images and template, and with `positions="all"`.
        template: what the model reads, with `{text}` where a row goes, or toxicity, helpfulness or disease for ours;
            a long text is cut, its template is not.
        positions: tokens that are kept: `all`, the `last` of each text, or those `after_prefix`.
        prefix_tokens: length of that prefix, beginning token included. With a template it is counted in each row:
            all that comes before the row's own first token.
        skip_first: leading tokens of a sequence that are left out: the first is an outlier in norm.
        drop_special_tokens: leave out the tokenizer's special tokens.
        image_tokens: where rows hold images, `keep` the tokens that stand for their patches, `drop` them, or keep
            `only` those.
        dtype: precision of the stored hidden states: bfloat16, float16 or float32.
        rows_per_shard: rows of text in a block, which is a file of the store and what memory has to hold.
        tokens_per_batch: tokens of a forward pass, padding counted. As another value changes results by rounding only,
            a harvest may be resumed with it.
    """

    PANEL: ClassVar[str] = "Hidden states"

    hook_points: tuple[str, ...] = ()
    max_length: int = 256
    pack: bool | None = None
    template: str = PLACEHOLDER
    positions: str = "all"
    prefix_tokens: int = 0
    skip_first: int = 1
    drop_special_tokens: bool = False
    image_tokens: str = "keep"
    dtype: str = "bfloat16"
    rows_per_shard: int = 256
    tokens_per_batch: int = 4096

    def __post_init__(self) -> None:
        if isinstance(self.hook_points, str) or not all(isinstance(one, str) and one for one in self.hook_points):
            raise ValueError(
                f"`hook_points` must be a list such as ['layers.14.resid_post']. Received: "
                f"hook_points={self.hook_points!r}."
            )
        object.__setattr__(self, "hook_points", tuple(self.hook_points))
        object.__setattr__(self, "skip_first", int(self.skip_first))  # True and False are taken for 1 and 0
        check_integers(self, max_length=2, rows_per_shard=1, tokens_per_batch=1, prefix_tokens=0, skip_first=0)
        for name, known in (("dtype", DTYPES), ("positions", POSITIONS), ("image_tokens", IMAGE_TOKENS)):
            check_choice(self, name, known)
        check_template(self.template)
        known = self.prefix_tokens or self.templated
        if self.positions != "after_prefix" and self.prefix_tokens or self.positions == "after_prefix" and not known:
            raise ValueError(
                f"`prefix_tokens`, or a template, goes with positions='after_prefix'. Received: "
                f"positions={self.positions!r}, prefix_tokens={self.prefix_tokens!r}."
            )
        if self.templated and self.prefix_tokens:
            raise ValueError(
                f"With a template the prefix is counted in each row: leave `prefix_tokens` out. "
                f"Received: prefix_tokens={self.prefix_tokens!r}."
            )
        if self.prefix_tokens >= self.max_length:
            raise ValueError(
                f"`prefix_tokens` must be less than `max_length`. Received: prefix_tokens={self.prefix_tokens!r}, "
                f"max_length={self.max_length!r}."
            )
        if self.pack and (self.positions != "all" or self.templated):
            raise ValueError(
                f"Packed texts have no template and no positions of their own. Received: pack=True, "
                f"template={self.template!r}, positions={self.positions!r}."
            )

    @property
    def templated(self) -> bool:
        """Whether there is anything around a text."""
        return self.template != PLACEHOLDER

    def identity(self) -> dict[str, Any]:
        """What decides the result but for the hook points and the precision, as an index keeps it."""
        values = asdict(self)
        for name in ("hook_points", "dtype", "tokens_per_batch"):
            del values[name]
        if not self.templated:  # indexes of the time before templates have none
            del values["template"]
        if self.skip_first < 2:  # as it is stored since the time when it was a switch
            values["skip_first"] = bool(self.skip_first)
        return values
