"""What was seen, as HTML that needs no file: figures as data addresses, numbers as text."""

from __future__ import annotations

import math
from base64 import b64encode
from html import escape
from io import BytesIO

import matplotlib
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .looking import Look, Seen

SHOWN_SIDE = 224  # pixels of a figure, at least, where it is enlarged by whole factors
MOST_ROWS = 6
COLOURS = "inferno"
STRENGTH = 0.6  # of a map over its picture

CSS = """
.look {border: 1px solid var(--border-color-primary); border-radius: 10px; padding: 12px 14px;
       background: var(--block-background-fill);}
.look h3 {margin: 0 0 2px 0; font-size: 1.05rem;}
.look .with {opacity: .75; font-size: .85rem; min-height: 1.3em;}
.look .verdict {margin: 8px 0; padding: 6px 10px; border-radius: 6px; font-weight: 600; border-left: 5px solid;}
.look .held {border-color: #2a9d5c; background: rgba(42, 157, 92, .12);}
.look .fell {border-color: #d1495b; background: rgba(209, 73, 91, .12);}
.look .none {border-color: #8a8f98; background: rgba(138, 143, 152, .12);}
.look table {width: 100%; border-collapse: collapse; font-size: .88rem; margin: 4px 0 10px 0; table-layout: fixed;}
.look th {text-align: left; font-weight: 500 !important; opacity: .75; padding: 2px 4px !important;}
.look td {padding: 2px 4px !important; overflow: hidden; text-overflow: ellipsis; white-space: nowrap;}
.look table, .look tr, .look th, .look td {border: none !important; background: none !important;}
.look td.of {width: 26%;}
.look .bar {position: relative; height: 1.35em; border-radius: 4px; background: rgba(138, 143, 152, .18);}
.look .bar i {position: absolute; inset: 0 auto 0 0; border-radius: 4px; background: #4c8bf5; opacity: .55;}
.look .bar.attacked i {background: #e0893c;}
.look .bar b {position: relative; padding-left: 6px; font-weight: 500; line-height: 1.35em;}
.look .grid {display: grid; grid-template-columns: repeat(3, 1fr); gap: 8px;}
.look figure {margin: 0;}
.look figure img {width: 100%; aspect-ratio: 1; image-rendering: pixelated; border-radius: 6px; display: block;}
.look figcaption {font-size: .74rem; line-height: 1.25; opacity: .8; margin-top: 3px;}
.look .small {font-size: .8rem; opacity: .8; margin-top: 8px;}
.look .about {font-size: .78rem; line-height: 1.35; opacity: .8;}
.status {padding: 6px 10px; border-radius: 6px; border-left: 5px solid #8a8f98; background: rgba(138, 143, 152, .12);}
.status.wrong {border-color: #d1495b; background: rgba(209, 73, 91, .12);}
#picture img, #examples img {image-rendering: pixelated;}
#picture img {width: 100%; height: 100%; object-fit: contain;}
"""


def status(text: str, wrong: bool = False) -> str:
    """A line that says how things stand."""
    return f'<div class="status{" wrong" if wrong else ""}">{escape(text)}</div>'


def drawn(found: Look, title: str) -> str:
    """A model's column: verdict, probabilities, pictures, maps, and how long it took.

    Args:
        title: above it, before the model's name.
    """
    kind = "none" if found.attacked is None else "fell" if found.fell else "held"
    with_what = f"with {found.defence}" if found.defence else "no test-time defence"
    return "".join(
        [
            f'<div class="look" data-model="{escape(title, quote=True)}" data-verdict="{kind}">',
            f"<h3>{escape(title)}: {escape(found.name)}</h3><div class='with'>{escape(with_what)}</div>",
            f'<div class="verdict {kind}">{escape(verdict(found))}</div>',
            table(found),
            f'<div class="grid">{"".join(figures(found))}</div>',
            f'<div class="small">{escape(" ".join(remarks(found)))}</div></div>',
        ]
    )


