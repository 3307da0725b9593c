"""The contract table of test-time defences: each with a classifier that it stands in front of."""

from dataclasses import replace

import torch
from naive import targets_of
from prompted_clip import NAMES, make_base, make_class_wise, make_images, make_prompted

from hf_robust_clip.defences.bafta import BaFTA
from hf_robust_clip.defences.base import Defence
from hf_robust_clip.defences.c_avp import CAVP
from hf_robust_clip.defences.clipure import CLIPure
from hf_robust_clip.defences.encoders import SmallEncoder
from hf_robust_clip.defences.ensemble import Ensemble
from hf_robust_clip.defences.generators import ClasswiseSampler
from hf_robust_clip.defences.mirror_check import MirrorCheck
from hf_robust_clip.defences.prompt_align import PromptAlign
from hf_robust_clip.defences.r_tpt import RTPT
from hf_robust_clip.defences.rfi import RFI
from hf_robust_clip.defences.tapt import TAPT
from hf_robust_clip.defences.tpt import TPT
from hf_robust_clip.defences.ttc import TTC
from hf_robust_clip.modeling import CLIPForZeroShotClassification

FEWER = dict(num_views=6, selected=0.5)


def prompted(row: str) -> CLIPForZeroShotClassification:
    return make_class_wise() if row == "class-wise" else make_prompted(row).get_base_model()


def with_targets(adapter: Defence, classifier: CLIPForZeroShotClassification) -> Defence:
    if "targets" in adapter.learns():
        return replace(adapter, targets=targets_of(classifier))
    few = [{"pixel_values": image, "labels": 0} for image in make_images(9, seed=7)]
    return adapter.fit(classifier, few) if "moment" in adapter.learns() else adapter


class Small:
    """A random encoder for `MirrorCheck`."""

    def __init__(self):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = SmallEncoder(8).requires_grad_(False).eval()

    def module(self):
        return self.net


SAMPLER = ClasswiseSampler(
    tuple(f"a photo of a {name}." for name in NAMES), torch.full((6, 3, 8, 8), 0.5), torch.full((6, 1, 3, 8, 8), 0.1)
)
ROWS = {  # row of prompts in the classifier, or none; the defence
    "tapt-V": ("V", TAPT(**FEWER)),
    "tapt-VLI": ("VLI", TAPT(reset_to="random", num_steps=2, **FEWER)),
    "tapt-VLJ": ("VLJ", TAPT(reset_every=2, **FEWER)),
    "tpt": (None, TPT(**FEWER)),
    "tpt-T": ("T", TPT(**FEWER)),
    "prompt_align": ("VLJ-vision", PromptAlign(**FEWER)),
    "r_tpt": (None, RTPT(**FEWER)),
    "r_tpt-VLI": ("VLI", RTPT(**FEWER)),
    "ttc": (None, TTC()),
    "ttc-VLI": ("VLI", TTC()),
    "ensemble": (None, Ensemble(num_views=6)),
    "rfi": (None, RFI(top_k=2)),
    "rfi-VLI": ("VLI", RFI(top_k=2, score="first", centred=True, renormalised=True)),
    "clipure": (None, CLIPure(num_steps=2, step_size=0.3)),
    "clipure-VLI": ("VLI", CLIPure(num_steps=2, step_size=0.3, normalised_over="batch")),
    "bafta": (None, BaFTA(num_views=6)),
    "bafta-VLI": ("VLI", BaFTA(num_views=6, beta=0)),
    "mirror_check": (None, MirrorCheck(generators=(SAMPLER,), encoders=(Small(),), threshold=0.0)),
    "c_avp": ("class-wise", CAVP(chunk_size=4)),
}


def make(name: str) -> tuple[CLIPForZeroShotClassification, Defence]:
    row, adapter = ROWS[name]
    classifier = make_base() if row is None else prompted(row)
    return classifier, with_targets(adapter, classifier)
