"""What tests of tasks on text share: ids of special tokens, and when a share is the one that is promised."""

import math

from basestone.data.tasks.sentences import EncoderSpecials

SPECIALS = EncoderSpecials(cls=1, sep=2, pad=3)


def assert_rate(hits: int, trials: int, rate: float) -> None:
    """Ask that a binomial count lies within five standard deviations: a false alarm in 1.7 million."""
    assert abs(hits - trials * rate) <= 5 * math.sqrt(trials * rate * (1 - rate)), (hits / trials, rate)
