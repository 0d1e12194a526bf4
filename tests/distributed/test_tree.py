"""Sums over blocks in one fixed tree, against a sum in Python in the tree's order: to the bit."""

import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kept_ranks import on_ranks

from dlops_dist.distributed.collectives import rank
from dlops_dist.distributed.tree import Blocks, TreeSum, tree_sum
from dlops_dist.errors import RunError


def in_order(rows):
    """The tree by its definition: the left part holds the largest power of two of blocks that is not all of them."""
    if len(rows) == 1:
        return rows[0]
    left = 1
    while 2 * left < len(rows):
        left *= 2
    return in_order(rows[:left]) + in_order(rows[left:])


def rows_of(number, size, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    magnitudes = 10.0 ** torch.randint(-4, 5, (number, size), generator=generator)
    return (torch.randn(number, size, generator=generator, dtype=torch.float64) * magnitudes).to(dtype)


@given(st.integers(1, 40), st.integers(0, 5), st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_one_process_adds_in_the_order_of_the_tree(number, seed, dtype):
    rows = rows_of(number, 3, dtype, seed)
    assert torch.equal(tree_sum(rows), in_order(rows))
    added = TreeSum(Blocks(number))
    for block, row in enumerate(rows.clone()):
        added.add(block, row)
    assert torch.equal(added.total(), in_order(rows))


def totals(cases):
    found = []
    for number, size, dtype in cases:
        blocks, free = Blocks(number), []
        added = TreeSum(blocks, free)
        for block in blocks.own:
            added.add(block, rows_of(number, size, dtype)[block].clone())
        found.append(added.total())
        assert len(free) == len(blocks.own) - 1
    return found


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_ranks_add_to_the_bits_of_one_process(ranks):
    kinds = (torch.float32, torch.float64, torch.bfloat16)
    cases = [(number, size, dtype) for number in range(ranks, 13) for size in (1, 7, 64) for dtype in kinds]
    for of_rank in on_ranks(totals, ranks, cases):
        for case, total in zip(cases, of_rank, strict=True):
            assert torch.equal(total, in_order(rows_of(*case))), case


def own_pieces(number, pieces):
    added = TreeSum(Blocks(number), pieces=pieces)
    for block in Blocks(number).own:
        added.add(block, rows_of(number, sum(pieces), torch.float32)[block].clone())
    return added.total()


@pytest.mark.parametrize(("number", "pieces"), [(4, [3, 5]), (5, [4, 0, 1]), (8, [0, 2, 7, 1])])
def test_ranks_that_want_a_piece_each_get_those_bits_of_the_whole(number, pieces):
    whole = in_order(rows_of(number, sum(pieces), torch.float32))
    assert torch.equal(torch.cat(on_ranks(own_pieces, len(pieces), number, pieces)), whole)


def shares(number, num_samples):
    blocks = Blocks(number)
    return blocks.share(num_samples), blocks.shares(num_samples), [blocks.part(num_samples, b) for b in blocks.own]


@pytest.mark.parametrize(("number", "num_samples"), [(4, 40), (5, 7), (8, 3), (4, 0)])
def test_ranks_share_a_batch_by_whole_blocks_that_adjoin(number, num_samples):
    found = on_ranks(shares, 3, number, num_samples)
    assert [share.start for share, *_ in found] == [0, *(share.stop for share, *_ in found[:-1])]
    assert found[-1][0].stop == num_samples
    assert {tuple(sizes) for _, sizes, _ in found} == {tuple(share.stop - share.start for share, *_ in found)}
    assert [part for *_, parts in found for part in parts] == shares(number, num_samples)[2]


def dies():
    added = TreeSum(Blocks(4))
    for block in Blocks(4).own:
        added.add(block, torch.ones(8))
    if rank() == 1:
        os._exit(1)
    return added.total()


def test_a_rank_that_dies_in_a_sum_is_found_at_once():
    with pytest.raises(RunError) as failed:
        on_ranks(dies, 2)
    assert "rank 1: died" in str(failed.value)
    assert "rank 0: hangs" not in str(failed.value)
