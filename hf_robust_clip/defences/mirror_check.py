"""MirrorCheck: an image is held against pictures made of its own caption.

Shapes: B images, T captions, C classes, D embedding width.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from ..checks import check_choice, check_whole, checked_images
from ..crops import picture_key
from ..modeling import ZeroShotClassifier
from ..paper import Paper
from ..processes import Processes, everyone, together
from ..zero_shot_data.loading import ImageDataset, collate_images
from .base import Fitted, GradientPath, Prediction, Traits
from .captioners import Captioner, CaptioningModel, ZeroShotCaptioner
from .detector import Detector
from .encoders import ClipEncoder, ClipTower, ImageEncoder, SmallEncoder, resized, train_encoder
from .fit import fingerprints, fitting_record, read_tensors, write_tensors
from .generators import ClasswiseSampler, DiffusionGenerator, Generator, text_seed

if TYPE_CHECKING:
    from typing_extensions import Self

NoiseOn = Literal["parameters", "embeddings"]
PARTS: dict[str, type] = {
    cls.__name__: cls for cls in (ZeroShotCaptioner, CaptioningModel, DiffusionGenerator, ClipEncoder)
}
LARGEST_CACHE = 8192  # entries, after which pictures are made anew


@dataclass(frozen=True, eq=False)
class Mirror(Fitted):
    """What was made of training images: a generator of pictures by class, and encoders that aren't the classifier's.

    Args:
        side: of pictures and of what the encoders read.
        sampler: None where other generators are used.
        weights: of each encoder; empty where other encoders are used.
        about: where it comes from, in JSON types.
    """

    side: int
    sampler: ClasswiseSampler | None
    weights: tuple[dict[str, Tensor], ...]
    about: dict[str, Any]

    file: ClassVar[str] = "mirror.safetensors"

    @property
    def record(self) -> dict[str, Any]:
        return self.about

    @cached_property
    def modules(self) -> tuple[SmallEncoder, ...]:
        """The encoders."""
        return tuple(SmallEncoder.loaded(self.side, weights) for weights in self.weights)

    def check(self, classifier: ZeroShotClassifier) -> None:
        """Raise ValueError unless it was calibrated on this image encoder with these prompts in it."""
        model, prompts = fingerprints(classifier)
        for what, now in (("model_fingerprint", model), ("prompts_fingerprint", prompts)):
            if self.about.get(what) != now:
                told = what.split("_")[0].replace("model", "another image encoder").replace("prompts", "other prompts")
                raise ValueError(f"the mirror was calibrated with {told}; fit it on this classifier.")

    def save(self, path: str | Path) -> None:
        tensors = (
            {} if self.sampler is None else {"sampler.mean": self.sampler.mean, "sampler.basis": self.sampler.basis}
        )
        for number, weights in enumerate(self.weights):
            tensors |= {f"encoder.{number}.{name}": value for name, value in weights.items()}
        texts = None if self.sampler is None else list(self.sampler.texts)
        told = {"side": self.side, "texts": texts, "num_encoders": len(self.weights), "record": self.about}
        write_tensors(Path(path) / self.file, tensors, {"format": "pt", "mirror": json.dumps(told)})

    @classmethod
    def load(cls, path: str | Path) -> Mirror:
        file = Path(path) / cls.file
        tensors, metadata = read_tensors(file)
        try:
            told = json.loads(metadata["mirror"])
            sampler = None
            if told["texts"] is not None:
                sampler = ClasswiseSampler(tuple(told["texts"]), tensors["sampler.mean"], tensors["sampler.basis"])
            weights = tuple(
                {
                    name.split(".", 2)[2]: value
                    for name, value in tensors.items()
                    if name.startswith(f"encoder.{number}.")
                }
                for number in range(told["num_encoders"])
            )
            found = cls(int(told["side"]), sampler, weights, dict(told["record"]))
            _ = found.modules
        except (KeyError, TypeError, RuntimeError, json.JSONDecodeError) as error:
            raise ValueError(f"{str(file)!r} holds no mirror ({str(error).splitlines()[0]}); fit it again.") from error
        return found


class _Cache:
    """Pictures and their embeddings; no setting, and equal to any other."""

    def __init__(self) -> None:
        self.pictures: dict[Any, Tensor] = {}
        self.embeds: dict[Any, Tensor] = {}


@dataclass(frozen=True)
class _Draw:
    """What is random in a score."""

    generator: int
    seed: int
    encoders: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class MirrorCheck(Detector):
    """Flags an image that doesn't look like a picture made of its caption:

        S(x) = mean_e cos(I_e(x), I_e(G(caption(x); seed))),  flagged where S < tau; the score is -S, in [-1, 1].

    A caption is the class that the classifier gives, in a template, or a text of a captioning model. `fit` makes what
    isn't given: a generator that draws from the principal components of each class (`ClasswiseSampler`), small
    convolutional encoders of other seeds and another kind than the classifier, and the threshold, on training images
    that neither of them saw.

    Each image takes one of `num_draws` draws, by `seed` and its own grey levels: of a generator, the seed of its
    picture, a subset of the encoders and their noise. An attacker knows all of it but `seed`. Pictures are kept by
    generator, caption and seed.

    An attack through it lowers, beside the cross-entropy, the score that the image would have in other classes: for a
    classifier the captions are finite and so are their pictures, so no gradient through G is needed and none is
    missing. With captions of a model the caption counts as constant.

    Args:
        captioner: images to texts.
        generators: the zoo; empty for the one that `fit` makes.
        encoders: empty for those that `fit` makes. One that is the classifier under attack is warned of.
        num_draws: from how many draws an image takes its own; 1 takes the same for all (the released code's
            `legacy_once`).
        encoders_at_once: e in the mean above, drawn from all encoders; None takes all.
        noise: sigma of N(0, sigma^2), the same for x and for its picture; 0 leaves it out. The released code's 5e-6
            hardly moves S.
        noise_on: `"parameters"` of the encoders, as the released code does, or `"embeddings"`, as later versions of
            the paper are said to.
        num_components: of each class in the generator that `fit` makes.
        num_own_encoders: how many encoders `fit` makes.
        encoder_steps: of their training.
        largest_side: of the pictures that `fit` makes and its encoders read, in pixels; larger images are reduced.
        held_out: share of the images given to `fit`, in (0, 1), on which the threshold is found.
        fit_seed: of the division of these images, and of the encoders' training.

    Raises ValueError for numbers out of range; for a prediction without a threshold, with one that was found with
    other settings or on another model, and with a class that the generator wasn't fitted on.
    Source: arXiv 2406.09250 and its released code, which draws encoders and noise once for a whole evaluation, and
    chooses its threshold on the labels of the images that it then reports; here it is a quantile of clean ones.
    """

    captioner: Captioner = field(default_factory=lambda: ZeroShotCaptioner())  # no class: it may be given as a mapping
    generators: tuple[Generator, ...] = ()
    encoders: tuple[ImageEncoder, ...] = ()
    num_draws: int = 8
    encoders_at_once: int | None = None
    noise: float = 0.0
    noise_on: NoiseOn = "parameters"
    num_components: int = 8
    num_own_encoders: int = 1
    encoder_steps: int = 400
    largest_side: int = 32
    held_out: float = 0.3
    fit_seed: int = 0
    mirror: Mirror | None = field(default=None, repr=False, metadata={"fitted": Mirror})
    _cache: _Cache = field(default_factory=_Cache, init=False, repr=False, compare=False)

    paper = Paper.cited("mirror_check", "fares2024mirrorcheck", arxiv="2406.09250")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("captioner", "generators", "encoders"):
            value = getattr(self, name)
            made = _part(value, name) if name == "captioner" else tuple(_part(one, name) for one in value)
            object.__setattr__(self, name, made)
        check_whole(1, num_draws=self.num_draws, num_components=self.num_components, encoder_steps=self.encoder_steps)
        check_whole(1, num_own_encoders=self.num_own_encoders)
        check_whole(4, largest_side=self.largest_side)
        check_choice(NoiseOn, noise_on=self.noise_on)
        if not 0 <= self.noise < math.inf:
            raise ValueError(f"noise={self.noise!r} must be at least 0.")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out={self.held_out!r} must be in (0, 1).")
        count = len(self.encoders) or self.num_own_encoders
        if self.encoders_at_once is not None:
            check_whole(1, encoders_at_once=self.encoders_at_once)
            if self.encoders_at_once > count:
                raise ValueError(f"encoders_at_once={self.encoders_at_once!r} are more than the {count} encoders.")

    @property
    def traits(self) -> Traits:
        return Traits(randomised=True)

    def parameters(self) -> dict[str, Any]:
        own = super().parameters()
        return {
            **own,
            "captioner": _plain_part(self.captioner),
            "generators": [_plain_part(one) for one in self.generators],
            "encoders": [_plain_part(one) for one in self.encoders],
        }

    def idle_settings(self) -> dict[str, str]:
        found = {"num_components": "beside generators"} if self.generators else {}
        found |= dict.fromkeys(("num_own_encoders", "encoder_steps"), "beside encoders") if self.encoders else {}
        return found | ({} if self.noise else {"noise_on": "with noise=0"})

    def remarks(self, classifier: ZeroShotClassifier, images_BCHW: Tensor) -> tuple[str, ...]:
        """Encoders that are the classifier's own."""
        own = fingerprints(classifier)[0]
        same = [
            one
            for one, module in zip(self.encoders, self._modules(), strict=False)
            if isinstance(module, ClipTower) and fingerprints(module.classifier)[0] == own
        ]
        if not same:
            return ()
        return (f"encoder {same[0]!r} is the classifier under attack: what fools the one fools the other",)

    def check(self, classifier: ZeroShotClassifier) -> None:
        self.check_parts(classifier)
        super().check(classifier)

    def check_parts(self, classifier: ZeroShotClassifier) -> None:
        """Raise ValueError where generator or encoders are missing, or don't belong to the classifier."""
        if self.mirror is None and not (self.generators and self.encoders):
            raise ValueError(
                f"mirror is missing: fit {self.name} on labelled images, or give generators and encoders."
            )
        if self.mirror is None:
            return
        self.mirror.check(classifier)
        texts = self.captioner.of_classes(classifier.class_names)
        if self.mirror.sampler is not None and not self.generators and texts is not None:
            self.mirror.sampler.check(texts)
        then = self.mirror.about.get("calibrated", {})
        now = self._calibrated()
        other = [name for name, value in now.items() if then.get(name, value) != value]
        if other and self.threshold is not None and self.threshold == then.get("threshold"):
            told = f"{other[0]} is {now[other[0]]!r}, and the threshold was found with {then[other[0]]!r}"
            raise ValueError(f"{told}; calibrate again.")

    def _calibrated(self) -> dict[str, Any]:
        """The settings that a threshold belongs to, in JSON types."""
        names = ("fpr", "captioner", "generators", "encoders", "num_draws", "encoders_at_once", "noise", "noise_on")
        own = self.parameters()
        return {name: own[name] for name in names}

    def calibrate(
        self,
        classifier: ZeroShotClassifier,
        images_BCHW: Tensor,
        *,
        fpr: float | None = None,
        seed: int = 0,
        batch_size: int = 64,
    ) -> Self:
        found = super().calibrate(classifier, images_BCHW, fpr=fpr, seed=seed, batch_size=batch_size)
        if found.mirror is None:
            return found
        facts = {**found._calibrated(), "threshold": found.threshold, "num_images": len(images_BCHW), "seed": seed}
        about = json.loads(json.dumps({**found.mirror.about, "calibrated": facts}))
        return replace(found, mirror=replace(found.mirror, about=about))

    # ---- scores

    def scored(self, classifier: ZeroShotClassifier, images_BCHW: Tensor, seed: int, path: GradientPath) -> Prediction:
        with torch.set_grad_enabled(path != "none"):
            logits_BC = classifier(pixel_values=images_BCHW).logits
            names = list(classifier.class_names)
            named_B = logits_BC.argmax(dim=1)
            texts = self.captioner(images_BCHW.detach(), [names[i] for i in named_B.tolist()])
            every = self.captioner.of_classes(names) if path != "none" else None
            draws = torch.tensor([self._draw_of(image, seed) for image in images_BCHW.detach()])
            score_B = images_BCHW.new_zeros(len(images_BCHW), dtype=torch.float32)
            scores_BC = None if every is None else score_B.new_zeros(logits_BC.shape)
            for number in draws.unique().tolist():
                rows = (draws == number).nonzero().squeeze(1).to(images_BCHW.device)
                own = [texts[i] for i in rows.tolist()]
                asked = list(dict.fromkeys(own)) if every is None else every
                alike_BT = self._alike(images_BCHW[rows], asked, self._draw(seed, number))
                columns = torch.tensor([asked.index(text) for text in own], device=rows.device)
                score_B = score_B.index_put((rows,), -alike_BT.gather(1, columns[:, None]).squeeze(1))
                if scores_BC is not None:
                    scores_BC = scores_BC.index_put((rows,), -alike_BT)
        nowhere_B = torch.zeros(len(logits_BC), dtype=torch.bool, device=logits_BC.device)
        return Prediction(logits_BC, nowhere_B, score=score_B, class_scores=scores_BC)

    def _draw_of(self, image_CHW: Tensor, seed: int) -> int:
        """Which of the draws an image takes."""
        return 0 if self.num_draws == 1 else picture_key(image_CHW, seed, b"mirror") % self.num_draws

    def _draw(self, seed: int, number: int) -> _Draw:
        random = torch.Generator().manual_seed(text_seed(f"draw {number}", seed))
        generator = int(torch.randint(max(len(self.generators), 1), (), generator=random))
        own = int(torch.randint(2**62, (), generator=random))
        order = torch.randperm(len(self._modules()), generator=random)
        return _Draw(generator, own, tuple(sorted(order[: self.encoders_at_once].tolist())))

    def _alike(self, images_BCHW: Tensor, texts: Sequence[str], draw: _Draw) -> Tensor:
        """S of each image with each caption, (B, T)."""
        found = []
        for encoder in draw.encoders:
            embed = self._embedding(encoder, draw, images_BCHW.device)
            pictures_TD = self._embedded_pictures(embed, encoder, texts, draw, images_BCHW.device)
            found.append(F.normalize(embed(images_BCHW), dim=1) @ F.normalize(pictures_TD, dim=1).T)
        return torch.stack(found).mean(dim=0).float()

    def _modules(self) -> Sequence[nn.Module]:
        if self.encoders:
            return [encoder.module() for encoder in self.encoders]
        return () if self.mirror is None else self.mirror.modules

    def _embedding(self, encoder: int, draw: _Draw, device: torch.device) -> Any:
        """An encoder as a function of images, with its noise."""
        module = self._modules()[encoder].to(device)
        if not self.noise:
            return module
        random = torch.Generator().manual_seed(text_seed(f"noise {encoder}", draw.seed))

        def noise(shape: torch.Size) -> Tensor:
            return self.noise * torch.randn(shape, generator=random).to(device)

        if self.noise_on == "parameters":
            noisy = {name: value + noise(value.shape).to(value) for name, value in module.named_parameters()}
            return lambda pixels: torch.func.functional_call(module, noisy, (pixels,))
        state = random.get_state()

        def embed(pixels: Tensor) -> Tensor:
            random.set_state(state)
            embeds_BD = module(pixels)
            return embeds_BD + noise(embeds_BD.shape[1:])

        return embed

    def _embedded_pictures(
        self, embed: Any, encoder: int, texts: Sequence[str], draw: _Draw, device: torch.device
    ) -> Tensor:
        """(T, D), each made once for a caption and draw."""
        kept = self._cache.embeds
        keys = {text: (text, draw.generator, draw.seed, encoder, str(device)) for text in texts}
        missing = [text for text in dict.fromkeys(texts) if keys[text] not in kept]
        if missing:
            if len(kept) > LARGEST_CACHE:
                kept.clear()
            pictures = self.pictures(missing, draw.seed, draw.generator).to(device)
            with torch.no_grad():  # one by one: what is asked for beside a text must not round its embedding otherwise
                kept.update({keys[text]: embed(one[None])[0] for text, one in zip(missing, pictures, strict=True)})
        return torch.stack([kept[keys[text]] for text in texts])

    def pictures(self, texts: Sequence[str], seed: int, generator: int = 0) -> Tensor:
        """Those of captions (T, 3, S, S), each made once.

        Args:
            seed: of the generator.
            generator: which of the zoo.

        Raises ValueError for what a generator gives that is no picture in [0, 1] for each text.
        """
        if not self.generators and (self.mirror is None or self.mirror.sampler is None):
            raise ValueError(f"generators is empty and the mirror of {self.name} has none; fit it, or give some.")
        make = self.generators[generator] if self.generators else self.mirror.sampler  # type: ignore[union-attr]
        kept = self._cache.pictures
        missing = [text for text in dict.fromkeys(texts) if (text, generator, seed) not in kept]
        if missing:
            if len(kept) > LARGEST_CACHE:
                kept.clear()
            found = make(missing, seed)  # type: ignore[misc]
            if found.dim() != 4 or len(found) != len(missing):
                raise ValueError(f"generators[{generator}] gives {tuple(found.shape)} for {len(missing)} texts.")
            checked_images(found, f"generators[{generator}]")
            kept.update({(text, generator, seed): picture for text, picture in zip(missing, found, strict=True)})
        return torch.stack([kept[text, generator, seed] for text in texts])

    # ---- fitting

    def fit(
        self,
        classifier: ZeroShotClassifier,
        dataset: ImageDataset,
        *,
        clean_classifier: ZeroShotClassifier | None = None,
        batch_size: int = 64,
        processes: Processes = None,
        state_dir: str | Path | None = None,
        num_workers: int = 0,
        progress: bool = False,
    ) -> Self:
        """With the generator and the encoders that aren't given, made of one part of the images with their labels,
        and the threshold, found on the other part. All images are held in memory.

        Raises ValueError for a threshold that was chosen, images too few to tell `fpr`, a class without images, and
        captions that don't tell classes apart.
        """
        check_whole(1, batch_size=batch_size)
        if self.threshold is not None and self.mirror is None:
            raise ValueError(f"threshold={self.threshold!r} does nothing: fit finds it, by fpr; leave it out.")
        if getattr(dataset, "augment", False):
            raise ValueError("dataset.augment=True gives whole pictures; fit on replace(data, augment=False).")
        first = processes is None or processes.process_index == 0  # one process is enough, and then all have the same

        def fitted() -> tuple[Mirror | None, float | None]:
            made = self._fitted(classifier, dataset, batch_size, num_workers) if first else self
            return made.mirror, made.threshold

        mirror, threshold = everyone(together(fitted, processes), processes)[0]
        return replace(self, mirror=mirror, threshold=threshold)

    def _fitted(self, classifier: ZeroShotClassifier, dataset: ImageDataset, batch_size: int, workers: int) -> Self:
        loader = DataLoader(
            dataset,
            batch_size,
            collate_fn=collate_images,
            num_workers=workers,
            generator=torch.Generator(),  # its own, so that the global one stays as it is
        )
        batches = [(batch["pixel_values"], batch["labels"]) for batch in loader]
        images_BCHW, labels_B = (torch.cat(parts) for parts in zip(*batches, strict=True))
        order = torch.randperm(len(images_BCHW), generator=torch.Generator().manual_seed(self.fit_seed))
        held, train = order.tensor_split([round(self.held_out * len(order))])
        self.allowed(len(held))  # before encoders are trained
        side = min(self.largest_side, images_BCHW.shape[-1])
        small_BCSS, labels_N = resized(images_BCHW[train], side).clamp(0, 1), labels_B[train]
        sampler = None
        if not self.generators:
            texts = self.captioner.of_classes(classifier.class_names)
            if texts is None:
                raise ValueError(f"captioner={self.captioner!r} has free captions; give generators of such texts.")
            sampler = ClasswiseSampler.fit(small_BCSS, labels_N, texts, num_components=self.num_components)
        weights: tuple[dict[str, Tensor], ...] = ()
        if not self.encoders:
            device = classifier.device
            trained = [
                train_encoder(
                    small_BCSS.to(device), labels_N.to(device), side=side, num_steps=self.encoder_steps, seed=seed
                )
                for seed in range(self.fit_seed + 1, self.fit_seed + 1 + self.num_own_encoders)
            ]
            weights = tuple(
                {name: value.detach().cpu() for name, value in encoder.state_dict().items()} for encoder in trained
            )
        made = replace(
            self, mirror=Mirror(side, sampler, weights, fitting_record(classifier, dataset)), threshold=None
        )
        return made.calibrate(classifier, images_BCHW[held].to(classifier.device), batch_size=batch_size)


def _plain_part(part: Any) -> dict[str, Any]:
    """Captioner, generator or encoder as JSON types."""
    cls = type(part)
    own = {f.name: getattr(part, f.name) for f in fields(cls)} if hasattr(cls, "__dataclass_fields__") else {}
    plain = {name: value for name, value in own.items() if value is None or isinstance(value, str | int | float)}
    key = cls.__name__ if PARTS.get(cls.__name__) is cls else f"{cls.__module__}.{cls.__qualname__}"
    return {"class_path": key, "init_args": plain}


def _part(given: Any, name: str) -> Any:
    """A captioner, generator or encoder; of what `_plain_part` gives it is made again, without importing anything.

    Raises ValueError for an unknown class.
    """
    if not isinstance(given, Mapping):
        return given
    known = dict(PARTS)
    for base in (Captioner, Generator, ImageEncoder):
        left: list[Any] = [base]
        while left:
            cls = left.pop(0)
            left += cls.__subclasses__()
            known.setdefault(f"{cls.__module__}.{cls.__qualname__}", cls)
    key = given.get("class_path")
    if key not in known:
        raise ValueError(f"{name} has a class {key!r} that isn't known; import it first, or take {', '.join(PARTS)}.")
    return known[key](**given.get("init_args", {}))
