"""Poisoned image-text pairs: triggers, who puts them in, and editors of captions that a cleaning needs."""
