"""Words of command lines that tests put together."""

from collections.abc import Sequence


def last_of_each(*words: object) -> list[str]:
    """Of each flag that stands twice the last: a command line refuses two."""
    found: dict[str, Sequence[str]] = {}
    rest = [str(word) for word in words]
    while rest:
        key, equals, _ = (word := rest.pop(0)).partition("=")
        value = [] if equals or not rest or rest[0].startswith("--") else [rest.pop(0)]
        found.pop(key, None)
        found[key] = [word, *value]
    return [word for part in found.values() for word in part]
