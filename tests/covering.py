"""Products of parameters without most of their cases: a fault mostly needs one value, or two that meet."""

from itertools import combinations, product


def covering(*factors):
    """A few cases of product(*factors) in which each value of a factor meets each value of every other factor."""
    cases = list(product(*factors))
    left, chosen = set().union(*map(pairs, cases)), []
    while left:
        case = max(cases, key=lambda case: len(left & pairs(case)))
        left -= pairs(case)
        chosen.append(case)
    return chosen


def pairs(case):
    return set(combinations(enumerate(case), 2))
