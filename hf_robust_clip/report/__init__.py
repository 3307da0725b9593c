"""What an evaluation found: reports, tables, plots, files and model cards."""
