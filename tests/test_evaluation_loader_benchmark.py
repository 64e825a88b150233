"""The benchmark of loaders: its table and data, writing beside a raw file, and streaming a cube of any size."""

import sys

import pytest
import xarray as xr

from neurosde.cli import main
from neurosde.datasets.build_dataset import DatasetConfig, build_dataset
from neurosde.evaluation import loader_benchmark, writing_benchmark
from neurosde.evaluation.loader_benchmark import (
    IN_MEMORY,
    INDEX_SELECT,
    MEMMAP,
    STREAMED,
    XARRAY,
    LoaderBenchmark,
    Memmap,
)


def test_the_benchmark_writes_a_table_and_its_data(tmp_path, capsys):
    out = tmp_path / "loader.nc"
    size = ["--networks", "12", "--neurons", "5", "--trials", "2", "--times", "10", "--batch-size", "4"]
    assert main(["benchmark", "loader", *size, "--repeats", "2", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    with xr.open_dataset(out) as data:
        assert data.networks_per_second.dims == ("loader", "repeat") and data.sizes["repeat"] == 2
        assert float(data.networks_per_second.min()) > 0
        assert {STREAMED, IN_MEMORY, MEMMAP, INDEX_SELECT, XARRAY} <= set(data.loader.values)
        rates = data.networks_per_second.median("repeat")
        for name in data.loader.values:
            assert f"| {name} | {float(rates.sel(loader=name)):.0f} |" in printed
        assert set(data.written.writer.values) == {"cube", "raw file"} and float(data.written.min()) > 0
    assert "all files in the page cache" in printed and "Written: cube" in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loader.nc"]
    assert main(["benchmark", "loader", "--repeats", "0"]) == 2
    assert "repeats must be at least 1; got 0" in capsys.readouterr().err


def test_benchmarks_from_a_cold_cache_or_without_xbatcher(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "xbatcher", None)
    sizes = {"networks": 8, "neurons": 4, "trials": 1, "times": 5, "batch_size": 4, "repeats": 1}
    data = loader_benchmark.loader_benchmark(LoaderBenchmark(**sizes, cold=True, out=tmp_path / "loader.nc"))
    assert "read from the disk" in data.attrs["summary"]
    assert "xbatcher: xbatcher is needed for this" in data.attrs["left_out"] and "xbatcher" not in data.loader


def test_readers_that_give_other_batches_are_refused(tmp_path, monkeypatch):
    read = Memmap.batch
    monkeypatch.setattr(Memmap, "batch", lambda self, networks: tuple(values + 1 for values in read(self, networks)))
    sizes = {"networks": 8, "neurons": 4, "trials": 1, "times": 5, "batch_size": 4, "repeats": 1}
    with pytest.raises(ValueError, match="numpy memmap of npy files gives other weights than the file holds"):
        loader_benchmark.loader_benchmark(LoaderBenchmark(**sizes, out=tmp_path / "loader.nc"))


def test_a_cube_is_streamed_once_and_its_peak_told(tmp_path, capsys, monkeypatch):
    cube = build_dataset(DatasetConfig(tmp_path / "cube", 50, 6, 2, 20, shard_size=20))
    each = 4 * (6 * 6 + 2 * 20 * 6)
    monkeypatch.setattr(loader_benchmark, "MEMORY", 8 * each)
    out = tmp_path / "stream.nc"
    command = ["benchmark", "loader", "--cube", str(cube), "--batch-size", "4", "--cold", "--out", str(out)]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("50 networks, 0.00 GB, in ") and "Largest resident set: " in printed
    with xr.open_dataset(out) as data:
        assert data.sizes["step"] == 10 and int(data.read[-1]) == 50 * each
        assert (data.memory.diff("step") >= 0).all() and (data.seconds.diff("step") > 0).all()
    monkeypatch.setattr(loader_benchmark, "MEMORY", 2**20)
    assert main(command) == 2
    assert "must be larger than the 1048576 bytes that streaming may take" in capsys.readouterr().err


def test_a_cube_takes_the_same_blocks_as_a_bare_file(tmp_path, monkeypatch):
    sizes, write = {}, writing_benchmark.CubeFile.finish

    def finish(file):
        digest = write(file)
        with xr.open_dataset(file.path) as cube:
            sizes[len(sizes)] = int(cube.complete.sum()), cube.activity.nbytes
        return digest

    monkeypatch.setattr(writing_benchmark.CubeFile, "finish", finish)
    monkeypatch.setattr("neurosde.datasets.build_dataset.BLOCK_BYTES", 3 * 4 * 2 * 20 * 6)
    speed = writing_benchmark.writing_speed(DatasetConfig(tmp_path / "out", 10, 6, 2, 20), 2)
    assert speed.dims == ("writer", "repeat") and speed.shape == (2, 2) and float(speed.min()) > 0
    assert set(sizes.values()) == {(10, 4 * 10 * 2 * 20 * 6)} and len(sizes) == 3
    assert list((tmp_path / "out").iterdir()) == []
