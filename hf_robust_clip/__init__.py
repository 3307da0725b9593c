"""Robust CLIP for the Hugging Face ecosystem: adversarial fine-tuning, prompts, attacks and honest evaluation.

Public names are loaded on first use, so that importing the package stays cheap. The prompt method is registered with
PEFT, and the defended pipeline with transformers, as soon as both packages are imported, in whichever order.
"""

import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
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
    "DefendedClassifier": "defences.defended",
    "AlignmentTargets": "defences.statistics",
    "collect_statistics": "defences.statistics",
    "TAPT": "defences.tapt",
    "TPT": "defences.tpt",
    "PromptAlign": "defences.prompt_align",
    "RTPT": "defences.r_tpt",
    "TTC": "defences.ttc",
    "Ensemble": "defences.ensemble",
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
    "AdaptiveWorst": "evaluation.loop",
    "EvaluationSettings": "evaluation.loop",
    "evaluate_robustness": "evaluation.loop",
    "RobustnessReport": "report.report",
    "RandomResizedCrop": "crops",
    "image_dataset": "zero_shot_data.loading",
    "load_image_dataset": "zero_shot_data.loading",
    "digits_clip_path": "digits_clip",
    "make_card": "report.card",
}
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_WHERE[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__


_REGISTERS = {"peft": ".prompts", "transformers.pipelines": ".pipeline"}  # their module, and ours that registers there


class _AfterImport(MetaPathFinder):
    """Lets the import of a module of `_REGISTERS` end with the registration there, without importing it before its
    time.
    """

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname not in _REGISTERS:
            return None
        finders = (finder for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in finders)), None)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_register(module: Any) -> None:
                run(module)
                import_module(_REGISTERS[fullname], __name__)

            spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


for _name, _own in _REGISTERS.items():
    if _name in sys.modules:
        import_module(_own, __name__)
if not _REGISTERS.keys() <= sys.modules.keys():
    sys.meta_path.insert(0, _AfterImport())
