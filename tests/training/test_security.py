"""What comes from elsewhere runs no code, what is secret stays out of files, and nobody outside can connect."""

import ast
import os
import pickle
import re
import socket
import stat
import struct
from pathlib import Path

import miniatures
import pytest
import torch
from jobs import TINY, TRAIN_SH, Job, run_job
from omegaconf import OmegaConf

import syncbn
from syncbn.training.afterwards import load_trained, run_config
from syncbn.training.checkpoints import read_checkpoint
from syncbn.training.data.coco import CocoDetection
from syncbn.training.data.faults import BrokenItem
from syncbn.training.data.voc import read_annotation
from syncbn.training.errors import UserError
from syncbn.training.models.weights import read_state_dict
from syncbn.training.resolution import resolve_but_environment

PACKAGE = Path(syncbn.__file__).parent
SECRETS = {"FAKE_SECRET_TOKEN": "tok-9f3b17c2", "WANDB_API_KEY": "key-55d0a4e8", "DATABASE_PASSWORD": "pw-c81e728d"}


class RunsACommand:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.fixture
def evil(tmp_path):
    """Something that a pickle can hold; it must not have run at the end of the test."""
    touched = tmp_path / "touched"
    yield RunsACommand(f"touch {touched}")
    assert not touched.exists()


# ---- files from elsewhere


def in_torch_s_archive(path, thing):
    torch.save({"state_dict": {"weight": torch.ones(2)}, "callbacks": {"mine": thing}}, path)


def in_torch_s_old_format(path, thing):
    torch.save({"state_dict": {"weight": thing}}, path, _use_new_zipfile_serialization=False)


def in_a_bare_pickle(path, thing):
    path.write_bytes(pickle.dumps({"state_dict": {"weight": thing}}))


WRITERS = [in_torch_s_archive, in_torch_s_old_format, in_a_bare_pickle]


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize(("read", "refused_with"), [(read_checkpoint, UserError), (read_state_dict, ValueError)])
def test_checkpoints_and_weights_run_no_code(tmp_path, evil, write, read, refused_with):
    write(tmp_path / "file.ckpt", evil)
    with pytest.raises(refused_with, match=r"file\.ckpt"):
        read(tmp_path / "file.ckpt")


def test_such_a_file_is_a_threat_indeed(tmp_path):
    write = in_torch_s_archive
    write(tmp_path / "file.ckpt", RunsACommand(f"touch {tmp_path / 'run'}"))
    torch.load(tmp_path / "file.ckpt", weights_only=False)
    assert (tmp_path / "run").exists()


def test_a_pickle_in_place_of_annotations_or_images_is_not_loaded(tmp_path, evil):
    folder = miniatures.coco(tmp_path)
    annotations = folder / "annotations" / "instances_train2017.json"
    good = CocoDetection(folder, "train2017", str(annotations.relative_to(folder)))
    Path(good.name(0)).write_bytes(pickle.dumps(evil))
    with pytest.raises(BrokenItem):
        good.read(0)
    annotations.write_bytes(pickle.dumps(evil))
    with pytest.raises(UserError, match=annotations.name):
        CocoDetection(folder, "train2017", str(annotations.relative_to(folder)))
    Path(tmp_path, "a.xml").write_bytes(pickle.dumps(evil))
    with pytest.raises(BrokenItem):
        read_annotation(tmp_path / "a.xml")


_LAUGHS = "".join(f'<!ENTITY a{n} "{f"&a{n - 1};" * 12}">' for n in range(1, 10))
BILLION_LAUGHS = f"""<?xml version="1.0"?><!DOCTYPE annotation [<!ENTITY a0 "ha">{_LAUGHS}]>
<annotation><filename>&a9;</filename></annotation>"""
A_FILE_OF_THIS_MACHINE = """<?xml version="1.0"?><!DOCTYPE annotation [<!ENTITY a SYSTEM "file://%s">]>
<annotation><filename>&a;</filename></annotation>"""


@pytest.mark.timeout(20)
def test_entities_in_xml_neither_fill_the_memory_nor_read_files(tmp_path):
    (tmp_path / "secret").write_text("tok-9f3b17c2")
    for text in (BILLION_LAUGHS, A_FILE_OF_THIS_MACHINE % (tmp_path / "secret")):
        (tmp_path / "a.xml").write_text(text)
        with pytest.raises(BrokenItem) as refused:
            read_annotation(tmp_path / "a.xml")
        assert "tok-9f3b17c2" not in str(refused.value)


