"""Training a diffusion prior: what it learns, going on with it, its configuration, the command."""

import csv
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
import torch
from safetensors.torch import save_file

from neurosde.cli import main
from neurosde.datasets.ensembles import Dale, GainMixture, Gaussian, Sparse
from neurosde.models import tensor_files, train_command, training
from neurosde.models.diffusion_prior import load_prior
from neurosde.models.training import DenoiserModule, denoising_loss, training_sigmas
from neurosde.models.training_config import PriorTraining, read_training
from neurosde.models.training_data import training_data
from neurosde.models.training_run import TrainingRun, train_prior

SMALL = PriorTraining(
    ensembles=(Sparse(1.5, 0.1),), sizes=(4,), preset="tiny", steps=40, batch_entries=160, warmup=5, ema=0.9
)  # fmt: skip
SMALL_OPTIONS = [
    "--ensemble", "sparse", "--g", "1.5", "--density", "0.1", "--N", "4", "--preset", "tiny", "--steps", "40",
    "--batch-entries", "160", "--warmup", "5", "--ema", "0.9",
]  # fmt: skip
EVERY = TrainingRun(accelerator="cpu", log_every=1, validate_every=10)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def same(one, other):
    states = [prior.network.state_dict() for prior in (one, other)]
    return all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def metrics(out, version, name="loss"):
    with open(out / "log" / f"version_{version}" / "metrics.csv") as file:
        return [(int(row["step"]), float(row[name])) for row in csv.DictReader(file) if row[name]]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted")
    train_prior(SMALL, out, EVERY)
    assert sorted(one.name for one in out.iterdir()) == ["log", "prior.safetensors"]
    return out


# Training


@pytest.mark.slow
def test_it_learns_what_a_gaussian_prior_lacks(tmp_path):
    """Both denoisers see the same matrices and noise: the differences of their errors have a sign but for chance."""
    config = replace(SMALL, sizes=(10,), steps=150, batch_entries=6400, warmup=20, ema=0.999)
    prior = train_prior(config, tmp_path, TrainingRun(accelerator="cpu", log_every=10, validate_every=15))
    losses = [loss for _, loss in metrics(tmp_path, 0, "validation/loss")]
    assert len(losses) == 10 and losses[-1] < losses[4] < losses[0]
    training_losses = [loss for _, loss in metrics(tmp_path, 0)]
    assert len(training_losses) == 15 and np.mean(training_losses[-5:]) < np.mean(training_losses[:3])
    untrained = DenoiserModule(config).network
    examples = training_data(config).examples({"N": 10, "count": 400}, generator(99))
    for sigma, best in ((0.5, 0.5), (1.0, 0.7)):  # it does about as well as that after so few steps
        levels = torch.full((400,), sigma, dtype=torch.float64)
        with torch.no_grad():
            gaussian, learnt = (
                denoising_loss(network, examples, levels, generator(5))[0] for network in (untrained, prior.network)
            )
        gain = gaussian - learnt
        assert float(gain.mean()) > 4 * float(gain.std()) / math.sqrt(400)
        assert float(learnt.mean()) < best * float(gaussian.mean())


@pytest.fixture
def heard():
    """Python's own handler: what a shell starts in the background is told to ignore interrupts."""
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, inherited)


def interrupt_at(monkeypatch, step, times=1):
    original = DenoiserModule.on_train_batch_end

    def then(self, outputs, *rest):
        original(self, outputs, *rest)
        if self.global_step == step:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(DenoiserModule, "on_train_batch_end", then)


@pytest.mark.parametrize("step", [1, 16, 40])
def test_going_on_is_as_if_never_interrupted(step, uninterrupted, tmp_path, monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, step)
        train_prior(SMALL, tmp_path, EVERY)
    assert signal.getsignal(signal.SIGINT) is before
    assert sorted(one.name for one in tmp_path.iterdir()) == ["log", "state.safetensors"]
    prior = train_prior(SMALL, tmp_path, EVERY)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["log", "prior.safetensors"]
    assert same(prior, load_prior(uninterrupted)) and same(load_prior(tmp_path), prior)
    assert prior.config == load_prior(uninterrupted).config and prior.config.training["steps_done"] == 40
    if step < 40:  # else nothing was left to do
        first, second = metrics(tmp_path, 0), metrics(tmp_path, 1)
        assert second[0][0] == first[-1][0] + 1
        assert first + second == metrics(uninterrupted, 0)
        whole = dict(metrics(uninterrupted, 0, "validation/loss"))
        validated = [one for version in (0, 1) for one in metrics(tmp_path, version, "validation/loss")]
        assert {one: loss for one, loss in validated if one != step} == whole  # it validates when interrupted, too


