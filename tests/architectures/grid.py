"""The identities of a model with SAEs, on every family: one cell for each, `yes`, `refused`, `n/a` or `NO`."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from sae_transformers import FeatureEdit, SaeForCausalLM, SaeForSequenceClassification, SparseAutoencoder, Steering
from sae_transformers.modeling.base_classes import UNKNOWN
from sae_transformers.modeling.hook_points import find_blocks
from tests.architectures.base_facts import BaseFacts, base_facts
from tests.architectures.families import IMAGE_TEXT
from tests.architectures.tiny_bases import AUTO_CLASSES, tiny_base
from tests.architectures.tiny_inputs import NEEDS_IMAGE, NO_IMAGE_INPUTS, tiny_inputs
from tests.tiny import tiny_sae

TOLERANCE, NEW_TOKENS = 1e-4, 4
ROUNDING = 1e-5  # of the same weights laid out otherwise in memory, or of another number of threads
SITES = ("resid_pre", "resid_post", "mlp_out", "attn_out")
POSITIONS: tuple[Any, ...] = ("all", "prompt", "generated", "last_prompt", [(1, 3), (-2, None)])
# What a block adds at mlp_out is not all that happens to the stream there: tested in test_hook_families.py.
FOLLOWED = dict.fromkeys(("gemma4", "gemma4_text"), "a per-layer input and a scalar follow what is added")
PUSH = Steering(
    [FeatureEdit(feature=3, op="add", value=2.0), FeatureEdit(feature=7, op="set", value=0.4, unit="norm")]
)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One identity of one family.

    Args:
        state: `yes`; `refused`, with the library's own words; `n/a`, where the base alone breaks it; `NO`.
        note: what was seen, or why.
    """

    state: str
    note: str = ""


def columns() -> dict[str, Callable[[Subject], Cell]]:
    """Name of a column -> what fills it."""
    sites = {site: (lambda subject, site=site: subject.edited_at(site)) for site in SITES}
    return {
        "idle": Subject.idle, **sites, "cached": Subject.cached, "padded": Subject.padded, "detect": Subject.detect,
        "classifier": Subject.classifier, "compile": Subject.compiled,
    }  # fmt: skip


