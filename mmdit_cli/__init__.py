"""The `mmdit` command. Nothing imports this package; it imports the others inside commands, so that help is quick."""
