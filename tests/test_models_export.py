"""Posteriors in other forms: Zarr stores that read back equal, NWB files that pynwb finds valid."""

import json
import sys

import numpy as np
import pynwb
import pytest
import xarray as xr

from neurosde.cli import main
from neurosde.datasets.recordings import Recording, read_recording
from neurosde.models import InferenceConfig, infer, open_posterior, save_posterior
from neurosde.models.export_command import export_posterior_zarr
from neurosde.models.posterior_nwb import export_nwb

METHODS = ("exact", "cfg", "refined")


def columns(module, table):
    return {name: module[table][name][:] for name in module[table].colnames}


@pytest.mark.parametrize("method", METHODS)
def test_a_zarr_store_reads_back_equal(posteriors, tmp_path, method):
    out = export_posterior_zarr(posteriors[method], tmp_path / "p.zarr")
    assert json.loads((out / "posterior" / "weights" / "zarr.json").read_text())["zarr_format"] == 3
    with xr.open_datatree(out, engine="zarr", decode_times=False) as store:
        xr.testing.assert_identical(store.load(), open_posterior(posteriors[method]))
        assert store.attrs["git_commit"] and set(store.children) >= {"posterior", "observed_data", "constant_data"}


@pytest.mark.parametrize("method", METHODS)
def test_an_nwb_file_is_valid_and_holds_the_posterior(posteriors, tmp_path, method):
    out, tree = export_nwb(posteriors[method], tmp_path / "p.nwb"), open_posterior(posteriors[method])
    assert list(pynwb.validate(path=out)) == []
    with pynwb.NWBHDF5IO(str(out), "r") as io:
        file = io.read()
        weights = columns(file.processing["neurosde"], "weights")
        draws = tree["posterior/weights"].to_numpy()[0]
        for row in (0, 1, 6, 35):
            post, pre = weights["post"][row], weights["pre"][row]
            np.testing.assert_array_equal(weights["draws"][row], draws[:, post, pre])
            assert weights["mean"][row] == pytest.approx(draws[:, post, pre].mean())
            assert weights["sd"][row] == pytest.approx(np.sqrt(np.cov(draws[:, post, pre])))
            assert weights["point_estimate"][row] == float(tree["closed_form/point_estimate"][post, pre])
        assert len(weights["post"]) == 36 and (weights["post"][1], weights["pre"][1]) == (0, 1)
        constants = columns(file.processing["neurosde"], "constants")
        known = dict(zip(constants["quantity"], constants["value"], strict=True))
        assert known["noise_std"] == float(tree["constant_data/noise_std"]) and known["tau"] == 1
        there = columns(file.processing["neurosde"], "provenance")
        there = dict(zip(there["attribute"], there["value"], strict=True))
        assert there["config"] == tree.attrs["config"] and there["git_commit"] == tree.attrs["git_commit"]
        assert file.was_generated_by[0][0] == "neurosde" and str(tree.attrs["date_created"]) in there["date_created"]


def test_the_recording_in_an_nwb_file_is_read_back(posteriors, tmp_path):
    out, tree = export_nwb(posteriors["exact"], tmp_path / "p.nwb"), open_posterior(posteriors["exact"])
    found = read_recording(out, cut_trials=True)
    np.testing.assert_array_equal(found.activity, tree["observed_data/activity"])
    assert found.dt == pytest.approx(float(tree["constant_data/dt"]), rel=1e-12)


def test_voltage_and_input_over_time_go_along(tmp_path):
    rng = np.random.default_rng(0)
    voltage, current = rng.normal(size=(2, 30, 3)), rng.normal(size=(30, 3))
    recording = Recording(np.tanh(voltage), "driven", dt=0.1, voltage=voltage, input=current)
    result = infer(recording, InferenceConfig(draws=4, predictive_draws=0))
    out = export_nwb(save_posterior(result, tmp_path / "p.nc"), tmp_path / "p.nwb")
    assert list(pynwb.validate(path=out)) == []
    with pynwb.NWBHDF5IO(str(out), "r") as io:
        file = io.read()
        np.testing.assert_array_equal(file.acquisition["voltage"].data[:], voltage.reshape(60, 3))
        np.testing.assert_array_equal(file.acquisition["input"].data[:], np.concatenate([current, current]))


def test_the_command_and_what_it_refuses(posteriors, tmp_path, capsys):
    exact, cube = str(posteriors["exact"]), str(posteriors["cube"])
    store, file, other = tmp_path / "p.zarr", tmp_path / "folder" / "p.nwb", tmp_path / "other.nc"
    assert main(["export", exact, "--zarr", str(store)]) == 0
    assert 'open it with xarray.open_datatree(…, engine="zarr")' in capsys.readouterr().out
    assert main(["export", exact, "--nwb", str(file)]) == 0
    assert "open it with pynwb" in capsys.readouterr().out
    assert main(["export", cube, "--zarr", str(tmp_path / "cube.zarr")]) == 0
    assert "xarray.open_zarr" in capsys.readouterr().out
    xr.Dataset({"x": ("t", np.zeros(3))}).to_netcdf(other)
    xr.DataTree.from_dict({"/group": xr.Dataset({"x": ("t", np.zeros(3))})}).to_netcdf(tmp_path / "groups.nc")
    (tmp_path / "text.nc").write_text("no")
    before = sorted(tmp_path.rglob("*"))
    for arguments, match in (
        ([other, "--zarr", tmp_path / "z"], "must be a cube or a posterior of neurosde infer; it is neither"),
        ([tmp_path / "groups.nc", "--nwb", tmp_path / "z.nwb"], "must be a cube or a posterior"),
        ([tmp_path / "text.nc", "--zarr", tmp_path / "z"], "not a readable netCDF file"),
        ([tmp_path / "none.nc", "--zarr", tmp_path / "z"], "no such file"),
        ([exact, "--zarr", store], "is there already; remove it"),
        ([exact, "--nwb", file], "is there already; remove it"),
        ([exact, "--nwb", tmp_path / "p.h5"], "named *.nwb"),
        ([cube, "--nwb", tmp_path / "c.nwb"], "is a cube: use --zarr"),
        ([exact, "--nwb", other / "p.nwb"], "there is a file where its folder should be"),
    ):
        assert main(["export", *map(str, arguments)]) == 2
        error = capsys.readouterr().err
        assert match in error and error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before  # nothing half-written is left behind
    with pytest.raises(SystemExit):
        main(["export", exact])
    assert "--zarr --nwb is required" in capsys.readouterr().err


@pytest.mark.parametrize(("package", "option"), [("zarr", "--zarr"), ("pynwb", "--nwb")])
def test_without_the_package_the_install_line_is_told(posteriors, tmp_path, capsys, monkeypatch, package, option):
    monkeypatch.setitem(sys.modules, package, None)
    out = tmp_path / f"p.{option[2:]}"
    assert main(["export", str(posteriors["exact"]), option, str(out)]) == 2
    error = capsys.readouterr().err
    assert f"pip install 'neurosde[{option[2:]}]'" in error and error.count("\n") == 1 and not out.exists()
