"""SGD against a loop of its equation and, bit by bit, torch.optim.SGD; the learning-rate schedules."""

import math
from itertools import product

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from dlops_dist import optim
from dlops_dist.optim import SGD, lr_factor

SETTINGS = [
    dict(zip(("momentum", "dampening", "nesterov", "weight_decay", "maximize"), values, strict=True))
    for values in product([0.0, 0.9], [0.0, 0.3], [False, True], [0.0, 0.02], [False, True])
    if not (values[2] and (values[0] == 0 or values[1] > 0))
]
each_setting = pytest.mark.parametrize(
    "setting", SETTINGS, ids=lambda s: "-".join(k for k, v in s.items() if v) or "sgd"
)

SHAPES = [(5, 3), (7,), (2, 3, 3), (4,), (3, 2), ()]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float32, torch.float32, torch.float64]
NEVER, LATE, PAUSED = 3, 4, 1  # parameters without gradient, from step 2 on, and in all steps but 3


def new_parameters():
    generator = torch.Generator().manual_seed(0)
    return [
        nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
        for shape, dtype in zip(SHAPES, DTYPES, strict=True)
    ]


def set_gradients(parameters, step):
    generator = torch.Generator().manual_seed(100 + step)
    for i, p in enumerate(parameters):
        gradient = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        missing = i == NEVER or (i == LATE and step < 2) or (i == PAUSED and step == 3)
        p.grad = None if missing else gradient


def take_steps(optimizer, parameters, first, last):
    for step in range(first, last):
        set_gradients(parameters, step)
        optimizer.param_groups[0]["lr"] = 0.1 / (1 + step)
        optimizer.step()
        yield step


def assert_same_bits(ours, theirs):
    for p, q in zip(ours, theirs, strict=True):
        assert torch.equal(p, q)


def assert_same_momentum(ours, theirs):
    """Equal buffers for the same parameters; a missing entry and None are the same."""
    for p, q in zip(ours.param_groups[0]["params"], theirs.param_groups[0]["params"], strict=True):
        one, other = (optimizer.state[x].get("momentum_buffer") for optimizer, x in ((ours, p), (theirs, q)))
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)


@each_setting
def test_every_step_gives_the_bits_of_torch(setting):
    our_parameters, their_parameters = new_parameters(), new_parameters()
    ours = SGD(our_parameters, lr=0.1, **setting)
    theirs = torch.optim.SGD(their_parameters, lr=0.1, foreach=True, **setting)
    both = zip(take_steps(ours, our_parameters, 0, 6), take_steps(theirs, their_parameters, 0, 6), strict=True)
    for _ in both:
        assert_same_bits(our_parameters, their_parameters)
        assert_same_momentum(ours, theirs)
    assert not torch.equal(our_parameters[0], new_parameters()[0])
    assert torch.equal(our_parameters[NEVER], new_parameters()[NEVER])


@each_setting
def test_tensors_that_are_updated_in_pieces_give_the_bits_of_torch_too(setting, monkeypatch):
    """Channels-last ones too; transposed ones cannot be cut, and are not; a remainder of one value is a piece."""
    monkeypatch.setattr(optim, "PIECE", 2**14)
    generator = torch.Generator().manual_seed(0)
    sizes = [(100, 513), (2**14 + 1,), (3, 5)]
    starts = [torch.randn(size, generator=generator) for size in sizes]
    starts += [torch.randn(513, 100).t(), torch.randn(60, 40, 3, 3).contiguous(memory_format=torch.channels_last)]
    our_parameters, their_parameters = ([torch.nn.Parameter(x.clone()) for x in starts] for _ in range(2))
    ours = SGD(our_parameters, lr=0.1, **setting)
    theirs = torch.optim.SGD(their_parameters, lr=0.1, foreach=True, **setting)
    for factor in (1.0, -0.3):
        for p, q, x in zip(our_parameters, their_parameters, starts, strict=True):
            p.grad = x.cos() * factor
            q.grad = p.grad.clone()
        ours.step()
        theirs.step()
        assert_same_bits(our_parameters, their_parameters)
        assert_same_momentum(ours, theirs)


def ours(parameters, setting):
    return SGD(parameters, lr=0.1, **setting)


def theirs(parameters, setting):
    return torch.optim.SGD(parameters, lr=0.1, foreach=True, **setting)