def test_a_second_interrupt_ends_it_at_once(tmp_path, monkeypatch, heard):
    before = signal.getsignal(signal.SIGINT)
    interrupt_at(monkeypatch, 3, times=2)
    with pytest.raises(KeyboardInterrupt):
        train_prior(SMALL, tmp_path, EVERY)
    assert signal.getsignal(signal.SIGINT) is before
    assert not list(tmp_path.glob("*.safetensors"))


def test_an_interrupt_while_the_prior_is_written_leaves_no_half_of_it(uninterrupted, tmp_path, monkeypatch):
    def half(tensors, path, header):
        if header["format"] == "neurosde-prior":
            path.write_bytes(b"half of it")
            raise KeyboardInterrupt
        save_file(tensors, path, header)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tensor_files, "save_file", half)
        train_prior(SMALL, tmp_path, EVERY)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["log", "state.safetensors"]
    with pytest.raises(ValueError, match=r"another training \(seed = 0 there, 1 now\); choose another --out"):
        train_prior(replace(SMALL, seed=1), tmp_path, EVERY)
    state = (tmp_path / "state.safetensors").read_bytes()
    assert same(train_prior(SMALL, tmp_path, EVERY), load_prior(uninterrupted))
    for damaged in (state[: len(state) // 2], b""):
        (tmp_path / "prior.safetensors").unlink(missing_ok=True)
        (tmp_path / "state.safetensors").write_bytes(damaged)
        with pytest.raises(ValueError, match="state.safetensors is not a safetensors file, or is damaged .*Delete it"):
            train_prior(SMALL, tmp_path, EVERY)
    save_file({}, tmp_path / "state.safetensors", {"format": "neurosde-prior"})
    with pytest.raises(ValueError, match="not the state of a training, or one of another version"):
        train_prior(SMALL, tmp_path, EVERY)


def test_what_is_trained_is_not_trained_again(uninterrupted, capsys):
    written = (uninterrupted / "prior.safetensors").stat().st_mtime_ns
    assert same(train_prior(SMALL, uninterrupted, EVERY), load_prior(uninterrupted))
    assert main(["train", "prior", *SMALL_OPTIONS, "--out", str(uninterrupted)]) == 0
    assert "is trained already, 40 steps" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"another training \(learning_rate = 0.002 there, 0.001 now\)"):
        train_prior(replace(SMALL, learning_rate=1e-3), uninterrupted, EVERY)
    assert (uninterrupted / "prior.safetensors").stat().st_mtime_ns == written


def start(*options):
    command = [sys.executable, "-m", "neurosde", "train", "prior", *SMALL_OPTIONS, *map(str, options)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_state(path, process, after=0):
    """Until a state is written that is newer than `after`."""
    deadline = time.monotonic() + 120
    while not (path.exists() and path.stat().st_mtime_ns > after):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.002)
    return path.stat().st_mtime_ns


@pytest.mark.slow
def test_ctrl_c_and_kill_lose_nothing(tmp_path):
    """All in processes of their own: threads that other tests have set would round differently."""
    whole, out = tmp_path / "whole", tmp_path / "interrupted"
    state, often = out / "state.safetensors", ("--checkpoint-minutes", 1e-4, "--out", out)
    process = start(*often)
    wait_for_state(state, process)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=120)
    assert process.returncode == 130
    assert said == ("", "interrupted; give the same command again to go on\n")
    assert state.exists() and not (out / "prior.safetensors").exists()
    process = start(*often)
    wait_for_state(state, process, state.stat().st_mtime_ns)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL and state.exists()
    train = ["train", "prior", *SMALL_OPTIONS, "--log-every", "1", "--validate-every", "10"]
    commands = [[*train, "--out", str(folder)] for folder in (out, whole)]
    script = f"from neurosde.cli import main\nfor words in {commands}:\n    assert main(words) == 0"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.count("trained, 40 steps") == done.stdout.count("\n") == 2
    assert same(load_prior(out), load_prior(whole))
    losses = dict(metrics(whole, 0))
    rest = metrics(out, 2)
    assert 0 < len(rest) < 40 and rest == list(losses.items())[-len(rest) :]
    validated = metrics(out, 2, "validation/loss")
    assert validated == metrics(whole, 0, "validation/loss")[-len(validated) :]


