"""What ranks exchange: the gather and its gradient, global sums, the one helper, batch norm over all ranks."""

import os
import time
from concurrent.futures import ThreadPoolExecutor, wait
from unittest import mock

import numpy as np
import pytest
import torch
from kept_ranks import WORLDS, on_ranks
from torch import nn

from dlops_dist.data.order import rank_part
from dlops_dist.distributed import agreement, collectives
from dlops_dist.distributed import norm as norm_module
from dlops_dist.distributed.collectives import all_sum, gather, rank, world_size
from dlops_dist.distributed.norm import SyncBatchNorm1d, SyncBatchNorm2d, average_running_statistics
from dlops_dist.distributed.objective import global_objective
from dlops_dist.distributed.ranks import run_ranks
from dlops_dist.engine.checkpoints import Checkpoints
from dlops_dist.errors import RunError
from dlops_dist.files import Folder
from dlops_dist.losses import CrossEntropyLoss, Terms
from dlops_dist.torchrun import meeting

CPU = torch.device("cpu")
PARTS = {2: [3, 5], 3: [4, 0, 1], 4: [0, 2, 7, 1]}
KINDS = [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool]


def own_rows(x, sizes):
    start = sum(sizes[: rank()])
    return x[start : start + sizes[rank()]]


def gathered(x, sizes):
    """Every kind of tensor through the gather, with sizes given and asked for."""
    results = {}
    for kind in KINDS:
        own = own_rows(x.to(kind), sizes)
        results[kind] = gather(own, sizes)
        assert torch.equal(results[kind], gather(own))
    transposed = own_rows(x, sizes).T.contiguous().T
    assert torch.equal(gather(transposed, sizes), x)
    return results


@pytest.mark.parametrize("ranks", PARTS)
def test_gather_rebuilds_the_whole_in_rank_order(ranks):
    sizes = PARTS[ranks]
    x = torch.arange(sum(sizes) * 3.0).reshape(-1, 3) - 4
    for results in on_ranks(gathered, ranks, x, sizes):
        for kind, whole in results.items():
            assert torch.equal(whole, x.to(kind))


def gradients(x, weights, sizes):
    """Each rank computes its own loss from everyone's rows; the gradient at its own rows."""
    own = own_rows(x, sizes).clone().requires_grad_()
    whole = gather(own, sizes)
    (whole * weights[rank()]).square().sum().backward()
    return own.grad


@pytest.mark.parametrize("ranks", PARTS)
def test_gradient_flows_back_from_every_rank(ranks):
    sizes = PARTS[ranks]
    generator = torch.Generator().manual_seed(ranks)
    x = torch.randn(sum(sizes), 3, generator=generator, dtype=torch.float64)
    weights = torch.randn(ranks, sum(sizes), 3, generator=generator, dtype=torch.float64)
    expected = sum(2 * w.square() * x for w in weights)  # each rank's loss, differentiated by hand
    torch.testing.assert_close(torch.cat(on_ranks(gradients, ranks, x, weights, sizes)), expected)


def summed(values):
    before = values[rank()].T
    return all_sum(before), before


@pytest.mark.parametrize("ranks", [2, 3])
def test_all_sum_adds_up_and_leaves_its_argument(ranks):
    values = torch.arange(ranks * 6.0).reshape(ranks, 2, 3)
    for rank_, (total, before) in enumerate(on_ranks(summed, ranks, values)):
        assert torch.equal(total, values.sum(dim=0).T)
        assert torch.equal(before, values[rank_].T)


def told_by_the_first(contents):
    numbers = collectives.of_first_rank(lambda: (rank(), [7]))
    with mock.patch.object(collectives, "SENT_AT_ONCE", 3):
        results = [lambda own=own: own if rank() == 0 else 1 / 0 for own in contents]
        found = [collectives.bytes_of_first_rank(result, CPU) for result in results]
    try:
        collectives.of_first_rank(fails)
    except ValueError as error:
        return numbers, found, str(error)


def fails():
    raise ValueError(f"of rank {rank()}")


@pytest.mark.parametrize("ranks", [1, 3])
def test_what_the_first_rank_finds_all_have_and_what_it_raises_all_raise(ranks):
    contents = [b"twenty bytes and more", b"", None]
    assert on_ranks(told_by_the_first, ranks, contents) == [((0, [7]), contents, "of rank 0")] * ranks


