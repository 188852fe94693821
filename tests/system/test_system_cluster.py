"""The test cluster itself: its nodes are machines apart, ssh and Slurm work on it, and it leaves nothing."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from cluster import nodes
from cluster.nodes import Cluster, Node, wait_until
from cluster.slurm import Slurm
from cluster.ssh import start_sshd

pytestmark = pytest.mark.system

SERVER = """
import socket
server = socket.create_server(("n1", 7000))
print("listening", flush=True)
while True:
    connection, (address, _) = server.accept()
    connection.sendall(address.encode())
    connection.close()
"""
CLIENT = 'import socket; print(socket.create_connection(("n1", 7000), timeout=1).recv(99).decode())'
HOLDER = """
import socket
server = socket.create_server(("n1", 7001))
print("listening", flush=True)
connections = [server.accept()]
input()
"""
LISTENER = """
import socket
connection = socket.create_connection(("n1", 7001), timeout=10)
print("connected", flush=True)
connection.settimeout(1)
try:
    print("closed" if connection.recv(1) == b"" else "data")
except ConnectionError:
    print("closed")
except TimeoutError:
    print("silence")
"""
SHOW = "import os, sys; sys.stdout.buffer.write(b'|'.join(map(os.fsencode, sys.argv[1:])))"
ODD = ("a&b $(x) {0..9} '\"*", "", "-x", "--", "two\nlines", "\\ `id` ; | > < ~ # !", "名", b"\xff\xfe", "A=1")
ALL_REDUCE = """
import os, socket, torch, torch.distributed as dist
dist.init_process_group("gloo")
total = torch.tensor([dist.get_rank() + 1.0])
dist.all_reduce(total)
print(f"rank {dist.get_rank()} of {dist.get_world_size()} on {socket.gethostname()}: {total.item():g}", flush=True)
dist.destroy_process_group()
"""
HELD = """
import sys, time
from pathlib import Path
from cluster.nodes import Cluster
with Cluster(Path(sys.argv[1]), 2) as cluster:
    cluster.nodes[1].popen(["sleep", "600"])
    print(cluster._switch.pid, *[node.pid for node in cluster.nodes], flush=True)
    time.sleep(600)
"""


def python(node: Node, code: str, *arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    return node.run([sys.executable, "-c", code, *arguments], check=check)


def processes_of(directory: Path) -> set[int]:
    """Ids of all processes on this machine that see mounts from a directory, or name it."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            text = (process / "mountinfo").read_text() + (process / "cmdline").read_text()
        except OSError:  # it has ended
            continue
        if str(directory) in text:
            found.add(int(process.name))
    return found


def on_this_machine() -> dict[str, object]:
    """What a cluster could leave on the machine: mounts, links, and names of networks."""
    return {
        "mounts": Path("/proc/self/mountinfo").read_text(),
        "links": sorted(os.listdir("/sys/class/net")),
        "networks": sorted(path.name for path in Path("/run/netns").glob("*")),
        "hosts": Path("/etc/hosts").read_text(),
        "home": sorted(os.listdir(Path.home())),
    }


# ---- nodes --------------------------------------------------------------------------------------------------


def test_a_node_is_a_machine_of_its_own(cluster):
    first, second = cluster.nodes
    assert first.run(["hostname"]).stdout == "n0\n" and second.run(["hostname"]).stdout == "n1\n"
    assert socket.gethostname() not in ("n0", "n1")
    for place in ("/run/here", "/dev/shm/here", first.home / "here"):
        first.run(["touch", place])
    home = "import os; print(os.path.expanduser('~'), os.path.exists(os.path.expanduser('~/here')))"
    assert python(first, home).stdout == f"{first.home} True\n"
    assert python(second, home).stdout == f"{second.home} False\n"
    for place in ("/run/here", "/dev/shm/here"):
        assert second.run(["test", "-e", place], check=False).returncode == 1
        assert not Path(place).exists()
    assert sorted(first.run(["ls", "/sys/class/net"]).stdout.split()) == ["eth0", "lo"]
    assert first.run(["readlink", "/proc/1/exe"]).stdout.strip() == os.path.realpath(sys.executable)


def test_nodes_reach_each_other_by_name_until_the_link_is_cut(cluster):
    first, second = cluster.nodes
    with second.popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout.readline() == "listening\n"
            assert python(first, CLIENT).stdout == "10.77.0.10\n"
            assert python(second, CLIENT).stdout == "10.77.0.11\n"
            cluster.cut(second)
            assert python(first, CLIENT, check=False).returncode != 0
            assert python(second, CLIENT).stdout == "10.77.0.11\n"  # to itself
            cluster.mend(second)
            wait_until(lambda: python(first, CLIENT, check=False).stdout == "10.77.0.10\n", "the mended link")
        finally:
            server.kill()
    with pytest.raises(OSError):  # the test's own network has no such name
        socket.getaddrinfo("n1", 7000)


