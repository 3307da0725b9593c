"""Cards made again from their reports, and the index page of a folder of cards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..arguments import CardArguments
from ..command_line import CommandLine, read_command
from ..names import shown_name
from ..report.card import load_card_info, regenerate_card
from ..report.collection import MADE, make_collection, read_collection
from ..report.eval_results import EVAL_RESULTS, eval_results_file
from ..report.files import load_reports, save_reports
from ..storage import check_writable, write_text
from .shared import as_list, run_command

ABOUT = """\
hf-robust-clip card FOLDER                  write README.md again from report.json and recipe.yaml
hf-robust-clip card --collection FOLDER     write the index page of a folder of cards, its README.md"""
COMMAND = CommandLine({"": (CardArguments,)}, {}, ())


def main(words: Sequence[str]) -> None:
    """Cards as a command. A wrong setting ends it with one line and status 2."""
    first = ["--folder", *words[:1]] if words and not words[0].startswith("-") else list(words[:1])
    run_command(lambda: read([*first, *words[1:]]), write, lambda folder: "nothing was written.")


def read(words: Sequence[str]) -> CardArguments:
    """Check every setting."""
    given = read_command(COMMAND, words, None, ABOUT, lambda file, options: as_list("defences", file, options))
    return given.group(CardArguments, given.made())


def write(settings: CardArguments) -> None:
    """Write one card, or an index page."""
    if settings.collection is not None:
        write_collection(settings.collection, settings.sort_by or "robust")
    else:
        write_card(settings)


def write_card(settings: CardArguments) -> None:
    """The card of a folder, with what was asked for in its report.json too.

    Raises OSError/ValueError as `regenerate_card` and `eval_results_file` do.
    """
    folder, path = Path(str(settings.folder)), Path(str(settings.folder), "report.json")
    card = regenerate_card(folder)  # or says what is missing
    written = [folder / "README.md"]
    reports, compared = load_reports(path)
    figures = eval_results_file(reports) if settings.eval_results else None
    if settings.license is not None or settings.defences is not None:
        info = load_card_info(path)
        info = replace(info, license=settings.license or info.license)
        info = info if settings.defences is None else replace(info, defences=tuple(settings.defences))
        save_reports(path, reports, compared, card=info)
        card = regenerate_card(folder)
        written.append(path)
    write_text(folder / "README.md", str(card))
    if figures is not None:
        (folder / EVAL_RESULTS).parent.mkdir(exist_ok=True)
        write_text(folder / EVAL_RESULTS, figures)
        written.append(folder / EVAL_RESULTS)
    print(f"wrote {', '.join(map(str, written))}")


def write_collection(folder: str, sort_by: str) -> None:
    """The index page of a folder.

    Raises OSError for a README.md that is somebody's own, and as `read_collection` and `make_collection` do.
    """
    entries, left = read_collection(folder)
    page = Path(folder, "README.md")
    if page.is_file() and not page.read_text(encoding="utf-8").startswith(MADE):
        raise OSError(f"collection={folder!r} has a README.md that is no index page of this command; move it.")
    check_writable(Path(folder))
    write_text(page, make_collection(shown_name(folder), entries, sort_by))
    more = f"; left out, with a report but no card: {', '.join(left)}" if left else ""
    print(f"wrote {page}: {len(entries)} cards{more}")