def read_back(folder):
    """How often this rank opened a checkpoint, what it found, what it was warned of."""
    opened, warnings, open_file = [], [], Folder.open
    with mock.patch.object(Folder, "open", lambda *given: opened.append(given) or open_file(*given)):
        found = Checkpoints(Folder(folder), 2).latest_of_all_ranks(CPU, warnings.append)
    return len(opened), found, warnings


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_of_all_ranks_the_first_alone_reads_a_checkpoint_and_all_have_it(ranks, tmp_path):
    assert on_ranks(read_back, ranks, tmp_path / "none") == [(0, None, [])] * ranks
    checkpoints = Checkpoints(Folder(tmp_path), 2)
    for step in (1, 2):
        checkpoints.save(step, {"step": step, "x": torch.arange(5.0) * step})
    checkpoints.wait()
    path = tmp_path / "step-000000002.pt"
    path.write_bytes(path.read_bytes()[:-100])
    for place, (opened, found, warnings) in enumerate(on_ranks(read_back, ranks, tmp_path)):
        assert (opened, len(warnings)) == ((2, 1) if place == 0 else (0, 0))
        assert found["step"] == 1
        assert torch.equal(found["x"], torch.arange(5.0))


@pytest.mark.parametrize("number", [1, 5, 2500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_a_hash_of_bits_adds_up_each_value_times_the_odd_number_of_its_place(number, dtype, monkeypatch):
    monkeypatch.setattr(agreement, "AT_ONCE", 1000)
    x = (torch.randn(number) * 100).to(dtype)
    bits = x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]).tolist()
    expected = sum(b * (i * 0x9E3779B97F4A7C15 % 2**64 | 1) for i, b in enumerate(bits)) % 2**64
    assert int(agreement.bits_hash(x)) % 2**64 == expected


def objective_gradient(weight, x, labels, sizes):
    """DDP's mean of gradients of the helper's loss, and the value it logs."""
    weight = weight.clone().requires_grad_()
    own, own_labels = own_rows(x, sizes), own_rows(labels, sizes)
    terms = {
        "ce": CrossEntropyLoss().terms(own @ weight, own_labels),
        "positive": Terms((own @ weight).relu().sum(), (own @ weight > 0).sum(dtype=torch.float64)),
    }
    objective = global_objective(terms, {"ce": 0.7, "positive": 2.0})
    objective.backward()
    return all_sum(weight.grad) / world_size(), objective.values


@pytest.mark.parametrize("ranks", PARTS)
def test_objective_is_that_of_one_process_for_unequal_counts(ranks):
    sizes = PARTS[ranks]
    generator = torch.Generator().manual_seed(ranks)
    x = torch.randn(sum(sizes), 4, generator=generator, dtype=torch.float64)
    labels = torch.arange(sum(sizes)) % 3
    weight = torch.randn(4, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    logits = x @ weight
    ce = nn.functional.cross_entropy(logits, labels)
    positive = logits.relu().sum() / (logits > 0).sum()
    (expected,) = torch.autograd.grad(0.7 * ce + 2.0 * positive, weight)
    for gradient, values in on_ranks(objective_gradient, ranks, weight.detach(), x, labels, sizes):
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(values["ce"], ce.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(values["positive"], positive.detach(), rtol=1e-12, atol=0)


def normalised(x, gradient, sizes, gathered=8):
    """Two training steps of batch norm: output, gradients (of the parameters as DDP sums them), buffers."""
    with mock.patch.object(norm_module, "GATHERED", gathered):
        return normalised_twice(x, gradient, sizes)


def normalised_twice(x, gradient, sizes):
    norm = (SyncBatchNorm2d if x.ndim == 4 else SyncBatchNorm1d)(x.shape[1]).double()
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2, x.shape[1]))
        norm.bias.copy_(torch.linspace(-1, 1, x.shape[1]))
    for _ in range(2):
        own = own_rows(x, sizes).clone().requires_grad_()
        y = norm(own)
        (y * own_rows(gradient, sizes)).sum().backward()
    buffers = [b.clone() for b in norm.buffers()]
    return y.detach(), own.grad, all_sum(norm.weight.grad), all_sum(norm.bias.grad), buffers


