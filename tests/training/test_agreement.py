"""Processes that would not train the same are refused at the start, on every process, with what differs first."""

import importlib
import sys
import time

import pytest
import torch
import torch.distributed as dist
from jobs import TINY, Job
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.plugins.environments import LightningEnvironment
from omegaconf import OmegaConf
from torch import nn
from torch.utils.data import DataLoader

import syncbn
from syncbn.lightning import SyncBatchNormPlugin
from syncbn.training import agreement
from syncbn.training.agreement import difference
from syncbn.training.callbacks import Agreement, GracefulStop, NonFiniteLoss
from syncbn.training.callbacks.agreement import agree_on_configuration
from syncbn.training.callbacks.non_finite import _Step
from syncbn.training.config import compose_config
from syncbn.training.errors import UserError
from syncbn.training.train import fit

REFUSED = "the processes do not train the same: "
START_ALIKE = "; start the same command with the same code on every node"


class Net(LightningModule):
    def __init__(self, width=4, eps=1e-5, lr=0.1):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width, eps), nn.ReLU(), nn.Linear(width, 1))
        self.lr = lr
        self.losses = []

    def training_step(self, batch, batch_idx):
        loss = self.net(batch).square().mean()
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.net(batch).square().mean(), sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr, momentum=0.9)


class Data(LightningDataModule):
    """``batches`` batches of two samples; those at ``broken`` have a NaN."""

    def __init__(self, batches=4, validation=1, broken=(), without=()):
        super().__init__()
        samples = torch.randn(batches, 2, 3, generator=torch.Generator().manual_seed(1))
        for index in broken:
            samples[index, 0, 1] = float("nan")
        self.samples = samples[[index for index in range(batches) if index not in without]].flatten(0, 1)
        self.validation = validation

    def train_dataloader(self):
        return DataLoader(self.samples, batch_size=2)

    def val_dataloader(self):
        return DataLoader(torch.zeros(2 * self.validation, 3), batch_size=2)


def fitted(module, data, folder, callbacks):
    """The module after an epoch of two processes, or what refuses to train it."""
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        plugins=[SyncBatchNormPlugin(), LightningEnvironment()],
        max_epochs=1,
        callbacks=callbacks,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        use_distributed_sampler=False,
        default_root_dir=folder,
    )
    try:
        trainer.fit(module, data)
    except UserError as error:
        return str(error), trainer.global_step
    return module, trainer.global_step


def agreed(net, data, folder):
    result, steps = fitted(Net(**net), Data(**data), folder, [Agreement()])
    return (result if isinstance(result, str) else None), steps


def on_both(processes, function, zero, one, *args):
    """The two processes' results, which have to be the same."""
    first, second = processes(2).run(function, *args, per_rank=[zero, one])
    assert first == second
    return first


def test_processes_that_agree_train(processes, tmp_path):
    assert on_both(processes, agreed, ({}, {}), ({}, {}), tmp_path) == (None, 4)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("net", "data", "told"),
    [
        (
            {"width": 6},
            {},
            "layer net.0 is torch.nn.modules.linear.Linear(in_features=3, out_features=4, bias=True) on rank 0, "
            "torch.nn.modules.linear.Linear(in_features=3, out_features=6, bias=True) on rank 1 "
            "(and 9 more differences, such as layer net.1)" + START_ALIKE,
        ),
        ({"eps": 1e-3}, {}, "layer net.1 is torch.nn.modules.batchnorm.BatchNorm1d(4, eps=1e-05, "),
        ({"lr": 0.2}, {}, "lr of optimizer 0, group 0 is 0.1 on rank 0, 0.2 on rank 1" + START_ALIKE),
        (
            {},
            {"batches": 6},
            "the number of training batches in an epoch is 4 on rank 0, 6 on rank 1; every process must make as many "
            "steps: give each as many batches, or wrap the loader in syncbn.even_batches",
        ),
    ],
    ids=["width", "eps", "learning rate", "batches"],
)
def test_a_difference_is_refused_on_both_processes_before_the_first_step(processes, tmp_path, net, data, told):
    """Without it the first ends in DistributedDataParallel's error on one process alone, the last in a hang."""
    error, steps = on_both(processes, agreed, ({}, {}), (net, data), tmp_path)
    assert error.startswith(REFUSED + told), error
    assert steps == 0


