"""Flags of `hf-robust-clip demo`, and what they load."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from PIL import Image

from hf_robust_clip.cli import main
from hf_robust_clip.defences.rfi import RFI
from hf_robust_clip.defences.ttc import TTC
from hf_robust_clip.demo import space
from hf_robust_clip.demo.command import prepare, read, with_fitted
from hf_robust_clip.demo.space import check_room, models_of, settings_of

EMBEDDED = ("--model_name_or_path", "digits-clip")


@pytest.mark.parametrize(
    ("words", "told"),
    [(("--radius", "70/255"), "most_levels"), (("--port", "0"), "port"), (("--most_levels", "0"), "most_levels"),
     (("--examples", "-1"), "examples"), (("--limits.classes", "1"), "classes"),
     (("--limits.seconds", "0"), "seconds"),
     (("--template", "no braces"), "template"), (("--reference", ""), "reference"), (("--overwrite",), "overwrite"),
     (("--export_space", "x", "--share"), "share"), (("--export_space", "x", "--port", "80"), "port"),
     (("--use_peft",), "use_peft"), (("--defence", "Nonsense"), "defence"), (("--radius", "two"), "radius")],
)  # fmt: skip
def test_flags_that_cannot_be(words, told):
    with pytest.raises(ValueError, match=told):
        read([*EMBEDDED, *words])


def test_a_page_without_flags_is_of_the_embedded_model_and_data():
    prepared = prepare(read([]))
    assert prepared.bench.undefended[1] is prepared.bench.robust[1]
    assert prepared.bench.undefended[0] == "digits-clip" and prepared.levels == 4
    examples = prepared.examples
    assert len(examples.pictures) == len(examples.labels) == 20 and len(examples.class_names) == 10
    assert {examples.labels.count(name) for name in examples.class_names} == {2}
    assert all(isinstance(own, Image.Image) and own.size == (8, 8) for own in examples.pictures)
    assert all("{}" in template for template in prepared.templates)


def test_what_was_asked_for_comes_first():
    words = ["--defence", "TTC", "--defence.num_steps", "3", "--radius", "24/255", "--examples", "3"]
    run = read([*EMBEDDED, *words, "--template", "the {}"])
    prepared = prepare(run)
    assert prepared.levels == 24 and prepared.templates == ("the {}",) and len(prepared.examples.pictures) == 3
    first = prepared.bench.defences[prepared.defence]
    assert isinstance(first, TTC) and first.num_steps == 3


def test_a_defence_that_learns_needs_what_it_learned():
    assert with_fitted(TTC(), None, "m") == TTC()
    with pytest.raises(OSError, match="'m'"):
        with_fitted(RFI(), None, "m")


def test_without_gradio_the_command_says_how_to_get_it(capsys):
    if find_spec("gradio") is not None:
        pytest.skip("gradio is installed")
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    needed = re.search(r'^demo = \["(.*)"\]', project, re.MULTILINE)[1]
    with pytest.raises(SystemExit) as ended:
        main(["demo", *EMBEDDED])
    assert ended.value.code == 2 and f"pip install '{needed}'" in capsys.readouterr().err


def test_a_wrong_folder_of_a_space_is_told_before_what_is_not_installed(tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as ended:
        main(["demo", *EMBEDDED, "--export_space", str(tmp_path / "file")])
    assert ended.value.code == 2 and "export_space" in capsys.readouterr().err


def test_a_space_takes_no_place_that_holds_something_else(tmp_path):
    check_room(tmp_path / "new", overwrite=False)
    (tmp_path / "app.py").touch()
    for overwrite in (False, True):
        with pytest.raises(OSError, match="export_space"):
            check_room(tmp_path, overwrite)
    for name in space.OURS:
        (tmp_path / name).touch()
    check_room(tmp_path, overwrite=True)
    with pytest.raises(OSError, match="export_space"):
        check_room(tmp_path / "app.py", overwrite=True)


def test_a_space_is_refused_what_it_would_not_have(tmp_path):
    run = read([*EMBEDDED, "--reference", "digits-clip", "--export_space", str(tmp_path / "s"), "--radius", "8/255"])
    assert models_of(run) == {"model_name_or_path": "digits-clip", "reference": "digits-clip"}
    kept = settings_of(run.source, {})
    assert kept == {"model_name_or_path": "digits-clip", "reference": "digits-clip", "radius": "8/255"}
    for source in ({"dataset_name": str(tmp_path)}, {"data_root": "data"}, {"defence": {"class_path": "mine.Own"}}):
        (name,) = source
        with pytest.raises(ValueError, match=name):
            settings_of(source, {})


def test_a_space_is_written_whole_and_opens(tmp_path):
    """Its own requirements in a new environment are tried by hand: that takes minutes."""
    pytest.importorskip("gradio", reason="the page needs gradio")
    folder = tmp_path / "space"
    main(["demo", *EMBEDDED, "--defence", "TTC", "--radius", "8/255", "--export_space", str(folder)])
    metadata = yaml.safe_load((folder / "README.md").read_text().split("---")[1])
    assert metadata["sdk"] == "gradio" and metadata["app_file"] == "app.py"
    needed = (folder / "requirements.txt").read_text()
    assert f"gradio=={metadata['sdk_version']}\n" in needed and "torch==" in needed and "pytest" not in needed
    assert yaml.safe_load((folder / "demo.yaml").read_text())["radius"] == "8/255"
    assert (folder / "hf_robust_clip" / "digits_clip" / "config.json").is_file()
    app: dict = {"__name__": "app", "__file__": str(folder / "app.py")}
    exec(compile((folder / "app.py").read_text(), "app.py", "exec"), app)
    assert app["page"].prepared.levels == 8 and app["demo"] is app["page"].blocks
    assert not [path for path in Path(folder).rglob("*") if path.name == "__pycache__"]
    main(["demo", *EMBEDDED, "--export_space", str(folder), "--overwrite"])
    assert "radius" not in (folder / "demo.yaml").read_text()
