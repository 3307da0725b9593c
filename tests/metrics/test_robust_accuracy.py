"""`evaluate.load(robust_accuracy_path())` and the plain function under it."""

import evaluate
import numpy as np
import pytest
import torch

from hf_robust_clip.metrics import (
    accuracy_after_each,
    clean_and_robust_accuracy,
    right_throughout,
    robust_accuracy_path,
    wilson_interval,
)

CLEAN, ATTACKED, LABELS = [0, 0, 1, 2, 2, 0], [0, 1, 1, 2, 0, 1], [0, 0, 1, 2, 2, 1]
PAIRS = [list(pair) for pair in zip(CLEAN, ATTACKED, strict=True)]
EXPECTED = {
    "clean_accuracy": 5 / 6,
    "clean_accuracy_interval": list(wilson_interval(5, 6)),
    "clean_accuracy_per_class": [1.0, 0.5, 1.0, None],
    "robust_accuracy": 3 / 6,  # the last image is right under attack only, so it does not count
    "robust_accuracy_interval": list(wilson_interval(3, 6)),
    "robust_accuracy_per_class": [0.5, 0.5, 0.5, None],
}
ATTACKED_ONLY = {
    "robust_accuracy": 4 / 6,
    "robust_accuracy_interval": list(wilson_interval(4, 6)),
    "robust_accuracy_per_class": [0.5, 1.0, 0.5],
}


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    """`evaluate` writes predictions to its cache; keep them out of the user's."""
    folder = str(tmp_path_factory.mktemp("evaluate"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate.config, "HF_METRICS_CACHE", folder)
        yield


@pytest.fixture
def metric():
    return evaluate.load(robust_accuracy_path())


def test_figures_from_pairs(metric):
    assert metric.compute(predictions=PAIRS, references=LABELS, num_classes=4) == EXPECTED
    assert clean_and_robust_accuracy(ATTACKED, LABELS, CLEAN, num_classes=4) == EXPECTED


def test_figures_from_attacked_predictions_alone(metric):
    assert metric.compute(predictions=ATTACKED, references=LABELS) == ATTACKED_ONLY


@pytest.mark.parametrize("kind", [np.array, torch.tensor])
def test_arrays_and_batches_give_the_same(kind, metric):
    for rows in (slice(0, 2), slice(2, 6)):
        metric.add_batch(predictions=kind(PAIRS[rows]), references=kind(LABELS[rows]))
    assert metric.compute(num_classes=4) == EXPECTED
    for pair, label in zip(PAIRS, LABELS, strict=True):
        metric.add(prediction=pair, reference=label)
    assert metric.compute(num_classes=4) == EXPECTED


def test_combines_with_itself_and_with_a_module_of_integers(metric, tmp_path):
    twice = evaluate.combine({"a": robust_accuracy_path(), "b": metric})
    both = twice.compute(predictions=PAIRS, references=LABELS, num_classes=4)
    assert both == {f"{name}_{key}": value for name in "ab" for key, value in EXPECTED.items()}
    (tmp_path / "share").mkdir()
    (tmp_path / "share/share.py").write_text(
        "import datasets\nimport evaluate\n\nclass Share(evaluate.Metric):\n    def _info(self):\n"
        "        label = datasets.Value('int64')\n"
        "        features = datasets.Features(predictions=label, references=label)\n"
        "        return evaluate.MetricInfo(description='', citation='', inputs_description='', features=features)\n\n"
        "    def _compute(self, predictions, references):\n"
        "        return {'share': sum(p == r for p, r in zip(predictions, references)) / len(references)}\n"
    )
    for order in ([str(tmp_path / "share"), robust_accuracy_path()], [metric, str(tmp_path / "share")]):
        found = evaluate.combine(order).compute(predictions=ATTACKED, references=LABELS)
        assert found == {"share": 4 / 6, **ATTACKED_ONLY}


def test_one_image_at_a_time_by_the_names_of_either_signature(metric):
    combined = evaluate.combine([robust_accuracy_path()])
    for pair, label in zip(PAIRS, LABELS, strict=True):
        combined.add(pair, label)
        metric.add(predictions=pair, references=label)
    assert combined.compute(num_classes=4) == metric.compute(num_classes=4) == EXPECTED
    for pair, label in zip(PAIRS, LABELS, strict=True):
        combined.add(predictions=pair, references=label)
    assert combined.compute(num_classes=4) == EXPECTED
    with pytest.raises(ValueError, match="twice"):
        metric.add(prediction=0, predictions=1, reference=0)


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ([], [], "0 predictions for 0 references"),
        ([[0, 0]], [], "1 predictions for 0 references"),
        ([[0, 0], [1, 1]], [0], "Mismatch in the number"),
        ([[0, 0, 0]], [0], r"predictions have shape \(1, 3\)"),
        ([[0, 4]], [0], r"attacked has classes from 4 to 4; they must be in \[0, 4\)"),
        ([[5, 0]], [0], r"clean has classes from 5 to 5"),
        ([[0, 0], [0, 0]], [0, -1], r"references has classes from -1 to 0"),
    ],
)
def test_what_has_no_accuracy_is_refused(predictions, references, message, metric):
    with pytest.raises(ValueError, match=message):
        metric.compute(predictions=predictions, references=references, num_classes=4)


