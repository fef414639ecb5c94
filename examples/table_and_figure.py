"""The command line of the scripts that write one table (.csv) and one figure (.png)."""

import argparse
from pathlib import Path


def table_parser(description: str, seeds: int, seeds_help: str) -> argparse.ArgumentParser:
    """Returns a parser with the options --output-dir, --seeds and --force."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output-dir", type=Path, required=True, help="directory for the table and figure")
    parser.add_argument("--seeds", type=int, default=seeds, help=f"{seeds_help} (default: {seeds})")
    parser.add_argument("--force", action="store_true", help="overwrite existing files")
    return parser


def parse_options(parser: argparse.ArgumentParser, name: str) -> tuple[argparse.Namespace, Path, Path]:
    """Returns (options, path of the table, path of the figure).

    Checks the options and creates the directory.
    """
    options = parser.parse_args()
    if options.seeds < 1:
        parser.error(f"--seeds must be at least 1. Received: {options.seeds}")
    table, figure = (options.output_dir / f"{name}.{suffix}" for suffix in ("csv", "png"))
    for path in (table, figure):
        if path.exists() and not options.force:
            parser.error(f"{path} exists. --force overwrites it.")
    options.output_dir.mkdir(parents=True, exist_ok=True)
    return options, table, figure
