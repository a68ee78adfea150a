"""Pure tensor mathematics: it knows no rank, no recipe and no model."""