@pytest.mark.parametrize("ranks", PARTS)
@pytest.mark.parametrize("size", [(3, 4, 2), (3,)], ids=["images", "units"])
@pytest.mark.parametrize("gathered", [8, 1], ids=["gathered", "added up"])
def test_sync_batch_norm_is_batch_norm_of_all_samples(ranks, size, gathered):
    sizes = PARTS[ranks]
    generator = torch.Generator().manual_seed(ranks)
    x = torch.randn(sum(sizes), *size, generator=generator, dtype=torch.float64) * 3 + 1000  # E[x^2] would lose it
    gradient = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    y, dx, dw, db, buffers = normalised(x, gradient, [len(x)])  # one process: torch's own
    results = on_ranks(normalised, ranks, x, gradient, sizes, gathered)
    torch.testing.assert_close(torch.cat([r[0] for r in results]), y, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(torch.cat([r[1] for r in results]), dx, rtol=1e-9, atol=1e-10)
    for result in results:
        torch.testing.assert_close(result[2:4], (dw, db), rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(result[4], buffers, rtol=1e-11, atol=1e-12)


def local_statistics(x, sizes):
    model = nn.Sequential(nn.BatchNorm2d(3), SyncBatchNorm2d(3)).double()
    model(own_rows(x, sizes))
    before = [b.clone() for b in model.buffers()]
    average_running_statistics(model)
    return before, list(model.buffers())


def test_statistics_of_local_norms_become_their_mean_over_ranks():
    x = torch.randn(8, 3, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    results = on_ranks(local_statistics, 2, x, [3, 5])
    (mean, var, *_), other = results[0][0], results[1][0]
    assert not torch.equal(mean, other[0])
    for _, after in results:
        torch.testing.assert_close(after[:2], [(mean + other[0]) / 2, (var + other[1]) / 2])
        torch.testing.assert_close(after[3:], results[0][0][3:])


def test_rank_parts_are_what_the_loader_hands_out():
    assert [rank_part(10, r, 4) for r in range(4)] == [slice(0, 3), slice(3, 6), slice(6, 8), slice(8, 10)]


def fails_on_one_rank():
    if rank() == 1:
        raise ValueError("seen by the test")
    gather(torch.ones(1))


def dies_on_one_rank():
    if rank() == 1:
        os._exit(1)
    time.sleep(30)


def hangs_on_one_rank():
    if rank() == 1:
        time.sleep(30)


@pytest.mark.parametrize(
    ("function", "named", "timeout_s"),
    [
        (fails_on_one_rank, "seen by the test", 30),
        (dies_on_one_rank, "rank 1: died", 30),
        (hangs_on_one_rank, "rank 1: hangs", 3),
    ],
)
def test_a_rank_that_fails_dies_or_hangs_is_named_and_not_waited_for(function, named, timeout_s):
    with pytest.raises(RunError, match=named):
        run_ranks(function, 2, timeout_s=timeout_s)


def leaves_its_marks():
    torch.manual_seed(rank())
    torch.use_deterministic_algorithms(True)
    torch.set_default_dtype(torch.float64)
    return torch.randn(1)


def what_is_found():
    switches = torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    return torch.randn(3).tolist(), np.random.rand(), switches


def test_kept_ranks_find_what_new_ones_find():
    on_ranks(leaves_its_marks, 2)
    kept = on_ranks(what_is_found, 2)
    assert kept == on_ranks(what_is_found, 2) == run_ranks(what_is_found, 2)
    with pytest.raises(RunError, match=r"rank 1: (.|\n)*seen by the test"):
        on_ranks(fails_on_one_rank, 2)
    assert 2 not in WORLDS
    assert on_ranks(rank, 2) == [0, 1]


def statistics_after(momentum, batches):
    norm = SyncBatchNorm1d(3, momentum=momentum).double()
    for x in batches:
        norm(x[rank_part(len(x), rank(), world_size())])
    return norm.running_mean, norm.running_var


@pytest.mark.parametrize("momentum", [0.0, 0.3, None], ids=["never moves", "exponential", "cumulative"])
def test_running_statistics_move_by_the_momentum_as_torchs_do(momentum):
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(n, 3, generator=generator, dtype=torch.float64) for n in (7, 5, 9)]
    torchs = nn.BatchNorm1d(3, momentum=momentum).double()
    for x in batches:
        torchs(x)
    for mean, variance in on_ranks(statistics_after, 2, momentum, batches):
        torch.testing.assert_close(mean, torchs.running_mean, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(variance, torchs.running_var, rtol=1e-12, atol=1e-14)


def test_processes_meet_those_that_were_started_with_them_in_a_store_that_others_have_used():
    """Also where one is late, or an earlier one of its rank was there but has gone."""
    store = torch.distributed.HashStore()
    with ThreadPoolExecutor(4) as pool:
        names = []
        for late in (None, 2, 0):
            if late is not None:
                store.set("here/1", "one that died before it met the others")
            found = [pool.submit(meeting, store, rank, 3) for rank in range(3) if rank != late]
            if late is not None:
                wait(found, 0.3)
                found.append(pool.submit(meeting, store, late, 3))
            (name,) = {future.result(timeout=20) for future in found}
            names.append(name)
    assert len(set(names)) == 3
