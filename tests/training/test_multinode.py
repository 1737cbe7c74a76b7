"""launch/multinode.sh on two hosts: network namespaces on this machine, joined by a cable that can be slow, or cut."""

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hosts import ADDRESSES, INTERFACE, Hosts, unavailable
from jobs import REPOSITORY, TINY, TRAIN_SH, Job, run_job

from syncbn.training.errors import UserError
from syncbn.training.multinode import checked, folder_name, meeting_of, parse
from syncbn.training.network import Endpoint
from syncbn.training.rendezvous import Meeting, join

MULTINODE_SH = str(REPOSITORY / "launch" / "multinode.sh")
ENDPOINT = "--rdzv-endpoint=10.77.0.1"
# 8 steps of 2 processes; what is drawn takes time.
LEAN = [*TINY, "callbacks.pictures=null", "callbacks.curves=null", "logger=none"]
HERE = f"PYTHONPATH={Path(__file__).parent}"
STEPS = ["--nproc-per-node=1", "--module=steps"]

WHY_NOT = unavailable()
on_two_hosts = pytest.mark.skipif(WHY_NOT is not None, reason=WHY_NOT or "")


@pytest.fixture
def hosts():
    with Hosts() as both:
        yield both


class Jobs:
    """What runs on the hosts; nothing of it outlives the test."""

    def __init__(self, cwd: Path) -> None:
        self.cwd = cwd
        self.running: list[Job] = []

    def start(self, command: list[str]) -> Job:
        self.running.append(Job(command, self.cwd))
        return self.running[-1]

    def kill(self) -> None:
        for job in self.running:
            job.kill()


@pytest.fixture
def jobs(tmp_path):
    all_jobs = Jobs(tmp_path)
    yield all_jobs
    all_jobs.kill()


def both_hosts(hosts, jobs, *arguments):
    return [jobs.start(hosts.on(host, multinode(*arguments))) for host in (0, 1)]


def multinode(*arguments, options=("--nnodes=2", ENDPOINT)):
    return ["env", HERE, MULTINODE_SH, *options, *arguments]


@pytest.fixture(scope="module")
def on_one_host(tmp_path_factory):
    """The last weights of two processes on this machine; awaited when they are asked for."""
    jobs = Jobs(tmp_path_factory.mktemp("one"))
    job = jobs.start([str(TRAIN_SH), *LEAN, "trainer.devices=2", "run_dir=run"])

    def weights():
        assert job.finish(150) == 0, told(job)
        return last_weights(jobs.cwd / "run")

    yield weights
    jobs.kill()


@on_two_hosts
@pytest.mark.timeout(200)
def test_two_hosts_train_as_one(hosts, jobs, on_one_host):
    """Through a slow cable, which is out for a while, shorter than any timeout. Other jobs do not get in between."""
    hosts.slow("400kbit")  # a step takes more than half a second
    arguments = [*LEAN, "trainer.devices=1", "run_dir=two"]
    pair = both_hosts(hosts, jobs, *arguments)
    pair[0].wait_for("this node is")
    # The same port for another job, and another line on one of the nodes.
    others = [jobs.start(hosts.on(host, multinode(*STEPS, "norm", "1", "0"))) for host in (0, 1)]
    pair[0].wait_for("epoch 1/2")
    hosts.cut()
    time.sleep(1.5)
    hosts.mend()
    assert [job.finish(150) for job in pair] == [0, 0], [told(job) for job in pair]
    assert [job.finish(1) for job in others] == [2, 2]
    assert "port 29400 of 10.77.0.1 is in use, and not by the job job-" in others[0].error_output
    assert "at 10.77.0.1:29400 there is something else than the job job-" in others[1].error_output
    assert f"this node is {ADDRESSES[1]} on {INTERFACE}, of 2, with 1 process" in pair[1].output
    assert pair[0].output.count("2 processes on cpu") == 1
    assert "6 of 6 layers synchronized over all 2 processes" in pair[0].output
    assert "epoch" not in pair[1].output
    assert equal(last_weights(jobs.cwd / "two"), on_one_host())


@on_two_hosts
@pytest.mark.timeout(250)
def test_killed_launchers_come_back_and_the_job_goes_on(hosts, jobs, on_one_host):
    """SIGKILL to that of a node, then to that of the rendezvous; each is started again with the same line."""
    hosts.slow("400kbit")
    options = ["--nnodes=2", ENDPOINT, "--max-restarts=3", "--node-timeout=10"]
    arguments = [*LEAN, "trainer.devices=1", "ckpt_path=auto", "checkpoint.every_n_steps=1"]
    lines = [hosts.on(host, multinode(*arguments, options=options)) for host in (0, 1)]
    first, second = (jobs.start(line) for line in lines)
    first.wait_for("epoch 1/2")
    second.kill()
    second = jobs.start(lines[1])
    first.wait_for("continuing from: ")
    first.kill()
    first_again = jobs.start(lines[0])
    assert [job.finish(150) for job in (first_again, second)] == [0, 0], [told(job) for job in jobs.running]
    assert re.search("process 0 ended with status 1: starting all processes again, restart 1 of 3", told(first))
    assert "the launcher at 10.77.0.1:29400 has ended" in told(second)
    assert first_again.output.count("continuing from: ") == 1
    (run,) = (jobs.cwd / "runs" / "digits-seg").iterdir()
    assert equal(last_weights(run), on_one_host())
    assert not living(jobs.cwd)