@each_setting
@pytest.mark.parametrize(("first", "second"), [(ours, theirs), (theirs, ours), (ours, ours)])
def test_a_loaded_state_goes_on_with_the_same_bits(setting, first, second):
    whole, parts = new_parameters(), new_parameters()
    list(take_steps(theirs(whole, setting), whole, 0, 6))

    before = first(parts, setting)
    list(take_steps(before, parts, 0, 3))
    after = second(parts, {"momentum": 0.5})  # all settings come from the state
    after.load_state_dict(before.state_dict())
    after.param_groups[0]["foreach"] = True  # torch's own choice, of which our state says nothing
    list(take_steps(after, parts, 3, 6))
    assert_same_bits(parts, whole)


@each_setting
def test_steps_equal_the_loop(setting):
    """g <- g + w p;  b <- m b + (1 - t) g (b = g at first);  p <- p - lr (g + m b if nesterov else b)."""
    lr, momentum, decay = 0.1, setting["momentum"], setting["weight_decay"]
    parameter = nn.Parameter(torch.tensor([1.5, -0.5, 2.0], dtype=torch.float64))
    optimizer = SGD([parameter], lr=lr, **setting)
    values, buffers = parameter.tolist(), [None] * 3
    for step in range(5):
        gradients = [math.sin(3 * step + i) for i in range(3)]
        parameter.grad = torch.tensor(gradients, dtype=torch.float64)
        optimizer.step()
        for i, gradient in enumerate(gradients):
            g = (-gradient if setting["maximize"] else gradient) + decay * values[i]
            buffers[i] = g if buffers[i] is None else momentum * buffers[i] + (1 - setting["dampening"]) * g
            direction = g + momentum * buffers[i] if setting["nesterov"] else buffers[i]
            values[i] -= lr * (direction if momentum else g)
        assert parameter.tolist() == pytest.approx(values, rel=1e-13)


def test_each_group_keeps_its_own_settings():
    our_parameters, their_parameters = new_parameters(), new_parameters()

    def groups(p):
        return [{"params": p[:2], "lr": 0.5, "weight_decay": 0.1}, {"params": p[2:], "momentum": 0.9, "nesterov": True}]

    ours = SGD(groups(our_parameters), lr=0.1)
    theirs = torch.optim.SGD(groups(their_parameters), lr=0.1, foreach=True)
    for step in range(4):
        for optimizer, parameters in ((ours, our_parameters), (theirs, their_parameters)):
            set_gradients(parameters, step)
            optimizer.step()
        assert_same_bits(our_parameters, their_parameters)


@each_setting
def test_gradients_stay_as_they_are(setting):
    parameters, untouched = new_parameters(), new_parameters()
    optimizer = SGD(parameters, lr=0.1, **setting)
    for step in range(3):
        set_gradients(parameters, step)
        set_gradients(untouched, step)
        optimizer.step()
        for p, q in zip(parameters, untouched, strict=True):
            assert (p.grad is None) == (q.grad is None)
            assert p.grad is None or torch.equal(p.grad, q.grad)


def test_the_closure_runs_with_gradients_and_its_loss_is_returned():
    parameter = nn.Parameter(torch.tensor(3.0))

    def closure():
        loss = parameter.square()
        loss.backward()
        return loss

    assert SGD([parameter], lr=0.5).step(closure).item() == 9
    assert parameter.item() == 0


@pytest.mark.parametrize(
    ("field", "arguments"),
    [
        ("lr", {"lr": -0.1}),
        ("lr", {"lr": math.nan}),
        ("momentum", {"momentum": -0.9}),
        ("momentum", {"momentum": math.nan}),
        ("weight_decay", {"weight_decay": -1e-4}),
        ("weight_decay", {"weight_decay": math.nan}),
        ("nesterov", {"nesterov": True}),
        ("nesterov", {"nesterov": True, "momentum": 0.9, "dampening": 0.1}),
    ],
)
def test_an_argument_out_of_range_is_named(field, arguments):
    with pytest.raises(ValueError, match=field):
        SGD(new_parameters(), **arguments)


def test_sparse_gradients_are_refused():
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="sparse"):
        SGD(embedding.parameters(), lr=0.1).step()


SCHEDULES = ["cosine", "one-cycle", "step", "constant"]
each_schedule = pytest.mark.parametrize("schedule", SCHEDULES)


