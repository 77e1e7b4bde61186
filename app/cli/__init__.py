"""The command line, one file per command group; thin: parts come from bootstrap."""
