"""What is held against what: two runs, two states of the package."""
