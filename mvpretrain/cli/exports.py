"""Commands about trained encoders: write them, judge them, embed with them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mvpretrain.cli.arguments import Exported, Trust, ViewNames
from mvpretrain.cli.terminal import print_text

app = typer.Typer()


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="the folder of a run")],
    out: Annotated[Path, typer.Argument(help="the folder to write, which must not exist")],
    view: ViewNames = None,
    checkpoint: Annotated[str, typer.Option(help="last, best, or a step")] = "last",
    format: Annotated[str, typer.Option(help="a kind of mvpretrain/export/formats, or package.module:Class")] = "own",
    trust: Trust = False,
) -> None:
    """Write each view's encoder to a folder that stands alone, and prove that it gives the run's embeddings."""
    from mvpretrain.export.write import export_run

    export_run(run, out, view, checkpoint, format, trust)
    print_text(f"exported, equal to the run: {out}")


@app.command()
def evaluate(exported: Exported, trust: Trust = False) -> None:
    """Retrieval between all views and probes of each encoder, against chance, untrained encoders and raw inputs."""
    from mvpretrain.report.evaluate import evaluate_export

    evaluate_export(exported, trust=trust)


@app.command()
def embed(
    exported: Exported,
    urls: Annotated[str, typer.Argument(help="tars: paths, braces {0000..0009}, globs, remote urls")],
    out: Annotated[Path, typer.Argument(help="a folder for .npy files, or a .parquet file")],
    view: ViewNames = None,
    batch: Annotated[int, typer.Option(help="samples that are encoded at a time")] = 256,
    limit: Annotated[int | None, typer.Option(help="only the first so many samples")] = None,
    trust: Trust = False,
) -> None:
    """Embed shards with exported encoders; ids and keys are written along."""
    from mvpretrain.export.embed import embed

    embed(exported, urls, out, view, batch, limit, trust=trust)