@pytest.mark.slow
def test_two_processes_train_as_one_does(uninterrupted, tmp_path):
    """Their noise is another one: its effect is that of another seed, measured on the same held-out matrices."""
    environment = {"MASTER_PORT", "MASTER_ADDR", "LOCAL_RANK", "WORLD_SIZE"} & os.environ.keys()
    assert not environment
    process = start("--devices", 2, "--accelerator", "cpu", "--out", tmp_path / "two")
    out, error = process.communicate(timeout=300)
    assert process.returncode == 0 and error == "" and out.count("\n") == 1 and "trained, 40 steps" in out
    assert sorted(one.name for one in (tmp_path / "two").iterdir()) == ["log", "prior.safetensors"]
    seeds = [train_prior(replace(SMALL, seed=seed), tmp_path / str(seed), EVERY) for seed in (1, 2, 3)]
    examples = training_data(SMALL).examples({"N": 4, "count": 2000}, generator(99))
    levels = training_sigmas(2000, 80.0, generator(98))

    def loss(prior):
        with torch.no_grad():
            return float(denoising_loss(prior.network, examples, levels, generator(97))[0].mean())

    losses = [loss(prior) for prior in (load_prior(uninterrupted), *seeds)]
    noise = np.std(losses, ddof=1) * math.sqrt(1 + 1 / len(losses))
    assert abs(loss(load_prior(tmp_path / "two")) - np.mean(losses)) < scipy.stats.t.isf(5e-4, 3) * noise


def test_a_loss_that_diverges_is_noticed(tmp_path, capsys):
    assert main(["train", "prior", *SMALL_OPTIONS, "--learning-rate", "1e30", "--warmup", "1", "--log-every", "5",
                 "--out", str(tmp_path)]) == 2  # fmt: skip
    error = capsys.readouterr().err
    assert "the loss is not finite at or shortly before step 5; lower --learning-rate (now 1e+30)" in error
    assert error.count("\n") == 1 and not list(tmp_path.glob("*.safetensors"))
    with pytest.raises(FloatingPointError, match="before step 40"):  # noticed as its state is written, at the latest
        train_prior(replace(SMALL, learning_rate=1e30, warmup=1), tmp_path, TrainingRun(accelerator="cpu"))
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_gpu_that_is_too_small(tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(training, "denoising_loss", full)
    with pytest.raises(MemoryError, match=r"lower --batch-entries \(now 160\), or --checkpoint-above \(now 128\)"):
        train_prior(SMALL, tmp_path, EVERY)


# Configuration and command


def test_a_file_of_a_training(tmp_path):
    path = tmp_path / "training.toml"
    path.write_text('steps = 20\nsizes = [4, 8]\n[[ensembles]]\nname = "sparse"\ngain = 0.8\ngain_high = 2.0\n')
    config = PriorTraining(**read_training(path))
    assert config == PriorTraining(ensembles=(GainMixture(Sparse(0.8), 2.0),), sizes=(4, 8), steps=20)
    path.write_text('dataset = ["a.nc", "b.nc"]\n')
    assert PriorTraining(**read_training(path)).contents()["dataset"] == ["a.nc", "b.nc"]


@pytest.mark.parametrize(
    ("text", "error", "match"),
    [
        ("colour = 1", ValueError, r"a training has the fields .*; got \['colour'\]"),
        ("steps = ", ValueError, "training.toml is not a TOML file"),
        ('steps = "many"', TypeError, "steps must be an integer; got 'many'"),
        ("steps = 0", ValueError, "steps must be at least 1"),
        ("sizes = 10", TypeError, "sizes must be a list; got 10"),
        ("sizes = []", ValueError, "at least one number of neurons"),
        ("sizes = [1]", ValueError, "N must be at least 2; got 1"),
        ('dataset = "cube.nc"', TypeError, "dataset must be a list; got 'cube.nc'"),
        ("ensembles = [{gain = 1.0}]", ValueError, r"must be a table \[\[ensembles\]\] with a name"),
        ('ensembles = ["sparse"]', ValueError, r"must be a table \[\[ensembles\]\] with a name"),
        ('ensembles = [{name = "red"}]', ValueError, "ensemble must be one of"),
        ('ensembles = [{name = "dale"}, {name = "dale"}]', ValueError, "must have different names"),
        ('ensembles = [{name = "block", num_blocks = 6}]\nsizes = [4]', ValueError, "need at least as many neurons"),
        ('dataset = ["cube.nc"]', ValueError, "either cubes or ensembles"),
        ("ensembles = []", ValueError, "either cubes or ensembles"),
        ("ema = 1.0", ValueError, r"ema must lie in \[0, 1\); got 1"),
        ('ema = "x"', TypeError, "ema must be a number; got str"),
        ("family_dropout = -0.1", ValueError, "family_dropout must be non-negative"),
        ("learning_rate = 0.0", ValueError, "learning_rate must be positive"),
        ("sigma_max = 0.001", ValueError, "sigma_max must exceed 0.002"),
        ('preset = "huge"', ValueError, "preset must be one of"),
        ("seed = -1", ValueError, "seed must be at least 0"),
    ],
)
def test_trainings_that_cannot_be(text, error, match, tmp_path):
    path = tmp_path / "training.toml"
    path.write_text(text)
    with pytest.raises(error, match=match):
        PriorTraining(**({"ensembles": (Gaussian(),)} | read_training(path)))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"accelerator": "tpu"}, "accelerator must be one of"),
        ({"precision": "16"}, "precision must be one of"),
        ({"devices": 0}, "devices must be at least 1"),
        ({"checkpoint_minutes": 0.0}, "checkpoint_minutes must be positive"),
    ],
)
def test_runs_that_cannot_be(options, match):
    with pytest.raises(ValueError, match=match):
        TrainingRun(**options)


