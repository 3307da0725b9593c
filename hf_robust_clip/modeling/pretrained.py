"""Loading and saving of zero-shot classifiers: plain checkpoints of transformers, whole or refused."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoImageProcessor, AutoTokenizer

from ..digits_clip import EMBEDDED_MODEL, digits_clip_path
from ..names import check_embedded
from ..normalisation import adopt_normalisation, carry_normalisation, has_adapter, without_normalisation
from .checkpoints import (
    adapter_config,
    base_of,
    check_adapter_family,
    check_family,
    check_loaded,
    check_stored,
    check_tower_sizes,
    check_whole_adapters,
    commit_of,
    explained,
    quiet_report,
    read_config,
    readable,
    take_normalisation,
)
from .classifier import ZeroShotClassifier
from .image_kernels import use_patch_product
from .untrusted import ADAPTER, ADAPTER_CONFIG, NO_CODE, check_adapter_file, check_config, check_weight_files

WHERE = ("revision", "cache_dir", "token", "local_files_only", "subfolder", "force_download")


def checked_source(name: str | Path, subfolder: str = "") -> str:
    """Folder or Hub id of a checkpoint; of the embedded model its folder. Raises OSError for a folder without one."""
    source = str(name)
    if source == EMBEDDED_MODEL:
        check_embedded(source)
        source = digits_clip_path()
    folder = Path(source, subfolder)
    if folder.is_dir() and not any((folder / file).is_file() for file in ("config.json", ADAPTER_CONFIG)):
        raise OSError(f"can't load {source!r}: the folder lacks a readable config.json; use save_pretrained.")
    return source


class PretrainedClassifier(ZeroShotClassifier):
    """A zero-shot classifier with `from_pretrained`, `load_adapter` and `save_pretrained`.

    A family names `plain_cls`, the model of transformers that its checkpoints are, and `processor_cls`, made of an
    image processor and a tokenizer.
    """

    plain_cls: ClassVar[Any]
    processor_cls: ClassVar[Any]

    def __init__(self, config: Any):
        super().__init__(config)
        self.register_load_state_dict_pre_hook(adopt_normalisation)
        self.register_load_state_dict_pre_hook(check_whole_adapters)

    @classmethod
    def around(cls, plain: Any, processor: Any) -> Any:
        """Give a model of transformers that is in memory already this interface. Weights are shared, not copied."""
        with torch.device("meta"):
            model = cls(plain.config)
        for name, child in plain.named_children():
            setattr(model, name, child)
        use_patch_product(model.image_modules[0])
        for name, parameter in plain.named_parameters(recurse=False):
            setattr(model, name, parameter)
        for name in ("image_mean", "image_std"):
            setattr(model, name, torch.empty_like(getattr(model, name), device=plain.device))
        model.set_processor(processor)
        return model.train(plain.training)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, *args, **kwargs):  # the Hub's own signature
        """Load weights and processor from a folder or the Hub. Arguments are those of transformers' models.

        Args:
            pretrained_model_name_or_path: a whole model, an adapter (which is loaded on its base model), or
                `"digits-clip"`, the one that is shipped with the package.

        Raises OSError with the mend if there is no such checkpoint, it is of another family, its files are cut short
        or hold other weights than the model has, or it has no processor.
        """
        where: dict[str, Any] = {name: kwargs[name] for name in WHERE if name in kwargs}
        wants_info = kwargs.pop("output_loading_info", False)
        source = checked_source(pretrained_model_name_or_path, kwargs.get("subfolder", ""))
        adapter = adapter_config(source, kwargs.get("revision"), where)
        if adapter is not None:
            own = {name: value for name, value in kwargs.items() if name not in ("revision", "subfolder")}
            base, revision = base_of(source, adapter, where)
            model = cls.from_pretrained(base, *args, **own, revision=revision)
            info = explained(source, lambda: model.load_adapter(source, adapter_kwargs=where)).to_dict()
            return (model, info) if wants_info else model
        config = read_config(source, where)
        check_family(source, cls.config_class.model_type, config)
        check_config(source, config, kwargs)
        check_weight_files(source, where)
        check_stored(source, where)
        check_tower_sizes(source, explained(source, lambda: cls.config_class.from_pretrained(source, **where)), where)
        kwargs.setdefault("attn_implementation", "sdpa")  # a configuration may name code on the Hub
        kwargs.update(output_loading_info=True, ignore_mismatched_sizes=True)  # `check_loaded` refuses them by name
        kwargs["use_safetensors"] = True
        with quiet_report():
            model, info = explained(
                source, lambda: super(PretrainedClassifier, cls).from_pretrained(source, *args, **kwargs)
            )
        check_loaded(source, info)
        image_processor = explained(source, lambda: AutoImageProcessor.from_pretrained(source, **where, **NO_CODE))
        tokenizer = explained(source, lambda: AutoTokenizer.from_pretrained(source, **where, **NO_CODE))
        model.set_processor(cls.processor_cls(image_processor, tokenizer))
        model.config._commit_hash = explained(source, lambda: commit_of(source, where))
        return (model, info) if wants_info else model

    def load_adapter(self, peft_model_id: str | None = None, adapter_name: str | None = None, *args, **kwargs):
        """Load an adapter into the model, as transformers does. Raises OSError if its weights don't fill it."""
        if peft_model_id is not None:
            where = kwargs.get("adapter_kwargs") or {}
            check_adapter_file(str(peft_model_id), where)
            check_stored(str(peft_model_id), where)
            swapped = kwargs.get("hotswap") is True
            check_adapter_family(self, str(peft_model_id), where)
            take_normalisation(self, str(peft_model_id), where, alone=not (swapped or has_adapter(self)))
        kwargs["ignore_mismatched_sizes"] = True  # `check_loaded` refuses them by name
        load = partial(super().load_adapter, peft_model_id, adapter_name, *args, **kwargs)
        with quiet_report():
            info = readable(str(peft_model_id), load)
        own = adapter_name or "default"
        info.unexpected_keys = without_normalisation(info.unexpected_keys)
        info.missing_keys = {key for key in info.missing_keys if own in key.split(".")}  # not of the base model
        check_loaded(str(peft_model_id), info.to_dict(), "the adapter")
        return info

    def save_pretrained(self, save_directory: str | Path, *args, **kwargs) -> None:
        """Write a plain checkpoint of transformers, with the processor (mean and std those of this model) beside it;
        of a model with an adapter that `load_adapter` put in, the adapter with the processor.

        Raises ValueError for a model with an adapter by PEFT inside: `save_pretrained` of its `PeftModel` writes that.
        """
        if kwargs.pop("push_to_hub", False):
            raise ValueError("push_to_hub=True would push no processor; call model.push_to_hub(id) instead.")
        processor = self.require_processor()
        self._check_adapters()
        if self.normalisation is not None:  # the processor's file may have been changed since
            self.set_normalisation(*self.normalisation)
        self.config.architectures = [self.plain_cls.__name__]
        super().save_pretrained(save_directory, *args, **kwargs)
        config_file = Path(save_directory) / "config.json"
        if config_file.is_file():
            config_file.write_text(config_file.read_text().replace(type(self).__name__, self.plain_cls.__name__))
        if kwargs.get("is_main_process", True):
            processor.save_pretrained(save_directory)
            carry_normalisation(self, Path(save_directory) / ADAPTER)

    def _check_adapters(self) -> None:
        """Raise ValueError for adapters that a checkpoint of this model would lose or mix up."""
        kinds = {module.__class__.__module__ for module in self.modules() if isinstance(module, BaseTunerLayer)}
        packages = {kind.rpartition(".")[0] for kind in kinds}
        if len(packages) > 1:
            raise ValueError(f"the model holds adapters of {', '.join(sorted(packages))}; save one, or merge LoRA.")
        if packages and not getattr(self, "_hf_peft_config_loaded", False):
            raise ValueError("the model has an adapter inside; save its PeftModel, or merge_and_unload() first.")
