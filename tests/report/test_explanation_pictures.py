"""How far maps move, in figures, and the picture of them."""

import math
from dataclasses import replace

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

from hf_robust_clip.report import explanations
from hf_robust_clip.report.explanations import (
    Explanation,
    Look,
    correlation,
    explanation_figures,
    explanation_rows,
    plot_explanations,
    save_explanations,
)

NAMES = ("zero", "one", "two")


def made(model="mine", task="digits", count=2, names=NAMES, side=8, seed=0) -> Explanation:
    draw = torch.Generator().manual_seed(seed)

    def look() -> Look:
        sizes = ((side // 2, side // 2), (side // 2, side // 2), (side, side))
        maps = [torch.rand(count, *size, generator=draw) for size in sizes]
        probabilities = torch.rand(count, len(names), generator=draw).softmax(dim=1)
        return Look(torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0)), probabilities, *maps)

    labels = torch.arange(count) % len(names)
    return Explanation(model, task, "PGD-20 at L-inf eps=8/255", names, labels, (labels + 1) % 3, look(), look())


def test_correlation_is_pearsons():
    one = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[5.0, 5.0], [5.0, 5.0]], [[0.0, 1.0], [0.0, 0.0]]])
    other = torch.tensor([[[2.0, 1.0], [4.0, 3.0]], [[1.0, 2.0], [3.0, 4.0]], [[7.0, 5.0], [7.0, 7.0]]])
    found = correlation(one, other).tolist()
    assert found[0] == pytest.approx(0.6, abs=1e-12)  # of deviations -1.5 -0.5 0.5 1.5 and -0.5 -1.5 1.5 0.5: 3 / 5
    assert math.isnan(found[1])
    assert found[2] == pytest.approx(-1, abs=1e-12)
    flat = torch.full((1, 3, 3), 0.1) + 1e-8 * torch.eye(3)  # whose mean in float64 isn't its values
    assert correlation(flat, torch.rand(1, 3, 3)).isnan()
    assert correlation(one[:1], 3 * one[:1] - 2).item() == pytest.approx(1, abs=1e-12)


def test_rows_and_their_means(tmp_path):
    own = made()
    maps = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[5.0, 5.0], [5.0, 5.0]]])
    moved = torch.tensor([[[2.0, 1.0], [4.0, 3.0]], [[5.0, 5.0], [5.0, 9.0]]])
    probabilities = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]])
    clean = replace(
        own.clean, true_maps=maps, rival_maps=-maps, probabilities=probabilities, saliency=torch.full((2, 8, 8), 2.0)
    )
    attacked = replace(own.attacked, true_maps=moved, probabilities=probabilities.flip(1))
    rows = explanation_rows([replace(own, clean=clean, attacked=attacked)])
    first, second = rows.to_dict("records")
    assert (first["truth"], first["predicted_clean"], first["predicted_attacked"]) == ("zero", "zero", "two")
    assert (second["truth"], second["predicted_clean"], second["predicted_attacked"]) == ("one", "two", "zero")
    assert first["probability_clean"] == pytest.approx(0.7) and first["probability_attacked"] == pytest.approx(0.1)
    assert (first["map_change"], second["map_change"]) == (1, 1)
    assert first["map_correlation"] == pytest.approx(0.6) and math.isnan(second["map_correlation"])
    assert math.isnan(first["saliency_correlation"]) and first["mean_saliency_clean"] == 2
    assert (first["rival"], second["rival"]) == ("one", "two") and first["rival_correlation"] == pytest.approx(-1)
    ((task, model, count, *means),) = explanation_figures(rows).rows
    assert (task, model, count) == ("digits", "mine", "2") and means[:5] == ["0.6", "1", "-1", "-", "2"]
    save_explanations(tmp_path / "explanations.csv", rows)
    head, line, *_ = (tmp_path / "explanations.csv").read_text().splitlines()
    assert head.startswith("task,model,attack,image,truth,") and ",," in line


@pytest.fixture
def figures(monkeypatch) -> list:
    """The figures that would be written, so far."""
    found = []
    monkeypatch.setattr(explanations, "write_figure", lambda figure, path: found.append(figure))
    return found


def check_texts(figure) -> list[str]:
    """Every text lies within the picture, over no other and over none of the pictures."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    (axis,) = figure.axes
    pictures = [image.get_window_extent(renderer) for image in axis.images]
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in axis.texts]
    for i, (name, box) in enumerate(boxes):
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1, name
        assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1, name
        assert not any(box.overlaps(other) for _, other in boxes[:i]), name
        assert not any(box.overlaps(picture) for picture in pictures), name
    return [name for name, _ in boxes]


@pytest.mark.parametrize(
    "names", [NAMES, ("American pit bull terrier", "a $x$ b", "WWWWWWWWW")], ids=["short", "long"]
)
def test_the_picture_has_a_line_for_each_image_and_model(names, figures):
    pair = [made("undefended", names=names), made("PMG-AFT of a model with a long name", names=names, seed=1)]
    plot_explanations("e.png", pair)
    told = check_texts(figures[0])
    assert "digits, clean" in told and "attacked: PGD-20 at L-inf eps=8/255" in told
    images = figures[0].axes[0].images
    assert len(images) == 2 * 2 * 8
    second = images[8:16]  # the first image by the second model
    maps = (*second[1:3], *second[5:7])
    assert len({own.get_clim() for own in maps}) == 1
    assert min(own.get_array().min() for own in maps) == maps[0].get_clim()[0]
    for own, values in (
        (second[0], pair[1].clean.images[0].permute(1, 2, 0)),
        (second[1], pair[1].clean.true_maps[0]),
        (second[6], pair[1].attacked.rival_maps[0]),
        (second[7], pair[1].attacked.saliency[0]),
    ):
        torch.testing.assert_close(torch.tensor(own.get_array()), values)
    plot_explanations("more.png", [made(count=12)])
    assert len(figures[1].axes[0].images) == 8 * 8
    assert figures[1].get_figwidth() == figures[0].get_figwidth()


def test_patches_lie_where_they_are_in_the_image(figures):
    plot_explanations("e.png", [replace(made(), map_share=0.75)])
    picture, patches = (image.get_extent() for image in figures[0].axes[0].images[:2])
    assert patches[1] - patches[0] == pytest.approx(0.75 * (picture[1] - picture[0]))
    assert patches[2] - patches[3] == pytest.approx(0.75 * (picture[2] - picture[3])) and patches[3] == picture[3]


def test_a_single_patch_and_a_grey_image(figures):
    own = made(side=2)
    grey = replace(own.clean, images=own.clean.images[:, :1])
    plot_explanations("e.png", [replace(own, clean=grey)])
    shapes = [image.get_array().shape for image in figures[0].axes[0].images[:4]]
    assert shapes == [(2, 2), (1, 1), (1, 1), (2, 2)]
    assert explanation_rows([own])[["map_correlation", "rival_correlation"]].isna().all(axis=None)


def test_what_belongs_to_no_one_picture_is_refused(tmp_path):
    shifted = made("other")
    shifted = replace(shifted, clean=replace(shifted.clean, images=1 - shifted.clean.images))
    for wrong in ([], [made(), made()], [made(), made("other", task="pets")], [made(), shifted]):
        with pytest.raises(ValueError, match="explanations"):
            plot_explanations(tmp_path / "e.png", wrong)
    assert not list(tmp_path.iterdir())