def test_yaml_of_a_run_folder_makes_no_objects(tmp_path, evil):
    """Beyond what `_target_` names when the run is built, which is documented."""
    (tmp_path / "checkpoints").mkdir()
    torch.save({"state_dict": {}}, tmp_path / "checkpoints" / "last.ckpt")
    (tmp_path / "config.yaml").write_text(f"task: !!python/object/apply:os.system ['{evil.command}']\n")
    with pytest.raises(UserError, match="cannot be read"):
        run_config(tmp_path / "checkpoints" / "last.ckpt")


# ---- the package's own code


def calls(tree):
    """(name as it is written, call) of all calls: ("torch.load", ...)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def given(call, name):
    return next((keyword.value for keyword in call.keywords if keyword.arg == name), None)


LOADS = {"torch.load", "load_from_checkpoint", "torch.hub.load_state_dict_from_url"}
SAFE = "weights_only=True"
FORBIDDEN = {
    "eval", "exec", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "marshal.load",
    "marshal.loads", "shelve.open", "pickle.load", "pickle.loads", "cloudpickle.load", "joblib.load", "dill.load",
    "tempfile.mktemp", "pd.read_pickle",
}  # fmt: skip
# Why each of these is no way in for what others have written.
ALLOWED = {
    ("verification/meeting.py", "torch.load"): "what another process of the job says, for `syncbn.verify`",
    ("fusion.py", "exec"): "the forward that fuse has generated itself, from the graph of the user's own module",
    ("lockstep.py", "pickle.loads"): "a batch's structure, from another process of the job",
    ("bench/processes.py", "pickle.loads"): "the result of its own child, in a temporary folder of its own",
}


def test_no_line_of_the_package_loads_code():
    found = {}
    for file in PACKAGE.rglob("*.py"):
        for name, call in calls(ast.parse(file.read_text())):
            where = f"{file.relative_to(PACKAGE)}:{call.lineno}"
            if name in LOADS and SAFE not in ast.unparse(call):
                found[(file.relative_to(PACKAGE).as_posix(), name)] = where
            if name.startswith("subprocess."):
                assert given(call, "shell") is None, where
            if re.fullmatch(r"(np|numpy)\.load", name):
                assert given(call, "allow_pickle") is None, where
            if name.endswith((".fit", ".validate", ".test", ".predict")) and given(call, "ckpt_path") is not None:
                assert SAFE in ast.unparse(call), where
            if name in FORBIDDEN:
                found[(file.relative_to(PACKAGE).as_posix(), name)] = where
    assert found.keys() == ALLOWED.keys(), found


# ---- a whole run: what it listens on, and what it leaves


class Sockets:
    """Who could connect to a job's processes (Linux)."""

    def __init__(self, marker):
        self.processes = [process for process in Path("/proc").glob("[0-9]*") if marker in _read(process / "environ")]
        inodes = {target for process in self.processes for target in _links(process / "fd")}
        self.tcp = {address for address, state in _internet("tcp", inodes) if state == "0A"}  # it listens
        self.udp = {address for address, _ in _internet("udp", inodes)}
        # A socket that listens has the flag 10000.
        rows = [row.split() for row in Path("/proc/net/unix").read_text().splitlines()[1:]]
        listening = (row for row in rows if len(row) > 7 and row[3] == "00010000" and f"socket:[{row[6]}]" in inodes)
        self.unix = {row[7]: _is_closed_to_others(row[7]) for row in listening}


def _is_closed_to_others(path):
    # Anybody on the machine may connect to an abstract one.
    if path.startswith("@"):
        return False
    try:
        return any(stat.S_IMODE(each.stat().st_mode) & 0o077 == 0 for each in (Path(path), Path(path).parent))
    except FileNotFoundError:  # it is not there any more
        return True


def _read(path):
    try:
        return path.read_bytes()
    except OSError:  # it has ended, or is another user's
        return b""


def _links(folder):
    try:
        return {os.readlink(link) for link in folder.iterdir()}
    except OSError:
        return set()


