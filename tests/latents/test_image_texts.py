"""Hidden states of texts about images: as of each row alone, with the image's own tokens or without."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from sae_transformers.cli import app
from sae_transformers.create_training_data.harvest.blocks import Harvester, HarvestSettings
from sae_transformers.create_training_data.harvest.stream import HiddenStateStream
from sae_transformers.latents.image_texts import image_token_ids, opened_images
from sae_transformers.latents.texts import TextSource, rows_of_list
from sae_transformers.training.sae.dataset import HiddenStateShards
from tests.multimodal import IMAGE, multimodal, picture, processor
from tests.tiny import tiny_base

PLACE = "layers.1.resid_post"
TEXTS = ["w5 w6 <start_of_image> w7 w8", "w9 w10 w11", "w12 w13", "", "w14 <start_of_image> w15 <start_of_image> w16"]
IMAGES = [[picture(1)], None, picture(2), [], [picture(3), picture(4)]]


def source() -> TextSource:
    return rows_of_list(TEXTS, images=IMAGES)


def settings(**options: Any) -> HarvestSettings:
    return HarvestSettings((PLACE,), dtype="float32", **options)


def alone(base: Any, row: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids of a row, and what the second block returns for it alone."""
    pictures = opened_images(IMAGES[row], row)
    text = TEXTS[row] if "image" in TEXTS[row] else "<start_of_image>" * len(pictures) + TEXTS[row]
    inputs = processor()(text=[text], images=[pictures] if pictures else None, return_tensors="pt")
    with torch.no_grad():
        states = base(**inputs, output_hidden_states=True, use_cache=False).hidden_states[2][0]
    return inputs["input_ids"][0], states


@pytest.mark.parametrize("tokens_at_once", [1, 1000])
@pytest.mark.parametrize("image_tokens", ["keep", "drop", "only"])
def test_states_are_those_of_each_row_alone(image_tokens, tokens_at_once):
    base, _ = multimodal()
    chosen = settings(image_tokens=image_tokens, skip_first=False, tokens_per_batch=tokens_at_once)
    harvester = Harvester(base, processor(), source(), chosen)
    block = harvester.tokens(0, source().read(0, 10))
    found = harvester.hidden(block)[PLACE]
    assert block.row.unique().tolist() == ([0, 2, 4] if image_tokens == "only" else [0, 1, 2, 4])
    for row in block.row.unique().tolist():
        ids, states = alone(base, row)
        kept = {"keep": ids >= 0, "drop": ids != IMAGE, "only": ids == IMAGE}[image_tokens]
        assert block.token[block.row == row].tolist() == ids[kept].tolist()
        torch.testing.assert_close(found[block.row == row], states[kept], rtol=1e-5, atol=1e-5)
    assert int((block.token == IMAGE).sum()) == (0 if image_tokens == "drop" else 16)  # four images of four patches


def test_an_image_changes_what_comes_after_it():
    base, _ = multimodal()
    both = rows_of_list(["<start_of_image> w7 w8"] * 2, images=[picture(1), picture(2)])
    harvester = Harvester(base, processor(), both, settings(image_tokens="drop"))
    block = harvester.tokens(0, both.read(0, 2))
    first, second = harvester.hidden(block)[PLACE].chunk(2)
    assert not torch.equal(first, second)


def test_the_same_by_the_command_and_as_a_stream(tmp_path):
    base, _ = multimodal()
    base.save_pretrained(tmp_path / "base")
    processor().save_pretrained(tmp_path / "base")
    rows = []
    for number, text in enumerate(TEXTS):
        names = []
        for i, image in enumerate(opened_images(IMAGES[number], number)):
            names.append(str(tmp_path / f"{number}-{i}.png"))
            image.save(names[-1])
        rows.append({"caption": text, "pictures": names})
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "states"
    command = ["harvest", str(tmp_path / "base"), str(tmp_path / "rows.jsonl"), "--place", PLACE, "--out", str(out)]
    command += ["--column", "caption", "--images", "pictures", "--image-tokens", "drop", "--dtype", "float32"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    harvester = Harvester(base, processor(), source(), settings(image_tokens="drop"))
    block = harvester.tokens(0, source().read(0, 10))
    expected = harvester.hidden(block)[PLACE]
    shards = HiddenStateShards(out)
    stored = shards.__getitems__(torch.arange(len(shards)))[PLACE]
    torch.testing.assert_close(stored, expected, rtol=1e-5, atol=1e-5)
    stream = HiddenStateStream(base, processor(), source(), settings(image_tokens="drop"), batch_tokens=len(expected))
    (batch,) = stream
    torch.testing.assert_close(batch[PLACE].sum(0), expected.sum(0), rtol=1e-4, atol=1e-4)
    again = CliRunner().invoke(app, [*command[:-4], "--image-tokens", "keep", "--dtype", "float32"])
    assert again.exit_code == 2 and "image_tokens" in again.output


def test_what_does_not_go_together_is_refused(tmp_path):
    base, _ = multimodal()
    with pytest.raises(ValueError, match="processor.*PreTrainedTokenizerFast|processor.*Tokenizer"):
        Harvester(base, processor().tokenizer, source(), settings())
    with pytest.raises(ValueError, match="multimodal base"):
        Harvester(tiny_base(), processor(), source(), settings(max_length=64))
    with pytest.raises(ValueError, match="neither packed"):
        Harvester(base, processor(), source(), settings(pack=True))
    with pytest.raises(ValueError, match="column of images"):
        Harvester(base, processor().tokenizer, rows_of_list(TEXTS), settings(image_tokens="only"))
    with pytest.raises(ValueError, match="image_tokens='some'"):
        settings(image_tokens="some")
    harvester = Harvester(base, processor(), source(), settings(max_length=6))
    with pytest.raises(ValueError, match="must be 10 or more.*row 0"):
        harvester.tokens(0, source().read(0, 10))
    for value in ("https://example.org/cat.png", str(tmp_path / "none.png"), 3):
        with pytest.raises(ValueError, match="row 7"):
            opened_images(value, 7)
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match="row 7 cannot be read"):
        opened_images(str(tmp_path / "text.png"), 7)


def test_bytes_are_pictures_and_the_ids_are_the_configs(tmp_path):
    picture(5).save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    for value in (content, {"bytes": content, "path": None}, {"bytes": None, "path": str(tmp_path / "a.png")}):
        (opened,) = opened_images(value, 0)
        assert opened.tobytes() == picture(5).tobytes()
    base, _ = multimodal()
    assert image_token_ids(base.config) == [IMAGE]
    assert image_token_ids(tiny_base().config) == []
