"""`python -m mmdit_cli` is `mmdit`; torchrun starts it so."""

from mmdit_cli.main import main

main()