PROBABILITIES = [[0.1, 0.9], [0.6, 0.4]]
NO_INDICES = {
    "probabilities": (PROBABILITIES, [1, 0], "predictions"),
    "float array": (np.array([0.9, 0.2]), [1, 0], "predictions"),
    "whole floats": ([1.0, 0.0], [1, 0], "predictions"),
    "half precision": (torch.tensor([[0.1, 0.9]], dtype=torch.bfloat16), [1], "predictions"),
    "NaN": ([float("nan"), 1], [1, 1], "predictions"),
    "pairs of floats": ([[0.0, 1.0]], [1], "predictions"),
    "logits of three classes": ([[3, 1, 2]], [0], "predictions"),
    "bools": ([True, False], [1, 0], "predictions"),
    "bools among pairs": ([[1, True]], [1], "predictions"),
    "bool tensor": (torch.tensor([True]), [1], "predictions"),
    "texts": (["1"], [1], "predictions"),
    "rows of unequal length": ([[1, 0], [1]], [1, 1], "predictions"),
    "none": (None, [1], "predictions"),
    "fractional references": ([1, 2], [1, 2.7], "references"),
    "references in rows": ([1, 2], [[1], [2]], "references"),
    "no references": ([1, 2], None, "references"),
}


@pytest.mark.parametrize("case", NO_INDICES)
def test_the_metric_refuses_what_are_no_class_indices(case, metric):
    predictions, references, argument = NO_INDICES[case]
    with pytest.raises(ValueError, match=argument):
        metric.compute(predictions=predictions, references=references)
    with pytest.raises(ValueError, match=argument):
        metric.add_batch(predictions=predictions, references=references)
    assert metric.compute(predictions=ATTACKED, references=LABELS) == ATTACKED_ONLY, "it can still be used"


def test_one_image_at_a_time_is_refused_alike(metric):
    for prediction, reference, argument in ((0.9, 1, "predictions"), ([0.1, 0.9], 1, "pred"), (1, 0.5, "references")):
        with pytest.raises(ValueError, match=argument):
            metric.add(prediction=prediction, reference=reference)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.uint64, torch.int16, torch.int64])
def test_integers_of_any_kind_are_indices(dtype, metric):
    make = torch.tensor if isinstance(dtype, torch.dtype) else np.array
    columns = [make(values, dtype=dtype) for values in (PAIRS, LABELS)]
    assert metric.compute(predictions=columns[0], references=columns[1], num_classes=4) == EXPECTED
    for pair, label in zip(*columns, strict=True):
        metric.add(prediction=pair, reference=label)
    assert metric.compute(num_classes=4) == EXPECTED


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (([], []), "references is empty"),
        (([0, 1], [0]), r"shapes \{'attacked': \(2,\), 'references': \(1,\)\}"),
        (([0], [0], [0, 1]), "shapes"),
        (([[0]], [[0]]), "shapes"),
        (([0.5], [0]), "attacked must be class indices, integers, got float64"),
        (([0], [0], [True]), "clean must be class indices"),
        (([0], [-1]), r"references has classes from -1 to -1; they must be in \[0, ...\)"),
    ],
)
def test_the_function_refuses_the_same_itself(columns, message):
    with pytest.raises(ValueError, match=message):
        clean_and_robust_accuracy(*columns)


def test_robust_is_right_clean_and_under_every_attack_up_to_there():
    right = [[True, True, False], [True, False, True], [False, True, True], [True, True, True]]
    assert right_throughout(right).tolist() == [
        [True, True, False], [True, False, False], [False, False, False], [True, True, True],
    ]  # fmt: skip
    assert accuracy_after_each(right) == [0.75, 0.5, 0.25]
    for wrong in ([], [True, False], [[]]):
        with pytest.raises(ValueError, match="right_NS"):
            right_throughout(wrong)
