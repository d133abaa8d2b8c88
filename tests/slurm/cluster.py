"""A Slurm cluster on one machine: real slurmctld, slurmd and munge; every node is a set of namespaces.

A node has its own network, host name, mounts and processes, so that it can lose power or its link as a machine does. The
file system is shared. The nodes' network is a bridge in the controller's namespace; this machine's own is not touched. Their
/etc/hosts is Debian's, where a machine's own name means 127.0.1.1: what binds to that address finds no other node.

    with Cluster(folder, gpus=(1, 1, 2)) as cluster:
        job = cluster.submit("--nodes=2", "train.sbatch", cwd=folder)
        cluster.kill("n1")
"""

import contextlib
import os
import re
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from data.parent import die_with_parent

BINARIES = ("slurmctld", "slurmd", "munged", "sbatch", "ip", "nsenter", "unshare", "pgrep")
PACKAGES = "slurm-wlm munge iproute2 procps"
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
NETWORK = "10.77.0"  # of the namespaces alone
CONTROLLER = "ctl"
START_S = 60.0
COMMAND_S = 60.0
NODE_TIMEOUT_S = 10
# cred_expire is how long a job that is queued again must wait (120 s if not set, 5 s at least), SlurmdTimeout when a silent
# node is given up (300 s if not set). The partition `urgent` preempts `main`, whose jobs then have GraceTime to stop.
CONF = """
ClusterName=test
SlurmctldHost={controller}({network}.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0
SlurmdParameters=config_overrides
GresTypes=gpu
ReturnToService=2
SlurmdTimeout={node_timeout}
MessageTimeout=5
TCPTimeout=2
KillWait=30
MinJobAge=3600
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=DEFAULT CPUs=2 RealMemory=1000
{nodes}
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL PriorityTier=2 PreemptMode=OFF
"""


def missing() -> str | None:
    """Why no cluster can be started here, with the remedy; None where one can."""
    absent = [name for name in BINARIES if shutil.which(name, path=PATH) is None]
    if absent:
        return f"{', '.join(absent)} not found: apt-get update && apt-get install -y --no-install-recommends {PACKAGES}"
    if os.geteuid() != 0:
        return "not root: Slurm's daemons and the nodes' namespaces need it"
    tried = subprocess.run(["unshare", "-numpf", "--mount-proc", "true"], capture_output=True, text=True)
    return f"no namespaces ({tried.stderr.strip()}); in a container: --privileged" if tried.returncode else None


