"""The command groups: their arguments, each handed to `localdpo.console`. `localdpo.cli` puts them together."""
