"""`mvpretrain ...`: thin commands over the functions of the package."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)
shards = typer.Typer(help="Pack samples into WebDataset tars, index, check and look at them.", no_args_is_help=True)
recipes = typer.Typer(help="Look at recipes.", no_args_is_help=True)
app.add_typer(shards, name="shards")
app.add_typer(recipes, name="recipe")
console = Console()

# Exit codes: a mistake in what was asked for; a run that cannot go on; a GPU's memory ended. 75: stopped, resumable
USER, FAILED, MEMORY = 2, 3, 4

Memory = Annotated[str | None, typer.Option(help="what one rank may use, such as 40GiB")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key.sub=value, any setting of the recipe")]


def main() -> None:
    """The console script: a user's mistake is one sentence on stderr and exit code 2, never a traceback."""
    # The deepspeed launcher says the rank twice, by environment and by an option that nobody asked for.
    sys.argv[1:] = [word for word in sys.argv[1:] if not word.startswith("--local_rank=")]
    try:
        app(standalone_mode=True)
    except ValueError as error:
        leave(error, USER)
    except (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        where = f"{error.strerror}: {error.filename!r}" if error.filename else error
        leave(f"{where}; correct the path, or its permissions", USER)
    except FloatingPointError as error:
        leave(error, FAILED)
    except RuntimeError as error:
        # torch's, which is not imported for every command; on CPUs it has no class of its own
        if type(error).__name__ != "OutOfMemoryError" and "can't allocate memory" not in str(error):
            raise
        told = str(error).rpartition("Allocator: ")[2].partition(". ")[0].removeprefix("CUDA ")
        leave(f"{told}; `mvpretrain train RECIPE --dry-run` says what takes it and which switch to turn", MEMORY)


def leave(error: Exception | str, code: int) -> None:
    """Print the sentence and end the process, which may be one of many ranks."""
    rank = os.environ.get("RANK", "0")
    print(f"mvpretrain{'' if rank == '0' else f' (rank {rank})'}: {error}", file=sys.stderr)
    if "mvpretrain.engine" in sys.modules:
        sys.modules["mvpretrain.engine"].shutdown(code)
    sys.exit(code)


def say(text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="a recipe's YAML file, or the folder of a run")],
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option(help="go on from the run's last checkpoint")] = False,
    dry_run: Annotated[bool, typer.Option(help="say what the run would be and take in memory, then stop")] = False,
    memory: Memory = None,
    file: Annotated[Path | None, typer.Option("--json", help="a file for the dry run's memory figures")] = None,
) -> None:
    """Train: alone, or started by torchrun, accelerate launch or deepspeed."""
    from mvpretrain.recipe import load

    settings = load(recipe, overrides or ())
    if dry_run:
        from mvpretrain.profiling.dry_run import print_dry_run
        from mvpretrain.profiling.measure import parse_bytes
        from mvpretrain.training.train import checkpoint_to_resume

        say(settings.dump())
        checkpoint_to_resume(settings, resume)
        plan = print_dry_run(settings, console, parse_bytes(memory) if memory else None)
        if file:
            file.write_text(json.dumps({**plan._asdict(), "peak": plan.peak}, indent=1) + "\n")
        return None
    if memory or file:
        raise ValueError("--memory and --json are about --dry-run; add that, or leave them out")
    from mvpretrain.engine import shutdown
    from mvpretrain.training.train import PREEMPTED, Preempted, train

    try:
        run = train(settings, resume)
    except Preempted as stop:
        if os.environ.get("RANK", "0") == "0":
            say(str(stop))
        return shutdown(PREEMPTED)
    if os.environ.get("RANK", "0") == "0":
        say(f"done: {run}")
    return shutdown(0)


@app.command()
def bench(
    recipe: Annotated[Path, typer.Argument(help="a recipe's YAML file, or the folder of a run")],
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(help="steps that are timed")] = 20,
    warmup: Annotated[int, typer.Option(help="steps before them")] = 3,
    profile: Annotated[Path | None, typer.Option(help="folder for a profiler's trace of some more steps")] = None,
    file: Annotated[Path | None, typer.Option("--json", help="a file for the figures")] = None,
    find_micro_batch: Annotated[bool, typer.Option(help="the largest engine.micro_batch that fits, by trial")] = False,
    memory: Memory = None,
) -> None:
    """Where the time and memory of a recipe's real steps go; under any launcher, as for `train`."""
    from mvpretrain.engine import shutdown
    from mvpretrain.profiling import bench as benchmark
    from mvpretrain.profiling.measure import parse_bytes
    from mvpretrain.recipe import load

    settings = load(recipe, overrides or ())
    if find_micro_batch:
        benchmark.find_micro_batch(settings, parse_bytes(memory) if memory else None, console)
        return None
    if memory:
        raise ValueError(f"--memory {memory} is the limit for --find-micro-batch; add that, or leave it out")
    found = benchmark.bench(settings, steps, warmup, profile)
    if found:
        benchmark.print_bench(found, console)
        if file:
            benchmark.write_json(found, file)
    return shutdown(0)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="the folder of a run")],
    out: Annotated[Path, typer.Argument(help="the folder to write, which must not exist")],
    view: Annotated[list[str] | None, typer.Option(help="only this view (may be repeated)")] = None,
    checkpoint: Annotated[str, typer.Option(help="last, best, or a step")] = "last",
) -> None:
    """Write each view's encoder as safetensors + JSON, and prove that what was written gives the same embeddings."""
    from mvpretrain.export.write import export_run

    export_run(run, out, view, checkpoint)
    say(f"exported, equal to the run: {out}")


