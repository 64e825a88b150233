"""Cubes: what is in them, that they can be made again, interrupted, resumed and read."""

import json
import os
import signal
import subprocess
import sys
import time

import netCDF4
import numpy as np
import pytest
import torch
import xarray as xr

from neurosde import simulate_rate_network
from neurosde.cli import main
from neurosde.datasets import CubeDataset, Gaussian, Sparse, generate_activity_trials, loader, validate_cube
from neurosde.datasets import build_dataset as module
from neurosde.datasets.build_dataset import DatasetConfig, build_dataset
from neurosde.datasets.files import open_netcdf
from neurosde.datasets.store import CubeWriter

SMALL = {"num_networks": 7, "N": 6, "num_trials": 2, "T": 20}


def small(folder, **options):
    return DatasetConfig(out_dir=folder, **SMALL | options)


@pytest.fixture
def few_at_a_time(monkeypatch):
    monkeypatch.setattr(module, "BLOCK_BYTES", 2 * 4 * 2 * 20 * 6)  # two networks a block


def test_a_cube_opens_in_xarray_and_says_what_it_is(tmp_path):
    path = build_dataset(small(tmp_path, ensemble=Sparse(1.2), voltage=True))
    validate_cube(path)
    with xr.open_dataset(path) as cube:
        assert cube.sizes == {"network": 7, "post": 6, "pre": 6, "trial": 2, "time": 20, "neuron": 6}
        assert cube.activity.dims == ("network", "trial", "time", "neuron")
        assert all({"long_name", "units"} <= set(cube[name].attrs) for name in cube.variables)
        np.testing.assert_allclose(cube.time, np.arange(20) * 0.1)
        np.testing.assert_allclose(cube.activity, np.tanh(cube.voltage), atol=1e-6)
        assert {"Conventions", "title", "license", "history", "neurosde_version", "git_commit"} <= set(cube.attrs)
        config = json.loads(cube.attrs["config"])
        assert config["ensemble"] == {"name": "sparse", "gain": 1.2, "density": 0.2}
        assert cube.attrs["seed"] == 0
    with netCDF4.Dataset(path) as file:
        assert file["activity"].chunking() == "contiguous"


def test_activity_is_the_simulation_of_the_stored_network(tmp_path):
    path = build_dataset(small(tmp_path, noise_std=0.0, input_std=0.5, tau=2.0, time_unit="s"))
    with xr.open_dataset(path) as cube:
        assert cube.time.attrs["units"] == "s"
        for k in range(7):
            one = cube.isel(network=k)
            again = simulate_rate_network(
                one.weights.to_numpy(), one.initial_state.to_numpy(), 20, 0.1, 2.0, one.input.to_numpy()
            )
            np.testing.assert_allclose(one.activity, again, atol=1e-6)


def test_network_k_depends_on_seed_and_k_alone(tmp_path, few_at_a_time):
    with xr.open_dataset(build_dataset(small(tmp_path / "a", burn_in=3))) as few:
        for options in ({"num_networks": 12}, {"engine": "torchsde"}):
            with xr.open_dataset(build_dataset(small(tmp_path / str(options), burn_in=3, **options))) as other:
                same = other.isel(network=slice(7))
                np.testing.assert_array_equal(few.weights, same.weights)
                np.testing.assert_allclose(few.activity, same.activity, atol=2e-6)
        with xr.open_dataset(build_dataset(small(tmp_path / "b", burn_in=3, seed=1))) as other:
            assert not np.allclose(few.weights, other.weights)


def variables(path):
    with xr.open_dataset(path) as cube:
        return {name: cube[name].to_numpy() for name in cube.variables}


