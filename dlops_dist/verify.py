"""Show on this machine that any number of workers computes what one computes, and what usual formulations give.

    python -m dlops_dist.verify
    python -m dlops_dist.verify --workers 1 2 3
    python -m dlops_dist.verify my.py --data.shards shards/mine       your own recipe, on your shards
    python -m dlops_dist.verify my.py                                 on generated images
    python -m dlops_dist.verify --bits [my.py]                        hashes of the weights alone

Trains a step in float64, in processes that talk through gloo, and prints the relative difference to one worker. Of a
recipe it shows losses, gradients, statistics, metrics and a resume, and names what is inexact in it; its settings may
follow, as for `train`. Then it trains some steps in float32 and bf16, and prints hashes of all weights: of 1 to 4
workers, of a run that 4 begin, 1 goes on with and 3 end, and of DDP. Exit code 1 where something differs by more than
promised.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from dlops_dist.errors import OneLineParser, RunError, UserError, exit_code_of, last_line

ONE_STEP, SEVERAL_STEPS = 1e-12, 1e-6
DIVIDED = 1e-9
"""Of a step by a recipe's own optimiser: where a gradient is nothing but rounding, Adam divides it by its own size."""
NUM_SAMPLES = 21
"""No number of workers but 3, 7 and 21 shares them evenly."""
OURS = "ours"
TIMEOUT_S = 120
RECIPE_TIMEOUT_S = 1800
"""A user's model may be large, and one core computes ten steps of it."""


def main() -> None:
    parser = OneLineParser(
        prog="python -m dlops_dist.verify", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", nargs="?", help="file of a recipe, or its module's name")
    parser.add_argument(
        "--workers", type=int, nargs="+", default=[1, 2, 4], metavar="W", help="numbers of workers (default: 1 2 4)"
    )
    parser.add_argument("--bits", action="store_true", help="print the hashes of weights alone")
    arguments, settings = parser.parse_known_args()
    workers = sorted(set(arguments.workers))
    if not 1 <= workers[0] <= workers[-1] <= NUM_SAMPLES:
        raise UserError(f"--workers: each must be from 1 to {NUM_SAMPLES}, not {workers}")

    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 160)
    if settings and not arguments.recipe:
        raise UserError(f"unknown setting {settings[0]}; those of a recipe follow its file")
    if not arguments.bits and arguments.recipe:
        verify_recipe(arguments.recipe, settings, workers, console)
    elif not arguments.bits:
        verify_steps(workers, console)
    hashed = verify_bits(arguments.recipe, settings, console)
    shown = hashed if arguments.bits else workers
    print(f"result: {', '.join(map(str, shown))} workers compute what one computes")


def verify_steps(workers: Sequence[int], console: Any) -> None:
    """Print how far each number of workers is from one, in ours and in usual formulations."""
    from dlops_dist.distributed.ranks import run_ranks
    from dlops_dist.engine.usual import measure

    results: dict[int, dict[tuple[str, str], Any]] = {}
    with console.status("") as status:
        for number in sorted({1, *workers}):
            status.update(f"computing with {number} worker{'s' * (number > 1)}")
            results[number] = run_ranks(measure, number, timeout_s=TIMEOUT_S)[-1]
    rows: dict[tuple[str, str], Sequence[float]]
    rows = {key: [_difference(results[w][key], results[1][key[0], OURS]) for w in workers] for key in results[1]}
    console.print(_table(rows, workers))
    wrong = [what for (what, how), errors in rows.items() if how == OURS and max(errors) > _limit(what)]
    if wrong:
        raise RunError(
            f"more than promised: {', '.join(wrong)}; please report it, with 'python -m torch.utils.collect_env'"
        )


def verify_recipe(name: str, arguments: Sequence[str], workers: Sequence[int], console: Any) -> None:
    """Print how far each number of workers is from one, for a user's recipe; name what is inexact."""
    import tempfile

    from dlops_dist.command_line import read_settings
    from dlops_dist.config import load_recipe
    from dlops_dist.distributed.ranks import run_ranks
    from dlops_dist.engine.prepare import resolved
    from dlops_dist.engine.proof import causes, measure
    from dlops_dist.files import temporary_folder
    from dlops_dist.smoke import with_smoke_shards

    recipe, settings = load_recipe(name), read_settings(name, arguments)
    with tempfile.TemporaryDirectory(dir=temporary_folder()) as folder:
        given = any(argument.startswith(("--data.shards", "--config")) for argument in arguments)
        if not given:
            settings = with_smoke_shards(name, settings.model_copy(update={"runs_dir": folder}))
        data = {"shards": str(resolved(settings.data.shards)), "reader": "decode"}
        values = settings.model_copy(update={
            "precision": "float64", "compile": False, "micro_batch_size": None, "global_batch_size": NUM_SAMPLES,
            "blocks": settings.blocks or max(4, *workers), "data": settings.data.model_copy(update=data),
        }).model_dump()  # fmt: skip
        chosen = (name, recipe.source, values, NUM_SAMPLES)
        inexact = causes(*chosen)
        for cause in inexact:
            console.print(f"inexact: {cause}", markup=False, soft_wrap=True)
        results: dict[int, Any] = {}
        with console.status("") as status:
            for number in sorted({1, *workers}):
                status.update(f"computing with {number} worker{'s' * (number > 1)}")
                try:
                    results[number] = run_ranks(measure, number, *chosen, timeout_s=RECIPE_TIMEOUT_S)[0]
                except RunError as error:
                    if not inexact:
                        raise
                    why = f"see above ({last_line(error)})"
                    raise RunError(f"{recipe.name} depends on the number of workers: {why}") from None
    alone = results[1][0]
    rows = {what: [_difference_of(results[w][0][what], alone[what]) for w in workers] for what in alone}
    rows["a resume, to the bit"] = [0.0 if results[w][1] else 1.0 for w in workers]
    console.print(_table({(what, OURS): errors for what, errors in rows.items()}, workers))
    wrong = [what for what, errors in rows.items() if not max(errors) <= _limit(what)]
    if wrong or inexact:
        raise RunError(f"{recipe.name} depends on the number of workers: {', '.join(wrong) or 'see above'}")


