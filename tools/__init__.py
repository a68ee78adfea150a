"""Data, benchmarks and comparisons around the package; nothing here is installed with it."""
