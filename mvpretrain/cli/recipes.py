"""`mvpretrain recipe ...`"""

from __future__ import annotations

import json
from pathlib import Path

import typer

from mvpretrain.cli.arguments import Overrides

app = typer.Typer(help="Look at recipes.", no_args_is_help=True)


@app.command()
def schema() -> None:
    """JSON schema of recipes, for editors: put `# yaml-language-server: $schema=FILE` on a recipe's first line."""
    from mvpretrain.recipe import schema

    print(json.dumps(schema(), indent=1))


@app.command("show")
def resolved(recipe: Path, overrides: Overrides = None) -> None:
    """The resolved recipe, every default filled in."""
    from mvpretrain.recipe import load

    print(load(recipe, overrides or ()).dump(), end="")
