"""`mvpretrain recipe ...`"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated

import typer
import yaml

from mvpretrain.cli.arguments import Cache, Overrides, RecipePath, Urls
from mvpretrain.cli.terminal import print_text

app = typer.Typer(help="Write a starter recipe from shards, look at recipes.", no_args_is_help=True)


@app.command()
def new(
    urls: Urls,
    out: Annotated[Path | None, typer.Option(help="a YAML file to write; without it the recipe is printed")] = None,
    cache: Cache = None,
) -> None:
    """Write a starter recipe, with a comment on every line: fields of shards as views, statistics, small encoders."""
    from mvpretrain.cli.starter import starter
    from mvpretrain.data.guess import guess
    from mvpretrain.recipe import parse

    if out and out.exists():
        raise ValueError(f"{str(out)!r} exists; give another file, or remove it first")
    found = guess(urls, cache)
    name = str(out or "first.yaml")
    text = starter(found, f"runs/{Path(name).stem}", f"mvpretrain recipe new {shlex.join(urls)}", name, cache)
    parse(yaml.safe_load(text))
    if not out:
        return print(text, end="")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    print_text(f"{out}: " + ", ".join(f"{view.name} ({view.settings['kind']})" for view in found.views))
    for field, why in found.others.items():
        print_text(f"not a view: {field}: {why}")
    return print_text(f"next: mvpretrain train {out} --dry-run")


@app.command()
def schema() -> None:
    """JSON schema of recipes, for editors: put `# yaml-language-server: $schema=FILE` on a recipe's first line."""
    from mvpretrain.recipe import schema

    print(json.dumps(schema(), indent=1))


@app.command("show")
def resolved(recipe: RecipePath, overrides: Overrides = None) -> None:
    """The resolved recipe: what it extends put in, every default filled in. Imports no class that the recipe names."""
    from mvpretrain.recipe import load
    from mvpretrain.registry import externals_as_written

    with externals_as_written():
        print(load(recipe, overrides or ()).dump(), end="")
