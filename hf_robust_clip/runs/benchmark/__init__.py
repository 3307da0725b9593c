"""Models that are trained, evaluations of all of them, tables, plots and cards: `recipes/benchmark.py`."""

from .run import run
from .settings import Benchmark, Evaluation, Model

__all__ = ["Benchmark", "Evaluation", "Model", "run"]
