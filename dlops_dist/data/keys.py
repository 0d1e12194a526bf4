"""Keys of all randomness: whatever is drawn is a pure function of (seed, epoch, purpose, sample), never of a state.

The mixer is SplitMix64's (Steele, Lea & Flood 2014, Fast Splittable Pseudorandom Number Generators).
"""

GOLDEN = 0x9E3779B97F4A7C15
MIX_1, MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
PURPOSES = (
    "order", "class order", "holdout", "packing", "crop", "flip", "shapes", "resized crop", "colors", "cutout", "limit",
    "corruption", "dropout", "rotation", "mix", "transform",
)  # fmt: skip
"""New ones at the end: the place is part of the key."""
_MASK = 2**64 - 1


def key(seed: int, epoch: int, purpose: str) -> int:
    """One 64-bit key of everything but the sample."""
    mixed = 0
    for part in (seed, epoch, PURPOSES.index(purpose)):
        mixed = mix((mixed ^ part) + GOLDEN & _MASK)
    return mixed


def mix(x: int) -> int:
    """SplitMix64's finaliser: a bijection of 64-bit integers in which every bit depends on every bit."""
    x = (x ^ x >> 30) * MIX_1 & _MASK
    x = (x ^ x >> 27) * MIX_2 & _MASK
    return x ^ x >> 31
