"""Evaluation of classifiers, of defences and through defences."""
