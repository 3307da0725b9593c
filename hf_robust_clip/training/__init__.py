"""Adversarial fine-tuning: settings, the one trainer, and what lets a training go on."""
