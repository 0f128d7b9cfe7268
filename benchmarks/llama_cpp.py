"""Is a steering in llama.cpp what it is here? Greedy tokens and first logits of both, on a Llama in float32.

    python benchmarks/llama_cpp.py --model SmolLM2-135M-Instruct --texts rotten_tomatoes/train.jsonl --out table.json

Directions are differences of means of labelled texts (`fit_diffmean`) at several layers. The same steering goes
through `generate` and, exported as a control vector, through llama.cpp (the wheel `xllamacpp`, in an environment that
`peers.py` makes).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFWriter, LlamaFileType

import sae_transformers as st
from sae_transformers.latents.hidden_states import read_hidden_states

RUNNER = Path(__file__).with_name("generate_with_llama_cpp.py")
PROMPTS = (
    "The film was", "My teacher said that", "In the morning", "I think the city", "The new restaurant",
    "After the war", "She opened the letter and", "The best thing about summer",
)  # fmt: skip


def write_llama(base: Any, path: Path) -> None:
    """A Llama as a GGUF file of float32, without a vocabulary: tokens go in and come out as ids.

    llama.cpp rotates neighbouring dimensions of a head, transformers its two halves: rows of q and k are reordered, as
    `convert_hf_to_gguf.py` does.
    """
    config = base.config
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(groups)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(size)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("none")

    def add(name: str, tensor: torch.Tensor, split: int = 0) -> None:
        if split:
            tensor = tensor.view(split, 2, size // 2, -1).transpose(1, 2).reshape(tensor.shape)
        writer.add_tensor(name, np.ascontiguousarray(tensor.detach().float().cpu().numpy()))

    add("token_embd.weight", base.model.embed_tokens.weight)
    for index, block in enumerate(base.model.layers):
        attention, mlp, name = block.self_attn, block.mlp, f"blk.{index}"
        add(f"{name}.attn_norm.weight", block.input_layernorm.weight)
        add(f"{name}.attn_q.weight", attention.q_proj.weight, heads)
        add(f"{name}.attn_k.weight", attention.k_proj.weight, groups)
        add(f"{name}.attn_v.weight", attention.v_proj.weight)
        add(f"{name}.attn_output.weight", attention.o_proj.weight)
        add(f"{name}.ffn_norm.weight", block.post_attention_layernorm.weight)
        add(f"{name}.ffn_gate.weight", mlp.gate_proj.weight)
        add(f"{name}.ffn_up.weight", mlp.up_proj.weight)
        add(f"{name}.ffn_down.weight", mlp.down_proj.weight)
    add("output_norm.weight", base.model.norm.weight)
    if not config.tie_word_embeddings:
        add("output.weight", base.lm_head.weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def compare(
    model: Any, prompts: list[list[int]], steerings: dict[str, Any], new_tokens: int, python: str | Path
) -> list[dict[str, Any]]:
    """A row for each steering, of which the first is none: in how many prompts all greedy tokens are equal, where the
    others part, how many texts the steering changes, and the largest difference of the first new token's logits,
    relative to the largest logit."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        write_llama(model.lm, place / "model.gguf")
        jobs = []
        for number, steering in enumerate(steerings.values()):
            vector = None
            if steering:
                vector = str(place / f"{number}.gguf")
                st.export_steering(model, steering, vector)
            jobs += [{"prompt": prompt, "new_tokens": new_tokens, "vector": vector} for prompt in prompts]
        asked = {"model": str(place / "model.gguf"), "threads": 1, "jobs": jobs, "out": str(place / "out.json")}
        (place / "jobs.json").write_text(json.dumps(asked))
        subprocess.run([str(python), str(RUNNER), str(place / "jobs.json")], check=True)
        theirs = json.loads((place / "out.json").read_text())
    rows, unsteered = [], {}
    for number, (name, steering) in enumerate(steerings.items()):
        equal, changed, parts, largest = 0, 0, [], 0.0
        for prompt, other in zip(prompts, theirs[number * len(prompts) :], strict=False):
            ids = torch.tensor([prompt])
            with torch.no_grad():
                logits = model(ids, steering=steering or False).logits[0, -1]
                whole = model.generate(
                    ids, steering=steering or False, max_new_tokens=new_tokens, min_new_tokens=new_tokens,
                    do_sample=False, pad_token_id=0, eos_token_id=None,
                )  # fmt: skip
            own = whole[0, len(prompt) :].tolist()
            changed += own != unsteered.setdefault(tuple(prompt), own)  # the first steering is none
            difference = (logits - torch.tensor(other["logits"])).abs().max() / logits.abs().max()
            largest = max(largest, float(difference))
            if own == other["tokens"]:
                equal += 1
            else:
                parts.append(next(i for i, (a, b) in enumerate(zip(own, other["tokens"], strict=True)) if a != b))
        rows.append(
            {
                "steering": name,
                "prompts": len(prompts),
                "equal": equal,
                "part_at": parts,
                "changed": changed,
                "logits": f"{largest:.1e}",
            }
        )
    return rows


def main() -> None:
    from peers import llama_cpp_python  # as a script this folder is on the path

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="A Llama: a folder or a Hub id.")
    parser.add_argument("--texts", required=True, help="JSON lines with text and label (0 or 1).")
    parser.add_argument("--rows", type=int, default=100, help="Texts of it that are read, evenly from all of it.")
    parser.add_argument("--layers", default="1,10,15,29", help="Blocks to steer behind, from 0.")
    parser.add_argument("--strength", type=float, default=0.15, help="In mean norms of the hidden state.")
    parser.add_argument("--new-tokens", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path("llama_cpp.json"))
    args = parser.parse_args()
    base, tokenizer, _ = st.load_base(args.model, model_dtype="float32")
    layers = [int(layer) for layer in args.layers.split(",")]
    rows = [json.loads(line) for line in Path(args.texts).read_text(encoding="utf-8").splitlines()]
    rows = rows[:: max(1, len(rows) // args.rows)]
    texts, labels = [row["text"] for row in rows], torch.tensor([row["label"] for row in rows])
    saes, scales = [], []
    for layer in layers:
        config = st.SparseAutoencoderConfig(d_in=base.config.hidden_size, d_sae=1, activation="relu", layer=layer)
        reader = st.SaeForCausalLM.from_base(base, saes=[st.SparseAutoencoder(config)])
        hidden, index = read_hidden_states(reader, tokenizer, texts)
        saes.append(st.direction_sae(st.fit_diffmean(hidden, labels[index])[None], config))
        scales.append(args.strength * float(hidden.norm(dim=-1).mean()))
    model = st.SaeForCausalLM.from_base(base, saes=saes)
    steerings: dict[str, Any] = {"none": None}
    for sign, word in ((1, "more"), (-1, "less")):
        for n, (layer, scale) in enumerate(zip(layers, scales, strict=True)):
            edit = st.FeatureEdit(n, 0, "direction", sign * scale)
            steerings[f"{word}, behind block {layer}"] = st.Steering([edit])
        steerings[f"{word}, behind all"] = st.Steering(
            [st.FeatureEdit(n, 0, "direction", sign * scale / len(layers)) for n, scale in enumerate(scales)]
        )
    prompts = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    found = compare(model, prompts, steerings, args.new_tokens, llama_cpp_python())
    args.out.write_text(json.dumps(found, indent=2))
    for row in found:
        print(row)


if __name__ == "__main__":
    main()
