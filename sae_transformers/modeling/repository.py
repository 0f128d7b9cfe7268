"""Models as repositories: made from a base and SAEs, saved adapter-sized or in full with their code, loaded again.

`weights_scope="sae"` writes the SAEs (and a classifier's head) and a pointer to the base; loading fetches the base
from its own repository. `weights_scope="full"` writes everything. Only safetensors are read.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig

from .base_classes import keep_soft_cap, load_base
from .base_fingerprint import base_fingerprint, differing
from .base_wrapping import adopt, check_unchanged
from .compatibility import check_model
from .configuration_sae import AUTO_MAP
from .grouped_model import given_penalties
from .output_files import locked_folder, write_whole
from .plain_files import named_errors, plain_errors, written_tensors
from .repository_files import (
    HUB_OPTIONS,
    check_base,
    check_generation_config,
    check_is_base,
    check_loaded,
    check_quantization,
    check_values,
    commit_of,
    config_values,
    model_card,
    read_adapter,
    weight_files,
    whole_path,
)
from .sae_bank import SaeBank, new_saes
from .sae_losses import check_applicable
from .scar_hook import ScarHook
from .sparse_autoencoder import SparseAutoencoder
from .stored_annotations import keep_names
from .stored_claims import Stored, check_head_claims, check_layer_claims, check_sae_claims, held_against, stored_shapes
from .uploading import UPLOAD_OPTIONS, upload

LABEL_OPTIONS = ("num_labels", "id2label", "label2id", "problem_type")


if TYPE_CHECKING:
    from transformers import PreTrainedModel as Base
else:
    Base = object


class RepositoryMixin(Base):  # pyright: ignore[reportIncompatibleVariableOverride]
    """Making, loading, saving and publishing of models with SAEs."""

    config: Any
    lm: Any
    saes: SaeBank
    auto_model: Any
    other_auto_models: tuple[Any, ...]
    config_class: Any
    _wrap_base: Any
    # What the config says and the base is loaded with.
    _base_options: tuple[str, ...] = ()
    _head_is_saved = False  # with the SAEs, whatever the base has
    _losses: tuple[str, ...] = ()  # terms of `LossWeights` that the head computes

    # -- making ------------------------------------------------------------------------------------------------------

    @classmethod
    def from_base(
        cls,
        base: Any,
        saes: SparseAutoencoder | Sequence[SparseAutoencoder] = (),
        *,
        weights_scope: str = "sae",
        steering: Any = None,
        loss_weights: Any = None,
        detach_hidden: bool = True,
        feature_head: Any = None,
        force: bool = False,
        **base_options: Any,
    ) -> Any:
        """Put SAEs into a base model.

        Args:
            base: a loaded model, which is used and not copied, or what `from_pretrained` of its class takes.
            saes: the SAEs; their order gives their numbers. Each must know its place (`layer` and `site`, or `hook`).
            weights_scope: `sae` freezes the base, since it is not saved; `full` leaves and saves it.
            steering: default steering.
            loss_weights: see `LossWeights`.
            detach_hidden: see `SaeConfig`.
            feature_head: for classifiers, a head on an SAE's hidden state; see `FeatureHeadConfig`.
            force: put an SAE into a model of another name than the one it was made for.
            base_options: for loading the base: `revision`, `dtype`, `device_map`, `quantization_config`, ...

        Keyword Args:
            feature_penalties, group_penalties (list): terms of the loss; see `FeaturePenalty` and `GroupPenalty`.

        Raises:
            ValueError: a loss that this head does not compute, an SAE without a place, or one that does not fit this
                base: made for another model, of another width, for a layer or module that is not there.
        """
        saes = [saes] if isinstance(saes, nn.Module) else list(saes)
        for number, sae in enumerate(saes):
            if not getattr(sae.config, "placed", False):
                raise ValueError(
                    f"SAE {number} does not say where it stands; set `sae.config.layer` and `sae.config.site`, or "
                    f"`sae.config.hook`."
                )
        check_applicable(loss_weights, cls._losses, cls.__name__, with_head=feature_head is not None)
        penalties = given_penalties(cls, base_options, [sae.config for sae in saes], feature_head)
        name = getattr(base, "name_or_path", None) if isinstance(base, nn.Module) else str(base)
        for number, sae in enumerate(saes):  # before a large base is loaded
            if not force:
                check_model(sae.config, number, name)
        revision = None
        if not isinstance(base, nn.Module):
            if revision := commit_of(str(base), base_options):  # what is named is what is loaded, from here on
                base_options["revision"] = revision
            base = cls._load_base(str(base), base_options, untrained=None if feature_head is None else set())
        elif base_options:
            raise TypeError(
                f"Options {sorted(base_options)} load a base by name. Received: a loaded {type(base).__name__}."
            )
        text_config: Any = base.config
        text_config.architectures = text_config.architectures or [type(base).__name__]  # which class to make again
        config = cls.config_class(
            text_config=text_config,
            saes=[sae.config for sae in saes],
            weights_scope=weights_scope,
            base_model_name_or_path=whole_path(str(base.name_or_path)) if base.name_or_path else None,
            # For a model that was loaded elsewhere: older releases note the commit in its config.
            base_model_revision=revision or getattr(text_config, "_commit_hash", None),
            base_fingerprint=base_fingerprint(base),
            steering=steering if steering is None or isinstance(steering, dict) else steering.to_dict(),
            loss_weights=loss_weights,
            detach_hidden=detach_hidden,
            feature_head=feature_head,
            **penalties,
        )
        model = cls(config, lm=cls._wrap_base(base), saes=saes)
        adopt(model, base)
        return model

    @classmethod
    def _load_base(cls, name: str, options: dict[str, Any], config: Any = None, untrained: Any = None) -> Any:
        return load_base((cls.auto_model, *cls.other_auto_models), name, options, config, untrained)

    def _is_head(self, name: str) -> bool:
        """Whether a parameter of `lm` belongs to the head that was trained with the SAEs, not to the base."""
        return False

    # -- loading -----------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        """As `PreTrainedModel.from_pretrained`; an adapter-sized repository brings its base along.

        Keyword Args:
            base_model (str | PreTrainedModel): for an adapter-sized repository, the base in place of the one it
                names: a path, an id or a model.
            force (bool): take a base whose weights are not those that the SAEs were put into.
            mod_features (int): as all fields of SCAR's `hook`, set when the model is loaded.

        Raises:
            ValueError: the base is not the one the SAEs were made for, or the checkpoint is damaged or not
                safetensors.
            OSError: the base cannot be found.
        """
        config = kwargs.get("config")
        hub = {k: kwargs[k] for k in HUB_OPTIONS if kwargs.get(k) is not None}
        if not isinstance(config, PreTrainedConfig):
            config_values(str(config or pretrained_model_name_or_path), hub)
            labels = {k: kwargs[k] for k in LABEL_OPTIONS if kwargs.get(k) is not None}
            with named_errors(f"config.json of {pretrained_model_name_or_path}"):
                config = cls.config_class.from_pretrained(config or pretrained_model_name_or_path, **hub, **labels)
        if getattr(config, "text_config", None) is None:
            raise ValueError(
                f"{pretrained_model_name_or_path} is a base model without SAEs, or has no config.json. Expected what "
                f"`save_pretrained` of a model with SAEs wrote. Use "
                f"`{cls.__name__}.from_base({str(pretrained_model_name_or_path)!r}, saes=[...])`."
            )
        scope = getattr(config, "weights_scope", "full")
        force = kwargs.pop("force", False)
        if scar := {field: kwargs.pop(field) for field in ScarHook.FIELDS if field in kwargs}:
            loaded = cls.from_pretrained(pretrained_model_name_or_path, *model_args, force=force, **kwargs)
            (loaded[0] if isinstance(loaded, tuple) else loaded).hook.set(**scar)
            return loaded
        if kwargs.pop("use_safetensors", None) is False:
            raise ValueError("A pickle can run code and is not read. Received: use_safetensors=False.")
        name = str(pretrained_model_name_or_path)
        if kwargs.get("state_dict") is not None:
            kwargs.pop("base_model", None)
            return super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        check_generation_config(name, hub)
        if scope != "sae":
            kwargs.pop("base_model", None)
            with_info = kwargs.pop("output_loading_info", False)
            any_size = kwargs.pop("ignore_mismatched_sizes", False)
            stored = Stored(name, stored_shapes(weight_files(name, hub)), any_size)
            check_sae_claims(config.sae_configs, stored, may_lack=True)
            check_layer_claims(config, stored)
            check_head_claims(config, stored)
            options = dict.fromkeys(("use_safetensors", "output_loading_info", "ignore_mismatched_sizes"), True)
            with named_errors(name), plain_errors(name), held_against(stored):
                loaded: Any = super().from_pretrained(name, *model_args, **kwargs, **options)
            model, info = loaded
            keep_soft_cap(model.lm, kwargs)
            check_loaded(model, info, name, any_size=any_size)
            model._point_to_annotations(name, hub)
            model._freeze_saes()
            return (model, info) if with_info else model
        for option in ("config", *LABEL_OPTIONS):
            kwargs.pop(option, None)
        with named_errors(name):
            return cls._from_adapter(name, config, hub, kwargs, force=force)

    @classmethod
    def _from_adapter(cls, name: str, config: Any, hub: dict[str, Any], kwargs: dict[str, Any], *, force: bool) -> Any:
        with_info = kwargs.pop("output_loading_info", False)
        base = kwargs.pop("base_model", None)
        for option in ("revision", "subfolder", "code_revision", "use_safetensors", "adapter_kwargs", "_from_auto"):
            kwargs.pop(option, None)
        weights = read_adapter(name, hub)
        stored = Stored(name, {key: tuple(tensor.shape) for key, tensor in weights.items()})
        check_sae_claims(config.sae_configs, stored)
        check_head_claims(config, stored)
        untrained: set[str] = set()  # none of a base that was given: its head is meant
        if base is None or isinstance(base, (str, os.PathLike)):
            base = cls._load_named_base(name, base, config, kwargs, untrained)
        check_base(config.text_config, base.config, name)
        if not force and (parameter := differing(config.base_fingerprint or {}, base)) is not None:
            raise ValueError(
                f"The SAEs in {name} were put into a base with other weights. Expected the values of {parameter!r} as "
                f"they were then. Received: the base {base.name_or_path!r}. Give the right one as `base_model=`, or "
                f"`force=True` to take this one all the same."
            )
        config.text_config = base.config
        with torch.device("meta"):  # no memory of their own: what is stored takes their place
            saes = new_saes(config.sae_configs)
        model = cls(config, lm=cls._wrap_base(base), saes=saes)
        missing = model._load_adapter(weights, name, untrained)
        adopt(model, base)
        model.name_or_path = name
        model._point_to_annotations(name, hub)
        if model.can_generate():
            with contextlib.suppress(OSError):  # none published: the base's is in place
                model.generation_config = GenerationConfig.from_pretrained(name, **hub)
        model.eval()
        info = {"missing_keys": set(missing), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}
        return (model, info) if with_info else model

    @classmethod
    def _load_named_base(cls, name: str, base: Any, config: Any, kwargs: dict[str, Any], untrained: set[str]) -> Any:
        options = dict(kwargs)
        if config._attn_implementation is not None:
            options.setdefault("attn_implementation", config._attn_implementation)
        source = base if base is not None else config.base_model_name_or_path
        if source is None:
            raise ValueError(
                f"{name} holds SAEs only and names no base. Pass `base_model=`, the model they were made for."
            )
        if base is None and config.base_model_revision is not None and not Path(source).is_dir():
            options["revision"] = config.base_model_revision
        for option in cls._base_options:
            if getattr(config, option, None) is not None:
                options.setdefault(option, getattr(config, option))
        try:
            check_is_base(str(source), options, name, config.model_type)
            return cls._load_base(str(source), options, config.text_config, untrained if cls._head_is_saved else None)
        except OSError as error:
            raise OSError(
                f"{name} holds SAEs for the base {str(source)!r}, which could not be loaded. "
                f"Pass `base_model=` with its path or id. {error}"
            ) from error

    def _point_to_annotations(self, name: str, hub: dict[str, Any]) -> None:
        for number, sae in enumerate(self.saes):
            sae.stored_annotations.point(name, hub, number)

    def _adapter_names(self) -> set[str]:
        """Names of everything that an adapter-sized checkpoint holds."""
        return {
            n
            for n in self.state_dict()
            if n.startswith(("saes.", "feature_head.")) or (n.startswith("lm.") and self._is_head(n[3:]))
        }

    def _load_adapter(self, weights: dict[str, Tensor], name: str, untrained: set[str]) -> list[str]:
        """Take the values of an adapter; names of head parameters that are in no checkpoint."""
        expected = self._adapter_names()
        own = self.state_dict()
        missing = sorted(n for n in expected - set(weights) if n.startswith("saes."))
        absent = {n for n in expected - set(weights) if not n.startswith("saes.")}
        heads = sorted(n for n in absent if n.startswith("feature_head.") or n.removeprefix("lm.") in untrained)
        unexpected = sorted(n for n in set(weights) - expected if n.startswith("saes."))
        if missing or unexpected:
            raise ValueError(
                f"The checkpoint in {name} does not fit its config: missing {missing or 'none'}, unexpected "
                f"{unexpected or 'none'}."
            )
        for key in sorted(expected & set(weights)):
            if tuple(weights[key].shape) != tuple(own[key].shape):
                raise ValueError(
                    f"{key} in {name} has shape {tuple(weights[key].shape)}; its config asks for "
                    f"{tuple(own[key].shape)}."
                )
            if weights[key].dtype != torch.bool:  # which features are unintended
                check_values(key, weights[key], name)
        if heads:
            warnings.warn(
                f"{name} has no trained head ({', '.join(heads)}): it is new and needs training.", stacklevel=4
            )
        stored = {key: weights[key].to(own[key].dtype) for key in expected & set(weights)}
        of_saes = {key.removeprefix("saes."): stored.pop(key) for key in list(stored) if key.startswith("saes.")}
        self.load_state_dict(stored, strict=False)
        self.saes.load_state_dict(of_saes, assign=True)
        return heads

    # -- saving ------------------------------------------------------------------------------------------------------

    def save_pretrained(
        self, save_directory: str | os.PathLike, *args: Any, push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """As `PreTrainedModel.save_pretrained`, with the model's code, all `auto_map` entries and a card if there is
        none."""
        if "weights_scope" in kwargs:  # would be dropped without a word
            given = kwargs["weights_scope"]
            raise TypeError(f"Set `config.weights_scope`, then save. Received: weights_scope={given!r}.")
        if push_to_hub:
            repo_id = kwargs.pop("repo_id", Path(save_directory).name)
            options = {k: kwargs.pop(k) for k in UPLOAD_OPTIONS if k in kwargs}
            card = Path(save_directory) / "README.md"
            new_card = not card.exists()
            self.save_pretrained(save_directory, *args, **kwargs)
            if kwargs.get("is_main_process", True):
                if new_card:
                    write_whole(card, model_card(self, repo_id))
                upload(str(save_directory), repo_id, type(self).__name__, **options)
            return
        with locked_folder(save_directory) if kwargs.get("is_main_process", True) else contextlib.nullcontext():
            self._save_files(save_directory, *args, **kwargs)

    def _save_files(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        scope = self.config.weights_scope
        self._keys_to_ignore_on_save = set()
        check_quantization(self.lm, scope)
        if scope == "sae":
            check_unchanged(self)
            keep = self._adapter_names()
            self._keys_to_ignore_on_save = {
                n for n in (kwargs.get("state_dict") or self.state_dict()) if n not in keep
            }
        self.config.auto_map = dict(AUTO_MAP)
        keep_names(self.config)
        if self.can_generate() and self.generation_config is not None:
            self.generation_config._from_model_config = False  # a config marked so loses fields it does not know
        previous, type(self)._auto_class = type(self)._auto_class, self.auto_model.__name__
        try:
            with written_tensors(save_directory):
                super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            type(self)._auto_class = previous
        if not kwargs.get("is_main_process", True):
            return
        for number, sae in enumerate(self.saes):
            sae.stored_annotations.save(save_directory, number)
        card = Path(save_directory) / "README.md"
        if not card.exists():
            write_whole(card, model_card(self, Path(save_directory).name))

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Save as `save_pretrained` does and upload it in one commit; returns the commit's information.

        Args:
            repo_id: `user/name` on the Hub.
            kwargs: `private`, `token`, `revision`, `commit_message`, `commit_description`, `create_pr`,
                `max_shard_size`.
        """
        options = {k: kwargs.pop(k) for k in UPLOAD_OPTIONS if k in kwargs}
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / repo_id.rsplit("/", 1)[-1]
            self.save_pretrained(path, **kwargs)
            write_whole(path / "README.md", model_card(self, repo_id))
            return upload(str(path), repo_id, type(self).__name__, **options)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        before = self.config.get_text_config().vocab_size
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        self._resized = getattr(self, "_resized", False) or embeddings.weight.shape[0] != before
        return embeddings
