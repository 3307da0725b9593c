"""Reports of backdoors with made figures."""

from hf_robust_clip.report import Measurement, prompt_hash
from hf_robust_clip.report.backdoor import (
    CLEAN_MODEL,
    POISONED_MODEL,
    UNTRIGGERED,
    WITHOUT_METHOD,
    BackdoorReport,
    success,
)

NAMES = ("zero", "one", "two", "three", "four", "five", "six")


def figures(judge, accuracy, asr):
    rows = {"accuracy": (accuracy, 100), success(1): (asr, 80), success(3): (min(1, asr + 0.1), 80),
            success(5): (min(1, asr + 0.2), 80), UNTRIGGERED: (0.0, 80)}  # fmt: skip
    return [Measurement(metric, value, n, judge=judge) for metric, (value, n) in rows.items()]


def backdoor_report(**changes):
    values = dict(
        name="CleanCLIP",
        stage="cleaned",
        model="out/cleaned",
        model_revision="local",
        dataset="coloured-digits",
        dataset_revision="scikit-learn",
        split="test",
        num_images=100,
        num_others=80,
        class_names=NAMES,
        templates=("a {}",),
        prompt_hash=prompt_hash(NAMES, ("a {}",)),
        trigger="BadNet(size=2)",
        trigger_parameters={"size": 2},
        target="three",
        resolution=8,
        seed=0,
        precision="float32",
        library_versions={"torch": "2"},
        hardware="CPU",
        measurements=(
            *figures(CLEAN_MODEL, 0.95, 0.0125),
            *figures(POISONED_MODEL, 0.94, 0.9),
            *figures(WITHOUT_METHOD, 0.93, 0.7),
            *figures(None, 0.92, 0.05),
        ),
    )
    return BackdoorReport(**{**values, **changes})
