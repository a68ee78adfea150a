"""Arguments and options that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RecipePath = Annotated[Path, typer.Argument(help="a recipe's YAML file, or the folder of a run")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key.sub=value, any setting of the recipe")]
Trust = Annotated[bool, typer.Option("--trust", help="run the classes and commands that a folder's recipe names")]
Memory = Annotated[str | None, typer.Option(help="what one rank may use, such as 40GiB")]
Exported = Annotated[Path, typer.Argument(help="a folder that `export` wrote")]
ViewNames = Annotated[list[str] | None, typer.Option(help="only this view (may be repeated)")]
Urls = Annotated[list[str], typer.Argument(help="tars: paths, braces {0000..0009}, globs, pipe:, http(s)://, s3://")]
Cache = Annotated[Path | None, typer.Option(help="folder that remote shards are copied to")]
