"""`evaluate.load(robust_accuracy_path())` and the plain function under it."""

import evaluate
import numpy as np
import pytest
import torch

from hf_robust_clip.metrics import clean_and_robust_accuracy, robust_accuracy_path
from hf_robust_clip.report import wilson_interval

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


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ([], [], "0 predictions for 0 references"),
        ([[0, 0]], [], "1 predictions for 0 references"),
        ([[0, 0], [1, 1]], [0], "Mismatch in the number"),
        ([[0, 0, 0]], [0], "don't match the expected format"),
        ([[0, 4]], [0], r"attacked has classes from 4 to 4; they must be in \[0, 4\)"),
        ([[5, 0]], [0], r"clean has classes from 5 to 5"),
        ([[0, 0], [0, 0]], [0, -1], r"references has classes from -1 to 0"),
    ],
)
def test_what_has_no_accuracy_is_refused(predictions, references, message, metric):
    with pytest.raises(ValueError, match=message):
        metric.compute(predictions=predictions, references=references, num_classes=4)


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
