"""A run from its first step, or the last checkpoint, to its last."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice, tee
from pathlib import Path
from typing import Any, NoReturn

import torch

from dlops_dist.config import DEFAULT, Run, result_settings
from dlops_dist.data.loader import Batch, read_ahead
from dlops_dist.data.order import blocks
from dlops_dist.data.readers import Reader, open_readers
from dlops_dist.data.shards import Split, read_manifest
from dlops_dist.distributed.agreement import describe_divergence
from dlops_dist.distributed.collectives import of_all_ranks, rank, world_size
from dlops_dist.engine.device import default_device, memory_errors_explained, use
from dlops_dist.engine.exactness import use_threads
from dlops_dist.engine.gallery import keep, told_only
from dlops_dist.engine.learner import Learner
from dlops_dist.engine.numerics import set_numerics
from dlops_dist.engine.prepare import located, stages_of
from dlops_dist.engine.recipe import failures_placed
from dlops_dist.engine.rows import is_out_of_patience, rows_before
from dlops_dist.engine.run_folder import RunFolder
from dlops_dist.engine.samples import Samples
from dlops_dist.engine.stages import Span, Stage, checkpoints_after, collapse, named, spans_of
from dlops_dist.engine.step import Step
from dlops_dist.engine.step_log import StepLog
from dlops_dist.engine.warm_start import fitting_weights
from dlops_dist.errors import RunError
from dlops_dist.events import EpochEnded, Event, Finished, Listener, Logged, Started, Stepped, Told, Warned

TELL_EVERY_S = 1.0
CHECK_EVERY = {"cpu": 1, "cuda": 20}
"""Steps between looks at the loss, which make a GPU wait."""
COMPARE_RANKS_EVERY = 100
"""Steps between looks at whether all ranks hold the same weights, besides those at each checkpoint."""


def fit(
    settings: Run, *, task: str = DEFAULT, device: torch.device | None = None, listeners: Sequence[Listener] = (),
    stop: Callable[[], bool] = lambda: False, save: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:  # fmt: skip
    """Train to the end, from the last checkpoint of the run where there is one.

    Call it in one process, or in every worker of a torch.distributed group; settings.runs_dir and data.shards must
    then be seen by all.

    Args:
        settings: of the run; name and paths are filled in.
        task: the recipe that they are for: q1, q2, a path, or the name of a module.
        device: of this worker; by default its GPU (torchrun's LOCAL_RANK says which), else the CPU.
        listeners: called on rank 0 with each event.
        stop: asked before each step whether to save and stop; of several workers every few steps on a GPU, and the wish
            of one is that of all.
        save: asked likewise whether to save, and go on.

    Returns:
        The last row of metrics.

    Raises:
        UserError: settings or data that do not fit together.
        RunError: the loss became infinite or NaN, or the device's memory is full.
        KeyboardInterrupt: stopped, and saved.
    """
    settings, device = located(task, settings), device or default_device()
    use(device)
    advice = "pass a lower --micro-batch-size (under another --name, where the run has begun)"
    if device.type == "cuda" and settings.data.reader in ("auto", "device"):
        advice += ", or --data.reader decoded"
    with memory_errors_explained(device, advice), failures_placed(settings):
        run = _Fit(settings, device, listeners, stop, save)
        if rank() == 0:
            run.folder.create(task, settings)
            run.folder.note_owner()
        return run.run()


class _Fit:
    def __init__(
        self, settings: Run, device: torch.device, listeners: Sequence[Listener],
        stop: Callable[[], bool] = lambda: False, save: Callable[[], bool] = lambda: False,
    ) -> None:  # fmt: skip
        set_numerics(settings, device)
        self.settings, self.device, self.listeners = settings, device, listeners
        self._wishes = stop, save
        self._workers = world_size()
        self.folder = RunFolder.of(settings)
        shards = Path(settings.data.shards)
        self.manifest = read_manifest(shards)
        self.samples = Samples(shards, self.manifest, settings)
        self.stages = stages_of(settings, self.samples, device, lambda text: self._tell(Told(text)))
        self.spans = spans_of(self.stages)
        self.stage: Stage
        self.span: Span
        self.learner: Step
        self.reader: Reader
        self.log = StepLog(settings.log_every if rank() == 0 else 0, settings.global_batch_size, device)

    def _open(self, splits: Sequence[Split]) -> list[Reader]:
        data = self.settings.data
        readers, kind, why = open_readers(
            splits, data.reader, data.cache_dir, self.device,
            warn=self._warn, tell=lambda text: self._tell(Told(text)),
        )  # fmt: skip
        self._tell(Told(f"data.reader: {kind} ({why})"))
        return readers

    def run(self) -> dict[str, Any]:
        self.samples.open(self._open)
        state = self.folder.load(self.settings, self.manifest.id, self.device, warn=self._warn)
        step = 0 if state is None else state["step"]
        first = next(i for i, span in enumerate(self.spans) if step <= span.end_step)
        self._enter(first, state)
        if rank() == 0:
            to_come = checkpoints_after(step, self.spans, self.settings.checkpoint_every)
            self.folder.check_room(self.learner.model, to_come)
            self.folder.restore_rows(state, warn=self._warn)
        self._tell(self._started(step))
        self.rows = rows_before(state)
        row = self.rows[-1] if self.rows else {}
        for index in range(first, len(self.stages)):
            if index > first:
                self._enter(index, None)
            for epoch in range(int(self.span.epoch_of(max(step, self.span.first_step))), self.span.end_epoch):
                if is_out_of_patience(self.rows, self.settings):
                    break
                row = self._epoch(epoch, max(step - self.span.first_step_of(epoch), 0))
            if rank() == 0:
                with told_only(self._warn), (self.folder.folder / "report").as_path() as report:
                    self.stage.draw(report, self.learner, row)
        self.folder.checkpoints.wait()
        if rank() == 0 and isinstance(self.learner, Learner):
            keep(self.folder, self.learner, self.samples, self.rows, self._started(0).facts, self._tell)
        self._tell(Finished())
        return row

    def _enter(self, index: int, state: dict[str, Any] | None) -> None:
        """Begin a stage, or go on in it."""
        self.stage, self.span = self.stages[index], self.spans[index]
        if state is not None and (carried := self.stage.carried()) is not None:
            carried.load_state_dict(state["carried"])
        self.learner = self.stage.learner()
        use_threads(self.settings, self.learner.plan, self.device)
        if state is not None:
            self.learner.load_state_dict(state)
        elif self.settings.init_from is not None and isinstance(self.learner, Learner):
            weights = fitting_weights(self.settings.init_from, self.learner.model, self._warn)
            self.learner.start_from(weights)
        self.reader = self.stage.reader(self.learner)
        for notice in self.stage.notices:
            self._tell(Warned(notice))

    def _epoch(self, epoch: int, first: int) -> dict[str, Any]:
        """Train an epoch from its `first` step on, evaluate, save. Returns its row of metrics."""
        if self._wished(0)[0]:
            self._end_here()
        started = time.monotonic()
        self._train_epoch(epoch, first)
        trained_s = time.monotonic() - started
        row = self._evaluated_row(epoch)
        self.rows.append(row)
        images = (self.span.steps_per_epoch - first) * self.settings.global_batch_size
        row |= {"epoch_s": time.monotonic() - started, "train_images_per_s": images / trained_s}
        self._check_together()
        if rank() == 0:
            self.folder.add_row(row)
        self._tell(EpochEnded(row))
        self._save(row["step"])
        return row

    def _train_epoch(self, epoch: int, first: int) -> None:
        per_epoch, before = self.span.steps_per_epoch, self.span.first_step_of(epoch)
        told, told_step = time.monotonic(), first
        self.log.begin()
        for step_in_epoch, parts in enumerate(self._batches(epoch, first), first + 1):
            step = before + step_in_epoch
            figures, of_stage = self.log.place(step), step - 1 - self.span.first_step
            loss = self.learner.step(parts, epoch, of_stage, figures)
            if figures is not None:
                row = {"epoch": epoch + 1, "step": step, **self._stage_name(), "lr": self.learner.lr(of_stage)}
                self.log.add(row, {"loss": loss, **figures})
            if step % CHECK_EVERY[self.device.type] == 0 or step_in_epoch == per_epoch:
                self._check_finite(loss, epoch, step)
            if step % COMPARE_RANKS_EVERY == 0:
                self._check_ranks_agree(step)
            every, (stop, save) = self.settings.checkpoint_every, self._wished(step)
            if (stop or save or (every and step % every == 0)) and step_in_epoch < per_epoch:
                self._check_finite(loss, epoch, step)
                self._save(step)
                if save:
                    self.folder.checkpoints.wait()
                if stop:
                    self._end_here()
            now = time.monotonic()
            if rank() == 0 and now - told >= TELL_EVERY_S:
                rate = (step_in_epoch - told_step) * self.settings.global_batch_size / (now - told)
                top1 = self.learner.sums.top1()
                self._tell(Stepped(epoch + 1, step, step_in_epoch, per_epoch, loss.item(), top1, rate))
                told, told_step = now, step_in_epoch

    def _wished(self, step: int) -> list[bool]:
        """Whether any worker is to stop, and to save, as all know at the same steps."""
        if world_size() > 1 and step % CHECK_EVERY[self.device.type]:
            return [False, False]
        own = [wish() for wish in self._wishes]
        return own if world_size() == 1 else of_all_ranks(torch.tensor(own, device=self.device)).any(dim=0).tolist()

    def _end_here(self) -> NoReturn:
        """Where all that was trained is in a checkpoint."""
        self.folder.checkpoints.wait()
        of_all_ranks(torch.zeros(1, device=self.device))  # the others stay until it is written
        raise KeyboardInterrupt

    def _batches(self, epoch: int, first: int) -> Iterator[list[Batch]]:
        """This rank's parts of each global batch's micro-batches."""
        data, size = self.settings.data, self.settings.micro_batch_size
        steps, ahead = tee(blocks(ids, size) for ids in self.stage.order.epoch(epoch, first))
        parts = ((ids, self.learner.blocks.share(len(ids))) for step in ahead for ids in step)
        reader = self.learner.in_epoch(self.reader, epoch)
        batches = read_ahead(reader, parts, self.device, data.threads, data.prefetch, self.learner.reads_next)
        return (list(islice(batches, len(step))) for step in steps)

    def _evaluated_row(self, epoch: int) -> dict[str, Any]:
        """The epoch's row of metrics, equal on every rank."""
        end = self.span.first_step_of(epoch + 1)
        row: dict[str, Any] = {"epoch": epoch + 1, "step": end, **self._stage_name()}
        row["lr"] = self.learner.lr(end - 1 - self.span.first_step)
        row |= named("train", self.learner.end_epoch())
        row |= self.stage.figures(self.learner)
        if (warning := collapse(row)) is not None:
            self._tell(Warned(warning))
        return row

    def _stage_name(self) -> dict[str, str]:
        """What rows and checkpoints of a run of several stages say."""
        return {} if self.stage.name is None else {"stage": self.stage.name}

    def _check_finite(self, loss: torch.Tensor, epoch: int, step: int) -> None:
        self._check_together()
        value, rows = self.log.fetch(loss)
        if rows:
            self.folder.add_steps(rows)
        for row in rows:
            self._tell(Logged(row))
        if not math.isfinite(value):
            raise RunError(
                f"the loss became {value} at step {step} (epoch {epoch + 1}); lower optimizer.lr or set "
                f"optimizer.clip_norm, under another --name"
            )

    def _check_ranks_agree(self, step: int) -> None:
        found = describe_divergence(self.learner.equal_on_all_ranks())
        if found is not None:
            raise RunError(
                f"step {step}: {found}; a fault of its memory, GPU or software. Leave that node out: "
                f"the same command goes on from the last checkpoint, where all were equal"
            )

    def _check_together(self) -> None:
        """Stop a worker whose group was taken apart while it trained, before it writes what it then took for sums."""
        if world_size() != self._workers:
            raise RuntimeError("the group of workers was taken apart")

    def _save(self, step: int) -> None:
        self._check_ranks_agree(step)
        state = self.learner.state_dict()  # every rank takes part in its sums
        self._check_together()
        if rank() == 0:
            position = {"step": step, "epoch": self.span.epoch_of(step), "dataset_id": self.manifest.id}
            position["classes"] = list(self.manifest.classes)
            if (carried := self.stage.carried()) is not None:
                state["carried"] = carried.state_dict()
            self.folder.save(self.settings, position | self._stage_name() | state)

    def _started(self, step: int) -> Started:
        facts = {
            "dataset": self.manifest.dataset, "dataset_id": self.manifest.id[:12],
            "classes": len(self.manifest.classes),
            "train": len(self.samples.ids), "val": len(self.samples.val_ids), "test": len(self.samples.test),
            "parameters": sum(p.numel() for p in self.learner.model.parameters()),
            "workers": world_size(), "device": str(self.device),
            "blocks": self.learner.blocks.number, "exactness": self.learner.plan.promise,
            **({"unlabeled": len(self.samples.unlabeled)} if self.samples.unlabeled is not None else {}),
        }  # fmt: skip
        last = self.spans[-1]
        settings = result_settings(self.settings)
        return Started(str(self.folder), settings, facts, last.end_epoch, last.end_step, len(self.spans), step)

    def _warn(self, text: str) -> None:
        self._tell(Warned(text))

    def _tell(self, event: Event) -> None:
        if rank() == 0:
            for listener in self.listeners:
                listener(event)
