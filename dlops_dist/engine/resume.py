"""Which settings a run that was begun may be resumed with."""

from typing import Any

from dlops_dist.config import LATER
from dlops_dist.errors import UserError

EXTENDABLE = ("constant", "step")
"""Schedules by which a step's learning rate does not depend on how many are to come."""


def refuse_other_settings(
    where: object, existing: dict[str, Any], wanted: dict[str, Any], more_epochs: str | None = "are another run"
) -> None:
    """Refuse to go on in a folder whose result comes from settings that are not those wanted.

    Args:
        more_epochs: why another number of epochs alone is refused, too; None where it is not.
    """
    names = [*wanted, *(name for name in LATER if name in existing and name not in wanted)]
    existing, wanted = LATER | existing, LATER | wanted
    changed = [n for n in names if _plain(existing.get(n)) != _plain(wanted[n])]
    if changed == ["epochs"] and more_epochs is None:
        return
    if changed:
        shown = ", ".join(f"{n} {existing.get(n)} there, {wanted[n]} here" for n in changed[:3])
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        why = f": {more_epochs}" if changed == ["epochs"] else ""
        raise UserError(f"{where} was started with other settings ({shown}{more}{why}); choose another --name")


def hindrance(existing: dict[str, Any], wanted: dict[str, Any]) -> str | None:
    """Why a run cannot go on to another number of epochs; None where it can."""
    before, after, schedule = existing.get("epochs", 0), wanted["epochs"], wanted["optimizer.schedule"]
    warmup = wanted["optimizer.warmup_epochs"]
    if schedule not in EXTENDABLE:
        can = " or ".join(EXTENDABLE)
        return f"each step's rate depends on them under optimizer.schedule {schedule}; under {can}, more may follow"
    if after < before:
        return "more may follow, not fewer"
    if 2 * warmup >= before:
        return f"optimizer.warmup_epochs {warmup} takes half of a run at most, so the first steps depend on them"
    return "one fold begins where another ends" if wanted.get("folds") else None


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
