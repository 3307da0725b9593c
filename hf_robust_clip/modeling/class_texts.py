"""Class names as a part of a zero-shot classifier: set, encoded, and kept while nothing changes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from operator import is_
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..prompts.access import active_prompts, coupled_parameters
from .freshness import module_key
from .shared_prefix import PackedTexts, end_positions, pack_texts
from .texts import PAPER_TEMPLATE, check_classes, check_told_apart

if TYPE_CHECKING:
    from transformers import PreTrainedModel as Model
else:
    Model = object

TEXT_MEMORY = 2**30  # bytes that the activations of class prompts may take where no gradient is taken of them


class ClassTexts(Model):
    """The part of a zero-shot classifier that makes class embeddings of names; a model class mixes it in.

    What a family of models gives to it: `text_modules`, the modules of its text side; `tokenize(texts, whole)`, token
    ids (R, L) as its tower reads them, `whole` ones of the whole context's length; `first_word`, the position of a
    text's first word; `encode_texts(ids_RL, groups)`, (groups, R, D); `can_pack_texts()`, and where that may be true
    `encode_packed_texts(packed)`, the same of texts that share a prefix.
    """

    first_word: ClassVar[int]

    def _init_texts(self) -> None:
        self.class_names: tuple[str, ...] = ()
        self.templates: tuple[str, ...] = ()
        self.context_length = 0
        self.class_token_ids = torch.zeros(0, 0, 0, dtype=torch.long, device="cpu")  # (C, templates, tokens)
        self._packed: dict[tuple, PackedTexts] = {}
        self._known: tuple[tuple | None, Tensor] | None = None  # class embeddings, with the key of what they rest on
        self._fixed: tuple[list[torch.nn.Parameter], Tensor] | None = None  # those of a `fixed_class_embeds`
        self._under_attack = False  # whether forwards are those of an attack, on images that were looked at

    def set_classes(self, class_names: Sequence[str], template: str | Sequence[str] = PAPER_TEMPLATE) -> None:
        """Choose the classes: one prompt per class, or the normalised mean over several templates, as CLIP does.

        Args:
            class_names: C distinct names, in label order.
            template: a text with `{}` for the class name, or several; default PMG-AFT's.

        Raises ValueError for no, empty or duplicate names, a template without `{}`, a prompt longer than the context.
        """
        names, templates = check_classes(class_names, template)
        ids = self.tokenize([pattern.replace("{}", name) for name in names for pattern in templates])
        contexts = self.prepared_texts([pattern.split("{}")[0].strip() for pattern in templates])
        words = self.require_processor().tokenizer(contexts, add_special_tokens=False).input_ids
        rows = ids[:, self.first_word :].tolist()
        context_length = min(_alike(words[i % len(words)], row) for i, row in enumerate(rows))
        self.check_context(self.num_text_prompts(), context_length, templates)
        ids_CTL = ids.view(len(names), len(templates), -1)
        check_told_apart(ids_CTL, names)
        with torch.inference_mode(False):
            self.class_token_ids, self._packed, self._known = ids_CTL.clone(), {}, None
        self.class_names, self.templates, self.context_length = names, templates, context_length
        if not self.text_is_trainable():
            self._fresh_class_embeds()

    def prepared_texts(self, texts: Sequence[str]) -> list[str]:
        """Texts as the family's tokenizer is given them: as they are."""
        return list(texts)

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
        text = self.text_modules
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
        (`functional_call`), which is noticed. Nor does a forward inside look at the values of pixels, for which it
        would have to wait for the device: check them where they come from (`check_pixels`), before.
        """
        before = self._fixed, self._under_attack
        if self.class_names and not self._is_fixed():
            with torch.no_grad():
                self._fixed = self.text_parameters(), self.class_embeds
        self._under_attack = True
        try:
            yield
        finally:
            self._fixed, self._under_attack = before

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

    def encode_captions(self, ids_NL: Tensor) -> Tensor:
        """Unit-length embeddings (N, D) of texts as token ids: equal ones are encoded once, and of a causal tower's
        texts nothing beyond the longest.
        """
        ids_NL, place_N = ids_NL.unique(dim=0, return_inverse=True)
        if self.can_pack_texts():
            ids_NL = ids_NL[:, : int(end_positions(ids_NL, self.text_model.eos_token_id).max()) + 1]
        return F.normalize(self.encode_texts(ids_NL, 1)[0], dim=-1)[place_N]

    def _encode(self, classes: slice, shared_prefix: bool, groups: int) -> Tensor:
        """The embeddings (G, C, D) of some classes in one piece."""
        if shared_prefix and self.can_pack_texts():
            features_GRD = self.encode_packed_texts(self._pack(classes, self.num_text_prompts()))
        else:
            ids_RL = self.class_token_ids[classes].flatten(0, 1).to(self.device)
            features_GRD = self.encode_texts(ids_RL, max(groups, 1))
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

    def text_parameters(self) -> list[torch.nn.Parameter]:
        """The parameters that class embeddings depend on, those of prompts coupled to the text tower's included."""
        own = [parameter for module in self.text_modules for parameter in module.parameters()]
        return own + coupled_parameters(self.text_model)

    def text_prompts(self) -> list[Tensor]:
        """The active prompts in the text tower, (n, D) or (B, n, D), one for each prompted layer."""
        return active_prompts(self.text_model)

    def text_is_trainable(self) -> bool:
        """Whether class embeddings must be computed in every forward."""
        return any(parameter.requires_grad for parameter in self.text_parameters())


def _alike(words: Sequence[int], ids: Sequence[int]) -> int:
    """How many ids in a row are those of the words."""
    return next((i for i, (a, b) in enumerate(zip(words, ids, strict=False)) if a != b), min(len(words), len(ids)))
