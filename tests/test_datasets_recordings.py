"""Recordings as laboratories keep them: NWB and MATLAB files, written by pynwb, scipy and h5py."""

import datetime
import sys

import h5py
import numpy as np
import pynwb
import pytest
import scipy.io
import xarray as xr
from hdmf.common import DynamicTableRegion
from pynwb.ophys import DfOverF, Fluorescence, OpticalChannel

from neurosde.cli import main
from neurosde.datasets import load_connectome
from neurosde.datasets.recordings import Recording, merge_settings, read_recording
from neurosde.validation import optional_package

T, N = 24, 3
DATA = np.random.default_rng(0).uniform(-0.8, 0.8, (T, N))


def session(path, *, series=(), trials=()):
    """Write an NWB file with plain series in its acquisition."""
    start = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    file = pynwb.NWBFile("session", "one", start)
    for name, data, options in series:
        file.add_acquisition(pynwb.TimeSeries(name=name, data=data, unit="Hz", **options))
    for begin, end in trials:
        file.add_trial(start_time=begin, stop_time=end)
    with pynwb.NWBHDF5IO(str(path), "w") as out:
        out.write(file)
    return path


def imaging(path, *, transposed=False):
    """Write an NWB file with a raw and a ΔF/F series of the same cells."""
    file = pynwb.NWBFile("imaging", "two", datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC))
    device = file.create_device(name="microscope")
    plane = file.create_imaging_plane(
        name="plane", optical_channel=OpticalChannel(name="green", description="GCaMP", emission_lambda=500.0),
        description="V1", device=device, excitation_lambda=600.0, indicator="GCaMP", location="V1", imaging_rate=30.0,
    )  # fmt: skip
    module = file.create_processing_module(name="ophys", description="cells")
    segmentation = pynwb.ophys.ImageSegmentation()
    module.add(segmentation)
    cells = segmentation.create_plane_segmentation(name="cells", description="cells", imaging_plane=plane)
    for cell in range(N):
        cells.add_roi(pixel_mask=[(cell, 0, 1.0)])
    for container, scale in ((Fluorescence(name="Fluorescence"), 100.0), (DfOverF(name="DfOverF"), 1.0)):
        module.add(container)
        region = DynamicTableRegion(name="rois", data=list(range(N)), description="all", table=cells)
        data = scale * DATA.astype(np.float32)
        container.create_roi_response_series(
            name="RoiResponseSeries", data=data.T if transposed else data, rois=region, unit="n.a.", rate=30.0
        )
    with pynwb.NWBHDF5IO(str(path), "w") as out:
        out.write(file)
    return path


def test_rates_of_an_nwb_file(tmp_path):
    """Integers with a conversion and an offset, at a sampling rate."""
    counts = np.round(1000 * DATA).astype(np.int16)
    path = session(tmp_path / "r.nwb", series=[("rates", counts, {"rate": 20.0, "conversion": 0.001, "offset": 0.05})])
    found = read_recording(path)
    np.testing.assert_allclose(found.activity, (counts * 0.001 + 0.05)[None], rtol=1e-12)
    assert found.dt == pytest.approx(0.05) and found.time_unit == "s" and found.source.endswith("r.nwb:rates")
    with pytest.warns(UserWarning, match="does not say tau; 1 s is assumed"):
        assert merge_settings(found, dt=None, tau=None, drive=None).tau == 1
    assert merge_settings(found, dt=None, tau=0.02, drive=None).tau == 0.02


def test_timestamps_must_be_even(tmp_path):
    times = 5.0 + 0.1 * np.arange(T)
    even = session(tmp_path / "even.nwb", series=[("rates", DATA, {"timestamps": times + 1e-6 * DATA[:, 0]})])
    assert read_recording(even).dt == pytest.approx(0.1, rel=1e-4)
    times[7] += 0.02
    uneven = session(tmp_path / "uneven.nwb", series=[("rates", DATA, {"timestamps": times})])
    with pytest.raises(ValueError, match=r"evenly spaced; got steps from 0.08 to 0.12. Resample"):
        read_recording(uneven)


def test_series_of_imaging_are_asked_for_by_name(tmp_path):
    path = imaging(tmp_path / "r.nwb")
    names = r"\['ophys/DfOverF/RoiResponseSeries', 'ophys/Fluorescence/RoiResponseSeries'\]"
    with pytest.raises(ValueError, match=f"holds {names}; name the one to read"):
        read_recording(path)
    with pytest.raises(ValueError, match=f"holds {names}; got variable 'RoiResponseSeries'. Give more of the path"):
        read_recording(path, variable="RoiResponseSeries")
    with pytest.raises(ValueError, match=f"holds {names}; got variable 'seRoi'"):
        read_recording(path, variable="seRoi")
    found = read_recording(path, variable="DfOverF/RoiResponseSeries")
    assert found.activity.dtype == np.float32 and found.dt == pytest.approx(1 / 30)
    np.testing.assert_array_equal(found.activity[0], DATA.astype(np.float32))


