"""What `make test-system` installs: a refused or failed install is said, and policy-rc.d is as it was."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from cluster import nodes

pytestmark = pytest.mark.system

INSTALL = Path(nodes.__file__).with_name("install.sh")
# The script's /usr/sbin is a folder of the test, in a mount namespace of its own: no sshd, no slurmd, no munged.
INSIDE = 'mount --bind "$1" /usr/sbin && shift && exec "$@"'
# In place of apt-get: asks as a package would whether it may start its service, and fails.
APT_GET = """#!/bin/sh
case "$*" in *install*) ;; *) exit 0;; esac
/usr/sbin/policy-rc.d ssh start && status=0 || status=$?
echo "policy-rc.d says $status for $*"
exit 100
"""
OWN_POLICY = "#!/bin/sh\n# the machine's own\nexit 0\n"
SERVICES = ("openssh-server", "munge", "slurmctld", "slurmd")


@pytest.fixture
def install(tmp_path):
    """Run the script with `sbin` as /usr/sbin, and with a failing apt-get."""
    if reason := nodes.why_not():
        pytest.skip(reason)
    for name in ("sbin", "bin"):
        (tmp_path / name).mkdir()
    apt_get = tmp_path / "bin" / "apt-get"
    apt_get.write_text(APT_GET)
    apt_get.chmod(0o755)

    def run(*prefix: str) -> list[str]:
        environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin"}
        inside = ["unshare", "--mount", "sh", "-c", INSIDE, "sh", str(tmp_path / "sbin")]
        with INSTALL.open() as script:  # read from here: another user may not reach the checkout
            line = [*inside, *prefix, "sh", "-s"] if prefix else [*inside, "sh", str(INSTALL)]
            done = subprocess.run(
                line, stdin=script, env=environment, capture_output=True, text=True, timeout=120
            )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    return run


@pytest.mark.parametrize("own", [OWN_POLICY, None])
def test_nothing_may_start_during_an_install_and_the_policy_is_put_back(install, tmp_path, own):
    policy = tmp_path / "sbin" / "policy-rc.d"
    if own is not None:
        policy.write_text(own)
        policy.chmod(0o755)
    lines = install()
    asked = [line for line in lines if line.startswith("policy-rc.d says")]
    assert asked and all(line.startswith("policy-rc.d says 101 ") for line in asked)
    assert "--no-install-recommends" in asked[0] and all(name in asked[0] for name in SERVICES)
    # All at once failed: each has its own chance.
    assert [line for line in asked if line.endswith("--no-install-recommends slurmd")]
    for name in SERVICES:
        assert f"test-system: apt-get could not install it: {name} is not installed" in lines
    assert sorted(os.listdir(tmp_path / "sbin")) == ([] if own is None else ["policy-rc.d"])
    if own is not None:
        assert policy.read_text() == own and policy.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("own", [OWN_POLICY, None])
def test_what_a_killed_install_left_is_put_right(install, tmp_path, own):
    policy = tmp_path / "sbin" / "policy-rc.d"
    if own is not None:
        policy.write_text(own)
    killed = tmp_path / "bin" / "apt-get"
    killed.write_text(
        f"#!/bin/sh\ntest -e {tmp_path / 'once'} && exit 100\ntouch {tmp_path / 'once'}\nkill -9 $PPID\n"
    )
    with pytest.raises(AssertionError):
        install()
    assert "exit 101" in policy.read_text()
    install()
    assert sorted(os.listdir(tmp_path / "sbin")) == ([] if own is None else ["policy-rc.d"])
    assert own is None or policy.read_text() == own


def test_who_is_not_root_is_told_what_is_missing(install, tmp_path):
    (tmp_path / "sbin").chmod(0o755)
    lines = install("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
    for name in SERVICES:
        assert f"test-system: not root: {name} is not installed" in lines
    assert os.listdir(tmp_path / "sbin") == []


def test_a_machine_without_apt_get_is_told(install, tmp_path):
    """Its PATH has a handful of commands, none of them apt-get."""
    for name in ("sh", "id"):
        (tmp_path / "few" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "few" / name).symlink_to(f"/bin/{name}" if name == "sh" else f"/usr/bin/{name}")
    lines = install("env", f"PATH={tmp_path / 'few'}")
    assert "test-system: no apt-get: pdsh is not installed" in lines
