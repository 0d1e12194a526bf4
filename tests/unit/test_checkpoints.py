"""Checkpoints are whole, checked, kept by number, and written beside the training that goes on."""

import random
import struct
import subprocess
import threading

import pytest
import torch

from dlops_dist.engine.checkpoints import Checkpoints
from dlops_dist.engine.rows import best_row, is_out_of_patience, result_row
from dlops_dist.errors import RunError
from dlops_dist.files import Folder
from dlops_dist.recipes.q1 import Settings as Q1

CPU = torch.device("cpu")


@pytest.fixture(params=["path", "memory"])
def folder(request, tmp_path):
    return Folder(tmp_path / "c" if request.param == "path" else f"memory://{tmp_path.name}/c")


def state(value):
    return {"x": torch.full((50, 3), float(value)), "deep": {"list": [torch.tensor(value), value]}}


def saved(folder, *steps, kept=2, also_kept=None):
    checkpoints = Checkpoints(folder, kept)
    for step in steps:
        checkpoints.save(step, state(step), also_kept)
    checkpoints.wait()
    return checkpoints


def damage(folder, name):
    """Flip a bit of the first tensor."""
    with folder.open(name) as file:
        content = bytearray(file.read())
    step = float(name[5:14])
    content[content.index(struct.pack("<2f", step, step))] ^= 1
    folder.write(name, lambda file: file.write(content))


def test_the_latest_stay_and_one_more_by_name(folder):
    assert saved(folder, 1, 2, 3, 4, 5).steps() == [4, 5]
    assert saved(folder, 6, 7, also_kept=4).steps() == [4, 6, 7]
    assert saved(folder, 8, kept=10).steps() == [4, 6, 7, 8]


def test_a_state_is_read_as_it_was_when_it_was_saved(folder):
    checkpoints, live = Checkpoints(folder, 2), state(1)
    for step in (1, 2, 3):
        checkpoints.save(step, live)
        live["x"] += 1  # training goes on while a thread writes
    checkpoints.wait()
    assert [checkpoints.load(step, CPU)["x"][0, 0].item() for step in (2, 3)] == [2.0, 3.0]
    assert checkpoints.load(3, CPU)["deep"]["list"][1] == 1


def test_saving_returns_before_the_file_is_written(tmp_path, monkeypatch):
    may_write, folder = threading.Event(), Folder(tmp_path)
    write = folder.write
    monkeypatch.setattr(folder, "write", lambda *arguments: may_write.wait(30) and write(*arguments))
    checkpoints = Checkpoints(folder, 2)
    checkpoints.save(1, state(1))
    assert checkpoints.steps() == []
    may_write.set()
    checkpoints.wait()
    assert checkpoints.steps() == [1]


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    folder = Folder(tmp_path)
    monkeypatch.setattr(folder, "write", full)
    checkpoints = Checkpoints(folder, 2)
    checkpoints.save(1, state(1))
    with pytest.raises(RunError, match=r"No space left on device; mend that"):
        checkpoints.wait()
    checkpoints.wait()  # told once


@pytest.mark.root
def test_a_disk_that_fills_while_torch_writes_is_one_line_and_the_one_before_stays(tmp_path):
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", tmp_path], check=True)
    try:
        checkpoints = saved(Folder(tmp_path / "c"), 1)
        checkpoints.save(2, {"x": torch.randn(1_000_000)})
        with pytest.raises(RunError, match=r"c: No space left on device; mend that, then the same command goes on"):
            checkpoints.wait()
        assert checkpoints.steps() == [1]
        assert torch.equal(checkpoints.load(1, CPU)["x"], state(1)["x"])
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_a_damaged_latest_one_is_named_and_the_one_before_taken(folder):
    checkpoints, warnings = saved(folder, 10, 20), []
    damage(folder, "step-000000020.pt")
    assert checkpoints.latest(CPU, warnings.append)["deep"]["list"][1] == 10
    assert len(warnings) == 1
    assert "step-000000020.pt cannot be read" in warnings[0]
    damage(folder, "step-000000010.pt")
    with pytest.raises(RunError, match="none of the checkpoints can be read"):
        checkpoints.latest(CPU, warnings.append)


def test_no_flipped_bit_and_no_cut_file_is_read_as_if_it_were_whole(tmp_path):
    """What is read is what was written, or refused: torch itself would load wrong weights without a word."""
    checkpoints, path = saved(Folder(tmp_path), 1), tmp_path / "step-000000001.pt"
    whole, chance, refused = path.read_bytes(), random.Random(0), 0
    for trial in range(300):
        content = bytearray(whole)
        if trial % 3:
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        else:
            del content[chance.randrange(len(content)) :]
        path.write_bytes(content)
        try:
            read = checkpoints.load(1, CPU)
        except RunError:
            refused += 1
        else:
            assert torch.equal(read["x"], state(1)["x"])
            assert torch.equal(read["deep"]["list"][0], state(1)["deep"]["list"][0])
            assert read["deep"]["list"][1] == 1
    assert refused > 150


class Touches:
    """Unpickled, it would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_checkpoint_that_would_execute_code_is_refused(tmp_path):
    torch.save({"x": Touches(tmp_path / "touched")}, tmp_path / "step-000000001.pt")
    with pytest.raises(RunError, match="cannot be read"):
        Checkpoints(Folder(tmp_path), 2).load(1, CPU)
    assert not (tmp_path / "touched").exists()


TOP1 = "val/top1"


def row(epoch, top1=None, stage=None):
    return {"epoch": epoch} | ({} if top1 is None else {"val/top1": top1}) | ({} if stage is None else {"stage": stage})


def test_the_best_row_is_the_earliest_with_the_highest_held_out_accuracy_of_the_last_stage():
    rows = [row(1, 0.5), row(2, 0.7), row(3, 0.7), row(4, 0.6)]
    assert best_row(rows, TOP1) == result_row(rows, TOP1) == rows[1]
    stages = [row(1, stage="layer 1"), row(2, 0.9, "fold 0"), row(3, 0.2, "fold 1"), row(4, 0.1, "fold 1")]
    assert best_row(stages, TOP1) == stages[2]
    assert best_row(stages[:1], TOP1) is None
    assert best_row([], TOP1) is None
    assert result_row([row(1), row(2)], TOP1) == row(2)


def test_the_best_row_is_that_of_the_figure_that_is_asked_for_of_a_loss_the_lowest():
    rows = [row(1, 0.5) | {"val/loss": 2.0, "val/mine": None}, row(2, 0.7) | {"val/loss": 2.5, "val/mine": 3.0}]
    assert best_row(rows, "val/loss") == rows[0]
    assert best_row(rows, "val/mine") == result_row(rows, "val/mine") == rows[1]


@pytest.mark.parametrize(
    ("accuracies", "is_over"),
    [
        ([0.5], False),
        ([0.5, 0.4], False),
        ([0.5, 0.4, 0.5], True),
        ([0.5, 0.6, 0.5], False),
        ([0.1, 0.5, 0.4, 0.3], True),
    ],
)
def test_patience_ends_with_epochs_that_are_no_better(accuracies, is_over):
    rows = [row(epoch, top1) for epoch, top1 in enumerate(accuracies, 1)]
    assert is_out_of_patience(rows, Q1(patience=2)) == is_over
    assert not is_out_of_patience(rows, Q1())