def verdict(found: Look) -> str:
    """What happened, in a sentence."""
    names, clean, attacked = found.class_names, found.clean, found.attacked
    if clean.flagged:
        return "The detector flags the picture as it is: a false alarm, nothing was attacked."
    if not found.right:
        return f"Wrong as it is: {names[clean.named]}, not {names[found.label]}; nothing was attacked."
    if attacked is None:
        return f"Sees {names[clean.named]}. Radius 0: nothing was attacked."
    if attacked.flagged:
        return f"Sees {names[clean.named]}. The attacked picture is flagged as attacked: it withstood."
    if found.fell:
        return f"Fooled by {found.broken_by}: {names[clean.named]} became {names[attacked.named]}."
    return f"Withstood {found.attack}: still {names[attacked.named]}."


def table(found: Look) -> str:
    """Probabilities of the classes that matter, before and after."""
    clean_C = found.clean.probabilities_C
    attacked_C = None if found.attacked is None else found.attacked.probabilities_C
    rows = []
    for index in shown_classes(found):
        name = found.class_names[index]
        cells = [_bar(float(clean_C[index]), "clean")]
        if attacked_C is not None:
            cells.append(_bar(float(attacked_C[index]), "attacked"))
        marked = " ◂" if index == found.label else ""
        shown = f"<td class='of' title='{escape(name, quote=True)}'>{escape(name)}{marked}</td>"
        rows.append(
            f"<tr data-class='{escape(name, quote=True)}'>{shown}{''.join(f'<td>{c}</td>' for c in cells)}</tr>"
        )
    heads = ["class", "probability, clean", *(["probability, attacked"] if attacked_C is not None else [])]
    left = len(found.class_names) - len(rows)
    more = f"<tr><td class='of'>{left} more</td></tr>" if left else ""
    return f"<table><tr>{''.join(f'<th>{head}</th>' for head in heads)}</tr>{''.join(rows)}{more}</table>"


def shown_classes(found: Look) -> list[int]:
    """The classes of a table: those of highest probability, before or after, and the one that is asked about."""
    highest_C = found.clean.probabilities_C
    if found.attacked is not None:
        highest_C = torch.maximum(highest_C, found.attacked.probabilities_C)
    order = highest_C.argsort(descending=True, stable=True).tolist()
    kept = order[:MOST_ROWS]
    return kept if found.label in kept else [*kept[:-1], found.label]


def percent(share: float) -> str:
    """A probability that never reads as certain where it isn't."""
    if 0 < share < 0.0005:
        return "< 0.1 %"
    if 0.9995 <= share < 1:
        return "> 99.9 %"
    return f"{100 * share:.1f} %"


def _bar(share: float, kind: str) -> str:
    width = f"{100 * share:.1f}%"
    text = escape(percent(share))
    return f'<div class="bar {kind}" data-share="{share:.6f}"><i style="width: {width}"></i><b>{text}</b></div>'


def figures(found: Look) -> list[str]:
    """Pictures and maps in rows of three, each with what it shows."""
    pictures, patches, gradients = _pictures(found), _patches(found), _gradients(found)
    if found.attacked is None:
        return [pictures[0], patches[0], gradients[0], _about(""), patches[1], gradients[1]]
    return [*pictures, *patches, *gradients]


def _pictures(found: Look) -> list[str]:
    """The picture, clean and attacked, and what was changed, around grey."""
    clean, attacked = found.clean, found.attacked
    shown = [_figure(as_picture(clean.image_CHW), "as the model gets it")]
    if attacked is not None:
        change = attacked.image_CHW - clean.image_CHW
        moved, factor = 255 * float(change.abs().max()), 0.5 / found.eps
        shown += [
            _figure(as_picture(attacked.image_CHW), f"attacked: no value moved by more than {moved:.3g}/255"),
            _figure(as_picture(0.5 + factor * change), f"the change, {factor:.3g} times as large, on grey"),
        ]
    return shown


def _both(found: Look) -> list[tuple[str, Seen]]:
    return [
        (which, seen) for which, seen in (("clean", found.clean), ("attacked", found.attacked)) if seen is not None
    ]


