"""The papers of the methods that a model used, as BibTeX.

A method is read from what is on disk: an SAE's activation and concepts, a classifier's head, the default steering.
What leaves no trace there, such as feature tables, is named in the facts file under `methods`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

BIBTEX = {
    "scar": """@misc{harle2024scar,
  title  = {SCAR: Sparse Conditioned Autoencoders for Concept Detection and Steering in LLMs},
  author = {H{\\"a}rle, Ruben and Friedrich, Felix and Brack, Manuel and Deiseroth, Bj{\\"o}rn and
            Schramowski, Patrick and Kersting, Kristian},
  year   = {2024},
  eprint = {2411.07122}, archivePrefix = {arXiv}
}""",
    "selfreg": """@misc{wu2025selfreg,
  title  = {Self-Regularization with Sparse Autoencoders for Controllable LLM-based Classification},
  author = {Wu, Xuansheng and Yu, Wenhao and Zhai, Xiaoming and Liu, Ninghao},
  year   = {2025},
  eprint = {2502.14133}, archivePrefix = {arXiv}
}""",
    "spare": """@inproceedings{zhao2025spare,
  title     = {Steering Knowledge Selection Behaviours in {LLM}s via {SAE}-Based Representation Engineering},
  author    = {Zhao, Yu and Devoto, Alessio and Hong, Giwon and Du, Xiaotang and Gema, Aryo Pradipta and
               Wang, Hongru and He, Xuanli and Wong, Kam-Fai and Minervini, Pasquale},
  booktitle = {Proceedings of NAACL 2025 (Volume 1: Long Papers)},
  pages     = {5117--5136},
  year      = {2025},
  doi       = {10.18653/v1/2025.naacl-long.264},
  eprint    = {2410.15999}, archivePrefix = {arXiv}
}""",
    "topic-alignment": """@misc{joshi2025topic,
  title  = {Enabling Precise Topic Alignment in Large Language Models Via Sparse Autoencoders},
  author = {Joshi, Ananya and Cintas, Celia and Speakman, Skyler},
  year   = {2025},
  eprint = {2506.12576}, archivePrefix = {arXiv}
}""",
    "feature-tables": """@misc{sica-polysemanticity,
  title        = {Polysemanticity \\& Bias Reduction in Language Models},
  author       = {Sica, S. and Gupta, R.},
  howpublished = {Code: https://github.com/seansica/sae-vector-steering}
}""",
    "topk": """@misc{gao2024scaling,
  title  = {Scaling and evaluating sparse autoencoders},
  author = {Gao, Leo and Dupr{\\'e} la Tour, Tom and Tillman, Henk and Goh, Gabriel and Troll, Rajan and
            Radford, Alec and Sutskever, Ilya and Leike, Jan and Wu, Jeffrey},
  year   = {2024},
  eprint = {2406.04093}, archivePrefix = {arXiv}
}""",
    "batch_topk": """@misc{bussmann2024batchtopk,
  title  = {BatchTopK Sparse Autoencoders},
  author = {Bussmann, Bart and Leask, Patrick and Nanda, Neel},
  year   = {2024},
  eprint = {2412.06410}, archivePrefix = {arXiv}
}""",
    "jumprelu": """@misc{rajamanoharan2024jumprelu,
  title  = {Jumping Ahead: Improving Reconstruction Fidelity with JumpReLU Sparse Autoencoders},
  author = {Rajamanoharan, Senthooran and Lieberum, Tom and Sonnerat, Nicolas and Conmy, Arthur and
            Varma, Vikrant and Kram{\\'a}r, J{\\'a}nos and Nanda, Neel},
  year   = {2024},
  eprint = {2407.14435}, archivePrefix = {arXiv}
}""",
    "gated": """@misc{rajamanoharan2024gated,
  title  = {Improving Dictionary Learning with Gated Sparse Autoencoders},
  author = {Rajamanoharan, Senthooran and Conmy, Arthur and Smith, Lewis and Lieberum, Tom and
            Varma, Vikrant and Kram{\\'a}r, J{\\'a}nos and Shah, Rohin and Nanda, Neel},
  year   = {2024},
  eprint = {2404.16014}, archivePrefix = {arXiv}
}""",
}
# The activation of an SAE -> the paper that proposes it. Others are older than the field or have none.
ACTIVATIONS = {
    "topk": "topk", "topk-sigmoid": "topk", "topk-tanh": "topk", "topk-identity": "topk",
    "batch_topk": "batch_topk", "jumprelu": "jumprelu", "gated": "gated",
}  # fmt: skip


def methods_used(saes: Iterable[Mapping[str, Any]], config: Mapping[str, Any], named: Iterable[str] = ()) -> list[str]:
    """Names of the methods, in the order of `BIBTEX`.

    Args:
        saes: entries of a config's `saes`.
        config: the config: `steering` and `feature_head` are read.
        named: further ones, by their author.

    Raises:
        ValueError: a name that `BIBTEX` does not have.
    """
    used = set(named)
    if unknown := sorted(used - set(BIBTEX)):
        raise ValueError(f"`methods` may hold {', '.join(BIBTEX)}. Received: methods={unknown}.")
    for sae in saes:
        origin = str(sae.get("metadata", {}).get("format", ""))
        used.update(name for name in ("scar", "selfreg") if origin == name)
        if sae.get("concepts"):  # latents that were trained to detect something
            used.add("scar")
        if activation := ACTIVATIONS.get(sae.get("activation", "relu")):
            used.add(activation)
    if config.get("feature_head"):
        used.add("selfreg")
    steering = config.get("steering") or {}
    edits = [edit for edit in steering.get("edits", ()) if isinstance(edit, Mapping)]
    if {"shrink", "at_least"} <= {edit.get("op") for edit in edits}:
        used.add("spare")
    if any("scores" in edit for edit in edits):
        used.add("topic-alignment")
    return [name for name in BIBTEX if name in used]


def bibtex(methods: Iterable[str]) -> str:
    """The entries, with an empty line between them."""
    return "\n\n".join(BIBTEX[name] for name in methods)
