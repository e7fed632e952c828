"""Finds the image files of a folder, and reports the files that are left out."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from imprint_pl.data.decode import HEIF_CURE, HEIF_EXTENSIONS, extensions, holds_image, is_heif
from imprint_pl.errors import ImprintError, shown
from imprint_pl.files import local_path
from imprint_pl.numerics.labels import composed

# Folders that systems and programs put beside images: from macOS's zip files, thumbnails of network
# storage, recycle bins, and Windows.
NOT_OURS = (
    *("__macosx", "@eadir", "#recycle", "$recycle.bin", "lost+found", "__pycache__"),
    "system volume information",
)

# System files that are left out without a warning.
LITTER = ("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r")

COMPANIONS = (
    *(".aae", ".cfg", ".csv", ".db", ".htm", ".html", ".ini", ".ipynb", ".json", ".jsonl"),
    *(".lnk", ".log", ".md", ".py", ".rst", ".sh", ".toml", ".tsv", ".txt", ".url"),
    *(".xml", ".xmp", ".yaml", ".yml"),
)

# How many folders and kinds of files a message names.
FOLDERS_SHOWN, KINDS_SHOWN = 5, 6


def find_images(folder: str | Path, left_out: Counter | None = None) -> Iterator[str]:
    """Yield the image files below a folder, sorted, without hidden files and folders.

    Args:
        folder: The folder to search, with its subfolders.
        left_out: Gets the numbers of files that are left out, by kind (see `_kind_left_out`).

    Raises:
        ImprintError: If a folder may not be listed.
    """
    seen = set()
    for place, folders, files in os.walk(folder, followlinks=True, onerror=_not_listed):
        # Without this check a link to a folder further up would be followed dozens of times.
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted((name for name in folders if not _is_foreign(name)), key=composed)
        # Sort composed names: random draws depend on the order, and must be the same for a copy of
        # the folder on another system.
        for name in sorted(files, key=composed):
            path = os.path.join(place, name)
            if _is_image(path):
                yield path
            elif left_out is not None and (kind := _kind_left_out(path)):
                left_out[kind] += 1


def _not_listed(error: OSError) -> None:
    raise ImprintError(
        f"cannot list the folder {shown(error.filename)} ({error.strerror}): allow it, or move the "
        "folder away"
    ) from error


def _is_image(path: str) -> bool:
    base, extension = os.path.splitext(os.path.basename(path))
    if base.startswith("."):
        return False
    if extension in ("", "."):
        return holds_image(path)
    return extension.lower() in extensions()


def _kind_left_out(path: str) -> str:
    """Return the ending of a file that is not read; empty where a warning need not count it."""
    name = os.path.basename(path)
    kind = os.path.splitext(name)[1].lower()
    if name.startswith(".") or name.lower() in LITTER or kind in COMPANIONS:
        return ""
    if kind in ("", "."):
        return HEIF_EXTENSIONS[0] if is_heif(path) else ""
    return kind


def warn_of_left_out(left_out: dict[str, Counter]) -> None:
    """Warn of the files that are left out, counted by folder and kind."""
    left_out = {place: counts for place, counts in left_out.items() if counts}
    if not left_out:
        return
    kinds = sum(left_out.values(), Counter())
    total, several = kinds.total(), len(left_out) > 1
    where = ", ".join(
        f"{shown(place)}{f' ({counts.total()})' * several}"
        for place, counts in list(left_out.items())[:FOLDERS_SHOWN]
    )
    if len(left_out) > FOLDERS_SHOWN:
        where += f" and {len(left_out) - FOLDERS_SHOWN} more folders"
    rank_zero_warn(
        f"{total} file{'s' * (total > 1)} in {where} {'are' if total > 1 else 'is'} left out: "
        f"{_kinds(kinds)}"
    )


def other_kinds(left_out: Counter) -> str:
    """Return an addition to the error of a folder that holds only files of other kinds."""
    return f" that is read here ({_kinds(left_out)})" if left_out else ""


def _kinds(counts: Counter) -> str:
    named = [f"{count} {shown(kind)}" for kind, count in counts.most_common(KINDS_SHOWN)]
    if len(counts) > KINDS_SHOWN:
        named.append(f"{len(counts) - KINDS_SHOWN} more kinds")
    # HEIC is counted only where pillow-heif is not installed.
    cure = f"; HEIC needs pillow-heif: {HEIF_CURE}" if set(counts) & set(HEIF_EXTENSIONS) else ""
    verb = "is" if counts.total() == 1 else "are"
    return f"{', '.join(named)} {verb} not read here{cure}"


def tell_loose_images(folder: Path) -> None:
    """Tell how many images lie beside the class folders."""
    with os.scandir(folder) as entries:
        loose = sum(entry.is_file() and _is_image(entry.path) for entry in entries)
    if loose:
        rank_zero_info(
            f"{loose} image{'s' * (loose > 1)} in {shown(folder)} itself, beside the class "
            f"folders, {'are' if loose > 1 else 'is'} left out: move them into a class folder"
        )


def subfolders(folder: Path) -> list[str]:
    """Return the names of a folder's subfolders, sorted, without hidden and system folders."""
    if not folder.is_dir():
        raise ImprintError(
            f"the folder {folder} does not exist or is no folder: set root to the folder that "
            "holds train/<class>/ or <class>/"
        )
    with os.scandir(folder) as entries:
        names = [e.name for e in entries if e.is_dir() and not _is_foreign(e.name)]
    return sorted(names, key=composed)


def _is_foreign(folder: str) -> bool:
    """Return whether a folder of this name is hidden or belongs to the system."""
    return folder.startswith(".") or folder.lower() in NOT_OURS


def holds_images(folder: Path) -> bool:
    """Return whether there are images in the folder or below it."""
    return next(find_images(folder), None) is not None


def listed(folders: Iterable[str | Path]) -> str:
    """Name folders in a message, as in `cat/, dog/ and fox/`; at most six."""
    names = [f"{Path(folder).name}/" for folder in folders]
    if len(names) > 6:
        names = [*names[:6], f"{len(names) - 6} more"]
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def has_own_images(folder: Path) -> bool:
    """Return whether there are images in the folder itself, not only in its subfolders."""
    with os.scandir(folder) as entries:
        return any(e.is_file() and _is_image(e.path) for e in entries)


def files_at(place: str, left_out: dict[str, Counter]) -> Sequence[str]:
    """Return the image files that a path or pattern names.

    Args:
        place: A file, a folder, or a pattern.
        left_out: Gets the numbers of files that are left out, by kind, under the path.

    Raises:
        ImprintError: If there is no image file.
    """
    path = local_path(place)
    if os.path.isfile(path):
        return [path]
    counts: Counter[str] = Counter()
    if os.path.isdir(path):
        found = list(find_images(path, counts))
    else:
        found = []
        for match in sorted(glob.glob(path, recursive=True)):
            if os.path.isdir(match):
                found += find_images(match, counts)
            elif _is_image(match):
                found.append(match)
            elif kind := _kind_left_out(match):
                counts[kind] += 1
    if not found:
        exists = "holds no image" if os.path.isdir(path) else "matches no image file"
        raise ImprintError(
            f"'{shown(place)}' {exists}{other_kinds(counts)} ({', '.join(extensions())}): check "
            f"the path, which is relative to {shown(os.getcwd())}"
        )
    left_out[path] = counts
    return found
