"""Shows a sweep while it goes on."""

from types import TracebackType

from rich.console import Console
from rich.live import Live

from dlops_dist.sweep.folder import SweepFolder, note_end
from dlops_dist.sweep.ranking import ranking
from dlops_dist.sweep.tables import described, ranking_table

SHOWN_POINTS = 30


class Board:
    """The ranking so far, live on a terminal; plain lines elsewhere. Use it as a context."""

    def __init__(self, folder: SweepFolder) -> None:
        self._folder = folder
        self._out = Console(highlight=False, soft_wrap=True)
        self._live = Live(console=self._out, auto_refresh=False, transient=True) if self._out.is_terminal else None

    def __enter__(self) -> "Board":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, text: str) -> None:
        """A line of its own."""
        self._out.print(text, markup=False)

    def warn(self, text: str) -> None:
        self.say(f"warning: {text}")

    def started(self, name: str) -> None:
        trial = self._folder.trial(name)
        self._tell(f"{name} starts: {described(trial.point)}, seed {trial.seed}")

    def judged(self, name: str) -> None:
        """A trial ended an epoch."""
        trial = self._folder.trial(name)
        self._tell(f"{name} epoch {len(trial.rows)}/{trial.epochs}: val top-1 {trial.score:.2%}")

    def ended(self, name: str, died: str | None = None) -> None:
        """A trial finished, failed, was given up by the scheduler, or its own process died."""
        trial = self._folder.trial(name)
        if died or not (trial.finished or trial.failed):
            note_end(self._folder.path / name, failed=died, stopped=died is None)
            trial = self._folder.trial(name)
        if trial.failed:
            self.warn(f"{name} failed: {trial.failed}")
        self._tell(f"{name} ends at epoch {len(trial.rows)}{', given up by the scheduler' * trial.stopped}")

    def _tell(self, text: str) -> None:
        if self._live is None:
            self.say(text)
            return
        _, sweep = self._folder.settings()
        ranked = ranking(self._folder.trials())
        self._live.update(ranking_table(self._folder.path.name, sweep.parameters, ranked, SHOWN_POINTS), refresh=True)
