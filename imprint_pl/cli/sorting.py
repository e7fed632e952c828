"""Copies images into a folder for each predicted class; nothing is moved or overwritten."""

from __future__ import annotations

import filecmp
import os
import re
import shutil
from collections.abc import Sequence
from itertools import count
from pathlib import Path

from imprint_pl.errors import ImprintError, shown
from imprint_pl.files import local_path
from imprint_pl.method.head import NONE_NAME


class ClassFolders:
    """A folder for each class, which is made for the first image of the class.

    Args:
        root: the folder of these folders.
        class_names: the class names of the head; characters that a folder's name cannot have are
            replaced.

    Attributes:
        copied: how many images were copied.
        there: how many images existed already, with the same content.
    """

    def __init__(self, root: str | Path, class_names: Sequence[str]) -> None:
        self.root = Path(local_path(root))
        if self.root.exists() and not self.root.is_dir():
            raise ImprintError(f"--sort_into {shown(self.root)} is a file: give a folder")
        self.copied = self.there = 0
        self._folders: dict[str, str] = {}
        taken: set[str] = set()
        for name in (NONE_NAME, *class_names):
            folder = _folder_name(name)
            # Add a number if the names of two classes become equal, or differ only in case, which
            # some disks ignore.
            number = next(n for n in count(1) if _numbered(folder, n).casefold() not in taken)
            self._folders[name] = _numbered(folder, number)
            taken.add(self._folders[name].casefold())

    def put(self, path: str, class_name: str) -> None:
        """Copies an image into the folder of a class.

        A file of the same name is never overwritten: the image gets a number, or is not copied if
        the two files are equal.

        Raises:
            ImprintError: the image cannot be copied.
        """
        folder = self.root / self._folders[class_name]
        base, suffix = os.path.splitext(os.path.basename(path))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for number in count(1):
                target = folder / f"{_numbered(base, number)}{suffix}"
                try:
                    # Create the file exclusively, so that no file is overwritten.
                    os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
                except FileExistsError:
                    if target.is_file() and filecmp.cmp(path, target, shallow=False):
                        self.there += 1
                        return
                    continue
                shutil.copyfile(path, target)
                shutil.copystat(path, target)
                self.copied += 1
                return
        except OSError as error:
            raise ImprintError(
                f"--sort_into: {shown(path)} cannot be copied into {shown(folder)} "
                f"({error.strerror}): give a place where you may write, with room for the images"
            ) from error

    def __str__(self) -> str:
        there = f" ({self.there:,} were there already)" if self.there else ""
        return f"sorted: {self.copied:,} images copied into {shown(self.root)}{there}"


def _folder_name(name: str) -> str:
    """Turns a class name into a valid name of a folder on any system: no path, dot or device."""
    text = re.sub(r'[/\\:*?"<>|\x00-\x1f]', "_", name).strip(" ").rstrip(".")[:100]
    if not text.strip(".") or re.fullmatch(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?", text):
        text = f"_{text}"
    return f"_{text[1:]}" if text.startswith(".") else text


def _numbered(name: str, number: int) -> str:
    return name if number == 1 else f"{name} ({number})"
