"""Classifiers to attack, and the authors' attacks on them."""

import torch
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted

NORMS = {"linf": "Linf", "l2": "L2"}


class Curved(torch.nn.Module):
    """A random network of one hidden layer over 3 x 8 x 8 pixels."""

    def __init__(self, classes=10, seed=0, dtype=torch.float64):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.first = torch.nn.Parameter(torch.randn(192, 32, generator=generator, dtype=dtype))
        self.second = torch.nn.Parameter(torch.randn(32, classes, generator=generator, dtype=dtype))

    def forward(self, images):
        return ((images.flatten(1) - 0.5) @ self.first / 4).tanh() @ self.second


def curved(classes=10, size=12, seed=0, dtype=torch.float64):
    """The network with its parameters frozen, images (some values exactly 0 or 1), and the classes it gives them."""
    model = Curved(classes, seed, dtype).requires_grad_(False)
    generator = torch.Generator().manual_seed(seed + 1)
    images = (1.2 * torch.rand(size, 3, 8, 8, generator=generator, dtype=dtype) - 0.1).clamp(0, 1)
    return model, images, model(images).argmax(1)


def linear(classes, size=6, seed=0):
    """Logits Wx + b, images well inside [0, 1], their classes, and the distance of each to the nearest other class."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(classes, 192, generator=generator, dtype=torch.float64)
    images = 0.4 + 0.2 * torch.rand(size, 3, 8, 8, generator=generator, dtype=torch.float64)
    bias = -weights @ torch.full((192,), 0.5, dtype=torch.float64)

    def logits(pixels):
        return pixels.flatten(1) @ weights.T + bias

    values = logits(images)
    labels = values.argmax(1)
    gaps = values.gather(1, labels[:, None]) - values
    apart = weights[labels][:, None] - weights[None]
    own = torch.nn.functional.one_hot(labels, classes).bool()
    distances = {
        name: (gaps / apart.norm(p, dim=2)).masked_fill(own, torch.inf).amin(1)
        for name, p in {"linf": 1, "l2": 2}.items()
    }
    return logits, images, labels, distances


def fallen(logits_fn, images, labels):
    with torch.no_grad():
        return logits_fn(images).argmax(1) != labels


def recorded(logits_fn, points):
    """The classifier, writing down every point at which a gradient is taken."""

    def logits(images):
        if images.requires_grad:
            points.append(images.detach().clone())
        return logits_fn(images)

    return logits


def authors_apgd(logits_fn, images, labels, threat_model, *, loss, num_steps, num_targets=3, restarts=1, rho=0.75):
    """Their Auto-PGD (`loss`: ce, dlr or targeted), without leaving anything in the global random state."""
    shared = dict(
        norm=NORMS[threat_model.norm],
        eps=threat_model.eps,
        n_iter=num_steps,
        n_restarts=restarts,
        rho=rho,
        seed=0,
        device="cpu",
    )
    if loss == "targeted":
        attack = APGDAttack_targeted(logits_fn, n_target_classes=num_targets, **shared)
    else:
        attack = APGDAttack(logits_fn, loss=loss, **shared)
    with torch.random.fork_rng(devices=[]):
        return attack.perturb(images, labels)
