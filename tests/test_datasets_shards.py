"""Shards: the same cube whatever made it, however often it was interrupted, and nothing wrong read as right."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time

import netCDF4
import numpy as np
import pytest
import xarray as xr

from neurosde.cli import main
from neurosde.datasets import build_dataset as module
from neurosde.datasets import loader, validate_cube
from neurosde.datasets.build_dataset import (
    DatasetConfig,
    build_dataset,
    make_shard,
    network_seeds,
    network_split,
    planned_shards,
)
from neurosde.datasets.execution import Execution
from neurosde.datasets.manifest import digest_of, read_manifest
from neurosde.datasets.shards import Shard, open_cube, shards_of
from neurosde.datasets.store import CubeFile, lock_file
from neurosde.datasets.verify import verify_cube

NAMES = ["network=000000-000002.nc", "network=000003-000005.nc", "network=000006-000006.nc"]


def small(folder, **options):
    defaults = {"num_networks": 7, "N": 6, "num_trials": 2, "T": 20, "shard_size": 3, "engine": "torch"}
    return DatasetConfig(out_dir=folder, **defaults | options)


def contents(path):
    with open_cube(path) as cube:
        return {name: cube[name].to_numpy() for name in cube.variables}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, values in one.items():
        assert values.dtype == other[name].dtype and values.tobytes() == other[name].tobytes(), name


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return contents(build_dataset(small(tmp_path_factory.mktemp("whole"), shard_size=None)))


@pytest.fixture
def folder(tmp_path):
    return build_dataset(small(tmp_path / "cube"))


def test_each_shard_is_a_whole_cube_of_its_networks(folder):
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", *NAMES]
    assert shards_of(folder) == [Shard(folder / name, 3 * i, (3, 3, 1)[i]) for i, name in enumerate(NAMES)]
    assert shards_of(folder / "manifest.json") == shards_of(folder)
    assert shards_of(folder / NAMES[1]) == [Shard(folder / NAMES[1], 3, 3)]
    for shard in shards_of(folder):
        validate_cube(shard.path)
        with netCDF4.Dataset(shard.path) as file:
            np.testing.assert_array_equal(file["network"][:], np.arange(shard.first, shard.first + shard.count))
            assert all(variable.chunking() == "contiguous" for variable in file.variables.values())
    validate_cube(folder)
    manifest = read_manifest(folder / "manifest.json")
    assert [record.sha256 for record in manifest.shards.values()] == [digest_of(folder / name) for name in NAMES]
    assert manifest.config["num_networks"] == 7


@pytest.mark.parametrize("size", [1, 3, 7, 100])
def test_the_same_bytes_whatever_the_shards_and_blocks(tmp_path, whole, size, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_BYTES", 2 * 4 * 2 * 20 * 6)  # two networks a block
    assert_same(whole, contents(build_dataset(small(tmp_path, shard_size=size))))


def test_shards_open_as_one_lazy_dataset(folder, tmp_path):
    with xr.open_dataset(build_dataset(small(tmp_path / "one", shard_size=None))) as one, open_cube(folder) as many:
        for index in (
            {"network": 4},
            {"network": -1},
            {"network": slice(1, 6)},
            {"network": slice(6, None, -2)},
            {"network": [5, 0, 0, 6], "trial": 1},
            {"network": []},
            {"network": [2, 3], "time": [1, 2], "neuron": slice(None, None, 2)},
        ):
            xr.testing.assert_equal(one.isel(index).load(), many.isel(index).load())
        assert many.sizes == one.sizes and many.activity.attrs == one.activity.attrs
        (folder / NAMES[2]).unlink()  # not opened until it is asked for, but then missed
        assert float(many.gain[0]) == 1.5
    with pytest.raises(ValueError, match=rf"{NAMES[2]} is in the manifest but missing"):
        open_cube(folder)


def test_large_datasets_are_sharded_by_themselves(tmp_path, monkeypatch):
    assert small(tmp_path, num_networks=1_000, N=50, shard_size=None).path == tmp_path / "cube.nc"
    large = DatasetConfig(out_dir=tmp_path, num_networks=100_000)
    assert large.path == tmp_path
    per_network = 4 * 10 * 100 * 50  # bytes of activity
    assert 0.8 < large.networks_per_shard * per_network / 2**28 <= 1
    monkeypatch.setattr(module, "SINGLE_BYTES", 1000)
    monkeypatch.setattr(module, "SHARD_BYTES", 8_000)
    assert len(shards_of(build_dataset(small(tmp_path / "s", shard_size=None)))) == 2


def test_a_folder_whose_shards_are_not_right_is_refused(folder):
    def refused(message):
        with pytest.raises(ValueError, match=message):
            shards_of(folder)

    manifest = (folder / "manifest.json").read_text()
    (folder / "network=7.nc").touch()
    refused(r"network=7\.nc must be named like network=000000-000099\.nc")
    (folder / "network=7.nc").rename(folder / "network=000005-000006.nc")
    refused("hold the same networks")
    (folder / "network=000005-000006.nc").rename(folder / "network=000007-000009.nc")
    refused(r"000007-000009\.nc is not in the manifest")
    (folder / "manifest.json").unlink()
    refused(r"000006-000006\.nc must hold 3 networks like the first; got 1")
    (folder / "network=000007-000009.nc").unlink()
    assert len(shards_of(folder)) == 3  # a manifest is no need
    (folder / NAMES[2]).rename(folder / "last")
    refused(r"must hold 7 networks, got 6 \(to network=000003-000005\.nc\)")
    (folder / "last").rename(folder / NAMES[2])
    (folder / NAMES[1]).rename(folder / "middle")
    refused(r"network=000003-000005\.nc is missing")
    (folder / "middle").rename(folder / NAMES[1])
    (folder / "manifest.json").write_text(manifest[:-100])
    refused(r"manifest\.json is not a whole manifest .* delete it")
    (folder / "manifest.json").write_text(manifest.replace('"T": 20', '"T": 21'))
    refused(r"manifest\.json is not a whole manifest .* configuration")
    (folder / "manifest.json").write_text(manifest)
    data = (folder / NAMES[1]).read_bytes()
    (folder / NAMES[1]).write_bytes(data[:-1])
    refused(rf"000005\.nc must have {len(data)} bytes as in the manifest, got {len(data) - 1}")
    (folder / NAMES[1]).write_bytes(data)
    (folder / "cube.nc").touch()
    refused(r"holds cube\.nc and shards")
    with pytest.raises(FileNotFoundError, match="neither cube.nc nor shards"):
        shards_of(folder.parent)


def test_a_shard_under_a_wrong_name_is_not_read(folder):
    (folder / "manifest.json").unlink()
    (folder / NAMES[0]).rename(folder / "first")
    (folder / NAMES[1]).rename(folder / NAMES[0])
    (folder / "first").rename(folder / NAMES[1])
    with pytest.raises(ValueError, match=rf"{NAMES[0]} does not hold the networks of its name"):
        open_cube(folder)
    with pytest.raises(ValueError, match=rf"{NAMES[0]} does not hold all networks of its name"):
        build_dataset(small(folder))


def test_verify_names_every_bad_file(folder, capsys):
    command = ["build-dataset", "--out-dir", str(folder), "--verify"]
    assert main(command) == 0
    assert "3 shards" in capsys.readouterr().out

    def bad(*messages):
        assert main(command) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and all(message in error for message in messages), error

    data = [(folder / name).read_bytes() for name in NAMES]
    flipped = bytearray(data[1])
    flipped[len(flipped) // 2] ^= 1
    (folder / NAMES[1]).write_bytes(flipped)
    (folder / NAMES[2]).write_bytes(data[2][:-5])
    bad(f"{NAMES[1]} has another checksum", f"{NAMES[2]} has {len(data[2]) - 5} bytes, not the {len(data[2])}")
    (folder / NAMES[1]).unlink()
    (folder / NAMES[2]).write_bytes(data[2])
    bad(f"{NAMES[1]} is missing")
    assert build_dataset(small(folder)) == folder  # makes it again
    assert main(command) == 0
    (folder / "manifest.json").unlink()
    bad("manifest.json is missing")
    assert main([*command, "--seed", "1"]) == 2
    assert "--verify takes --out-dir only; got seed" in capsys.readouterr().err


def edit_attribute(path, name, value):
    with netCDF4.Dataset(path, "a") as file:
        file.setncattr(name, value)


@pytest.mark.parametrize(("name", "value", "match"), [
    ("schema_version", "2", "have schema_version 1, got 2"),
    ("config", "{}", "have their configuration"),
])  # fmt: skip
def test_shards_that_do_not_belong_together_are_not_read(folder, name, value, match):
    edit_attribute(folder / NAMES[1], name, value)
    (folder / "manifest.json").unlink()
    with open_cube(folder) as cube, pytest.raises(ValueError, match=rf"{NAMES[1]} must be like .* {match}"):
        cube.load()
    with pytest.raises(ValueError, match=f"{NAMES[1]} (is not a whole cube: schema version|must be like)"):
        validate_cube(folder)
    with pytest.raises(ValueError, match=NAMES[1]):
        loader(folder)


def test_shards_of_another_configuration_are_not_mixed_in(folder, tmp_path):
    before = {name: digest_of(folder / name) for name in NAMES}
    with pytest.raises(ValueError, match=r"another configuration \(seed = 0 there, 1 now\)"):
        build_dataset(small(folder, seed=1))
    (folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match=rf"{NAMES[0]} was made with another configuration \(seed = 0 there, 1 now"):
        build_dataset(small(folder, seed=1))
    with pytest.raises(ValueError, match=rf"{NAMES[0]} is not one of the shards of 2 networks"):
        build_dataset(small(folder, shard_size=2))
    with pytest.raises(ValueError, match=r"network=0.* is there already; choose its --shard-size"):
        build_dataset(small(folder, shard_size=None))
    assert before == {name: digest_of(folder / name) for name in NAMES}
    single = build_dataset(small(tmp_path / "single", shard_size=None))
    with pytest.raises(ValueError, match=r"cube\.nc is there already"):
        build_dataset(small(single.parent))
    edit_attribute(folder / NAMES[1], "schema_version", "0")
    with pytest.raises(ValueError, match=rf"{NAMES[1]} must have schema version 1, got 0"):
        build_dataset(small(folder))


def test_half_a_shard_is_named(folder):
    (folder / "manifest.json").unlink()
    half = (folder / NAMES[1]).read_bytes()[:5000]
    (folder / NAMES[1]).write_bytes(half)
    with pytest.raises(ValueError, match=rf"{NAMES[1]} is not a readable netCDF file .* Delete it and run"):
        build_dataset(small(folder))
    assert (folder / NAMES[1]).read_bytes() == half


def test_the_manifest_can_be_made_again(folder):
    records = read_manifest(folder / "manifest.json").shards
    inodes = [(folder / name).stat().st_ino for name in NAMES]
    (folder / "manifest.json").unlink()
    build_dataset(small(folder))
    assert read_manifest(folder / "manifest.json").shards == records
    assert inodes == [(folder / name).stat().st_ino for name in NAMES]


def test_what_dead_writers_left_is_removed_and_what_live_ones_hold_is_not(tmp_path, whole):
    config = small(tmp_path)
    shard = planned_shards(config)[1]
    tmp_path.mkdir(exist_ok=True)
    leftover = tmp_path / f".{shard.path.name}.12345.part"
    leftover.write_bytes(b"half")
    with lock_file(shard.path) as mine:
        assert mine
        leftover.write_bytes(b"being written")
        assert make_shard(config, shard) is None
        assert leftover.read_bytes() == b"being written" and not shard.path.exists()
    leftover.write_bytes(b"half")
    shard.path.with_name(f".{shard.path.name}.lock").touch()  # as a killed process leaves it
    other = lock_file(tmp_path / NAMES[0])
    other.__enter__()
    leave = threading.Timer(0.3, other.__exit__, (None, None, None))
    leave.start()
    build_dataset(config)  # waits for the first shard's holder, which leaves without having made it
    assert sorted(path.name for path in tmp_path.iterdir()) == ["manifest.json", *NAMES]
    assert_same(whole, contents(tmp_path))
    leave.join()


def test_workers_need_shards(tmp_path, capsys):
    command = ["build-dataset", "--out-dir", str(tmp_path), "--num-networks", "20", "--N", "4", "--workers", "2"]
    assert main(command) == 2
    assert "cube.nc is a single file; give --shard-size, such as 2" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"Add --executor dask"):
        Execution(scheduler="tcp://nowhere:1")
    with pytest.raises(ValueError, match=r"has its own workers"):
        Execution(scheduler="tcp://nowhere:1", executor="dask", workers=2)
    with pytest.raises(ValueError, match="workers must be at least 1"):
        Execution(workers=0)
    with pytest.raises(ValueError, match="shard_size must be at least 1"):
        small(tmp_path, shard_size=0)


def test_dask_missing_says_how_to_get_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "distributed", None)
    command = ["build-dataset", "--out-dir", str(tmp_path), "--num-networks", "2", "--shard-size", "1"]
    assert main([*command, "--executor", "dask"]) == 2
    assert "pip install 'neurosde[dask]'" in capsys.readouterr().err


def test_networks_are_split_by_seed_and_index_alone(tmp_path, whole):
    assert_same(whole, contents(build_dataset(small(tmp_path / "a", shard_size=2))))
    more = contents(build_dataset(small(tmp_path / "b", num_networks=40)))["split"]
    np.testing.assert_array_equal(more[:7], whole["split"])
    np.testing.assert_array_equal(more, [network_split(0, k, (0.8, 0.1, 0.1)) for k in range(40)])
    many = np.array([network_split(3, k, (0.5, 0.2, 0.3)) for k in range(4000)])
    for flag, share in enumerate((0.5, 0.2, 0.3)):
        assert abs((many == flag).mean() - share) < 4 * np.sqrt(share * (1 - share) / 4000)
    assert {network_split(0, k, (0, 0, 1)) for k in range(50)} == {2}
    words = np.random.SeedSequence(5, spawn_key=(2,)).generate_state(3, np.uint64)  # a third word changes no other
    assert network_seeds(5, 2) == tuple(int(word) >> 1 for word in words[:2])
    with xr.open_dataset(tmp_path / "a" / "network=000000-000001.nc") as cube:
        assert cube.split.attrs["flag_meanings"] == "train validation test"
        validate_cube(cube.drop_vars("split"))  # older cubes have none
    with pytest.raises(ValueError, match=r"three shares that add up to 1.*got \(0.5, 0.5\)"):
        small(tmp_path, split=(0.5, 0.5))


def test_errors_of_the_background_reach_the_user(tmp_path, monkeypatch, capsys):
    def failing(descriptor):
        raise OSError(errno.EIO, "the disk is gone")

    monkeypatch.setattr(os, "fdatasync", failing)
    for size in ([], ["--shard-size", "2"]):
        assert main(["build-dataset", "--out-dir", str(tmp_path), "--num-networks", "4", "--N", "4", *size]) == 2
        error = capsys.readouterr().err
        assert "could not write" in error and error.count("\n") == 1
        assert [path.name for path in tmp_path.glob("network*")] == [] and not (tmp_path / "cube.nc").exists()
        for path in tmp_path.iterdir():
            path.unlink()


@pytest.fixture
def disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "x", folder]).returncode:
        pytest.skip("mounting a small disk takes root, and a machine that allows it")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_keeps_what_is_finished(disk, monkeypatch, capsys):
    monkeypatch.setattr(module, "check_space", lambda *_: None)
    command = ["build-dataset", "--out-dir", str(disk), "--num-networks", "20", "--N", "20", "--shard-size", "3"]
    command += ["--engine", "torch"]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "network=" in error and "no space is left" in error and error.count("\n") == 1
    finished = sorted(disk.iterdir())
    assert finished and all(path.name.startswith("network=") for path in finished)
    inodes = [path.stat().st_ino for path in finished]
    subprocess.run(["mount", "-o", "remount,size=50m", disk], check=True)
    assert main(command) == 0
    assert [path.stat().st_ino for path in finished] == inodes
    verify_cube(disk)


def test_a_read_only_disk_is_named(disk, capsys):
    command = ["build-dataset", "--out-dir", str(disk), "--num-networks", "2", "--N", "4", "--T", "5"]
    command += ["--shard-size", "1", "--engine", "torch"]
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "network=000000-000000.nc" in error and "read-only" in error and error.count("\n") == 1


SERVER = """
import os, sys
import torch
from neurosde.datasets import build_dataset as m
torch.set_num_threads(1)
config = m.DatasetConfig(out_dir=sys.argv[1], num_networks=60, N=10, num_trials=2, T=30, shard_size=2, engine="torch")
m.BLOCK_BYTES = 4 * 2 * 30 * 10  # a network a block
for line in sys.stdin:
    child = os.fork()
    if not child:
        m.build_dataset(config)
        os._exit(0)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


