"""Published figures: all of them are there, unchanged, each with its setting, and found by name."""

from dataclasses import replace

import pytest

from hf_robust_clip import published
from hf_robust_clip.attacks.named import suite_named
from hf_robust_clip.attacks.views import KNOWN_VIEWS
from hf_robust_clip.published import find_published, published_columns, same_method
from hf_robust_clip.threat_model import ThreatModel
from hf_robust_clip.zero_shot_data.specs import SPECS, prompt_templates

# number of figures and their sum, added up from the collected tables by themselves
SUMS = {
    "pmg_aft_abstract": (2, 13.71),
    "tga_zsr": (224, 8254.06),
    "ucat": (16, 548.78),
    "imagenet_trained": (19, 905.84),
    "robustvlm_b32": (16, 533.30),
    "tapt": (229, 8157.086),
    "fap": (5, 89.30),
    "t_vss": (12, 262.20),
    "agft": (10, 464.32),
    "caw": (2, 65.14),
    "robustvlm_l14": (6, 281.40),
    "bafta": (8, 533.59),
    "c_avp": (4, 125.92),
    "tga_zsr_cost": (4, 32662),
}
SAMPLES = [  # table, method, metric, attack, eps, dataset or what it is a mean of, value
    ("tga_zsr", "CLIP", "clean", None, None, "cifar10", 88.06),
    ("tga_zsr", "PMG-AFT", "robust", "pgd-100", "1/255", "tiny_imagenet", 47.11),
    ("tga_zsr", "PMG-AFT", "robust", "autoattack", "1/255", "pets", 39.25),
    ("tga_zsr", "TGA-ZSR", "robust", "autoattack", "1/255", "aircraft", 2.64),
    ("tga_zsr", "FT-Adv", "robust", "pgd-100", "1/255", "cars", 8.42),
    ("ucat", "TeCoA", "robust", "cw-100", "1/255", "all sets", 29.25),
    ("imagenet_trained", "AGFT", "robust", "autoattack", "1/255", "15 sets", 42.81),
    ("agft", "AGFT", "robust", "autoattack-rand", "1/255", "15 sets with ImageNet", 42.81),
    ("robustvlm_b32", "FARE4", "robust", None, "4/255", "13 sets", 21.9),
    ("robustvlm_l14", "TeCoA4", "robust", None, "4/255", "13 sets", 31.9),
    ("tapt", "TAPT-VLI", "robust", "pgd-100", "1/255", "eurosat", 36.2),
    ("tapt", "Vanilla", "robust", "autoattack", "1/255", "aircraft", 0.1),
    ("t_vss", "R-TPT", "robust", "pgd-100", "4/255", "dtd", 4.4),
    ("bafta", "BaFTA", "clean", None, None, "4 OOD sets", 65.46),
]


@pytest.mark.parametrize("table", SUMS)
def test_every_figure_of_a_table_is_there(table):
    own = [column for column in published_columns() if column.table == table]
    values = [value for column in own for part in (column.figures, column.means) for value in part.values()]
    count, total = SUMS[table]
    assert (len(values), sum(values)) == (count, pytest.approx(total, abs=1e-6))


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: "-".join(map(str, sample[:4])))
def test_a_figure_is_that_of_its_source(sample):
    table, method, metric, attack, eps, of, value = sample
    (column,) = [
        own
        for own in published_columns()
        if (own.table, own.method, own.metric, own.attack, own.eps) == (table, method, metric, attack, eps)
    ]
    assert {**column.figures, **column.means}[of] == value
    assert column.source


def test_settings_are_those_that_the_library_knows():
    keys = {spec.key for spec in SPECS}
    assert {own.table for own in published_columns()} == set(SUMS)
    for own in published_columns():
        assert set(own.figures) <= keys, own.name
        if own.attack is not None:
            suite_named(own.attack)
        if own.eps is not None:
            ThreatModel(own.eps, own.norm)
        if own.view is not None:
            assert own.view in KNOWN_VIEWS
        if own.templates is not None:
            prompt_templates(own.templates)
        assert (own.metric == "robust") == (own.norm is not None), own.name


def test_no_two_columns_are_of_one_setting():
    told = [(own.name, own.metric, own.attack, own.eps, own.view) for own in published_columns()]
    assert len(set(told)) == len(told)


def test_a_method_is_found_by_its_name_in_any_spelling():
    assert {own.name for own in find_published("PMG-AFT")} == {"tga_zsr/pmg_aft"}
    assert find_published("tga_zsr/pmg_aft") == find_published("pmg_aft")
    assert [own.attack for own in find_published("pmg_aft")] == [None, "pgd-100", "autoattack"]
    assert same_method("PMGAFT", "pmg_aft") and not same_method("apt", "tapt")


@pytest.mark.parametrize("name", ["pmg-eft", "nowhere/pmg_aft", "ucat/pmg_aft", "gladiator", ""])
def test_what_has_no_figures_of_datasets_is_refused_with_those_that_have(name):
    with pytest.raises(ValueError, match=r"published=.*tga_zsr/pmg_aft") as raised:
        find_published(name)
    assert "\n" not in str(raised.value)


def test_a_method_of_two_tables_must_be_named_with_its_table(monkeypatch):
    columns = find_published("pmg_aft")
    monkeypatch.setattr(published, "published_columns", lambda: (*columns, replace(columns[0], table="other")))
    with pytest.raises(ValueError, match=r"published='pmg_aft'.*tga_zsr/pmg_aft, other/pmg_aft"):
        find_published("pmg_aft")
