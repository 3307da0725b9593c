"""Class names and templates to token ids, checked once, and compared between a model and a dataset."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence, Set
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..names import check_shown

logger = logging.getLogger(__name__)
PAPER_TEMPLATE = "This is a photo of a {}"
DESCRIPTION = "{description}"  # where a template takes the descriptions of a class


def check_classes(
    class_names: Sequence[str], template: str | Sequence[str], described: bool = False
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names and templates as tuples; raises ValueError if they can't label anything.

    Args:
        described: whether there are descriptions: then one template at least must say where they go, else none may.
    """
    if isinstance(class_names, str):
        raise ValueError(f"class_names={class_names!r} is one text; give a list of names.")
    if isinstance(class_names, Mapping | Set):
        raise ValueError(f"class_names is a {type(class_names).__name__}; give a list of names, in label order.")
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
        check_shown(name, f"class_names[{i}]")
    for text in templates:
        if DESCRIPTION in text and not described:
            raise ValueError(f"template={text!r} takes descriptions; give them, or a template with '{{}}' alone.")
    wrong = [text for text in templates if "{}" not in text and DESCRIPTION not in text]
    if wrong or not templates:
        raise ValueError(f"template={wrong[0] if wrong else template!r} has no '{{}}' where the class name goes.")
    for text in templates:
        check_shown(text, "template")
    if described and not any(DESCRIPTION in text for text in templates):
        raise ValueError(
            f"template={templates[0]!r} has no {DESCRIPTION!r} where descriptions go: write it there, or leave the "
            "template out to take descriptions as they are."
        )
    return names, templates


def tokenize_prompts(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    context_length: int,
    eos_token_id: int | None,
    vocab_size: int | None = None,
    cut: bool = False,
) -> Tensor:
    """Token ids (P, L), padded to the longest prompt only: the tower is causal, so what follows EOS changes nothing.

    Args:
        cut: leave out the end of what is too long, as CLIP's training does with captions, and say so once.
        context_length, eos_token_id, vocab_size: of the text tower. An `eos_token_id` of 2 (or None) is that of the
            first published checkpoints, whose towers pool at the largest id in place of it.

    Raises ValueError for a prompt longer than `context_length` tokens, for one that the tower would not pool at its
    end (a tokenizer of another end token, an added token above it), and for tokens that the tower has no embedding of.
    """
    rows = tokenizer(list(prompts), padding=False, truncation=False, verbose=False).input_ids
    if cut:
        rows = _cut(rows, context_length, tokenizer.eos_token_id)
    for prompt, row in zip(prompts, rows, strict=True):
        if len(row) > context_length:
            raise ValueError(f"the prompt {prompt[:99]!r} has {len(row)} tokens, {context_length} fit; shorten it.")
        if row.count(tokenizer.eos_token_id) != 1:  # CLIP's unknown token is its end token
            raise ValueError(f"the tokenizer doesn't know part of {prompt!r}; is its vocabulary file missing?")
        if vocab_size is not None and max(row) >= vocab_size:
            raise ValueError(
                f"the prompt {prompt!r} holds the token {tokenizer.convert_ids_to_tokens(max(row))!r} of id "
                f"{max(row)}, and the text tower has {vocab_size} embeddings; call "
                "model.text_model.resize_token_embeddings, and train the new ones."
            )
        if eos_token_id is None or eos_token_id == 2:
            if max(row) != tokenizer.eos_token_id:
                raise ValueError(
                    f"the prompt {prompt!r} holds the token {tokenizer.convert_ids_to_tokens(max(row))!r}, whose id "
                    "is above the end token's: this text tower (eos_token_id=2) is read there, not at the end. Set "
                    f"model.text_model.eos_token_id = {tokenizer.eos_token_id}, and the same in its config."
                )
        elif eos_token_id not in row:
            raise ValueError(
                f"the tokenizer doesn't end {prompt!r} with EOS id {eos_token_id}; take the checkpoint's own."
            )
    longest = max(map(len, rows))
    return torch.tensor([row + [row[-1]] * (longest - len(row)) for row in rows])


def tokenize_padded(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], context_length: int, vocab_size: int, cut: bool = False
) -> Tensor:
    """Token ids (R, L), padded by the tokenizer to the whole context: what towers read that look at their padding.

    Args:
        context_length, vocab_size: of the text tower.
        cut: as for `tokenize_prompts`.

    Raises ValueError for a text longer than `context_length` tokens, one of which the tokenizer doesn't know a part or
    that it doesn't end, tokens that the tower has no embedding of, and a tokenizer that can't pad or that asks for its
    padding to be masked (every plain use of the checkpoint would then give other embeddings).
    """
    if "attention_mask" in tokenizer.model_input_names:
        raise ValueError(
            "the tokenizer masks its padding, which this text tower was trained to read; set "
            "tokenizer.model_input_names = ['input_ids'], and save it with the checkpoint."
        )
    rows = tokenizer(
        list(texts), padding="max_length", max_length=context_length, truncation=False, verbose=False
    ).input_ids
    if cut:
        rows = _cut(rows, context_length, tokenizer.eos_token_id)
    unknown = {tokenizer.unk_token_id} - {None, tokenizer.pad_token_id, tokenizer.eos_token_id}
    for text, row in zip(texts, rows, strict=True):
        if len(row) > context_length:
            raise ValueError(f"the prompt {text[:99]!r} has {len(row)} tokens, {context_length} fit; shorten it.")
        if unknown & set(row):
            raise ValueError(f"the tokenizer doesn't know part of {text!r}; is its vocabulary file missing?")
        if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in row:
            raise ValueError(
                f"the tokenizer doesn't end {text!r} with {tokenizer.eos_token!r}; set tokenizer.add_eos_token = True."
            )
        if max(row) >= vocab_size:
            raise ValueError(
                f"the prompt {text!r} holds the token {tokenizer.convert_ids_to_tokens(max(row))!r} of id {max(row)}, "
                f"and the text tower has {vocab_size} embeddings; take the checkpoint's own tokenizer."
            )
    return torch.tensor(rows)


