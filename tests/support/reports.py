"""Reports and cards with fixed figures."""

from pathlib import Path

from hf_robust_clip.attacks.views import KNOWN_VIEWS
from hf_robust_clip.objectives.pmg_aft import PMGAFT
from hf_robust_clip.report import CardInfo, RobustnessReport, accuracies, make_card, prompt_hash, save_reports

PER_CLASS = {"cat": (20, 19, 5), "dog": (20, 17, 5)}
RADII = (1 / 255, 4 / 255)


def make_defence(**changes) -> dict:
    """What a report says of a defence."""
    values = dict(
        name="tapt",
        parameters={"num_views": 64, "statistics": None},
        traits={"randomised": True, "optimising": True, "episodic": True},
        tuned=13824,
        fallbacks=0,
        ms_per_image=12.5,
    )
    return {**values, **changes}


def make_controls(radii=RADII) -> dict:
    """Accuracies of the controls: clean 0.8, and one of their own at each radius."""
    robust = {"static prompts": 0.5, "random prompts": 0.25, "ensemble-64": 0.75}
    return {name: {0.0: 0.8, **dict.fromkeys(radii, value)} for name, value in robust.items()}


def make_report(
    *,
    clean_accuracy=0.9,
    robust_accuracy=None,
    after_each=None,
    per_class=None,
    controls=None,
    attack_target="static",
    **changes,
) -> RobustnessReport:
    """A report with fixed figures: 40 images, clean 0.9, robust 0.7 at 1/255 and 0.25 at 4/255; with its controls,
    where there is a defence.
    """
    n = changes.get("num_images", 40)
    robust_accuracy = {1 / 255: 0.7, 4 / 255: 0.25} if robust_accuracy is None else robust_accuracy
    after_each = {r: {"pgd": v} for r, v in robust_accuracy.items()} if after_each is None else after_each
    if per_class is None:  # as many right in all as the accuracies say
        least = robust_accuracy[max(robust_accuracy)] if robust_accuracy else clean_accuracy
        right = round(n * clean_accuracy), round(n * least)
        half = n // 2
        per_class = {"cat": (half, *(min(half, count) for count in right)),
                     "dog": (n - half, *(max(0, count - half) for count in right))}  # fmt: skip
    if controls is None and changes.get("defence"):
        controls = make_controls(robust_accuracy)
    values = dict(
        name="TeCoA",
        task="trained classes",
        model="user/robust-clip",
        model_revision="0123abc",
        dataset="user/pictures",
        dataset_revision="main",
        split="test",
        num_images=n,
        class_names=["cat", "dog"],
        prompt_hash=prompt_hash(["cat", "dog"], ["a {}"]),
        attack="PGD-20",
        attack_parameters={"num_steps": 20, "step_size": [0.1, 0.2], "random_start": True, "loss": "cross_entropy"},
        view=KNOWN_VIEWS[attack_target],
        attack_resolution=8,
        norm="linf",
        model_flags={"randomised": False, "optimising": False},
        zero_gradient_share=0.0125,
        seed=0,
        precision="float32",
        library_versions={"torch": "2.0"},
        hardware="CPU",
        measurements=accuracies(clean_accuracy, after_each, per_class, controls),
    )
    return RobustnessReport(**{**values, **changes})


def defence_rows() -> dict[str, list[RobustnessReport]]:
    """By label: a classifier under two attacks, and a defence of it under two kinds of attack, at 4/255 alone."""
    static = [make_report(), make_report(attack="APGD")]
    defended = dict(defence=make_defence(), robust_accuracy={4 / 255: 0.25})
    blind = make_report(attack_target="defence_blind", **defended)
    defended["robust_accuracy"] = {4 / 255: 0.1}
    worst = make_report(attack="all", attack_target="adaptive_worst", **defended)
    return {"CLIP": static, "TAPT": [blind, worst]}


SETTINGS = {
    "method": "PMG-AFT",
    "objective": {"alpha": 1.0, "temperature": None},
    "threat_model": "L-inf eps=4/255",
    "attack": {"num_steps": 2, "step_size": 1 / 255, "random_start": True, "keep_best": False},
    "optimizer": "sgd",
    "learning_rate": 5e-05,
    "images_per_update": 256,
}
INFO = CardInfo(
    repo_id="user/robust-clip",
    base_model="user/clip",
    training_data="user/pictures, split train, 1000 images of 4 classes (cat, dog, newt, owl), main",
    paper=PMGAFT.paper,
    settings=SETTINGS,
    template="This is a photo of a {}",
    class_names=("cat", "dog", "newt", "owl"),
    limits="It knows four animals.",
    datasets=["user/pictures"],
    plot="accuracy.png",
    license="apache-2.0",
)
OWN = [
    make_report(name="PMG-AFT"),
    make_report(
        name="PMG-AFT",
        task="held-out classes",
        clean_accuracy=0.6,
        robust_accuracy={1 / 255: 0.4, 4 / 255: 0.1},
        zero_gradient_share=0.0,
    ),
]
BEFORE = [make_report(name="undefended", clean_accuracy=1.0, robust_accuracy={1 / 255: 0.05})]


def auto_attack(**changes) -> RobustnessReport:
    """A report of a suite that had to leave a member out."""
    values = dict(
        name="PMG-AFT",
        attack="AutoAttack",
        attack_parameters={
            "version": "standard",
            "members": ("apgd-ce", "square"),
            "queries": None,
            "left_out": {"apgd-t": "needs 4 classes"},
        },
        standard_attack=True,
        robust_accuracy={1 / 255: 0.65, 4 / 255: 0.15},
        after_each={1 / 255: {"apgd-ce": 0.65, "square": 0.65}, 4 / 255: {"apgd-ce": 0.2, "square": 0.15}},
    )
    return make_report(**{**values, **changes})


def write_folder(folder: Path, info: CardInfo = INFO) -> str:
    """What a run leaves in its folder, weights aside; returns the card."""
    own = [*OWN, auto_attack()]
    save_reports(folder / "report.json", own, BEFORE, card=info)
    (folder / "recipe.yaml").write_text("method: pmg_aft\n")
    make_card(own, BEFORE, info).save(folder / "README.md")
    return (folder / "README.md").read_text(encoding="utf-8")
