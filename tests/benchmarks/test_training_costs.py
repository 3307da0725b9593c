"""The tables of recipes/README.md on costs are what their script makes, and what it counted is what it counts."""

import pytest
import training_costs

README = training_costs.README.read_text(encoding="utf-8")
pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.mark.parametrize("name", training_costs.TABLES)
def test_tables_are_those_of_the_reports(name):
    _, start, end = next(part for part in training_costs.parts(README) if part[0] == name)
    assert README[start:end] == training_costs.TABLES[name](training_costs.load())


@pytest.mark.parametrize("title", ["PMG-AFT (released)", "AdvCL"])
def test_what_was_counted_is_what_is_counted(title):
    assert training_costs.passes(title) == training_costs.load()["passes"][title]


def test_what_was_computed_is_what_is_computed():
    assert training_costs.size_of("tiny", "bf16") == training_costs.load()["sizes"]["tiny bf16"]
