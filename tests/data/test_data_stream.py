"""The stream: one global order, whoever reads it, and exact resumption."""

import json
import random
import shutil
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from streams import open_stream

from basestone.data.division import num_lanes, samples_per_reader
from basestone.data.errors import DataConfigError
from basestone.data.order import hash_integers, permute_all, permute_index
from basestone.data.position import merge_states
from basestone.data.stream import StreamBatch, TokenStream
from basestone.data.tokenizer import Tokenizer

LENGTH = 48


def open_streams(
    shards: Sequence[Path], model: Path, readers: int, *, batch: int, workers: int = 0, **more: Any
) -> list[TokenStream]:
    arguments = {"sequence_length": LENGTH, "seed": 7, "global_batch": batch, "workers": workers} | more
    return [
        open_stream(shards, model, reader=reader, num_readers=readers, **arguments) for reader in range(readers)
    ]


def global_batch(batches: Sequence[StreamBatch]) -> dict[int, tuple[list[int], list[int]]]:
    """Join the readers' shares: sample id -> (tokens, weights), checking form and filler."""
    joined: dict[int, tuple[list[int], list[int]]] = {}
    for batch in batches:
        assert (
            batch.tokens.dtype == np.int32 and batch.weights.dtype == np.uint8 and batch.ids.dtype == np.int64
        )
        assert batch.tokens.shape == (len(batch.ids), LENGTH + 1) and batch.weights.shape == (
            len(batch.ids),
            LENGTH,
        )
        assert batch.tokens.shape == batches[0].tokens.shape
        real = batch.ids[batch.ids >= 0].tolist()
        assert batch.ids.tolist() == sorted(real) + [-1] * (len(batch.ids) - len(real))
        assert not batch.weights[len(real) :].any()
        for row, number in enumerate(real):
            assert number not in joined
            joined[number] = (batch.tokens[row].tolist(), batch.weights[row].tolist())
    return joined


def take(streams: list[TokenStream], count: int) -> dict[int, tuple[list[int], list[int]]]:
    samples: dict[int, tuple[list[int], list[int]]] = {}
    for _ in range(count):
        samples |= global_batch([stream.next_batch() for stream in streams])
    return samples


def close(streams: list[TokenStream]) -> None:
    for stream in streams:
        stream.close()


