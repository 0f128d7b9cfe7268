"""The model that vLLM runs: a base on its Transformers modeling backend, and our SAEs at their places in it."""

# vLLM has an environment of its own.
# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.models.transformers import TransformersForCausalLM, TransformersMoEForCausalLM
from vllm.model_executor.models.utils import PPMissingLayer

from ..modeling import SparseAutoencoder
from ..modeling.base_fingerprint import differing_values, sampled_values
from ..modeling.hook_points import HookPoint, find_blocks, find_hook_point, hook_tensor
from ..modeling.repository_files import check_values
from ..modeling.sae_bank import SaeBank
from .config import layer_of, sae_config
from .ops import register_steps, steer
from .steps import Steps


class SaeForCausalLM(TransformersForCausalLM):
    """A causal language model with SAEs, steered by `steps`.

    The base is built, sharded and compiled by vLLM; SAEs are whole on every rank, in float32, and each rank computes
    the same change of the same hidden state.
    """

    def __new__(cls, *, vllm_config: Any, prefix: str = "") -> Any:
        base = sae_config(vllm_config.model_config).text_config
        experts = any(getattr(base, name, 0) for name in ("num_experts", "num_local_experts", "n_routed_experts"))
        return super().__new__(SaeMoEForCausalLM if experts else cls)

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        self_config = sae_config(vllm_config.model_config)
        base = self_config.text_config
        super().__init__(vllm_config=vllm_config.with_hf_config(base), prefix=prefix)
        self.sae_config = self_config
        self.saes = SaeBank([SparseAutoencoder(entry, dtype=torch.float32) for entry in self_config.sae_configs])
        self.steps = Steps(self.saes)
        self.steps_name = register_steps(self.steps, prefix)
        self._kept: dict[int, Tensor] = {}
        for number in range(len(self.saes)):
            self._place(number)
        if self_config.weights_scope == "sae":
            self.secondary_weights = [
                DefaultModelLoader.Source(
                    str(self_config.base_model_name_or_path), self_config.base_model_revision, prefix="lm."
                )
            ]

    @staticmethod
    def get_model_state_cls() -> type:
        """What the second model runner keeps for this model."""
        from .runner_v2 import SaeModelState

        return SaeModelState

    # -- places ------------------------------------------------------------------------------------------------------

    def _place(self, number: int) -> None:
        entry = self.saes[number].config
        here = {self._is_here(place) for place in (entry.read_at, entry.write_at)}
        if len(here) > 1:
            raise ValueError(
                f"An SAE must read and write on one rank of pipeline parallelism. Received: SAE {number}, reads "
                f"{entry.read_at}, writes {entry.write_at}."
            )
        if here == {False}:
            return
        if entry.read_at == entry.write_at:
            hook_tensor(self._point(entry.read_at), lambda hidden: self._steer(number, hidden, None))
            return
        hook_tensor(self._point(entry.read_at), lambda hidden: self._keep(number, hidden))
        hook_tensor(self._point(entry.write_at), lambda target: self._steer(number, self._kept.pop(number), target))

    def _is_here(self, place: str) -> bool:
        layer = layer_of(place)
        blocks, _ = find_blocks(self.model, self.sae_config.get_text_config())
        return layer is None or not isinstance(blocks[layer], PPMissingLayer)

    def _point(self, place: str) -> HookPoint:
        return find_hook_point(self.model, self.sae_config.get_text_config(), place)

    def _keep(self, number: int, hidden: Tensor) -> Tensor:
        self._kept[number] = hidden
        return hidden

    def _steer(self, number: int, hidden: Tensor, target: Tensor | None) -> Tensor:
        goal = hidden if target is None else target
        if torch.compiler.is_compiling():
            edited = steer(_flat(hidden), _flat(goal), self.steps_name, number)
        elif self.steps.works_at(number):
            edited = self.steps.apply(number, _flat(hidden), None if target is None else _flat(goal))
        else:
            return goal
        return edited.view(goal.shape)

    # -- weights -----------------------------------------------------------------------------------------------------

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Ours to the SAEs, the others to the base.

        Raises:
            ValueError: an SAE's weights are missing or damaged, or the SAEs were put into another base.
        """
        found: dict[str, Tensor] = {}
        loaded = super().load_weights(self._of_base(weights, found))
        for name, tensor in found.items():
            check_values(name, tensor, self.model_config.model)
        self.saes.load_state_dict({name.removeprefix("saes."): tensor for name, tensor in found.items()})
        return loaded | set(found)

    def _of_base(self, weights: Iterable[tuple[str, Tensor]], own: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        fingerprint = self.sae_config.base_fingerprint or {}
        for name, tensor in weights:
            if name.startswith("saes."):
                own[name] = tensor.clone()  # the file may be closed by then
                continue
            name = name.removeprefix("lm.")
            if name in fingerprint and differing_values(fingerprint[name], sampled_values(tensor)):
                raise ValueError(
                    f"The SAEs in {self.model_config.model} were put into a base with other weights. Expected the "
                    f"values of {name!r} as they were then. Received: the base "
                    f"{self.sae_config.base_model_name_or_path!r}."
                )
            yield name, tensor


class SaeMoEForCausalLM(SaeForCausalLM, TransformersMoEForCausalLM):
    """The same for a base with experts."""


def _flat(hidden: Tensor) -> Tensor:
    """(1, T, d), as the backend has it, as (T, d)."""
    return hidden.reshape(-1, hidden.shape[-1])
