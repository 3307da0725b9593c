"""`pipeline("robust-zero-shot-image-classification")`: pictures and labels to probabilities, behind a defence.

Importing this registers the task with transformers; our other modules are imported only when a pipeline is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.pipelines import PIPELINE_REGISTRY, Pipeline

if TYPE_CHECKING:
    from .defences.defended import DefendedClassifier

TASK = "robust-zero-shot-image-classification"


class _Source:
    """A name that `pipeline` was given. The pipeline itself loads it, so that errors reach the user as they are."""

    def __init__(self, name: str, options: dict[str, Any]):
        self.name, self.options = name, options

    @classmethod
    def from_pretrained(cls, name: str, **kwargs: Any) -> _Source:  # what transformers passes to a model's class
        known = ("revision", "token", "cache_dir", "local_files_only", "dtype")
        options = {key: kwargs[key] for key in known if kwargs.get(key) is not None}
        if not isinstance(options.get("dtype"), torch.dtype):  # "auto": that of the checkpoint
            options.pop("dtype", None)
        if "revision" in options:  # it may carry the base model's commit, as which it must not be taken
            options["revision"] = str(options["revision"])
        return cls(name, options)

    def load(self) -> DefendedClassifier:
        from .defences.defended import DefendedClassifier

        return DefendedClassifier.from_pretrained(self.name, **self.options)


class RobustZeroShotImageClassificationPipeline(Pipeline):
    """Probabilities of labels for pictures, by a `DefendedClassifier`.

        import hf_robust_clip.pipeline
        from transformers import pipeline

        classify = pipeline("robust-zero-shot-image-classification", model=folder)  # or a Hub id, or the model
        classify("cat.png", candidate_labels=["cat", "dog"])  # [{"label": "cat", "score": 0.9}, {"label": ...}]

    Pictures are PIL pictures, paths, addresses or base64 texts, of any sizes and modes. A list gives a list of
    results. `batch_size` pictures are defended together, with the same results.
    """

    _load_processor = False
    _load_image_processor = False
    _load_video_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False

    def __init__(self, model: DefendedClassifier | _Source, **kwargs: Any):  # transformers' own signature
        from .defences.defended import DefendedClassifier

        if isinstance(model, _Source):
            model = model.load()
        if not isinstance(model, DefendedClassifier):
            raise TypeError(
                f"model is a {type(model).__name__}: it has no test-time defence; TAPT.from_pretrained has one."
            )
        kwargs.setdefault("image_processor", model.processor.image_processor)
        super().__init__(model=model.eval(), **kwargs)

    def __call__(  # transformers' own signature, with the names of its zero-shot pipeline
        self, image: Any, candidate_labels: Sequence[str] | None = None, **kwargs: Any
    ) -> Any:
        """Label pictures.

        Args:
            image: a picture or a list of them.
            candidate_labels: at least two different names.
            hypothesis_template: a text with `{}` for the label; default "a photo of a {}.".
            timeout: seconds to wait for a picture from an address.
            batch_size: pictures that are defended together.

        Returns of each picture a list of `{"label", "score"}`, highest score first; scores add up to 1.
        Raises ValueError for labels that are missing, one, or a single text, and a template without `{}`.
        """
        if candidate_labels is None:
            candidate_labels = self._forward_params.get("candidate_labels")
        if candidate_labels is None:
            raise ValueError("candidate_labels are missing; give a list of at least two names.")
        return super().__call__(image, candidate_labels=candidate_labels, **kwargs)

    def _sanitize_parameters(
        self,
        candidate_labels: Sequence[str] | None = None,
        hypothesis_template: str | None = None,
        timeout: float | None = None,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        labelling: dict[str, Any] = {}
        if candidate_labels is not None:
            labelling["candidate_labels"] = check_candidates(candidate_labels)
        if hypothesis_template is not None:
            from .modeling import check_classes

            check_classes(["a label"], hypothesis_template)
            labelling["hypothesis_template"] = hypothesis_template
        names = {"candidate_labels": labelling["candidate_labels"]} if candidate_labels is not None else {}
        return {} if timeout is None else {"timeout": timeout}, labelling, names

    def preprocess(self, image: Any, timeout: float | None = None) -> dict[str, Any]:
        """The picture as pixels (1, 3, H, W) in [0, 1]."""
        from .pictures import open_picture, to_pixels

        classifier = self.model.classifier
        smaller = classifier.input_size < classifier.config.vision_config.image_size
        side = classifier.input_size if smaller else None  # the processor's own
        return {"pixel_values": to_pixels(self.model.processor, [open_picture(image, timeout)], resolution=side)}

    def _forward(
        self,
        model_inputs: dict[str, Any],
        candidate_labels: tuple[str, ...] = (),
        hypothesis_template: str = "a photo of a {}.",
    ) -> dict[str, Any]:
        classifier = self.model.classifier
        if (classifier.class_names, classifier.templates) != (candidate_labels, (hypothesis_template,)):
            classifier.set_classes(candidate_labels, hypothesis_template)
        return {"logits": self.model(model_inputs["pixel_values"].to(classifier.dtype)).logits}

    def postprocess(
        self, model_outputs: dict[str, Any], candidate_labels: tuple[str, ...] = ()
    ) -> list[dict[str, Any]]:
        """Labels with their probabilities, highest first."""
        scores = model_outputs["logits"][0].softmax(dim=-1).tolist()
        pairs = sorted(zip(scores, candidate_labels, strict=True), key=lambda pair: -pair[0])
        return [{"label": label, "score": score} for score, label in pairs]

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:  # transformers' own signature
        """Write the model; see `DefendedClassifier.save_pretrained`."""
        self.model.save_pretrained(save_directory)

    def __repr__(self) -> str:
        return f"{type(self).__name__}: {self.model.adapter.name} on {self.device}"


def check_candidates(labels: Sequence[str]) -> tuple[str, ...]:
    """The labels as a tuple. Raises ValueError unless they are at least two different names in a list."""
    from .modeling import check_classes

    if isinstance(labels, str):
        parts = [part.strip() for part in labels.split(",")]
        raise ValueError(f"candidate_labels={labels!r} is one text; give a list of names, such as {parts!r}.")
    names, _ = check_classes(labels, "{}")
    if len(names) == 1:
        raise ValueError(f"candidate_labels={list(names)!r} is one label, whose score is always 1; give more.")
    return names


PIPELINE_REGISTRY.register_pipeline(
    TASK, RobustZeroShotImageClassificationPipeline, pt_model=_Source, type="multimodal"
)
