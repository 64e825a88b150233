"""Loaders: order, resuming, ranks, workers, splits, statistics and units, and what goes wrong with files."""

import shutil
import subprocess
import sys

import h5py
import netCDF4
import numpy as np
import pytest
import torch
import xarray as xr

from neurosde.datasets import CubeDataset, loader, loaders, reading
from neurosde.datasets.blocks import BlockShuffle, Order
from neurosde.datasets.build_dataset import DatasetConfig, build_dataset
from neurosde.datasets.ensembles import Dale
from neurosde.datasets.observation import Observation
from neurosde.datasets.observe_command import observe_cube
from neurosde.datasets.reading import CubeFiles
from neurosde.datasets.shards import shard_name, shards_of
from neurosde.likelihood import transition_statistics

SIZE = {"N": 6, "num_trials": 2, "T": 20}
NETWORKS = 23
EACH = 4 * (6 * 6 + 2 * 20 * 6)  # bytes of the weights and activity of a network
STREAM = 8 * EACH  # a memory that holds 8 networks
VARIABLES = ("weights", "activity", "network")


def build(folder, networks=NETWORKS, **options):
    return build_dataset(DatasetConfig(out_dir=folder, num_networks=networks, **SIZE | options))


def split_into(path, folder, counts):
    """The networks of a cube, as shards of these sizes, written by xarray and netCDF4 and not by the package."""
    folder.mkdir()
    with xr.open_dataset(path) as cube:
        first = 0
        for count in counts:
            part = cube.isel(network=slice(first, first + count))
            part.to_netcdf(folder / shard_name(first, count), encoding={name: {"_FillValue": None} for name in part})
            first += count
    return folder


@pytest.fixture(scope="module")
def cube(tmp_path_factory):
    return build(tmp_path_factory.mktemp("cube"), noise_std=0.3, input_std=0.2, tau=2.0)


@pytest.fixture(scope="module")
def sharded(cube, tmp_path_factory):
    return split_into(cube, tmp_path_factory.mktemp("shards") / "cube", (10, 10, 3))


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(loaders, "BLOCK_BYTES", 3 * EACH)


@pytest.fixture
def large_networks(monkeypatch):
    """Read networks one by one, as large ones are."""
    monkeypatch.setattr(reading, "LARGE_BYTES", 1)


def networks_of(batches):
    return [batch["network"].tolist() for batch in batches]


def same(one, other):
    one, other = list(one), list(other)
    return len(one) == len(other) and all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        for a, b in zip(one, other, strict=True)
    )


def copy_with(path, to, change):
    shutil.copy(path, to)
    with netCDF4.Dataset(to, "r+") as file:
        file.set_auto_maskandscale(False)
        change(file)
    return to


@pytest.mark.parametrize("memory", [2**30, STREAM])
def test_epochs_are_permutations_that_differ(cube, small_blocks, memory):
    batches = loader(cube, VARIABLES, batch_size=4, shuffle=True, memory=memory)
    assert batches.cube.in_memory == (memory == 2**30)
    first, second = networks_of(batches), networks_of(batches)
    other = networks_of(loader(cube, VARIABLES, batch_size=4, shuffle=True, seed=1, memory=memory))
    for epoch in (first, second, other):
        assert [len(batch) for batch in epoch] == [4, 4, 4, 4, 4, 3]
        assert sorted(sum(epoch, [])) == list(range(NETWORKS))
    assert first != second and first != other
    batches.set_epoch(0)
    assert networks_of(batches) == first
    plain = loader(cube, VARIABLES, batch_size=4, memory=memory)
    assert sum(networks_of(plain), []) == list(range(NETWORKS))


