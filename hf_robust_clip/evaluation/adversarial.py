"""What attacks make of images, kept while an evaluation runs and saved as a folder that `datasets` reads."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from ..checks import check_choice
from ..defences.base import Defence
from ..digests import digest, file_digest
from ..prediction import Predict, Prediction, withstood
from ..report import Measurement, RobustnessReport
from ..report.adversarial import SavedSplit, make_adversarial_card
from ..report.report import as_saved
from ..storage import delete, disk_errors, written_whole
from ..threat_model import ThreatModel
from ..zero_shot_data.adversarial import IMAGE, PIXELS, PixelFormat, columns
from ..zero_shot_data.licences import licence_of

LARGEST_FILE = 2**28  # bytes of pixels in one parquet file
AT_ONCE = 64  # pictures in memory, and in a group of a file
OURS = re.compile(r"README\.md|data/\w+-\d{5}-of-\d{5}-[0-9a-f]{16}\.parquet")


@dataclass(frozen=True)
class SaveAdversarial:
    """Where adversarial pictures are saved, and how.

    Args:
        folder: of one evaluation; pictures of another one that lie in it are replaced.
        pixels: `"uint8"`, PNGs; `"float16"` or `"float32"`, arrays. float32 is what attacks compute in. The others
            are rounded to the nearest value they can hold that lies in the ball, else towards the clean image; away
            from it where that undoes an attack.
    """

    folder: str | Path
    pixels: PixelFormat = "uint8"

    def __post_init__(self) -> None:
        check_choice(PixelFormat, pixels=self.pixels)


class SavedImage(NamedTuple):
    """What is known of one saved picture.

    Args:
        file: digest of the file that holds it.
        place: in that file.
        named: index of the class that was predicted of the unrounded picture.
        named_as_saved: of the picture as it is saved.
        right_as_saved: whether the verdict on the picture as it is saved is right.
        flagged: whether it raises an alarm as it is saved.
    """

    file: str
    place: int
    named: int
    named_as_saved: int
    right_as_saved: bool
    flagged: bool


Saved = Mapping[tuple[int, int], SavedImage]  # by stage and image


def check_saving(defence: Defence, dataset_id: str) -> None:
    """Raise ValueError for pictures that must not be saved, or that would mean something else when read again."""
    if not defence.traits.episodic or defence.traits.couples_images:
        raise ValueError(
            f"save_adversarial: {defence.name} judges an image by those before or beside it; saved ones, read again, "
            "would have other figures."
        )
    licence = licence_of(dataset_id)
    if licence.forbids_copies:
        raise ValueError(f"save_adversarial: the terms of {dataset_id!r} forbid passing pictures on; leave it out.")


# ---- rounding


def rounded(
    adv_BCHW: Tensor,
    images_BCHW: Tensor,
    threat_model: ThreatModel,
    pixels: PixelFormat,
    *,
    away: bool = False,
) -> Tensor:
    """Adversarial images (B, 3, H, W) as a format can hold them, in float32, still in the ball.

    Each value is rounded to the nearest that the format holds, or with `away` to the next one away from the clean
    image; where this leaves the ball, to the next one towards the clean image, so that |x' - x| only shrinks. Of an L2
    ball, as few values of an image as it takes are rounded so: those whose other neighbour would add most to its
    length.

    Raises ValueError where even that leaves the ball, since the clean image itself can't be held closely enough.
    """
    adv_BCHW, images_BCHW = adv_BCHW.float(), images_BCHW.float()
    if pixels == "float32":
        return adv_BCHW
    codes = _encoded(adv_BCHW, pixels)
    nearest = _decoded(codes, pixels)
    past, change = nearest - adv_BCHW, (adv_BCHW - images_BCHW).sign().to(codes.dtype)
    rounded_by = torch.where(past.abs() > 1e-7, past.sign().to(codes.dtype), 0)
    inner = _decoded(codes - change * (rounded_by == change), pixels)
    outer = _decoded(codes + change * (rounded_by == -change), pixels) if away else nearest
    if threat_model.norm == "linf":
        found = inner
        for closer in (nearest, outer):
            found = torch.where((closer - images_BCHW).abs() <= threat_model.reach, closer, found)
    else:
        fits = _fit_into_length(outer - images_BCHW, inner - images_BCHW, threat_model.reach)
        found = torch.where(fits, outer, inner)
    if not bool(threat_model.contains(found, images_BCHW).all()):
        furthest = float(threat_model.distance(found, images_BCHW).amax())
        raise ValueError(
            f"save_adversarial={pixels!r} can't hold images within {threat_model} (rounding moves one by "
            f"{furthest:.4g}); take float32."
        )
    return found


def _fit_into_length(outer_BCHW: Tensor, inner_BCHW: Tensor, length: float) -> Tensor:
    """Where an image's change may be the outer one, of values that are never smaller than the inner, so that its L2
    length stays within a limit: the values that add least to it first, (B, C, H, W).
    """
    outer_BN, inner_BN = (change.double().flatten(1).square() for change in (outer_BCHW, inner_BCHW))
    added_BN, order_BN = (outer_BN - inner_BN).clamp_min(0).sort(dim=1)
    fits_BN = added_BN.cumsum(dim=1) <= length**2 - inner_BN.sum(dim=1, keepdim=True)
    return torch.zeros_like(fits_BN).scatter(1, order_BN, fits_BN).view_as(outer_BCHW)


def _encoded(values: Tensor, pixels: PixelFormat) -> Tensor:
    """The nearest value of a format as a whole number, in the order of the values."""
    if pixels == "uint8":
        return (values * 255).round().to(torch.int16)
    return values.half().view(torch.int16)  # none is negative


def _decoded(codes: Tensor, pixels: PixelFormat) -> Tensor:
    return codes.float() / 255 if pixels == "uint8" else codes.view(torch.float16).float()


def _as_bytes(image_CHW: Tensor, pixels: PixelFormat) -> bytes:
    if pixels != "uint8":
        return image_CHW.numpy().astype(pixels).tobytes()
    levels_HWC = (image_CHW * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    content = io.BytesIO()
    Image.fromarray(levels_HWC).save(content, format="PNG")
    return content.getvalue()


# ---- while the evaluation runs


class AdversarialLog:
    """Writes down, batch by batch, the pictures that figures will need: those that fell, at the attack that they fell
    to, and those that stand after the last attack at a radius. A line of state names their file, which is there first.

    Args:
        folder: of the state.
        pixels: how they are saved.
        threat_models: of the stages in their order, the clean one left out.
    """

    def __init__(self, folder: Path, pixels: PixelFormat, threat_models: Sequence[ThreatModel]):
        self.folder, self.pixels, self.threat_models = folder, pixels, threat_models

    def check(self, images_BCHW: Tensor) -> None:
        """Raise ValueError where a random point of any of the balls can't be held by the format."""
        for threat_model in dict.fromkeys(self.threat_models):
            rounded(threat_model.start(images_BCHW, 0), images_BCHW, threat_model, self.pixels)
        rounded(images_BCHW, images_BCHW, self.threat_models[0], self.pixels)

    def keep(
        self,
        stage: int,
        index: Sequence[int],
        images_BCHW: Tensor,
        labels_B: Tensor,
        adv_BCHW: Tensor,
        prediction: Prediction,
        rows: Sequence[int],
        predict: Predict,
    ) -> dict[str, Any]:
        """What the state notes of some rows of a batch, whose pictures are written down.

        Args:
            stage: 0 for clean.
            index: of each image of the batch in its dataset.
            images_BCHW, labels_B: clean.
            adv_BCHW, prediction: as the attack left them, and what was predicted of them.
            rows: which of them to keep.
            predict: what decides.
        """
        if not rows:
            return {"file": None, "rows": []}
        attacked, chosen = stage > 0, torch.tensor(rows, device=adv_BCHW.device)
        fell = ~prediction.right(labels_B, attacked=attacked)[chosen] & attacked
        saved = self._saved(stage, adv_BCHW[chosen], images_BCHW[chosen], labels_B[chosen], fell, predict)
        named = prediction.logits[chosen].argmax(dim=1)
        with torch.no_grad():
            again = predict(saved)
        right = again.right(labels_B[chosen], attacked=attacked)
        flagged = torch.zeros_like(right) if again.flagged is None else again.flagged
        told = zip(named.tolist(), again.logits.argmax(dim=1).tolist(), right.tolist(), flagged.tolist(), strict=True)
        file = self._write([_as_bytes(image, self.pixels) for image in saved.cpu()])
        return {"file": file, "rows": [(index[row], *own) for row, own in zip(rows, told, strict=True)]}

    def _saved(
        self,
        stage: int,
        adv_BCHW: Tensor,
        images_BCHW: Tensor,
        labels_B: Tensor,
        fell_B: Tensor,
        predict: Predict,
    ) -> Tensor:
        """Rounded images; away from the clean ones where the nearest values undo what an image fell to, and these
        don't.
        """
        threat_model = self.threat_models[max(0, stage - 1)]
        saved = rounded(adv_BCHW, images_BCHW, threat_model, self.pixels)
        rows = fell_B.nonzero().squeeze(1) if self.pixels != "float32" else fell_B[:0]
        rows = rows[withstood(predict, saved[rows], labels_B[rows])] if len(rows) else rows
        if len(rows):
            others = rounded(adv_BCHW[rows], images_BCHW[rows], threat_model, self.pixels, away=True)
            fell = ~withstood(predict, others, labels_B[rows])
            saved[rows[fell]] = others[fell]
        return saved

    def _write(self, pictures: Sequence[bytes]) -> str:
        """The digest of a file that holds them, which is its name."""
        table = pa.table({"picture": pa.array(pictures, pa.large_binary())})
        with disk_errors(self.folder, "state_dir"):
            self.folder.mkdir(parents=True, exist_ok=True)
            draft = self.folder / f"pictures-{id(self)}.part"
            with pa.OSFile(str(draft), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
                writer.write_table(table)
            found = file_digest(draft)
            draft.replace(pictures_file(self.folder, found))
        return found


def pictures_file(folder: Path, file: str) -> Path:
    """Where pictures lie of which a line of state tells the digest."""
    return folder / f"pictures-{file}.arrow"


def has_pictures(folder: Path, line: Mapping[str, Any]) -> bool:
    """Whether the pictures of a line are there as they were written; of a line without any nothing is missing."""
    file = (line.get("saved") or {}).get("file")
    return file is None or (pictures_file(folder, file).is_file() and file_digest(pictures_file(folder, file)) == file)


# ---- afterwards


@dataclass(frozen=True)
class Kept:
    """What an evaluation kept of its images.

    Args:
        withstood: of each image how many stages it withstood before the first that it didn't, clean being the first.
        labels: of each image.
        saved: of each picture.
        stages: (threat model, attack, view) of stages 1, 2, ...
        pixels: how they are saved.
    """

    withstood: Mapping[int, int]
    labels: Mapping[int, int]
    saved: Saved
    stages: Sequence[tuple[ThreatModel, str, str]]
    pixels: PixelFormat

    def last_stages(self) -> dict[ThreatModel, int]:
        """By ball the number of the last attack in it."""
        return {threat_model: number for number, (threat_model, _, _) in enumerate(self.stages, start=1)}

    def at(self, last: int) -> list[tuple[int, int]]:
        """(stage, image) of the picture that stands for each image after a stage: that which it fell to, or the last;
        in the order of the images.
        """
        return [(min(count, last), index) for index, count in sorted(self.withstood.items())]

    def measurements(self) -> tuple[Measurement, ...]:
        """At each radius the share of pictures that are right as they are saved."""
        found = []
        for threat_model, last in self.last_stages().items():
            right = [self.saved[key].right_as_saved for key in self.at(last)]
            found.append(Measurement(as_saved(self.pixels), sum(right) / len(right), len(right), threat_model.eps))
        return tuple(found)


def split_name(threat_model: ThreatModel) -> str:
    """What a radius is called as a split: `linf_4_255`, `l2_0p5`."""
    levels = round(threat_model.eps * 255)
    exact = threat_model.norm == "linf" and levels / 255 == threat_model.eps
    text = f"{levels}_255" if exact else repr(threat_model.eps).replace(".", "p").replace("-", "m")
    return f"{threat_model.norm}_{text}"


def save_adversarial(
    where: SaveAdversarial,
    kept: Kept,
    state: Path,
    report: RobustnessReport,
    dataset: Any,
    *,
    normalisation: tuple[list[float], list[float]] | None = None,
) -> None:
    """Write the pictures of an evaluation as a folder that `load_dataset` reads: a split for each radius, with a row
    for each image in the order of the dataset, in parquet files, and a card, which comes last.

    Args:
        state: the folder of the state.
        dataset: the clean images.
        normalisation: mean and std of a plain `CLIPModel`, of which the card says how others predict without us.

    Raises ValueError if the pictures don't add up to the report's figures, or lie on another machine; NotWritten where
    the disk is full.
    """
    folder, pixels = Path(where.folder), where.pixels
    features = columns(pixels, report.class_names, report.attack_resolution, detects=_detects(report))
    splits = []
    with written_whole(folder, last="README.md") as draft:
        (draft / "data").mkdir()
        for threat_model, last in kept.last_stages().items():
            keys, eps = kept.at(last), threat_model.eps
            stand = sum(kept.withstood[index] > last for _, index in keys)
            if stand != round(report.robust_accuracy[eps] * len(keys)) or len(keys) != report.num_images:
                raise ValueError(f"save_adversarial: {stand} of {len(keys)} pictures stand, not what {eps:g} says.")
            split = split_name(threat_model)
            table = _Table(kept, state, features, report, dataset)
            size = 3 * report.attack_resolution**2 * np.dtype(pixels).itemsize
            chunks = [keys[i : i + AT_ONCE] for i in range(0, len(keys), AT_ONCE)]
            files = _write_split(draft / "data", split, chunks, table, max(1, LARGEST_FILE // (size * AT_ONCE)))
            wrong = sum(stage == 0 for stage, _ in keys)
            right = sum(kept.saved[key].right_as_saved for key in keys)
            splits.append(SavedSplit(split, files, threat_model.radius, len(keys), stand, right, wrong))
        licence = licence_of(report.dataset)
        card = make_adversarial_card(report, str(folder), pixels, splits, licence, normalisation=normalisation)
        (draft / "README.md").write_text(card, encoding="utf-8")
        clear_adversarial(folder)


def clear_adversarial(folder: str | Path) -> None:
    """Delete saved pictures and their card, by their files' names."""
    (Path(folder) / "README.md").unlink(missing_ok=True)  # first: without it the folder isn't whole
    delete(Path(folder).resolve(), OURS.fullmatch)


def _detects(report: RobustnessReport) -> bool:
    return any(row.metric.startswith("detection") for row in report.measurements)


def _write_split(
    folder: Path, split: str, chunks: Sequence[Sequence[tuple[int, int]]], table: _Table, per_file: int
) -> str:
    """Parquet files with the rows of some keys, so many chunks in each; returns the pattern of their names, which have
    a digest of what they hold: `datasets` keeps what it read under the folder's own name and these patterns, and would
    give the rows of another folder of that name.
    """
    parts = [chunks[i : i + per_file] for i in range(0, len(chunks), per_file)]
    paths = [folder / f"{split}-{number:05d}-of-{len(parts):05d}" for number in range(len(parts))]
    for path, part in zip(paths, parts, strict=True):
        with pq.ParquetWriter(path, table.features.arrow_schema) as writer:
            for keys in part:
                writer.write_table(table.rows(keys).cast(table.features.arrow_schema))
    found = digest("".join(map(file_digest, paths)).encode())
    for path in paths:
        path.replace(folder / f"{path.name}-{found}.parquet")
    return f"data/{split}-*-{found}.parquet"


class _Table:
    """Rows of saved pictures."""

    def __init__(self, kept: Kept, state: Path, features: datasets.Features, report: RobustnessReport, dataset: Any):
        self.kept, self.state, self.features, self.report, self.dataset = kept, state, features, report, dataset
        self.shape = (3, report.attack_resolution, report.attack_resolution)

    def rows(self, keys: Sequence[tuple[int, int]]) -> pa.Table:
        """Those of some pictures, by stage and image."""
        files = {self.kept.saved[key].file for key in keys}
        pictures = {file: _read_pictures(self.state, file) for file in files}
        rows = [self._row(stage, index, pictures) for stage, index in keys]
        held = {name: [row[name] for row in rows] for name in self.features}
        return datasets.Dataset.from_dict(held, features=self.features).with_format("arrow")[:]

    def _row(self, stage: int, index: int, pictures: Mapping[str, pa.Array]) -> dict[str, Any]:
        own, clean = self.kept.saved[stage, index], self.kept.saved.get((0, index))
        threat_model, attack, view = self.kept.stages[stage - 1] if stage else (None, "none", "none")
        label = self.kept.labels[index]
        content = pictures[own.file][own.place].as_py()
        return {
            IMAGE: {"bytes": content, "path": None},
            PIXELS: None if self.kept.pixels == "uint8" else self._array(content),
            "label": label,
            "clean_label": label if clean is None else clean.named,
            "attacked_label": own.named_as_saved,
            "withstood": self.kept.withstood[index] > stage,
            "withstood_as_saved": own.right_as_saved,
            "view": view,
            "attack": attack,
            "radius": threat_model.eps if threat_model else 0.0,
            "row": self.dataset.source_row(index) if hasattr(self.dataset, "source_row") else index,
            "seed": self.report.seed,
            "flagged": own.flagged,
        }

    def _array(self, content: bytes) -> np.ndarray:
        return np.frombuffer(content, dtype=self.kept.pixels).reshape(self.shape)


def _read_pictures(state: Path, file: str) -> pa.ChunkedArray:
    path = pictures_file(state, file)
    if not path.is_file():
        raise ValueError(f"save_adversarial: {path.name} isn't in {str(state)!r}; processes must share this folder.")
    with pa.memory_map(str(path)) as source:
        return pa.ipc.open_file(source).read_all()["picture"]