@pytest.mark.filterwarnings("ignore:.*dimension of data does not match the length of rois")
def test_imaging_stored_as_cell_by_time_is_refused(tmp_path):
    path = imaging(tmp_path / "r.nwb", transposed=True)
    with pytest.raises(ValueError, match=r"must be \(time, cell\); got \(cell, time\), \(3, 24\). Transpose it"):
        read_recording(path, variable="DfOverF/RoiResponseSeries")


def test_trials_of_an_nwb_file(tmp_path):
    """Sample k is at 2 + k/10 s; trials are [start, stop)."""
    options = {"rate": 10.0, "starting_time": 2.0}
    trials = [(2.0, 2.5), (2.95, 3.55), (3.6, 4.1), (4.2, 4.8)]
    path = session(tmp_path / "r.nwb", series=[("rates", DATA, options)], trials=trials)
    with pytest.warns(UserWarning, match="1 trials of .* reach beyond it and are left out"):
        found = read_recording(path, cut_trials=True)
    np.testing.assert_array_equal(found.activity, np.stack([DATA[0:5], DATA[10:15], DATA[16:21]]))
    assert read_recording(path).activity.shape == (1, T, N)
    path = session(tmp_path / "uneven.nwb", series=[("rates", DATA, options)], trials=[(2.0, 2.3), (3.0, 4.0)])
    with pytest.warns(UserWarning, match="last 3 to 10 samples; all are cut to 3"):
        assert read_recording(path, cut_trials=True).activity.shape == (2, 3, N)
    for name, wrong, match in (
        ("none.nwb", [], "must have a table of trials"),
        ("late.nwb", [(100.0, 101.0)], "lies within the series, 2 to 4.4 s"),
        ("short.nwb", [(2.0, 2.05)], "at least two samples; got one of 1"),
    ):
        path = session(tmp_path / name, series=[("rates", DATA, options)], trials=wrong)
        with pytest.raises(ValueError, match=match):
            read_recording(path, cut_trials=True)


