"""Read exported features with the package that they are for. Run by that package's interpreter; nothing of ours is
imported.

    python read_annotations_with_peer.py delphi FOLDER       explanations, activations and neighbours of every latent
    python read_annotations_with_peer.py neuronpedia FOLDER  explanations, activations and what an upload would send

Prints JSON.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import sys
import types
from pathlib import Path


class Absent(types.ModuleType):
    """In place of vLLM, which delphi imports for its explainers and takes no part in reading; some 10 GB."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return object


def read_delphi(folder: Path) -> dict:
    absent = ("vllm", "vllm.distributed", "vllm.distributed.parallel_state", "vllm.inputs")
    sys.modules.update({name: Absent(name) for name in absent})
    from delphi.config import ConstructorConfig, SamplerConfig  # pyright: ignore[reportMissingImports]
    from delphi.explainers.explainer import explanation_loader  # pyright: ignore[reportMissingImports]
    from delphi.latents import LatentDataset, LatentRecord  # pyright: ignore[reportMissingImports]
    from transformers import AutoTokenizer

    (module,) = [path.name for path in (folder / "latents").iterdir()]
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    data = LatentDataset(
        folder / "latents", SamplerConfig(), ConstructorConfig(non_activating_source="random"), tokenizer, [module]
    )
    latents, explanations = {}, {}
    for buffer in data.buffers:
        for one in buffer:
            number, active = one.latent.latent_index, one.activation_data
            latents[number] = [float(active.activations.max()), len(active.activations)]
            told = asyncio.run(explanation_loader(LatentRecord(one.latent), str(folder / "explanations")))
            explanations[number] = told.explanation
    near = data.load_neighbours(folder / "neighbours", "decoder_similarity")[module]
    return {"latents": latents, "explanations": explanations, "near": near, "tokens": data.tokens.tolist()}


def read_neuronpedia(folder: Path) -> dict:
    from neuronpedia.np_activation import Activation  # pyright: ignore[reportMissingImports]
    from neuronpedia.np_explanation import Explanation  # pyright: ignore[reportMissingImports]
    from neuronpedia.np_feature import Feature, Logit  # pyright: ignore[reportMissingImports]
    from neuronpedia.requests.feature_request import FeatureRequest  # pyright: ignore[reportMissingImports]

    def rows(kind: str) -> list[dict]:
        files = sorted((folder / kind).glob("batch-*.jsonl.gz"))
        lines = [line for file in files for line in gzip.decompress(file.read_bytes()).decode().splitlines()]
        found = [json.loads(line) for line in lines]
        return [{**row, "source": row["layer"]} for row in found]  # what its API calls a row's source

    explanations = [Explanation.from_np_db_json(row) for row in rows("explanations")]
    activations = [Activation.from_np_db_json(row) for row in rows("activations")]
    features = []
    for row in rows("features"):
        number = int(row["index"])
        pairs = zip(row["pos_str"], row["pos_values"], strict=True)
        features.append(
            Feature(
                row["modelId"], row["source"], number, row["frac_nonzero"], [Logit(*pair) for pair in pairs], None,
                [one for one in explanations if one.index == number],
                [one for one in activations if one.index == number],
            )
        )  # fmt: skip
    request = FeatureRequest(api_key="none")
    sent: list[dict] = []
    request.send_request = lambda **options: sent.append(options)
    request.upload_batch(features[0].modelId, features[0].source, features)
    return {"upload": sent[0]["json"], "texts": [[one.index, one.text] for one in explanations]}


if __name__ == "__main__":
    readers = {"delphi": read_delphi, "neuronpedia": read_neuronpedia}
    print(json.dumps(readers[sys.argv[1]](Path(sys.argv[2]))))