def evened(batches, folder):
    class Even(Data):
        def train_dataloader(self):
            return syncbn.even_batches(super().train_dataloader())

    module, steps = fitted(Net(), Even(batches), folder, [Agreement()])
    return [tensor.tolist() for tensor in module.net.buffers()], steps


@pytest.mark.timeout(60)
def test_unequal_data_trains_with_even_batches(processes, tmp_path):
    (buffers, steps), other = processes(2).run(evened, tmp_path, per_rank=[(4,), (6,)])
    assert steps == 6
    assert buffers == other[0]


def difference_of_code(folder):
    """Of a package that this process has in its own folder."""
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        # Under names of their own, since the workers go on to other tests.
        import users_package.net

        return difference(agreement.source([users_package.net.Net()])), sorted(
            name for name in agreement.source([users_package.net.Net()]) if "users_package" in name
        )
    finally:
        sys.path.remove(str(folder))
        for name in [name for name in sys.modules if name.partition(".")[0] == "users_package"]:
            del sys.modules[name]


def test_other_code_on_one_process_is_named(processes, tmp_path):
    """In a module that nobody names: another one of the package imports it."""
    for rank, slope in enumerate((0.1, 0.2)):
        package = tmp_path / str(rank) / "users_package"
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
        (package / "net.py").write_text("from users_package.slope import SLOPE\n\n\nclass Net:\n    slope = SLOPE\n")
        (package / "slope.py").write_text(f"SLOPE = {slope}\n")
    told, names = on_both(processes, difference_of_code, (tmp_path / "0",), (tmp_path / "1",))
    zero, one = (agreement._checksum(tmp_path / rank / "users_package" / "slope.py") for rank in "01")
    assert told == f"the code of users_package/slope.py is {zero} on rank 0, {one} on rank 1"
    assert [name.rpartition("/")[2] for name in names] == ["__init__.py", "net.py", "slope.py"]


