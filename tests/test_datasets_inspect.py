"""Looking at cubes: what info says, what plot draws, what export writes."""

import json
import subprocess
import sys

import numpy as np
import pytest
import xarray as xr

from neurosde.cli import main
from neurosde.datasets import Dale, zarr_store
from neurosde.datasets.build_dataset import DatasetConfig, build_dataset
from neurosde.datasets.ensembles import GainMixture
from neurosde.datasets.info_command import describe
from neurosde.datasets.observation import Observation
from neurosde.datasets.observe_command import observe_cube
from neurosde.datasets.plot_command import network_figure
from neurosde.datasets.zarr_store import export_zarr


@pytest.fixture(scope="module")
def cube(tmp_path_factory):
    config = DatasetConfig(
        tmp_path_factory.mktemp("data"), num_networks=5, N=10, num_trials=2, T=20, tau=0.2, dt=0.01, time_unit="s",
        noise_std=0.3, voltage=True, seed=3, ensemble=GainMixture(Dale(0.7), 1.4),
    )  # fmt: skip
    return build_dataset(config)


@pytest.fixture(scope="module")
def folder(cube, tmp_path_factory):
    """The same networks as a folder of shards."""
    path = tmp_path_factory.mktemp("shards")
    with xr.open_dataset(cube) as whole:
        for first in (0, 2, 4):
            part = whole.isel(network=slice(first, first + 2))
            last = first + part.sizes["network"] - 1
            part.to_netcdf(path / f"network={first:06d}-{last:06d}.nc")
    return path


def section(text, title):
    return text.split(f"\n{title}\n")[1].split("\n\n")[0]


def test_info_says_what_a_cube_holds(cube, capsys):
    assert main(["info", str(cube)]) == 0
    said = capsys.readouterr().out
    with xr.open_dataset(cube) as whole:
        for name in whole.data_vars:
            (line,) = [one for one in section(said, "Variables").splitlines() if one.split()[0] == name]
            assert str(whole[name].dtype) in line and whole[name].attrs["long_name"] in line
            assert all(f"{dim} {size}" in line for dim, size in whole[name].sizes.items())
        gain = f"  gain         {float(whole.gain.min()):.6g} to {float(whole.gain.max()):.6g}"
        excitatory = int((whole.cell_type == 1).sum())
        assert whole.attrs["git_commit"] in said and whole.attrs["date_created"] in said
    contents = section(said, "Contents").splitlines()
    assert gain in contents and "  noise_std    0.3" in contents and "  tau          0.2" in contents
    assert f"  cell_type    {50 - excitatory} inhibitory, {excitatory} excitatory" in contents
    assert "dale (" in contents[0] and "gain = 0.7" in contents[0]
    assert "  time         20  (0 to 0.19 s, every 0.01 s)" in section(said, "Dimensions").splitlines()
    assert f"1 file, {cube.stat().st_size / 1000:.1f} kB" in said
    assert "[s-0.5]" in said and "seed = 3" in said


def test_info_of_shards_is_that_of_the_whole(cube, folder):
    one, many = describe(cube), describe(folder)
    assert one.split("\n\n", 1)[1] == many.split("\n\n", 1)[1]
    size = sum(file.stat().st_size for file in folder.iterdir())
    assert f"3 files, {size / 1000:.1f} kB" in many


def test_info_counts_the_splits(cube, tmp_path):
    with xr.open_dataset(cube) as whole:
        flags = {"flag_values": np.array([0, 1, 2], "i1"), "flag_meanings": "train validation test"}
        marked = whole.assign(split=("network", np.array([0, 0, 2, 0, 1], "i1"), flags))
        marked.to_netcdf(tmp_path / "split.nc")
    assert "  split        3 train, 1 validation, 1 test" in section(describe(tmp_path / "split.nc"), "Contents")


def test_info_of_what_was_observed(cube, tmp_path):
    observe_cube(cube, Observation(fraction=0.5, decay_time=0.1, bin_size=2), tmp_path / "o.nc")
    said = describe(tmp_path / "o.nc")
    assert "  observed     5 of 10 neurons, bin_size = 2, decay_time = 0.1" in said
    assert "time         10  (0.005 to 0.185 s, every 0.02 s)" in said


def test_info_of_a_posterior_and_of_other_files(cube, tmp_path, capsys):
    out = tmp_path / "p.nc"
    assert main(["infer", str(cube), "--network", "1", "--predictive-draws", "2", "--out", str(out)]) == 0
    said = describe(out)
    assert "/posterior\n" in said and "chain 1 x draw 256 x post 10 x pre 10" in said
    assert "  method       exact" in said and "  network      1" in said
    xr.Dataset({"x": ("t", np.zeros(3))}).to_netcdf(tmp_path / "other.nc")
    assert "t 3; no description [no units]" in describe(tmp_path / "other.nc")
    (tmp_path / "text.nc").write_text("no")
    for path, match in (("no.nc", "no such file"), ("text.nc", "not a readable netCDF"), (".", "no cube in")):
        capsys.readouterr()
        assert main(["info", str(tmp_path / path)]) == 2
        error = capsys.readouterr().err
        assert match in error and error.count("\n") == 1