@app.command()
def evaluate(exported: Annotated[Path, typer.Argument(help="a folder that `export` wrote")]) -> None:
    """Retrieval between all views and probes of each encoder, against chance, untrained encoders and raw inputs."""
    from mvpretrain.report.evaluate import evaluate_export

    evaluate_export(exported)


@app.command()
def embed(
    exported: Annotated[Path, typer.Argument(help="a folder that `export` wrote")],
    urls: Annotated[str, typer.Argument(help="tars: paths, braces {0000..0009}, globs, remote urls")],
    out: Annotated[Path, typer.Argument(help="a folder for .npy files, or a .parquet file")],
    view: Annotated[list[str] | None, typer.Option(help="only this view (may be repeated)")] = None,
    batch: int = 256,
    limit: int | None = None,
) -> None:
    """Embed shards with exported encoders; ids and keys are written along."""
    from mvpretrain.export.embed import embed

    embed(exported, urls, out, view, batch, limit)


Urls = Annotated[list[str], typer.Argument(help="tars: paths, braces {0000..0009}, globs, pipe:, http(s)://, s3://")]
Cache = Annotated[Path | None, typer.Option(help="folder that remote shards are copied to")]


@shards.command()
def pack(
    source: Annotated[Path, typer.Argument(help="a folder of files, or a table: .csv .tsv .jsonl .parquet")],
    out: Annotated[Path, typer.Argument(help="the folder to write")],
    name: Annotated[str, typer.Option(help="shards are called NAME-000000.tar")] = "shard",
    shard_samples: int = 10_000,
    shard_bytes: int = 1_000_000_000,
    seed: Annotated[int, typer.Option(help="of the shuffle; -1 keeps the order")] = 0,
    field: Annotated[list[str] | None, typer.Option(help="only these fields; column:field in a table")] = None,
    label_folders: Annotated[bool, typer.Option(help="the first sub-folder's name is the class")] = False,
) -> None:
    """Write samples to WebDataset tars, with their index."""
    from mvpretrain.shards.pack import pack

    fields, order = tuple(field or ()), None if seed < 0 else seed
    limits = {"shard_samples": shard_samples, "shard_bytes": shard_bytes}
    say(str(pack(source, out, name=name, seed=order, fields=fields, label_folders=label_folders, **limits)))


@shards.command()
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
        say(f"{problem.url}: {problem.reason}")
    say(f"{len(found):,} samples in {len(found.shards)} shards: {out}")


@shards.command()
def check(
    urls: Urls,
    recipe: Annotated[Path | None, typer.Option(help="decode as this recipe's views do, not by field ending")] = None,
    cache: Cache = None,
) -> None:
    """Decode every sample; exit code 1 when something is wrong."""
    from mvpretrain.shards.check import check

    views = None
    if recipe:
        from mvpretrain.data.build import build_transforms
        from mvpretrain.recipe import load

        views = build_transforms(load(recipe).views, augmented=False)
    report = check(urls, views, cache)
    for title, rows in (("not decodable", report.reasons), ("tars cut off", report.truncated)):
        for name, what in rows.items():
            say(f"{title}: {name}: {what}")
    for p in report.examples:
        say(f"  for example {p.key} in {p.shard}, field {p.field}: {p.reason}")
    if report.duplicates:
        say(f"keys that repeat: {len(report.duplicates)}, for example {report.duplicates[0]!r}")
    for shard, fields in report.missing.items():
        say(f"missing in {shard}: " + ", ".join(f"{f} in {n} samples" for f, n in fields.items()))
    for field, count in report.unchecked.items():
        say(f"not looked at, unknown ending: {field} ({count} times)")
    say(f"{report.ok:,} of {report.samples:,} samples decode")
    raise typer.Exit(0 if report.good else 1)


@shards.command()
def show(
    urls: Urls,
    out: Annotated[Path, typer.Option(help="NAME.html, or NAME.png for a contact sheet")] = Path("shards.html"),
    count: int = 24,
    seed: int = 0,
    cache: Cache = None,
) -> None:
    """A page of samples, all fields side by side."""
    from mvpretrain.data.browse import show

    say(str(show(urls, out, count, seed, cache)))


@recipes.command()
def schema() -> None:
    """JSON schema of recipes, for editors: put `# yaml-language-server: $schema=FILE` on a recipe's first line."""
    from mvpretrain.recipe import schema

    print(json.dumps(schema(), indent=1))


@recipes.command("show")
def resolved(recipe: Path, overrides: Overrides = None) -> None:
    """The resolved recipe, every default filled in."""
    from mvpretrain.recipe import load

    print(load(recipe, overrides or ()).dump(), end="")


if __name__ == "__main__":
    main()
