"""The noise: Philox against its published vectors, normals against their definition in plain Python and in law."""

import math

import numpy as np
import pytest
import scipy.stats
import torch

from neurosde import BrownianPath, RateSDE, philox, sdeint
from neurosde.brownian import as_generator, as_seed
from neurosde.philox import normals, philox4x32

D = torch.float64
ONES = 2**32 - 1
PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0)  # digits of π

# Random123's kat_vectors (github.com/DEShawResearch/random123): rounds, counter and key, output.
KNOWN = [
    (7, (0,) * 6, "5f6fb709 0d893f64 4f121f81 4f730a48"),
    (7, (ONES,) * 6, "5207ddc2 45165e59 4d8ee751 8c52f662"),
    (7, PI, "4dfccaba 190a87f0 c47362ba b6b5242a"),
    (10, (0,) * 6, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    (10, (ONES,) * 6, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (10, PI, "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def by_hand(key, t, e):
    """z[t, e] under a key from the definition in the module's docstring, in Python's own integers."""
    group, within = divmod(e, 64)
    p, lane = divmod(within, 16)
    call = 16 * group + lane
    x = [call % 2**32, call // 2**32, t % 2**32, 0]
    k = [key % 2**32, key % 2**64 // 2**32]
    for _ in range(7):
        a, b = 0xD2511F53 * x[0], 0xCD9E8D57 * x[2]
        x = [b // 2**32 ^ x[1] ^ k[0], b % 2**32, a // 2**32 ^ x[3] ^ k[1], a % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    of_radius, of_angle = x[:2] if p < 2 else x[2:]
    radius = math.sqrt(-2 * math.log((of_radius // 2 + 0.5) / 2**31))
    angle = math.pi * (of_angle - 2**32 * (of_angle >= 2**31)) / 2**31
    return radius * (math.cos(angle), math.sin(angle))[p % 2]


def keys(*values):
    return torch.tensor(values, dtype=torch.int64)


def draw(key, steps, count, **options):
    return normals(keys(key), steps, count, **options)[:, 0]


@pytest.mark.parametrize(("rounds", "words", "expected"), KNOWN)
def test_known_answers(rounds, words, expected):
    counter = tuple(torch.tensor([w, 0]) for w in words[:4])  # the second call is another one
    output = philox4x32(counter, words[4:], rounds)
    assert " ".join(f"{int(word[0]):08x}" for word in output) == expected
    as_tensors = philox4x32(counter, (torch.tensor(words[4]), torch.tensor(words[5])), rounds)
    assert all(torch.equal(one, other) for one, other in zip(output, as_tensors, strict=True))


@pytest.mark.parametrize("first", [0, 37, 2**34 - 100, 2**40 + 5, (0, 100_000, 2**34 - 3)])
@pytest.mark.parametrize("start", [0, 2**32 - 2])
def test_definition(first, start):
    """Also where a counter word carries into the next (2³⁴ elements), or starts anew (2³² steps)."""
    key = (0, -3, 0x0123456789ABCDEF)
    firsts = first if isinstance(first, tuple) else (first,) * 3
    z = normals(keys(*key), 3, 150, first=keys(*first) if isinstance(first, tuple) else first, start=start, dtype=D)
    expected = [
        [[by_hand(k, start + t, f + i) for i in range(150)] for k, f in zip(key, firsts, strict=True)] for t in range(3)
    ]
    torch.testing.assert_close(z, torch.tensor(expected, dtype=D), rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, D])
def test_a_part_is_a_slice_of_the_whole(dtype):
    whole = normals(keys(5, 6), 40, 1000, dtype=dtype)
    for first, start, steps, count in ((0, 0, 40, 1), (1, 3, 9, 999), (64, 39, 1, 64), (500, 0, 40, 129)):
        part = normals(keys(5, 6), steps, count, first=first, start=start, dtype=dtype)
        assert torch.equal(part, whole[start : start + steps, :, first : first + count])
    two = normals(keys(6, 5), 7, 50, first=keys(70, 3), start=2, dtype=dtype)
    assert torch.equal(two, torch.stack([whole[2:9, 1, 70:120], whole[2:9, 0, 3:53]], 1))


@pytest.mark.parametrize(("calls", "per_step"), [(16, 16), (96, 48), (4096, 1024)])
def test_chunks_and_threads_do_not_matter(monkeypatch, calls, per_step):
    arguments = [
        (keys(1), 50, 3000, 0),
        (keys(1), 3, 130_000, 17),
        (keys(*range(30)), 20, 50, 3),
        (keys(*range(30)), 20, 50, keys(*range(0, 3000, 100))),
    ]
    expected = [normals(k, steps, count, first=first) for k, steps, count, first in arguments]
    monkeypatch.setattr(philox, "CALLS", calls)
    monkeypatch.setattr(philox, "CALLS_PER_STEP", per_step)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3 - min(threads, 2))
        for z, (k, steps, count, first) in zip(expected, arguments, strict=True):
            steps, count = min(steps, 5), min(count, 3000)
            assert torch.equal(normals(k, steps, count, first=first), z[:steps, :, :count])
    finally:
        torch.set_num_threads(threads)


def test_every_device_and_the_words_of_numpy_agree_with_torch(monkeypatch):
    """What other devices run, torch on int64, runs on a CPU too."""
    expected = normals(keys(-5, 7), 5, 100, first=2**34 - 50)
    monkeypatch.setattr(philox, "_numpy_works_on", lambda device: False)
    assert torch.equal(normals(keys(-5, 7), 5, 100, first=2**34 - 50), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, D])
def test_cuda_agrees(dtype):
    for k, first in ((keys(3), 0), (keys(1, 2, 3), keys(0, 5, 2**34))):
        there, here = (normals(k, 30, 1000, first=first, dtype=dtype, device=d) for d in ("cuda", "cpu"))
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(there.cpu(), here, rtol=32 * eps, atol=8 * eps)


def test_dtypes_agree_to_rounding():
    """u, the angle and all functions are rounded to 2⁻²⁴ relative; where u is near 1 that moves r by 2⁻²⁴/r."""
    single, double = (draw(1, 100, 64_000, dtype=dtype).unflatten(1, (-1, 2, 2, 16)) for dtype in (torch.float32, D))
    radius = double.norm(dim=3, keepdim=True)  # cosine and sine of one radius
    error = (single.double() - double).abs()
    # r: rounding of u (twice) and of its logarithm; angle: up to π, rounded twice, turns z by that much.
    bound = 2.0**-24 * (4 / radius + (4 + 2 * math.pi) * radius)
    assert bool((error < bound).all())
    assert error.max() > 1e-8  # they are two computations
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(draw(1, 10, 70, dtype=dtype), draw(1, 10, 70).to(dtype))


@pytest.fixture(scope="module")
def ten_million():
    return draw(0, 100, 100_000, dtype=torch.float32).double().flatten()


def test_normal_law(ten_million):
    assert scipy.stats.kstest(ten_million.numpy(), "norm").pvalue > 1e-3
    n = len(ten_million)
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)):
        assert float((ten_million**power).mean()) == pytest.approx(moment, abs=4 * math.sqrt(variance / n)), power


@pytest.mark.parametrize("sigmas", [4, 5])
@pytest.mark.parametrize("side", [-1, 1])
def test_tails(ten_million, sigmas, side):
    expected = len(ten_million) * scipy.stats.norm.sf(sigmas)
    low, high = scipy.stats.poisson.ppf([1e-4, 1 - 1e-4], expected)
    assert low <= int((side * ten_million > sigmas).sum()) <= high


def test_keys_steps_and_elements_are_independent():
    """Correlations of neighbours along every axis, of the numbers and of their squares, are sampling noise."""
    z = normals(torch.arange(4), 500, 1024, dtype=D)
    pairs = {
        "keys": (z[:, 1:], z[:, :-1]),
        "steps": (z[1:], z[:-1]),
        **{f"elements {lag}": (z[..., lag:], z[..., :-lag]) for lag in (1, 15, 16, 17, 32, 48, 64)},
        "step and element": (z[1:, :, 1:], z[:-1, :, :-1]),
        "key and its high word": (draw(3, 500, 1024, dtype=D), draw(3 + 2**32, 500, 1024, dtype=D)),
        "sign of the key": (draw(3, 500, 1024, dtype=D), draw(-3, 500, 1024, dtype=D)),
    }
    for name, (a, b) in pairs.items():
        bound = 4 / math.sqrt(a.numel())
        assert abs(float((a * b).mean())) < bound, name
        assert abs(float(((a**2 - 1) * (b**2 - 1)).mean())) / 2 < bound, name
    by_step = torch.corrcoef(z[:, 0, :200])  # every pair of steps: the largest of n Gaussians
    off_diagonal = by_step[~torch.eye(500, dtype=torch.bool)]
    assert off_diagonal.abs().max() < scipy.stats.norm.isf(1e-3 / off_diagonal.numel()) / math.sqrt(200 - 3)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"keys": torch.zeros(2)}, ValueError, "keys must be int64"),
        ({"keys": torch.zeros(2, 2, dtype=torch.int64)}, ValueError, "keys must be int64"),
        ({"first": torch.zeros(3, dtype=torch.int64)}, ValueError, "one for each of the 2 keys"),
        ({"first": -1}, ValueError, "must not be negative"),
        ({"steps": -1}, ValueError, "must not be negative"),
        ({"dtype": torch.int64}, TypeError, "floating"),
    ],
)
def test_errors(options, error, match):
    options = {"keys": keys(1, 2), "steps": 3, "count": 4} | options
    with pytest.raises(error, match=match):
        normals(options.pop("keys"), options.pop("steps"), options.pop("count"), **options)


def test_nothing_to_draw():
    assert normals(keys(1, 2), 0, 4).shape == (0, 2, 4)
    assert normals(keys(), 3, 4).shape == (3, 0, 4)
    assert normals(keys(1), 3, 0).shape == (3, 1, 0)


def test_seeds():
    assert as_seed(7) == 7
    assert as_seed(-1) == as_seed(2**64 - 1) == -1
    assert as_seed(2**70 + 3) == 3
    generator = torch.Generator().manual_seed(0)
    first, second = as_seed(generator), as_seed(generator)
    assert first != second
    assert first == as_seed(torch.Generator().manual_seed(0))
    assert first.bit_length() <= 63 and max(first, second) > 2**40
    torch.manual_seed(3)
    one, two = as_seed(None), as_seed(None)
    torch.manual_seed(3)
    assert (as_seed(None), as_seed(None)) == (one, two)
    for wrong in (True, 1.0, np.float64(1), "1"):
        with pytest.raises(TypeError, match="Generator or an int seed"):
            as_seed(wrong)
        with pytest.raises(TypeError, match="Generator or an int seed"):
            as_generator(wrong)


def test_paths_are_the_normals_of_their_seed():
    path = BrownianPath.sample((2, 3, 5), 4, 0.25, generator=-9, dtype=D)
    assert torch.equal(path.increments, draw(-9, 4, 30, dtype=D).view(4, 2, 3, 5) * 0.5)
    longer = BrownianPath.sample((2, 3, 5), 9, 0.25, generator=-9, dtype=D)
    assert torch.equal(longer.increments[:4], path.increments)
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    one, other = (BrownianPath.sample((3,), 4, 0.1, generator=g).increments for g in generators)
    assert torch.equal(one, other)
    assert not torch.equal(one, BrownianPath.sample((3,), 4, 0.1, generator=generators[0]).increments)


def test_refinement_is_independent_of_the_path_with_the_same_seed():
    """The bridge of a path and that path share a seed here; what the bridge adds must not know the path."""
    coarse = BrownianPath.sample((2000,), 50, 1.0, generator=4, dtype=D)
    once = coarse.refine(2, generator=4)
    twice = once.refine(2, generator=4)
    variance = {"coarse": 1.0, "once": 0.25, "twice": 0.125}  # of half the difference of two halves of a step

    def half_difference(path):
        return (path.increments[::2] - path.increments[1::2]) / 2

    def correlation(a, b, scale):
        return float((a * b).mean()) / math.sqrt(scale) * math.sqrt(a.numel())

    first, second = half_difference(once), half_difference(twice)
    assert float(first.var() / variance["once"]) == pytest.approx(1, abs=4 * math.sqrt(2 / first.numel()))
    assert float(second.var() / variance["twice"]) == pytest.approx(1, abs=4 * math.sqrt(2 / second.numel()))
    assert abs(correlation(first, coarse.increments, variance["once"])) < 4
    for part in (second[:50], second[::2], second[1::2]):
        assert abs(correlation(part, first, variance["once"] * variance["twice"])) < 4
        assert abs(correlation(part, coarse.increments, variance["twice"])) < 4


def test_same_seed_same_path_on_every_engine_and_in_every_dtype():
    generator = torch.Generator().manual_seed(0)
    W, h0 = torch.randn(6, 6, generator=generator, dtype=D) / 3, torch.randn(4, 6, generator=generator, dtype=D)
    ts = torch.arange(21, dtype=D) * 0.1

    def path(engine="torch", dtype=D, seed=0):
        sde = RateSDE(W.to(dtype), noise_std=0.5)
        return sdeint(sde, h0.to(dtype), ts, dt=0.1, engine=engine, generator=seed)

    double = path()
    torch.testing.assert_close(path("torchsde"), double, rtol=1e-12, atol=1e-13)
    # 20 contracting steps, each rounded to a few 2⁻²⁴ of numbers below 4.
    torch.testing.assert_close(path(dtype=torch.float32).double(), double, rtol=0, atol=20 * 4 * 4 * 2.0**-24)
    assert (path(seed=1) - double).abs().max() > 0.1
    of_generators = [path(seed=torch.Generator().manual_seed(5)) for _ in range(2)]
    assert torch.equal(*of_generators)
    shared = torch.Generator().manual_seed(5)
    assert torch.equal(path(seed=shared), of_generators[0])
    assert not torch.equal(path(seed=shared), of_generators[0])