def test_an_interrupted_build_resumes_to_the_same_cube(tmp_path, few_at_a_time, monkeypatch):
    whole = variables(build_dataset(small(tmp_path / "whole")))
    write, calls = CubeWriter.write, []

    def interrupted(self, first, arrays):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(first)
        write(self, first, arrays)

    monkeypatch.setattr(CubeWriter, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build_dataset(small(tmp_path / "cut"))
    assert not (tmp_path / "cut" / "cube.nc").exists()
    with pytest.raises(ValueError, match="3 of 7 networks are not written yet"):
        validate_cube(tmp_path / "cut" / "cube.nc.partial")
    resumed = []
    monkeypatch.setattr(CubeWriter, "write", lambda self, first, a: (resumed.append(first), write(self, first, a)))
    again = variables(build_dataset(small(tmp_path / "cut")))
    assert calls == [0, 2] and resumed == [4, 6]
    assert whole.keys() == again.keys()
    for name, values in whole.items():
        np.testing.assert_array_equal(values, again[name], err_msg=name)


@pytest.mark.slow
def test_kill_9_loses_no_finished_block(tmp_path):
    options = ["--num-networks", "600", "--N", "40", "--num-trials", "20", "--T", "60", "--seed", "5"]
    script = (
        "import sys; from neurosde.datasets import build_dataset as m; m.BLOCK_BYTES = 2**21; "
        "from neurosde.cli import main; sys.exit(main(sys.argv[1:]))"
    )

    def start(folder):
        command = [sys.executable, "-c", script, "build-dataset", "--out-dir", str(folder), *options]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    assert start(tmp_path / "whole").wait() == 0
    rng = np.random.default_rng(0)
    partial, final = tmp_path / "cut" / "cube.nc.partial", tmp_path / "cut" / "cube.nc"
    done, kills = 0, 0
    while not final.exists() and kills < 8:
        process = start(tmp_path / "cut")
        while not partial.exists() and process.poll() is None:
            time.sleep(0.01)
        time.sleep(rng.uniform(0.0, 0.5))
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
        if partial.exists():
            with xr.open_dataset(partial) as cube:
                now = int((cube.complete == 1).sum()) if "complete" in cube else 0
            assert now >= done
            done = now
    assert start(tmp_path / "cut").wait() == 0
    whole, again = variables(tmp_path / "whole" / "cube.nc"), variables(final)
    for name, values in whole.items():
        np.testing.assert_array_equal(values, again[name], err_msg=name)
    assert not partial.exists()


def test_the_command_builds_resumes_and_refuses(tmp_path, capsys):
    command = ["build_dataset", "--out_dir", str(tmp_path), "--num_networks=3", "--N", "5", "--T", "10", "--g", "0.9"]
    assert main(command) == 0
    assert "3 networks x 10 trials" in capsys.readouterr().out
    assert main(command) == 0
    assert "complete already" in capsys.readouterr().out
    assert main([*command, "--ensemble", "dale"]) == 2
    assert "made with another configuration" in capsys.readouterr().err
    assert main([*command, "--density", "0.1"]) == 2
    assert "the gaussian ensemble has the parameters" in capsys.readouterr().err
    with xr.open_dataset(tmp_path / "cube.nc") as cube:
        assert json.loads(cube.attrs["config"])["ensemble"]["gain"] == 0.9


def test_gain_mixtures_from_the_command_line(tmp_path):
    base = ["build-dataset", "--out-dir", str(tmp_path), "--num-networks", "20", "--N", "4", "--T", "3"]
    assert main([*base, "--ensemble", "dale", "--g", "0.5", "--g-high", "1.5"]) == 0
    with xr.open_dataset(tmp_path / "cube.nc") as cube:
        assert 0.5 <= float(cube.gain.min()) < float(cube.gain.max()) <= 1.5
        assert set(np.unique(cube.cell_type)) == {-1, 1}


def test_runs_as_a_module(tmp_path):
    command = [sys.executable, "-m", "neurosde.datasets.build_dataset", "--out-dir", str(tmp_path)]
    done = subprocess.run([*command, "--num-networks", "2", "--N", "3", "--T", "4"], capture_output=True, text=True)
    assert done.returncode == 0 and "2 networks" in done.stdout and done.stderr == ""
    wrong = subprocess.run([*command, "--N", "0"], capture_output=True, text=True)
    assert wrong.returncode == 2 and wrong.stderr == "error: N must be at least 1; got 0.\n"
    unknown = subprocess.run([*command, "--nn", "0"], capture_output=True, text=True)
    assert unknown.returncode == 2 and unknown.stderr.count("\n") == 1


def test_a_full_disk_is_one_line_and_leaves_no_cube(tmp_path, capsys, monkeypatch):
    class Usage:
        free = 1000

    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage)
    assert main(["build-dataset", "--out-dir", str(tmp_path), "--num-networks", "5"]) == 2
    error = capsys.readouterr().err
    assert "cube.nc needs" in error and "are free" in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk takes root")
