"""Tests; a package so that `python -m tests.faults.bench` finds these and not those that some package installs."""