@pytest.mark.slow
def test_kill_9_loses_no_finished_shard(tmp_path):
    """Thirty kills at random moments; each run is forked from a process that has imported everything."""
    cut = tmp_path / "cut"
    expected = small(tmp_path / "whole", num_networks=60, N=10, T=30, shard_size=None)
    rng = np.random.default_rng(0)
    done, kills, leftovers = {}, 0, 0
    command = [sys.executable, "-c", SERVER, str(cut)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:

        def start():
            server.stdin.write("\n")
            server.stdin.flush()
            return int(server.stdout.readline())

        start()
        started = time.monotonic()
        assert server.stdout.readline() == "0\n"
        duration = time.monotonic() - started
        assert_same(contents(build_dataset(expected)), contents(cut))
        while kills < 30:
            if (cut / "manifest.json").exists():
                for path in cut.iterdir():
                    path.unlink()
                done = {}
            child = start()
            time.sleep(rng.uniform(0, duration / 3))
            os.kill(child, signal.SIGKILL)
            kills += server.stdout.readline() == "9\n"
            leftovers += bool(list(cut.glob(".network*")))
            now = {path.name: digest_of(path) for path in cut.glob("network=*.nc")}
            assert done.items() <= now.items()
            done = now
        start()
        assert server.stdout.readline() == "0\n"
        server.stdin.close()
    assert leftovers  # some kills did come in the midst of a shard
    assert not list(cut.glob(".*"))
    assert done.items() <= {path.name: digest_of(path) for path in cut.glob("network=*.nc")}.items()
    assert_same(contents(expected.path), contents(cut))
    verify_cube(cut)


@pytest.mark.slow
def test_processes_make_the_same_bytes(tmp_path, whole):
    assert_same(whole, contents(build_dataset(small(tmp_path), Execution(workers=2))))
    verify_cube(tmp_path)


SCRIPT = """
import os, sys, time
from pathlib import Path
from neurosde.datasets.execution import Execution, run_tasks
folder = Path(sys.argv[2])

def dies_twice(item):
    attempt = len(list(folder.glob(f"{item}.*")))
    (folder / f"{item}.{os.getpid()}").touch()
    if item == 1 and attempt < 2:
        os.kill(os.getpid(), 9)
    return item * 10

def dies(item):
    (folder / f"{item}.{os.getpid()}").touch()
    os.kill(os.getpid(), 9)

def sleeps(item):
    (folder / f"{item}.{os.getpid()}").touch()
    time.sleep(600)

if __name__ == "__main__":
    print(sorted(run_tasks(globals()[sys.argv[1]], range(3), Execution(workers=2))))
"""


def run_script(tmp_path, task):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    (tmp_path / "marks").mkdir()
    command = [sys.executable, str(script), task, str(tmp_path / "marks")]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_a_task_whose_worker_died_is_tried_again(tmp_path):
    out, error = run_script(tmp_path, "dies_twice").communicate()
    assert out == "[(0, 0), (1, 10), (2, 20)]\n", error


@pytest.mark.slow
def test_a_task_that_kills_its_workers_ends(tmp_path):
    process = run_script(tmp_path, "dies")
    _, error = process.communicate()
    assert process.returncode == 1 and "processes died 4 times while at" in error.splitlines()[-1]


@pytest.mark.slow
def test_workers_do_not_outlive_their_parent(tmp_path):
    with run_script(tmp_path, "sleeps") as process:
        while len(marks := list((tmp_path / "marks").iterdir())) < 2:
            time.sleep(0.1)
        process.kill()
        pids = [int(path.name.split(".")[1]) for path in marks]
        deadline = time.monotonic() + 60
        while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not any(alive(pid) for pid in pids)


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
def test_dask_makes_the_same_bytes_though_a_worker_is_killed(tmp_path):
    distributed = pytest.importorskip("distributed", reason="takes dask: pip install 'neurosde[dask]'")
    options = {"num_networks": 120, "N": 20, "num_trials": 4, "T": 60}
    expected = contents(build_dataset(small(tmp_path / "whole", shard_size=None, **options)))
    many = tmp_path / "many"
    killed = []
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, silence_logs=50
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        pids = list(client.run(os.getpid).values())

        def kill():
            while not list(many.glob("network=*.nc")):
                time.sleep(0.005)
            os.kill(pids[0], signal.SIGKILL)
            killed.append(len(list(many.glob("network=*.nc"))))

        killer = threading.Thread(target=kill)
        killer.start()
        address = Execution(executor="dask", scheduler=cluster.scheduler_address)
        build_dataset(small(many, shard_size=2, **options), address)
        killer.join()
    assert 0 < killed[0] < 60
    assert_same(expected, contents(many))
    verify_cube(many)
    assert not list(many.glob(".*"))


@pytest.mark.slow
def test_a_local_dask_cluster_makes_the_same_bytes(tmp_path, whole):
    pytest.importorskip("distributed", reason="takes dask: pip install 'neurosde[dask]'")
    assert_same(whole, contents(build_dataset(small(tmp_path), Execution(executor="dask", workers=2))))


def test_an_unreachable_scheduler_is_named(tmp_path):
    pytest.importorskip("distributed", reason="takes dask: pip install 'neurosde[dask]'")
    import dask

    with (  # distributed is imported before, so that its own settings are there, and stay
        dask.config.set({"distributed.comm.timeouts.connect": "1s"}),
        pytest.raises(OSError, match=r"no dask scheduler at tcp://127.0.0.1:9"),
    ):
        build_dataset(small(tmp_path), Execution(executor="dask", scheduler="tcp://127.0.0.1:9"))


def test_half_written_files_never_have_a_shards_name(tmp_path, monkeypatch):
    write = CubeFile.write

    def interrupted(self, start, arrays):
        write(self, start, arrays)
        assert json.loads(self.config)["num_networks"] == 7
        if self.path.name.startswith(f".{NAMES[1]}"):
            raise KeyboardInterrupt

    monkeypatch.setattr(CubeFile, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build_dataset(small(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == NAMES[:1]
