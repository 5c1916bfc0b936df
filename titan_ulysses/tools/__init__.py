"""What users do with data, runs and models beside training: a module for each subcommand."""

from __future__ import annotations

from argparse import ArgumentParser, RawDescriptionHelpFormatter


def parser_of(command: str, description: str | None) -> ArgumentParser:
    """Return the parser of a subcommand, which shows the docstring of its module as it is."""
    return ArgumentParser(
        prog=f"titan-ulysses {command}",
        description=description,
        formatter_class=RawDescriptionHelpFormatter,
    )
