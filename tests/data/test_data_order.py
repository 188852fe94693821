"""The order of everything is a pinned hash."""

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from basestone.data.order import GOLDEN_GAMMA, hash_integers, permute_all, permute_index, splitmix64

KEYS = st.integers(0, 2**64 - 1)


def test_splitmix64_gives_the_reference_sequence() -> None:
    """The generator's published outputs for seed 0."""
    assert [splitmix64(k * GOLDEN_GAMMA) for k in range(3)] == [
        0xE220A8397B1DCDAF,
        0x6E789E6AA1B965F4,
        0x06C45D188009454F,
    ]


def test_orders_are_golden() -> None:
    assert hash_integers(1, 2, 3) == 15020427595393229491
    assert [permute_index(i, 10, 42) for i in range(10)] == [9, 7, 3, 6, 0, 1, 8, 4, 2, 5]
    assert permute_all(10, 42).tolist() == [5, 2, 7, 3, 9, 4, 0, 1, 8, 6]
    assert permute_index(123456789, 10**12, 7) == 85099041936


@settings(deadline=None)
@given(size=st.integers(1, 700), key=KEYS)
def test_permutations_reach_every_place_once(size: int, key: int) -> None:
    assert sorted(permute_index(i, size, key) for i in range(size)) == list(range(size))
    assert sorted(permute_all(size, key).tolist()) == list(range(size))


@settings(deadline=None)
@given(values=st.lists(KEYS, min_size=2, max_size=4), place=st.integers(0, 3))
def test_hash_depends_on_each_value_and_on_order(values: list[int], place: int) -> None:
    place %= len(values)
    changed = [value ^ (index == place) for index, value in enumerate(values)]
    assert hash_integers(*changed) != hash_integers(*values)
    if values != values[::-1]:
        assert hash_integers(*values[::-1]) != hash_integers(*values)


def test_permutations_of_different_keys_differ_and_mix() -> None:
    size = 1000
    first = [permute_index(i, size, 1) for i in range(size)]
    second = [permute_index(i, size, 2) for i in range(size)]
    assert sum(a == b for a, b in zip(first, second, strict=True)) < 20
    # neighbours must not stay neighbours: a mean distance near a third of the size, as in a random order
    steps = [abs(a - b) for a, b in pairwise(first)]
    assert 250 < sum(steps) / len(steps) < 420
