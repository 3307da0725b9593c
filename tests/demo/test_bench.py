"""Several visitors at the same models."""

import threading
from dataclasses import replace

import pytest
import torch
from PIL import Image
from tiny import CLASS_NAMES

from hf_robust_clip.demo.bench import Asked, Bench
from hf_robust_clip.demo.choices import Limits
from hf_robust_clip.demo.looking import Stopped


@pytest.fixture
def bench(tiny_clip) -> Bench:
    return Bench(("plain", tiny_clip(0)), ("robust", tiny_clip(1)), limits=Limits(seconds=120))


@pytest.fixture
def asked(tmp_path) -> Asked:
    levels = torch.randint(0, 256, (8, 8, 3), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    Image.fromarray(levels.numpy()).save(tmp_path / "x.png")
    return Asked(str(tmp_path / "x.png"), ", ".join(CLASS_NAMES), "a {}", "", "pgd-20", 5, 8, "none", True)


def shares(looks):
    return [seen.probabilities_C.tolist() for found in looks for seen in (found.clean, found.attacked)]


def test_both_models_look_each_with_its_own_classes_and_defence(bench, asked):
    plain, robust = bench.look(replace(asked, defence="ttc"))
    assert (plain.name, plain.defence, robust.name) == ("plain", None, "robust")
    assert robust.defence is not None and plain.clean.probabilities_C.tolist() != robust.clean.probabilities_C.tolist()


def test_two_visitors_at_once_see_what_each_would_see_alone(bench, asked):
    others = replace(asked, class_names=f"{CLASS_NAMES[2]}, {CLASS_NAMES[0]}", templates="the {}", defence="ttc")
    alone = [shares(bench.look(own)) for own in (asked, others)]
    found: dict[int, list] = {}
    start = threading.Barrier(4)

    def visit(number: int) -> None:
        start.wait()
        found[number] = shares(bench.look((asked, others)[number % 2], f"visitor {number}"))

    threads = [threading.Thread(target=visit, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(found[number] == alone[number % 2] for number in range(4))
    assert not bench._turns


def test_a_visitor_stops_his_own_turn_and_no_other(bench, asked):
    told = []

    def tell(calls: int, what: str) -> None:
        told.append(what)
        bench.stop("somebody else")
        bench.stop("him")

    slow = replace(asked, attack="square", levels=0.01)
    with pytest.raises(Stopped):
        bench.look(slow, "him", tell)
    assert len(told) == 1
    bench.stop("him")  # who has no turn any more
    bench.look(asked, "him")


def test_a_turn_that_waits_can_be_stopped(bench, asked):
    bench.begin("him")
    bench.stop("him")
    with pytest.raises(Stopped, match="after 0"):
        bench.look(asked, "him")
    bench.look(asked, "him")


def test_hundred_names_and_what_cannot_be(bench, asked):
    many = replace(asked, class_names=", ".join(f"{name} {i}" for i in range(15) for name in CLASS_NAMES))
    assert len(bench.look(many)[1].clean.probabilities_C) == 105
    for changes, told in (
        ({"defence": "os.system"}, "defence"),
        ({"levels": 65}, "radius"),
        ({"templates": "\n".join(f"{i} {{}}" for i in range(10)), "class_names": many.class_names}, "texts"),
        ({"picture": None}, "picture"),
    ):
        with pytest.raises(ValueError, match=told):
            bench.look(replace(asked, **changes))
    assert not bench._turns
