"""argparse for the commands that take no Trainer; `fit_parser.py` is for those that do."""

import argparse

from imprint_pl.errors import ImprintError


class ArgumentParser(argparse.ArgumentParser):
    """Ends a wrong command line in one line, instead of the usage."""

    def error(self, message: str) -> None:
        raise ImprintError(f"{message}; see `{self.prog} --help`")
