"""`neurosde refine`: what the command makes of the files of `neurosde infer`, and what it refuses."""

import math

import numpy as np
import pytest
import xarray as xr

from neurosde.cli import main
from neurosde.datasets import generate_activity_trials, sample_weight_matrix
from neurosde.models import open_posterior
from neurosde.models.posterior_file import config_of, recording_of


def test_the_command_keeps_the_draws_that_did_not_diverge(posteriors, tmp_path, capsys):
    refine = ["refine", str(posteriors["few"]), "--method", "dps", "--family", "dale", "--out", str(tmp_path / "r.nc")]
    assert main([*refine, "--rho", "1"]) == 0
    said = capsys.readouterr()
    tree = open_posterior(tmp_path / "r.nc")
    diverged = tree["refinement"]["diverged"].to_numpy().astype(bool)
    assert 0 < diverged.sum() < len(diverged)
    told = f"{diverged.sum()} of {len(diverged)}"
    assert f"warning: guidance 'dps' diverges for {told} draws" in said.err and f"for {told} the guidance" in said.out
    before, after = (tree[group]["weights"].to_numpy()[0] for group in ("unrefined", "posterior"))
    assert (before[diverged] == after[diverged]).all() and (before[~diverged] != after[~diverged]).any((-1, -2)).all()
    np.testing.assert_allclose(tree["closed_form"]["point_estimate"], after[~diverged].mean(0))
    (tmp_path / "r.nc").unlink()
    assert main([*refine, "--rho", "80"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "neurosde refine --method gibbs" in said and not (tmp_path / "r.nc").exists()


def test_a_refined_posterior_knows_what_was_observed_of_its_cube(posteriors, tmp_path):
    seen, out, refined = (str(tmp_path / name) for name in ("seen.nc", "posterior.nc", "refined.nc"))
    assert main(["observe", str(posteriors["cube"]), "--neurons", "0", "2", "3", "5", "--out", seen]) == 0
    assert main(["infer", seen, "--network", "1", "--draws", "4", "--out", out]) == 0
    assert main(["refine", out, "--method", "mmps", "--rho", "0.1", "--out", refined]) == 0
    with xr.open_dataset(seen) as cube:
        for path in (out, refined):
            tree = open_posterior(path)
            assert tree.attrs["observation"] == cube.attrs["observation"]
            assert tree.attrs["time_unit"] == cube["time"].attrs["units"] == recording_of(tree).time_unit
            assert recording_of(tree).observation == cube.attrs["observation"]


def test_the_command_takes_draws_of_another_posterior_for_wrong(posteriors, tmp_path):
    def refined(of, *told):
        out = tmp_path / f"{len(list(tmp_path.iterdir()))}.nc"
        assert main(["refine", str(of), *told, "--out", str(out)]) == 0
        rho = open_posterior(out)["refinement"]["rho"]
        return out, rho.size, float(rho[0])

    own, *near = refined(posteriors["cfg"])
    assert near == [8, pytest.approx(0.3)]
    assert refined(own, "--checkpoint", "base")[1:] == (8, pytest.approx(0.3))
    _, *far = refined(posteriors["cfg"], "--family", "dale")
    assert far == [12, pytest.approx(1.0)]
    by_guidance, *_ = refined(posteriors["cfg"], "--method", "pigdm")
    assert refined(by_guidance)[1:] == (12, pytest.approx(1.0))


@pytest.mark.slow
def test_the_command(tmp_path, capsys):
    cube, out, refined = tmp_path / "data" / "cube.nc", tmp_path / "posterior.nc", tmp_path / "refined.nc"
    build = ["build-dataset", "--out-dir", str(cube.parent), "--num-networks", "2", "--N", "8", "--num-trials", "3"]
    assert main([*build, "--T", "120", "--ensemble", "sparse", "--noise-std", "0.3", "--seed", "1"]) == 0
    infer_it = ["infer", str(cube), "--network", "1", "--draws", "16", "--predictive-draws", "2", "--tau", "1"]
    assert main([*infer_it, "--out", str(out)]) == 0
    assert main(["refine", str(out), "--sweeps", "8", "--family", "sparse", "--out", str(refined)]) == 0
    said = capsys.readouterr().out
    assert "draws were refined by gibbs, 128 evaluations each" in said
    assert "Posterior (exact refined by gibbs, 16 draws" in said
    with xr.open_datatree(out) as before, xr.open_datatree(refined) as after:
        assert (after["unrefined"]["weights"] == before["posterior"]["weights"]).all()
        assert math.isnan(float(after["refinement"]["draw_seconds"]))
        weights = after["posterior"]["weights"].to_numpy()
    assert (weights == 0).mean() > 0.3  # of sparse weights
    assert main(["evaluate", str(refined), "--truth", str(cube), "--out-dir", str(tmp_path / "report")]) == 0
    said = capsys.readouterr().out
    assert "coverage_90" in said and "truth_chi2" not in said
    again = ["refine", str(refined), "--recording", str(cube), "--method", "pigdm", "--rho", "0.5"]
    assert main([*again, "--out", str(tmp_path / "again.nc")]) == 0
    assert "this guidance approximates" in capsys.readouterr().out
    assert main(["refine", str(cube)]) == 2
    assert "not a posterior of neurosde infer" in capsys.readouterr().err
    of_any_tau = ["infer", str(tmp_path / "rec.npy"), "--dt", "0.1", "--tau-range", "0.5", "2", "--method", "cfg"]
    W = sample_weight_matrix(6, g=1.5, ensemble="dale", generator=0)
    np.save(tmp_path / "rec.npy", generate_activity_trials(W, 2, 150, 0.1, noise_std=0.3, generator=1).numpy())
    assert main([*of_any_tau, "--draws", "8", "--predictive-draws", "2", "--steps", "4", "--out", str(out)]) == 0
    assert main(["refine", str(out), "--sweeps", "8", "--out", str(refined)]) == 0
    assert "tau = " in capsys.readouterr().out


def test_what_the_command_cannot_do_ends_in_one_line_and_nothing_is_replaced(posteriors, tmp_path, capsys):
    few, cube, out = (str(path) for path in (posteriors["few"], posteriors["cube"], tmp_path / "refined.nc"))
    before = posteriors["few"].read_bytes(), posteriors["cube"].read_bytes()
    (tmp_path / "link.nc").symlink_to(posteriors["few"])
    for words, match in (
        (
            ["refine", few, "--method", "dps", "--sweeps", "8", "--out", out],
            "by 'gibbs'; got 8 with 'dps'. Leave sweeps",
        ),
        (["refine", few, "--likelihood", "rollout", "--out", out], "by 'pigdm' or 'dps'; got it with 'gibbs'. Leave"),
        (
            ["refine", few, "--method", "mmps", "--closing", "--out", out],
            "by 'mmps' are not closed; leave --closing out",
        ),
        (["refine", __file__, "--out", out], "is not a posterior of neurosde infer, which is a netCDF file, NAME.nc"),
        (["refine", str(tmp_path), "--out", out], "is a folder; name a file in it"),
        (["refine", few, "--out", few], "is what is read, and would be replaced; choose another --out"),
        (["refine", few, "--out", str(tmp_path / "link.nc")], "is what is read, and would be replaced"),
        (["refine", few, "--recording", cube, "--out", cube], "is what is read, and would be replaced"),
        (["infer", cube, "--network", "1", "--out", cube], "is what is read, and would be replaced"),
        (
            ["infer", cube, "--likelihood", "rollout", "--out", out],
            "got it where draws are not refined. Leave likelihood",
        ),
    ):
        assert main(words) == 2
        said = capsys.readouterr().err
        assert match in said and said.count("\n") == 1
    assert before == (posteriors["few"].read_bytes(), posteriors["cube"].read_bytes())
    assert not (tmp_path / "refined.nc").exists()


def test_the_command_takes_a_prior(posteriors, tmp_path, capsys):
    out = tmp_path / "refined.nc"
    refine = ["refine", str(posteriors["few"]), "--prior", "sparse", "--out", str(out)]
    assert main([*refine, "--sweeps", "8"]) == 0
    assert "refined by gibbs with the prior sparse, 192 evaluations each" in capsys.readouterr().out
    tree = open_posterior(out)
    assert config_of(tree)["prior"] == "sparse"
    assert float((tree["posterior"]["weights"] == 0).mean()) > 0.3 > float((tree["unrefined"]["weights"] == 0).mean())
    assert main([*refine[:3], "nothing", *refine[4:]]) == 2
    assert "nothing is neither a file nor one of the priors" in capsys.readouterr().err


def test_a_prior_is_not_for_a_posterior_of_one_gain(posteriors, tmp_path, capsys):
    told = str(tmp_path / "told.nc")
    infer = ["infer", str(posteriors["cube"]), "--network", "1", "--draws", "4", "--predictive-draws", "0"]
    assert main([*infer, "--gain", "1.5", "--out", told]) == 0
    assert main(["refine", told, "--prior", "sparse", "--out", str(tmp_path / "refined.nc")]) == 2
    error = capsys.readouterr().err
    assert "told.nc was inferred with the gain 1.5; infer it without a gain" in error and error.count("\n") == 1
