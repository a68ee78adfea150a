"""`mvpretrain ...`: thin commands over the functions of the package, one file a group of commands."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from mvpretrain.cli import exports, recipes, runs, shards

# Exit codes: a user's mistake, a run that cannot go on, a device out of memory. 75 is a run that stopped and saved.
USER, FAILED, MEMORY = 2, 3, 4

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)
app.add_typer(runs.app)
app.add_typer(exports.app)
app.add_typer(shards.app, name="shards")
app.add_typer(recipes.app, name="recipe")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"mvpretrain {sys.modules['mvpretrain'].__version__}")
        raise typer.Exit


Version = Annotated[bool, typer.Option("--version", help="print it and stop", callback=_print_version, is_eager=True)]


@app.callback()
def options(version: Version = False) -> None:
    """Contrastive pretraining of encoders on things seen through k >= 2 views."""


def main() -> None:
    """The console script: a user's mistake is one sentence on stderr and exit code 2, never a traceback."""
    # The deepspeed launcher gives the rank twice, in the environment and as an option that nobody asked for.
    sys.argv[1:] = [word for word in sys.argv[1:] if not word.startswith("--local_rank=")]
    try:
        app(standalone_mode=True)
    except ValueError as error:
        exit_with(error, USER)
    except (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        where = f"{error.strerror}: {error.filename!r}" if error.filename else error
        exit_with(f"{where}; correct the path, or its permissions", USER)
    except FloatingPointError as error:
        exit_with(error, FAILED)
    except RuntimeError as error:
        # torch's own class, which is not imported for every command; on CPUs it is a plain RuntimeError
        if type(error).__name__ != "OutOfMemoryError" and "can't allocate memory" not in str(error):
            raise
        reason = str(error).rpartition("Allocator: ")[2].partition(". ")[0].removeprefix("CUDA ")
        remedy = "`mvpretrain train RECIPE --dry-run` says what takes it and which switch to turn"
        exit_with(f"{reason}; {remedy}", MEMORY)


def exit_with(error: Exception | str, code: int) -> None:
    """Print the sentence on stderr and end the process, which may be one of many ranks."""
    rank = os.environ.get("RANK", "0")
    print(f"mvpretrain{'' if rank == '0' else f' (rank {rank})'}: {error}", file=sys.stderr)
    if "mvpretrain.engine" in sys.modules:
        sys.modules["mvpretrain.engine"].shutdown(code)
    sys.exit(code)
