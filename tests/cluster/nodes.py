"""Several nodes on one Linux machine, for tests as root: each has its own network, processes, host name and mounts.

A node is what namespaces make of a process: nothing is added to the machine's network, /etc or home directories.
The namespaces have no names: they exist as long as their processes do, and those end with the test session, however
that ends. So sessions do not meet, and a killed one leaves nothing to clear.
Nodes share the file system, but for /run, /dev/shm, /proc, /sys, some files of /etc and root's home directory.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

NETWORK = "10.77.0"
FIRST_ADDRESS = 10
MOST_NODES = 200
INIT = Path(__file__).with_name("init.py")
NAMESPACES = ("--net", "--pid", "--mount", "--uts")
START_TIMEOUT_S = 30.0


def why_missing(packages: Mapping[str, str]) -> str | None:
    """Say which of the commands are not there, and which Debian package has each."""
    absent = [
        f"{command} (Debian's {package})" for command, package in packages.items() if not shutil.which(command)
    ]
    return f"not installed: {', '.join(absent)}" if absent else None


def why_not() -> str | None:
    """Say why there can be no cluster here, or None where there can."""
    if os.geteuid() != 0:
        return "a cluster of namespaces needs root"
    if Path("/proc/self/uid_map").read_text().split() != ["0", "0", str(2**32 - 1)]:
        return "a cluster of namespaces needs the machine's root, this is that of a user namespace"
    packages = {"ip": "iproute2", "unshare": "util-linux", "nsenter": "util-linux", "mount": "mount"}
    if reason := why_missing(packages):
        return reason
    for link in (("v0", "type", "veth", "peer", "name", "eth0"), ("br0", "type", "bridge")):
        line = ["unshare", *NAMESPACES, "--fork", "ip", "link", "add", *link]
        done = subprocess.run(line, capture_output=True, text=True)
        if done.returncode:
            return f"no permission for namespaces and links: {done.stderr.strip() or done.returncode}"
    return None


class NodeProcess(subprocess.Popen):
    """A process of a node. Signals go to it, not to the `nsenter` that waits for it and ends as it ends."""

    def send_signal(self, sig: int) -> None:
        """Send a signal to the process in the node."""
        while self.poll() is None:
            with suppress(ProcessLookupError):
                children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
                if children:
                    os.kill(int(children[0]), sig)
                    return
            time.sleep(0.001)  # nsenter has not forked yet, or has just ended


class Node:
    """One node of a cluster. Its files lie in `directory`: `home` is root's home directory, `log` for services."""

    def __init__(self, cluster: Cluster, index: int) -> None:
        self.index = index
        self.name = f"n{index}"
        self.address = f"{NETWORK}.{FIRST_ADDRESS + index}"
        self.directory = cluster.directory / self.name
        self.home = self.directory / "home"
        self.log = self.directory / "log"
        self.pid = 0
        self._cluster = cluster
        self._init: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Switch the node on, with the services of the cluster. Its directory is as it was, its /run is empty."""
        for directory in (self.home / ".ssh", self.log):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._write_etc()
        with (self.log / "init.log").open("a") as log:
            unshare = ["unshare", *NAMESPACES, "--fork", "--"]
            init = [sys.executable, "-I", "-S", str(INIT), self.name, str(self.directory)]
            self._init = subprocess.Popen(
                [*unshare, *init],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,  # an interrupt at the terminal is for the test
            )
        answer = self._init.stdout.readline()
        if not answer:
            self._init.wait()
            raise RuntimeError(f"{self.name} did not start: {(self.log / 'init.log').read_text()}")
        self.pid = int(answer)
        self._cluster.plug_in(self)
        for service in self._cluster.services:
            service(self)

    def kill(self) -> None:
        """Take the node away as if it lost power: its peers hear nothing more. Return when its processes are gone.

        `node.run(["kill", "-9", "-1"], check=False)` instead ends its processes, which closes their connections.
        """
        if self._init is None:
            return
        self._cluster.unplug(self)
        with suppress(ProcessLookupError):
            os.kill(self.pid or self._init.pid, signal.SIGKILL)
        self._init.wait()
        self._init.stdin.close()
        self._init.stdout.close()
        self._init, self.pid = None, 0

    def popen(
        self,
        argv: Sequence[object],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        **options: Any,
    ) -> NodeProcess:
        """Start a program on the node; its arguments arrive byte by byte, as no shell sees them.

        `env` is its whole environment (by default the test's), but HOME is always the node's. `options` are Popen's.
        """
        if not self.pid:
            raise RuntimeError(f"{self.name} is off")
        enter = ["nsenter", "--target", str(self.pid), *NAMESPACES, "--"]
        # A working directory is found by its path after entering: one from outside has no path inside.
        change = ["unshare", f"--wd={cwd or Path.cwd()}", "--"]
        environment = {**(os.environ if env is None else env), "HOME": str(self.home)}
        plain = [argument if isinstance(argument, bytes) else str(argument) for argument in argv]
        return NodeProcess([*enter, *change, *plain], env=environment, **options)

    def run(
        self,
        argv: Sequence[object],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        timeout_s: float = 60.0,
        check: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        """Run a program on the node to its end, with nothing on its standard input.

        Raise RuntimeError where it fails, TimeoutError where it does not end. What it leaves running is not waited for.
        """
        text = {"mode": "w+", "encoding": "utf-8", "errors": "surrogateescape"}
        with tempfile.TemporaryFile(**text) as out, tempfile.TemporaryFile(**text) as err:
            process = self.popen(argv, env=env, cwd=cwd, stdin=subprocess.DEVNULL, stdout=out, stderr=err)
            try:
                process.wait(timeout_s)
                in_time = True
            except subprocess.TimeoutExpired:
                in_time = False
            finally:
                process.kill()
                process.wait()
            out.seek(0)
            err.seek(0)
            done = subprocess.CompletedProcess(list(argv), process.returncode, out.read(), err.read())
        if not in_time:
            raise TimeoutError(
                f"{self.name}: {done.args} did not end in {timeout_s:g} s: {done.stdout}{done.stderr}"
            )
        if check and done.returncode:
            raise RuntimeError(
                f"{self.name}: {done.args} ended with {done.returncode}: {done.stdout}{done.stderr}"
            )
        return done

    def _write_etc(self) -> None:
        """Write the files of /etc that the node has for itself; they are bound over the machine's inside it."""
        etc = self.directory / "etc"
        etc.mkdir(exist_ok=True)
        nodes = [f"{node.address} {node.name}" for node in self._cluster.nodes]
        (etc / "hosts").write_text("\n".join(["127.0.0.1 localhost", *nodes, ""]))
        # There are no DNS servers in here: a reverse look-up would wait for seconds.
        (etc / "nsswitch.conf").write_text(_replaced("/etc/nsswitch.conf", "hosts:", "hosts: files"))
        # sshd and ssh take root's home directory from here, not from HOME.
        (etc / "passwd").write_text(_replaced("/etc/passwd", "root:", f"root:x:0:0:root:{self.home}:/bin/bash"))


def _replaced(path: str, start: str, line: str) -> str:
    """Give the text of a file with the lines that start with `start` replaced by one line."""
    kept = [text for text in Path(path).read_text().splitlines() if not text.startswith(start)]
    return "\n".join([line, *kept, ""])


class Cluster:
    """Nodes n0, n1, ... on one network, 10.77.0.10 and up, from entering the context until leaving it.

    `directory` must exist and lie neither under /run nor under /dev/shm, which each node has for itself.
    """

    def __init__(self, directory: Path, num_nodes: int) -> None:
        if not 1 <= num_nodes <= MOST_NODES:
            raise ValueError(f"num_nodes must be 1 to {MOST_NODES}, got {num_nodes}")
        self.directory = directory.resolve()
        self.nodes = [Node(self, index) for index in range(num_nodes)]
        self.services: list[Callable[[Node], None]] = []
        self._switch: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        try:
            self._start_switch()
            for node in self.nodes:
                node.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End every process of every node, and the network."""
        for node in self.nodes:
            node.kill()
        if self._switch is not None:
            self._switch.kill()
            self._switch.communicate()
            self._switch = None

    def add_service(self, start: Callable[[Node], None]) -> None:
        """Start a service on every node, now and whenever the node comes back."""
        for node in self.nodes:
            start(node)
        self.services.append(start)

    def cut(self, node: Node) -> None:
        """Take the node's link down: nothing arrives, and nobody is told."""
        self._ip(f"link set v{node.index} down")

    def mend(self, node: Node) -> None:
        """Bring the node's link up again."""
        self._ip(f"link set v{node.index} up")

    def plug_in(self, node: Node) -> None:
        """Join a started node to the network. It has the same hardware address each time, as neighbours remember it."""
        port, hardware = f"v{node.index}", f"02:00:00:00:00:{FIRST_ADDRESS + node.index:02x}"
        self._ip(
            f"link add {port} type veth peer name eth0 address {hardware} netns {node.pid}",
            f"link set {port} master br0",
            f"link set {port} up",
        )
        _ip(node.pid, f"addr add {node.address}/24 dev eth0", "link set eth0 up", "link set lo up")

    def unplug(self, node: Node) -> None:
        """Take the node's link away, if it has one."""
        if self._switch is not None:
            _ip(self._switch.pid, f"link del v{node.index}", check=False)

    def _ip(self, *commands: str) -> None:
        if self._switch is None:
            raise RuntimeError("the cluster is not running")
        _ip(self._switch.pid, *commands)

    def _start_switch(self) -> None:
        """Hold a network namespace for the bridge with a process that ends with its standard input."""
        self._switch = subprocess.Popen(
            ["unshare", "--net", "cat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._switch.stdin.write("ready\n")
        self._switch.stdin.flush()
        if self._switch.stdout.readline() != "ready\n":
            raise RuntimeError("no network namespace for the bridge")
        self._ip("link set lo up", "link add br0 type bridge", "link set br0 up")


def _ip(pid: int, *commands: str, check: bool = True) -> None:
    """Run commands of `ip` in the network of a process."""
    line = ["nsenter", "--target", str(pid), "--net", "ip", "-batch", "-"]
    done = subprocess.run(line, input="\n".join(commands), capture_output=True, text=True)
    if check and done.returncode:
        raise RuntimeError(f"ip: {'; '.join(commands)}: {done.stderr.strip()}")


def wait_until(done: Callable[[], bool], what: str, timeout_s: float = START_TIMEOUT_S) -> None:
    """Ask again and again; raise TimeoutError where it does not come true."""
    deadline = time.monotonic() + timeout_s
    while not done():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {timeout_s:g} s: {what}")
        time.sleep(0.05)
