"""The commands of the command line, but those that register; `fnreg.cli` puts them together and runs them."""