@pytest.mark.parametrize("memory", [2**30, STREAM])
@pytest.mark.parametrize("source", ["cube", "sharded"])
def test_batches_are_what_the_cube_holds(request, small_blocks, source, memory):
    path = request.getfixturevalue(source)
    with xr.open_dataset(request.getfixturevalue("cube")) as there:
        for batch in loader(path, (*VARIABLES, "observed", "gain"), batch_size=4, shuffle=True, memory=memory):
            chosen = there.isel(network=batch["network"].numpy())
            for name, values in batch.items():
                np.testing.assert_array_equal(values, chosen[name], err_msg=name)
                assert values.numpy().dtype == chosen[name].dtype


def test_the_path_does_not_change_the_batches(cube, sharded, small_blocks, monkeypatch):
    """One file or shards, in memory or streamed, window by window or network by network: one order."""
    monkeypatch.setattr(loaders, "WINDOW_BYTES", STREAM)
    options = {"batch_size": 4, "shuffle": True, "seed": 3}
    expected = list(loader(cube, VARIABLES, memory=2**30, **options))
    assert same(loader(cube, VARIABLES, memory=STREAM, **options), expected)
    assert same(loader(sharded, VARIABLES, memory=STREAM, **options), expected)
    assert same(loader(sharded, VARIABLES, memory=2**30, **options), expected)
    monkeypatch.setattr(reading, "LARGE_BYTES", 1)
    assert same(loader(sharded, VARIABLES, memory=STREAM, **options), expected)
    monkeypatch.setattr(reading, "MOST_OPEN", 1)
    assert same(loader(sharded, VARIABLES, memory=STREAM, **options), expected)


def test_blocks_are_read_in_whole_pieces(cube, small_blocks, monkeypatch):
    """A window is read at once: two blocks of 3 networks and parts of two others, in at most 4 pieces."""
    reads = []
    fill = reading._File.fill
    monkeypatch.setattr(
        reading._File, "fill", lambda self, start, rest: (reads.append(len(rest)), fill(self, start, rest))[1]
    )
    weights = 4 * 6 * 6
    monkeypatch.setattr(loaders, "BLOCK_BYTES", 3 * weights)
    batches = loader(cube, ("weights",), batch_size=4, shuffle=True, memory=8 * weights)
    reads.clear()
    assert sum(len(batch["weights"]) for batch in batches) == NETWORKS
    assert sum(reads) == NETWORKS * weights  # each byte once
    assert len(reads) <= 3 * 4  # windows of 8, 8 and 7