def grid_row(model_type: str, task: str, folder: Path) -> dict[str, Cell]:
    """Every column of one family but those of loading; `folder` receives what is to be loaded."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        subject = Subject(model_type, task)
        row = {name: _filled(column, subject) for name, column in columns().items()}
        saved = _filled(lambda subject: subject.save(folder), subject)
        row |= {name: dataclasses.replace(saved) for name in ("adapter", "full")}
        if (folder / "full").is_dir() and saved.state == "n/a":
            row["full"] = Cell("yes")
        if saved.state == "yes" and (alone := subject.facts.reloaded):
            row |= dict.fromkeys(("adapter", "full"), Cell("yes", f"the base alone: {alone}"))
        return row


def _filled(column: Callable[[Subject], Cell], subject: Subject) -> Cell:
    try:
        with torch.no_grad():
            return column(subject)
    except Refused as refused:
        return Cell("refused", str(refused))
    except ValueError as error:
        refused = "are not the text's tokens" in str(error)
        return Cell("refused" if refused else "NO", f"{type(error).__name__}: {error}")
    except Exception as error:  # whatever a base raises is what is measured
        return Cell("NO", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")


class Refused(Exception):
    """The library said no when the model was made."""


class Subject:
    """A tiny base of a family, what it does alone, and models of it."""

    def __init__(self, model_type: str, task: str) -> None:
        self.task = task
        # Frozen as in a model: torch's products round otherwise where a matrix requires gradients, even without them.
        self.base = tiny_base(model_type, task).requires_grad_(False)
        self.blind = task != IMAGE_TEXT or model_type in NO_IMAGE_INPUTS
        self.facts: BaseFacts = base_facts(self.base)
        if not self.blind:  # padding is tried on texts alone
            self.facts = dataclasses.replace(base_facts(self.base, with_image=True), padded=self.facts.padded)
        self.reads_text = model_type not in NEEDS_IMAGE
        self.inputs = tiny_inputs(self.base, with_image=None if self.blind else True)
        self.ids = self.inputs["input_ids"]
        self.width = 32
        self.layer = self._second_layer()

    def _second_layer(self) -> int:
        """The second block that runs for these inputs; 1 where there are no blocks to be found."""
        try:
            blocks, _ = find_blocks(self.base, self.base.config)
        except ValueError:
            return 1
        ran: list[int] = []

        def note(number: int, output: Any) -> None:
            ran.append(number)
            self.width = _first(output).shape[-1]

        hooks = [
            block.register_forward_hook(lambda module, args, output, number=number: note(number, output))
            for number, block in enumerate(blocks)
        ]
        with torch.no_grad():
            self.base(**(tiny_inputs(self.base, with_image=False) if self.reads_text else self.inputs))
        for hook in hooks:
            hook.remove()
        return sorted(set(ran))[1] if len(set(ran)) > 1 else 1

    def model(self, site: str = "resid_post", base: Any = None) -> SaeForCausalLM:
        """A model on a copy of the base; raises `Refused` where the library refuses the place."""
        try:
            return SaeForCausalLM.from_base(copy.deepcopy(self.base) if base is None else base, saes=[self.sae(site)])
        except ValueError as error:
            raise Refused(str(error)) from error

    def sae(self, site: str) -> SparseAutoencoder:
        return tiny_sae(layer=self.layer, site=site, d_in=self.width)

    def generate(self, model: Any, inputs: dict[str, Tensor] | None = None, **options: Any) -> Tensor:
        """Logits of the new tokens, (rows, n, vocabulary)."""
        torch.manual_seed(0)
        size = self.base.get_input_embeddings().num_embeddings
        words = list(range(90, size)) if self.base.config.sub_configs else None
        settings = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
        report = {"return_dict_in_generate": True, "output_logits": True, "suppress_tokens": words}
        found = model.generate(**(inputs or self.inputs), **settings, **report, **options)
        return torch.stack(found.logits, dim=1)

    # -- cells -------------------------------------------------------------------------------------------------------

    def idle(self) -> Cell:
        """Logits and generated logits are the base's, bit for bit."""
        model = self.model()
        torch.manual_seed(0)
        expected = self.base(**self.inputs).logits
        for options in ({}, {"output_features": True}, {"steering": False}):
            torch.manual_seed(0)
            if not torch.equal(model(**self.inputs, **options).logits, expected):
                return Cell("NO", f"logits with {options or 'no option'}")
        if self.facts.generates:
            return Cell("yes", f"generate: the base alone: {self.facts.generates}")
        same = torch.equal(self.generate(model), self.generate(self.base))
        return Cell("yes") if same else Cell("NO", "generated tokens")

    def edited_at(self, site: str) -> Cell:
        """The SAE at a site does what a plain hook there does; `*_out` is what the block adds."""
        model = self.model(site)
        sae = model.saes[0]
        edit = Steering([FeatureEdit(feature=3, op="direction", value=2.0)])
        found = model(**self.inputs, steering=edit).logits
        added = 2.0 * sae.W_dec[3]
        with _pushed(self.base, site, self.layer, added):
            expected = self.base(**self.inputs).logits
        cell = self._compared(found, expected)
        if cell.state == "NO" and site == "mlp_out" and self.base.config.model_type in FOLLOWED:
            return Cell("n/a", FOLLOWED[self.base.config.model_type])
        return cell

    def cached(self) -> Cell:
        """Steered `generate` is the same with and without the cache, at every kind of position."""
        if self.facts.cached or self.facts.generates:
            return Cell("n/a", f"the base alone: {self.facts.cached or self.facts.generates}")
        model = self.model()
        plain = self.generate(model, steering=False)
        try:
            self.generate(model, steering=PUSH)
        except RuntimeError as error:
            if "of its own" in str(error):
                raise Refused(str(error)) from error
            raise
        moved = 0
        for positions in POSITIONS:
            steering = Steering(PUSH.edits, positions=positions)
            with_cache = self.generate(model, steering=steering)
            cell = self._compared(with_cache, self.generate(model, steering=steering, use_cache=False))
            if cell.state != "yes":
                return Cell("NO", f"positions={positions!r}: {cell.note}")
            moved += not torch.equal(with_cache, plain)
        return Cell("yes") if moved == len(POSITIONS) else Cell("NO", f"{moved} of {len(POSITIONS)} edits had effect")

    def _text(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """A text with padding on its left, and alone."""
        inputs = tiny_inputs(self.base, with_image=False)
        ids = inputs["input_ids"]
        pad = ids.new_zeros(len(ids), 3)
        mask = torch.cat([pad, torch.ones_like(ids)], 1)
        return {"input_ids": torch.cat([pad, ids], 1), "attention_mask": mask}, {"input_ids": ids}

    def padded(self) -> Cell:
        """A padded text is steered as it is alone."""
        if self.facts.padded or self.facts.generates:
            return Cell("n/a", f"the base alone: {self.facts.padded or self.facts.generates}")
        if not self.reads_text:
            return Cell("n/a", "reads texts about images only")
        model = self.model()
        steering = Steering(PUSH.edits, positions=[(1, 3), (-1, None)])
        left, alone = self._text()
        return self._compared(*(self.generate(model, inputs, steering=steering) for inputs in (left, alone)))

    def detect(self) -> Cell:
        """A latent's score is that of the hidden state; of a padded text as of the text alone."""
        model = self.model()
        states = []
        with _seen(self.base, self.layer, states):
            self.base(**self.inputs)
        sae = model.saes[0]
        expected = ((states[0] - sae.b_dec) @ sae.W_enc + sae.b_enc)[..., 3].mean(-1)
        cell = self._compared(
            model.detect(self.inputs, feature=3, pre_activations=True, skip_first=0).per_text, expected
        )
        if cell.state != "yes" or not self.reads_text or self.facts.padded or self.facts.generates:
            return cell
        left, alone = self._text()
        return self._compared(
            *(model.detect(inputs, feature=3, pre_activations=True, skip_first=0).per_text for inputs in (left, alone))
        )

    def save(self, folder: Path) -> Cell:
        """Write the model beside a pointer to its base, and whole, with what both must give when loaded again."""
        kind = AUTO_CLASSES[self.task]
        self.base.save_pretrained(folder / "base")
        model = self.model()
        expected = {}
        for name, options in (("idle", {}), ("steered", {"steering": PUSH})):
            torch.manual_seed(0)
            expected[name] = model(**self.inputs, **options).logits.contiguous()
        model.config.weights_scope = "full"
        model.save_pretrained(folder / "full")
        save_file(
            {k: v.clone(memory_format=torch.contiguous_format) for k, v in self.inputs.items()},
            folder / "inputs.safetensors",
        )
        save_file(expected, folder / "expected.safetensors")
        (folder / "steering.json").write_text(PUSH.to_json())
        try:
            alone = kind.from_pretrained(folder / "base")
        except ValueError as error:
            return Cell("n/a", f"the base alone cannot be loaded: {str(error).splitlines()[0][:120]}")
        self.model(base=alone).save_pretrained(folder / "adapter")
        return Cell("yes")

    def classifier(self) -> Cell:
        """A feature head on the family's body scores a padded text as the text alone."""
        config = copy.deepcopy(self.base.config)
        head = {"feature_head": {"pooling": "mean"}, "saes": [self.sae("resid_post")]}
        try:
            base = transformers.AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
        except ValueError as error:
            if UNKNOWN not in str(error):
                return Cell("n/a", f"the base alone: {str(error).splitlines()[0][:120]}")
            return Cell("n/a", "transformers has no text classifier of this family")
        try:
            model = SaeForSequenceClassification.from_base(base.eval(), **head).eval()
        except ValueError as error:
            raise Refused(str(error)) from error
        left, alone = self._text()
        scores = model(**alone).logits
        if not torch.isfinite(scores).all():
            return Cell("NO", "not finite")
        if self.facts.padded or self.facts.generates:
            return Cell("yes", f"without padding; the base alone: {self.facts.padded or self.facts.generates}")
        return self._compared(model(**left).logits, scores)

    def compiled(self) -> Cell:
        """One graph, idle and steered, gives what eager execution gives."""
        model = self.model()
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        plan = model.prepare_steering(PUSH)
        inputs = {**self.inputs, "use_cache": False}
        try:
            torch.compile(self.base, fullgraph=True, backend="eager")(**inputs)
        except Exception as error:
            return Cell("n/a", f"the base alone: {type(error).__name__}")
        cell = self._compared(compiled(**inputs).logits, model(**inputs).logits)
        if cell.state != "yes":
            return cell
        return self._compared(compiled(**inputs, steering=plan).logits, model(**inputs, steering=plan).logits)

    @staticmethod
    def _compared(found: Tensor, expected: Tensor) -> Cell:
        if found.shape != expected.shape:
            return Cell("NO", f"shapes {tuple(found.shape)} and {tuple(expected.shape)}")
        difference = float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
        return Cell("yes" if difference <= TOLERANCE else "NO", "" if difference <= TOLERANCE else f"{difference:.1e}")


def _first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


@contextmanager
def _seen(base: Any, layer: int, states: list) -> Iterator[None]:
    block = find_blocks(base, base.config)[0][layer]
    handle = block.register_forward_hook(lambda m, args, output: states.append(_first(output)))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _pushed(base: Any, site: str, layer: int, added: Tensor) -> Iterator[None]:
    """A plain hook on the base: `added` to what a block reads or returns.

    `mlp_out` is the last thing that a block adds, so adding there is adding to what the block returns; `attn_out` is
    compared where the library itself says the module is, and its meaning in tests/modeling/test_hook_families.py."""
    from sae_transformers.modeling.hook_points import find_hook_point

    def output(module: Any, args: Any, found: Any) -> Any:
        if isinstance(found, Tensor):
            return found + added
        return type(found)((found[0] + added, *found[1:]))

    def inputs(module: Any, args: tuple, kwargs: dict) -> Any:
        if args:
            return (args[0] + added, *args[1:]), kwargs
        name = next(n for n, v in kwargs.items() if isinstance(v, Tensor) and v.is_floating_point() and v.ndim == 3)
        return args, {**kwargs, name: kwargs[name] + added}

    block = find_blocks(base, base.config)[0][layer]
    if site == "resid_pre":
        handle = block.register_forward_pre_hook(inputs, with_kwargs=True)
    else:
        place = site if site == "attn_out" else "resid_post"
        module = find_hook_point(base, base.config, f"layers.{layer}.{place}").module
        handle = module.register_forward_hook(output)
    try:
        yield
    finally:
        handle.remove()
