"""A third of the hostile rows, of each kind some; all of them by `python tests/hostile.py`."""

import hostile
import pytest


@pytest.mark.parametrize("name", list(hostile.ROWS)[::3])
def test_holds(name):
    failed = hostile.run({name: hostile.ROWS[name]})
    assert not failed, failed[name]


def test_what_does_not_hold_is_found():
    def taken():
        hostile.refused(lambda: "anything")

    def long():
        hostile.refused(lambda: (_ for _ in ()).throw(ValueError("one line\nand another")))

    def another_error():
        hostile.refused(lambda: {}["key"])

    def right():
        assert hostile.refused(lambda: int("x"), "'x'") is None

    rows = {check.__name__: check for check in (taken, long, another_error, right)}
    assert list(hostile.run(rows)) == ["taken", "long", "another_error"]
