"""Published cards agree with the reports beside them."""

import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from reports import INFO, write_folder

from hf_robust_clip.report import CONTROLS, load_card_info, load_reports, paired_difference, regenerate_card
from hf_robust_clip.report.collection import MADE, make_collection, read_collection

ROOT = Path(__file__).parent.parent.parent / "hub_cards"
FILES = ("README.md", "report.json", "recipe.yaml")
LARGEST = 5_000_000  # bytes; weights belong on the Hub


def card_folders(root: Path) -> list[Path]:
    """Every folder below `root` that holds a file of a card; not those that hold an index page of cards."""
    pages = {path.parent for path in root.rglob("README.md") if path.read_text(encoding="utf-8").startswith(MADE)}
    return sorted({path.parent for name in FILES for path in root.rglob(name)} - {root} - pages)


def check_folder(folder: Path, root: Path) -> None:
    """Fails unless card, report and recipe are there, belong together, and no weights lie beside them."""
    for name in FILES:
        assert (folder / name).is_file(), f"{folder} has no {name}"
    written = (folder / "README.md").read_text(encoding="utf-8")
    assert str(regenerate_card(folder)) == written, f"{folder}/README.md differs from what report.json gives"
    repo_id = folder.relative_to(root).as_posix()
    assert load_card_info(folder / "report.json").repo_id in (repo_id, f"./{repo_id}"), "folder and repository differ"
    rows = ModelCard.load(folder / "README.md").data.eval_results
    assert len({row.unique_identifier for row in rows}) == len(rows) > 0
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", written):
        assert (folder / picture).is_file(), f"{folder} has no {picture}"
    large = [path.name for path in folder.rglob("*") if path.is_file() and path.stat().st_size > LARGEST]
    assert not large, f"{folder} holds weights: {large}"


@pytest.mark.parametrize("folder", card_folders(ROOT), ids=lambda folder: folder.relative_to(ROOT).as_posix())
def test_published_card(folder):
    check_folder(folder, ROOT)


def test_the_index_page_is_that_of_its_cards():
    entries, left = read_collection(ROOT / "hf-robust-clip")
    assert len(entries) == len(card_folders(ROOT / "hf-robust-clip")) and not left
    assert (ROOT / "hf-robust-clip/README.md").read_text(encoding="utf-8") == make_collection(
        "hf-robust-clip", entries
    )


@pytest.fixture
def folder(tmp_path):
    found = tmp_path / INFO.repo_id
    found.mkdir(parents=True)
    write_folder(found)
    (found / "accuracy.png").write_bytes(b"a picture")
    return found


def test_a_sound_folder_passes(folder, tmp_path):
    assert card_folders(tmp_path) == [folder]
    check_folder(folder, tmp_path)


def edit(folder, name, old, new):
    text = (folder / name).read_text(encoding="utf-8")
    assert old in text
    (folder / name).write_text(text.replace(old, new), encoding="utf-8")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "README.md").unlink(), "has no README.md"),
        (lambda folder: (folder / "report.json").unlink(), "has no report.json"),
        (lambda folder: (folder / "recipe.yaml").unlink(), "has no recipe.yaml"),
        (lambda folder: edit(folder, "README.md", "60.0 (45-74)", "61.0 (45-74)"), "differs from what report.json"),
        (lambda folder: edit(folder, "report.json", "PMG-AFT", "TeCoA"), "differs from what report.json"),
        (lambda folder: (folder / "accuracy.png").unlink(), "has no accuracy.png"),
        (
            lambda folder: (folder / "model.safetensors").write_bytes(bytes(LARGEST + 1)),
            "weights: .*model.safetensors",
        ),
    ],
)
def test_a_damaged_folder_fails(damage, message, folder, tmp_path):
    damage(folder)
    assert card_folders(tmp_path) == [folder]
    with pytest.raises(AssertionError, match=message):
        check_folder(folder, tmp_path)


def test_a_card_in_the_wrong_folder_fails(folder, tmp_path):
    moved = folder.rename(folder.with_name("other"))
    with pytest.raises(AssertionError, match="folder and repository differ"):
        check_folder(moved, tmp_path)


DEFENCES = sorted((ROOT / "defence-benchmark").glob("*.json"))


@pytest.mark.parametrize("file", DEFENCES, ids=lambda file: file.stem)
def test_attacks_through_a_defence_leave_no_more_than_blind_ones(file):
    """Of the published table: what withstands all attacks withstands the blind ones."""
    reports, _ = load_reports(file)
    rows: dict[tuple, dict[tuple, float]] = {}
    for report in reports:
        if report.defence is not None:
            key = report.name, report.defence["name"], str(report.defence["parameters"])
            found = rows.setdefault(key, {})
            found[report.attack_target, report.attack] = max(report.robust_accuracy.items())[1]
            assert set(report.controls) == set(CONTROLS)
            left = list(next(iter(report.after_each.values())).values())
            assert left == sorted(left, reverse=True)
    assert len(rows) == {"digits-clip": 21, "earlier-mini-clip": 12, "mini-clip": 11}[file.stem]
    table = file.with_suffix(".md").read_text(encoding="utf-8")
    for (name, defence, _), figures in rows.items():
        worst = [figure for (target, _), figure in figures.items() if target == "adaptive_worst"]
        blind = [figure for (target, _), figure in figures.items() if target == "defence_blind"]
        assert len(worst) == 1
        assert len(blind) == 2
        assert worst[0] <= min(blind), (name, defence)
        assert f" {100 * worst[0]:.1f} |" in table


def test_the_table_of_defences_is_there():
    assert [file.stem for file in DEFENCES] == ["digits-clip", "earlier-mini-clip", "mini-clip"]


def test_the_mini_benchmarks_figures_are_those_of_its_reports():
    reports, _ = load_reports(ROOT / "mini-benchmark/reports.json")
    table = (ROOT / "mini-benchmark/table.md").read_text(encoding="utf-8")
    runs: dict[str, list] = {}
    for report in reports:
        if report.attack == "PGD-20" and report.task.startswith("CIFAR-10"):
            runs.setdefault(report.name.split(", seed")[0], []).append([report])
    assert {name: len(own) for name, own in runs.items() if len(own) != 3} == {"pretrained": 1}
    theirs = runs["PMG-AFT (released)"]
    for name, own in runs.items():
        if own is not theirs:
            told = [
                str(paired_difference(own, theirs, eps, resamples=1)).split()[0] for eps in (0.0, 1 / 255, 2 / 255)
            ]
            lines = [line.replace("**", "") for line in table.splitlines() if line.startswith(f"| {name} | ")]
            assert any(
                re.match(re.escape(f"| {name} | {told[0]} [") + ".*?" + re.escape(told[2]), line) for line in lines
            )
            mean = sum(run[0].clean_accuracy for run in own) / len(own)
            assert any(line.startswith(f"| {name} | {100 * mean:.1f} ") for line in lines), name
