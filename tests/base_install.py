"""A Python in which only what the base install brings can be imported; it runs commands.

    python tests/base_install.py FOLDER < commands

`commands` is a JSON list of argument lists. FOLDER/base_install.json gets the exit status, stdout
and stderr of each. Packages that only an extra or the tools for development bring are not found.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sys
import tomllib
from importlib import metadata
from importlib.machinery import PathFinder
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
ANSWER = "base_install.json"


def name_of(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def base() -> set[str]:
    """The distributions that `pip install .` brings, without an extra."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    open_, found = [Requirement(text) for text in project["dependencies"]], set()
    while open_:
        requirement = open_.pop()
        key = name_of(requirement.name), frozenset(requirement.extras)
        if key in found:
            continue
        if requirement.marker and not requirement.marker.evaluate():
            continue
        found.add(key)
        try:
            further = metadata.requires(requirement.name) or []
        except metadata.PackageNotFoundError:
            continue
        for inner in map(Requirement, further):
            wanted = [{"extra": extra} for extra in (*requirement.extras, "")]
            if not inner.marker or any(map(inner.marker.evaluate, wanted)):
                # The marker has been looked at with the right extra.
                inner.marker = None
                open_.append(inner)
    return {name for name, _ in found} | {"imprint-pl"}


def absent(kept: set[str]) -> set[str]:
    """The top-level modules that only distributions outside of `kept` bring."""
    return {
        module
        for module, distributions in metadata.packages_distributions().items()
        if not kept & set(map(name_of, distributions)) and module != "imprint_pl"
    }


def hide() -> set[str]:
    """Makes this process find the base alone."""
    kept = base()
    hidden = absent(kept)

    class Base(PathFinder):
        @classmethod
        def find_spec(cls, fullname, path=None, target=None):
            if fullname.partition(".")[0] in hidden:
                return None
            return super().find_spec(fullname, path, target)

        @classmethod
        def find_distributions(cls, *arguments, **keywords):
            for found in super().find_distributions(*arguments, **keywords):
                if name_of(found.metadata["Name"] or "") in kept:
                    yield found

    at = sys.meta_path.index(PathFinder)
    sys.meta_path[at] = Base
    for module in [name for name in sys.modules if name.partition(".")[0] in hidden]:
        del sys.modules[module]
    return hidden


def run(arguments: list[str]) -> tuple[int, str, str]:
    from imprint_pl.cli import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(arguments)
        except SystemExit as end:
            status = end.code or 0
    return status, out.getvalue(), err.getvalue()


if __name__ == "__main__":
    hidden = hide()
    os.chdir(sys.argv[1])
    results = [run(arguments) for arguments in json.load(sys.stdin)]
    Path(ANSWER).write_text(json.dumps({"hidden": sorted(hidden), "results": results}))
