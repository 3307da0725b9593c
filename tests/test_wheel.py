"""The wheel holds the recipes: what `pip install` gives runs with no checkout around."""

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_an_installed_wheel_trains_by_a_packaged_config(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("hf_robust_clip", "recipes"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        "wheels",
        "./source",
    ]
    subprocess.run(build, cwd=tmp_path, check=True, timeout=300)
    (wheel,) = (tmp_path / "wheels").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "hf_robust_clip/recipes/configs/digits-clip/pmg_aft.yaml" in names
    assert {"hf_robust_clip/recipes/benchmark.py", "hf_robust_clip/recipes/leaderboard.yaml"} <= set(names)
    assert "hf_robust_clip/published.json" in names
    venv.create(tmp_path / "venv", with_pip=False)
    places = Path(next((tmp_path / "venv/lib").iterdir()), "site-packages")
    zipfile.ZipFile(wheel).extractall(places)
    (places / "others.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    words = ["train", "pmg_aft", "--max_steps", "2", "--max_images", "16", "--evaluation.attack", "pgd-1",
             "--evaluation.radii", "[8/255]", "--tasks", "[{dataset: digits, max_images: 8}]"]  # fmt: skip
    code = "import sys; from hf_robust_clip.cli import main; print(sys.modules['hf_robust_clip'].__file__); main()"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([tmp_path / "venv/bin/python", "-c", code, *words], cwd=tmp_path, env=environment,
                          capture_output=True, text=True, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert str(places) in done.stdout
    assert (tmp_path / "out/pmgaft/report.json").is_file()
