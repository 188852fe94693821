"""Places that hold a secret: refused before anything is written down, in a message without it."""

from __future__ import annotations

from pathlib import Path

import pytest
from run_files import run_values

from basestone.trainer.errors import ConfigError
from basestone.trainer.load import load_run, run_to_toml


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(run_to_toml(run_values()))
    return path


@pytest.mark.parametrize("key", ["checkpoint.remote", "train.init_from"])
@pytest.mark.parametrize(
    "url",
    [
        "s3://me:hush@bucket/run",
        "s3://hush@bucket/run",
        "abfs://box/run?sig=hush",
        "gs://b/run#hush",
        "s3://[hush",
    ],
)
def test_a_place_that_holds_a_secret_is_refused_without_it(run_file, key, url):
    for value in (url, f'["{url}"]'):
        with pytest.raises(ConfigError) as caught:
            load_run(run_file, [f"{key}={value}"])
        assert f"{key}: " in str(caught.value) and "hush" not in str(caught.value)
    with pytest.raises(
        ConfigError, match=r"would be written down in run\.toml.*credentials by the environment"
    ):
        load_run(run_file, [f"{key}={url}"])


@pytest.mark.parametrize("place", ["s3://bucket/a/run", "file:///disk/run", "/disk/a?b#c@d"])
def test_places_without_a_secret_are_taken(run_file, place):
    run = load_run(run_file, [f"checkpoint.remote='{place}'", f"train.init_from='{place}'"])
    assert (run.checkpoint.remote, run.train.init_from) == (place, place)
