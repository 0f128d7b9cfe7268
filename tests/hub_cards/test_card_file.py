"""README.md: whose it is, and writing it whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from sae_transformers.hub_cards.card_file import card_name, is_ours, marked, renamed, write_card
from sae_transformers.modeling.repository_files import CARD
from sae_transformers.workflows.publish import first_card

CODE = 'A.from_pretrained("mine", x)\nB.from_pretrained("base")\n'
TEXT = f"---\ntags: []\nmodel-index:\n- name: mine\n---\n\n# mine\n\n{CODE}"


def test_a_marked_card_is_ours_until_it_is_edited() -> None:
    card = marked(TEXT)
    assert is_ours(card) and is_ours(card.replace("\n", "\r\n"))
    assert not is_ours(TEXT)
    assert not is_ours(card.replace("# mine", "# mine!"))
    assert not is_ours(card + "more\n")


@pytest.mark.parametrize(
    "base_line", ["", "base_model: org/base\n", "base_model: org/base\nbase_model_relation: adapter\n"]
)
def test_the_first_card_of_save_pretrained_is_ours(base_line: str) -> None:
    rows = "| 0 | layers.1.resid_post | 64 | topk | good, bad |\n| 1 | x | 64 | relu | - |"
    fields = {"title": "me/m", "base": "`org/base`", "count": 2, "auto_class": "AutoModelForCausalLM", "repo": "me/m"}
    card = CARD.format(base_line=base_line, rows=rows, **fields)
    assert is_ours(card, [CARD]) and not is_ours(card)
    assert not is_ours(card.replace("The model code", "My model code"), [CARD])
    assert not is_ours(card + "\nmore\n", [CARD])


def test_the_template_that_is_read_is_the_one_that_is_used() -> None:
    assert first_card() == CARD


def test_a_card_written_by_hand_is_kept_unless_forced(tmp_path: Path) -> None:
    by_hand = "# mine, by hand\n"
    (tmp_path / "README.md").write_text(by_hand)
    with pytest.raises(ValueError, match=r"README.md was edited by hand.*`force`"):
        write_card(marked(TEXT), tmp_path)
    assert (tmp_path / "README.md").read_text() == by_hand
    write_card(marked(TEXT), tmp_path, force=True)
    write_card(marked(TEXT + "again\n"), tmp_path)  # ours: no force needed
    assert "again" in (tmp_path / "README.md").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_a_card_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    write_card(marked(TEXT), tmp_path)
    with pytest.raises(UnicodeEncodeError):
        write_card("half of it \udcff", tmp_path)
    assert (tmp_path / "README.md").read_text() == marked(TEXT)
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_a_card_is_renamed_where_it_names_its_repository_and_nowhere_else() -> None:
    named = renamed(marked(TEXT), "me/new-1")
    body = (
        TEXT.replace("name: mine", "name: me/new-1").replace("# mine", "# me/new-1").replace('("mine"', '("me/new-1"')
    )
    assert named == marked(body) and is_ours(named)
    assert card_name(named) == "me/new-1" and renamed(named, "me/new-1") == named
    assert renamed("# no code\n", "me/new") == "# no code\n"
    download = "# states\n\nhf download --repo-type dataset states --local-dir states\n"
    assert renamed(download, "me/x") == "# me/x\n\nhf download --repo-type dataset me/x --local-dir states\n"