def test_what_only_lies_beside_the_code_is_neither_read_nor_compared(tmp_path):
    """Editors' copies, and folders of data, which may hold millions of files."""
    for name in ("__init__.py", "net.py", "heads/__init__.py", "heads/box.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    code = set(tmp_path.rglob("*.py"))
    for name in ("._net.py", "net-copy.py", ".ipynb_checkpoints/net.py", "data/a.py", "data/deep/b.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert set(agreement._modules_in(tmp_path)) == code
    assert list(agreement._modules_in(tmp_path / "archive.zip" / "package")) == []


def test_each_process_s_own_device_is_no_difference():
    class Placed(nn.Module):
        def __init__(self, device):
            super().__init__()
            self.device = device

        def extra_repr(self):
            return f"device={self.device!r}"

    zero, one = (agreement.layers(Placed(torch.device("cuda", index))) for index in (0, 1))
    assert zero == one
    assert zero != agreement.layers(Placed(torch.device("cpu")))


@pytest.mark.timeout(240)
def test_processes_that_lightning_itself_starts_train(tmp_path):
    """Its children once compared what they were to begin with while the first process was in the middle of `fit`."""
    command = [sys.executable, "-m", "syncbn.training.train", *TINY, "trainer.max_epochs=1", "trainer.devices=2"]
    job = Job([*command, "run_dir=run", "ckpt_path=auto", "callbacks.pictures=null", "callbacks.curves=null"], tmp_path)
    assert job.finish(200) == 0, job.error_output
    assert "digits-seg: 2 processes on cpu" in job.output
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").is_file()


def test_the_code_of_this_package_counts():
    files = {f"the code of syncbn/{file}" for file in ("layer.py", "kernels/triton.py", "training/train.py")}
    found = agreement.source([nn.ReLU()])
    assert files <= found.keys()
    assert all("syncbn/" in name for name in found)  # what is installed is told by its version


def difference_of_configurations(*overrides):
    return difference(agreement.configuration(compose_config(["run_dir=/a/run", *overrides])))


@pytest.mark.parametrize(
    ("zero", "one", "told"),
    [
        (["optimizer.lr=0.1"], ["optimizer.lr=0.3"], "optimizer.lr is 0.1 on rank 0, 0.3 on rank 1"),
        ([], ["+trainer.sync=true"], "trainer.sync is none on rank 0, True on rank 1"),
        (["run_dir=/a/b", "data.num_workers=2"], ["run_dir=/c", "data.num_workers=7"], None),
    ],
)
def test_configurations_are_compared_but_for_what_is_of_the_machine(processes, zero, one, told):
    found = on_both(processes, difference_of_configurations, tuple(zero), tuple(one))
    assert found == told if told is None else found.startswith(told)


def difference_of_environment(value):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("A_TOKEN", value)
        cfg = compose_config(
            ["run_dir=/a", "+logger.tensorboard.token=${oc.env:A_TOKEN}", "name=${logger.tensorboard.token}"]
        )
        facts = agreement.configuration(cfg)
    return difference(facts), {name: facts[name] for name in ("name", "logger.tensorboard.token")}


def test_values_of_the_environment_are_neither_compared_nor_told(processes):
    told, facts = on_both(processes, difference_of_environment, ("a-secret",), ("another",))
    assert told is None
    assert facts == {"name": "'${logger.tensorboard.token}'", "logger.tensorboard.token": "'${oc.env:A_TOKEN}'"}


def started(folder, environment, *overrides):
    """What the training program does before anything is shared: build, then compare."""
    from syncbn.training.train import build

    rank = str(dist.get_rank())
    torchrun = {"TORCHELASTIC_RUN_ID": "a-test", "RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": "0"}
    sizes = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (torchrun | sizes | environment).items():
            patch.setenv(name, value)
        try:
            cfg = compose_config(["trainer=cpu", "model.widths=[4,8]", f"run_dir={folder}", *overrides])
            _, _, trainer = build(cfg)
            agree_on_configuration(trainer, cfg)
        except UserError as error:
            return str(error)
    return None


@pytest.mark.timeout(90)
def test_the_program_compares_before_it_looks_at_the_data(processes, tmp_path):
    zero = (tmp_path / "0", {})
    assert on_both(processes, started, zero, (tmp_path / "1", {})) is None
    one = (tmp_path / "1", {}, "data.batch_size=3")
    told = on_both(processes, started, zero, one)
    assert told == f"{REFUSED}data.batch_size is 2 on rank 0, 3 on rank 1{START_ALIKE}"
    one = (tmp_path / "1", {"SYNCBN_CHECK": "1"})
    told = on_both(processes, started, zero, one)
    assert told == f"{REFUSED}the environment's SYNCBN_CHECK is not set on rank 0, 1 on rank 1{START_ALIKE}"


def test_the_ranks_are_told_together():
    assert agreement._ranks([1]) == "rank 1"
    assert agreement._ranks([0, 1, 2, 5]) == "ranks 0 to 2 and 5"
    assert agreement._ranks([0, 2, 4, 6, 8, 10]) == "ranks 0, 2, 4, 6 and more"


# ---- a batch that is not finite


def trained_on(data, folder, callbacks):
    """Which losses were finite, and the state at the end; or what has ended the run, and after how many steps."""
    result, steps = fitted(Net(), Data(**data), folder, callbacks)
    if isinstance(result, str):
        return result, steps
    finite = [bool(torch.tensor(loss).isfinite()) for loss in result.losses]
    return finite, {name: tensor.tolist() for name, tensor in result.net.state_dict().items()}


@pytest.mark.timeout(60)
def test_one_process_s_nan_ends_the_run_on_all(processes, tmp_path):
    told, steps = on_both(processes, trained_on, ({},), ({"broken": [1]},), tmp_path, [NonFiniteLoss()])
    assert told == "step 2: the loss is not finite on ranks 0, 1: the batch of rank 1 has values that are not finite"
    assert steps == 4  # two steps later, so that none waits


@pytest.mark.timeout(60)
def test_no_checkpoint_is_written_of_weights_that_a_nan_has_spoilt(processes, tmp_path):
    """Of one that is due right after that step."""
    callbacks = [NonFiniteLoss(), ModelCheckpoint(tmp_path, "last", every_n_train_steps=1)]
    told, steps = on_both(processes, trained_on, ({},), ({"broken": [2]},), tmp_path, callbacks)
    assert told.startswith("step 3: the loss is not finite on ranks 0, 1: the batch of rank 1")
    assert steps == 3
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 2
    assert all(tensor.isfinite().all() for tensor in checkpoint["state_dict"].values())


@pytest.mark.timeout(60)
def test_a_step_with_one_process_s_nan_can_be_skipped(processes, tmp_path):
    """The rest is that of a run without that step, bit for bit: nothing of it is in any process's statistics."""
    finite, state = on_both(
        processes, trained_on, ({},), ({"broken": [1]},), tmp_path, [NonFiniteLoss("skip", patience=2)]
    )
    assert finite == [True, False, True, True]
    without = ({"without": [1]},)
    assert state == on_both(processes, trained_on, without, without, tmp_path, [])[1]


@pytest.mark.timeout(60)
def test_steps_are_not_skipped_for_ever(processes, tmp_path):
    callbacks = [NonFiniteLoss("skip", patience=2)]
    told, _ = on_both(processes, trained_on, ({},), ({"broken": [1, 2]},), tmp_path, callbacks)
    assert told.startswith(
        "step 3: the loss is not finite on ranks 0, 1, nor in the 1 steps before: the batch of rank 1"
    )


@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_of_another_optimizer_is_refused(tmp_path):
    class Groups(Net):
        def configure_optimizers(self):
            return torch.optim.SGD([{"params": [parameter]} for parameter in self.parameters()], self.lr)

    trainer, _ = trained_here(Data(), "raise")
    path = tmp_path / "last.ckpt"
    trainer.save_checkpoint(path)
    cfg = OmegaConf.create({"ckpt_path": str(path), "run_dir": str(tmp_path)})
    trainer = Trainer(accelerator="cpu", devices=1, max_epochs=2, logger=False, default_root_dir=tmp_path)
    with pytest.raises(UserError, match="does not fit the optimizer: loaded state dict has a different number"):
        fit(trainer, Groups(), Data(), cfg)


def voters(_):
    from syncbn.training.processes import vote_group

    trainer, stop, finite = Trainer(logger=False), GracefulStop("last.ckpt"), NonFiniteLoss()
    for callback in (stop, finite):
        callback.on_fit_start(trainer, Net())
    return stop._group is finite._group is vote_group() is not None


def test_the_callbacks_share_their_sockets(processes):
    """On 512 processes a group of its own for each would reach the usual limit of 1024 open files."""
    assert on_both(processes, voters, (0,), (0,))


def trained_here(data, policy, **arguments):
    """After an epoch in this process."""
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    arguments |= {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "callbacks": [NonFiniteLoss(policy)]}
    trainer, net = Trainer(**quiet, **arguments), Net()
    trainer.fit(net, data)
    return trainer, net


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("accumulated", [2, 4])
def test_a_step_is_skipped_whichever_of_its_accumulated_batches_is_broken(accumulated):
    first = Data(batches=8, broken=[accumulated])  # the first batch of the second step
    trainer, net = trained_here(first, "skip", accumulate_grad_batches=accumulated)
    assert trainer.global_step == 8 // accumulated
    assert all(parameter.isfinite().all() for parameter in net.parameters())
    with pytest.raises(UserError, match="step 2: the loss is not finite on rank 0: the batch of rank 0 has values"):
        trained_here(first, "raise", accumulate_grad_batches=accumulated)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("policy", ["raise", "skip"])
def test_a_gradient_scaler_finds_its_scale(policy):
    """Its first gradients overflow as a matter of course."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    trainer, net = trained_here(Data(batches=16), policy, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    assert trainer.global_step == 16
    assert scaler.get_scale() <= 2.0**20
    assert all(parameter.isfinite().all() for parameter in net.parameters())
    assert not torch.equal(net.net[0].weight, Net().net[0].weight)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: its queue is full")
def test_what_a_step_has_found_is_read_while_the_device_is_at_the_next_one():
    device = torch.device("cuda")
    step = _Step(1, device)
    step.add_loss(torch.full((), float("nan"), device=device))
    step.send_to_host()
    torch.cuda._sleep(4_000_000_000)  # two seconds or so
    start = time.monotonic()
    step.vote(None)
    assert step.processes_with_non_finite_loss() == [0]
    assert time.monotonic() - start < 0.5
    torch.cuda.synchronize()


def test_what_the_callback_refuses():
    with pytest.raises(ValueError, match="policy must be one of raise, skip, got 'ignore'"):
        NonFiniteLoss("ignore")
    with pytest.raises(ValueError, match="patience must be at least 1, got 0"):
        NonFiniteLoss(patience=0)
