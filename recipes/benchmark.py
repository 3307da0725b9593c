"""A benchmark by a YAML file: models that are trained, evaluations of all of them, tables, plots and cards.

    python recipes/benchmark.py --config recipes/configs/mini-clip/benchmark.yaml --data_root <folder of Hub datasets>
    python recipes/benchmark.py --config recipes/configs/digits-clip/prompt_benchmark.yaml

Each model is a training by one of the packaged configs and some flags, each evaluation such a config too. What is
finished is not repeated, unless its settings, the weights that it was made of or the package's version changed: a
killed run goes on.

`--jobs 12` lets so many processes share the work, whose cells are trainings with a learning rate that is tried,
trainings with a seed, and evaluations of one checkpoint: first all rates of the models in the file's order, then all
seeds of each, then the evaluations in their order. Figures are the same for any number of jobs on one GPU; on a CPU
each process has fewer threads, which may round otherwise. `out/seconds.csv` tells what each cell took, `<folder>.log`
what it printed. Several runs may be started on one folder: none repeats what another is at work on. `--only "[a, b]"`
trains and evaluates these alone; `--keep_going` goes on with the others when a cell fails; `--partial` runs nothing,
and writes tables and cards of what is finished. `--cards_dir hub_cards` puts the cards where they are kept.

A row beside those that are there costs its own cells alone: `--only "[mine]"` makes them, then `--partial --earlier
hub_cards/mini-benchmark` writes tables of them and of the rows whose reports are in that folder.
"""

import sys
from collections.abc import Sequence

from hf_robust_clip.command_line import CommandLine, packaged_config, read_command
from hf_robust_clip.runs.benchmark import Benchmark, run
from hf_robust_clip.runs.interruptions import one_line_errors
from hf_robust_clip.runs.shared import quiet_loading

COMMAND = CommandLine({"": (Benchmark,)}, {}, ("name", "start", "output_dir", "models", "evaluations"))


def main(argv: Sequence[str]) -> None:
    with one_line_errors():
        default = packaged_config("mini-clip/benchmark")
        given = read_command(COMMAND, argv, default, __doc__)
        benchmark: Benchmark = given.group(Benchmark, given.made())
        quiet_loading()
        with one_line_errors(lambda: f"what is finished is in {benchmark.output_dir!r}; the same command goes on."):
            run(benchmark)


if __name__ == "__main__":
    main(sys.argv[1:])