def _internet(table, inodes):
    for family, name in ((socket.AF_INET, table), (socket.AF_INET6, f"{table}6")):
        for row in Path("/proc/net", name).read_text().splitlines()[1:]:
            fields = row.split()
            if f"socket:[{fields[9]}]" in inodes:
                text = fields[1].split(":")[0]
                words = [int(text[i : i + 8], 16) for i in range(0, len(text), 8)]
                yield socket.inet_ntop(family, b"".join(struct.pack("<I", word) for word in words)), fields[3]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A whole run with secrets in its environment, under a strict umask, and its sockets while it trains."""
    cwd = tmp_path_factory.mktemp("secure")
    arguments = [
        *TINY,
        "trainer.max_epochs=200",
        "data.num_workers=1",
        "run_dir=run",
        "++logger.tensorboard.comment=${oc.env:FAKE_SECRET_TOKEN}",
        "+note=for ${oc.env:DATABASE_PASSWORD}",
    ]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SECRETS.items():
            patch.setenv(name, value)
        before = os.umask(0o027)
        try:
            job = Job([str(TRAIN_SH), *arguments], cwd)
        finally:
            os.umask(before)
    job.wait_for("epoch 2/200")
    sockets = Sockets(SECRETS["FAKE_SECRET_TOKEN"].encode())
    job.interrupt()
    job.finish()
    return job, cwd / "run", sockets


@pytest.mark.timeout(120)
def test_nobody_outside_this_machine_or_of_another_user_can_connect(run):
    _, _, sockets = run
    assert len(sockets.processes) >= 5  # the launcher, two that train, and the processes that load their data
    assert sockets.tcp <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    assert "127.0.0.1" in sockets.tcp
    assert sockets.udp <= {"127.0.0.1", "::1"}
    assert sockets.unix  # the fork server's
    assert all(sockets.unix.values()), sockets.unix


def test_secrets_of_the_environment_are_in_no_file_and_no_output(run):
    job, folder, _ = run
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {"config.yaml", "last.ckpt", "metrics.csv"} <= {path.name for path in files}
    assert any("tfevents" in path.name for path in files)
    texts = {str(path): path.read_bytes() for path in files} | {"output": (job.output + job.error_output).encode()}
    for value in SECRETS.values():
        assert not [name for name, text in texts.items() if value.encode() in text]
    assert "comment: ${oc.env:FAKE_SECRET_TOKEN}" in (folder / "config.yaml").read_text()


def test_the_rest_of_the_configuration_is_resolved_and_can_be_used_without_the_secrets(run):
    _, folder, _ = run
    text = (folder / "config.yaml").read_text()
    assert set(re.findall(r"\$\{.*?\}", text)) == {"${oc.env:FAKE_SECRET_TOKEN}", "${oc.env:DATABASE_PASSWORD}"}
    assert "FAKE_SECRET_TOKEN" not in os.environ
    assert run_config(folder / "checkpoints" / "last.ckpt", ["data.batch_size=1"]).data.batch_size == 1
    assert load_trained(str(folder)).task.class_names[0] == "background"


def test_files_have_the_permissions_that_the_umask_gives(run):
    _, folder, _ = run
    for path in (folder, *folder.rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) & 0o027 == 0, path


def test_values_that_come_from_the_environment_by_another_key_stay_as_they_are_written(monkeypatch):
    monkeypatch.setenv("A_TOKEN", "tok-1")
    monkeypatch.setenv("A_NUMBER", "4")
    written = {
        "direct": "${oc.env:A_TOKEN}",
        "chained": "${direct}",
        "part": "Bearer ${chained}",
        "decoded": "${oc.decode:${oc.env:A_NUMBER}}",
        "with_default": "${oc.env:NOT_SET,tok-2}",
        "group": {"listed": ["${part}", "${plain}"], "beside": "${.plain}", "plain": 5},
        "same_group": "${group}",
        "plain": 3,
        "open": "???",
    }
    cfg = OmegaConf.create(written)
    resolved = OmegaConf.to_container(resolve_but_environment(cfg), resolve=False)
    group = {"listed": ["${part}", 3], "beside": 5, "plain": 5}
    assert resolved == written | {"group": group, "same_group": group}
    assert OmegaConf.to_container(cfg, resolve=False) == written  # it was a copy


# ---- continuing


@pytest.mark.timeout(120)
def test_a_run_folder_s_last_checkpoint_with_code_is_refused_by_all_processes(tmp_path, evil):
    folder = tmp_path / "runs" / "digits-seg" / "1"
    (folder / "checkpoints").mkdir(parents=True)
    in_torch_s_archive(folder / "checkpoints" / "last.ckpt", evil)
    job = run_job([str(TRAIN_SH), *TINY, "ckpt_path=last"], tmp_path)
    assert job.process.returncode == 2
    assert "last.ckpt is not loaded: it names posix.system" in job.error_output
    assert job.error_output.count("error:") == 1
