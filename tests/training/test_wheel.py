"""The wheel stands on its own: configuration and launch scripts are inside, and the command finds them."""

import subprocess
import sys
import sysconfig
import zipfile

import pytest
from jobs import REPOSITORY, environment, run_job


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder)]
    subprocess.run([*build, str(REPOSITORY)], check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installation(wheel, tmp_path_factory):
    """An environment with the wheel and, without a download, the dependencies of the tests' own."""
    folder = tmp_path_factory.mktemp("installation")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index"]
    subprocess.run([*pip, str(wheel)], check=True, capture_output=True)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    # After the environment's own packages; .pth files in there, such as an editable syncbn's, are not followed.
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return folder


def test_the_wheel_holds_configuration_and_scripts(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    for folder in ("conf", "launch"):
        files = [path for path in (REPOSITORY / folder).rglob("*") if path.is_file()]
        assert files
        assert {f"syncbn/{file.relative_to(REPOSITORY)}" for file in files} <= names
    assert not [name for name in names if name.startswith(("tests/", "conf/"))]


def test_the_installed_command_composes_its_own_configuration(installation, tmp_path):
    python = installation / "bin" / "python"
    origin = subprocess.run(
        [python, "-c", "import importlib.util as u; print(u.find_spec('syncbn').origin)"],
        check=True, capture_output=True, text=True, cwd=tmp_path,
    ).stdout  # fmt: skip
    assert origin.startswith(str(installation))
    job = run_job([str(installation / "bin" / "syncbn-train"), "--cfg", "job"], tmp_path)
    assert job.process.returncode == 0, job.error_output
    assert "_target_: syncbn.training.data.DigitScenesDataModule" in job.output
    assert "_target_: syncbn.lightning.SyncBatchNormPlugin" in job.output
    assert not list(tmp_path.iterdir())


def test_the_installed_script_runs_the_installed_package(installation, tmp_path):
    (script,) = installation.glob("lib/python*/site-packages/syncbn/launch/train.sh")
    path = f"{installation / 'bin'}:{environment()['PATH']}"
    result = subprocess.run(
        ["bash", script, "data.batchsize=1"],
        env=environment(PATH=path), cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 2
    assert result.stderr == "error: data.batchsize: no such key. Did you mean data.batch_size?\n"
