"""Files and folders that appear under their name only when they are whole and on disk; numbers of written formats."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

# The number of each format that is written, and the version of this package that reads each earlier one. A file
# without a number is of format 1.
FORMATS = {"checkpoint": 1, "export": 1, "index": 1}
READERS: dict[tuple[str, int], str] = {}


def check_format(noun: str, found: int | None, where: Path) -> None:
    """ValueError, with the version that reads it, unless the `noun` at `where` is of the format of this version."""
    number = 1 if found is None else found
    if number == FORMATS[noun]:
        return
    reader = READERS.get((noun, number), "a later version")
    raise ValueError(
        f"{str(where)!r} is of {noun} format {number}, this version reads {FORMATS[noun]}; "
        f"{reader} of mvpretrain reads it: install that one, or write the {noun} anew"
    )


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path aside to write to, whose file becomes `path` when the block ends well and vanishes when it does not.

    What was at `path` before stays readable until it is replaced. FileNotFoundError: the folder above is not there.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    part = aside(path)
    try:
        yield part
        move_into_place(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """A text file in UTF-8 that is never seen half written."""
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8")


@contextmanager
def fresh_folder(out: Path) -> Iterator[Path]:
    """A folder aside that becomes `out` when the block ends well, and vanishes when it does not.

    ValueError: `out` exists and is not an empty folder.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{str(out)!r} exists and is not an empty folder; give another, or remove it first")
    part = aside(out.absolute())
    part.mkdir(parents=True)
    try:
        yield part
        move_into_place(part, out)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def aside(path: Path) -> Path:
    """A hidden name beside `path` that nobody else has, on any host that shares the disk."""
    return path.with_name(f".{path.name}.{uuid4().hex[:12]}.part")


def move_into_place(part: Path, path: Path) -> None:
    """Give a written file or folder its name, once all of it is on disk; replaces what has that name.

    Costs one fsync a file and folder. A folder that is replaced is gone for a moment before.
    """
    for folder, _, names in os.walk(part):
        for name in names:
            sync(Path(folder, name))
        sync(Path(folder))
    if part.is_dir():
        if path.is_dir():
            shutil.rmtree(path)
    else:
        sync(part)
    os.replace(part, path)
    sync(path.absolute().parent)


def sync(path: Path) -> None:
    """Wait until what a file holds, or which names a folder lists, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
