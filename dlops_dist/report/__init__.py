"""Pages, tables and pictures of finished runs and of sweeps.

    python -m dlops_dist.report runs/A                   its page, runs/A/report/index.html, and its result as a table
    python -m dlops_dist.report runs/A runs/B            theirs, and one page of both: seeds, differences, curves
    python -m dlops_dist.report runs/SWEEP               its ranking, and what each parameter had to do with it
    python -m dlops_dist.report runs/A --format csv      the table alone, for programs

A page is one file that needs no network; a Markdown and a CSV table of the same figures lie beside it, and PNG pictures
beside a run's. Runs that differ in the seed alone are one row, their mean and standard deviation. Beside figures of the
study's own data stand those that it reported after its 10 epochs, never adjusted to one another: its metrics are
loosely defined.
"""

import argparse
from pathlib import Path

from dlops_dist.errors import OneLineParser, UserError


def main() -> None:
    parser = OneLineParser(
        prog="python -m dlops_dist.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run or of a sweep, or its URL")
    parser.add_argument(
        "--html", metavar="FILE", help="the page (default: of a run its report/index.html, of several one beside them)"
    )
    parser.add_argument("--format", choices=["table", "md", "csv", "json"], default="table", help="of what is printed")
    parser.add_argument("--recipe", help="of a run or sweep of your own recipe: its file, or its module's name")
    arguments = parser.parse_args()
    given = list(dict.fromkeys(arguments.runs))
    if arguments.recipe:
        from dlops_dist.config import load_recipe

        load_recipe(arguments.recipe)

    from dlops_dist.report.printing import Printed
    from dlops_dist.report.writing import write_run, write_runs, write_sweep
    from dlops_dist.sweep.folder import SweepFolder, is_sweep

    sweeps = [place for place in given if is_sweep(Path(place))]
    runs = [place for place in given if place not in sweeps]
    if arguments.html and (len(sweeps) > 1 or (sweeps and runs)):
        raise UserError("--html: a page is of one sweep, or of runs; report them one after the other")
    told = Printed(arguments.format)
    for place in sweeps:
        write_sweep(SweepFolder.open(Path(place).absolute()), told, arguments.html)
    if len(runs) == 1:
        write_run(runs[0], told, arguments.html, arguments.recipe)
    elif runs:
        write_runs(runs, told, arguments.html, arguments.recipe)
