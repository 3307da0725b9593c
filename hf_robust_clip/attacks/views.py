"""What reports and cards say of what an attack sees; the views themselves are in `evaluation.attack_views`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class View:
    """What an attack sees of the classifier or defence under attack, in words.

    Args:
        name: what settings and reports call it, e.g. `"adaptive"`.
        text: the same in a few words, for cards.
        goes_through: whether gradients go through the whole defence; without such an attack a figure says nothing
            of it.
        alone: whether the attack is made on the classifier alone, as if there were no defence.
        of_defence: whether it makes sense only where there is a defence.
    """

    name: str
    text: str
    goes_through: bool = False
    alone: bool = False
    of_defence: bool = False


STATIC = View("static", "white box on the plain classifier", alone=True)
DEFENCE_BLIND = View(
    "defence_blind", "made on the classifier without its defence, then shown to the defence", alone=True,
    of_defence=True,
)  # fmt: skip
ADAPTIVE = View("adaptive", "white box through the whole defence", goes_through=True, of_defence=True)
BPDA = View(
    "bpda", "through the whole defence, what has no gradient replaced in the backward pass", goes_through=True,
    of_defence=True,
)  # fmt: skip
TRANSFER_FROM_ADAPTED = View(
    "transfer_from_adapted", "made on the adapted classifier held fixed, then shown to the defence", of_defence=True
)
QUERIES = View("queries", "by the defence's own answers, without gradients", of_defence=True)
ADAPTIVE_WORST = View(
    "adaptive_worst", "each attack on the defence in turn, on the images that withstood the ones before",
    goes_through=True, of_defence=True,
)  # fmt: skip
KNOWN_VIEWS = {  # weakest first
    view.name: view for view in (STATIC, DEFENCE_BLIND, ADAPTIVE, BPDA, TRANSFER_FROM_ADAPTED, QUERIES, ADAPTIVE_WORST)
}
