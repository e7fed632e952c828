"""The command line's parser: short names of data sets, and errors of one line."""

from __future__ import annotations

import re
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import get_loader, set_loader
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities import rank_zero_warn

import imprint_pl.data
from imprint_pl.cli.arguments import PROGRAM
from imprint_pl.data.tasks import IN_QUOTES
from imprint_pl.errors import ImprintError, did_you_mean
from imprint_pl.files import local_path
from imprint_pl.parts.by_name import SLOTS

# Importing these classes makes them known by their short names.
DATA = {
    data.__name__: data
    for data in (
        imprint_pl.data.Digits,
        imprint_pl.data.MNIST,
        imprint_pl.data.FashionMNIST,
        imprint_pl.data.CIFAR10,
        imprint_pl.data.CIFAR100,
        imprint_pl.data.USPS,
        imprint_pl.data.SVHN,
        imprint_pl.data.MNISTM,
        imprint_pl.data.CombiDigits,
        imprint_pl.data.Union,
        imprint_pl.data.ImageNet,
        imprint_pl.data.ImageFolder,
        imprint_pl.data.CSV,
        imprint_pl.data.HuggingFace,
        imprint_pl.data.ImageFiles,
        imprint_pl.data.LabelledFolder,
    )
}


class Parser(LightningArgumentParser):
    """Reports a wrong command line in one line with similar names, instead of pages of usage.

    A configuration may come from another command. Options that only that command has are left out,
    with a warning if they were set.

    Attributes:
        of_others: the options that only other commands have, with their defaults.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.of_others: dict[str, Any] = {}

    def parse_path(self, *args: Any, **kwargs: Any) -> Any:
        return self._without_others(super().parse_path(*args, **kwargs))

    def parse_string(self, *args: Any, **kwargs: Any) -> Any:
        return self._without_others(super().parse_string(*args, **kwargs))

    def _without_others(self, config: Any) -> Any:
        for name, default in self.of_others.items():
            if name in config and config.pop(name) != default:
                rank_zero_warn(f"{name}, an option of another command, is not used by this one")
        return config

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise ImprintError(self._clear(_without_unions(str(message))))

    def _clear(self, message: str) -> str:
        if found := re.search(r"unrecognized arguments: --([^\s=]+)", message):
            if found[1] in self.of_others:
                return f"--{found[1]} is an option of another command: leave it out"
            return f"unknown option --{found[1]}{did_you_mean(found[1], self._names())}"
        if found := re.search(r"unrecognized arguments: (\S.*)", message):
            return (
                f"{found[1]!r} needs an option before it: --images for images, --ckpt_path for a "
                f"checkpoint, --config for a configuration; see `{PROGRAM} COMMAND --help`"
            )
        if found := re.search(r"(?:accept option|Option) '(\S+)'", message):
            if found[1] == "on_error":
                return "--on_error is for image files: --data ImageFolder or CSV, or --images"
            if found[1] in self._names():
                return f"{found[1]!r} is an option of another command: leave it out"
            return f"unknown option {found[1]!r}{did_you_mean(found[1], self._names())}"
        if found := re.search(r"Expected a dot import path string: (\S+)", message):
            return (
                f"unknown data {found[1]!r}{did_you_mean(found[1], DATA)}: one of {', '.join(DATA)}"
            )
        if found := re.match(r"classes=(.*): Does not validate", message):
            return f"classes={found[1]}: give a list of indices or names{IN_QUOTES}"
        if "are required" in message and ".data" in message:
            return (
                "no data: give --data Digits (or MNIST, FashionMNIST, CIFAR10, ImageFolder with "
                "--data.root …, CSV with --data.table …, Union with --data.sources …; for predict "
                "also --images FILE …), or a --config that does"
            )
        return message

    def _names(self) -> list[str]:
        commands = getattr(self._subcommands_action, "choices", None) or {}
        parsers = [self, *commands.values()]
        return sorted({action.dest for parser in parsers for action in parser._actions})


def _without_unions(message: str) -> str:
    """Shortens a message of jsonargparse to the intended type, without the alternatives."""
    found = re.search(r"Errors:\n(.*?)\n\s*- Expected a <class 'NoneType'>", message, re.DOTALL)
    if not found:
        return message
    text = found[1].strip().removeprefix("- ")
    key = re.search(r'Parser key "([^"]+)"', message)
    value = re.findall(r"Given value: (.*)", message)
    if key and value and not value[-1].startswith("NestedArg") and value[-1] not in text:
        return f"{key[1]}={value[-1]}: {text}"
    return text


# A byte of a file name that is not text, as Python keeps it (PEP 383) or as YAML writes it, but not
# the second half of a JSON surrogate pair. YAML refuses such a byte: while it reads the text, a
# character that nobody uses stands for the byte.
BYTE = re.compile(
    r"[\udc80-\udcff]|(?<!\\u[dD][89abAB][\da-fA-F]{2})\\u[dD][cC]([89a-fA-F][\da-fA-F])"
)
STAND_INS = 0x10FC00
_load_yaml = get_loader("yaml")


def _load(text: str) -> Any:
    """Loads YAML in which file names need not be UTF-8."""
    if not BYTE.search(text):
        return _load_yaml(text)
    return _with_bytes(
        _load_yaml(
            BYTE.sub(lambda m: chr(STAND_INS + (int(m[1], 16) if m[1] else ord(m[0]) % 256)), text)
        )
    )


def _with_bytes(value: Any) -> Any:
    if isinstance(value, str):
        signs = {STAND_INS + byte: 0xDC00 + byte for byte in range(0x80, 0x100)}
        return value.translate(signs)
    if isinstance(value, list):
        return [_with_bytes(part) for part in value]
    if isinstance(value, dict):
        return {_with_bytes(name): _with_bytes(part) for name, part in value.items()}
    return value


set_loader("yaml", _load, (yaml.YAMLError,))


def named_parts(args: list[str]) -> dict[str, Any]:
    """Returns the parts that a command line and its configurations name, by slot; the last wins."""
    found: dict[str, Any] = {}
    # Split `--option=value` into two words.
    words = [word for a in args for word in (a.split("=", 1) if a.startswith("--") else [a])]
    for option, value in pairwise(words):
        # Ignore files that cannot be read here; the parser reports them.
        with suppress(OSError, UnicodeError, yaml.YAMLError, TypeError, KeyError):
            if option in ("--config", "-c"):
                model = dict(_load(Path(local_path(value)).read_text())["model"])
                found |= {slot: part for slot, part in model.items() if slot in SLOTS}
            elif option.startswith("--model.") and option[8:].rstrip("+") in SLOTS:
                found[option[8:].rstrip("+")] = _load(value)
    return found
