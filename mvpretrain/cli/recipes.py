"""`mvpretrain recipe ...`"""

from __future__ import annotations

import json

import typer

from mvpretrain.cli.arguments import Overrides, RecipePath

app = typer.Typer(help="Look at recipes.", no_args_is_help=True)


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
