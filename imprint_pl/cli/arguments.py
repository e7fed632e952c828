"""argparse for the commands that take no Trainer; `fit_parser.py` is for those that do."""

import argparse
from typing import Never

from imprint_pl.errors import ImprintError

# The beginning of a command line in help texts.
PROGRAM = "python -m imprint_pl"


class ArgumentParser(argparse.ArgumentParser):
    """Raises an `ImprintError` of one line for a wrong command line, instead of printing usage."""

    def error(self, message: str) -> Never:
        raise ImprintError(f"{message}; see `{self.prog} --help`")
