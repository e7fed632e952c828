"""What is typed: one file a command, what a command prints and what it leaves behind."""

from imprint_pl.cli.commands import main

__all__ = ["main"]
