"""What an evaluation measured: reports, their frame, tables, plots, files and model cards."""

from .card import CardInfo, load_card_info, make_card, make_unmeasured_card, regenerate_card
from .comparison import Difference, differences_told, figures_of_differences, paired_difference
from .files import load_reports, read_report_file, save_csv, save_reports
from .plots import choose_examples, plot, plot_accuracy, plot_defences, plot_examples, plot_tradeoff
from .report import (
    AS_SAVED,
    CONTROLS,
    Measurement,
    RobustnessReport,
    accuracies,
    as_saved,
    blind_warning,
    frame,
    percent,
    prompt_hash,
    quoted,
    templates_told,
    with_descriptions,
)
from .tables import (
    as_markdown,
    by_model,
    detections,
    figures_by_task,
    figures_of_defences,
    markdown,
    print_table,
    table,
)