def test_gpus_that_are_not_there():
    count = torch.cuda.device_count() + 1
    with pytest.raises(ValueError, match=f"{count} GPUs are asked for .*; lower --devices, or give --accelerator cpu"):
        TrainingRun(accelerator="gpu", devices=count)


@pytest.fixture
def asked(monkeypatch):
    """What the command asks to be trained."""
    found = []

    def note(config, out, run):
        found.append((config, run))
        raise ValueError("noted")

    monkeypatch.setattr(train_command, "train_prior", note)
    return found


def test_options_go_before_the_file(asked, tmp_path):
    path = tmp_path / "training.toml"
    path.write_text('steps = 20\nwarmup = 7\nsizes = [4]\n[[ensembles]]\nname = "dale"\n')
    command = ["train", "prior", "--out", str(tmp_path / "out"), "--config", str(path)]
    assert main([*command, "--steps", "30", "--log-every", "3"]) == 2
    assert main([*command, "--ensemble", "gaussian", "sparse", "--g", "1.2", "--density", "0.3"]) == 2
    assert main([*command, "--dataset", "cube.nc"]) == 2
    first, second, third = (config for config, _ in asked)
    assert first == PriorTraining(ensembles=(Dale(),), sizes=(4,), steps=30, warmup=7) and asked[0][1].log_every == 3
    assert second == replace(first, steps=20, ensembles=(Gaussian(1.2), Sparse(1.2, 0.3)))
    assert [str(cube) for cube in third.dataset] == ["cube.nc"] and third.ensembles == ()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ([], "give either cubes or ensembles to train on"),
        (["--ensemble", "dale", "--dataset", "cube.nc"], "and not both"),
        (["--ensemble", "dale", "--density", "0.1"], "none of the ensembles ['dale'] has the parameters ['density']"),
        (["--config", "missing.toml"], "missing.toml"),
        (["--ensemble", "dale", "--N", "1"], "N must be at least 2"),
    ],
)
def test_the_command_says_what_is_wrong(options, match, asked, tmp_path, capsys):
    assert main(["train", "prior", "--out", str(tmp_path / "out"), *options]) == 2
    error = capsys.readouterr().err
    assert match in error and error.count("\n") == 1 and not asked
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["prior", "--ensemble", "sparse", "dale", "--teachers", "exact"], "one for each of the 2 ensembles"),
        (["prior", "--ensemble", "low-rank", "--teachers", "exact"], "known in closed form for the ensembles"),
        (["prior", "--ensemble", "sparse", "--teachers", "missing"], "missing is neither a file nor one of the priors"),
        (
            ["prior", "--ensemble", "sparse", "--start", "missing"],
            "nor one of the posteriors ['base'] or the",
        ),
        (["cfg", "--ensemble", "sparse", "--start", "missing"], "nor one of the posteriors ['base'] or the priors"),
        (["prior", "--ensemble", "block", "--N", "3"], "4 clusters need at least as many neurons"),
        (["cfg", "--ensemble", "block", "--N", "3"], "4 clusters need at least as many neurons"),
        (["prior", "--dataset", "missing.nc"], "no such file: missing.nc"),
        (["cfg", "--dataset", "missing.nc"], "no such file: missing.nc"),
    ],
)
def test_a_training_that_is_refused_leaves_nothing_behind(options, match, tmp_path, capsys):
    assert main(["train", *options, "--out", str(tmp_path / "new" / "out")]) == 2
    error = capsys.readouterr().err
    assert match in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())
