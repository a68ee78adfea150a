"""Folders of files and tables of paths and values, as plans of samples that `pack` reads one by one."""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from mvpretrain.config import unknown

# Endings whose content is no text: a table's value under one of them can only be a path.
BINARY = {"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "wav", "flac", "mp3", "ogg", "opus", "mp4"}
BINARY |= {"npy", "npz", "pt", "pth", "bin"}
FIELD = re.compile(r"[a-z_][\w-]*(\.[a-z_][\w-]*)*")


class Plan(NamedTuple):
    """A sample before it is read: its fields are values, or paths of files."""

    key: str
    origin: str  # the file or row to name in an error
    fields: dict[str, Any]

    def read(self) -> dict[str, Any]:
        values = {f: v.read_bytes() if isinstance(v, Path) else v for f, v in self.fields.items()}
        return {"__key__": self.key, **values}


def safe(name: str) -> str:
    """A name as a key: a dot would end the key in the tar, a slash would look like a folder."""
    return re.sub(r"[^\w-]+", "_", name)


def refuse_repeats(plans: Sequence[Plan]) -> None:
    """ValueError where two plans have one key, before anything is read."""
    origins: dict[str, str] = {}
    for plan in plans:
        if plan.key in origins:
            raise ValueError(
                f"key {plan.key!r} comes twice, from {origins[plan.key]!r} and {plan.origin!r}; "
                "keys must be unique, also after dots and slashes become '_': rename one"
            )
        origins[plan.key] = plan.origin


def folder_plans(source: Path, fields: Sequence[str]) -> list[Plan]:
    """The files of a folder and its sub-folders, hidden ones left out, grouped by all that precedes the first dot."""
    groups: dict[str, dict[str, Path]] = {}
    for path in sorted(p for p in source.rglob("*") if p.is_file()):
        name = path.relative_to(source)
        if any(part.startswith(".") for part in name.parts):
            continue
        stem, _, ending = path.name.partition(".")
        field = ending.lower()
        if fields and field not in fields:
            continue
        if not FIELD.fullmatch(field):
            raise ValueError(
                f"file {str(name)!r} would be the field {field!r}; what follows the first dot of a name must be an "
                "ending such as 'jpg' or 'fou.npy': rename it, or list the fields to pack"
            )
        group = groups.setdefault(str(name.with_name(stem)), {})
        if field in group:
            raise ValueError(f"files {str(name)!r} and {group[field].name!r} are one field of one sample; remove one")
        group[field] = path
    return [Plan(safe(stem), stem, dict(group)) for stem, group in groups.items()]


def labelled(source: Path, plans: list[Plan], classes: Sequence[str] | None) -> tuple[list[Plan], list[str]]:
    """Plans with a field `cls`, the number of their first sub-folder among the classes; and the classes."""
    folders = []
    for plan in plans:
        name = next(iter(plan.fields.values())).relative_to(source)
        if len(name.parts) < 2 or "cls" in plan.fields:
            raise ValueError(f"{str(name)!r} lies in no class folder or has a '.cls' file; pack without label folders")
        folders.append(name.parts[0])
    names = list(classes or sorted(set(folders)))
    for folder in folders:
        if folder not in names:
            raise ValueError(unknown("class folder", folder, names))
    return [p._replace(fields={**p.fields, "cls": names.index(f)}) for p, f in zip(plans, folders)], names


def table_plans(path: Path, fields: Sequence[str]) -> list[Plan]:
    """The rows of a table in order; rows count from 1, the header not among them."""
    rows = list(table_rows(path))
    columns = list(dict.fromkeys(chain.from_iterable(rows)))
    naming = next((c for c in ("key", "id") if c in columns), None)
    plans = []
    for number, row in enumerate(rows, start=1):
        key = str(row.get(naming) or "") if naming else f"{number - 1:08d}"
        if not key:
            raise ValueError(f"row {number} of {path.name!r} has an empty {naming!r}; every sample needs a name")
        plans.append(Plan(safe(key), f"row {number}", {}))
    for column, field in chosen(columns, fields or [c for c in columns if c != naming], path):
        add_column(plans, [row.get(column) for row in rows], column, field, path.parent)
    for plan in plans:
        if not plan.fields:
            raise ValueError(f"{plan.origin} of {path.name!r} has no value in any column that is packed; leave it out")
    return plans


def chosen(columns: Sequence[str], wanted: Iterable[str], path: Path) -> Iterator[tuple[str, str]]:
    """(column, the field it is named for or "") of `column` and `column:field`, which may be the header itself."""
    for entry in wanted:
        name, _, field = entry.partition(":")
        column = entry if entry in columns else name
        if column not in columns:
            raise ValueError(unknown(f"column in {path.name!r}", column, columns))
        yield column, field


def add_column(plans: list[Plan], values: list[Any], column: str, field: str, root: Path) -> None:
    """Put one column's values into the plans, as paths where the column holds files."""
    paths = holds_files([v for v in values if v not in (None, "")], field or column, root)
    for plan, value in zip(plans, values):
        if value is None or value == "":
            continue
        where, name = f"{plan.origin}, column {column!r}", field or column
        if paths:
            if not os.path.isfile(root / str(value)):
                raise ValueError(f"{where}: no file {str(value)!r} in {str(root)!r}; mend the path or empty the cell")
            ending = Path(value).suffix[1:].lower()
            named = field or ending_of(column) in {ending} | BINARY
            name, value = name if named else ending, root / value
        name = name.lower()
        if not FIELD.fullmatch(name):
            raise ValueError(f"{where}: {name!r} cannot name a field; select it as 'column:field', such as 'photo:jpg'")
        if name in plan.fields:
            raise ValueError(f"{where}: the sample has a field {name!r} already; select it as '{column}:left.{name}'")
        plan.fields[name] = value


def holds_files(values: list[Any], name: str, root: Path) -> bool:
    """Whether a column is one of paths: its name or first value has a binary file's ending, or some value is a file."""
    if not values or not all(isinstance(v, str) for v in values):
        return False
    if ending_of(name) in BINARY or ending_of(values[0]) in BINARY:
        return True
    return any(os.path.isfile(root / v) for v in values)


def ending_of(name: str) -> str:
    return name.rpartition(".")[2].lower()


def table_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a .csv, .tsv, .jsonl or .parquet. ValueError: another ending, or a row that cannot be read."""
    readers = {"csv": csv_rows, "tsv": csv_rows, "jsonl": json_rows, "parquet": parquet_rows}
    if ending_of(path.name) not in readers:
        raise ValueError(unknown("ending of a table", ending_of(path.name), readers))
    return readers[ending_of(path.name)](path)


def csv_rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file, delimiter="\t" if ending_of(path.name) == "tsv" else ",", strict=True)
        try:
            header = next(reader, [])
            if len(set(header)) < len(header):
                raise ValueError(f"the header of {path.name!r} names a column twice: {header}; rename one")
            for number, row in enumerate((r for r in reader if r), start=1):
                if len(row) != len(header):
                    raise ValueError(f"row {number} of {path.name!r} has {len(row)} cells, the header {len(header)}")
                yield dict(zip(header, row))
        except csv.Error as error:
            raise ValueError(f"line {reader.line_num} of {path.name!r} is no CSV: {error}") from error


def json_rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate((s for s in file if s.strip()), start=1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"row {number} of {path.name!r} is no JSON: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"row {number} of {path.name!r} is a {type(row).__name__}, an object is needed")
            yield row


def parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError(f"{path.name!r} needs pyarrow; pip install 'mvpretrain[parquet]'") from error
    for batch in parquet.ParquetFile(path).iter_batches():
        yield from batch.to_pylist()
