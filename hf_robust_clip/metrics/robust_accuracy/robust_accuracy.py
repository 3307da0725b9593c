"""`evaluate` module over `hf_robust_clip.metrics.clean_and_robust_accuracy`."""

import datasets
import evaluate

from hf_robust_clip.metrics import as_array, check_indices, clean_and_robust_accuracy

# One import a line above: the loader of `evaluate` reads them line by line.

DESCRIPTION = """\
Clean and robust accuracy of a classifier from its predictions. An image counts as robust if it is classified
correctly both clean and after the attack."""

INPUTS = """\
Args:
    predictions: for each image a pair [clean, attacked] of predicted class indices. Or the attacked prediction alone,
        an integer: then no clean accuracy is given, and every image that is right under attack counts as robust, so
        the figure can only come out higher. The integers are what `evaluate.combine` can share with modules such as
        `accuracy`; pairs can be combined with modules that take pairs, this one under several names for instance.
    references: the true class index of each image.
    num_classes: given to `compute`; None takes the largest class index that occurs, plus one.
Returns:
    clean_accuracy (for pairs) and robust_accuracy in [0, 1]; of both *_interval, the 95 % Wilson interval, and
    *_per_class, a list by class index with None for a class without images.
Raises:
    ValueError for no images, unequal lengths, class indices outside [0, num_classes), and what are no class indices:
    logits, probabilities and other floats, true and false, texts.
Examples:
    >>> metric = evaluate.load(hf_robust_clip.metrics.robust_accuracy_path())
    >>> metric.compute(predictions=[[0, 0], [1, 0], [0, 1]], references=[0, 1, 1])["robust_accuracy"]
    0.3333333333333333
"""


class RobustAccuracy(evaluate.Metric):
    """Predictions are pairs [clean, attacked], or attacked ones alone."""

    def _info(self):
        label = datasets.Value("int64")
        pair = datasets.Sequence(label, length=2)
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=[datasets.Features(predictions=kind, references=label) for kind in (pair, label)],
        )

    def add_batch(self, *, predictions=None, references=None):
        """Add images. Raises ValueError for none, which `evaluate` wouldn't say, and for what are no class indices,
        which it would round down to such.
        """
        predictions, references = self._checked(predictions, references)
        if len(predictions) == 0 or len(references) == 0:
            raise ValueError(f"{len(predictions)} predictions for {len(references)} references; give at least one.")
        super().add_batch(predictions=predictions, references=references)

    def add(self, *, prediction=None, reference=None, predictions=None, references=None):
        """Add one image, by either pair of names: `evaluate.combine` uses the second. Raises ValueError as `add_batch`
        does, and for one that is given twice.
        """
        if (prediction is not None and predictions is not None) or (reference is not None and references is not None):
            raise ValueError("prediction and reference are given twice, also as predictions and references; keep one.")
        prediction = predictions if prediction is None else prediction
        reference = references if reference is None else reference
        predictions, references = self._checked([prediction], [reference])
        super().add(prediction=predictions[0].tolist(), reference=references[0].tolist())

    def _checked(self, predictions, references):
        """Both as arrays of integers."""
        arrays = as_array(predictions), as_array(references)
        for name, array, kinds in zip(("predictions", "references"), arrays, (((), (2,)), ((),)), strict=True):
            if array.size:
                check_indices(array, name)
            if array.ndim == 0 or array.shape[1:] not in kinds:
                expected = " or ".join(str(("N", *kind)).replace("'", "") for kind in kinds)
                raise ValueError(f"{name} have shape {array.shape}; give class indices of shape {expected}.")
        return arrays

    def _compute(self, predictions, references, num_classes=None):
        clean, attacked = None, predictions
        if isinstance(predictions[0], list):
            clean, attacked = zip(*predictions, strict=True)
        return clean_and_robust_accuracy(attacked, references, clean, num_classes)
