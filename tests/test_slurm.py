"""The batch scripts of slurm/, run by a real SLURM: two nodes on this machine, started for these tests, without GPUs.

The jobs run in a copy of the repository's layout, so that their logs and the scripts made for the tests stay in it.
"""

import getpass
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from script_runs import REPOSITORY, TRAINING_CODE, read_submission, run_here, write_small_files
from test_torchrun_evaluation import N_INPUTS, TASKS

PACKAGES = {"slurmctld": "slurmctld", "slurmd": "slurmd", "sbatch": "slurm-client", "munged": "munge"}
PATH = os.environ["PATH"] + ":/usr/sbin:/sbin"
MISSING = sorted(package for program, package in PACKAGES.items() if shutil.which(program, path=PATH) is None)
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"packages missing (apt-get install): {', '.join(MISSING)}")
SCRIPT = "run_evaluation_Mini_without_ttt"
LONGEST_WAIT = 120  # seconds
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
KillWait=5
SchedulerParameters=sched_interval=5,bf_interval=5,batch_sched_delay=0,requeue_delay=0
GresTypes=gpu
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 Gres=gpu:2
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 Gres=gpu:2
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
PRETENDED_GPUS = "Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n"  # counted by SLURM, used by nothing
# in the job's first start each worker waits with its second task until it is asked to stop
WAITS = f"""
import os, runpy, sys, time
from task_queue import STOP_FILE, TaskQueue
begin, begun = TaskQueue._begin, []
def begin_and_wait(self, name, number):
    begin(self, name, number)
    begun.append(name)
    while len(begun) > 1 and "SLURM_RESTART_COUNT" not in os.environ and not (self.output / STOP_FILE).exists():
        time.sleep(0.05)
TaskQueue._begin = begin_and_wait
runpy.run_path({str(TRAINING_CODE / SCRIPT)!r} + ".py", run_name="__main__")
"""
# in the job's first start a worker is asked to stop before its first task
BEGINS_LATE = f"""
import os, runpy, time
import evaluation_tools
from task_queue import STOP_FILE
make_views = evaluation_tools.make_views
def wait_and_make_views(run, tasks):
    (run.output / "waits").touch()
    while "SLURM_RESTART_COUNT" not in os.environ and not (run.output / STOP_FILE).exists():
        time.sleep(0.05)
    return make_views(run, tasks)
evaluation_tools.make_views = wait_and_make_views
runpy.run_path({str(TRAINING_CODE / SCRIPT)!r} + ".py", run_name="__main__")
"""
# the worker of one node dies with the first task that it begins
DIES = f"""
import os, runpy
from task_queue import TaskQueue
from torchrun_tools import this_worker
begin = TaskQueue._begin
def begin_and_die(self, name, number):
    begin(self, name, number)
    worker = this_worker()
    if (worker.rank, worker.start) == (1, 0):
        os.kill(os.getpid(), 9)
TaskQueue._begin = begin_and_die
runpy.run_path({str(TRAINING_CODE / SCRIPT)!r} + ".py", run_name="__main__")
"""
# a training that only a signal ends, and that finishes in the job's second start
TRAINS = """
import os, time
print(f"worker {os.environ['RANK']} of {os.environ['WORLD_SIZE']} trains\\n", end="", flush=True)
while "SLURM_RESTART_COUNT" not in os.environ:
    time.sleep(0.1)
"""


# ---- SLURM ----

class Cluster:
    """SLURM's daemons, with all that they write in one folder."""

    def __init__(self, folder):
        self.folder, self.daemons = folder, []
        outside = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        self.environment = outside | {"PATH": PATH, "SLURM_CONF": str(folder / "slurm.conf")}
        sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
        ports = [server.getsockname()[1] for server in sockets]
        for server in sockets:
            server.close()
        for name in ("state", "n1", "n2"):
            (folder / name).mkdir()
        (folder / "slurm.conf").write_text(CONFIGURATION.format(
            host=socket.gethostname(), user=getpass.getuser(), folder=folder, ports=ports))
        (folder / "gres.conf").write_text(PRETENDED_GPUS)
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o600)

    def start(self):
        """Start the daemons and wait for the nodes."""
        munge = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        self._daemon("munged", "--foreground", "--force",
                     *(f"--{option}={self.folder}/munge.{name}" for option, name in munge.items()))
        wait_until((self.folder / "munge.socket").exists, "munged")
        self._daemon("slurmctld", "-D", "-i")
        for node in ("n1", "n2"):
            self._daemon("slurmd", "-D", "-N", node)
        wait_until(lambda: self.command("sinfo", "--noheader", "--Node", "--format=%t", check=False).split()
                   == ["idle"] * 2, "the nodes", (self.folder / "daemons.log").read_text)

    def _daemon(self, *command):
        with (self.folder / "daemons.log").open("a") as log:
            self.daemons.append(subprocess.Popen(command, env=self.environment, stdout=log, stderr=log))

    def command(self, *command, check=True, **options):
        """Run a command of SLURM; return what it prints."""
        process = subprocess.run(list(map(str, command)), env=self.environment | options.pop("environment", {}),
                                 capture_output=True, text=True, timeout=60, check=False, **options)  # fmt: skip
        assert process.returncode == 0 or not check, process.stdout + process.stderr
        return process.stdout

    def stop(self):
        """End all jobs, the daemons, and whatever else still runs with this cluster's configuration."""
        try:
            self.command("scancel", "--user", getpass.getuser(), check=False)
            end = time.time() + 10
            while self.command("squeue", "--noheader", check=False) and time.time() < end:
                time.sleep(0.2)
        finally:
            self._stop_daemons()

    def _stop_daemons(self):
        for daemon in reversed(self.daemons):
            daemon.terminate()
        for daemon in reversed(self.daemons):
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        for process in self._leftovers():
            os.kill(process, signal.SIGKILL)

    def _leftovers(self):
        """Return the numbers of the processes of this cluster, known by the configuration that they were given."""
        wanted = f"SLURM_CONF={self.environment['SLURM_CONF']}".encode()
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if wanted in (folder / "environ").read_bytes().split(b"\0"):
                    yield int(folder.name)
            except OSError:  # it has ended, or is another user's
                continue


