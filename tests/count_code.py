"""Prints the lines of code of each folder of the package, and the files above a limit.

Neither blank lines, comments nor docstrings count.

    python tests/count_code.py [--limit 450] [folder ...]
"""

import argparse
import ast
import tokenize
from collections import Counter
from pathlib import Path

LAYOUT = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def code_lines(path: Path) -> int:
    """The lines of a file on which code stands."""
    with tokenize.open(path) as file:
        text = file.read()
    docstrings = {
        line
        for node in ast.walk(ast.parse(text))
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None
        for line in range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1)
    }
    tokens = tokenize.generate_tokens(iter(text.splitlines(keepends=True)).__next__)
    code = {line for t in tokens if t.type not in LAYOUT for line in range(t.start[0], t.end[0] + 1)}
    return len(code - docstrings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    package = Path(__file__).parent.parent / "hf_robust_clip"
    parser.add_argument("folders", type=Path, nargs="*", default=[package])
    parser.add_argument("--limit", type=int, default=450, help="files above it are named")
    options = parser.parse_args()
    files = {path: code_lines(path) for folder in options.folders for path in sorted(folder.rglob("*.py"))}
    by_folder: Counter[str] = Counter()
    for path, lines in files.items():
        by_folder[str(path.parent)] += lines
    for folder, lines in sorted(by_folder.items()):
        print(f"{lines:6} {folder}")
    print(f"{sum(files.values()):6} in all")
    for path, lines in sorted(files.items(), key=lambda item: -item[1]):
        if lines > options.limit:
            print(f"above {options.limit}: {path}, {lines}")


if __name__ == "__main__":
    main()
