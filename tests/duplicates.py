"""python tests/duplicates.py FOLDER ...    lines of code that stand twice, as pylint's symilar finds them.

Comments, docstrings and signatures are left out. For the latter symilar lets astroid read what a file imports, which
takes minutes for torch and is of no use here: nothing is imported.
"""

import sys
from pathlib import Path
from typing import NoReturn

from astroid.exceptions import AstroidImportError
from astroid.manager import AstroidManager
from pylint.checkers.symilar import Symilar

ALIKE = 8  # more lines in a row than these are too many


def nothing(self: AstroidManager, name: str | None, *others: object, **more: object) -> NoReturn:
    raise AstroidImportError("{modname} is not read", modname=name)


def main(folders: list[str]) -> int:
    AstroidManager.ast_from_module_name = nothing
    found = Symilar(ALIKE, ignore_comments=True, ignore_docstrings=True, ignore_signatures=True)
    files = sorted(file for folder in folders for file in Path(folder).rglob("*.py"))
    for file in files:
        with file.open(encoding="utf-8") as text:
            found.append_stream(str(file), text)
    alike = found._compute_sims()
    print(found._get_similarity_report(alike) if alike else f"{len(files)} files without duplicates")
    return int(bool(alike) or not files)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
