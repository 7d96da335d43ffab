"""Thousands of damaged files, faults, kills and races, each with a number: `make torture`, or python -m tests.torture --help."""