def oracle(shards: Path, model: Path, lanes: int, seed: int, count: int) -> dict[int, list[int]]:
    """Say what the samples are from the definition: whole lanes laid out flat, then cut."""
    manifest = json.loads((shards / "manifest.json").read_text())
    urls = [str(shards / shard["file"]) for shard in manifest["shards"]]
    texts = iter(
        sample["txt"].decode() for sample in webdataset.WebDataset(urls, shardshuffle=False, empty_check=False)
    )
    chunks = [[next(texts) for _ in range(row[2])] for shard in manifest["shards"] for row in shard["chunks"]]
    tokenizer = Tokenizer(model)
    samples = {}
    for lane in range(lanes):
        flat: list[int] = []
        ordinal = lane
        need = -(-count // lanes)
        while len(flat) < need * LENGTH + 1:
            epoch, place = divmod(ordinal, len(chunks))
            chunk = permute_index(place, len(chunks), hash_integers(seed, epoch))
            for index in permute_all(len(chunks[chunk]), hash_integers(seed, epoch, chunk, 1)):
                flat += tokenizer.encode_document(chunks[chunk][index]).tolist()
            ordinal += lanes
        for cycle in range(need):
            samples[lane + cycle * lanes] = flat[cycle * LENGTH : (cycle + 1) * LENGTH + 1]
    return samples


@pytest.fixture(scope="module")
def reference(text_shards: Path, model: Path) -> dict[int, tuple[list[int], list[int]]]:
    """The first 40 global batches of 12, read by one reader in this process."""
    streams = open_streams([text_shards / "train"], model, 1, batch=12)
    return take(streams, 40)


def test_samples_are_what_the_definition_says(
    text_shards: Path, model: Path, reference: dict[int, tuple[list[int], list[int]]]
) -> None:
    expected = oracle(text_shards / "train", model, lanes=12, seed=7, count=480)
    assert sorted(reference) == list(range(480))
    assert {number: tokens for number, (tokens, _) in reference.items()} == expected
    assert all(all(weights) for _, weights in reference.values())


@pytest.mark.parametrize(
    ("readers", "workers"),
    [(1, 1), (1, 3), (2, 0), (2, 2), (3, 1), (4, 0), (5, 0), (5, 1), (7, 0), (12, 0), (13, 0)],
)
def test_order_is_the_same_for_any_readers_and_workers(
    readers: int,
    workers: int,
    text_shards: Path,
    model: Path,
    reference: dict[int, tuple[list[int], list[int]]],
) -> None:
    streams = open_streams([text_shards / "train"], model, readers, batch=12, workers=workers)
    try:
        assert take(streams, 6) == {number: reference[number] for number in range(72)}
    finally:
        close(streams)


def test_readers_that_do_not_divide_the_lanes_get_filler(text_shards: Path, model: Path) -> None:
    streams = open_streams([text_shards / "train"], model, 4, batch=6)
    batches = [stream.next_batch() for stream in streams]
    assert [len(batch.ids) for batch in batches] == [samples_per_reader(6, 4)] * 4 == [2] * 4
    assert [batch.ids.tolist() for batch in batches] == [[0, 4], [1, 5], [2, -1], [3, -1]]
    assert [int(batch.weights.sum()) for batch in batches] == [2 * LENGTH, 2 * LENGTH, LENGTH, LENGTH]
    more = open_streams([text_shards / "train"], model, 8, batch=6)
    assert [stream.next_batch().ids.tolist() for stream in more][5:] == [[5], [-1], [-1]]


@pytest.mark.parametrize(("batch", "lanes"), [(1, 1), (12, 12), (256, 256), (512, 256), (257, 1), (300, 150)])
def test_lanes_are_the_largest_divisor_up_to_256(batch: int, lanes: int) -> None:
    assert num_lanes(batch) == lanes


@settings(deadline=None)
@given(batch=st.integers(1, 2000), readers=st.integers(1, 40))
def test_shares_hold_every_sample(batch: int, readers: int) -> None:
    share, lanes = samples_per_reader(batch, readers), num_lanes(batch)
    assert batch <= share * readers < batch + readers * (batch // lanes)


def test_more_samples_than_lanes_in_a_batch(text_shards: Path, model: Path) -> None:
    """A batch of 514 has two lanes of 257 samples each."""
    assert num_lanes(514) == 2
    one = take(open_streams([text_shards / "train"], model, 1, batch=514), 1)
    assert {n: tokens for n, (tokens, _) in one.items()} == oracle(text_shards / "train", model, 2, 7, 514)
    streams = open_streams([text_shards / "train"], model, 2, batch=514, workers=1)
    assert take(streams, 1) == one
    state = merge_states([stream.state() for stream in streams])
    resumed = open_streams([text_shards / "train"], model, 1, batch=514, state=state)
    assert take(resumed, 1) == take(streams, 1)
    close(streams)


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_elastic_chain_of_resumes_loses_and_repeats_nothing(
    seed: int, text_shards: Path, model: Path, reference: dict[int, tuple[list[int], list[int]]]
) -> None:
    rng = random.Random(seed)
    state, done, samples = None, 0, {}
    while done < 40:
        count = min(rng.randint(1, 12), 40 - done)
        streams = open_streams([text_shards / "train"], model, rng.randint(1, 7), batch=12, state=state)
        samples |= take(streams, count)
        state = json.loads(json.dumps(merge_states([stream.state() for stream in streams])))
        done += count
        assert state["position"] == done * 12
    assert samples == reference


def test_resume_into_workers(
    text_shards: Path, model: Path, reference: dict[int, tuple[list[int], list[int]]]
) -> None:
    streams = open_streams([text_shards / "train"], model, 3, batch=12, workers=1)
    take(streams, 5)
    state = merge_states([stream.state() for stream in streams])
    close(streams)
    streams = open_streams([text_shards / "train"], model, 2, batch=12, workers=2, state=state)
    assert take(streams, 3) == {number: reference[number] for number in range(60, 96)}
    close(streams)


def test_prefetched_samples_do_not_count(text_shards: Path, model: Path) -> None:
    ahead = open_streams([text_shards / "train"], model, 1, batch=12, workers=2)
    plain = open_streams([text_shards / "train"], model, 1, batch=12)
    assert ahead[0].state() == plain[0].state()
    for _ in range(9):
        take(ahead, 1)
        take(plain, 1)
        assert ahead[0].state() == plain[0].state()
    close(ahead)


def test_a_larger_batch_of_as_many_lanes_goes_on(text_shards: Path, model: Path) -> None:
    streams = open_streams([text_shards / "train"], model, 1, batch=256)
    take(streams, 2)
    resumed = open_streams([text_shards / "train"], model, 1, batch=512, state=streams[0].state())
    assert resumed[0].position == 512
    assert take(resumed, 1) == take(streams, 2)


def test_every_document_comes_once_in_each_epoch(text_shards: Path, model: Path, documents: list[str]) -> None:
    """Lanes pass from one epoch to the next each by itself: over three epochs a count may be off by one."""
    shards = text_shards / "train"
    manifest = json.loads((shards / "manifest.json").read_text())
    tokenizer = Tokenizer(model)
    urls = [str(shards / shard["file"]) for shard in manifest["shards"]]
    dataset = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False)
    wanted = {tuple(tokenizer.encode_document(sample["txt"].decode()).tolist()) for sample in dataset}
    assert len(wanted) == manifest["documents"]
    batches = 3 * sum(map(len, wanted)) // (LENGTH * 4)
    samples = take(open_streams([shards], model, 1, batch=4), batches)
    seen: Counter[tuple[int, ...]] = Counter()
    for lane in range(4):
        flat = [t for number in range(lane, len(samples), 4) for t in samples[number][0][:-1]]
        ends = [-1, *(index for index, token in enumerate(flat) if token == tokenizer.eos)]
        for start, stop in pairwise(ends):
            seen[tuple(flat[start + 1 : stop + 1])] += 1
    assert set(seen) == wanted
    assert set(seen.values()) <= {2, 3, 4} and 2.7 < sum(seen.values()) / len(wanted) <= 3.1


def test_fewer_chunks_than_lanes(text_shards: Path, model: Path) -> None:
    shards = text_shards / "heldout"
    assert len(json.loads((shards / "manifest.json").read_text())["shards"][0]["chunks"]) < 32
    samples = take(open_streams([shards], model, 1, batch=32), 20)
    assert {n: tokens for n, (tokens, _) in samples.items()} == oracle(shards, model, 32, 7, 640)
    assert take(open_streams([shards], model, 3, batch=32), 20) == samples


def test_seed_and_epoch_change_the_order(text_shards: Path, model: Path) -> None:
    first = take(open_streams([text_shards / "train"], model, 1, batch=8), 2)
    assert take(open_streams([text_shards / "train"], model, 1, batch=8, seed=8), 2) != first
    assert take(open_streams([text_shards / "train"], model, 1, batch=8), 2) == first


def test_document_starts_can_be_masked(text_shards: Path, model: Path) -> None:
    plain = take(open_streams([text_shards / "train"], model, 1, batch=12), 10)
    masked = take(open_streams([text_shards / "train"], model, 1, batch=12, mask_document_start=True), 10)
    starts = 0
    for number, (tokens, weights) in masked.items():
        assert tokens == plain[number][0]
        assert weights == [int(token != 1) for token in tokens[1:]]
        starts += weights.count(0)
    assert starts > 5


def test_blocks_of_tokens_give_the_same_documents(text_shards: Path, token_shards: Path, model: Path) -> None:
    """Blocks are cut elsewhere than chunks of text, so the order differs but the documents do not."""

    def lane_documents(shards: Path) -> set[tuple[int, ...]]:
        samples = take(open_streams([shards], model, 2, batch=2), 2500)
        found = set()
        for lane in range(2):
            flat = [t for number in range(lane, len(samples), 2) for t in samples[number][0][:-1]]
            ends = [-1, *(index for index, token in enumerate(flat) if token == 2)]
            found |= {tuple(flat[a + 1 : b + 1]) for a, b in pairwise(ends)}
        return found

    assert lane_documents(token_shards / "train") == lane_documents(text_shards / "train")


def test_blocks_are_read_alike_by_workers(token_shards: Path, model: Path) -> None:
    plain = take(open_streams([token_shards / "train"], model, 1, batch=8), 5)
    streams = open_streams([token_shards / "train"], model, 2, batch=8, workers=2)
    assert take(streams, 5) == plain
    close(streams)


def test_several_directories_are_mixed(text_shards: Path, token_shards: Path, model: Path) -> None:
    both = [text_shards / "heldout", token_shards / "train"]
    streams = open_streams(both, model, 1, batch=8)
    alone = [open_streams([directory], model, 1, batch=8) for directory in both]
    fingerprints = [stream.state()["sources"][0]["fingerprint"] for (stream,) in (streams, *alone)]
    assert len(set(fingerprints)) == 3
    samples = take(streams, 3)
    resumed = open_streams(both, model, 3, batch=8, state=streams[0].state(), workers=1)
    assert take(resumed, 2) == take(streams, 2)
    close(resumed)
    assert samples != take(open_streams(both[::-1], model, 1, batch=8), 3)


def test_a_directory_may_move(text_shards: Path, model: Path, tmp_path: Path) -> None:
    shutil.copytree(text_shards / "train", tmp_path / "moved")
    streams = open_streams([text_shards / "train"], model, 1, batch=8)
    take(streams, 2)
    moved = open_streams([tmp_path / "moved"], model, 1, batch=8, state=streams[0].state())
    assert take(moved, 2) == take(streams, 2)


def test_a_state_of_something_else_is_refused_with_all_differences(
    text_shards: Path, model: Path, other_model: Path
) -> None:
    state = open_streams([text_shards / "train"], model, 1, batch=8)[0].state()
    with pytest.raises(DataConfigError) as caught:
        open_streams([text_shards / "train"], other_model, 1, batch=12, seed=9, sequence_length=32, state=state)
    message = str(caught.value)
    for part in (
        "tokenizer: the checkpoint has ",
        "seed: the checkpoint has 7, this run 9",
        "sequence length: the checkpoint has 48, this run 32",
        "lanes (from the global batch, or data.lanes): the checkpoint has 8, this run 12",
    ):
        assert part in message
    with pytest.raises(
        DataConfigError, match=r"cannot be taken up: content of the source 'train' \(fingerprint\)"
    ):
        open_streams([text_shards / "heldout"], model, 1, batch=8, state=state)


def test_one_readers_state_is_not_taken_for_all(text_shards: Path, model: Path) -> None:
    streams = open_streams([text_shards / "train"], model, 2, batch=8)
    with pytest.raises(DataConfigError, match=r"holds 4 of 8 lanes \(missing: \[1, 3, 5, 7\]\); merge"):
        open_streams([text_shards / "train"], model, 1, batch=8, state=streams[0].state())
    with pytest.raises(DataConfigError, match="hold 4 of 8 lanes"):
        merge_states([streams[0].state()])
    take(streams[:1], 1)
    with pytest.raises(DataConfigError, match=r"differ in position \(position: 8 and 0\)"):
        merge_states([stream.state() for stream in streams])
    with pytest.raises(DataConfigError, match="no data positions"):
        merge_states([])
    other = open_streams([text_shards / "train"], model, 1, batch=8)[0].state()
    wrong = {**other, "lanes": [0, 1]}
    with pytest.raises(DataConfigError, match="two readers claim lane 0"):
        merge_states([other, wrong])


def test_tokens_of_another_tokenizer_are_refused(token_shards: Path, other_model: Path) -> None:
    with pytest.raises(
        DataConfigError, match=r"was tokenised with tokenizer [0-9a-f]{12}, got .* prepare the text"
    ):
        open_streams([token_shards / "train"], other_model, 1, batch=8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shards": []}, "no shard directories"),
        ({"reader": 2}, "reader is 2; it must be 0 to 0"),
        ({"sequence_length": 0}, "sequence length is 0"),
        ({"workers": -1}, "workers is -1"),
        ({"global_batch": 0}, "global batch is 0"),
        ({"num_readers": 0}, "it must be"),
        ({"shards": [Path("/nonexistent")]}, "shard directory /nonexistent does not exist"),
    ],
)
def test_impossible_requests_are_named(change: dict, message: str, text_shards: Path, model: Path) -> None:
    arguments = {
        "shards": [text_shards / "train"],
        "model": model,
        "sequence_length": 8,
        "global_batch": 4,
        "seed": 0,
        "reader": 0,
        "num_readers": 1,
        "workers": 0,
    }
    with pytest.raises(DataConfigError, match=message):
        open_stream(**{**arguments, **change})
    with pytest.raises(DataConfigError, match="number of readers is 0"):
        samples_per_reader(4, 0)
