"""Robust CLIP for the Hugging Face ecosystem: adversarial fine-tuning, prompts, attacks and honest evaluation.

Public names are loaded on first use, so that importing the package stays cheap. The prompt method is registered with
PEFT, and the defended pipeline with transformers, when the package is imported after these, and with the first use of
any public name. A program that imports the package before them, and uses nothing of it by name, imports
`hf_robust_clip.prompts` or `hf_robust_clip.pipeline`, which register at once.
"""

import sys
from importlib import import_module
from typing import Any

_NAMES = {
    "threat_model": "Perturbation ThreatModel",
    "modeling": "CLIPForZeroShotClassification SiglipForZeroShotClassification AutoModelForZeroShotClassification",
    "modeling.vision_tower": "replace_vision_tower robust_vision_tower",
    "explain": "patch_map saliency",
    "attacks.pgd": "pgd",
    "attacks.apgd": "apgd apgd_targeted",
    "attacks.auto_attack": "auto_attack AutoAttack",
    "attacks.suites": "PGD NoAttack Suite Member Victim",
    "attacks.targeted": "TargetedPGD",
    "prompts": "ClipPromptConfig ClipPromptModel",
    "objectives.base": "Batch Objective",
    "objectives.clean": "Clean",
    "objectives.tecoa": "TeCoA",
    "objectives.fare": "FARE",
    "objectives.trades": "TRADES",
    "objectives.pmg_aft": "PMGAFT",
    "objectives.apt": "APT",
    "objectives.fap": "FAP",
    "objectives.coop": "CoOp",
    "objectives.contrastive": "Contrastive",
    "objectives.clean_clip": "CleanCLIP",
    "objectives.cleaner_clip": "CleanerCLIP",
    "objectives.agft": "AGFT",
    "objectives.caw": "CAW",
    "objectives.sim_clip": "SimCLIP",
    "objectives.simple_at": "SimpleAT",
    "objectives.tga_zsr": "TGAZSR",
    "objectives.comp_tga": "CompTGA",
    "objectives.saft": "SAFT",
    "objectives.ascl": "ASCL",
    "objectives.acl": "ACL",
    "objectives.adv_cl": "AdvCL",
    "objectives.c_avp": "CAVP",
    "defences.base": "Defence Fitted StreamState Traits",
    "prediction": "Prediction",
    "paper": "Paper",
    "defences.defended": "DefendedClassifier",
    "defences.alignment": "AlignmentTargets",
    "defences.fit": "collect_statistics",
    "defences.tapt": "TAPT",
    "defences.tpt": "TPT",
    "defences.prompt_align": "PromptAlign",
    "defences.r_tpt": "RTPT",
    "defences.ttc": "TTC",
    "defences.rfi": "RFI SecondMoment",
    "defences.clipure": "CLIPure",
    "defences.bafta": "BaFTA BaFTAState",
    "defences.ensemble": "Ensemble",
    "defences.undefended": "Undefended",
    "defences.detector": "Detector",
    "defences.mirror_check": "MirrorCheck",
    "defences.captioners": "Captioner CaptioningModel ZeroShotCaptioner",
    "defences.generators": "ClasswiseSampler DiffusionGenerator Generator",
    "defences.encoders": "ClipEncoder ImageEncoder",
    "pipeline": "RobustZeroShotImageClassificationPipeline",
    "training.config": "RobustClipConfig",
    "training.trainer": "RobustClipTrainer",
    "training.named": "CleanTrainer TeCoATrainer FARETrainer TRADESTrainer PMGAFTTrainer APTTrainer TAPTTrainer "
    "FAPTrainer CoOpTrainer AGFTTrainer CAWTrainer SimCLIPTrainer SimpleATTrainer TGAZSRTrainer ASCLTrainer "
    "CompTGATrainer SAFTTrainer ACLTrainer AdvCLTrainer CAVPTrainer",
    "evaluation.attack_views": "AttackView AdaptiveWorst Static DefenceBlind TransferFromAdapted BPDA Adaptive "
    "Queries",
    "evaluation.settings": "EvaluationSettings",
    "evaluation.loop": "evaluate_robustness",
    "evaluation.adversarial": "SaveAdversarial",
    "evaluation.streams": "stream_poisoning",
    "evaluation.detection": "Alarm detection_report",
    "report.report": "Measurement RobustnessReport",
    "report.comparison": "paired_difference",
    "crops": "RandomResizedCrop",
    "distortions": "Augmentation ColourDistortion RandomErasing",
    "poisoning.triggers": "Trigger BadNet Blended SIG WaNet Stripes",
    "poisoning.poisoner": "Poisoner PoisonedPairs",
    "poisoning.captions": "CaptionEditor WordEditor GrammarEditor",
    "zero_shot_data.pairs": "PairDataset pair_dataset load_pairs",
    "zero_shot_data.loading": "image_dataset load_image_dataset",
    "digits_clip": "digits_clip_path",
    "report.card": "make_card",
    "checkpoint_notes": "load_descriptions",
}
_WHERE = {name: module for module, names in _NAMES.items() for name in names.split()}
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
