"""`mvpretrain shards ...`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from mvpretrain.cli.arguments import Cache, Trust, Urls
from mvpretrain.cli.terminal import console, print_text

app = typer.Typer(help="Pack samples into WebDataset tars, index, check and look at them.", no_args_is_help=True)


@app.command()
def pack(
    source: Annotated[Path, typer.Argument(help="a folder of files, or a table: .csv .tsv .jsonl .parquet")],
    out: Annotated[Path, typer.Argument(help="the folder to write")],
    name: Annotated[str, typer.Option(help="shards are called NAME-000000.tar")] = "shard",
    shard_samples: Annotated[int, typer.Option(help="the most samples of a shard")] = 10_000,
    shard_bytes: Annotated[int, typer.Option(help="the most bytes of a shard")] = 1_000_000_000,
    seed: Annotated[int, typer.Option(help="of the shuffle; -1 keeps the order")] = 0,
    field: Annotated[list[str] | None, typer.Option(help="only these fields; column:field in a table")] = None,
    label_folders: Annotated[
        bool, typer.Option("--label-folders", help="the first sub-folder's name is the class")
    ] = False,
) -> None:
    """Write samples to WebDataset tars, with their index."""
    from mvpretrain.shards.pack import pack

    fields, order = tuple(field or ()), None if seed < 0 else seed
    limits = {"shard_samples": shard_samples, "shard_bytes": shard_bytes}
    print_text(str(pack(source, out, name=name, seed=order, fields=fields, label_folders=label_folders, **limits)))


@app.command()
def index(
    urls: Urls,
    out: Annotated[Path | None, typer.Option(help="default: index.json beside the first shard")] = None,
    cache: Cache = None,
) -> None:
    """Write what is in the shards, so that a run need not look: a JSON file that webdataset's wids reads as well."""
    from mvpretrain.shards.index import Index

    found = Index.scan(urls, cache)
    out = out or Path(found.shards[0].url).parent / "index.json"
    found.save(out)
    table = Table("shard", "samples", "MB", *found.fields)
    for shard in found.shards:
        counts = (str(shard.fields.get(field, 0)) for field in found.fields)
        table.add_row(Path(shard.url).name, f"{shard.nsamples:,}", f"{shard.filesize / 1e6:.1f}", *counts)
    console.print(table)
    for problem in found.problems:
        print_text(f"{problem.url}: {problem.reason}")
    print_text(f"{len(found):,} samples in {len(found.shards)} shards: {out}")


@app.command()
def check(
    urls: Urls,
    recipe: Annotated[Path | None, typer.Option(help="decode as this recipe's views do, not by field ending")] = None,
    cache: Cache = None,
    trust: Trust = False,
) -> None:
    """Decode every sample; exit code 1 when something is wrong."""
    from mvpretrain.shards.check import check

    views = None
    if recipe:
        from mvpretrain.data.build import build_transforms
        from mvpretrain.recipe import load

        views = build_transforms(load(recipe, trust=trust).views, augmented=False)
    report = check(urls, views, cache)
    for title, rows in (("not decodable", report.reasons), ("tars cut off", report.truncated)):
        for name, what in rows.items():
            print_text(f"{title}: {name}: {what}")
    for p in report.examples:
        print_text(f"  for example {p.key} in {p.shard}, field {p.field}: {p.reason}")
    if report.duplicates:
        print_text(f"keys that repeat: {len(report.duplicates)}, for example {report.duplicates[0]!r}")
    for shard, fields in report.missing.items():
        print_text(f"missing in {shard}: " + ", ".join(f"{f} in {n} samples" for f, n in fields.items()))
    for field, count in report.unchecked.items():
        print_text(f"not looked at, unknown ending: {field} ({count} times)")
    print_text(f"{report.ok:,} of {report.samples:,} samples decode")
    raise typer.Exit(0 if report.good else 1)


@app.command()
def show(
    urls: Urls,
    out: Annotated[Path, typer.Option(help="NAME.html, or NAME.png for a contact sheet")] = Path("shards.html"),
    count: Annotated[int, typer.Option(help="samples on the page")] = 24,
    seed: Annotated[int, typer.Option(help="of the choice of samples")] = 0,
    cache: Cache = None,
) -> None:
    """A page of samples, all fields side by side."""
    from mvpretrain.data.browse import show

    print_text(str(show(urls, out, count, seed, cache)))