def verify_bits(name: str | None, arguments: Sequence[str], console: Any) -> Sequence[int]:
    """Print hashes of the weights that some steps leave, on the numbers of workers that it returns, and under DDP."""
    import tempfile

    from rich.table import Table

    from dlops_dist.config import DEFAULT
    from dlops_dist.engine.hashes import STEPS, WORKERS, ours, under_ddp
    from dlops_dist.files import temporary_folder

    with tempfile.TemporaryDirectory(dir=temporary_folder()) as folder, console.status("") as status:
        cases = bit_cases(name or DEFAULT, arguments, folder, (None,) if name else ("ce", "triplet", "center"))
        columns = ours(list(cases.values()), status.update)
        usual = under_ddp(list(cases.values()), status.update)
    table = Table("", *columns, "as many under DDP", title=f"sha256 of the weights after {STEPS} steps")
    differing = []
    for what, *found, of_ddp in zip(cases, *columns.values(), usual, strict=True):
        equal, rounding = len({hashed.hash for hashed in found}) == 1, found[0].rounding
        style = "green" if equal else "yellow" if rounding else "bold red"
        table.add_row(what, *(hashed.hash for hashed in found), " ".join(of_ddp), style=style)
        if rounding:
            console.print(f"{what}: rounding: {rounding}", markup=False, soft_wrap=True)
        elif not equal:
            differing.append(what)
    console.print(table)
    if differing:
        raise RunError(f"other bits on other numbers of workers: {', '.join(differing)}")
    return WORKERS


def bit_cases(name: str, arguments: Sequence[str], folder: str, losses: Sequence[str | None]) -> dict[str, Any]:
    """{what is computed: its case}: each loss in float32 and in bf16."""
    from dlops_dist.command_line import read_settings
    from dlops_dist.config import load_recipe, stem_of
    from dlops_dist.engine.hashes import WORKERS, Case
    from dlops_dist.engine.prepare import resolved
    from dlops_dist.smoke import with_smoke_shards

    found = {}
    for loss in losses:
        chosen = [
            *arguments,
            *([] if loss is None else ["--loss", loss, "--model.width", "8", "--model.stem", "imagenet"]),
        ]
        settings = read_settings(name, chosen)
        if not any(argument.startswith(("--data.shards", "--config")) for argument in arguments):
            settings = with_smoke_shards(name, settings.model_copy(update={"runs_dir": folder}))
        data = {"shards": str(resolved(settings.data.shards)), "reader": "decode"}
        for precision in ("float32", "bf16"):
            changes = {
                "precision": precision, "compile": False, "micro_batch_size": None, "global_batch_size": NUM_SAMPLES,
                "blocks": settings.blocks or max(WORKERS), "data": settings.data.model_copy(update=data),
            }  # fmt: skip
            values = settings.model_copy(update=changes).model_dump()
            what = f"{loss or stem_of(name)}, {precision}"
            found[what] = Case(name, load_recipe(name).source, values, NUM_SAMPLES)
    return found


def _difference_of(ours: Any, expected: Any) -> float:
    """Relative; 0 where both are nothing, or nothing but zeros or NaN alike."""
    if ours is None or expected is None:
        return 0.0 if ours is expected else 1.0
    scale = float(expected.nan_to_num().norm())
    difference = float((ours.nan_to_num() - expected.nan_to_num()).norm())
    return difference / scale if scale else difference


def _difference(ours: Any, expected: Any) -> float:
    return float((ours - expected).norm() / expected.norm())


def _limit(what: str) -> float:
    return SEVERAL_STEPS if "steps" in what else DIVIDED if what.startswith("step of the weights by") else ONE_STEP


def _table(rows: dict[tuple[str, str], Sequence[float]], workers: Sequence[int]) -> Any:
    from rich.table import Table

    several = any(how != OURS for _, how in rows)
    table = Table("", *["computed as"] * several, title="relative difference to one worker")
    for number in workers:
        table.add_column(f"{number} worker{'s' * (number > 1)}", justify="right")
    for (what, how), errors in rows.items():
        style = ("green" if max(errors) <= _limit(what) else "bold red") if how == OURS else None
        shown = [f"{e:.0e}" if e else "0" for e in errors]
        table.add_row(what if how == OURS else "", *[how] * several, *shown, style=style)
    return table


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
