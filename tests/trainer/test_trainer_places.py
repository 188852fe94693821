"""Where a run's data lies: all that is missing at once, and nothing asked for that is not wanted."""

from __future__ import annotations

import pytest
from run_files import run_of

from basestone.data.errors import DataConfigError
from basestone.trainer.places import locate, locate_heldout

NOTHING = (
    "holds no manifest.json and no .tar files; make shards with `basestone prepare`, or give .tar or "
    "Megatron .bin files"
)


def test_everything_that_is_missing_is_listed(tmp_path):
    run = run_of(data__train=[str(tmp_path / "a")], data__heldout={"h": str(tmp_path / "b")})
    with pytest.raises(DataConfigError) as caught:
        locate(run.data, run.reading, tmp_path / "cache")
    assert str(caught.value).splitlines() == [
        "/shards/t.model is not there; make one with `basestone tokenizer train`",
        f"{tmp_path / 'a'} {NOTHING}",
        f"{tmp_path / 'b'} {NOTHING}",
    ]


def test_held_out_sets_are_found_without_the_rest(tmp_path):
    run = run_of(data__heldout={"h": str(tmp_path / "b")})
    model = tmp_path / "t.model"
    with pytest.raises(DataConfigError) as caught:
        locate_heldout(run.data, run.reading, tmp_path / "cache", model)
    assert str(caught.value) == f"{tmp_path / 'b'} {NOTHING}"
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "manifest.json").touch()
    assert locate_heldout(run.data, run.reading, tmp_path / "cache", model) == {"h": str(tmp_path / "b")}
    assert locate_heldout(run_of().data, run.reading, tmp_path / "cache", model) == {}
