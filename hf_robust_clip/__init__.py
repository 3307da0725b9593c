"""Robust CLIP for the Hugging Face ecosystem: adversarial fine-tuning, prompts, attacks and honest evaluation.

Public names are loaded on first use, so that importing the package stays cheap. The prompt method is registered with
PEFT, and the defended pipeline with transformers, when the package is imported after these, and with the first use of
any public name. A program that imports the package before them, and uses nothing of it by name, imports
`hf_robust_clip.prompts` or `hf_robust_clip.pipeline`, which register at once.
"""

import sys
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
    "Suite": "attacks.suites",
    "Member": "attacks.suites",
    "Victim": "attacks.suites",
    "ClipPromptConfig": "prompts",
    "ClipPromptModel": "prompts",
    "Batch": "objectives.base",
    "Objective": "objectives.base",
    "Clean": "objectives.clean",
    "TeCoA": "objectives.tecoa",
    "FARE": "objectives.fare",
    "TRADES": "objectives.trades",
    "PMGAFT": "objectives.pmg_aft",
    "APT": "objectives.apt",
    "FAP": "objectives.fap",
    "CoOp": "objectives.coop",
    "Contrastive": "objectives.contrastive",
    "Defence": "defences.base",
    "Fitted": "defences.base",
    "Traits": "defences.base",
    "Prediction": "prediction",
    "Paper": "paper",
    "DefendedClassifier": "defences.defended",
    "AlignmentTargets": "defences.alignment",
    "collect_statistics": "defences.fit",
    "TAPT": "defences.tapt",
    "TPT": "defences.tpt",
    "PromptAlign": "defences.prompt_align",
    "RTPT": "defences.r_tpt",
    "TTC": "defences.ttc",
    "Ensemble": "defences.ensemble",
    "Undefended": "defences.undefended",
    "RobustZeroShotImageClassificationPipeline": "pipeline",
    "RobustClipConfig": "training.config",
    "RobustClipTrainer": "training.trainer",
    "CleanTrainer": "training.named",
    "TeCoATrainer": "training.named",
    "FARETrainer": "training.named",
    "TRADESTrainer": "training.named",
    "PMGAFTTrainer": "training.named",
    "APTTrainer": "training.named",
    "TAPTTrainer": "training.named",
    "FAPTrainer": "training.named",
    "CoOpTrainer": "training.named",
    "AttackView": "evaluation.attack_views",
    "Static": "evaluation.attack_views",
    "DefenceBlind": "evaluation.attack_views",
    "TransferFromAdapted": "evaluation.attack_views",
    "BPDA": "evaluation.attack_views",
    "Adaptive": "evaluation.attack_views",
    "Queries": "evaluation.attack_views",
    "AdaptiveWorst": "evaluation.attack_views",
    "EvaluationSettings": "evaluation.settings",
    "evaluate_robustness": "evaluation.loop",
    "Measurement": "report.report",
    "RobustnessReport": "report.report",
    "RandomResizedCrop": "crops",
    "image_dataset": "zero_shot_data.loading",
    "load_image_dataset": "zero_shot_data.loading",
    "digits_clip_path": "digits_clip",
    "make_card": "report.card",
}
__all__ = sorted(_WHERE)


_REGISTERS = {"peft": ".prompts", "transformers.pipelines": ".pipeline"}  # their module, and ours that registers there


def _register() -> None:
    """With what is imported already."""
    for theirs, ours in _REGISTERS.items():
        if theirs in sys.modules:
            import_module(ours, __name__)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(f".{_WHERE[name]}", __name__), name)
    _register()
    return found


def __dir__() -> list[str]:
    return __all__


_register()