def test_arguments_arrive_byte_by_byte(cluster, tmp_path):
    expected = b"|".join(map(os.fsencode, ODD))
    line = [sys.executable, "-c", SHOW, *ODD]
    with cluster.nodes[1].popen(line, stdout=subprocess.PIPE) as process:
        assert process.stdout.read() == expected
    assert os.fsencode(cluster.nodes[1].run(line).stdout) == expected
    program = tmp_path / "a=b 'c'"  # an assignment for env and for a shell
    program.symlink_to("/bin/pwd")
    assert cluster.nodes[0].run([program], cwd=tmp_path).stdout == f"{tmp_path}\n"


def test_the_environment_is_the_given_one(cluster):
    node = cluster.nodes[0]
    show = "import json, os; print(json.dumps(dict(os.environ)))"
    environment = {"PATH": os.environ["PATH"], "ODD": ODD[0], "LC_ALL": "C.UTF-8"}
    done = node.run([sys.executable, "-c", show], env=environment)
    assert json.loads(done.stdout) == {**environment, "HOME": str(node.home)}


def test_a_failed_command_says_what_it_printed(cluster):
    with pytest.raises(RuntimeError, match=r"n1: .* ended with 3: out\nerr\n"):
        python(cluster.nodes[1], "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)")


def test_a_signal_reaches_the_program_and_its_status_comes_back(cluster):
    code = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))\n"
        "print('ready', flush=True)\n"
        "time.sleep(600)"
    )
    node = cluster.nodes[0]
    for number, status in ((signal.SIGTERM, 7), (signal.SIGKILL, -signal.SIGKILL)):
        with node.popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout.readline() == "ready\n"
            process.send_signal(number)
            assert process.wait(30) == status
    assert "time.sleep(600)" not in node.run(["ps", "-eo", "args"]).stdout
    with pytest.raises(TimeoutError, match=r"n0: .* did not end in 0.2 s: begun\n"):
        node.run(["sh", "-c", "echo begun; exec sleep 601"], timeout_s=0.2)
    assert "sleep 601" not in node.run(["ps", "-eo", "args"]).stdout


def test_a_killed_node_is_gone_with_its_processes_and_comes_back(cluster):
    first, second = cluster.nodes
    second.run(["touch", "/run/here", second.home / "kept"])
    second.run(["setsid", "--fork", "sleep", "602"])  # a daemon
    with second.popen(["sleep", "602"]) as process:
        before = second.pid
        assert before in processes_of(second.directory)
        second.kill()
        assert process.wait(30) == -signal.SIGKILL
    try:
        assert processes_of(second.directory) == set()
        with pytest.raises(RuntimeError, match="n1 is off"):
            second.run(["true"])
        assert first.run(["hostname"]).stdout == "n0\n"
    finally:
        second.start()
    assert second.pid != before
    assert second.run(["test", "-e", "/run/here"], check=False).returncode == 1
    assert second.run(["test", "-e", second.home / "kept"]).returncode == 0
    with second.popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout.readline() == "listening\n"
            assert python(first, CLIENT).stdout == "10.77.0.10\n"
        finally:
            server.kill()


@pytest.mark.parametrize("heard", ["silence", "closed"])
def test_peers_hear_nothing_of_lost_power_and_are_told_of_killed_processes(cluster, heard):
    first, second = cluster.nodes
    pipes = {"stdout": subprocess.PIPE, "text": True}
    holder = second.popen([sys.executable, "-c", HOLDER], stdin=subprocess.PIPE, **pipes)
    try:
        assert holder.stdout.readline() == "listening\n"
        with first.popen([sys.executable, "-c", LISTENER], **pipes) as listener:
            assert listener.stdout.readline() == "connected\n"
            if heard == "silence":
                second.kill()
            else:
                second.run(["kill", "-9", "-1"], check=False)
            assert listener.stdout.readline() == f"{heard}\n"
    finally:
        second.kill()
        second.start()
        holder.communicate()


def test_orphans_are_reaped(cluster):
    node = cluster.nodes[0]
    node.run(["sh", "-c", "(sleep 0.05 &) ; exit 0"])
    wait_until(lambda: "sleep" not in node.run(["ps", "-eo", "comm"]).stdout, "the orphan has gone")


def test_the_number_of_nodes_is_checked(tmp_path):
    for number in (0, nodes.MOST_NODES + 1):
        with pytest.raises(ValueError, match=f"num_nodes must be 1 to 200, got {number}"):
            Cluster(tmp_path, number)