def _patches(found: Look) -> list[str]:
    """Maps of patches on one scale, and what they are."""
    maps = [seen.map_HW for _, seen in _both(found)]
    low, high = min(float(own.min()) for own in maps), max(float(own.max()) for own in maps)
    shown = []
    for which, seen in _both(found):
        heat = over(seen.image_CHW, mapped(seen.map_HW, low, high), found.map_share)
        ends = f"{float(seen.map_HW.min()):.2f} to {float(seen.map_HW.max()):.2f}"
        shown.append(_figure(heat, f"patches, {which}: {ends}"))
    about = (
        f"Patches: how much each patch's token resembles the text of “{found.class_names[found.label]}” (cosine; dark "
        f"is {low:.2f}, bright {high:.2f}). Tokens have mixed: it isn't always where in the picture that comes from."
    )
    return [*shown, _about(about)]


def _gradients(found: Look) -> list[str]:
    """Saliency on one scale, and what it is."""
    top = max(float(seen.saliency_HW.max()) for _, seen in _both(found))
    shown = [
        _figure(mapped(seen.saliency_HW, 0.0, top), f"gradient, {which}: up to {float(seen.saliency_HW.max()):.3g}")
        for which, seen in _both(found)
    ]
    about = (
        f"Gradient: how fast the logit of “{found.class_names[found.label]}” changes with each pixel, per step of 1 "
        f"(bright is {top:.3g}). Each model has its own scale."
    )
    return [*shown, _about(about)]


def remarks(found: Look) -> list[str]:
    """What must be said beside the figures."""
    said = []
    clean, attacked = found.clean, found.attacked
    if attacked is not None:
        said.append(
            f"Attack: {found.attack} at {found.eps * 255:.3g}/255, {found.seen}, {found.attack_seconds:.2f} s."
        )
    times = [f"{clean.milliseconds:.1f} ms clean"]
    times += [] if attacked is None else [f"{attacked.milliseconds:.1f} ms attacked"]
    said.append(f"Prediction: {', '.join(times)}.")
    if attacked is not None and found.falls_rounded != found.fell:
        what = "is right" if found.fell else "is fooled"
        said.append(f"Rounded to 8 bits, as shown, the attacked picture is another: the model {what} there.")
    if found.defence:
        said.append("Maps are of the classifier beneath the defence.")
    return said


def as_picture(image_CHW: Tensor) -> Image.Image:
    """An image in [0, 1] in 8 bits; small ones enlarged by a whole factor, so that every pixel is seen."""
    levels_HWC = (image_CHW.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    return enlarged(Image.fromarray(levels_HWC))


def mapped(values_HW: Tensor, low: float, high: float) -> Image.Image:
    """Values in colours, from `low`, black, to `high`."""
    span = high - low if high > low else 1.0
    unit_HW = ((values_HW.double() - low) / span).clamp(0, 1).numpy()
    colours_HWC = matplotlib.colormaps[COLOURS](unit_HW)[..., :3]
    return enlarged(Image.fromarray(np.rint(colours_HWC * 255).astype(np.uint8)))


def over(image_CHW: Tensor, heat: Image.Image, share: float) -> Image.Image:
    """A map of patches over its picture, whose right and lower edge may be in no patch."""
    below = as_picture(image_CHW).convert("L").convert("RGB")
    size = (max(1, round(below.width * share)), max(1, round(below.height * share)))
    part = below.crop((0, 0, *size))
    below.paste(Image.blend(part, heat.resize(size, Image.Resampling.NEAREST), STRENGTH), (0, 0))
    return below


def enlarged(picture: Image.Image) -> Image.Image:
    """By the least whole factor that makes it large enough to look at."""
    factor = max(1, math.ceil(SHOWN_SIDE / max(picture.size)))
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def _about(text: str) -> str:
    return f'<div class="about">{escape(text)}</div>'


def _figure(picture: Image.Image, caption: str) -> str:
    content = BytesIO()
    picture.save(content, "PNG")
    address = f"data:image/png;base64,{b64encode(content.getvalue()).decode()}"
    shown = f'<img src="{address}" alt="{escape(caption, quote=True)}">'
    return f"<figure>{shown}<figcaption>{escape(caption)}</figcaption></figure>"
