"""Robust CLIP for the Hugging Face ecosystem: adversarial fine-tuning, attacks and honest evaluation.

Public names are loaded on first use, so that importing the package stays cheap.
"""

from importlib import import_module
from typing import Any

_WHERE = {
    "ThreatModel": "threat_model",
    "CLIPForZeroShotClassification": "modeling",
    "pgd": "attacks.pgd",
    "apgd": "attacks.apgd",
    "apgd_targeted": "attacks.apgd",
    "auto_attack": "attacks.auto_attack",
    "AutoAttack": "attacks.auto_attack",
    "PGD": "attacks.suites",
    "Batch": "objectives.base",
    "Objective": "objectives.base",
    "Clean": "objectives.clean",
    "TeCoA": "objectives.tecoa",
    "FARE": "objectives.fare",
    "TRADES": "objectives.trades",
    "PMGAFT": "objectives.pmg_aft",
    "RobustClipConfig": "trainer",
    "RobustClipTrainer": "trainer",
    "CleanTrainer": "trainer",
    "TeCoATrainer": "trainer",
    "FARETrainer": "trainer",
    "TRADESTrainer": "trainer",
    "PMGAFTTrainer": "trainer",
    "EvaluationSettings": "evaluation",
    "evaluate_robustness": "evaluation",
    "RobustnessReport": "report",
    "load_image_dataset": "zero_shot_data.loading",
    "digits_clip_path": "digits_clip",
    "make_card": "model_card",
}
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_WHERE[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
