"""A defence as it is evaluated on a checkpoint: fitted on images, or with what was saved beside the model."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from ..arguments import Images
from ..checkpoint_notes import holds_defence, holds_defence_alone, method_of_defence
from ..defences import defence_key
from ..defences.base import Defence
from ..defences.defended import DefendedClassifier
from ..modeling import ZeroShotClassifier
from ..processes import together
from ..zero_shot_data.fingerprint import dataset_digest
from ..zero_shot_data.loading import ImageDataset
from . import shared

if TYPE_CHECKING:
    from .evaluate import EvaluationRun, Prepared


def load_model(name: str, revision: str | None) -> ZeroShotClassifier:
    """A checkpoint, or of a folder with a defence alone what that stands in front of."""
    if holds_defence_alone(name, revision):
        return DefendedClassifier.from_pretrained(name, revision=revision).classifier
    return shared.load_model(name, revision)


def defence_for(
    prepared: Prepared, model: ZeroShotClassifier, name: str, texts: shared.Texts
) -> tuple[Defence | None, dict[str, Any]]:
    """The defence as it is evaluated on a checkpoint, and what reports say of it beside its own parameters: fitted on
    the images that the run names, under their classes, or with what was saved beside the model.

    Raises ValueError if these are the very images of a task.
    """
    run = prepared.run
    if run.defence is None or run.fit_on is None:
        return together(lambda: with_statistics(run, name, run.revision_of(name)), prepared.processes), {}
    data, digest = together(partial(fitting_images, prepared, run.fit_on, model), prepared.processes)
    called = prepared.called[name]
    about = f"{len(data)} images of {data.dataset_id}, split {data.split}"
    prepared.processes.print(f"{called}: {run.defence.name} is fitted on {about}")
    how = run.evaluations[0]
    templates = shared.templates_of(run.fit_on, data, texts.templates)
    with model.prepared_for(data, templates, descriptions=texts.of(data.class_names, templates)):
        defence = run.defence.fit(
            model,
            data,
            batch_size=how.batch_size,
            processes=prepared.processes,
            state_dir=prepared.folder / "state/fit" / shared.slug(f"{name} {digest}"),
            num_workers=how.num_workers,
            progress=True,
        )
    facts = {"dataset": data.dataset_id, "dataset_revision": data.revision, "split": data.split}
    return defence, {"fit_on": {**facts, "num_images": len(data), "digest": digest}}


def fitting_images(prepared: Prepared, asked: Images, model: ZeroShotClassifier) -> tuple[ImageDataset, str]:
    """The images that a defence is fitted on, and their digest. Raises ValueError if they are those of a task."""
    data = shared.load_data(asked, model)
    digest = dataset_digest(data)
    for title, task in prepared.tasks.items():
        if dataset_digest(shared.load_data(task, model)) == digest:
            raise ValueError(f"fit_on.dataset={asked.dataset!r} has the very images of {title!r}; fit on others.")
    return data, digest


def with_statistics(run: EvaluationRun, name: str, revision: str | None) -> Defence | None:
    """The defence, with what it was fitted with where the model's folder holds some, and where the same method was
    saved there, with the settings of that one: what the run asks for goes before them.

    Raises OSError where a defence must be fitted and there is nothing.
    """
    defence = run.defence
    if defence is None:
        return None
    if type(defence).fit is Defence.fit:
        method = None if run.preset is not None else method_of_defence(name, revision)
        if method is None or method != defence_key(defence):
            return defence
        alike = DefendedClassifier.from_pretrained(name, revision=revision).adapter
        return replace(alike, **{name: getattr(defence, name) for name in run.defence_settings})
    saved = (
        DefendedClassifier.from_pretrained(name, revision=revision).adapter if holds_defence(name, revision) else None
    )
    parts = {} if saved is None else saved.fitted
    fitted: dict[str, Any] = {
        part: own for part, own in parts.items() if isinstance(own, defence.learns().get(part, ()))
    }
    if defence.learns() and not fitted:
        raise OSError(f"{name!r} holds nothing that {defence.name} was fitted with; give fit_on, or train it so.")
    if saved is not None and type(saved) is type(defence) and run.preset is None:
        return replace(saved, **{name: getattr(defence, name) for name in run.defence_settings})
    return replace(defence, **fitted)
