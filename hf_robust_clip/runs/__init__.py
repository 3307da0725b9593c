"""Runs: prepare, fit, measure, write."""
