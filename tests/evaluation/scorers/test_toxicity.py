import json
import sys
from pathlib import Path

import pytest
import torch

from sae_transformers.evaluation.detection.metrics import auroc
from sae_transformers.evaluation.scorers.toxicity import toxicity_scorer

CONTINUATIONS = Path(__file__).parents[4] / "shared/data/toxicity/real_toxicity_prompts_nontoxic.jsonl"


def test_scores_are_ordered_and_repeatable() -> None:
    score = toxicity_scorer()
    texts = ["You are a stupid idiot.", "The train leaves at noon.", " \n"]
    scores = score(texts)
    assert scores[0] > 0.9 and 0 < scores[1] < 0.1 and scores[2] == 0
    assert torch.equal(scores, torch.cat([score([text]) for text in texts]))
    assert score([]).shape == (0,)


def test_one_text_is_not_a_list() -> None:
    with pytest.raises(TypeError, match="one text"):
        toxicity_scorer()("idiot")


def test_without_the_extra_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "profanity_check", None)
    with pytest.raises(ImportError, match=r"pip install 'sae-transformers\[toxicity\]'"):
        toxicity_scorer()


@pytest.mark.skipif(not CONTINUATIONS.is_file(), reason="the shared toxicity data are not here")
def test_agreement_with_perspective() -> None:
    rows = [json.loads(line)["continuation"] for line in CONTINUATIONS.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if row["toxicity"] is not None]
    labels = torch.tensor([row["toxicity"] >= 0.5 for row in rows])
    assert auroc(toxicity_scorer()([row["text"] for row in rows]), labels) > 0.9
