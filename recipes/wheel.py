"""Puts the recipes and their configs into the wheel, as `hf_robust_clip/recipes`; setuptools calls it."""

import shutil
from pathlib import Path

from setuptools.command.build_py import build_py


class WithRecipes(build_py):
    """Builds the package, and beside it what lies in this folder."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:  # which finds them in the checkout
            here = Path(__file__).parent
            target = Path(self.build_lib) / "hf_robust_clip" / here.name
            ignored = shutil.ignore_patterns("__pycache__", Path(__file__).name)
            shutil.copytree(here, target, ignore=ignored, dirs_exist_ok=True)
