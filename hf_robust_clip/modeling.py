"""CLIP as a classifier of pixels in [0, 1], with the class names as a part of the model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    CLIPProcessor,
    PreTrainedTokenizerBase,
)
from transformers.utils import ModelOutput, find_adapter_config_file

from .checks import checked_images, checked_labels
from .shared_prefix import PackedTexts, can_run_packed, encode_packed, pack_texts

PAPER_TEMPLATE = "This is a photo of a {}"


@dataclass
class ZeroShotOutput(ModelOutput):
    """What `CLIPForZeroShotClassification` returns.

    Args:
        loss: mean cross-entropy, if labels were given.
        logits: (B, C), s * cos(f(x), t_c) with s = exp(logit_scale).
        cosine: (B, C), the same without s: the logits at temperature 1.
        image_embeds: (B, D), f(x): projected, not normalised.
    """

    loss: Tensor | None = None
    logits: Tensor = None  # type: ignore[assignment]  # always there; `ModelOutput` asks for defaults
    cosine: Tensor = None  # type: ignore[assignment]
    image_embeds: Tensor = None  # type: ignore[assignment]


class CLIPForZeroShotClassification(CLIPModel):
    """`CLIPModel` that maps pixels in [0, 1] to one logit per class: z_c = s * cos(f((x - mean) / std), t_c).

    Mean and std are read from the checkpoint's image processor, s from its `logit_scale`. The class embeddings t_c are
    made by `set_classes` and computed once, and again when what they depend on has changed (weights, prompts, the
    active adapter); while any parameter of the text side is trainable they are computed anew from the stored token ids
    in every forward. Neither is written into the weights: the checkpoint is a plain `CLIPModel` with its
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
        self.class_embeds_are_stale = False
        self.context_length = 0
        self._text_state: tuple[tuple, Sequence[Tensor]] | None = None
        self._fixed_class_embeds: Tensor | None = None
        self._packed: dict[tuple, PackedTexts] = {}
        self.input_size = config.vision_config.image_size
        channels = config.vision_config.num_channels
        self.register_buffer("image_mean", torch.full((channels, 1, 1), torch.nan), persistent=False)
        self.register_buffer("image_std", torch.full((channels, 1, 1), torch.nan), persistent=False)
        self.register_buffer("class_token_ids", torch.zeros(0, 0, 0, dtype=torch.long), persistent=False)
        self.register_buffer("class_embeds", torch.zeros(0, config.projection_dim), persistent=False)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, *args, **kwargs):  # the Hub's own signature
        """Load weights and processor from a folder or the Hub. Arguments are those of `CLIPModel.from_pretrained`.

        Raises OSError with the mend if there is no such checkpoint, its files are cut short, or it has no processor.
        """
        where = {
            name: kwargs[name]
            for name in ("revision", "cache_dir", "token", "local_files_only", "subfolder", "force_download")
            if name in kwargs
        }
        source = str(pretrained_model_name_or_path)
        folder = Path(source, kwargs.get("subfolder", ""))
        if folder.is_dir() and not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
            raise OSError(f"can't load {source!r}: the folder lacks a readable config.json; use save_pretrained.")
        loaded = _explain(
            source, lambda: super(CLIPForZeroShotClassification, cls).from_pretrained(source, *args, **kwargs)
        )
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        adapter = adapter_config(source, kwargs.get("revision"))
        if adapter is not None:  # its base has the processor
            source = adapter["base_model_name_or_path"]
            where = {name: value for name, value in where.items() if name not in ("revision", "subfolder")}
        image_processor = _explain(source, lambda: AutoImageProcessor.from_pretrained(source, **where))
        tokenizer = _explain(source, lambda: AutoTokenizer.from_pretrained(source, **where))
        model.set_processor(CLIPProcessor(image_processor, tokenizer))
        return loaded

    @classmethod
    def from_clip(cls, clip: CLIPModel, processor: CLIPProcessor) -> CLIPForZeroShotClassification:
        """Give a `CLIPModel` that is already in memory this interface. The weights are shared, not copied."""
        with torch.device("meta"):
            model = cls(clip.config)
        for name, child in clip.named_children():
            setattr(model, name, child)
        model.logit_scale = clip.logit_scale
        for name in ("image_mean", "image_std", "class_embeds"):
            setattr(model, name, torch.empty_like(getattr(model, name), device=clip.device))
        model.class_token_ids = torch.zeros(0, 0, 0, dtype=torch.long, device=clip.device)
        model.set_processor(processor)
        return model.train(clip.training)

    def save_pretrained(self, save_directory: str | Path, *args, **kwargs) -> None:
        """Write a plain `CLIPModel` checkpoint, with the processor (mean and std those of this model) beside it."""
        if kwargs.pop("push_to_hub", False):
            raise ValueError(
                "push_to_hub=True would upload before the processor is there; call model.push_to_hub(id)."
            )
        self.config.architectures = [CLIPModel.__name__]
        super().save_pretrained(save_directory, *args, **kwargs)
        config_file = Path(save_directory) / "config.json"
        if config_file.is_file():
            config_file.write_text(config_file.read_text().replace(type(self).__name__, CLIPModel.__name__))
            self.require_processor().save_pretrained(save_directory)

    def require_processor(self) -> CLIPProcessor:
        """The processor; raises ValueError if none was set."""
        if self.processor is None:
            raise ValueError("the model has no processor; load it with from_pretrained or call set_processor first.")
        return self.processor

    def set_processor(self, processor: CLIPProcessor) -> None:
        """Take tokenizer, picture preparation and normalisation (image_mean, image_std) from `processor`."""
        self.processor = processor
        self.set_normalisation(processor.image_processor.image_mean, processor.image_processor.image_std)

    def set_normalisation(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Normalise by `mean` and `std` (one value per channel, in units of [0, 1]), in the saved processor too."""
        channels = self.config.vision_config.num_channels
        if len(mean) != channels or len(std) != channels or not all(value > 0 for value in std):
            raise ValueError(f"mean={mean!r} and std={std!r} must have {channels} values each, std positive.")
        self.image_mean = torch.tensor(mean, dtype=self.dtype, device=self.device).view(-1, 1, 1)
        self.image_std = torch.tensor(std, dtype=self.dtype, device=self.device).view(-1, 1, 1)
        if self.processor is not None:
            self.processor.image_processor.image_mean = list(mean)
            self.processor.image_processor.image_std = list(std)

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
        config = self.config.text_config
        tokenizer = self.require_processor().tokenizer
        prompts = [text.replace("{}", name) for name in names for text in templates]
        ids = tokenize_prompts(tokenizer, prompts, config.max_position_embeddings, self.text_model.eos_token_id)
        contexts = [text.split("{}")[0].strip() for text in templates]
        words = tokenizer(contexts, add_special_tokens=False).input_ids
        context_length = min(_alike(words[i % len(words)], row) for i, row in enumerate(ids[:, 1:].tolist()))
        self.check_context(self.num_text_prompts(), context_length, templates)
        self.class_token_ids = ids.view(len(names), len(templates), -1).to(self.device)
        self.class_names, self.templates, self.context_length = names, templates, context_length
        self.class_embeds_are_stale, self._packed = True, {}
        self.current_class_embeds()

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

    def current_class_embeds(self) -> Tensor:
        """The class embeddings (C, D) or (B, C, D): with a graph while text parameters are trainable, else cached."""
        if self._fixed_class_embeds is not None:
            return self._fixed_class_embeds
        if self.text_is_trainable():
            self.class_embeds_are_stale = True
            return self.encode_classes()
        if not torch.compiler.is_compiling() and self._text_has_changed():
            self.class_embeds_are_stale = True
        if self.class_embeds_are_stale:
            with torch.no_grad(), torch.autocast(self.device.type, enabled=False):  # kept for good: full precision
                self.class_embeds = self.encode_classes()
            self.class_embeds_are_stale = False
        return self.class_embeds

    @contextmanager
    def fixed_class_embeds(self) -> Iterator[None]:
        """Class embeddings computed once, without a graph, for all forwards inside: for attacks on the images.

        Changes nothing where the text side is frozen. What is trained must not change inside.
        """
        if self._fixed_class_embeds is not None or not self.text_is_trainable():
            yield
            return
        with torch.no_grad():
            self._fixed_class_embeds = self.encode_classes()
        try:
            yield
        finally:
            self._fixed_class_embeds = None

    def encode_classes(self, shared_prefix: bool = True, classes: slice = slice(None)) -> Tensor:
        """The unit-length class embeddings of the stored prompts, by the text tower as it is now: (C, D), or (B, C, D)
        where text prompts have a leading dimension B.

        Args:
            classes: only these; with `shared_prefix` the values are the same for any division.
            shared_prefix: compute the tokens that all prompts begin with once (see `shared_prefix`). False runs every
                prompt as a whole through the tower: the same values up to rounding, more slowly.
        """
        ids_RL = self.class_token_ids[classes].flatten(0, 1)
        prompts = self.text_prompts()
        groups = max((len(p) for p in prompts if p.dim() == 3), default=0)
        replaced = self.num_text_prompts()
        self.check_context(replaced, self.context_length, self.templates)
        if shared_prefix and can_run_packed(self.text_model):
            features_GRD = self.text_projection(encode_packed(self.text_model, self._pack(ids_RL, classes, replaced)))
        else:
            ids = ids_RL.repeat(max(groups, 1), 1)
            features = self.get_text_features(input_ids=ids).pooler_output
            features_GRD = features.view(max(groups, 1), len(ids_RL), -1)
        features = F.normalize(features_GRD, dim=-1).unflatten(1, (-1, len(self.templates)))
        embeds_GCD = F.normalize(features.mean(dim=2), dim=-1)
        return embeds_GCD if groups else embeds_GCD[0]

    def _pack(self, ids_RL: Tensor, classes: slice, replaced: int) -> PackedTexts:
        key = classes.start, classes.stop, ids_RL.device, replaced
        if key not in self._packed:
            self._packed[key] = pack_texts(ids_RL, self.text_model.eos_token_id, replaced)
        return self._packed[key]

    def _text_has_changed(self) -> bool:
        """Whether the cached class embeddings depend on something that is no longer what it was."""
        tensors = self.text_parameters()
        if any(tensor.is_inference() for tensor in tensors):  # they keep no count of changes
            return True
        adapters = (
            (m.disable_adapters, tuple(m.active_adapters))
            for m in (*self.text_model.modules(), *self.text_projection.modules())
            if hasattr(m, "base_layer") and hasattr(m, "active_adapters")
        )
        state = tuple(tensor._version for tensor in tensors), tuple(adapters)
        before = self._text_state
        self._text_state = state, tensors  # kept alive, so that another tensor can't take one's place in memory
        return before is None or before[0] != state or any(a is not b for a, b in zip(before[1], tensors, strict=True))

    def forward(  # pixels to logits, where CLIPModel pairs pixels with texts
        self, pixel_values: Tensor, labels: Tensor | None = None, interpolate_pos_encoding: bool = False
    ) -> ZeroShotOutput:
        """Logits for each class.

        Args:
            pixel_values: (B, C, H, W), float in [0, 1], not normalised.
            labels: (B,), class indices, for the mean cross-entropy in `loss`.
            interpolate_pos_encoding: accept another image size than the checkpoint's.

        Raises ValueError if no classes are set, the shape is wrong, a label is out of range, or (in eval mode) values
        lie outside [0, 1].
        """
        if not self.class_names:
            raise ValueError("the model has no classes; call set_classes(class_names) first.")
        if not torch.compiler.is_compiling():
            self.check_pixels(pixel_values, values=not self.training, any_size=interpolate_pos_encoding)
        image_embeds_BD = self.encode_images(pixel_values, interpolate_pos_encoding)
        logits_BC, cosine_BC, image_embeds_BD = self.score(image_embeds_BD, self.current_class_embeds())
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits_BC, checked_labels(labels, len(logits_BC), len(self.class_names)))
        return ZeroShotOutput(loss=loss, logits=logits_BC, cosine=cosine_BC, image_embeds=image_embeds_BD)

    def encode_images(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        """f(x), (B, D): projected, not normalised. Images (B, C, H, W) in [0, 1] of `input_size`, or of the size that
        the encoder takes; nothing is checked.
        """
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


def check_classes(
    class_names: Sequence[str], template: str | Sequence[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names and templates as tuples; raises ValueError if they can't label anything."""
    if isinstance(class_names, str):
        raise ValueError(f"class_names={class_names!r} is one text; give a list of names.")
    names = tuple(class_names)
    templates = (template,) if isinstance(template, str) else tuple(template)
    if not names:
        raise ValueError("class_names is empty; give at least one name.")
    blank = [i for i, name in enumerate(names) if not isinstance(name, str) or not name.strip()]
    if blank:
        raise ValueError(f"class_names[{blank[0]}]={names[blank[0]]!r} is not a name.")
    seen: dict[str, int] = {}
    for i, name in enumerate(names):
        if name in seen:
            raise ValueError(f"class_names[{i}]={name!r} repeats class_names[{seen[name]}]; names must differ.")
        seen[name] = i
    wrong = [text for text in templates if "{}" not in text]
    if wrong or not templates:
        raise ValueError(f"template={wrong[0] if wrong else template!r} has no '{{}}' where the class name goes.")
    return names, templates


def tokenize_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], context_length: int, eos_token_id: int | None
) -> Tensor:
    """Token ids (P, L), padded to the longest prompt only: the tower is causal, so what follows EOS changes nothing.

    Raises ValueError for a prompt longer than `context_length` tokens, and for a tokenizer that doesn't end prompts
    with the EOS id of the text tower (it would pool the first token of every prompt, all alike).
    """
    rows = tokenizer(list(prompts), padding=False, truncation=False, verbose=False).input_ids
    for prompt, row in zip(prompts, rows, strict=True):
        if len(row) > context_length:
            raise ValueError(
                f"the prompt {prompt!r} has {len(row)} tokens, the text tower takes {context_length}; shorten it."
            )
        if row.count(tokenizer.eos_token_id) != 1:  # CLIP's unknown token is its end token
            raise ValueError(f"the tokenizer doesn't know part of {prompt!r}; is its vocabulary file missing?")
        if eos_token_id is not None and eos_token_id != 2 and eos_token_id not in row:
            raise ValueError(
                f"the tokenizer doesn't end {prompt!r} with the text tower's EOS id {eos_token_id}; "
                "load tokenizer and model from the same checkpoint."
            )
    longest = max(map(len, rows))
    return torch.tensor([row + [row[-1]] * (longest - len(row)) for row in rows])