def test_a_disk_that_fills_up(tmp_path, capsys, monkeypatch):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("this machine does not allow mounts")
    try:
        monkeypatch.setattr("neurosde.datasets.store.check_space", lambda *_: None)
        assert main(["build-dataset", "--out-dir", str(disk), "--num-networks", "200", "--N", "20"]) == 2
        error = capsys.readouterr().err
        assert "could not write" in error and "no space left" in error and error.count("\n") == 1
        assert not (disk / "cube.nc").exists()
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_second_writer_is_kept_out(tmp_path):
    """While one process writes, another neither touches its file nor waits; afterwards it finds the cube complete."""
    config = small(tmp_path)
    sizes = {"network": 7, "trial": 2, "time": 20, "neuron": 6, "post": 6, "pre": 6}
    options = {"dt": 0.1, "time_unit": "tau", "seed": 0, "title": "t", "summary": "s", "voltage": False}
    command = [sys.executable, "-m", "neurosde", "build-dataset", "--out-dir", str(tmp_path)]
    command += ["--num-networks", "7", "--N", "6", "--num-trials", "2", "--T", "20"]
    with CubeWriter(config.path, config.contents(), sizes, **options) as writer:
        writer.write(0, module.simulate_block(config, 0, 7))
        inode = writer.partial.stat().st_ino
        other = subprocess.run(command, capture_output=True, text=True)
        assert other.returncode == 2 and other.stderr.count("\n") == 1
        assert "is being built by another process" in other.stderr
        assert writer.partial.stat().st_ino == inode
        writer.finish()
    validate_cube(config.path)
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0 and "complete already" in again.stdout