class Cluster:
    """Nodes n1, n2, ... with so many GPUs each (files like /dev/null), while entered. Slurm's logs stay in `folder`.

    Everything ends with the block, and with this process however that ends. Raises RuntimeError where the nodes do not get
    ready.
    """

    def __init__(self, folder: Path, gpus: Sequence[int] = (1, 1, 2)) -> None:
        self.folder = folder
        self.nodes = [f"n{number + 1}" for number in range(len(gpus))]
        self.inits: dict[str, int] = {}
        self.processes: list[subprocess.Popen[bytes]] = []
        for name in ("state", "spool", "munge", "dev"):
            (folder / name).mkdir(parents=True)
        for gpu in range(max(gpus)):
            os.mknod(folder / f"dev/gpu{gpu}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        (folder / "munge/key").write_bytes(os.urandom(1024))
        (folder / "munge/key").chmod(0o600)
        kinds = [
            f"NodeName={node} Name=gpu File={folder}/dev/gpu[0-{n - 1}]"
            for node, n in zip(self.nodes, gpus, strict=True)
        ]
        (folder / "gres.conf").write_text("\n".join(["AutoDetect=off", *kinds]) + "\n")
        nodes = "\n".join(
            f"NodeName={node} NodeAddr={_address(node)} Gres=gpu:{n}" for node, n in zip(self.nodes, gpus, strict=True)
        )
        facts = {"controller": CONTROLLER, "network": NETWORK, "node_timeout": NODE_TIMEOUT_S, "nodes": nodes}
        (folder / "slurm.conf").write_text(CONF.format(folder=folder, **facts))

    def __enter__(self) -> "Cluster":
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for machine in list(self.inits):
            self.kill(machine)
        for process in self.processes:
            process.kill()
            process.wait()

    def _start(self) -> None:
        self._boot(CONTROLLER)
        self._ip(CONTROLLER, "link add bridge up type bridge forward_delay 0")
        self._ip(CONTROLLER, f"addr add {NETWORK}.1/24 dev bridge")
        munge = self.folder / "munge"  # one daemon serves all, through the shared file system
        files = [f"--{name}-file={munge / name}" for name in ("key", "pid", "log", "seed")]
        self._daemon(CONTROLLER, "munged", "--foreground", "--force", f"--socket={munge / 'socket'}", *files)
        self.wait_for((munge / "socket").exists, "munged's socket")
        self._daemon(CONTROLLER, "slurmctld", "-D", "-c")
        for node in self.nodes:
            self.power_on(node)
        self.wait_for(lambda: self.states() == dict.fromkeys(self.nodes, "idle"), "idle nodes", START_S)

    def run(
        self, *command: str | Path, on: str = CONTROLLER, cwd: Path | None = None, timeout: float = COMMAND_S
    ) -> str:
        """What a command printed, run on a machine. Raises RuntimeError with that where it fails."""
        placed = ["env", f"--chdir={cwd or self.folder}", *command]
        done = subprocess.run(
            self._on(on, *placed), env=self._environment(), capture_output=True, text=True, timeout=timeout
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(map(str, command))}: {done.stdout}{done.stderr}")
        return done.stdout

    def submit(self, *arguments: str | Path, cwd: Path) -> str:
        """The number of the job that `sbatch arguments...` makes."""
        return self.run("sbatch", "--parsable", *arguments, cwd=cwd).strip()

    def job(self, number: str) -> dict[str, str]:
        """What Slurm knows of a job: JobState, Restarts, NodeList, ExitCode ..."""
        words = self.run("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def states(self) -> dict[str, str]:
        """Of each node: idle, alloc, down* ..."""
        try:
            lines = self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%N %t").splitlines()
        except RuntimeError:  # not up yet
            return {}
        return dict(line.split() for line in lines)

    def wait_for(self, condition: Callable[[], bool], what: str, timeout: float = 30.0) -> None:
        """Raises RuntimeError where it is not met in time."""
        deadline = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > deadline:
                raise RuntimeError(f"no {what} after {timeout:g} s; nodes: {self.states()}; logs: {self.folder}/*.log")
            time.sleep(0.05)

    def kill(self, machine: str) -> None:
        """End all its processes at once; the kernel closes their connections."""
        os.kill(self.inits.pop(machine), signal.SIGKILL)

    def link(self, node: str, state: str) -> None:
        """Cut its network cable ("down"), or mend it ("up"); nobody is told."""
        self._ip(CONTROLLER, f"link set to_{node} {state}")

    def power_on(self, node: str) -> None:
        self._boot(node)
        with contextlib.suppress(
            subprocess.CalledProcessError
        ):  # connections of the dead may keep the old one for a while
            self._ip(CONTROLLER, f"link delete to_{node}")
        self._ip(CONTROLLER, f"link add to_{node} type veth peer name eth0 netns {self.inits[node]}")
        self._ip(CONTROLLER, f"link set to_{node} master bridge up")
        self._ip(node, f"addr add {_address(node)}/24 dev eth0")
        self._ip(node, "link set eth0 up")
        self._daemon(node, "slurmd", "-D", "-N", node)

    def configure(self, key: str, value: object) -> None:
        """Change a line of slurm.conf, and have all daemons heed it."""
        conf = self.folder / "slurm.conf"
        conf.write_text(re.sub(rf"^{key}=.*", f"{key}={value}", conf.read_text(), flags=re.MULTILINE))
        self.run("scontrol", "reconfigure")

    def _boot(self, machine: str) -> None:
        """New namespaces, whose first process only reaps (a child's end that is ignored leaves no zombie)."""
        hosts = self.folder / f"hosts.{machine}"
        others = [f"{_address(node)} {node}\n" for node in self.nodes if node != machine]
        hosts.write_text(f"127.0.0.1 localhost\n127.0.1.1 {machine}\n{''.join(others)}")
        ready = self.folder / f"ready.{machine}"
        ready.unlink(missing_ok=True)
        first = (
            f"trap '' CHLD; hostname {machine} && mount --bind {hosts} /etc/hosts && ip link set lo up && "
            f"touch {ready} && exec sleep infinity"
        )
        unshare = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child"]
        outer = self._start_process(machine, [*unshare, "sh", "-c", first])
        self.wait_for(ready.exists, f"machine {machine}")
        self.inits[machine] = int(Path(f"/proc/{outer}/task/{outer}/children").read_text())

    def _daemon(self, machine: str, *command: str) -> None:
        self._start_process(machine, self._on(machine, *command))

    def _start_process(self, machine: str, command: list[str]) -> int:
        with (self.folder / f"{machine}.out").open("ab") as said:
            self.processes.append(
                subprocess.Popen(
                    command, env=self._environment(), stdin=subprocess.DEVNULL, stdout=said, stderr=said,
                    start_new_session=True, preexec_fn=die_with_parent,
                )
            )  # fmt: skip
        return self.processes[-1].pid

    def _on(self, machine: str, *command: str | Path) -> list[str]:
        namespaces = ("--net", "--uts", "--mount", "--pid")
        return ["nsenter", f"--target={self.inits[machine]}", *namespaces, *map(str, command)]

    def _ip(self, machine: str, words: str) -> None:
        """In its network alone: the processes that `words` name are this machine's."""
        enter = ["nsenter", f"--target={self.inits[machine]}", "--net", "ip", *words.split()]
        subprocess.run(enter, env=self._environment(), check=True, capture_output=True)

    def _environment(self) -> dict[str, str]:
        shown = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SBATCH_"))}
        return shown | {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": PATH}


def _address(node: str) -> str:
    return f"{NETWORK}.{10 + int(node[1:])}"
