"""A trainer for each published method, by the name that people look for; a new objective needs none."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..defences.tapt import TAPT
from ..objectives.acl import ACL
from ..objectives.adv_cl import AdvCL
from ..objectives.agft import AGFT
from ..objectives.apt import APT
from ..objectives.ascl import ASCL
from ..objectives.c_avp import CAVP
from ..objectives.caw import CAW
from ..objectives.clean import Clean
from ..objectives.comp_tga import CompTGA
from ..objectives.coop import CoOp
from ..objectives.fap import FAP
from ..objectives.fare import FARE
from ..objectives.pmg_aft import PMGAFT
from ..objectives.saft import SAFT
from ..objectives.sim_clip import SimCLIP
from ..objectives.simple_at import SimpleAT
from ..objectives.tecoa import TeCoA
from ..objectives.tga_zsr import TGAZSR
from ..objectives.trades import TRADES
from .trainer import RobustClipTrainer

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn
    from torch.utils.data import Dataset

    from ..defences.alignment import AlignmentTargets


class CleanTrainer(RobustClipTrainer):
    """Fine-tuning without an attack, the control. See `objectives.clean.Clean`."""

    objective_cls = Clean


class TeCoATrainer(RobustClipTrainer):
    """TeCoA (ICLR 2023). See `objectives.tecoa.TeCoA`."""

    objective_cls = TeCoA


class FARETrainer(RobustClipTrainer):
    """FARE (ICML 2024). See `objectives.fare.FARE`."""

    objective_cls = FARE


class TRADESTrainer(RobustClipTrainer):
    """TRADES (ICML 2019). See `objectives.trades.TRADES`."""

    objective_cls = TRADES


class PMGAFTTrainer(RobustClipTrainer):
    """PMG-AFT (CVPR 2024). See `objectives.pmg_aft.PMGAFT`."""

    objective_cls = PMGAFT


class AGFTTrainer(RobustClipTrainer):
    """AGFT (CVPR 2026). See `objectives.agft.AGFT`."""

    objective_cls = AGFT


class CAWTrainer(RobustClipTrainer):
    """CAW (arXiv 2025). See `objectives.caw.CAW`."""

    objective_cls = CAW


class SimCLIPTrainer(RobustClipTrainer):
    """Sim-CLIP (arXiv 2024). See `objectives.sim_clip.SimCLIP`."""

    objective_cls = SimCLIP


class SimpleATTrainer(RobustClipTrainer):
    """SimpleAT (arXiv 2023). See `objectives.simple_at.SimpleAT`."""

    objective_cls = SimpleAT


class TGAZSRTrainer(RobustClipTrainer):
    """TGA-ZSR (NeurIPS 2024). See `objectives.tga_zsr.TGAZSR`."""

    objective_cls = TGAZSR


class CompTGATrainer(RobustClipTrainer):
    """Comp-TGA (TPAMI 2026). See `objectives.comp_tga.CompTGA`."""

    objective_cls = CompTGA


class SAFTTrainer(RobustClipTrainer):
    """SAFT (TMLR 2026). See `objectives.saft.SAFT`."""

    objective_cls = SAFT


class ASCLTrainer(RobustClipTrainer):
    """ASCL (arXiv 2021). See `objectives.ascl.ASCL`."""

    objective_cls = ASCL


class ACLTrainer(RobustClipTrainer):
    """ACL (NeurIPS 2020). See `objectives.acl.ACL`."""

    objective_cls = ACL


class AdvCLTrainer(RobustClipTrainer):
    """AdvCL (NeurIPS 2021). See `objectives.adv_cl.AdvCL`."""

    objective_cls = AdvCL


class CAVPTrainer(RobustClipTrainer):
    """C-AVP (ICASSP 2023). See `objectives.c_avp.CAVP`, and `defences.c_avp.CAVP`, which predicts."""

    objective_cls = CAVP


class APTTrainer(RobustClipTrainer):
    """Adversarial training of prompts (TAPT, CVPR 2025). See `objectives.apt.APT`."""

    objective_cls = APT


class FAPTrainer(RobustClipTrainer):
    """FAP (NeurIPS 2024). See `objectives.fap.FAP`."""

    objective_cls = FAP


class CoOpTrainer(RobustClipTrainer):
    """CoOp (IJCV 2022), the control that trains text prompts on clean images. See `objectives.coop.CoOp`."""

    objective_cls = CoOp


class TAPTTrainer(RobustClipTrainer):
    """TAPT (CVPR 2025): prompts of `APT` that are tuned on every test image. See `defences.tapt.TAPT`.

        trainer = TAPTTrainer(model, args, train_dataset=train, eval_dataset=test)
        trainer.train()                # adversarial prompts, as APTTrainer
        trainer.collect_statistics()   # of the training images, under these prompts and under clean-trained ones
        trainer.evaluate()             # tunes on every test image, clean and attacked
        trainer.save_model("out")      # TAPT.from_pretrained("out") restores prompts, statistics and settings

    The settings of the defence are `defence`, a `TAPT` whose `targets` may be None until they are collected.
    """

    objective_cls, defence_cls = APT, TAPT

    def collect_statistics(
        self, dataset: Dataset | None = None, clean_model: nn.Module | None = None, state_dir: str | Path | None = None
    ) -> AlignmentTargets:
        """Statistics of clean training images, with which views are aligned: what `fit_defence` gives the defence."""
        return self.fit_defence(dataset, clean_model, state_dir).targets  # type: ignore[attr-defined]  # a TAPT