def test_a_cluster_without_the_rights_is_refused_with_the_reason():
    ask = [sys.executable, "-c", "from cluster.nodes import why_not; print(why_not())"]
    no_permission = "no permission for namespaces and links: unshare: unshare failed: Operation not permitted"
    reasons = {
        ("unshare", "--user"): "a cluster of namespaces needs root",
        ("unshare", "--user", "--map-root-user"): "needs the machine's root, this is that of a user namespace",
        ("setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin"): no_permission,
    }
    if reason := nodes.why_not():
        pytest.skip(reason)
    environment = {**os.environ, "PYTHONPATH": ":".join(sys.path)}
    for prefix, reason in reasons.items():
        done = subprocess.run([*prefix, *ask], env=environment, capture_output=True, text=True)
        assert done.stdout.strip().endswith(reason), done.stderr


def test_a_missing_command_is_named_with_its_package():
    assert nodes.why_missing({"sh": "dash"}) is None
    reason = nodes.why_missing({"sh": "dash", "no-such-a": "package-a", "no-such-b": "package-b"})
    assert reason == "not installed: no-such-a (Debian's package-a), no-such-b (Debian's package-b)"


# ---- what runs on them --------------------------------------------------------------------------------------


def test_ssh_and_pdsh_reach_every_node(ssh_cluster):
    first, second = ssh_cluster.nodes
    for node in ssh_cluster.nodes:
        for other in ssh_cluster.nodes:
            assert node.run(["ssh", "-o", "BatchMode=yes", other.name, "hostname; pwd"]).stdout == (
                f"{other.name}\n{other.home}\n"
            )
    pdsh = ["pdsh", "-S", "-w", "n[0-1]", "hostname"]
    environment = {**os.environ, "PDSH_RCMD_TYPE": "ssh"}
    assert sorted(first.run(pdsh, env=environment).stdout.splitlines()) == ["n0: n0", "n1: n1"]
    second.kill()
    second.start()
    assert sorted(first.run(pdsh, env=environment).stdout.splitlines()) == ["n0: n0", "n1: n1"]


def test_srun_runs_on_every_node_and_on_one_that_came_back(slurm_cluster):
    hosts = ["srun", "--nodes=2", "--partition=high", "hostname"]
    assert sorted(slurm_cluster.run(*hosts).stdout.split()) == ["n0", "n1"]
    second = slurm_cluster.cluster.nodes[1]
    second.kill()
    second.start()
    slurm_cluster.wait_idle(2)
    assert sorted(slurm_cluster.run(*hosts).stdout.split()) == ["n0", "n1"]
    assert slurm_cluster.run("sinfo", "--noheader", "--format=%P %T").stdout == "low* idle\nhigh idle\n"


def test_torch_distributed_run_on_two_nodes(cluster, tmp_path):
    script = tmp_path / "all_reduce.py"
    script.write_text(ALL_REDUCE)
    line = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    line += ["--rdzv-backend=c10d", "--rdzv-endpoint=n0:29400", "--rdzv-id=test", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    agents = [node.popen(line, env=environment, **pipes) for node in cluster.nodes]
    try:
        printed = "".join(agent.communicate(timeout=180)[0] for agent in agents)
    finally:
        for agent in agents:
            agent.kill()
    assert [agent.wait(30) for agent in agents] == [0, 0], printed
    found = {text.partition("on ")[2] for text in printed.splitlines() if text.startswith("rank ")}
    assert found == {"n0: 3", "n1: 3"}, printed


# ---- what is left -------------------------------------------------------------------------------------------


def test_nothing_is_left_of_a_cluster_whose_test_failed(cluster, tmp_path):
    """`cluster` runs beside it all the time: two clusters on one machine do not meet."""
    before = on_this_machine()
    own = Cluster(tmp_path, 3)
    with pytest.raises(ZeroDivisionError), own:
        if nodes.why_missing({"sshd": "openssh-server"}) is None:
            start_sshd(own)
        if not any(nodes.why_missing({name: ""}) for name in ("munged", "slurmctld", "slurmd", "sinfo")):
            Slurm(own).start()
        own.nodes[2].run(["setsid", "--fork", "sleep", "603"])
        own.nodes[1].kill()
        switch_pid = own._switch.pid
        assert len(processes_of(tmp_path)) >= 4
        raise ZeroDivisionError
    assert processes_of(tmp_path) == set()
    assert not Path(f"/proc/{switch_pid}").exists()
    assert on_this_machine() == before
    assert cluster.nodes[0].run(["hostname"]).stdout == "n0\n"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_nothing_is_left_of_a_cluster_whose_test_was_killed(cluster, tmp_path, number):
    before = on_this_machine()
    environment = {**os.environ, "PYTHONPATH": ":".join(sys.path)}
    line = [sys.executable, "-c", HELD, str(tmp_path)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    with subprocess.Popen(line, env=environment, **pipes) as session:
        pids = {int(pid) for pid in session.stdout.readline().split()}
        assert len(pids) == 3 and len(pids & processes_of(tmp_path)) == 2
        session.send_signal(number)
        assert session.wait(30) != 0

    def alive(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except OSError:
            return False

    wait_until(lambda: not any(map(alive, pids)) and not processes_of(tmp_path), "the nodes have gone")
    assert on_this_machine() == before