def adapter_config(name: str | Path, revision: str | None = None) -> dict[str, Any] | None:
    """What `adapter_config.json` says, if a folder or Hub repository holds a PEFT adapter and no whole model."""
    if Path(name, "config.json").is_file() and not Path(name, "adaptation.json").is_file():
        return None
    try:
        file = find_adapter_config_file(str(name), revision=revision)
    except OSError:
        return None
    return None if file is None else json.loads(Path(file).read_text(encoding="utf-8"))


def _explain(source: str, load):
    """Run a loader; turn what it raises about a missing or damaged checkpoint into one OSError that names the mend."""
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from safetensors import SafetensorError

    folder = Path(source).is_dir()
    try:
        return load()
    except SafetensorError as error:
        raise OSError(
            f"the weights in {source!r} are cut short or damaged ({error}); copy or download them again."
        ) from error
    except (OSError, ValueError) as error:
        if folder:
            mend = "the folder lacks a readable config, weights or processor; save it with save_pretrained."
        elif HF_HUB_OFFLINE:
            mend = (
                "no such folder, and the Hub is switched off (HF_HUB_OFFLINE=1): give a folder, or unset the variable."
            )
        else:
            mend = "no such folder, and the Hub could not give it: check the name, the connection and your token."
        raise OSError(
            f"can't load {source!r}: {mend} ({(str(error) or type(error).__name__).splitlines()[0]})"
        ) from error
