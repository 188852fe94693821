"""sshd on every node of a cluster, with keys made for it: root on any node reaches every node without a question."""

from __future__ import annotations

import shutil
import subprocess

from cluster.nodes import Cluster, Node, why_missing

PACKAGES = {"sshd": "openssh-server", "ssh": "openssh-client", "pdsh": "pdsh"}


def why_not() -> str | None:
    """Say why there can be no sshd and pdsh here, or None where there can."""
    return why_missing(PACKAGES)


def start_sshd(cluster: Cluster) -> None:
    """Start sshd on every node, and on each that comes back. `ssh n1` and `pdsh` with PDSH_RCMD_TYPE=ssh then work."""
    directory = cluster.directory / "ssh"
    directory.mkdir(mode=0o700)
    for name in ("user", "host"):
        line = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", str(directory / name)]
        subprocess.run(line, check=True)
    host_key = (directory / "host.pub").read_text()
    known = "".join(f"{node.name},{node.address} {host_key}" for node in cluster.nodes)
    config = directory / "sshd_config"
    config.write_text(
        "Port 22\n"
        f"HostKey {directory / 'host'}\n"
        f"AuthorizedKeysFile {directory / 'user.pub'}\n"
        "PasswordAuthentication no\n"
        "PermitRootLogin prohibit-password\n"
        "StrictModes no\n"  # the directories above belong to the test
        "UsePAM no\n"
        "PidFile /run/sshd.pid\n"
        "MaxStartups 100:30:200\n"
    )
    sshd = shutil.which("sshd")  # it starts itself again by this path, which must be absolute

    def boot(node: Node) -> None:
        shutil.copy(directory / "user", node.home / ".ssh" / "id_ed25519")
        (node.home / ".ssh" / "known_hosts").write_text(known)
        node.run(["mkdir", "-p", "/run/sshd"])
        node.run([sshd, "-f", config, "-E", node.log / "sshd.log"])

    cluster.add_service(boot)