@on_two_hosts
@pytest.mark.timeout(150)
def test_a_cut_for_longer_than_the_timeout_ends_the_job(hosts, jobs):
    """Two jobs, with a cable each. In one, SyncBatchNorm's exchange notices; in the other nothing of ours waits, and
    what does would wait for half an hour: the launchers notice."""
    with Hosts() as others:
        norm = both_hosts(hosts, jobs, "--node-timeout=8", *STEPS, "norm", "10000", "0.05")
        reduce = both_hosts(others, jobs, "--node-timeout=6", *STEPS, "reduce", "10000", "0.05")
        for pair, cable in ((norm, hosts), (reduce, others)):
            pair[0].wait_for("step 10")
            cable.cut()
        began = time.monotonic()
        assert [job.finish(40) for job in (*norm, *reduce)] == [1, 1, 1, 1], [told(job) for job in (*norm, *reduce)]
        assert time.monotonic() - began < 30
    assert "of rank 0 (forward of '0', 11 numbers) is overdue" in norm[0].error_output
    assert "rank 1: no answer" in norm[0].error_output
    assert "The job's store cannot be reached" in norm[1].error_output
    assert "error: 1 of 2 nodes have not been heard of for 6 s" in reduce[0].error_output
    assert "error: the launcher at 10.77.0.1:29400 has ended, or has been silent for 6 s" in reduce[1].error_output
    assert not living(jobs.cwd)


def last_weights(run):
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True, map_location="cpu")["state_dict"]


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def told(job):
    return f"{job.output}{job.error_output}"


def living(cwd):
    """Processes of jobs that work in a folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(process / "cwd") == str(cwd):
                found.append((process / "cmdline").read_text().split("\0"))
        except OSError:  # it has ended meanwhile
            continue
    return found


@on_two_hosts
def test_the_way_to_the_other_host(hosts):
    """Its address and the interface that leads there, whatever the host's own name stands for."""
    program = (
        "from syncbn.training.network import *\n"
        "for host in ('10.77.0.1', '10.77.0.2', '127.0.0.1', '::1'):\n"
        "    route = route_to(Endpoint(host, 1)); print(route.source, route.interface, route.stays_here)"
    )
    output = subprocess.run(hosts.on(1, [sys.executable, "-c", program]), check=True, capture_output=True, text=True)
    assert output.stdout.splitlines() == [
        f"10.77.0.2 {INTERFACE} False",
        f"10.77.0.2 {INTERFACE} True",
        "127.0.0.1 lo True",
        "::1 lo True",
    ]


def test_a_mistake_ends_before_anything_starts(tmp_path):
    job = run_job([MULTINODE_SH, "--nnodes=2", "--rdzv-endpoint=127.0.0.1", *TINY, "data.batchsize=1"], tmp_path)
    assert job.process.returncode == 2
    assert job.error_output == "error: data.batchsize: no such key. Did you mean data.batch_size?\n"
    assert job.output == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--nnodes=0"], "--nnodes must be a number of nodes or a range such as 2:4, got '0'"),
        (["--nnodes=3:2"], "--nnodes must be a number of nodes or a range such as 2:4, got '3:2'"),
        (["--rdzv-endpoint=node0:http"], "expected HOST or HOST:PORT, got 'node0:http'"),
        (["--nproc-per-node=0"], "--nproc-per-node must be a number of processes of at least 1, got '0'"),
        (["--max-restarts=-1"], "--max-restarts must be at least 0, got -1"),
        (["--node-timeout=0"], "--node-timeout must be at least 1 second, got 0"),
        (["--interface=eth77"], "--interface: no eth77 on this node, which has "),
        (["max_restarts=often"], "max_restarts must be a whole number of at least 0, got 'often'"),
        (["trainer.devices=auto"], "trainer.devices must be a number of processes of at least 1, got 'auto'"),
    ],
)
def test_what_is_wrong_with_an_option(options, message):
    with pytest.raises(UserError, match=re.escape(message)):
        understood(["--nnodes=2", "--rdzv-endpoint=node0", *options])


def understood(line):
    options, arguments = parse(line)
    return checked(options, arguments), meeting_of(options), arguments


def test_options_are_torchruns_and_the_rest_is_hydras():
    line = ["--nnodes", "2:4", "--rdzv-endpoint", "[fd00::1]:29500", "--max-restarts=2", "seed=1", "trainer.devices=3"]
    (processes, restarts), meeting, arguments = understood(line)
    assert (processes, restarts, meeting.min_nodes, meeting.max_nodes) == (3, 2, 2, 4)
    assert (meeting.endpoint, str(meeting.endpoint)) == (Endpoint("fd00::1", 29500), "[fd00::1]:29500")
    assert arguments == ["seed=1", "trainer.devices=3", "max_restarts=2"]


def test_the_same_line_is_the_same_job():
    line = ["--nnodes=2", "--rdzv-endpoint=node0"]
    names = [parse(line + more)[0].rdzv_id for more in (["seed=1"], ["seed=1"], ["seed=2"], ["--rdzv-id=mine"])]
    assert names[0] == names[1] != names[2]
    assert names[3] == "mine"
    assert folder_name("team/job 7") == "team_job_7"


def test_a_name_that_only_this_node_understands_is_refused(monkeypatch):
    """As most systems write their own name into /etc/hosts: the job would wait for nodes that cannot come."""
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(socket.AF_INET, 2, 17, "", ("127.0.1.1", 29400))])
    with pytest.raises(UserError, match=r"node0 is 127\.0\.1\.1 on this node, where no other one can reach it"):
        join(Meeting(Endpoint("node0", 29400), "job", 2, 2), pytest.fail)


def test_a_name_that_leads_nowhere_is_told(tmp_path):
    said = []
    meeting = Meeting(Endpoint("no-such-host.invalid", 29400), "job", 2, 2, join_timeout_s=1)
    with pytest.raises(UserError, match=r"nobody has answered at no-such-host.invalid:29400 for 1 s"):
        join(meeting, said.append)
    assert len(said) == 1
