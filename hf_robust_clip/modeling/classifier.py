"""CLIP as a classifier of pixels in [0, 1], with the class names as a part of the model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from operator import is_
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoImageProcessor, AutoTokenizer, CLIPConfig, CLIPModel, CLIPProcessor
from transformers.utils import ModelOutput

from ..checks import check_differentiable, checked_images, checked_labels
from ..digits_clip import EMBEDDED_MODEL, digits_clip_path
from ..names import check_embedded
from ..pictures import normalisation_of
from ..shared_prefix import PackedTexts, can_run_packed, encode_packed, end_positions, pack_texts
from .checkpoints import (
    adapter_config,
    base_of,
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
from .freshness import module_key
from .normalisation import adopt_normalisation, carry_normalisation, has_adapter, without_normalisation
from .texts import (
    PAPER_TEMPLATE,
    check_classes,
    check_same_classes,
    check_told_apart,
    parts_of,
    resolution_of,
    tokenize_prompts,
)
from .untrusted import (
    ADAPTER,
    ADAPTER_CONFIG,
    NO_CODE,
    check_adapter_file,
    check_config,
    check_sizes,
    check_weight_files,
)

TEXT_MEMORY = 2**30  # bytes that the activations of class prompts may take where no gradient is taken of them


@dataclass
class ZeroShotOutput(ModelOutput):
    """What `CLIPForZeroShotClassification` returns.

    Args:
        loss: mean cross-entropy, if labels were given.
        logits: (B, C), s * cos(f(x), t_c) with s = exp(logit_scale).
        cosine: (B, C), the same without s: the logits at temperature 1.
        image_embeds: (B, D), f(x): projected, not normalised.
        class_embeds: (C, D), t_c of unit length, or (G, C, D) for G groups of images; of captions, where these were
            given, (B, D).
        logit_scale: (), s.
    """

    loss: Tensor | None = None
    logits: Tensor = None  # type: ignore[assignment]  # always there; `ModelOutput` asks for defaults
    cosine: Tensor = None  # type: ignore[assignment]
    image_embeds: Tensor = None  # type: ignore[assignment]
    class_embeds: Tensor = None  # type: ignore[assignment]
    logit_scale: Tensor = None  # type: ignore[assignment]

    def rows(self, index: slice) -> ZeroShotOutput:
        """What belongs to some of the images; what all share stays."""
        shared = ("loss", "class_embeds", "logit_scale")
        own = {name: value if name in shared else value[index] for name, value in self.items()}
        return ZeroShotOutput(**{**own, "loss": None})


class CLIPForZeroShotClassification(CLIPModel):
    """`CLIPModel` that maps pixels in [0, 1] to one logit per class: z_c = s * cos(f((x - mean) / std), t_c).

    Mean and std are read from the checkpoint's image processor, s from its `logit_scale`. The class embeddings t_c are
    those of the names given to `set_classes`, by the text side as it is: while any parameter of it is trainable they
    are computed in every forward; else they are kept, and computed again when anything that they depend on has changed
    (weights in any way, prompts, the active adapter and its scale), which every forward looks at, or none inside
    `fixed_class_embeds`. Neither is written into the weights: the checkpoint is a plain `CLIPModel` with its
    `CLIPProcessor`.

    With prompts in it (`ClipPromptConfig`) that have a leading dimension B, every sample has class embeddings of its
    own, (B, C, D), and the images are B groups of equal size.

        model = CLIPForZeroShotClassification.from_pretrained(path)
        model.set_classes(["cat", "dog"])
        logits = model(pixel_values).logits          # pixel_values: (B, 3, H, W) in [0, 1]
    """

    def __init__(self, config: CLIPConfig):
        super().__init__(config)
        self.processor: CLIPProcessor | None = None
        self.class_names: tuple[str, ...] = ()
        self.templates: tuple[str, ...] = ()
        self.context_length = 0
        self.class_token_ids = torch.zeros(0, 0, 0, dtype=torch.long, device="cpu")  # (C, templates, tokens)
        self._packed: dict[tuple, PackedTexts] = {}
        self._known: tuple[tuple | None, Tensor] | None = None  # class embeddings, with the key of what they rest on
        self._fixed: tuple[list[torch.nn.Parameter], Tensor] | None = None  # those of a `fixed_class_embeds`
        self.input_size = config.vision_config.image_size
        channels = config.vision_config.num_channels
        self.register_buffer("image_mean", torch.full((channels, 1, 1), torch.nan), persistent=False)
        self.register_buffer("image_std", torch.full((channels, 1, 1), torch.nan), persistent=False)
        self.normalisation: tuple[list[float], list[float]] | None = None  # the same, as it was given
        self._base_normalisation: tuple[list[float], list[float]] | None = None  # that of the first processor
        self.register_load_state_dict_pre_hook(adopt_normalisation)
        self.register_load_state_dict_pre_hook(check_whole_adapters)

    def __getstate__(self) -> dict[str, Any]:
        """A copy has no part in the `fixed_class_embeds` of what it is a copy of."""
        return {**self.__dict__, "_fixed": None}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, *args, **kwargs):  # the Hub's own signature
        """Load weights and processor from a folder or the Hub. Arguments are those of `CLIPModel.from_pretrained`.

        Args:
            pretrained_model_name_or_path: a whole CLIP, an adapter (which is loaded on its base model), or
                `"digits-clip"`, the one that is shipped with the package.

        Raises OSError with the mend if there is no such checkpoint, it is of another family, its files are cut short
        or hold other weights than the model has, or it has no processor.
        """
        where: dict[str, Any] = {
            name: kwargs[name]
            for name in ("revision", "cache_dir", "token", "local_files_only", "subfolder", "force_download")
            if name in kwargs
        }
        wants_info, source = kwargs.pop("output_loading_info", False), str(pretrained_model_name_or_path)
        if source == EMBEDDED_MODEL:
            check_embedded(source)
            source = digits_clip_path()
        folder = Path(source, kwargs.get("subfolder", ""))
        if folder.is_dir() and not any((folder / name).is_file() for name in ("config.json", ADAPTER_CONFIG)):
            raise OSError(f"can't load {source!r}: the folder lacks a readable config.json; use save_pretrained.")
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
                source, lambda: super(CLIPForZeroShotClassification, cls).from_pretrained(source, *args, **kwargs)
            )
        check_loaded(source, info)
        image_processor = explained(source, lambda: AutoImageProcessor.from_pretrained(source, **where, **NO_CODE))
        tokenizer = explained(source, lambda: AutoTokenizer.from_pretrained(source, **where, **NO_CODE))
        model.set_processor(CLIPProcessor(image_processor, tokenizer))
        model.config._commit_hash = explained(source, lambda: commit_of(source, where))
        return (model, info) if wants_info else model

    def load_adapter(self, peft_model_id: str | None = None, adapter_name: str | None = None, *args, **kwargs):
        """Load an adapter into the model, as transformers does. Raises OSError if its weights don't fill it."""
        if peft_model_id is not None:
            where = kwargs.get("adapter_kwargs") or {}
            check_adapter_file(str(peft_model_id), where)
            check_stored(str(peft_model_id), where)
            swapped = kwargs.get("hotswap") is True
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

    @classmethod
    def from_clip(cls, clip: CLIPModel, processor: CLIPProcessor) -> CLIPForZeroShotClassification:
        """Give a `CLIPModel` that is already in memory this interface. The weights are shared, not copied."""
        with torch.device("meta"):
            model = cls(clip.config)
        for name, child in clip.named_children():
            setattr(model, name, child)
        model.logit_scale = clip.logit_scale
        for name in ("image_mean", "image_std"):
            setattr(model, name, torch.empty_like(getattr(model, name), device=clip.device))
        model.set_processor(processor)
        return model.train(clip.training)

    def save_pretrained(self, save_directory: str | Path, *args, **kwargs) -> None:
        """Write a plain `CLIPModel` checkpoint, with the processor (mean and std those of this model) beside it; of a
        model with an adapter that `load_adapter` put in, the adapter with the processor.

        Raises ValueError for a model with an adapter by PEFT inside: `save_pretrained` of its `PeftModel` writes that.
        """
        if kwargs.pop("push_to_hub", False):
            raise ValueError(
                "push_to_hub=True would upload before the processor is there; call model.push_to_hub(id)."
            )
        processor = self.require_processor()
        self._check_adapters()
        if self.normalisation is not None:  # the processor's file may have been changed since
            self.set_normalisation(*self.normalisation)
        self.config.architectures = [CLIPModel.__name__]
        super().save_pretrained(save_directory, *args, **kwargs)
        config_file = Path(save_directory) / "config.json"
        if config_file.is_file():
            config_file.write_text(config_file.read_text().replace(type(self).__name__, CLIPModel.__name__))
        if kwargs.get("is_main_process", True):
            processor.save_pretrained(save_directory)
            carry_normalisation(self, Path(save_directory) / ADAPTER)

    def _check_adapters(self) -> None:
        """Raise ValueError for adapters that a checkpoint of this model would lose or mix up."""
        kinds = {module.__class__.__module__ for module in self.modules() if isinstance(module, BaseTunerLayer)}
        packages = {kind.rpartition(".")[0] for kind in kinds}
        if len(packages) > 1:
            raise ValueError(
                f"the model holds adapters of {len(packages)} methods ({', '.join(sorted(packages))}), which one file "
                "can't hold; keep one of them, or merge LoRA into the weights first (merge_and_unload)."
            )
        if packages and not getattr(self, "_hf_peft_config_loaded", False):
            raise ValueError(
                "the model has an adapter inside; call save_pretrained of its PeftModel, which writes the adapter, or "
                "merge_and_unload() first."
            )

    def require_processor(self) -> CLIPProcessor:
        """The processor; raises ValueError if none was set."""
        if self.processor is None:
            raise ValueError("the model has no processor; load it with from_pretrained or call set_processor first.")
        return self.processor

    def set_processor(self, processor: CLIPProcessor) -> None:
        """Take tokenizer, picture preparation and normalisation from `processor`: its mean and std, or none where it
        says `do_normalize: false`.

        Raises ValueError for a processor that can't be followed (see `pictures.normalisation_of`).
        """
        mean, std = normalisation_of(processor.image_processor)
        check_sizes(processor.image_processor, self.config.vision_config.image_size)
        self.processor = processor
        self.set_normalisation(mean, std)
        self._base_normalisation = self._base_normalisation or self.normalisation

    def has_own_normalisation(self) -> bool:
        """Whether mean and std are others than those that the model came with."""
        return self.normalisation != self._base_normalisation

    def set_normalisation(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Normalise by `mean` and `std` (one value per channel, in units of [0, 1]), in the saved processor too."""
        channels = self.config.vision_config.num_channels
        finite = all(math.isfinite(value) for value in (*mean, *std))
        if len(mean) != channels or len(std) != channels or not finite or not all(value > 0 for value in std):
            raise ValueError(f"mean={mean!r} and std={std!r} must have {channels} finite values each, std positive.")
        with torch.inference_mode(False):
            self.image_mean = torch.tensor(mean, dtype=self.dtype, device=self.device).view(-1, 1, 1)
            self.image_std = torch.tensor(std, dtype=self.dtype, device=self.device).view(-1, 1, 1)
        self.normalisation = list(mean), list(std)
        if self.processor is not None and self._normalisation_differs(mean, std):
            image_processor = self.processor.image_processor
            image_processor.image_mean, image_processor.image_std = list(mean), list(std)
            image_processor.do_normalize = True
        for config in getattr(self, "peft_config", {}).values():
            if hasattr(config, "image_mean"):  # prompts carry it, so that they are never loaded under another
                config.image_mean, config.image_std = list(mean), list(std)

    def _normalisation_differs(self, mean: Sequence[float], std: Sequence[float]) -> bool:
        """Whether the processor says otherwise."""
        own = normalisation_of(self.require_processor().image_processor)
        return [list(values) for values in own] != [list(mean), list(std)]

    def set_input_size(self, side: int | None) -> None:
        """Take images of `side` x `side` pixels and enlarge them inside (bicubic) to what the image encoder takes.

        An attack then works on the pixels of the smaller image, as is the custom for CIFAR (32 px) and STL-10 (96 px).
        None, and the encoder's own size, take images as they are. Raises ValueError for a size beyond the encoder's.
        """
        own = self.config.vision_config.image_size
        if side is not None and not 1 <= side <= own:
            raise ValueError(f"side={side!r} must be in 1 .. {own}, the size that the image encoder takes; or None.")
        self.input_size = own if side is None else side

    def set_classes(self, class_names: Sequence[str], template: str | Sequence[str] = PAPER_TEMPLATE) -> None:
        """Choose the classes: one prompt per class, or the normalised mean over several templates, as CLIP does.

        Args:
            class_names: C distinct names, in label order.
            template: a text with `{}` for the class name, or several; default PMG-AFT's.

        Raises ValueError for no, empty or duplicate names, a template without `{}`, a prompt longer than the context.
        """
        names, templates = check_classes(class_names, template)
        text = self.config.text_config
        tokenizer = self.require_processor().tokenizer
        prompts = [pattern.replace("{}", name) for name in names for pattern in templates]
        end = self.text_model.eos_token_id
        ids = tokenize_prompts(tokenizer, prompts, text.max_position_embeddings, end, text.vocab_size)
        contexts = [pattern.split("{}")[0].strip() for pattern in templates]
        words = tokenizer(contexts, add_special_tokens=False).input_ids
        context_length = min(_alike(words[i % len(words)], row) for i, row in enumerate(ids[:, 1:].tolist()))
        self.check_context(self.num_text_prompts(), context_length, templates)
        ids_CTL = ids.view(len(names), len(templates), -1)
        check_told_apart(ids_CTL, names)
        with torch.inference_mode(False):
            self.class_token_ids, self._packed, self._known = ids_CTL.clone(), {}, None
        self.class_names, self.templates, self.context_length = names, templates, context_length
        if not self.text_is_trainable():
            self._fresh_class_embeds()

    @contextmanager
    def prepared_for(
        self,
        dataset: Any,
        template: str | Sequence[str] | None = None,
        *,
        training: bool | None = False,
        labels: bool = True,
    ) -> Iterator[None]:
        """The model as it must be for the images of a dataset: input size, classes, mode; as found afterwards.

        Args:
            dataset: what gives its images; where it names its classes, these must be the model's, in their order.
            template: set the dataset's classes, with this template, in place of comparing them.
            training: the mode inside; None leaves it.
            labels: whether its labels are used: else nothing is compared.

        Raises ValueError for a dataset of other classes, or of the same in another order.
        """
        classes = ("class_token_ids", "class_names", "templates", "context_length", "_packed", "_known")
        own = ("input_size", *(classes if template is not None else ()))
        before, mode, parts = {name: getattr(self, name) for name in own}, self.training, parts_of(dataset)
        side = resolution_of(dataset, self.input_size)
        try:
            if template is not None:
                self.set_classes(parts[0].class_names, template)
            if labels:
                check_same_classes(self.class_names, dataset)
            self.set_input_size(side)
            if training is not None:
                self.train(training)
            yield
        finally:
            for name, value in before.items():
                setattr(self, name, value)
            if training is not None:
                self.train(mode)

    def num_text_prompts(self) -> int:
        """How many tokens after the first the active prompts replace in every text."""
        return max((p.shape[-2] for p in self.text_prompts()), default=0)

    @staticmethod
    def check_context(count: int, context_length: int, templates: Sequence[str]) -> None:
        """Raise ValueError if `count` text prompts would overwrite class names."""
        if count > context_length:
            raise ValueError(
                f"the text prompts replace the first {count} tokens of every prompt, but among the templates "
                f"{list(templates)} one has only {context_length} before the class name; choose a template with more "
                "words there, such as 'a photo of a {}.', or fewer text prompts."
            )

    @property
    def class_embeds(self) -> Tensor:
        """The class embeddings (C, D) or (B, C, D): with a graph while text parameters are trainable."""
        if self._fixed is not None and (torch.compiler.is_compiling() or self._is_fixed()):
            return self._fixed[1]
        return self.encode_classes() if self.text_is_trainable() else self._fresh_class_embeds()

    @torch.compiler.disable
    def _fresh_class_embeds(self) -> Tensor:
        """Those of a frozen text side, kept as long as nothing that they depend on has changed."""
        text = self.text_model, self.text_projection
        buffers = [buffer for module in text for buffer in module.buffers()]
        tensors = [*self.text_parameters(), *buffers, self.class_token_ids]
        key = module_key([m for module in text for m in module.modules()], tensors)
        if self._known is None or key is None or self._known[0] != key:
            off = torch.autocast(self.device.type, enabled=False)  # kept for good: full precision
            with torch.inference_mode(False), torch.no_grad(), off:
                self._known = key, self.encode_classes()
        return self._known[1]

    def _is_fixed(self) -> bool:
        """Whether the text side consists of the very parameters that it had when its embeddings were fixed."""
        own = self.text_parameters()
        return self._fixed is not None and len(own) == len(self._fixed[0]) and all(map(is_, own, self._fixed[0]))

    @contextmanager
    def fixed_class_embeds(self) -> Iterator[None]:
        """Class embeddings computed once, without a graph, for all forwards inside: for attacks on the images.

        Nothing on the text side must change inside, save that other tensors are put in the place of its parameters
        (`functional_call`), which is noticed.
        """
        before = self._fixed
        if not self.class_names or self._is_fixed():
            yield
            return
        with torch.no_grad():
            self._fixed = self.text_parameters(), self.class_embeds
        try:
            yield
        finally:
            self._fixed = before

    def encode_classes(self, shared_prefix: bool = True, classes: slice = slice(None)) -> Tensor:
        """The unit-length class embeddings of the stored prompts, by the text tower as it is now: (C, D), or (B, C, D)
        where text prompts have a leading dimension B.

        Args:
            classes: only these; with `shared_prefix` the values are the same for any division.
            shared_prefix: compute the tokens that all prompts begin with once (see `shared_prefix`). False runs every
                prompt as a whole through the tower: the same values up to rounding, more slowly.
        """
        prompts = self.text_prompts()
        groups = max((len(p) for p in prompts if p.dim() == 3), default=0)
        self.check_context(self.num_text_prompts(), self.context_length, self.templates)
        if torch.is_grad_enabled() and self.text_is_trainable():
            embeds_GCD = self._encode(classes, shared_prefix, groups)
        else:
            parts = self._class_slices(classes, groups)
            embeds_GCD = torch.cat([self._encode(part, shared_prefix, groups) for part in parts], dim=1)
        return embeds_GCD if groups else embeds_GCD[0]

    def _encode(self, classes: slice, shared_prefix: bool, groups: int) -> Tensor:
        """The embeddings (G, C, D) of some classes in one piece."""
        if shared_prefix and can_run_packed(self.text_model):
            packed = self._pack(classes, self.num_text_prompts())
            features_GRD = self.text_projection(encode_packed(self.text_model, packed))
        else:
            ids_RL = self.class_token_ids[classes].flatten(0, 1).to(self.device)
            features = self.get_text_features(input_ids=ids_RL.repeat(max(groups, 1), 1)).pooler_output
            features_GRD = features.view(max(groups, 1), len(ids_RL), -1)
        features = F.normalize(features_GRD, dim=-1).unflatten(1, (-1, len(self.templates)))
        return F.normalize(features.mean(dim=2), dim=-1)

    def _class_slices(self, classes: slice, groups: int) -> list[slice]:
        """Classes in parts whose activations take about `TEXT_MEMORY` at their peak, each of one class at least."""
        start, stop, _ = classes.indices(len(self.class_token_ids))
        text, (_, templates, length) = self.config.text_config, self.class_token_ids.shape
        values = 16 * text.hidden_size + 2 * text.intermediate_size + 3 * text.num_attention_heads * length
        one_class = templates * length * max(groups, 1) * values * torch.finfo(self.dtype).bits // 8
        size = max(1, TEXT_MEMORY // max(one_class, 1))
        return [classes] if stop - start <= size else [slice(i, min(i + size, stop)) for i in range(start, stop, size)]

    def _pack(self, classes: slice, replaced: int) -> PackedTexts:
        key = classes.start, classes.stop, self.device, replaced
        if key not in self._packed:
            with torch.inference_mode(False):  # kept, for forwards of another mode too
                ids_RL = self.class_token_ids[classes].flatten(0, 1).to(self.device)
                self._packed[key] = pack_texts(ids_RL, self.text_model.eos_token_id, replaced)
        return self._packed[key]

    def forward(  # pixels to logits, where CLIPModel pairs pixels with texts
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        captions: Tensor | None = None,
    ) -> ZeroShotOutput:
        """Logits for each class, or each caption.

        Args:
            pixel_values: (B, C, H, W), float in [0, 1], not normalised.
            labels: (B,), class indices, for the mean cross-entropy in `loss`.
            interpolate_pos_encoding: accept another image size than the checkpoint's.
            captions: (N, L), token ids of texts that stand in the place of the classes, with a graph.

        Raises ValueError if no classes are set, the shape is wrong, a label is out of range, or (in eval mode) values
        lie outside [0, 1]. Compiled code doesn't look at values.
        """
        if not self.class_names and captions is None:
            raise ValueError("the model has no classes; call set_classes(class_names) first.")
        if not torch.compiler.is_compiling():
            self.check_pixels(pixel_values, values=not self.training, any_size=interpolate_pos_encoding)
        image_embeds_BD = self.encode_images(pixel_values, interpolate_pos_encoding)
        class_embeds = self.class_embeds if captions is None else self.encode_captions(captions)
        logits_BC, cosine_BC, image_embeds_BD = self.score(image_embeds_BD, class_embeds)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits_BC, checked_labels(labels, len(logits_BC), len(self.class_names)))
        return ZeroShotOutput(
            loss=loss,
            logits=logits_BC,
            cosine=cosine_BC,
            image_embeds=image_embeds_BD,
            class_embeds=class_embeds,
            logit_scale=self.logit_scale.exp(),
        )

    def encode_captions(self, ids_NL: Tensor) -> Tensor:
        """Unit-length embeddings (N, D) of texts as token ids, cut behind the longest: what follows EOS counts for
        nothing.
        """
        length = int(end_positions(ids_NL, self.text_model.eos_token_id).max()) + 1
        return F.normalize(self.get_text_features(input_ids=ids_NL[:, :length]).pooler_output, dim=-1)

    def encode_images(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        """f(x), (B, D): projected, not normalised. Images (B, C, H, W) in [0, 1] of `input_size`, or of the size that
        the encoder takes; nothing of them is checked. Raises ValueError where quantised layers hide a gradient.
        """
        if pixel_values.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            check_differentiable(self.vision_model)
        side = self.config.vision_config.image_size
        if self.input_size != side and pixel_values.shape[-1] != side:
            pixel_values = F.interpolate(pixel_values, size=(side, side), mode="bicubic", align_corners=False)
        return self.get_image_features(
            pixel_values=(pixel_values - self.image_mean) / self.image_std,
            interpolate_pos_encoding=interpolate_pos_encoding,
        ).pooler_output

    def score(self, image_embeds_BD: Tensor, class_embeds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits and cosines (B, C) of image embeddings with unit class embeddings, (C, D) or (G, C, D) for G groups
        of images in their order; and the image embeddings in the precision, at least float32, in which they were
        compared: bfloat16 would leave two digits of 100 * cos.
        """
        with torch.autocast(image_embeds_BD.device.type, enabled=False):
            head = torch.promote_types(image_embeds_BD.dtype, torch.float32)
            image_embeds_BD = image_embeds_BD.to(head)
            cosine_BC = _cosine(F.normalize(image_embeds_BD, dim=-1), class_embeds.to(head))
            return self.logit_scale.exp().to(head) * cosine_BC, cosine_BC, image_embeds_BD

    def check_pixels(self, pixel_values: Tensor, *, values: bool = True, any_size: bool = False) -> None:
        """Raise ValueError/TypeError unless the images fit this model: channels, size and (if asked) values."""
        expected = (self.config.vision_config.num_channels, self.input_size, self.input_size)
        given = tuple(pixel_values.shape[1:])
        if pixel_values.dim() != 4 or given[0] != expected[0] or (given != expected and not any_size):
            raise ValueError(
                f"pixel_values have shape {tuple(pixel_values.shape)}; this model takes (batch, {expected[0]}, "
                f"{expected[1]}, {expected[2]}): convert the images to RGB and resize them with the model's processor."
            )
        if values:
            checked_images(pixel_values, "pixel_values")

    def text_parameters(self) -> list[torch.nn.Parameter]:
        """The parameters that class embeddings depend on, those of prompts coupled to the text tower's included."""
        own = [*self.text_model.parameters(), *self.text_projection.parameters()]
        return own + [
            p for m in self.text_model.modules() if hasattr(m, "put_prompts") for p in m.coupled_parameters()
        ]

    def text_prompts(self) -> list[Tensor]:
        """The active prompts in the text tower, (n, D) or (B, n, D), one for each prompted layer."""
        found = [m.prompts() for m in self.text_model.modules() if hasattr(m, "put_prompts")]
        return [prompts for prompts in found if prompts is not None]

    def vision_parameters(self) -> list[torch.nn.Parameter]:
        """The parameters of the image encoder, its projection included."""
        return [*self.vision_model.parameters(), *self.visual_projection.parameters()]

    def text_is_trainable(self) -> bool:
        """Whether class embeddings must be computed in every forward."""
        return any(parameter.requires_grad for parameter in self.text_parameters())


def _cosine(images_BD: Tensor, classes: Tensor) -> Tensor:
    """Products of unit vectors (B, C), with classes (C, D), or (G, C, D) for G groups of images in their order."""
    if classes.dim() == 2:
        return images_BD @ classes.T
    if len(images_BD) % len(classes):
        raise ValueError(
            f"{len(images_BD)} images don't divide among prompts for {len(classes)} samples; give each equally many."
        )
    return (images_BD.view(len(classes), -1, images_BD.shape[1]) @ classes.mT).flatten(0, 1)


def _alike(words: Sequence[int], ids: Sequence[int]) -> int:
    """How many ids in a row are those of the words."""
    return next((i for i, (a, b) in enumerate(zip(words, ids, strict=False)) if a != b), min(len(words), len(ids)))


@contextmanager
def without_gradients(module: torch.nn.Module) -> Iterator[None]:
    """Parameters with `requires_grad` off inside, as found outside."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