class Job:
    """A submitted batch script."""

    def __init__(self, cluster, repository, *command, **environment):
        """Submit `sbatch *command` in the repository's folder."""
        self.cluster = cluster
        settings = {"MODULES": "", "SCRATCH": "", "PYTHONPATH": str(TRAINING_CODE), "HF_HUB_OFFLINE": "1"}
        self.number = cluster.command("sbatch", "--parsable", *command, cwd=repository,
                                      environment=settings | environment).strip()
        self.log = repository / "slurm" / "logs" / f"{self.number}.log"

    def fields(self):
        """Return what SLURM knows of the job."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.cluster.command("scontrol", "show", "job", self.number)))

    def logged(self):
        """Return what the batch script and the nodes have logged."""
        files = [self.log, *sorted(self.log.with_suffix("").glob("*.log"))]
        return "\n".join(f"== {file.name}\n{file.read_text()}" for file in files if file.exists())

    def stop_early(self):
        """Send the signal that comes before the time limit."""
        self.cluster.command("scancel", "--signal=USR1", "--batch", self.number)

    def wait_for(self, state):
        """Wait until the job has ended, which must be in this state; return what SLURM knows of it."""
        over = {"COMPLETED", "FAILED", "TIMEOUT", "NODE_FAIL", "CANCELLED"}
        wait_until(lambda: self.fields()["JobState"] in over, f"job {self.number}", self.logged)
        fields = self.fields()
        assert fields["JobState"] == state, self.logged()
        return fields


def wait_until(condition, what, details=lambda: ""):
    end = time.time() + LONGEST_WAIT
    while not condition():
        assert time.time() < end, f"{what}: not after {LONGEST_WAIT} seconds; {details()}"
        time.sleep(0.2)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A running SLURM."""
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A folder with the repository's batch scripts and environment, and with run scripts for the tests."""
    folder = tmp_path_factory.mktemp("repository")
    (folder / "slurm" / "logs").mkdir(parents=True)
    (folder / "training_code").mkdir()
    (folder / ".venv").symlink_to(sys.prefix)
    for script in (REPOSITORY / "slurm").glob("*.sh"):
        (folder / "slurm" / script.name).symlink_to(script)
    (folder / "training_code" / "run_evaluation_dies.py").write_text(DIES)
    (folder / "training_code" / "run_evaluation_waits.py").write_text(WAITS)
    (folder / "training_code" / "run_evaluation_begins_late.py").write_text(BEGINS_LATE)
    (folder / "training_code" / "run_finetuning_trains.py").write_text(TRAINS)
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with challenges.json, Mini/ (tiny), and plain/, what one process gives without SLURM."""
    folder = write_small_files(tmp_path_factory.mktemp("files"))
    (folder / "challenges.json").write_text(json.dumps(TASKS))
    run_here(SCRIPT, model=str(folder / "Mini"), challenges=folder / "challenges.json", device="cpu", min_prob=0.02,
             output_path=folder / "plain")
    return folder


def options(files):
    """Return the options of the same evaluation, but for its output folder."""
    return ["--model", files / "Mini", "--challenges", files / "challenges.json", "--device", "cpu", "--min-prob", 0.02]


def checked_record(output, files):
    """Return the record of an evaluation, whose submission must be that of one process."""
    submission = read_submission(output, N_INPUTS)
    assert submission == read_submission(files / "plain", N_INPUTS)
    assert any(answer["attempt_1"] != [[0]] for answers in submission.values() for answer in answers)
    record = json.loads((output / "record.json").read_text())
    assert record["finished"] and record["unfinished"] == record["set_aside"] == []
    return record


# ---- tests ----

def test_two_nodes_with_a_killed_worker_give_the_submission_of_one_process(cluster, repository, files, tmp_path):
    (tmp_path / "STOP").touch()  # of an earlier start
    job = Job(cluster, repository, "--nodes=2", "slurm/evaluation.sh", "run_evaluation_dies", *options(files),
              f"--output-path={tmp_path}", WORKERS_PER_NODE="1")
    assert job.wait_for("COMPLETED")["Restarts"] == "0"
    assert checked_record(tmp_path, files)["workers"] == 2
    assert not (tmp_path / "STOP").exists()
    logs = [(job.log.with_suffix("") / f"node-{node}.log").read_text() for node in (0, 1)]
    assert sorted("valid: 5 tasks" in log for log in logs) == [False, True]  # one worker speaks for all


def test_an_evaluation_that_is_stopped_early_goes_on_in_a_second_start(cluster, repository, files, tmp_path):
    job = Job(cluster, repository, "slurm/evaluation.sh", "run_evaluation_waits", *options(files),
              "--output-path", tmp_path, WORKERS_PER_NODE="2")
    finished = tmp_path / "candidates"
    wait_until(lambda: len(list(finished.glob("*.json"))) >= 2, "two tasks", job.logged)
    job.stop_early()
    wait_until(lambda: "put back into the queue" in job.logged(), "the requeue", job.logged)
    first = {file: file.stat().st_mtime_ns for file in finished.glob("*.json")}
    assert 2 <= len(first) < len(TASKS) and (tmp_path / "STOP").exists()
    record = json.loads((tmp_path / "record.json").read_text())
    assert len(record["unfinished"]) == len(TASKS) - len(first)

    assert job.wait_for("COMPLETED")["Restarts"] == "1"
    assert checked_record(tmp_path, files)["workers"] == 2
    assert not (tmp_path / "STOP").exists()
    assert {file: file.stat().st_mtime_ns for file in first} == first  # computed once
    assert len(list(finished.glob("*.json"))) == len(TASKS)
    assert [f"start {number}" in job.log.read_text() for number in (1, 2, 3)] == [True, True, False]


def test_an_evaluation_that_is_stopped_before_its_first_task_is_started_again(cluster, repository, files, tmp_path):
    job = Job(cluster, repository, "slurm/evaluation.sh", "run_evaluation_begins_late", *options(files),
              "--output-path", tmp_path, WORKERS_PER_NODE="1")
    wait_until((tmp_path / "waits").exists, "the worker", job.logged)
    job.stop_early()
    assert job.wait_for("COMPLETED")["Restarts"] == "1"
    assert "not finished: 5 of 5 tasks" in job.logged() and checked_record(tmp_path, files)["workers"] == 1


def test_a_fine_tuning_that_is_stopped_early_is_ended_and_started_again(cluster, repository):
    job = Job(cluster, repository, "slurm/finetuning.sh", "run_finetuning_trains", SBATCH_GPUS_PER_NODE="2")
    wait_until(lambda: job.logged().count(" trains") == 2, "the training", job.logged)
    job.stop_early()
    assert job.wait_for("COMPLETED")["Restarts"] == "1"
    for worker in (0, 1):
        assert job.logged().count(f"worker {worker} of 2 trains") == 2


def test_slurm_itself_gives_notice_before_the_time_limit(cluster, repository):
    # SLURM looks every 30 seconds, and as far ahead: each start has 30 to 60 seconds until the notice, 60 after it
    job = Job(cluster, repository, "--time=2", "--signal=B:USR1@60", "slurm/finetuning.sh", "run_finetuning_trains",
              SBATCH_GPUS_PER_NODE="1")  # fmt: skip
    wait_until(lambda: "put back into the queue" in job.logged(), "the requeue", job.logged)
    assert job.wait_for("COMPLETED")["Restarts"] == "1"
    assert job.logged().count("worker 0 of 1 trains") == 2


def test_a_job_without_gpus_fails_and_is_not_started_again(cluster, repository, tmp_path):
    (tmp_path / "module").write_text("#!/bin/sh\necho modules: $*\n")
    (tmp_path / "module").chmod(0o755)
    job = Job(cluster, repository, "slurm/finetuning.sh", "run_finetuning_trains", MODULES="2024 Python/3",
              PATH=f"{tmp_path}:{PATH}", SCRATCH=str(tmp_path / "scratch"))
    assert job.wait_for("FAILED")["Restarts"] == "0"
    assert "no GPUs on n1: `source slurm/settings.sh`" in job.logged()
    assert "modules: load 2024 Python/3\n" in job.logged() and (tmp_path / "scratch").is_dir()


def test_settings_become_options_of_sbatch():
    command = "set -eu; source slurm/settings.sh; echo $SBATCH_PARTITION $SBATCH_GPUS_PER_NODE"
    process = subprocess.run(["bash", "-c", command], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert process.stdout == "gpu_h100 4\n" and not process.stderr


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="package missing (apt-get install): shellcheck")
def test_shellcheck_finds_nothing():
    scripts = sorted(path.relative_to(REPOSITORY) for path in (REPOSITORY / "slurm").glob("*.sh"))
    process = subprocess.run(["shellcheck", "--external-sources", *scripts], cwd=REPOSITORY, capture_output=True,
                             text=True, check=False)  # fmt: skip
    assert len(scripts) == 6 and process.returncode == 0, process.stdout
