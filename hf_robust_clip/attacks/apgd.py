"""Auto-PGD (Croce and Hein, ICML 2020): PGD with momentum whose step size halves where progress stalls."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import check_whole, checked_labels
from ..prediction import Predict, by_logits, withstood
from ..threat_model import ThreatModel
from .losses import cross_entropy, dlr_targeted
from .pgd import ClassificationLoss, LogitsFn, OnGradient, have_fallen, logits_and_gradient

MOMENTUM = 0.75


@dataclass(frozen=True)
class APGDSettings:
    """How Auto-PGD walks; defaults are AutoAttack's.

    Args:
        num_steps: gradient steps of each run (one gradient more is taken, at the start).
        num_restarts: runs (with targets: for each target), each from its own noise, as long as the image stands.
        eot: gradients averaged at each step, for classifiers that draw random numbers (expectation over
            transformation).
        rho: share of rising steps below which the step size is halved.

    Raises ValueError for a number below 1 and rho outside (0, 1].
    """

    num_steps: int = 100
    num_restarts: int = 1
    eot: int = 1
    rho: float = 0.75

    def __post_init__(self) -> None:
        check_whole(1, num_steps=self.num_steps, num_restarts=self.num_restarts, eot=self.eot)
        if not 0 < self.rho <= 1:
            raise ValueError(f"rho={self.rho!r} must be in (0, 1].")


def apgd(
    logits_fn: LogitsFn,
    images_BCHW: Tensor,
    labels_B: Tensor,
    threat_model: ThreatModel,
    settings: APGDSettings | None = None,
    *,
    loss: ClassificationLoss = cross_entropy,
    seed: int = 0,
    confirm: Predict | None = None,
    on_gradient: OnGradient | None = None,
) -> Tensor:
    """Images in the threat model that are misclassified where the attack succeeds.

    From the steepest-ascent point z_k = project(x_k + a_k * sign(g_k)) (L-inf; g_k / ||g_k||_2 for L2) it moves to
    x_{k+1} = project(x_k + 0.75 (z_k - x_k) + 0.25 (x_k - x_{k-1})). a_0 = 2 eps. At checkpoints, 22 % of the steps
    apart at first and 6 % at last, an image whose loss rose in at most `rho` of the steps since the last checkpoint,
    or whose best loss and step size both stood still, halves its step and goes back to its best iterate.

    An image leaves the batch at its first misclassified iterate. Images don't influence one another, and the noise of
    the start is that of a batch of one with this seed, the same for every image: what is found for an image depends
    neither on its batch nor on how images are split over processes, and equals what the authors' code finds for it
    alone.

    Args:
        logits_fn: the classifier, images to logits; used for the gradients.
        images_BCHW, labels_B: float images within the threat model's bounds, and their classes.
        threat_model: L-inf or L2 ball.
        settings: default `APGDSettings()`.
        loss: of logits and labels, one value per image, maximised: `cross_entropy` (APGD-CE), `dlr` (APGD-DLR).
        seed: of the noise.
        confirm: what decides, where `logits_fn` is cheaper or another; an iterate counts as misclassified only if this
            prediction is wrong too, and not flagged.
        on_gradient: called with each gradient (B, C, H, W).

    Returns:
        Detached images: the first misclassified iterate where there is one, else the one of highest loss in the last
        run. An image that is misclassified as it is comes back unchanged.

    Raises ValueError for images outside the bounds.
    """
    settings = settings or APGDSettings()
    attack = _Attack(logits_fn, threat_model, settings, loss, confirm, on_gradient)
    return attack.run(images_BCHW, labels_B, [None] * settings.num_restarts, seed)


def apgd_targeted(
    logits_fn: LogitsFn,
    images_BCHW: Tensor,
    labels_B: Tensor,
    threat_model: ThreatModel,
    settings: APGDSettings | None = None,
    *,
    num_targets: int = 9,
    seed: int = 0,
    confirm: Predict | None = None,
    on_gradient: OnGradient | None = None,
) -> Tensor:
    """APGD-T: Auto-PGD on the targeted DLR loss, once for each of the `num_targets` classes next in clean logit.

    The other arguments, the result and the errors are those of `apgd`. Raises ValueError too for fewer than four
    classes, and for more targets than there are other classes.
    """
    settings = settings or APGDSettings()
    attack = _Attack(logits_fn, threat_model, settings, None, confirm, on_gradient)
    if len(images_BCHW) == 0:
        return images_BCHW.detach().clone()
    images_BCHW = threat_model.checked(images_BCHW)
    with torch.no_grad():  # the own class counts as the first: a fast classifier may rank it lower
        logits_BC = logits_fn(images_BCHW)
        labels_B = checked_labels(labels_B, *logits_BC.shape).to(images_BCHW.device)
        order_BC = logits_BC.scatter(1, labels_B[:, None], torch.inf).sort(dim=1).indices
    if not 1 <= num_targets < order_BC.shape[1]:
        raise ValueError(f"num_targets={num_targets!r} must be in 1 .. {order_BC.shape[1] - 1}, the number of others.")
    runs = [order_BC[:, -rank] for rank in range(2, num_targets + 2) for _ in range(settings.num_restarts)]
    return attack.run(images_BCHW, labels_B, runs, seed)


@dataclass
class _Attack:
    logits_fn: LogitsFn
    threat_model: ThreatModel
    settings: APGDSettings
    loss: ClassificationLoss | None  # None: the targeted DLR
    confirm: Predict | None
    on_gradient: OnGradient | None

    def run(
        self, images_BCHW: Tensor, labels_B: Tensor, targets_of_runs: list[Tensor] | list[None], seed: int
    ) -> Tensor:
        """The runs in turn, each on the images that still stand."""
        found_BCHW = self.threat_model.checked(images_BCHW).detach().clone()
        labels_B = checked_labels(labels_B, len(found_BCHW)).to(found_BCHW.device)
        if len(found_BCHW) == 0:
            return found_BCHW
        clean_BCHW = found_BCHW.clone()
        judge = self.confirm or by_logits(self.logits_fn)
        rows = withstood(judge, clean_BCHW, labels_B).nonzero().squeeze(1)
        generator = torch.Generator().manual_seed(seed)
        for targets_B in targets_of_runs:
            if len(rows) == 0 or self.threat_model.eps == 0:
                break
            start_BCHW = self.start(clean_BCHW[rows], generator)
            targets = None if targets_B is None else targets_B[rows]
            found_BCHW[rows], standing = self.walk(clean_BCHW[rows], labels_B[rows], targets, start_BCHW)
            rows = rows[standing]
        return found_BCHW

    def start(self, images_BCHW: Tensor, generator: torch.Generator) -> Tensor:
        """A point where the ball's surface is met: L-inf noise with largest value eps, L2 noise of length eps."""
        shape = (1, *images_BCHW.shape[1:])
        if self.threat_model.norm == "linf":
            noise = 2 * torch.rand(shape, generator=generator) - 1
            noise = noise / (noise.abs().amax() + 1e-12)
        else:
            noise = torch.randn(shape, generator=generator)
            noise = noise / (torch.linalg.vector_norm(noise) + 1e-12)
        return (images_BCHW + self.threat_model.eps * noise.to(images_BCHW)).clamp(*self.threat_model.bounds)

    def gradient(self, s: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Logits and losses of the last draw, and the gradient averaged over `eot` draws into `s["grad"]`."""

        def loss(logits_BC: Tensor, labels_B: Tensor) -> Tensor:
            if self.loss is None:
                return dlr_targeted(logits_BC, labels_B, s["targets"])
            return self.loss(logits_BC, labels_B)

        total = torch.zeros_like(s["adv"])
        for _ in range(self.settings.eot):
            logits_BC, losses_B, grad_BCHW = logits_and_gradient(self.logits_fn, loss, s["adv"], s["labels"])
            total += grad_BCHW
            if self.on_gradient is not None:
                self.on_gradient(grad_BCHW)
        s["grad"] = total / self.settings.eot
        return logits_BC, losses_B

    def walk(
        self, clean_BCHW: Tensor, labels_B: Tensor, targets_B: Tensor | None, start_BCHW: Tensor
    ) -> tuple[Tensor, Tensor]:
        """One run: the images found, and whether each of them still stands.

        All that belongs to an image is a row of `s`, so that an image leaves by leaving out its row.
        """
        size, steps = len(clean_BCHW), self.settings.num_steps
        found_BCHW, standing_B = start_BCHW.clone(), torch.ones(size, dtype=torch.bool, device=clean_BCHW.device)
        s = {"row": torch.arange(size, device=clean_BCHW.device), "labels": labels_B, "clean": clean_BCHW}
        s |= {"adv": start_BCHW, "before": start_BCHW, "best": start_BCHW}
        if targets_B is not None:
            s["targets"] = targets_B
        logits_BC, losses_B = self.gradient(s)
        one_B = torch.ones_like(losses_B)
        s |= {"best_grad": s["grad"], "best_loss": losses_B, "checked_loss": losses_B, "halved": one_B}
        s |= {"step_size": 2 * self.threat_model.eps * one_B.view(-1, 1, 1, 1).to(clean_BCHW)}
        s["last_loss"], s["rises"] = torch.zeros_like(one_B), torch.zeros_like(one_B)
        interval, until_check = max(int(0.22 * steps), 1), 0
        for step in range(steps + 1):
            if step > 0:
                self.move(s, MOMENTUM if step > 1 else 1.0)
                logits_BC, losses_B = self.gradient(s)
                self.compare(s, losses_B)
                until_check += 1
            broken = have_fallen(logits_BC, s["adv"], s["labels"], self.confirm)
            if broken.any():
                rows = s["row"][broken]
                found_BCHW[rows], standing_B[rows] = s["adv"][broken], False
                s = {name: value[~broken] for name, value in s.items()}
                if len(s["row"]) == 0:
                    return found_BCHW, standing_B
            if until_check == interval:
                self.check_progress(s, interval)
                interval = max(interval - max(int(0.03 * steps), 1), max(int(0.06 * steps), 1))
                until_check = 0
        found_BCHW[s["row"]] = s["best"]
        return found_BCHW, standing_B

    def move(self, s: dict[str, Tensor], momentum: float) -> None:
        ascent = self.threat_model.ascend(s["adv"], s["grad"], s["clean"], s["step_size"])
        mixed = s["adv"] + momentum * (ascent - s["adv"]) + (1 - momentum) * (s["adv"] - s["before"])
        s["before"], s["adv"] = s["adv"], self.threat_model.project(mixed, s["clean"])

    @staticmethod
    def compare(s: dict[str, Tensor], losses_B: Tensor) -> None:
        """Count the rise, keep the best. The step before the first counts as loss 0, as in the authors' code."""
        s["rises"] = s["rises"] + (losses_B > s["last_loss"]).to(losses_B)
        s["last_loss"] = losses_B
        better = losses_B > s["best_loss"]
        wide = better[:, None, None, None]
        s["best_loss"] = torch.where(better, losses_B, s["best_loss"])
        s["best"] = torch.where(wide, s["adv"], s["best"])
        s["best_grad"] = torch.where(wide, s["grad"], s["best_grad"])

    def check_progress(self, s: dict[str, Tensor], interval: int) -> None:
        """Halve the step size, and go back to the best iterate, where progress stalls."""
        stalled = s["rises"] <= interval * self.settings.rho
        stalled |= (s["halved"] == 0) & (s["checked_loss"] >= s["best_loss"])
        s["halved"], s["checked_loss"], s["rises"] = stalled.to(s["halved"]), s["best_loss"], s["rises"] * 0
        wide = stalled[:, None, None, None]
        s["step_size"] = torch.where(wide, s["step_size"] / 2, s["step_size"])
        s["adv"], s["grad"] = torch.where(wide, s["best"], s["adv"]), torch.where(wide, s["best_grad"], s["grad"])
