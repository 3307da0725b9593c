"""The command `hf-robust-clip`: words to functions."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

from .runs.interruptions import one_line_errors
from .secrets import hide_arguments

USAGE = """\
usage: hf-robust-clip train [CONFIG] [--config FILE] [--NAME VALUE ...]      fine-tune; --help lists all flags
       hf-robust-clip evaluate [CONFIG] [--config FILE] [--NAME VALUE ...]   accuracy under attack
       hf-robust-clip poison [CONFIG] [--NAME VALUE ...]    put a backdoor into a model, on purpose, and measure it
       hf-robust-clip clean [CONFIG] --poisoned DIR [--NAME VALUE ...]   take it out, and measure what is left
       hf-robust-clip demo [--model_name_or_path ID] [--reference ID] [--NAME VALUE ...]   a page to look at pictures
       hf-robust-clip convert SOURCE --base ID --output_dir DIR [--NAME VALUE ...]   weights of others to transformers
       hf-robust-clip leaderboard [FILE] [--NAME VALUE ...]   convert and evaluate many checkpoints, and rank them
       hf-robust-clip card FOLDER [--NAME VALUE ...]  write README.md again from report.json and recipe.yaml
       hf-robust-clip card --collection FOLDER        write the index page of a folder of cards
       hf-robust-clip --version
CONFIG is the name of a YAML file that comes with the package, such as pmg_aft (the default of train), tecoa, or
clip-vit-base-patch32/pmg_aft_imagenet; FILE is your own."""
DEFAULTS = {
    "train": "pmg_aft",
    "evaluate": "evaluate",
    "poison": "coloured-digits/poison",
    "clean": "coloured-digits/clean_clip",
}


def main(argv: Sequence[str] | None = None) -> None:
    """`hf-robust-clip {train, evaluate, poison, clean, convert, leaderboard, demo, card}`: see `USAGE`."""
    words = arguments_of(argv)
    command, rest = (words[0], words[1:]) if words else ("", [])
    if command in DEFAULTS:
        with one_line_errors():
            from .command_line import packaged_config

            named = rest[:1] if rest and not rest[0].startswith("-") else []
            config = packaged_config(*named or [DEFAULTS[command]])
        run(command, config, "", rest[len(named) :])
    elif command == "demo":
        with one_line_errors():
            from .demo import command as demo

            demo.main(rest)
    elif command == "convert":
        with one_line_errors():
            from .runs import convert

            convert.main(rest)
    elif command == "leaderboard":
        rank(rest)
    elif command == "card" and rest:
        with one_line_errors():
            from .runs import cards

            cards.main(rest)
    elif command == "--version":
        print(f"hf-robust-clip {version('hf_robust_clip')}")
    else:
        asked = not words or bool({"-h", "--help"} & set(words))
        if not asked:
            lacking = "card needs a FOLDER, or --collection FOLDER" if command == "card" else None
            print(f"error: {lacking or f'unknown command {command!r}'}", file=sys.stderr)
        print(USAGE)
        raise SystemExit(0 if words and asked else 2)


def rank(words: Sequence[str]) -> None:
    """A leaderboard, by the file that stands first, or that which comes with the package."""
    with one_line_errors():
        from .command_line import recipes_folder
        from .processes import leave_processes
        from .runs import leaderboard

        named = [word for word in words[:1] if not word.startswith("-")]
        config = Path(*named) if named else recipes_folder() / "leaderboard.yaml"
        leaderboard.main(words[len(named) :], config)
        leave_processes()


def run(command: str, default_config: Path, description: str | None, argv: Sequence[str] | None = None) -> None:
    """The main function of a script: one of `DEFAULTS` with a default config."""
    words = arguments_of(argv)
    with one_line_errors():
        from .processes import leave_processes

        import_module(f".runs.{command}", __package__).main(words, default_config, description or "")
        leave_processes()


def arguments_of(argv: Sequence[str] | None) -> list[str]:
    """The words of a command line, by default this process's own, which forgets the tokens among them."""
    words = list(sys.argv[1:] if argv is None else argv)
    hide_arguments()
    return words


if __name__ == "__main__":
    main()