def test_a_partial_that_someone_reads_is_not_thrown_away(tmp_path, few_at_a_time, monkeypatch):
    write = CubeWriter.write

    def interrupted(self, first, arrays):
        if first:
            raise KeyboardInterrupt
        write(self, first, arrays)

    monkeypatch.setattr(CubeWriter, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build_dataset(small(tmp_path))
    monkeypatch.setattr(CubeWriter, "write", write)
    partial = tmp_path / "cube.nc.partial"
    script = f"import netCDF4, sys; f = netCDF4.Dataset({str(partial)!r}); print('open', flush=True); sys.stdin.read()"
    reader = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with reader:
        assert reader.stdout.readline() == b"open\n"
        inode = partial.stat().st_ino
        with pytest.raises(OSError, match="open in another process"):
            build_dataset(small(tmp_path))
        assert partial.stat().st_ino == inode
        reader.stdin.close()
        reader.wait()
    validate_cube(build_dataset(small(tmp_path)))


def test_only_whole_cubes_are_finished(tmp_path):
    config = small(tmp_path)
    sizes = {"network": 7, "trial": 2, "time": 20, "neuron": 6, "post": 6, "pre": 6}
    options = {"dt": 0.1, "time_unit": "tau", "seed": 0, "title": "t", "summary": "s", "voltage": False}
    with (
        CubeWriter(config.path, config.contents(), sizes, **options) as writer,
        pytest.raises(ValueError, match="7 networks of .* are not written yet"),
    ):
        writer.finish()
    assert not config.path.exists()
    (tmp_path / "cube.nc.partial").rename(config.path)
    with pytest.raises(ValueError, match="not a whole cube; delete it"):
        build_dataset(config)
    config.path.write_bytes(config.path.read_bytes()[:2000])
    with pytest.raises(ValueError, match="not a readable netCDF file"):
        build_dataset(config)


def test_a_dataset_larger_than_any_disk_is_refused(tmp_path, capsys):
    size = ["--num-networks", "1000000000", "--num-trials", "100000", "--T", "100000", "--N", "5000"]
    assert main(["build-dataset", "--out-dir", str(tmp_path), *size]) == 2
    assert "are free" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_validate_names_everything_that_is_missing(tmp_path):
    path = build_dataset(small(tmp_path))
    with xr.open_dataset(path) as cube:
        validate_cube(cube)
        broken = cube.drop_vars(["gain", "neuron"]).rename(trial="repeat")
        del broken.attrs["config"]
        with pytest.raises(ValueError) as caught:
            validate_cube(broken)
    for part in (
        "variable gain(network) is missing",
        "coordinate neuron",
        "attribute config",
        "activity must have dims",
    ):
        assert part in str(caught.value)


def test_a_cube_cut_short_is_refused(tmp_path):
    path = build_dataset(small(tmp_path, num_networks=40))
    data = path.read_bytes()
    for share in (0.02, 0.5, 0.95):
        path.write_bytes(data[: int(len(data) * share)])
        with pytest.raises(ValueError, match="not a readable netCDF file"):
            validate_cube(path)


def test_half_laid_out_files_are_started_anew(tmp_path):
    tmp_path.joinpath("cube.nc.partial").write_bytes(b"\x89HDF\r\n\x1a\n half")
    validate_cube(build_dataset(small(tmp_path)))
    assert (tmp_path / "cube.nc.partial.broken").read_bytes().endswith(b"half")  # set aside, not deleted


def test_loader_feeds_torch(tmp_path):
    path = build_dataset(small(tmp_path))
    batches = list(loader(path, ("weights", "activity", "gain"), batch_size=3))
    assert [len(batch["weights"]) for batch in batches] == [3, 3, 1]
    assert batches[0]["activity"].shape == (3, 2, 20, 6)
    with xr.open_dataset(path) as cube:
        np.testing.assert_array_equal(torch.cat([batch["activity"] for batch in batches]), cube.activity)
        shuffled = torch.cat([batch["weights"] for batch in loader(path, batch_size=3, shuffle=True, seed=1)])
        again = torch.cat([batch["weights"] for batch in loader(path, batch_size=3, shuffle=True, seed=1)])
        assert torch.equal(shuffled, again)
        assert not np.array_equal(shuffled, cube.weights)
        np.testing.assert_array_equal(np.sort(shuffled, 0), np.sort(cube.weights, 0))


@pytest.mark.slow
def test_loader_in_forked_processes(tmp_path):
    path = build_dataset(small(tmp_path, num_networks=200))
    with xr.open_dataset(path) as cube:
        expected = cube.activity.to_numpy()
    dataset = CubeDataset(path)
    assert len(dataset[0]["weights"]) == 6  # a handle is open in this process when the workers are forked
    batches = torch.utils.data.DataLoader(dataset, batch_size=2, num_workers=2, multiprocessing_context="fork")
    np.testing.assert_array_equal(torch.cat([batch["activity"] for batch in batches]), expected)
    assert torch.equal(dataset[3]["activity"], torch.as_tensor(expected[3]))


@pytest.mark.slow
def test_loader_in_spawned_processes(tmp_path):
    path = build_dataset(small(tmp_path))
    with xr.open_dataset(path) as cube:  # whatever the parent has open does not matter to them
        batches = loader(path, batch_size=2, num_workers=2)
        np.testing.assert_array_equal(torch.cat([batch["activity"] for batch in batches]), cube.activity)


def test_bad_loaders_are_named(tmp_path):
    path = build_dataset(small(tmp_path))
    with pytest.raises(ValueError, match=r"got \['voltage'\]"):
        loader(path, ("voltage",))
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        loader(path, batch_size=0)
    with pytest.raises(FileNotFoundError, match="no such file"):
        loader(tmp_path / "none.nc")
    with pytest.raises(ValueError, match="is a folder; name a file in it"):
        open_netcdf(tmp_path)
    with pytest.raises(IndexError):
        CubeDataset(path)[7]


def test_trials_of_one_network():
    W = Gaussian(1.2).sample(5, torch.Generator().manual_seed(0)).weights
    x, h = generate_activity_trials(W, 4, 30, 0.1, 1.0, noise_std=0.2, burn_in=10, generator=0, return_h=True)
    assert x.shape == h.shape == (4, 30, 5)
    torch.testing.assert_close(x, h.tanh())
    assert len({float(v) for v in x[:, 0, 0]}) == 4
    longer = generate_activity_trials(W, 4, 40, 0.1, 1.0, noise_std=0.2, generator=0)
    torch.testing.assert_close(longer[:, 10:], x)
    with pytest.raises(ValueError, match="W must be square"):
        generate_activity_trials(W[:3], 4, 30, 0.1)
    with pytest.raises(ValueError, match="num_trials must be at least 1"):
        generate_activity_trials(W, 0, 30, 0.1)