@pytest.mark.parametrize(
    ("schedule", "warmup", "step", "factor"),
    [
        ("cosine", 0, 0, 1.0),
        ("cosine", 0, 25, (2 + math.sqrt(2)) / 4),
        ("cosine", 0, 50, 0.5),
        ("cosine", 0, 75, (2 - math.sqrt(2)) / 4),
        ("cosine", 0, 99, math.sin(math.pi / 200) ** 2),
        ("cosine", 20, 0, 0.05),
        ("cosine", 20, 9, 0.5),
        ("cosine", 20, 19, 1.0),
        ("cosine", 20, 20, 1.0),
        ("cosine", 20, 60, 0.5),
        ("one-cycle", 20, 9, (1 + 1 / 25) / 2),
        ("one-cycle", 20, 19, 1.0),
        ("one-cycle", 20, 20, 1.0),
        ("one-cycle", 20, 60, (1 + 1e-4) / 2),
        ("one-cycle", 0, 0, 1.0),
        ("step", 0, 0, 1.0),
        ("step", 0, 29, 1.0),
        ("step", 0, 30, 0.2),
        ("step", 0, 59, 0.2),
        ("step", 0, 60, 0.04),
        ("step", 0, 99, 0.008),
        ("step", 20, 4, 0.25),
        ("step", 20, 25, 1.0),
        ("step", 20, 30, 0.2),
        ("constant", 0, 0, 1.0),
        ("constant", 20, 9, 0.5),
        ("constant", 20, 99, 1.0),
    ],
)
def test_factor_at_landmarks_of_100_steps(schedule, warmup, step, factor):
    found = lr_factor(step, 100, schedule, warmup, steps_per_decay=30, gamma=0.2)
    assert found == pytest.approx(factor, rel=1e-12)


def test_one_cycle_starts_at_a_25th_and_ends_at_1e_4():
    assert lr_factor(0, 2_000_000, "one-cycle", 1_000_000) == pytest.approx(1 / 25, rel=1e-9)
    assert lr_factor(1_999_999, 2_000_000, "one-cycle", 1_000_000) == pytest.approx(1e-4, rel=1e-6)


@each_schedule
@pytest.mark.parametrize("warmup", [1, 7, 100])
def test_warm_up_rises_to_the_peak_and_goes_on_from_there(schedule, warmup):
    factors = [lr_factor(step, 1000, schedule, warmup, steps_per_decay=300) for step in range(warmup + 1)]
    assert factors[:-1] == sorted(set(factors[:-1]))
    assert factors[0] > 0
    assert factors[-2:] == pytest.approx([1, 1], rel=1e-12)


@each_schedule
@pytest.mark.parametrize("warmup", [0, 100])
def test_neighbouring_steps_differ_little_but_for_the_decays_of_step(schedule, warmup):
    factors = [lr_factor(step, 1000, schedule, warmup, steps_per_decay=300, gamma=0.5) for step in range(1000)]
    jumps = [step for step in range(1, 1000) if abs(factors[step] - factors[step - 1]) > 0.02]
    assert jumps == ([300, 600, 900] if schedule == "step" else [])


@each_schedule
@given(total=st.integers(1, 10_000), data=st.data())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_factor_is_in_0_to_1_and_never_rises_after_the_warm_up(schedule, total, data):
    warmup, step = data.draw(st.integers(0, total)), data.draw(st.integers(0, total - 1))
    steps_per_decay, gamma = data.draw(st.integers(1, total)), data.draw(st.floats(0.01, 1.0))
    factor = lr_factor(step, total, schedule, warmup, steps_per_decay, gamma)
    assert 0 <= factor <= 1
    assume(warmup <= step < total - 1)
    assert lr_factor(step + 1, total, schedule, warmup, steps_per_decay, gamma) <= factor


@pytest.mark.parametrize(
    ("schedule", "reference"),
    [
        ("cosine", lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40)),
        ("step", lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, step_size=15, gamma=0.3)),
    ],
)
def test_schedules_without_warm_up_equal_torch(schedule, reference):
    optimizer = SGD([nn.Parameter(torch.zeros(()))], lr=1.0)
    scheduler = reference(optimizer)
    for step in range(40):
        factor = lr_factor(step, 40, schedule, steps_per_decay=15, gamma=0.3)
        assert factor == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9, abs=1e-12)
        optimizer.step()
        scheduler.step()
