"""The commands that show what is known, and load no model: report, compare, doctor."""

from pathlib import Path
from typing import Annotated

import typer

import expertune
from expertune.cli.arguments import Json, RunDir, Verbose
from expertune.terminal import importing, log, print_json, print_table, stdout_for_results, working


def report(run_dir: RunDir) -> None:
    """Write a run's page anew: one HTML file that needs no network. Prints its path. Loads no model."""
    record = expertune.RunRecord.load(run_dir)
    from expertune.report.page import write_page

    print(write_page(record.values, run_dir))


def compare(
    run_dirs: Annotated[list[Path], typer.Argument(metavar="RUN_DIR", help="Run directories, two or more.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="The page to write.")] = Path("comparison.html"),
    as_json: Json = False,
) -> None:
    """Compare runs: settings that differ, scores, cost and curves, as a table and as a page. Loads no model.

    The page is one HTML file that needs no network. It is written into the working directory, and its path is printed
    on stderr.
    """
    if len(run_dirs) < 2:
        raise typer.BadParameter("give two run directories or more", param_hint="RUN_DIR")
    records = [(str(folder), expertune.RunRecord.load(folder).values) for folder in run_dirs]
    from expertune.report.compare import compare, render_comparison, write_comparison

    compared = compare(records)
    write_comparison(compared, out)
    if as_json:
        print_json(compared.to_json())
    else:
        print_table(render_comparison(compared))
    log(f"page: {out.absolute()}")


def doctor(as_json: Json = False, verbose: Verbose = False) -> None:
    """Show what this machine has, and what of it Expertune will use."""
    with stdout_for_results(), working("looking at this machine"):
        with importing():
            from expertune.doctor import collect, render

        found = collect()
    if as_json:
        print_json(found)
    else:
        print_table(render(found))