def test_nwb_files_that_cannot_be_read(tmp_path):
    whole = session(tmp_path / "r.nwb", series=[("rates", DATA, {"rate": 10.0})]).read_bytes()
    for name, content in (("text.nwb", b"no"), ("cut.nwb", whole[: len(whole) // 2])):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="not a readable NWB file"):
            read_recording(tmp_path / name)
    with h5py.File(tmp_path / "other.nwb", "w") as file:
        file["x"] = DATA
    with pytest.raises(ValueError, match="not a readable NWB file"):
        read_recording(tmp_path / "other.nwb")
    path = session(tmp_path / "flat.nwb", series=[("speed", DATA[:, 0], {"rate": 10.0})])
    with pytest.raises(ValueError, match="must hold a TimeSeries or RoiResponseSeries"):
        read_recording(path)


def test_inference_from_an_nwb_file(tmp_path, capsys):
    trials = [(0.0, 1.2), (1.2, 2.4)]
    path = session(tmp_path / "r.nwb", series=[("rates", DATA, {"rate": 10.0})], trials=trials)
    out = tmp_path / "p.nc"
    assert main(["infer", str(path), "--tau", "0.5", "--cut-trials", "--predictive-draws", "2", "--out", str(out)]) == 0
    assert "3 neurons, 2 trials of 12 times" in capsys.readouterr().out
    with xr.open_datatree(out) as tree:
        assert float(tree["constant_data/dt"]) == pytest.approx(0.1)
        np.testing.assert_array_equal(tree["observed_data/activity"], DATA.reshape(2, 12, N))


def test_a_missing_package_is_told_with_its_install_line(tmp_path, capsys, monkeypatch):
    path = session(tmp_path / "r.nwb", series=[("rates", DATA, {"rate": 10.0})])
    monkeypatch.setitem(sys.modules, "pynwb", None)
    with pytest.raises(ImportError, match=r"pynwb is needed .* pip install 'neurosde\[nwb\]'"):
        read_recording(path)
    assert main(["infer", str(path)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "pip install 'neurosde[nwb]'" in said
    assert optional_package("json", "none").loads("[1]") == [1]


def write_v73(path, arrays, logical=()):
    """Write what MATLAB's `save -v7.3` does: a user block, and arrays with their axes in the opposite order."""

    def put(group, name, value):
        if isinstance(value, dict):
            inner = group.create_group(name)
            inner.attrs["MATLAB_class"] = np.bytes_("struct")
            for field, content in value.items():
                put(inner, field, content)
        else:
            group[name] = np.asarray(value).T
            group[name].attrs["MATLAB_class"] = np.bytes_("logical" if name in logical else "double")

    with h5py.File(path, "w", userblock_size=512) as file:
        for name, value in arrays.items():
            put(file, name, value)
        kept = file.create_group("#refs#")
        kept["a"] = np.zeros((4, 4))
        file.create_dataset("cells", (1, 1), dtype=h5py.ref_dtype)[0, 0] = kept["a"].ref
        file["cells"].attrs["MATLAB_class"] = np.bytes_("cell")
    header = b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(116) + bytes(8) + b"\x00\x02IM"
    with open(path, "r+b") as file:
        file.write(header)


@pytest.mark.parametrize("version", ["5", "4", "7.3"])
def test_matlab_files(tmp_path, version):
    trials = np.stack([DATA, -DATA]) if version != "4" else DATA  # version 4 has matrices only
    arrays = {
        "activity": trials,
        "dt": np.array([[0.1]]),
        "tau": np.array([[2.0]]),
        "input": np.array([[0.1, 0.2, 0.3]]),
    }
    path = tmp_path / "r.mat"
    if version == "7.3":
        write_v73(path, arrays | {"good": np.ones((9, 9), dtype=np.uint8)}, logical=("good",))
    else:
        scipy.io.savemat(path, arrays | {"subject": "mouse"}, format=version)
    found = read_recording(path)
    np.testing.assert_array_equal(found.activity, trials.reshape(-1, T, N))
    assert (found.dt, found.tau) == (0.1, 2.0)
    np.testing.assert_array_equal(found.input, [0.1, 0.2, 0.3])


@pytest.mark.parametrize("version", ["5", "7.3"])
def test_fields_of_a_matlab_struct(tmp_path, version):
    contents = {"session": {"depth": np.ones((2, 2)), "rates": DATA}, "dt": np.array([[0.5]])}
    path = tmp_path / "r.mat"
    write_v73(path, contents) if version == "7.3" else scipy.io.savemat(path, contents)
    with pytest.raises(ValueError, match=r"holds \['session.depth', 'session.rates'\]; name the one to read"):
        read_recording(path)
    found = read_recording(path, variable="session.rates")
    np.testing.assert_array_equal(found.activity[0], DATA)
    assert found.dt == 0.5


def test_matlab_vectors_and_single_neurons(tmp_path):
    scipy.io.savemat(tmp_path / "one.mat", {"activity": DATA[:, :1], "dt": 0.1})
    assert read_recording(tmp_path / "one.mat").activity.shape == (1, T, 1)
    scipy.io.savemat(tmp_path / "named.mat", {"cell7": DATA[:, :1], "dt": 0.1})
    assert read_recording(tmp_path / "named.mat", variable="cell7").activity.shape == (1, T, 1)
    scipy.io.savemat(tmp_path / "clock.mat", {"t": np.arange(T), "spikes": DATA})
    np.testing.assert_array_equal(read_recording(tmp_path / "clock.mat").activity[0], DATA)


def test_a_connectome_from_matlab(tmp_path):
    W = np.random.default_rng(1).normal(size=(4, 4))
    scipy.io.savemat(tmp_path / "W.mat", {"W": W, "names": np.array(["a", "b"], dtype=object)})
    write_v73(tmp_path / "W73.mat", {"W": W})
    for name in ("W.mat", "W73.mat"):
        np.testing.assert_allclose(load_connectome(tmp_path / name), W, rtol=1e-6)


def test_matlab_files_that_cannot_be_read(tmp_path):
    scipy.io.savemat(tmp_path / "r.mat", {"activity": DATA})
    write_v73(tmp_path / "v73.mat", {"activity": DATA})
    for source in ("r.mat", "v73.mat"):
        whole = (tmp_path / source).read_bytes()
        for content in (b"", b"no", whole[: len(whole) // 2]):
            (tmp_path / "cut.mat").write_bytes(content)
            with pytest.raises(ValueError, match="not a readable MATLAB file"):
                read_recording(tmp_path / "cut.mat")
    scipy.io.savemat(tmp_path / "text.mat", {"name": "mouse"})
    with pytest.raises(ValueError, match="must hold arrays of real numbers; it has none"):
        read_recording(tmp_path / "text.mat")
    scipy.io.savemat(tmp_path / "two.mat", {"a": DATA, "b": DATA})
    with pytest.raises(ValueError, match=r"holds \['a', 'b'\]; name the one to read"):
        read_recording(tmp_path / "two.mat")


def test_trials_are_cut_out_of_nwb_files_only(tmp_path):
    np.save(tmp_path / "r.npy", DATA)
    with pytest.raises(ValueError, match="only NWB files hold a table of trials"):
        read_recording(tmp_path / "r.npy", cut_trials=True)
    assert Recording(DATA, "here").time_unit is None
