"""The command line: one file for each command, and what commands print and write."""

from imprint_pl.cli.commands import main

__all__ = ["main"]