def test_shuffling_mixes_blocks():
    """Neighbours of the cube are no longer neighbours, beyond what chance leaves together."""
    order = Order(1000, batch_size=10, block=10, window=10, shuffle=True)
    steps = np.diff(order.positions(0))
    assert np.mean(steps == 1) < 0.03  # 1/100 on average within a window of 100
    assert len(np.unique(order.positions(0)[:100] // 10)) == 10


@pytest.mark.slow
@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_change_nothing(sharded, small_blocks, large_networks, context):
    options = {"batch_size": 4, "shuffle": True, "memory": STREAM}
    alone = loader(sharded, VARIABLES, **options)
    next(iter(alone))  # its files are open when workers are forked
    helped = loader(sharded, VARIABLES, num_workers=2, context=context, **options)
    assert same(helped, alone)
    assert same(helped, alone)  # the second epoch
    compressed = loader(sharded, VARIABLES, num_workers=2, context=context, **options)
    assert networks_of(compressed)


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_ranks_share_the_networks(cube, small_blocks, shuffle, world_size):
    for epoch in range(2):
        shares = []
        for rank in range(world_size):
            batches = loader(
                cube, VARIABLES, batch_size=4, shuffle=shuffle, memory=STREAM, rank=rank, world_size=world_size
            )
            batches.set_epoch(epoch)
            shares.append(sum(networks_of(batches), []))
            assert len(batches) == -(-len(shares[-1]) // 4)
        assert {len(share) for share in shares} == {NETWORKS // world_size}
        union = set().union(*shares)
        assert len(union) == sum(map(len, shares))  # disjoint
        assert len(set(range(NETWORKS)) - union) == NETWORKS % world_size


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("given", [1, 3, 5, 6])
def test_resuming_gives_the_rest(cube, small_blocks, large_networks, monkeypatch, given, workers):
    def make():
        return loader(cube, VARIABLES, batch_size=4, shuffle=True, memory=STREAM, num_workers=workers, context="fork")

    whole = make()
    whole.set_epoch(7)
    expected = list(whole) + list(whole)
    cut = make()
    cut.set_epoch(7)
    for batch, _ in zip(cut, range(given), strict=False):
        state = cut.state_dict() if batch is not None else None
        if cut._given == given:
            break
    assert state["batch"] == given % 6 and state["epoch"] == 7 + given // 6
    reads = []
    fill = reading._File.fill
    monkeypatch.setattr(
        reading._File, "fill", lambda self, start, rest: (reads.append(len(rest)), fill(self, start, rest))[1]
    )
    resumed = make()
    resumed.load_state_dict(state)
    resumed.set_epoch(state["epoch"])  # as training loops do
    reads.clear()
    rest = list(resumed)
    assert same(rest, expected[given : 12 if given == 6 else 6])
    if not workers:
        assert sum(reads) == sum(len(batch["weights"]) for batch in rest) * (EACH + 8)  # nothing of what was given
    assert same(resumed, expected[6:]) if given < 6 else True


@pytest.mark.parametrize("memory", [2**30, STREAM])
def test_a_small_last_batch_can_be_left_out(cube, small_blocks, memory):
    options = {"batch_size": 4, "shuffle": True, "memory": memory}
    every, batches = loader(cube, VARIABLES, **options), loader(cube, VARIABLES, drop_last=True, **options)
    assert len(every) == 6 and len(batches) == 5
    for _ in range(2):
        assert same(batches, list(every)[:5])
    assert batches.epoch == 2 and batches.state_dict()["batch"] == 0
    with pytest.raises(ValueError, match="at least one whole batch; got 23 networks for batches of 24"):
        loader(cube, batch_size=24, drop_last=True)


def test_memory_is_pinned_where_it_is_asked_for(cube):
    assert loader(cube, pin_memory=True).pin_memory and not loader(cube).pin_memory


def test_states_of_other_loaders_are_refused(cube):
    state = loader(cube, batch_size=4, seed=1).state_dict()
    with pytest.raises(ValueError, match="batch_size = 4 there and 5 here, .*seed = 1 there and 0 here"):
        loader(cube, batch_size=5).load_state_dict(state)


def test_a_pass_that_was_left_starts_again(cube):
    batches = loader(cube, VARIABLES, batch_size=4, shuffle=True)
    first = next(iter(batches))
    assert batches.epoch == 0 and same([next(iter(batches))], [first])


def test_splits(cube, tmp_path, small_blocks):
    kinds = np.arange(NETWORKS) % 5 // 3  # train, train, train, validation, validation, …
    path = tmp_path / "split.nc"
    with xr.open_dataset(cube) as there:
        there["split"] = (
            "network",
            kinds.astype(np.int8),
            {"long_name": "what the network is for", "units": "1"},
        )
        there.to_netcdf(path, encoding={name: {"_FillValue": None} for name in there})
    without = tmp_path / "without.nc"
    with xr.open_dataset(cube) as there:
        there.drop_vars("split").to_netcdf(without)
    for memory in (2**30, STREAM):
        for number, name in enumerate(("train", "validation")):
            batches = loader(path, VARIABLES, batch_size=4, split=name, shuffle=True, memory=memory)
            assert sorted(sum(networks_of(batches), [])) == np.flatnonzero(kinds == number).tolist()
    with pytest.raises(ValueError, match="has no test networks"):
        loader(path, split="test")
    with pytest.raises(ValueError, match="split must be one of train, validation, test; got 'valid'"):
        loader(path, split="valid")
    with pytest.raises(ValueError, match=r"has no variable split\(network\)"):
        loader(without, split="train")


@pytest.mark.parametrize("memory", [2**30, STREAM])
def test_statistics_are_those_of_the_likelihood(cube, small_blocks, memory):
    seen = 0
    with xr.open_dataset(cube) as there:
        for batch in loader(cube, ("network",), batch_size=4, shuffle=True, memory=memory, statistics=True):
            assert batch.keys() == {"network", "precision", "cross"}
            for k, number in enumerate(batch["network"].tolist()):
                one = there.sel(network=number)
                expected = transition_statistics(
                    one.activity.to_numpy(), 0.1, 2.0, input=one.input.to_numpy()
                ).precision(0.3)
                torch.testing.assert_close(batch["precision"][k], expected[0], rtol=1e-12, atol=0)
                torch.testing.assert_close(batch["cross"][k], expected[1], rtol=1e-9, atol=1e-9)
                seen += 1
    assert seen == NETWORKS


def test_statistics_take_the_voltage_where_there_is_one_and_a_floor_for_no_noise(tmp_path):
    path = build(tmp_path, 2, voltage=True, noise_std=0.0)
    (batch,) = loader(path, (), statistics=True)
    with xr.open_dataset(path) as there:
        found = transition_statistics(voltage=there.voltage[1].to_numpy(), dt=0.1)
    torch.testing.assert_close(batch["precision"][1], found.precision(found.noise_floor)[0])


def test_j_units(tmp_path):
    """W = s0 J: the ensemble has variance 1 in J, and the likelihood is the same number."""
    path = build(tmp_path, 200, ensemble=Dale(1.2), noise_std=0.3, num_trials=1, T=10, N=20)
    options = {"batch_size": 200, "statistics": True}
    (plain,) = loader(path, ("weights",), **options)
    (scaled,) = loader(path, ("weights",), units="J", **options)
    s0 = float(np.sqrt(Dale(1.2).variance(20)))
    torch.testing.assert_close(scaled["weights"] * s0, plain["weights"])
    assert float(scaled["weights"].square().mean()) == pytest.approx(1, abs=5 * np.sqrt(2 / scaled["weights"].numel()))

    def log_likelihood(batch):
        W = batch["weights"].double()
        return (batch["cross"] * W).sum((1, 2)) - 0.5 * (W @ batch["precision"] * W).sum((1, 2))

    torch.testing.assert_close(log_likelihood(scaled), log_likelihood(plain), rtol=1e-5, atol=1e-4)


def test_j_units_from_gains_where_no_ensemble_is_told(cube, tmp_path):
    path = copy_with(cube, tmp_path / "cube.nc", lambda file: file.setncattr("config", "{}"))
    assert CubeDataset(path).scale == pytest.approx(1.5 / np.sqrt(6))


@pytest.mark.parametrize("storage", [{"chunks": (5, 6, 6), "compression": "gzip"}, {"dtype": ">f4"}])
def test_cubes_that_others_stored_otherwise(cube, tmp_path, small_blocks, storage):
    path = tmp_path / "cube.nc"
    shutil.copy(cube, path)
    with h5py.File(path, "r+") as file:
        old = file["weights"]
        values, attributes = old[:], {name: old.attrs[name] for name in ("long_name", "units")}
        del file["weights"]
        new = file.create_dataset("weights", data=values, **{"dtype": "<f4"} | storage)
        new.attrs.update(attributes)
        for axis, name in enumerate(("network", "post", "pre")):
            new.dims[axis].attach_scale(file[name])
    options = {"batch_size": 4, "shuffle": True, "memory": STREAM}
    assert same(loader(path, VARIABLES, **options), loader(cube, VARIABLES, **options))
    dataset = CubeDataset(path)
    assert torch.equal(dataset[3]["weights"], CubeDataset(cube)[3]["weights"])
    forked = torch.utils.data.DataLoader(dataset, batch_size=4, num_workers=1, multiprocessing_context="fork")
    assert same(forked, loader(cube, batch_size=4))


def test_the_dataset_serves_any_torch_loader(cube):
    dataset = CubeDataset(cube, VARIABLES)
    items = dataset.__getitems__([5, 2, 5])
    assert [int(item["network"]) for item in items] == [5, 2, 5] and len(items[1:]) == 2
    assert torch.equal(items[1]["activity"], dataset[2]["activity"])
    assert torch.equal(dataset[-1]["weights"], dataset[NETWORKS - 1]["weights"])
    assert same(torch.utils.data.DataLoader(dataset, batch_size=4), loader(cube, VARIABLES, batch_size=4))


def test_memory_decides_and_must_hold_a_batch(cube):
    assert loader(cube, memory=NETWORKS * EACH).cube.in_memory
    assert not loader(cube, batch_size=4, memory=NETWORKS * EACH - 1).cube.in_memory
    assert loader(cube).cube.in_memory  # a quarter of what is free
    with pytest.raises(ValueError, match=f"memory must hold the batch of 4 networks .* {4 * EACH} bytes; got 100"):
        loader(cube, batch_size=4, memory=100)


def nan_in(name):
    def change(file):
        file[name][13, 1] = np.nan

    return change


@pytest.mark.parametrize("memory", [2**30, STREAM])
def test_nan_is_reported_with_file_and_network(cube, sharded, tmp_path, memory):
    path = copy_with(cube, tmp_path / "cube.nc", nan_in("activity"))
    with pytest.raises(ValueError, match=r"activity of network 13 in .*cube\.nc must be finite; got 120 NaN"):
        list(loader(path, batch_size=4, shuffle=True, memory=memory))
    assert len(list(loader(path, ("weights",)))) == 1
    folder = tmp_path / "shards"
    shutil.copytree(sharded, folder)
    shard = shards_of(folder)[1]
    copy_with(sharded / shard.path.name, shard.path, lambda file: file["weights"].__setitem__((3, 0, 0), np.inf))
    with pytest.raises(ValueError, match=r"weights of network 13 in .*network=000010-000019\.nc .* got 1 NaN or inf"):
        list(loader(folder, batch_size=4, memory=memory))


def test_statistics_that_cannot_be_had_name_the_network(cube, tmp_path):
    hidden = copy_with(cube, tmp_path / "a.nc", lambda file: file["observed"].__setitem__((4, 2), 0))
    with pytest.raises(ValueError, match=r"a\.nc, network 4: statistics need every neuron .* 1 are hidden"):
        list(loader(hidden, statistics=True))
    saturated = copy_with(cube, tmp_path / "b.nc", lambda file: file["activity"].__setitem__(4, 1.0))
    with pytest.raises(ValueError, match=r"b\.nc, network 4: activity must lie strictly between"):
        list(loader(saturated, statistics=True))


def test_statistics_of_an_observed_cube_are_warned_of(cube, tmp_path):
    seen = observe_cube(cube, Observation(fraction=0.5), tmp_path / "seen.nc")
    with pytest.warns(UserWarning, match=r'seen\.nc shows what an experiment saw .*"fraction": 0\.5.*unseen neurons'):
        batches = loader(seen, ("weights",), statistics=True, units="J")
    assert batches.cube.scale == pytest.approx(1.5 / 6**0.5)  # the weights are still those of six neurons
    batch = next(iter(batches))
    assert batch["precision"].shape[1:] == (3, 3)
    loader(seen, ("weights",))  # without a word


def test_bad_input_is_named(cube, tmp_path, sharded):
    with pytest.raises(ValueError, match=r"has the variables \[.*'weights'.*got \['time'\]"):
        loader(cube, ("weights", "time"))
    with pytest.raises(TypeError, match=r"Write \('weights',\)"):
        loader(cube, "weights")
    with pytest.raises(ValueError, match="at least one variable"):
        loader(cube, ())
    with pytest.raises(ValueError, match="units must be W or J; got 'j'"):
        loader(cube, units="j")
    with pytest.raises(ValueError, match="rank must be below world_size = 2; got 2"):
        loader(cube, rank=2, world_size=2)
    with pytest.raises(ValueError, match="at least one network; got 23 for 24 ranks"):
        loader(cube, world_size=24)
    with pytest.raises(FileNotFoundError):
        loader(tmp_path / "none")
    half = copy_with(cube, tmp_path / "half.nc", lambda file: file["complete"].__setitem__(slice(9), 0))
    with pytest.raises(ValueError, match=r"half\.nc is not a whole cube: 9 of 23 networks are not written"):
        loader(half)
    folder = tmp_path / "missing"
    shutil.copytree(sharded, folder)
    (folder / shard_name(10, 10)).unlink()
    with pytest.raises(ValueError, match="network=000010-000019.nc is missing"):
        loader(folder)


def test_files_that_change_are_refused(cube, tmp_path, large_networks):
    path = tmp_path / "cube.nc"
    shutil.copy(cube, path)
    batches = loader(path, batch_size=4, memory=STREAM)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"cube\.nc must have .* bytes as when the loader was made"):
        list(batches)


def test_shards_that_differ_are_refused(cube, tmp_path):
    folder = split_into(cube, tmp_path / "cube", (10, 13))
    last = folder / shard_name(10, 13)
    with xr.open_dataset(last) as there:
        changed = there.load()
    changed["weights"] = changed["weights"].astype(np.float64, keep_attrs=True)
    changed.to_netcdf(last, encoding={name: {"_FillValue": None} for name in changed})
    with pytest.raises(ValueError, match=r"network=000010-000022\.nc must hold weights as network=000000-000009\.nc"):
        CubeFiles(folder)


@pytest.mark.slow
def test_reading_one_shard_while_another_is_written(sharded, tmp_path, large_networks):
    """A process holds a shard of the same folder open for writing, locked by HDF5; the finished ones can be read."""
    folder = tmp_path / "cube"
    shutil.copytree(sharded, folder)
    first, *_, last = shards_of(folder)
    script = (
        f"import netCDF4, sys; f = netCDF4.Dataset({str(last.path)!r}, 'r+'); f['weights'][:] = 0; "
        "print('open', flush=True); sys.stdin.read()"
    )
    writer = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with writer:
        assert writer.stdout.readline() == b"open\n"
        batches = list(loader(first.path, VARIABLES, batch_size=4, memory=STREAM))
        with pytest.raises(ValueError, match=last.path.name):
            loader(folder)
        writer.stdin.close()
        writer.wait()
    assert sum(networks_of(batches), []) == list(range(10))


@pytest.mark.slow
def test_streaming_takes_little_memory(tmp_path):
    """80 MB of activity with 8 MB allowed; the peak of the process says what it took."""
    if not sys.platform.startswith("linux"):
        pytest.skip("reads the peak memory from /proc")
    path = build(tmp_path, 100, N=50, num_trials=40, T=100)
    script = f"""
import re
from neurosde.datasets import loader
def memory(which):
    return int(re.search(which + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
batches = loader({str(path)!r}, batch_size=4, shuffle=True, memory=2**23)
next(iter(batches))
open("/proc/self/clear_refs", "w").write("5")
before = memory("VmRSS")
print(sum(len(batch["activity"]) for batch in batches), memory("VmHWM") - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    networks, megabytes = done.stdout.split()
    assert int(networks) == 100 and float(megabytes) < 40


def test_orders_are_checked():
    with pytest.raises(ValueError, match="block must be at least 1; got 0"):
        Order(10, block=0)
    with pytest.raises(TypeError, match="seed must be an integer"):
        Order(10, seed=0.5)
    sampler = BlockShuffle(Order(10, batch_size=3, window=2))
    sampler.start = 1
    batches = list(sampler)
    assert batches == [[3, 4, 5], [6, 7, 8], [9]]
    assert [batch.window.tolist() for batch in batches] == [[3, 4, 5], [6, 7, 8, 9], [6, 7, 8, 9]]
    assert sampler.start == 0 and len(sampler) == 4
