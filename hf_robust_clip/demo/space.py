"""A folder that runs as a Gradio Space: the page, the package, models that others don't have, and requirements.

A Space installs its requirements before its own files are there, so the package can't be among them: it lies beside
`app.py`, with its metadata.
"""

from __future__ import annotations

import platform
import shutil
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import SpaceCard, SpaceCardData
from packaging.requirements import Requirement
from packaging.version import Version

from ..hub import check_folder, dump_recipe, files_to_push
from ..hub import published as published_file
from ..names import hub_name, is_path, last_part, paths_in
from ..storage import write_text, written_whole

if TYPE_CHECKING:
    from .command import Demo

PACKAGE = "hf_robust_clip"
SETTINGS = "demo.yaml"
OURS = ("app.py", SETTINGS, "README.md", "requirements.txt")
FOLDERS = ("models", PACKAGE)
OF_MODELS = {"model_name_or_path": "robust", "reference": "undefended"}
OF_THIS_RUN = ("export_space", "overwrite", "host", "port", "share")

APP = '''\
"""What does CLIP see? A page of hf_robust_clip: pictures before an undefended and a robust model, attacked."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from hf_robust_clip.demo.command import open_page  # noqa: E402

page = open_page(
    {words}
)
demo = page.blocks

if __name__ == "__main__":
    page.serve()
'''

README = """
Upload a picture, name some classes, and attack an undefended CLIP and a robust one: what each sees before and after,
the attacked picture, what was changed, and where each model looks. One picture is no measurement.

`app.py` is the page, `demo.yaml` its settings, `hf_robust_clip/` the library that it is made with{models}.
To try it elsewhere: `pip install -r requirements.txt`, then `python app.py`.
"""

REQUIREMENTS = """\
# what the page was tried with; on a machine without a GPU the CPU build of torch is smaller:
# --extra-index-url https://download.pytorch.org/whl/cpu
"""


def export_space(run: Demo) -> None:
    """Write the folder of a Space.

    Models in folders are copied as a push would upload them. Raises OSError for a folder that holds something else,
    ValueError for settings that need files which a Space doesn't have, a model that others couldn't load (see
    `hub.check_folder`), and a package that isn't installed.
    """
    folder = Path(str(run.about.export_space))
    check_room(folder, run.about.overwrite)
    copied = {name: Path(path) for name, path in models_of(run).items() if hub_name(path) is None}
    for path in copied.values():
        check_folder(path)
    places = {name: f"models/{OF_MODELS[name]}/{last_part(str(path.resolve()))}" for name, path in copied.items()}
    settings = dump_recipe(settings_of(run.source, copied))
    if told := paths_in(settings):
        raise ValueError(f"the settings name {told[0]!r}, which a Space doesn't have; push it to the Hub first.")
    needed = requirements()
    with written_whole(folder, "app.py") as draft:
        write_text(draft / "app.py", APP.format(words=_words(places)))
        write_text(draft / SETTINGS, settings)
        write_text(draft / "requirements.txt", REQUIREMENTS + "".join(f"{line}\n" for line in needed))
        write_text(draft / "README.md", str(card(run, places)))
        for name, path in copied.items():
            copy_published(path, draft / places[name])
        ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
        shutil.copytree(Path(__file__).parents[1], draft / PACKAGE, ignore=ignored)
        metadata = draft / f"{PACKAGE}-{version(PACKAGE)}.dist-info" / "METADATA"
        metadata.parent.mkdir()
        write_text(metadata, distribution(PACKAGE).read_text("METADATA") or "")
        if run.about.overwrite:
            for name in FOLDERS:
                shutil.rmtree(folder / name, ignore_errors=True)


def check_room(folder: Path, overwrite: bool) -> None:
    """Raise OSError for a file, and a folder that holds something else than a Space that is to be replaced."""
    if folder.exists() and not folder.is_dir():
        raise OSError(f"export_space={str(folder)!r} is a file; name a folder.")
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if there and not (overwrite and set(OURS) <= there):
        mend = "name another folder" if overwrite else "add --overwrite if it is such a Space, or name another folder"
        raise OSError(f"export_space={str(folder)!r} is not empty; {mend}.")


def models_of(run: Demo) -> dict[str, str]:
    """The models by the setting that names them."""
    named = {"model_name_or_path": run.model.model_name_or_path}
    return named if run.about.reference is None else {**named, "reference": run.about.reference}


def settings_of(source: Mapping[str, Any], copied: Mapping[str, Path]) -> dict[str, Any]:
    """The settings of a page without those of this run and without models that are copied.

    Raises ValueError for pictures in a folder, and a defence that isn't the package's.
    """
    found = {name: value for name, value in source.items() if name not in (*OF_THIS_RUN, *copied)}
    for name in ("dataset_name", "data_root", "class_names"):
        value = found.get(name)
        if isinstance(value, str) and (name == "data_root" or is_path(value)):
            raise ValueError(f"{name}={value!r} is on this disk, not in a Space; push it to the Hub first.")
    defence = found.get("defence")
    path = defence.get("class_path", "") if isinstance(defence, Mapping) else ""
    if path and not path.startswith(f"{PACKAGE}."):
        raise ValueError(f"defence={path!r} is not of this package, and wouldn't be in the Space.")
    return found


def _words(places: Mapping[str, str]) -> str:
    """The flags of the page, as Python."""
    words = [f'"--config", str(HERE / "{SETTINGS}")']
    words += [f'"--{name}", str(HERE / "{place}")' for name, place in places.items()]
    lines = "".join(f"\n        {word}," for word in words)
    return f"[{lines}\n    ]"


def copy_published(source: Path, target: Path) -> None:
    """Copy of a model's folder what a push would upload, as it would."""
    for file in files_to_push(source):
        if file.startswith(("state/", "checkpoint-")):
            continue
        content = published_file(source, file)
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        (target / file).write_bytes(content if isinstance(content, bytes) else content.read_bytes())


def requirements() -> list[str]:
    """What the package and the page need, in the versions that are installed here.

    Raises ValueError for what isn't installed.
    """
    try:
        told = [Requirement(line) for line in distribution(PACKAGE).requires or []]
        names = [own.name for own in told if own.marker is None or own.marker.evaluate({"extra": ""})]
        return [f"{name}=={Version(version(name)).public}" for name in sorted({*names, "gradio"}, key=str.lower)]
    except PackageNotFoundError as error:
        raise ValueError(f"{error.name} is not installed, whose version a Space names; install it first.") from None


def card(run: Demo, places: Mapping[str, str]) -> SpaceCard:
    """The Space's README with its metadata."""
    named = [hub_name(path) for path in models_of(run).values()]
    data = SpaceCardData(
        title="What does CLIP see?",
        emoji="🔍",
        colorFrom="blue",
        colorTo="red",
        sdk="gradio",
        sdk_version=version("gradio"),
        python_version=".".join(platform.python_version_tuple()[:2]),
        app_file="app.py",
        pinned=False,
        license=None if places else "apache-2.0",
        models=[name for name in named if name is not None and "/" in name] or None,
        tags=["adversarial-robustness", "clip", "zero-shot-image-classification"],
    )
    own = ", `models/` the models" if places else ""
    return SpaceCard(f"---\n{data.to_yaml()}\n---\n\n# What does CLIP see?\n{README.format(models=own)}")
