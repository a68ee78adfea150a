"""`python -m mvpretrain`, which is how launchers start a rank."""

from mvpretrain.cli import main

main()
