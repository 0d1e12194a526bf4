"""The losses on their own, as anyone's DDP loop would use them: one process against ranks with unequal parts."""

import re
from pathlib import Path

import pytest
import torch
from kept_ranks import on_ranks

from dlops_dist.distributed.collectives import all_sum, gather, rank, world_size
from dlops_dist.distributed.objective import global_objective
from dlops_dist.losses import CenterLoss, CrossEntropyLoss, TripletLoss

PARTS = {2: [5, 11], 3: [9, 0, 7], 4: [1, 8, 0, 7]}
LOSSES = {
    "ce": CrossEntropyLoss(0.1),
    "center": CenterLoss(4, 6).double(),
    **{
        f"{mining}, {average}": TripletLoss(0.2, mining, normalize=normalize, squared=squared, average=average)
        for mining, average, normalize, squared in [
            ("batch-hard", "valid", True, False), ("semi-hard", "active", False, True), ("all", "active", True, False),
        ]
    },
}  # fmt: skip


def batches():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 6, generator=generator, dtype=torch.float64)
    labels = torch.randint(4, (16,), generator=generator)
    far_apart = torch.eye(6, dtype=torch.float64)[labels] * 50 + 1e-3 * x
    return {
        "mixed": (x, labels),
        "duplicates": (x[torch.arange(16) % 5], labels),
        "one class": (x, torch.zeros_like(labels)),
        "collapsed": (1 + 1e-9 * x, labels),
        "no active triplet": (far_apart, labels),
        "first ranks of one class": (x, torch.tensor([0] * 10 + [1, 2, 3, 1, 2, 3])),
    }


def gradients(sizes, dtype=torch.float64):
    """{(loss, batch): value and gradient with respect to all embeddings}, as DDP would average it."""
    results = {}
    start = sum(sizes[: rank()])
    part = slice(start, start + sizes[rank()])
    for batch, (x, labels) in batches().items():
        for name, loss in LOSSES.items():
            loss.to(dtype)
            own = x[part].to(dtype).requires_grad_()
            arguments = (gather(own, sizes), labels, part) if "," in name else (own, labels[part])
            objective = global_objective({name: loss.terms(*arguments)}, {name: 1.0})
            objective.backward()
            results[name, batch] = objective.values[name], gather(own.grad, sizes) / world_size()
    return results


@pytest.mark.parametrize("ranks", PARTS)
def test_value_and_gradient_are_those_of_one_process(ranks):
    expected = gradients([16])
    for result in on_ranks(gradients, ranks, PARTS[ranks]):
        for case, (value, gradient) in expected.items():
            torch.testing.assert_close(result[case][0], value, rtol=1e-12, atol=1e-14, msg=str(case))
            bound = 1e-12 * max(gradient.norm().item(), 1e-3)
            assert (result[case][1] - gradient).norm().item() <= bound, case


def test_in_float32_they_agree_within_rounding():
    expected = gradients([16], torch.float32)
    for result in on_ranks(gradients, 3, PARTS[3], torch.float32):
        for case, (value, gradient) in expected.items():
            assert value.item() == pytest.approx(result[case][0].item(), rel=1e-5, abs=1e-7), case
            assert (result[case][1] - gradient).norm().item() <= 1e-5 * max(gradient.norm().item(), 1e-3), case


def test_the_cases_are_what_they_are_called():
    values = {case: value.item() for case, (value, _) in gradients([16]).items()}
    assert values["batch-hard, valid", "no active triplet"] == 0
    assert values["batch-hard, valid", "one class"] == 0
    assert values["batch-hard, valid", "mixed"] > 0
    assert values["batch-hard, valid", "collapsed"] == pytest.approx(0.2, abs=1e-6)  # nothing is apart: the margin


def from_docs(code, weight, x, labels, sizes):
    start = sum(sizes[: rank()])
    weight = weight.clone().requires_grad_()
    names = {
        "torch": torch, "rank": rank(),
        "embeddings": x[start : start + sizes[rank()]] @ weight, "labels": labels[start : start + sizes[rank()]],
    }  # fmt: skip
    exec(code, names)
    return all_sum(weight.grad) / world_size()


def test_the_lines_in_the_docs_give_the_gradient_of_one_process():
    text = (Path(__file__).parents[2] / "docs/extending.md").read_text()
    code = re.search(r"## The losses in your own DDP loop.*?```python\n(.*?)```", text, re.DOTALL)[1]
    lines = [line for line in code.splitlines() if line and not line.startswith(("from", "import"))]
    assert len(lines) <= 5
    x, labels = batches()["mixed"]
    weight = torch.randn(6, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    TripletLoss(margin=0.5)(x @ weight, labels).backward()
    for gradient in on_ranks(from_docs, 3, code, weight.detach(), x, labels, PARTS[3]):
        torch.testing.assert_close(gradient, weight.grad, rtol=1e-12, atol=1e-14)
