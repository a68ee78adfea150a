"""`python -m mvpretrain`, which is how launchers start a rank."""

from mvpretrain.cli.commands import main

main()
