"""Class names as a part of a zero-shot classifier: set, encoded, and kept while nothing changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..prompts.access import active_prompts, check_bound_classes, coupled_parameters, prompt_layers
from ..prompts.layer import ClipPromptLayer
from .descriptions import before_the_class, check_descriptions, default_template, texts_of
from .freshness import SameParts, module_key
from .shared_prefix import PackedTexts, end_positions, pack_texts
from .texts import DESCRIPTION, check_classes, check_told_apart

if TYPE_CHECKING:
    from transformers import PreTrainedModel as Model
else:
    Model = object

TEXT_MEMORY = 2**30  # bytes that the activations of class prompts may take where no gradient is taken of them
OF_CLASSES = ("class_names", "templates", "descriptions", "context_length", "class_token_ids", "text_counts",
              "_packed", "_known", "_others")  # fmt: skip


@dataclass(eq=False)
class Fixed:
    """Class embeddings that stand still as long as the text side consists of what they were made by.

    Args:
        embeds: (C, D) or (B, C, D), without a graph.
        parts: of the text side.
        prompted: its layers that carry prompts.
        key: of the frozen text side and the texts; None where it is trainable, and where that can't be told.
    """

    embeds: Tensor
    parts: SameParts
    prompted: list[ClipPromptLayer]
    key: tuple | None


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
        self.descriptions: dict[str, tuple[str, ...]] = {}
        self.context_length = 0
        self.class_token_ids = torch.zeros(0, 0, 0, dtype=torch.long, device="cpu")  # (C, texts, tokens)
        self.text_counts: tuple[int, ...] = ()  # of each class, where these differ: what is beyond them is -1
        self._packed: dict[tuple, PackedTexts] = {}
        self._known: tuple[tuple | None, Tensor] | None = None  # class embeddings, with the key of what they rest on
        self._others: dict[tuple[str, ...] | None, tuple[tuple | None, Tensor]] = {}  # those of `text_embeds`
        self._fixed: Fixed | None = None  # those of a `fixed_class_embeds`
        self._under_attack = False  # whether forwards are those of an attack, on images that were looked at
        self._differentiable = False  # whether one of that attack has found that all layers have a gradient

    def set_classes(
        self,
        class_names: Sequence[str],
        template: str | Sequence[str] | None = None,
        descriptions: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        """Choose the classes: one text for each, or several, whose unit embeddings are averaged: t_c is the mean over
        the texts of class c, normalised; every text weighs the same.

            model.set_classes(names, "a photo of a {}.")                                     # one text
            model.set_classes(names, ["a photo of a {}.", "a sketch of a {}."])              # one for each template
            model.set_classes(names, descriptions=sentences)                                 # as they are (CuPL)
            model.set_classes(names, "{}, which has {description}", descriptions=phrases)    # Menon and Vondrick
            model.set_classes(names, ["a photo of a {}.", "{description}"], sentences)       # one text more

        Args:
            class_names: C distinct names, in label order.
            template: a text with `{}` for the class name, or several; default PMG-AFT's. With descriptions: what they
                are put into, at `{description}`; default that alone, so that they are texts as they are.
            descriptions: of each class its texts, {name: [text, ...]}, at least one, as many as there are; `{}` in
                them is the class name.

        Raises ValueError for no, empty or duplicate names; a template without `{}`, one with `{description}` where
        there are no descriptions, and none with it where there are; descriptions of unknown classes, of some classes
        alone, empty or twice the same; texts longer than the context; two classes with the same texts; and other
        classes than those that class-wise prompts in the model were made for.
        """
        template = default_template(descriptions) if template is None else template
        names, templates = check_classes(class_names, template, described=descriptions is not None)
        check_bound_classes(self, names)
        described = {} if descriptions is None else check_descriptions(descriptions, names)
        texts = [texts_of(name, templates, described) for name in names]
        ids_RL = self._tokenized([text for own in texts for _, text in own], bool(described))
        contexts = self.prepared_texts([before_the_class(pattern) for pattern in templates])
        words = self.require_processor().tokenizer(contexts, add_special_tokens=False).input_ids
        of_template = dict(zip(templates, words, strict=True))
        begun = [of_template[pattern] for own in texts for pattern, _ in own]
        rows = ids_RL[:, self.first_word :].tolist()
        context_length = min(_alike(own, row) for own, row in zip(begun, rows, strict=True))
        self.check_context(self.num_text_prompts(), context_length, templates)
        counts = tuple(map(len, texts))
        ids_CTL = torch.nn.utils.rnn.pad_sequence(list(ids_RL.split(list(counts))), batch_first=True, padding_value=-1)
        if described:
            _check_each_once(ids_CTL, names)
        check_told_apart(ids_CTL, names)
        with torch.inference_mode(False):
            self.class_token_ids, self._packed, self._known, self._others = ids_CTL.clone(), {}, None, {}
        self.class_names, self.templates, self.descriptions = names, templates, described
        self.context_length, self.text_counts = context_length, counts if len(set(counts)) > 1 else ()
        if not self.text_is_trainable():
            self._fresh_class_embeds()

    def _tokenized(self, texts: Sequence[str], described: bool) -> Tensor:
        try:
            return self.tokenize(texts)
        except ValueError as error:
            if not described:
                raise
            raise ValueError(f"descriptions: {error}") from error

    @contextmanager
    def same_classes_after(self) -> Iterator[None]:
        """Classes may be set inside; outside they, and what is known of them, are as they were."""
        before = {name: getattr(self, name) for name in OF_CLASSES}
        try:
            yield
        finally:
            for name, value in before.items():
                setattr(self, name, value)

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
            described = any(DESCRIPTION in text for text in templates)
            example = "a photo of a {}, which has {description}" if described else "a photo of a {}."
            raise ValueError(
                f"the text prompts replace the first {count} tokens of every prompt, but among the templates "
                f"{list(templates)} one has only {context_length} before the class name; choose a template with more "
                f"words there, such as {example!r}, or fewer text prompts."
            )

    @property
    def class_embeds(self) -> Tensor:
        """The class embeddings (C, D) or (B, C, D): with a graph while text parameters are trainable."""
        if self._fixed is not None and (torch.compiler.is_compiling() or self._is_fixed()):
            return self._fixed.embeds
        return self.encode_classes() if self.text_is_trainable() else self._fresh_class_embeds()

    @torch.compiler.disable
    def _fresh_class_embeds(self) -> Tensor:
        """Those of a frozen text side, kept as long as nothing that they depend on has changed."""
        key = self._text_key()
        if self._known is None or key is None or self._known[0] != key:
            with self._for_good():
                self._known = key, self.encode_classes()
        return self._known[1]

    def _text_key(self) -> tuple | None:
        """Equal only while text side and texts are the same; None if that can't be told."""
        text = self.text_modules
        buffers = [buffer for module in text for buffer in module.buffers()]
        tensors = [*self.text_parameters(), *buffers, self.class_token_ids]
        return module_key([m for module in text for m in module.modules()], tensors)

    @contextmanager
    def _for_good(self) -> Iterator[None]:
        """What is computed inside is kept: in full precision, without a graph."""
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            yield

    @torch.compiler.disable
    def text_embeds(self, templates: tuple[str, ...] | None = None) -> Tensor:
        """Further unit embeddings of the classes, (K, C, D), by a frozen text side, without a graph: those in K other
        templates, or the classes' own K texts one by one. They are kept as `class_embeds` are.

        Args:
            templates: texts with `{}` for the class name; None for the classes' own.

        Raises ValueError while the text side is trainable, without classes, where classes have different numbers of
        texts, and for templates that `set_classes` refuses.
        """
        return self._kept(templates, lambda: self._encode_own() if templates is None else self._encode_in(templates))

    @torch.compiler.disable
    def blank_embeds(self, templates: tuple[str, ...] = ()) -> Tensor:
        """Unit embeddings (K, D) of K templates with nothing in the class name's place, "a photo of a .", by a frozen
        text side, without a graph. They are kept as `class_embeds` are.

        Args:
            templates: texts with `{}` for the class name; none of them: the classes' own.

        Raises ValueError while the text side is trainable, without classes, for templates that `set_classes` refuses,
        and for those that take descriptions, or have no other words.
        """
        templates = templates or self.templates
        empty = [text for text in templates if DESCRIPTION in text or not text.replace("{}", "").strip()]
        if empty:
            raise ValueError(f"template={empty[0]!r} says nothing without class names; give templates of other words.")
        return self._kept(("", *templates), lambda: self._encode_blank(templates))

    def _encode_blank(self, templates: tuple[str, ...]) -> Tensor:
        with self.same_classes_after():
            self.set_classes(self.class_names, templates)  # which looks whether text prompts fit in
            ids_KL = self.tokenize([text.replace("{}", "") for text in templates])
        return F.normalize(self.encode_texts(ids_KL.to(self.device), 1)[0], dim=-1)

    def _kept(self, name: tuple[str, ...] | None, make: Callable[[], Tensor]) -> Tensor:
        """Further embeddings, made anew when anything that they depend on has changed."""
        if not self.class_names:
            raise ValueError("the model has no classes; call set_classes(class_names) first.")
        if self.text_is_trainable():
            raise ValueError("text_embeds are those of a frozen text side, and this one is trained; freeze it.")
        key = self._fixed.key if self._fixed is not None and self._is_fixed() else None
        key = self._text_key() if key is None else key
        if key is None or self._others.get(name, (None,))[0] != key:
            with self._for_good():
                self._others[name] = key, make()
        return self._others[name][1]

    def texts_of_each(self) -> int:
        """How many texts every class has. Raises ValueError where classes have different numbers of them."""
        if self.text_counts:
            raise ValueError(
                f"classes have {min(self.text_counts)} to {max(self.text_counts)} texts, which can't be taken one by "
                "one; give every class equally many descriptions."
            )
        return self._longest()

    def _encode_own(self) -> Tensor:
        count = self.texts_of_each()
        parts = self._class_slices(slice(None), 0)
        each_CTD = torch.cat([self._each(part, True, 0)[0].unflatten(0, (-1, count)) for part in parts])
        return each_CTD.transpose(0, 1).contiguous()

    def _encode_in(self, templates: tuple[str, ...]) -> Tensor:
        found = []
        with self.same_classes_after():
            for template in templates:
                self.set_classes(self.class_names, template)
                found.append(self._fresh_class_embeds())
        return torch.stack(found)

    def _longest(self) -> int:
        """The largest number of texts of a class."""
        return self.class_token_ids.shape[1]

    def _is_fixed(self) -> bool:
        """Whether text side and texts are the very ones that they were when the embeddings were fixed."""
        return self._fixed is not None and self._fixed.parts.hold(self._beside(self._fixed.prompted))

    def _beside(self, prompted: Sequence[ClipPromptLayer]) -> list[object]:
        """What class embeddings depend on beside what is in the text side's modules."""
        coupled = [parameter for layer in prompted for parameter in layer.coupled_parameters()]
        return [*self.text_modules, self.class_token_ids, *coupled]

    def _fix(self) -> Fixed:
        """The class embeddings as they are now, without a graph."""
        prompted, frozen = prompt_layers(self.text_model), not self.text_is_trainable()
        with torch.no_grad():
            embeds = self.class_embeds
        known = self._known if frozen else None
        parts = SameParts(self.text_modules, self._beside(prompted))
        return Fixed(embeds, parts, prompted, None if known is None else known[0])

    @contextmanager
    def fixed_class_embeds(self) -> Iterator[None]:
        """Class embeddings computed once, without a graph, for all forwards inside: for attacks on the images.

        Nothing on the text side must change inside, save that other tensors are put in the place of its parameters
        (`functional_call`), which is noticed. Nor does a forward inside look at the values of pixels, for which it
        would have to wait for the device: check them where they come from (`check_pixels`), before. That no layer is
        quantised, which hides a gradient, only the first forward inside that is differentiated looks at.
        """
        before = self._fixed, self._under_attack, self._differentiable
        if self.class_names and not self._is_fixed():
            self._fixed = self._fix()
        self._under_attack, self._differentiable = True, False
        try:
            yield
        finally:
            self._fixed, self._under_attack, self._differentiable = before

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
        units_GRD = self._each(classes, shared_prefix, groups)
        if not self.text_counts:
            return F.normalize(units_GRD.unflatten(1, (-1, self._longest())).mean(dim=2), dim=-1)
        there_CT = self._there(classes)
        (places,) = there_CT.flatten().to(units_GRD.device).nonzero(as_tuple=True)
        table = units_GRD.new_zeros(len(units_GRD), there_CT.numel(), units_GRD.shape[-1])
        table = table.index_copy(1, places, units_GRD).unflatten(1, there_CT.shape)
        return F.normalize(table.sum(dim=2) / there_CT.sum(dim=1, keepdim=True).to(table), dim=-1)

    def _each(self, classes: slice, shared_prefix: bool, groups: int) -> Tensor:
        """The unit embeddings (G, R, D) of all texts of some classes."""
        if shared_prefix and self.can_pack_texts():
            features_GRD = self.encode_packed_texts(self._pack(classes, self.num_text_prompts()))
        else:
            features_GRD = self.encode_texts(self._rows(classes).to(self.device), max(groups, 1))
        return F.normalize(features_GRD, dim=-1)

    def _there(self, classes: slice) -> Tensor:
        """Which places of `class_token_ids` hold a text, (C, T)."""
        counts_C = torch.tensor(self.text_counts[classes], device="cpu")
        return torch.arange(self._longest(), device="cpu") < counts_C[:, None]

    def _rows(self, classes: slice) -> Tensor:
        """Token ids (R, L) of all texts of some classes."""
        ids_CTL = self.class_token_ids[classes]
        return ids_CTL[self._there(classes)] if self.text_counts else ids_CTL.flatten(0, 1)

    def _class_slices(self, classes: slice, groups: int) -> list[slice]:
        """Classes in parts whose activations take about `TEXT_MEMORY` at their peak, each of one class at least."""
        start, stop, _ = classes.indices(len(self.class_token_ids))
        text, (_, texts, length) = self.config.text_config, self.class_token_ids.shape
        values = 16 * text.hidden_size + 2 * text.intermediate_size + 3 * text.num_attention_heads * length
        one_class = texts * length * max(groups, 1) * values * torch.finfo(self.dtype).bits // 8
        size = max(1, TEXT_MEMORY // max(one_class, 1))
        return [classes] if stop - start <= size else [slice(i, min(i + size, stop)) for i in range(start, stop, size)]

    def _pack(self, classes: slice, replaced: int) -> PackedTexts:
        key = classes.start, classes.stop, self.device, replaced
        if key not in self._packed:
            with torch.inference_mode(False):  # kept, for forwards of another mode too
                ids_RL = self._rows(classes).to(self.device)
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


def _check_each_once(ids_CTL: Tensor, class_names: Sequence[str]) -> None:
    """Raise ValueError if two texts of a class are the same to the tokenizer: they would weigh twice."""
    for name, rows in zip(class_names, ids_CTL.tolist(), strict=True):
        own = [tuple(row) for row in rows if row[0] >= 0]
        if len(set(own)) < len(own):
            place = next(i for i, row in enumerate(own) if own.index(row) != i)
            raise ValueError(
                f"descriptions[{name!r}]: texts {own.index(own[place])} and {place} are the same to the tokenizer; "
                "remove one."
            )


def _alike(words: Sequence[int], ids: Sequence[int]) -> int:
    """How many ids in a row are those of the words."""
    return next((i for i, (a, b) in enumerate(zip(words, ids, strict=False)) if a != b), min(len(words), len(ids)))
