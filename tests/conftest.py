"""Fixtures: a CLIP small enough that a whole attack takes milliseconds."""

import copy
import functools
import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from tiny import CLASS_NAMES, make_clip, make_processor

from hf_robust_clip.modeling import CLIPForZeroShotClassification

torch.set_num_threads(1)
TESTS = Path(__file__).parent
for folder in (TESTS.parent, TESTS / "support"):  # for scripts that tests start
    os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])


def pytest_collection_finish() -> None:
    """What was imported stays to the end: to look through it for garbage again and again takes a tenth of the time."""
    gc.collect()
    gc.freeze()


@contextmanager
def through_transformers_adapters() -> Iterator[None]:
    """For what a test does by transformers' own adapter methods; where these ask for a PEFT newer than the installed
    one, as those of transformers 5.24 do, the test is skipped.
    """
    try:
        yield
    except ValueError as error:
        if str(error).startswith("The version of PEFT you are using is not compatible, please use a version >="):
            pytest.skip(f"transformers: {error}")
        raise


@pytest.fixture(autouse=True)
def bfloat16_where_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """On any processor a test gets the precision that it asks for."""
    for module in ("evaluation.settings", "training.config"):
        monkeypatch.setattr(f"hf_robust_clip.{module}.multiplies_bfloat16", lambda device: True)


@functools.cache
def _classifier(seed: int, dtype: torch.dtype) -> CLIPForZeroShotClassification:
    processor = make_processor()
    model = CLIPForZeroShotClassification.from_clip(make_clip(processor, seed).to(dtype), processor).eval()
    for parameter in (*model.text_parameters(), model.logit_scale):
        parameter.requires_grad_(False)
    return model


@pytest.fixture
def tiny_clip() -> Callable[..., CLIPForZeroShotClassification]:
    """Makes a random 8-pixel classifier of seven names: frozen text tower, eval mode, float64 unless told."""

    def make(
        seed: int = 0, dtype: torch.dtype = torch.float64, class_names: tuple[str, ...] | None = CLASS_NAMES
    ) -> CLIPForZeroShotClassification:
        model = copy.deepcopy(_classifier(seed, dtype))
        if class_names is not None:
            model.set_classes(class_names)
        return model

    return make


@pytest.fixture
def tiny_batch() -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """Makes distinct random images in [0, 1], some values exactly 0 or 1, and labels of the seven classes."""

    def make(size: int = 5, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        images = (1.2 * torch.rand(size, 3, 8, 8, generator=generator, dtype=dtype) - 0.1).clamp(0, 1)
        return images, torch.randint(0, len(CLASS_NAMES), (size,), generator=generator)

    return make


@pytest.fixture
def fresh_accelerate(monkeypatch, tmp_path):
    """An empty working folder, and no choice of precision and device: these are made once per process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
