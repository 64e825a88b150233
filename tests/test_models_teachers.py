"""Denoisers that a prior learns from: what they say, and trainings with them."""

import math
from dataclasses import replace

import pytest
import torch
from problems import D, normal

from neurosde.cli import main
from neurosde.datasets.ensembles import make_ensemble
from neurosde.models import best_denoiser, load_prior
from neurosde.models.teachers import Teachers
from neurosde.models.training import denoising_loss
from neurosde.models.training_config import PosteriorTraining, PriorTraining
from neurosde.models.training_data import training_data
from neurosde.models.training_run import TrainingRun, train_prior

DALE, SPARSE, BLOCK, LOW_RANK = (make_ensemble(name, 2.0, gain=0.8) for name in ("dale", "sparse", "block", "low-rank"))
TAUGHT = PriorTraining(
    ensembles=(SPARSE, DALE), teachers=("exact", "dale"), sizes=(10, 12), preset="tiny", steps=30, batch_entries=1000,
    warmup=5,
)  # fmt: skip
CPU = TrainingRun(accelerator="cpu", log_every=1, validate_every=30)


def test_each_is_asked_about_its_own_ensemble_in_its_own_unit():
    unit, sigma = 1.3, torch.tensor([0.2, 1.0, 3.0, 9.0], dtype=D)
    x, index = normal(4, 10, 10), torch.tensor([1, 0, 0, 1])
    found = Teachers(("exact", "dale"), (SPARSE, DALE), unit, (10, 12)).mean(x, sigma, index)
    torch.testing.assert_close(found[1:3], best_denoiser(SPARSE, unit)(x[1:3], sigma[1:3]))
    prior = load_prior("dale")
    W, s = x[[0, 3]] * unit / math.sqrt(10), sigma[[0, 3]] * unit / math.sqrt(10)
    with torch.no_grad():
        mean = prior.denoiser()(W / prior.scale(10), s / prior.scale(10)) * prior.scale(10)
    torch.testing.assert_close(found[[0, 3]], mean * math.sqrt(10) / unit)


def test_a_trained_teacher_says_what_the_best_denoiser_does():
    """`dale` errs by less than a thousandth of the least error: the two are one target, but for that."""
    data = training_data(replace(TAUGHT, ensembles=(DALE,), teachers=("exact",)))
    J = data.examples({"N": 15, "count": 50}, torch.Generator().manual_seed(0)).J
    sigma = torch.full((50,), 0.8, dtype=D)
    x, index = J + 0.8 * normal(50, 15, 15), torch.zeros(50, dtype=torch.long)
    best, trained = (
        Teachers((name,), (DALE,), data.gain_rms, (15,)).mean(x, sigma, index) for name in ("exact", "dale")
    )
    least = float((best - J).square().mean())
    assert float((best - trained).square().mean()) < 1e-3 * least
    assert float((best - J).square().mean()) < float((x - J).square().mean())


def test_a_training_in_bfloat16_does_not_round_them():
    x, sigma, index = normal(3, 10, 10), torch.tensor([0.2, 1.0, 3.0], dtype=D), torch.zeros(3, dtype=torch.long)
    teachers = Teachers(("dale",), (DALE,), 1.3, (10,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = teachers.mean(x, sigma, index)
    torch.testing.assert_close(found, teachers.mean(x, sigma, index), rtol=1e-6, atol=1e-6)


def test_a_training_without_them_is_what_it_was_before_there_were_any():
    assert TAUGHT.contents()["teachers"] == ["exact", "dale"]
    assert "teachers" not in replace(TAUGHT, teachers=()).contents()


def test_the_loss_is_about_what_the_teacher_says():
    """Of a network that says what its teacher does nothing is left of the loss; of any other it is the distance."""
    config = replace(TAUGHT, ensembles=(DALE,), teachers=("dale",))
    data = training_data(config)
    examples = data.examples({"N": 10, "count": 20}, torch.Generator().manual_seed(0))
    sigma, teachers = torch.full((20,), 0.8, dtype=D), Teachers(("dale",), (DALE,), data.gain_rms, (10,))
    networks = load_prior("dale").network, load_prior("sparse").network
    with torch.no_grad():
        taught, other = (
            denoising_loss(network, examples, sigma, torch.Generator().manual_seed(1), teachers)[0]
            for network in networks
        )
    assert float(taught.max()) < 1e-3 * float(other.min())


def test_a_training_with_teachers(tmp_path, monkeypatch):
    asked, mean = [], Teachers.mean

    def noted(self, x, sigma, ensemble):
        asked.append(len(x))
        return mean(self, x, sigma, ensemble)

    monkeypatch.setattr(Teachers, "mean", noted)
    prior = train_prior(TAUGHT, tmp_path / "prior", CPU)
    assert len(asked) == 30  # each step, and no validation
    assert prior.config.training["teachers"] == ["exact", "dale"] and prior.families == ("sparse", "dale")
    rows = (tmp_path / "prior" / "log" / "version_0" / "metrics.csv").read_text().splitlines()
    column = rows[0].split(",").index("loss")
    losses = [float(row.split(",")[column]) for row in rows[1:] if row.split(",")[column]]
    assert len(losses) == 30 and sum(losses[-5:]) < sum(losses[:5])


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"teachers": ("exact",)}, "one for each of the 2 ensembles, in their order; got"),
        ({"teachers": ("exact", "sparse")}, "sparse was trained on .*'sparse'.*, and is to teach .*'dale'"),
        ({"ensembles": (BLOCK,), "teachers": ("exact",)}, "gaussian, sparse, dale; got block. Give a trained prior"),
        ({"ensembles": (LOW_RANK,), "teachers": ("exact",)}, "gaussian, sparse, dale; got low-rank. Give a trained"),
        ({"sizes": (4, 10)}, "dale was trained with 10 to 100 neurons, and is to teach of 4 to 10; choose N"),
        ({"ensembles": (make_ensemble("dale", 3.0, gain=0.8),), "teachers": ("dale",)}, "is to teach .*3.0"),
    ],
)
def test_teachers_that_will_not_do(changes, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        train_prior(replace(TAUGHT, **changes), tmp_path / "prior", CPU)
    assert not list((tmp_path / "prior").glob("*.safetensors"))


def test_what_teachers_are_not_for(tmp_path, capsys):
    with pytest.raises(ValueError, match="give --ensemble in place of --dataset"):
        PriorTraining(dataset=("cube.nc",), teachers=("exact",))
    with pytest.raises(ValueError, match="teachers know no recordings"):
        PosteriorTraining(teachers=("exact",))
    out = str(tmp_path / "prior")
    assert main(["train", "prior", "--out", out, "--ensemble", "sparse", "--teachers", "missing"]) == 2
    assert "missing" in capsys.readouterr().err