def _cut(rows: Sequence[list[int]], length: int, end: int | None) -> list[list[int]]:
    """Token ids of at most `length`; what was cut ends as it did."""
    if any(len(row) > length for row in rows):
        _say_cut(length)
    ends = [] if end is None else [end]
    return [row if len(row) <= length else [*row[: length - len(ends)], *ends] for row in rows]


@cache
def _say_cut(length: int) -> None:
    logger.warning("there are captions of more than %d tokens; what is beyond these is left out.", length)


def check_told_apart(ids_CTL: Tensor, class_names: Sequence[str]) -> None:
    """Raise ValueError if two classes have the same texts, in whatever order: one of them could never win."""
    seen: dict[tuple[tuple[int, ...], ...], int] = {}
    for i, rows in enumerate(ids_CTL.tolist()):
        first = seen.setdefault(tuple(sorted(map(tuple, rows))), i)
        if first != i:
            raise ValueError(
                f"class_names[{i}]={class_names[i]!r}, class_names[{first}] are the same to the tokenizer."
            )


def parts_of(dataset: Any) -> list[Any]:
    """A dataset without the wrappers that choose or join rows: `Subset`, `ConcatDataset` and their like."""
    if hasattr(dataset, "class_names") or not (hasattr(dataset, "dataset") or hasattr(dataset, "datasets")):
        return [dataset]
    inside = dataset.datasets if hasattr(dataset, "datasets") else [dataset.dataset]
    return [part for one in inside for part in parts_of(one)]


def resolution_of(dataset: Any, otherwise: int | None) -> int | None:
    """The side in pixels of a dataset's images where that is one of its own; None is the size of the model's encoder.

    Args:
        otherwise: what it is for datasets that say nothing of it.

    Raises ValueError for parts of different resolutions.
    """
    sizes = {_own_side(part, otherwise) for part in parts_of(dataset)} or {otherwise}
    if len(sizes) > 1:
        raise ValueError(f"the parts of the dataset are of different resolutions ({sizes}); use them one by one.")
    return sizes.pop()


def _own_side(part: Any, otherwise: int | None) -> int | None:
    if not hasattr(part, "attack_resolution"):
        return otherwise
    return None if part.attack_resolution is None or getattr(part, "augment", False) else part.resolution


def check_same_classes(model_names: Sequence[str], dataset: Any) -> None:
    """Raise ValueError unless a dataset that names its classes has the model's, in their order: label i is name i.

    Of a dataset that isn't ours (`datasets.Dataset` with a transform, torchvision's) the labels may be called
    otherwise than the classes, but no name may stand at another place.
    """
    for part in parts_of(dataset):
        names = getattr(part, "class_names", None) or _label_names(part)
        if names is None or tuple(names) == tuple(model_names):
            continue
        if not hasattr(part, "class_names") and not _crossed(names, model_names):
            continue
        what = f"dataset {getattr(part, 'dataset_id', type(part).__name__)!r}"
        mend = "call model.set_classes(dataset.class_names, template), or take dataset.only(model.class_names)."
        if set(names) == set(model_names):
            i = next(i for i, (a, b) in enumerate(zip(model_names, names, strict=True)) if a != b)
            raise ValueError(
                f"{what} has the model's classes in another order: class {i} is {names[i]!r} there and "
                f"{model_names[i]!r} in the model; {mend}"
            )
        raise ValueError(
            f"{what} has {len(names)} classes ({_some(names, model_names)}), the model has {len(model_names)} "
            f"({_some(model_names, names)}); {mend}"
        )


def _label_names(dataset: Any) -> Sequence[str] | None:
    """What a dataset of another library calls its labels: those of the column `labels` or `label`, else of the only
    one that has names.
    """
    features = getattr(dataset, "features", None)
    if isinstance(features, Mapping):
        named = {column: list(kind.names) for column, kind in features.items() if getattr(kind, "names", None)}
        for column in ("labels", "label", *(named if len(named) == 1 else ())):
            if column in named:
                return named[column]
    classes = getattr(dataset, "classes", None)
    return classes if isinstance(classes, list | tuple) and all(isinstance(name, str) for name in classes) else None


def _crossed(names: Sequence[str], others: Sequence[str]) -> bool:
    """Whether a name stands at different places of two lists."""
    place = {name: i for i, name in enumerate(others)}
    return any(place.get(name, i) != i for i, name in enumerate(names))


def _some(names: Sequence[str], others: Sequence[str]) -> str:
    """The first few names that the others lack, else the first."""
    own = [name for name in names if name not in set(others)]
    chosen = own or list(names)
    return ("among them " if own else "") + ", ".join(map(repr, chosen[:3])) + (", ..." if len(chosen) > 3 else "")
