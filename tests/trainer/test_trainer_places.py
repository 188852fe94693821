"""Where a run's data lies: all that is missing at once, and nothing asked for that is not wanted."""

from __future__ import annotations

import pytest
from run_files import run_of

from basestone.data.errors import DataConfigError
from basestone.trainer.places import locate, locate_heldout


def test_everything_that_is_missing_is_listed(tmp_path):
    data = run_of(data__train=[str(tmp_path / "a")], data__heldout={"h": str(tmp_path / "b")}).data
    with pytest.raises(DataConfigError) as caught:
        locate(data, tmp_path)
    assert str(caught.value).splitlines() == [
        f"{tmp_path / 'a'} holds no manifest.json; make shards with `basestone prepare`",
        f"{tmp_path / 'b'} holds no manifest.json; make shards with `basestone prepare`",
        "/shards/t.model is not there; make one with `basestone tokenizer train`",
    ]


def test_held_out_sets_are_found_without_the_rest(tmp_path):
    data = run_of(data__heldout={"h": str(tmp_path / "b")}).data
    with pytest.raises(DataConfigError) as caught:
        locate_heldout(data, tmp_path)
    assert str(caught.value) == (
        f"{tmp_path / 'b'} holds no manifest.json; make shards with `basestone prepare`"
    )
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "manifest.json").touch()
    assert locate_heldout(data, tmp_path) == {"h": tmp_path / "b"}
    assert locate_heldout(run_of().data, tmp_path) == {}
