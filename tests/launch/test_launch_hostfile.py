"""Hostfiles: what is read, and what is refused with the line and the reason."""

from __future__ import annotations

import pytest

from basestone.launch.cluster.hostfile import Host, read_hostfile
from basestone.trainer.errors import ConfigError


def test_hosts_comments_and_blank_lines(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("\ufeff# the new rack\n\nnode-1 slots=8  # its GPU 3 was replaced\n10.0.0.2\tslots=8\n")
    assert read_hostfile(path) == [Host("node-1", 8), Host("10.0.0.2", 8)]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("n0 slots=2x", "after the name comes slots=N"),
        ("n0 slots=0", "after the name comes slots=N"),
        ("n0 slots = 2", "after the name comes slots=N"),
        ("n0", "after the name comes slots=N"),
        ("n0:2222 slots=2", "'n0:2222' is no host name"),
        ("n[0-1] slots=2", "'n[0-1]' is no host name"),
        ("n0;id slots=2", "'n0;id' is no host name"),
        ("-oProxyCommand=id slots=2", "is no host name"),
        ("$(id) slots=2", "is no host name"),
        ("ok slots=2", "the host was named before"),
    ],
)
def test_a_malformed_line_is_named_with_its_reason(tmp_path, line, reason):
    path = tmp_path / "hosts"
    path.write_text(f"ok slots=2\n{line}\nfine slots=2\n")
    with pytest.raises(ConfigError) as caught:
        read_hostfile(path)
    assert f"line 2: {line!r}: " in str(caught.value) and reason in str(caught.value)


def test_all_bad_lines_are_told_at_once(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("a\nb\nc slots=1\n")
    with pytest.raises(ConfigError, match=r"2 bad line\(s\)\n  line 1: 'a': .*\n  line 2: 'b'"):
        read_hostfile(path)


def test_hosts_of_unequal_slots_are_refused(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("a slots=3\nb slots=2\n")
    with pytest.raises(ConfigError, match=r"every host needs as many slots as the others \(got a 3, b 2\)"):
        read_hostfile(path)


def test_no_hostfile_no_host_and_no_text(tmp_path):
    with pytest.raises(ConfigError, match="there is no such hostfile"):
        read_hostfile(tmp_path / "none")
    (tmp_path / "empty").write_text("# nobody\n")
    with pytest.raises(ConfigError, match="names no host; one a line"):
        read_hostfile(tmp_path / "empty")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read as a hostfile"):
        read_hostfile(tmp_path / "bytes")
    with pytest.raises(ConfigError, match="cannot be read as a hostfile"):
        read_hostfile(tmp_path)
