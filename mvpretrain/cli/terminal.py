"""Where commands print what a person reads."""

from __future__ import annotations

from rich.console import Console

console = Console()


def print_text(text: str) -> None:
    """Print text as it is: no markup, no colours, no line breaks of the console's own."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)
