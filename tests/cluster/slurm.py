"""A real SLURM on the hosts of `conftest.py`: the controller at the desk, a slurmd on each host, munge everywhere.

No systemd, no cgroups, no database. Everything is in a temporary directory, and /etc/slurm is seen in the namespaces
only. What makes it quick is marked; the rest is as on a cluster that has not been tuned.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from pathlib import Path

from tests.cluster.conftest import NETWORK, Cluster
from tests.conftest import wait_until

CONF = """\
ClusterName=test
SlurmctldHost=desk({network}.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits so long before it starts again. 120 s unless said; less than 5 is taken for 120.
AuthInfo=cred_expire=5
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/log-slurmctld
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdLogFile={folder}/log-slurmd-%n
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
# Like cgroups, and unlike linuxproc, SIGTERM goes to the task that SLURM started and not to all that it started.
# Unlike cgroups, what has a session of its own is not ended with the job: that is for us to see to.
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MinJobAge=86400
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
# Quick.
SchedulerParameters=sched_min_interval=0,sched_interval=2,bf_interval=2,batch_sched_delay=0
SlurmdTimeout=10
SlurmctldTimeout=10
MessageTimeout=5
KillWait=20
CompleteWait=0
ReturnToService=2
GresTypes=gpu
NodeName={nodes} CPUs=4 RealMemory=4096 Gres=gpu:2
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""

TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue")


def missing() -> str | None:
    """Why there can be no SLURM here."""
    tools = [t for t in TOOLS if shutil.which(t, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None]
    return f"needs {', '.join(tools)} (packages slurmctld, slurmd, slurm-client, munge)" if tools else None


class Slurm(Cluster):
    """A partition `main` of nodes that claim four processors and two GPUs each."""

    def up(self) -> None:
        etc = self.folder / "slurm"
        for folder in (etc, self.folder / "state", *(self.folder / f"spool-{name}" for name in self.hosts)):
            folder.mkdir()
        text = CONF.format(network=NETWORK, folder=self.folder, nodes=",".join(self.hosts))
        (etc / "slurm.conf").write_text(text)
        # A GPU must be a device; these are /dev/null by another name.
        (etc / "gres.conf").write_text("Name=gpu File=/run/gpu[0-1]\n")
        (self.folder / "munge.key").write_bytes(os.urandom(1024))
        (self.folder / "munge.key").chmod(0o400)
        self.folder.chmod(0o700)
        super().up()
        self._munge("desk")
        self.start_controller()
        for name in self.hosts:
            self._join(name)
        wait_until(lambda: self.idle(*self.hosts), 40)

    def power_on(self, name: str) -> None:
        super().power_on(name)
        self._join(name)

    def _join(self, name: str) -> None:
        for number in (0, 1):
            self._run(*self._inside(name), "mknod", f"/run/gpu{number}", "c", "1", "3")
        self._munge(name)
        self.start_daemon(name)

    def _munge(self, name: str) -> None:
        files = [f"--{kind}-file={self.folder}/munge-{name}.{kind}" for kind in ("log", "seed", "pid")]
        self._run(*self._inside(name), "munged", "--force", f"--key-file={self.folder}/munge.key", *files)

    def _inside(self, name: str) -> list[str]:
        return self._in(name, "--net", "--uts", "--ipc", "--mount", "--pid")

    def start_controller(self) -> None:
        self._run(*self._inside("desk"), "slurmctld")
        wait_until(lambda: self.at_desk("scontrol", "ping").returncode == 0)

    def kill_controller(self) -> None:
        self._run(*self._inside("desk"), "sh", "-c", f"kill -KILL $(cat {self.folder}/slurmctld.pid)")

    def start_daemon(self, name: str) -> None:
        self._run(*self._inside(name), "slurmd", "-N", name)

    def idle(self, *names: str) -> bool:
        said = self.at_desk("sinfo", "--noheader", "--Node", "--format=%N %T", f"--nodes={','.join(names)}").stdout
        return said.split().count("idle") == len(names)

    def state(self, job: str) -> str:
        return self.show(job).get("JobState", "UNKNOWN")

    def show(self, job: str) -> dict[str, str]:
        """What SLURM knows of a job, also of one that has ended."""
        said = self.at_desk("scontrol", "--oneliner", "show", "job", job).stdout
        return dict(re.findall(r"(\S+?)=(\S*)", said))

    def wait_for(self, job: str, *states: str, timeout_s: float = 60) -> dict[str, str]:
        deadline = time.monotonic() + timeout_s
        while self.state(job) not in states:
            assert time.monotonic() < deadline, self.show(job)
            time.sleep(0.1)
        return self.show(job)

    def mend(self) -> None:
        """No job, and every node idle."""
        if self.at_desk("scontrol", "ping").returncode != 0:
            self.start_controller()
        for name in self.hosts.keys() - self.inside.keys():
            self.power_on(name)
        self.at_desk("scancel", "--user=root")
        self.at_desk("scancel", "--user=root", "--signal=KILL", "--full")
        super().mend()
        names = ",".join(self.hosts)
        self.at_desk("scontrol", "update", f"nodename={names}", "state=resume")
        wait_until(lambda: self.idle(*self.hosts), 60)

    def log(self, name: str) -> Path:
        return self.folder / f"log-slurmd-{name}" if name != "desk" else self.folder / "log-slurmctld"

    def sbatch(self, *arguments: str, **options: object) -> str:
        """The id of a job."""
        done = self.at_desk("sbatch", "--parsable", *arguments, **options)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()