def test_the_figure_shows_the_network(cube, folder):
    with xr.open_dataset(cube) as whole:
        figure = network_figure(whole, 3)
        one = whole.isel(network=3)
        weights, spectrum, heat, traces = (axes for axes in figure.axes if axes.get_title())
        image = weights.images[0]
        np.testing.assert_array_equal(image.get_array(), one.weights)
        low, high = image.get_clim()
        assert low == -high and image.get_cmap().name == "RdBu_r"
        (points,) = [line for line in spectrum.lines if line.get_marker() == "o"]
        found = np.sort_complex(points.get_xdata() + 1j * points.get_ydata())
        known = np.sort_complex(np.linalg.eigvals(one.weights.to_numpy().astype(float)))
        np.testing.assert_allclose(found, known, atol=1e-12)
        assert {patch.radius for patch in spectrum.patches} == {float(one.gain)}
        np.testing.assert_array_equal(heat.images[0].get_array(), one.activity[0].T)
        assert heat.get_xlabel() == traces.get_xlabel() == "time [s]"
        np.testing.assert_allclose(heat.images[0].get_extent()[:2], (-0.005, 0.195))
        shown = [int(label.get_text()) for label in traces.get_yticklabels()]
        spread = one.activity[0].std("time").to_numpy()
        assert shown == list(np.argsort(-spread)[:6])
        assert f"network 3 of 5: 10 neurons, gain {float(one.gain):.3g}, noise 0.3" == figure._suptitle.get_text()


def test_plot_writes_a_picture_or_says_why_not(cube, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["plot", str(cube), "--network", "4"]) == 0
    assert capsys.readouterr().out == "figure: network-4.png\n"
    assert (tmp_path / "network-4.png").read_bytes()[:4] == b"\x89PNG"
    assert main(["plot", str(folder), "--network", "4", "--out", "same.png"]) == 0
    assert (tmp_path / "same.png").read_bytes() == (tmp_path / "network-4.png").read_bytes()
    assert main(["plot", str(cube), "--out", "f/p.pdf"]) == 0
    assert (tmp_path / "f" / "p.pdf").read_bytes()[:4] == b"%PDF"
    capsys.readouterr()
    xr.Dataset({"x": (("network", "neuron"), np.zeros((2, 3)))}).to_netcdf("other.nc")
    for arguments, match in (
        ([str(cube), "--network", "5"], "network must lie between 0 and 4; got 5"),
        ([str(cube), "--out", "p.txt"], "a picture is written as .png, .pdf, .svg; got p.txt"),
        (["other.nc"], "a cube must hold weights, activity"),
    ):
        assert main(["plot", *arguments]) == 2
        error = capsys.readouterr().err
        assert match in error and error.count("\n") == 1


@pytest.mark.parametrize("networks_a_chunk", [1, 2, 5])
def test_a_zarr_store_holds_the_same(cube, folder, tmp_path, monkeypatch, networks_a_chunk):
    monkeypatch.setattr(zarr_store, "CHUNK_BYTES", networks_a_chunk * 2 * 20 * 10 * 4)
    for source in (cube, folder):
        out = export_zarr(source, tmp_path / f"{source.name}.zarr")
        with xr.open_dataset(cube) as whole, xr.open_zarr(out, chunks=None) as store:
            xr.testing.assert_identical(store.drop_attrs(), whole.drop_attrs())
            assert store.attrs["config"] == whole.attrs["config"] and store.attrs.keys() == whole.attrs.keys()
            for name in whole.variables:
                assert store[name].dtype == whole[name].dtype
                assert store[name].attrs["long_name"] == whole[name].attrs["long_name"]
                assert store[name].attrs["units"] == whole[name].attrs["units"]
        layout = json.loads((out / "activity" / "zarr.json").read_text())
        assert layout["zarr_format"] == 3
        assert layout["chunk_grid"]["configuration"]["chunk_shape"] == [networks_a_chunk, 2, 20, 10]


def test_a_store_appears_whole_or_not_at_all(cube, tmp_path, capsys, monkeypatch):
    out = tmp_path / "z" / "cube.zarr"
    monkeypatch.setattr(zarr_store, "CHUNK_BYTES", 1)
    append, calls = xr.Dataset.to_zarr, []

    def failing(self, store, **options):
        calls.append(store)
        assert not out.exists()
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        return append(self, store, **options)

    monkeypatch.setattr(xr.Dataset, "to_zarr", failing)
    assert main(["export", str(cube), "--zarr", str(out)]) == 2
    error = capsys.readouterr().err
    assert "no space is left on the disk" in error and error.splitlines()[-1].startswith("error: ")
    assert list(out.parent.iterdir()) == []
    monkeypatch.undo()
    assert main(["export", str(cube), "--zarr", str(out)]) == 0
    assert "open it with xarray.open_zarr" in capsys.readouterr().out
    assert main(["export", str(cube), "--zarr", str(out)]) == 2
    assert "is there already" in capsys.readouterr().err


def test_without_zarr_the_install_line_is_told(cube, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "zarr", None)
    assert main(["export", str(cube), "--zarr", str(tmp_path / "z")]) == 2
    error = capsys.readouterr().err
    assert "pip install 'neurosde[zarr]'" in error and error.count("\n") == 1
    assert not (tmp_path / "z").exists()


def test_importing_neurosde_stays_light():
    script = (
        "import sys, neurosde, neurosde.datasets, neurosde.datasets.recordings, neurosde.datasets.observation; "
        "print([name for name in ('matplotlib', 'pynwb', 'h5py', 'zarr', 'scipy.io') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
