"""Laws and values of FAR, each against an independent formula, library or brute force. Run: pytest

    python test_far.py --blank low_pass,kv_cache > far_student.py      # far.py with the exercises' bodies left out
    FAR_MODULE=far_student pytest test_far.py -k exercise              # grades it
"""
import argparse
import ast
import contextlib
import csv
import dataclasses
import functools
import importlib
import itertools
import json
import math
import os
import pathlib
import pickle
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import scipy.fft
import scipy.integrate
import scipy.linalg
import scipy.stats
import torch
from PIL import Image

import far
import sample
import train_cifar
from far import (FAR, FARConfig, ORDERINGS, PAPER_LEVELS, DiffusionHead, Path, block_causal_mask, check_ordering, couple_noise,
                 head_step_schedule, loss_weights, mask_bounds, masked_share, patchify, unpatchify)

ROOT = os.path.dirname(os.path.abspath(__file__))
SCHEDULES, PREDICTIONS, SOLVERS = ("linear", "cosine"), ("v", "eps"), ("ddpm", "ddim", "dpmpp_2m")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def tiny(seed=0, **settings):
    """A small model whose weights are all random, so that nothing is hidden by zero initialisation."""
    torch.manual_seed(seed)
    settings = {**dict(patch_size=2, width=16, depth=2, heads=2, head_width=16, head_depth=2, head_steps=3), **settings}
    model = FAR(FARConfig.preset("digits", **settings)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


CAUSAL = dict(attention="causal", levels_per_image=0, cond_tokens=2)

# ---------------------------------------------------------------------------------------------------------------------
# Orderings


@pytest.mark.parametrize("name, sizes", [("fourier", (7, 8, 16)), ("dct", (7, 8, 16)), ("raster", (7, 8, 16)), ("shuffle", (7, 8, 16)), ("haar", (8, 16, 32))])
def test_ordering_laws(name, sizes):
    for size in sizes:
        assert check_ordering(ORDERINGS[name], size) == []
        assert check_ordering(lambda x, k: far.fourier(x, k, disc=True), size) == []


@pytest.mark.parametrize("name", ORDERINGS)
@pytest.mark.parametrize("size", [7, 8])
def test_keep_0_and_1_are_exact(name, size):
    x = torch.randn(2, 3, size, size)
    assert torch.equal(ORDERINGS[name](x, 1.0), x) and not ORDERINGS[name](x, 0.0).any()


@pytest.mark.parametrize("law, fn", [
    ("zero at 0", lambda x, k: far.dct(x, max(k, 0.125))),
    ("identity at 1", lambda x, k: far.dct(x, min(k, 0.875))),
    ("linear", lambda x, k: far.dct(x, k).abs() if 0 < k < 1 else far.dct(x, k)),
    ("idempotent", lambda x, k: k * x),
    ("nested", lambda x, k: x if k == 1 else x * (torch.rand(8, 8, generator=seeded(int(1000 * k))) < k)),
    ("shape", lambda x, k: x[..., 1:]),
    ("shape: [2, 3, 8, 8] becomes [2, 3, 8, 4] at keep 0.25", lambda x, k: x[..., :4] if k == 0.25 else far.dct(x, k))])
def test_check_ordering_names_the_broken_law(law, fn):
    assert any(line.startswith(law) for line in check_ordering(fn, 8))


def test_an_ordering_may_write_into_its_input(monkeypatch):
    def rows(x, keep):
        x[:, :, math.ceil(keep * x.shape[2]):] = 0
        return x
    assert check_ordering(rows, 8) == [] and [line.split(":")[0] for line in check_ordering(lambda x, k: rows(x, k).mul_(k), 8)] == ["idempotent", "nested"]
    monkeypatch.setitem(ORDERINGS, "rows", rows)
    monkeypatch.setitem(ORDERINGS, "copied", lambda x, keep: rows(x.clone(), keep))
    images, results = torch.randn(4, 1, 8, 8), []
    before = images.clone()
    for name in ("rows", "copied"):
        model = tiny(ordering=name, target="residual", step_rule="locked")
        torch.manual_seed(1)
        results.append((model.level_losses(images, torch.arange(4)), model.sample(4, known=(images, 1), generator=seeded())))
    assert all(torch.equal(a, b) for a, b in zip(*results)) and torch.equal(images, before)


def test_an_ordering_may_compute_in_double_precision(monkeypatch):
    monkeypatch.setitem(ORDERINGS, "double", lambda x, keep: far.dct(x.double(), keep))
    for target in ("full", "next"):
        assert torch.allclose(*(tiny(ordering=name, target=target).sample(torch.arange(3), generator=seeded()) for name in ("double", "dct")), atol=1e-4)


@pytest.mark.parametrize("H", [5, 8])
@pytest.mark.parametrize("keep", [0.2, 0.5, 0.75, 0.8])
def test_fourier_is_the_explicit_dft_sum(H, keep):
    """sum over |f_x|, |f_y| <= keep H/2 of the DFT coefficients, written out without an FFT."""
    x = torch.randn(1, 1, H, H, dtype=torch.float64)
    n, want = np.arange(H), np.zeros((H, H), complex)
    frequencies = range(-(H // 2), (H - 1) // 2 + 1)
    for fy in frequencies:
        for fx in frequencies:
            if max(abs(fy), abs(fx)) <= keep * H / 2:
                wave = np.exp(2j * np.pi * (fy * n[:, None] + fx * n) / H)
                want += (x[0, 0].numpy() * wave.conj()).sum() * wave / H ** 2
    np.testing.assert_allclose(far.fourier(x, keep)[0, 0], want.real, atol=1e-10)


def test_fourier_disc_keeps_a_disc():
    H, n = 16, torch.arange(16)
    for fy, fx in [(2, 3), (3, 3), (4, 0), (1, 4)]:  # radius sqrt(13), sqrt(18), 4, sqrt(17) against 4
        wave = torch.cos(2 * math.pi * (fy * n[:, None] + fx * n) / H)[None, None]
        assert torch.allclose(far.fourier(wave, 0.5, disc=True), wave if math.hypot(fy, fx) <= 4 else 0 * wave, atol=1e-5)


@pytest.mark.parametrize("H", [5, 8, 100])
@pytest.mark.parametrize("keep", [0.07, 0.25, 0.5, 0.58])
def test_dct_against_scipy(H, keep):
    x = torch.randn(2, 3, H, H, dtype=torch.float64)
    coefficients = scipy.fft.dctn(x.numpy(), axes=(2, 3), norm="ortho")
    kept = np.arange(H) < round(keep * H, 9)
    want = scipy.fft.idctn(coefficients * kept[:, None] * kept, axes=(2, 3), norm="ortho")
    np.testing.assert_allclose(far.dct(x, keep), want, atol=1e-10)


def test_resize_is_area_down_and_bicubic_up():
    x = torch.randn(1, 2, 8, 8)
    means = x.view(1, 2, 2, 4, 2, 4).mean((3, 5))                               # areas of 4 x 4 at k = 2
    image = torch.nn.functional.interpolate(means, size=(8, 8), mode="bicubic")
    assert torch.allclose(ORDERINGS["resize"](x, 0.25), image, atol=1e-6)
    assert torch.allclose(ORDERINGS["resize"](x, 0.01), x.mean((2, 3), keepdim=True).expand_as(x), atol=1e-6)  # k >= 1
    broken = " ".join(check_ordering(ORDERINGS["resize"], 8))                   # only nearly a projection
    assert "idempotent" in broken and "nested" in broken and "linear" not in broken and "at 0" not in broken and "at 1" not in broken


@pytest.mark.parametrize("keep, kept", [(1 / 8, [(0, 0)]), (0.15, [(0, 0)]), (1 / 6, [(0, 0), (0, 1)]), (5 / 24, [(0, 0), (0, 1), (1, 0)]), (0.25, [(0, 0), (0, 1), (1, 0), (1, 1)]),
                                        (1 / 3, [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2)]), (2 / 3, [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (2, 0), (2, 2), (1, 2), (2, 1), (0, 3), (1, 3), (2, 3)])])
def test_haar_is_the_projection_on_wavelet_subbands(keep, kept):
    """The orthonormal Haar basis by its recursion; bands 0 .. 3 of a side of 8 hold 1, 1, 2 and 4 wavelets. A subband is (band down, band across)."""
    W = np.ones((1, 1))
    while len(W) < 8:
        W = np.concatenate([np.kron(W, [1, 1]), np.kron(np.eye(len(W)), [1, -1])]) / math.sqrt(2)
    band = np.array([0, 1, 2, 2, 3, 3, 3, 3])
    if keep == 1 / 3:                                                           # details across of the next octave: bands 0 and 1 down
        kept = kept + [(1, 2)]
    mask = np.array([[(down, across) in kept for across in band] for down in band])
    x = torch.randn(1, 2, 8, 8, dtype=torch.float64)
    np.testing.assert_allclose(far.haar(x, keep), W.T @ ((W @ x.numpy() @ W.T) * mask) @ W, atol=1e-10)
    with pytest.raises(ValueError, match="side 7"):
        far.haar(torch.zeros(1, 1, 7, 7), keep)


def test_blur_is_gaussian_in_the_dct_and_breaks_two_laws():
    x, k = torch.randn(2, 3, 9, 9, dtype=torch.float64), np.arange(9)
    gain = 0.5 ** ((k / (0.4 * 9)) ** 2)                                        # 1/2 at the cutoff of the sharp filter
    want = scipy.fft.idctn(scipy.fft.dctn(x.numpy(), axes=(2, 3), norm="ortho") * gain[:, None] * gain, axes=(2, 3), norm="ortho")
    np.testing.assert_allclose(far.blur(x, 0.4), want, atol=1e-6)                # the gain is float32
    assert [line.split(":")[0] for line in check_ordering(far.blur, 8)] == ["idempotent", "nested"]


def test_raster_and_shuffle_show_whole_rows_and_cells():
    x = torch.randn(1, 1, 16, 16)
    assert torch.equal(far.raster(x, 0.3)[:, :, :5], x[:, :, :5]) and not far.raster(x, 0.3)[:, :, 5:].any()     # ceil(0.3 * 16) = 5
    assert far.raster(x, 0.25)[0, 0, :, 0].count_nonzero() == 4
    orders = []
    for n in range(65):
        cells = (far.shuffle(x, n / 64) != 0).view(8, 2, 8, 2).permute(0, 2, 1, 3).flatten(2)                    # [8, 8, pixels of a cell]
        assert torch.equal(cells.all(2), cells.any(2)) and cells.all(2).sum() == n
        orders.append(cells.all(2))
    new = [(b & ~a).flatten().nonzero().item() for a, b in zip(orders, orders[1:])]                              # which cell each step adds
    assert sorted(new) == list(range(64)) and abs(np.corrcoef(new, range(64))[0, 1]) < 0.3
    small = far.shuffle(torch.ones(1, 1, 8, 8), 20 / 64)[0, 0] != 0
    assert torch.equal(small, orders[20])                                       # the same order at every size and call


# ---------------------------------------------------------------------------------------------------------------------
# Tokens, masks, schedules over levels


def test_patchify_by_brute_force():
    x, p = torch.randn(2, 3, 6, 6), 2
    tokens = patchify(x, p)
    for row in range(3):
        for column in range(3):
            assert torch.equal(tokens[:, 3 * row + column], x[:, :, 2 * row:2 * row + 2, 2 * column:2 * column + 2].flatten(1))
    assert torch.equal(unpatchify(tokens, p, 3), x)


def test_block_causal_mask_by_brute_force():
    for markov in (False, True):
        mask = block_causal_mask(3, 4, markov)
        assert mask.dtype == torch.bool and mask.shape == (12, 12)
        for q in range(12):
            for k in range(12):
                assert mask[q, k] == (q // 4 == k // 4 if markov else q // 4 >= k // 4)


def test_loss_weights_mask_bounds_and_head_steps():
    np.testing.assert_allclose(loss_weights(3), [1.5, 1 + math.sqrt(3) / 2, 2], rtol=1e-6)
    np.testing.assert_allclose(mask_bounds(4, "text"), [0.7, 0.525, 0.35, 0.175], rtol=1e-6)
    np.testing.assert_allclose(mask_bounds(4, "reference"), [0, 0.175, 0.35, 0.525], rtol=1e-6)
    assert head_step_schedule(4) == [40, 60, 80, 100] and sum(head_step_schedule(10)) == 700 and head_step_schedule(1) == [100]
    assert head_step_schedule(3, 2, 4) == [2, 3, 4]


@pytest.mark.parametrize("lower", [0.0, 0.35, 0.7])
def test_masked_share_is_a_truncated_gaussian(lower):
    torch.manual_seed(0)
    share = masked_share(torch.full((20000,), lower)).numpy()
    want = scipy.stats.truncnorm((lower - 1) / 0.25, 0, loc=1, scale=0.25)
    assert lower <= share.min() and share.max() <= 1 and scipy.stats.kstest(share, want.cdf).pvalue > 1e-3


# ---------------------------------------------------------------------------------------------------------------------
# Transformer


def z_of_levels(model, blocks, cond):
    """z of all levels as in training: causal attention in one pass, markov a level at a time."""
    if model.config.attention == "causal":
        return model.transformer(blocks, 0, cond)
    return [model.transformer([block], i, cond)[0] for i, block in enumerate(blocks)]


@pytest.mark.parametrize("settings", [CAUSAL, dict(CAUSAL, cond_tokens=0), dict(CAUSAL, patch_size=(8, 4, 2)), dict(attention="markov", levels_per_image=0, cond_tokens=2)])
def test_a_level_never_sees_a_later_one(settings):
    model = tiny(**settings)
    blocks, cond = [torch.randn(2, N, D) for N, D in zip(model.config.num_tokens, model.config.token_dim)], model.condition(torch.tensor([3, 5]), 2)
    run = lambda blocks: z_of_levels(model, blocks, cond)
    for j in range(3):
        changed = [block + (i == j) for i, block in enumerate(blocks)]
        difference = torch.stack([(a - b).abs().max() for a, b in zip(run(changed), run(blocks), strict=True)])
        assert not difference[:j].any() and difference[j] > 1e-3
        assert (difference[j + 1:] > 1e-4).all() if settings["attention"] == "causal" else not difference[j + 1:].any()


@pytest.mark.parametrize("settings", [CAUSAL, dict(CAUSAL, cond_tokens=0), dict(CAUSAL, patch_size=(4, 2, 2)), dict(CAUSAL, cond_dim=5)])
def test_cached_sampling_equals_the_uncached_pass(settings):
    model = tiny(**settings)
    labels = torch.randn(2, 2, 5) if "cond_dim" in settings else torch.tensor([3, 5])
    blocks, cond = [torch.randn(2, N, D) for N, D in zip(model.config.num_tokens, model.config.token_dim)], torch.cat([model.condition(labels[:1], 1), model.condition(None, 1)])
    z, cache = model.transformer(blocks, 0, cond), [{}, {}]
    for i in range(3):
        assert torch.allclose(model.transformer(blocks[i:i + 1], i, cond, cache)[0], z[i], atol=1e-5)


def test_positions_of_a_coarse_grid_are_means_of_the_fine_one():
    model = tiny(patch_size=(8, 4, 2))
    p = model.transformer.position.view(4, 4, 16)
    for i, want in enumerate((p.mean((0, 1))[None], p.view(2, 2, 2, 2, 16).mean((1, 3)).view(4, 16), p.view(16, 16))):
        tokens = torch.randn(3, model.config.num_tokens[i], model.config.token_dim[i])
        rest = model.transformer.input[str(tokens.shape[2])](tokens) + model.transformer.level.weight[i]
        assert torch.allclose(model.transformer.embed(tokens, i, torch.zeros(3, 1, 16)), rest + want, atol=1e-5)


def test_sincos_positions_by_hand():
    """Row and column as sines and cosines; the inner product of two places depends on their distance alone."""
    e = far.sincos_2d(5, 16)
    for place in range(25):
        for k in range(4):
            for part, value in ((0, place // 5), (8, place % 5)):
                assert e[place, part + k].item() == pytest.approx(math.sin(value * 100 ** (-k / 4)), abs=1e-5)
                assert e[place, part + 4 + k].item() == pytest.approx(math.cos(value * 100 ** (-k / 4)), abs=1e-5)
    product = (e @ e.T).view(5, 5, 5, 5)
    assert torch.allclose(product[:4, :4, :4, :4], product[1:, 1:, 1:, 1:], atol=1e-5) and (product < product[0, 0, 0, 0] + 1e-5).all()


def test_every_condition_token_position_and_level_matters():
    model = tiny(**CAUSAL)
    run = lambda: torch.cat(model.transformer([torch.zeros(1, 16, 4)] * 3, 0, model.condition(torch.tensor([3]), 1)))
    before = run()
    for parameter in (model.transformer.cond_position, model.transformer.position, model.transformer.level.weight):
        for row in range(len(parameter)):
            with torch.no_grad():
                old, parameter[row] = parameter[row].clone(), torch.randn(16)
                assert (run() - before).abs().max() > 1e-4
                parameter[row] = old


@pytest.mark.parametrize("name, millions", [("far_b", 172), ("far_l", 406), ("far_h", 791)])
def test_preset_sizes(name, millions):
    with torch.device("meta"):
        model = FAR(FARConfig.preset(name))
    assert sum(p.numel() for p in model.transformer.parameters()) == pytest.approx(millions * 1e6, rel=0.02)


def test_paper_presets():
    for name in far.PRESETS:
        c = FARConfig.preset(name, paper=True)
        assert (c.head_mixing, c.target, c.prediction, c.schedule, c.solver, c.head_steps) == (False, "full", "eps", "cosine", "ddpm", "paper")
        assert (c.temperature, c.mask, c.loss_weighting, c.time_shift, c.head_draws, c.patch_size) == ("paper", "text", True, 1, 4, 1 if name.startswith("far") else 4)
        assert c.levels == PAPER_LEVELS == (0.125, 0.1875, 0.25, 0.3125, 0.375, 0.4375, 0.5, 0.5625, 0.625, 1.0) and c.attention == "causal" and c.ordering == FARConfig.preset(name).ordering
    assert FARConfig.from_dict(c.to_dict()) == c and FARConfig.preset("digits", paper=True, width=32).width == 32


# ---------------------------------------------------------------------------------------------------------------------
# Diffusion path and samplers


def gaussian_denoiser(path, mean, std):
    """Exact prediction for data N(mean, std^2), from Bayes' rule."""
    def network(x_t, t):
        alpha, sigma, dx, deps = path(t)
        x = mean + alpha * std ** 2 / (alpha ** 2 * std ** 2 + sigma ** 2) * (x_t - alpha * mean)
        eps = (x_t - alpha * x) / sigma.clamp(min=1e-6)
        return eps if path.prediction == "eps" else dx * x + deps * eps
    return network


def two_point_denoiser(path, a):
    """Exact prediction for data that is -a or a, each with probability 1/2."""
    def network(x_t, t):
        alpha, sigma, dx, deps = path(t)
        x = a * torch.tanh(alpha * a * x_t / sigma ** 2)
        eps = (x_t - alpha * x) / sigma
        return eps if path.prediction == "eps" else dx * x + deps * eps
    return network


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedule_formulas(schedule):
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    alpha, sigma, dx, deps = Path(schedule, "v")(t)
    if schedule == "linear":
        np.testing.assert_allclose(alpha, 1 - t), np.testing.assert_allclose(sigma, t)
    else:
        f = lambda s: np.cos((s + 0.008) / 1.008 * np.pi / 2) ** 2
        np.testing.assert_allclose(alpha ** 2, f(t.numpy()) / f(0)), np.testing.assert_allclose(alpha ** 2 + sigma ** 2, np.ones(50))
    slope = lambda y: torch.gradient(y, spacing=(t,), edge_order=2)[0]           # the velocity points along the path
    np.testing.assert_allclose((dx * slope(sigma))[1:-1], (deps * slope(alpha))[1:-1], rtol=0.05)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_denoise_inverts_noise(schedule, prediction):
    path, x, eps, t = Path(schedule, prediction), torch.randn(5, 4), torch.randn(5, 4), torch.rand(5, 1) * 0.9 + 0.02
    x_t, target = path.noise(x, eps, t)
    assert torch.allclose(path.denoise(x_t, target, t), x, atol=1e-4)
    want = {"eps": eps, "v": eps - x if schedule == "linear" else path(t)[0] * eps - path(t)[1] * x}[prediction]
    assert torch.allclose(target, want)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_samplers_reproduce_known_distributions(schedule, prediction, solver):
    path, g, n = Path(schedule, prediction), seeded(), 40000
    draw = lambda x: torch.randn(x.shape, generator=g, dtype=x.dtype)
    x = path.sample(gaussian_denoiser(path, 0.5, 0.3), torch.randn(n, 1, generator=g, dtype=torch.float64), 300, solver, draw=draw)
    assert x.mean().item() == pytest.approx(0.5, abs=0.01) and x.std().item() == pytest.approx(0.3, rel=0.03)
    x = path.sample(two_point_denoiser(path, 0.8), torch.randn(n, 1, generator=g, dtype=torch.float64), 300, solver, draw=draw)
    assert x.mean().item() == pytest.approx(0, abs=0.02) and (x.abs() - 0.8).abs().quantile(0.99).item() < 0.05


@pytest.mark.parametrize("schedule, steps", [("linear", 150), ("cosine", 30)])
@pytest.mark.parametrize("solver, order", [("ddim", 1), ("dpmpp_2m", 2)])
def test_order_of_convergence(schedule, steps, solver, order):
    """Halving the step divides the error by 2^order against the exact flow of a Gaussian: quantiles keep their place."""
    path, noise = Path(schedule, "v"), torch.linspace(-2, 2, 101, dtype=torch.float64)[:, None]
    alpha, sigma, *_ = path(torch.tensor(0.999, dtype=torch.float64))
    exact = 0.5 + 0.3 * (noise - alpha * 0.5) / (alpha ** 2 * 0.09 + sigma ** 2).sqrt()
    error = [(path.sample(gaussian_denoiser(path, 0.5, 0.3), noise, n, solver) - exact).abs().mean().item() for n in (steps, 2 * steps)]
    assert 1.7 < error[0] / error[1] < 2.3 if order == 1 else error[0] / error[1] > 3.2


def test_temperature_scales_the_noise():
    path, noise = Path("linear", "v"), torch.randn(20000, 1, generator=seeded(), dtype=torch.float64)
    for solver in SOLVERS:
        spread = [path.sample(gaussian_denoiser(path, 0.5, 0.3), noise, 100, solver, temperature=T).std().item() for T in (1.0, 0.5, 0.0)]
        assert spread[1] == pytest.approx(0.5 * spread[0], rel=0.02) and spread[2] < 1e-6


def test_cosine_schedule_and_ancestral_step_against_diffusers():
    """1000-step squared-cosine DDPM of an independent library: signal levels, and mean and variance of one ancestral step."""
    from diffusers import DDPMScheduler
    theirs = DDPMScheduler(1000, beta_schedule="squaredcos_cap_v2", prediction_type="epsilon", clip_sample=False, variance_type="fixed_small")
    path = Path("cosine", "eps")
    t = (torch.arange(1000, dtype=torch.float64) + 1) / 1000
    np.testing.assert_allclose(path(t[:-1])[0] ** 2, theirs.alphas_cumprod[:-1], rtol=1e-3, atol=1e-7)
    for n in (900, 500, 50):
        x, eps, a, b = torch.randn(6, 1, dtype=torch.float64), torch.randn(6, 1, dtype=torch.float64), t[n], t[n - 1]
        mean, deviation = path.step(x, path.denoise(x, eps, a), a, b, ancestral=True)
        noise = torch.randn(6, 1, dtype=torch.float64, generator=seeded())      # the noise that theirs draws
        np.testing.assert_allclose(mean + deviation * noise, theirs.step(eps, n, x, generator=seeded()).prev_sample, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(deviation ** 2, theirs._get_variance(n), rtol=2e-3)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("mixing, shift", [(False, 1), (True, 1), (True, 0.4)])
def test_loss_of_an_exact_denoiser_is_its_minimum(schedule, prediction, mixing, shift, monkeypatch):
    """For data N(0, s^2): E Var(v | x_t) = E s^2 / (alpha^2 s^2 + sigma^2), or alpha^2 s^2 / (..) for eps, over the training times."""
    torch.manual_seed(0)
    s, config = 0.7, FARConfig.preset("digits", schedule=schedule, prediction=prediction, head_mixing=mixing, head_draws=4, time_shift=shift)
    head = DiffusionHead(config)
    monkeypatch.setattr(head, "forward", lambda x_t, t, cond: gaussian_denoiser(head.path, 0.0, s)(x_t, t[..., None]))
    loss = head.loss(s * torch.randn(4000, 4, 16), torch.randn(16000, 4, 16), torch.zeros(4000, 4, 128), 0, torch.zeros(4000, 1, 128))
    assert loss.shape == (4000,)

    def floor(t):
        alpha, sigma, *_ = (v.item() for v in head.path(torch.tensor(t, dtype=torch.float64)))
        return (alpha ** 2 if prediction == "eps" else 1) * s ** 2 / (alpha ** 2 * s ** 2 + sigma ** 2)
    shifted = lambda odds: floor(shift * odds / (1 + shift * odds))             # odds t / (1 - t)
    expected = scipy.integrate.quad(lambda u: shifted(math.exp(u)) * scipy.stats.norm.pdf(u), -8, 8)[0] if schedule == "linear" else scipy.integrate.quad(lambda t: shifted(t / (1 - t)), 0, 1)[0]
    assert loss.mean().item() == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("settings", [CAUSAL, dict(levels_per_image=1), dict(levels_per_image=2, head_mixing=False)])
def test_each_level_trains_at_its_own_times(settings, monkeypatch):
    """Odds t / (1 - t) of 1/4 become 0.35, 1 and 2.5 times as high at the three levels, for every draw of theirs; sampling keeps its times."""
    model, levels, odds = tiny(time_shift=[0.35, 1.0, 2.5], head_draws=2, patch_size=(4, 2, 4), **settings), [], []
    monkeypatch.setattr(far.Path, "draw_t", lambda self, *shape, device=None: torch.full(shape, 0.2))
    project, noise = model.head.project, model.head.path.noise
    monkeypatch.setattr(model.head, "project", lambda z, i, cond: levels.append(i) or project(z, i, cond))
    monkeypatch.setattr(model.head.path, "noise", lambda x, eps, t: odds.append(t[:, 0, 0] / (1 - t[:, -1, 0])) or noise(x, eps, t))
    model(torch.randn(12, 1, 8, 8), torch.arange(12) % 10)
    level = torch.cat(levels).repeat_interleave(2)
    assert set(level.tolist()) == {0, 1, 2} and torch.allclose(torch.cat(odds), 0.25 * torch.tensor([0.35, 1.0, 2.5])[level])
    x = model.sample(2, generator=seeded())
    model.head.time_shift.fill_(1)
    assert torch.equal(model.sample(2, generator=seeded()), x)


# ---------------------------------------------------------------------------------------------------------------------
# Diffusion head


@pytest.mark.parametrize("mixing", [True, False])
def test_a_mixing_head_sees_its_own_level_and_no_other(mixing):
    model = tiny(head_mixing=mixing)
    x, z, t = torch.randn(3, 16, 4), torch.randn(3, 16, 16), torch.full((3, 1 if mixing else 16), 0.4)
    run = lambda x, z: model.head(x, t, model.head.project(z, 1, torch.ones(3, 1, 16)))
    for changed in ((x.index_add(0, torch.tensor([1]), torch.nn.functional.pad(torch.ones(1, 1, 4), (0, 0, 5, 10))), z),
                    (x, z.index_add(0, torch.tensor([1]), torch.nn.functional.pad(torch.ones(1, 1, 16), (0, 0, 5, 10))))):
        difference = (run(*changed) - run(x, z)).abs().amax(-1)                 # [3 sequences, 16 tokens]; token 5 of sequence 1 changed
        assert not difference[[0, 2]].any() and difference[1, 5] > 1e-4
        others = torch.cat([difference[1, :5], difference[1, 6:]])
        assert (others > 1e-6).all() if mixing else not others.any()


def test_head_depends_on_time_level_label_and_z():
    model = tiny()
    x, z, t, i = torch.randn(1, 16, 4), torch.randn(1, 16, 16), torch.tensor([[0.4]]), 1
    run = lambda z, t, i, label=torch.ones(1, 1, 16): model.head(x, t, model.head.project(z, i, label))
    for other in (run(z + 1, t, i), run(z, t + 0.1, i), run(z, t, i + 1), run(z, t, i, torch.randn(1, 2, 16))):
        assert (other - run(z, t, i)).abs().max() > 1e-4


def test_levels_share_the_head_s_blocks_where_their_patches_have_one_size():
    """And the positions: what is learned for a size moves the levels of that size, all of them and no others."""
    model, tokens = tiny(patch_size=(4, 2, 4)), {"16": torch.randn(1, 4, 16), "4": torch.randn(1, 16, 4)}
    def run():
        return [model.head(tokens[D], torch.tensor([[0.4]]), model.head.project(torch.ones(1, tokens[D].shape[1], 16), i, torch.ones(1, 1, 16))) for i, D in enumerate(("16", "4", "16"))]
    for D in ("16", "4"):
        for parameter in (model.head.position[D], *model.head.blocks[D].parameters()):
            before = run()
            with torch.no_grad():
                parameter.add_(torch.randn_like(parameter))
            moved = [not torch.equal(a, b) for a, b in zip(before, run())]
            assert moved == ([True, False, True] if D == "16" else [False, True, False])


def test_positions_in_the_head():
    """Added to tokens in row-major order, from sines and cosines on; a token head, which draws each token for itself, has none."""
    fresh = {name: p for name, p in FAR(FARConfig.preset("digits", patch_size=(4, 2, 2), head_width=16)).head.named_parameters() if "position" in name}
    assert fresh.keys() == {"position.16", "position.4"} and torch.equal(fresh["position.16"], far.sincos_2d(2, 16)) and torch.equal(fresh["position.4"], far.sincos_2d(4, 16))
    t, cond, same = torch.tensor([[0.4]]), torch.ones(1, 1, 16), torch.ones(1, 16, 16)
    model, token = tiny(), tiny(head_mixing=False)
    out = token.head(torch.ones(1, 16, 4), t.expand(1, 16), token.head.project(same, 1, cond))[0]
    assert not token.head.position and torch.allclose(out, out[:1].expand(16, 4), atol=1e-6)
    x, position = torch.randn(1, 16, 4), model.head.position["4"].detach().clone()
    z, c = model.head.project(torch.randn(1, 16, 16), 1, cond)
    out = model.head(x, t, (z, c))
    model.head.position["4"].data.zero_()
    assert torch.allclose(model.head(x, t, (z + position, c)), out, atol=1e-5) and not torch.allclose(model.head(x, t, (z, c)), out, atol=1e-3)


def test_fresh_head_is_adaln_zero():
    head = FAR(FARConfig.preset("digits", patch_size=(4, 2, 4))).head
    h, c = torch.randn(2, 4, 128), torch.randn(2, 1, 128)
    for N, D in ((4, 16), (16, 4)):
        blocks = head.blocks[str(D)]
        assert len(blocks) == 4 and all(torch.equal(block(h, c), h) for block in blocks)  # every block starts as the identity
        assert not head(torch.randn(2, N, D), torch.rand(2, 1), head.project(torch.randn(2, N, 128), 1, torch.randn(2, 1, 256))).any()


# ---------------------------------------------------------------------------------------------------------------------
# Loss


@pytest.mark.parametrize("attention", ["causal", "markov"])
@pytest.mark.parametrize("target", ["full", "next", "residual"])
def test_inputs_targets_and_noise_of_each_level(target, attention, monkeypatch):
    """x_i comes in; the target, the noise and the error lie in what the level draws, in units where the noise (and the residual) has deviation 1."""
    model, images = tiny(target=target, ordering="dct", patch_size=(4, 4, 2), attention=attention, levels_per_image=0), torch.randn(500, 1, 8, 8)
    model.set_scales(images)
    inputs, losses, white = {}, {}, torch.randn(500, 1, 8, 8)
    order = torch.arange(500).roll(7)
    def transformer(blocks, first, cond, cache=None):
        for n, block in enumerate(blocks):
            level = torch.as_tensor(first + n).expand(len(block))
            inputs.update((i, block[level == i]) for i in level.unique().tolist())
        return [torch.zeros(len(block), block.shape[1], 16) for block in blocks]
    def loss(target, noise, z, level, cond, band):
        cut = band(patchify(white, model.config.patch_sizes[level[0]]).repeat(len(level) // 500, 1, 1))
        losses.update((i, [x[level == i] for x in (target, noise, band(noise), cut)]) for i in level.unique().tolist())
        return torch.zeros(len(z))
    monkeypatch.setattr(torch, "rand", lambda *shape, device=None: order.argsort() / 500)
    monkeypatch.setattr(model.transformer, "forward", transformer), monkeypatch.setattr(model.head, "loss", loss)
    model.level_losses(images, torch.arange(500) % 10)
    x = [far.dct(images[order], keep) for keep in (0, 0.25, 0.5, 1)]
    for i, p in enumerate((4, 4, 2)):
        assert torch.allclose(inputs[i], patchify(x[i], p), atol=1e-5)
        part = lambda x: {"full": x, "next": far.dct(x, model.config.levels[i]), "residual": far.dct(x, model.config.levels[i]) - far.dct(x, (0, *model.config.levels)[i])}[target]
        got, noise, noise_again, cut = losses[i]
        assert torch.allclose(got, patchify(part(images[order]) / (part(images).std() if target == "residual" else 1), p), atol=1e-4)
        assert noise.std().item() == pytest.approx(1, abs=0.05) and torch.allclose(noise_again, noise, atol=1e-4) and noise.shape == got.shape
        assert torch.allclose(cut, patchify(part(white), p), atol=1e-4)


@pytest.mark.parametrize("settings", [dict(CAUSAL), dict(CAUSAL, cond_dim=5), dict(levels_per_image=1), dict(levels_per_image=2, head_mixing=False, cond_tokens=2), dict(levels_per_image=0)])
@pytest.mark.parametrize("B", [2, 5, 12])
def test_levels_in_one_batch_have_the_losses_of_each_alone(settings, B, monkeypatch):
    """Levels with patches of one size share a batch: unequal shares of 5 images, two noises a token and other units at each level."""
    model, images, labels = tiny(target="residual", patch_size=(4, 2, 4), head_draws=2, **settings), torch.randn(B, 1, 8, 8), torch.randn(B, 2, 5) if "cond_dim" in settings else torch.arange(B) % 10
    model.set_scales(images)
    monkeypatch.setattr(torch, "randn_like", lambda x: torch.sin(1000 * x + torch.arange(len(x)).view(-1, 1, 1) % 2))
    monkeypatch.setattr(far.Path, "draw_t", lambda self, *shape, device=None: torch.full(shape, 0.5))
    k = max(settings.get("levels_per_image", 0) or 3, -(-3 // B))
    torch.manual_seed(3)
    losses = model.losses(images, labels, k)
    torch.manual_seed(3)
    order, cond = torch.rand(B).argsort().repeat(k), model.condition(labels, B)
    for i, p in enumerate((4, 2, 4)):
        rows = torch.from_numpy(np.array_split(order.numpy(), 3)[i])
        seen = lambda j: patchify(model.project(images[rows], j), model.config.patch_sizes[j])
        z = model.transformer([seen(j) for j in range(i + 1)], 0, cond[rows])[i] if "attention" in settings else model.transformer([seen(i)], i, cond[rows])[0]
        band = lambda x: model.band(x, i)
        target = band(patchify(images[rows], p)) / model.data_scale[i]
        noise = band(torch.randn_like(target.repeat_interleave(2, 0))) / model.noise_scale[i]
        assert torch.allclose(losses[i], model.head.loss(target, noise, z, i, cond[rows], band).mean(), rtol=1e-4)
    torch.manual_seed(3)
    assert model(images, labels).item() == pytest.approx(losses.mean().item(), rel=1e-4) and len(losses) == 3  # levels count alike, whatever their shares


def test_the_loss_judges_what_the_sampler_uses():
    """For a soft filter too, where filtering an error is not the same: a prediction of zero errs by the whole target."""
    model, (target, z), losses = tiny(), torch.randn(2, 50, 16, 16), []
    torch.nn.init.zeros_(model.head.output["4"].weight), torch.nn.init.zeros_(model.head.output["4"].bias)
    for band in (lambda x: x, lambda x: 0.5 * x):
        torch.manual_seed(0)
        losses.append(model.head.loss(target[..., :4], torch.randn(50, 16, 4), z, 0, torch.zeros(50, 1, 16), band))
    assert torch.equal(*losses) and losses[0].mean() > 0.5


def test_a_level_that_adds_nothing_draws_nothing():
    """Two levels of the same frequencies: no division by the zero deviation of what lies between."""
    model, images = tiny(target="residual", ordering="dct", levels=(0.2, 0.22, 1.0)), torch.randn(20, 1, 8, 8)
    model.set_scales(images)
    assert model.level_losses(images, torch.arange(20) % 10).isfinite().all()
    drawn = model.sample(5, return_levels=True)
    assert drawn.isfinite().all() and torch.allclose(drawn[:, 0], drawn[:, 1], atol=1e-4) and (drawn[:, 2] - drawn[:, 1]).std() > 0.1


@pytest.mark.parametrize("B, k", [(12, 1), (12, 2), (12, 3), (7, 1), (2, 1), (1, 1)])
def test_every_image_trains_k_levels_and_every_level_its_share(B, k, monkeypatch):
    """Images carry their index: each meets k different levels (all, where the batch is too small for a share of one), levels share evenly."""
    model, seen = tiny(levels_per_image=k, levels=(0.25, 0.5, 1.0)), []
    monkeypatch.setattr(model.transformer, "forward", lambda blocks, i, cond, cache=None: [torch.zeros(len(blocks[0]), 16, 16)])
    monkeypatch.setattr(model.head, "loss", lambda target, noise, z, i, cond, band: seen.extend((round(x), j) for x, j in zip(target[:, 0, 0].tolist(), i.tolist())) or torch.zeros(len(z)))
    for _ in range(2):
        seen.clear(), model(torch.arange(float(B)).view(B, 1, 1, 1).expand(-1, 1, 8, 8), torch.zeros(B, dtype=torch.int64))
        k = max(k, -(-3 // B))
        assert len(set(seen)) == len(seen) == B * k and all(sum(b == image for b, _ in seen) == k for image in range(B))
        share = [sum(j == i for _, j in seen) for i in range(3)]
        assert max(share) - min(share) <= 1


@pytest.mark.parametrize("weighting", [False, True])
@pytest.mark.parametrize("levels_per_image", [0, 1, 2])
def test_loss_is_the_weighted_mean_over_levels(weighting, levels_per_image, monkeypatch):
    """Each level's loss is set to 10^i: the mean is known."""
    model = tiny(loss_weighting=weighting, levels_per_image=levels_per_image)
    monkeypatch.setattr(model.head, "loss", lambda target, noise, z, i, cond, band: 10.0 ** i)
    loss = model(torch.zeros(30, 1, 8, 8), torch.zeros(30, dtype=torch.int64))
    w = [1.5, 1 + math.sqrt(3) / 2, 2] if weighting else [1, 1, 1]
    assert loss.item() == pytest.approx((w[0] + 10 * w[1] + 100 * w[2]) / 3, rel=1e-5)
    assert model.level_losses(torch.zeros(30, 1, 8, 8), torch.zeros(30, dtype=torch.int64)).tolist() == pytest.approx([1, 10, 100])


def test_head_draws_share_the_condition_and_count_alike(monkeypatch):
    """Each token has head_draws noises of its own, cut down to the level's part."""
    model = tiny(head_draws=3, target="next", ordering="dct")
    seen, loss = [], model.head.loss
    monkeypatch.setattr(model.head, "loss", lambda target, noise, *rest: seen.append((target, noise)) or loss(target, noise, *rest))
    assert model(torch.randn(6, 1, 8, 8), torch.arange(6)).ndim == 0
    assert all(len(noise) == 3 * len(target) and len(noise.flatten(1).unique(dim=0)) == len(noise) for target, noise in seen)


def test_level_losses_average_to_the_loss():
    model = tiny(levels_per_image=0)
    images, labels = torch.randn(2000, 1, 8, 8), torch.randint(10, (2000,))
    torch.manual_seed(1)
    loss = model(images, labels)
    torch.manual_seed(1)
    by_level = model.level_losses(images, labels)
    assert by_level.shape == (3,) and loss.item() == pytest.approx(by_level.mean().item(), rel=1e-5)
    model, asked = tiny(levels_per_image=1), []
    model.losses = lambda images, labels, k: asked.append(k) or torch.ones(3)
    model(images, labels), model.level_losses(images, labels)
    assert asked == [1, 3]                                                      # all levels of every image, whatever training does


def test_label_dropping():
    """With label_dropout 1 training never sees a label, with 0 always; evaluation never drops."""
    images, losses = torch.randn(8, 1, 8, 8), {}
    for dropout in (0.0, 1.0):
        for training in (True, False):
            model = tiny(label_dropout=dropout).train(training)
            for label in (2, 7):
                torch.manual_seed(1)
                losses[dropout, training, label] = model(images, torch.full((8,), label)).item()
    assert losses[1.0, True, 2] == losses[1.0, True, 7] and losses[0.0, True, 2] != losses[0.0, True, 7]
    assert losses[1.0, False, 2] != losses[1.0, False, 7]
    dropped = (model.condition(torch.arange(3000) % 10, 3000, 0.3) == model.transformer.no_label).all(2)  # each image for itself
    assert dropped.float().mean().item() == pytest.approx(0.3, abs=0.03)


def test_dropout_is_in_every_block_and_for_training_alone():
    tokens = [torch.randn(2, 16, 4) for _ in range(3)]
    for other in ("attention.dropout", "dropout.p"):                            # attention and branches each without the other
        model = tiny(dropout=0.3, **CAUSAL)
        for block in model.transformer.blocks:
            part, name = other.split(".")
            assert getattr(getattr(block, part), name) == 0.3
            setattr(getattr(block, part), name, 0.0)
        a, b, c, d = (model.train(training).transformer(tokens, 0, model.condition(None, 2))[2] for training in (True, True, False, False))
        assert torch.equal(c, d) and not torch.allclose(a, b) and not torch.allclose(a, c)


def test_labels_act_on_tokens_and_head_by_their_mean():
    """Of 40 numbers a label the first 16, the transformer's width, are added to the tokens and go into its condition block; the other 24 steer the head, whatever it has."""
    model, cond, tokens = tiny(**dict(CAUSAL, cond_tokens=3, cond_dim=5, head_width=24)), torch.randn(4, 3, 40), torch.randn(4, 16, 4)
    assert model.condition(torch.randn(4, 3, 5), 4).shape == model.condition(None, 4).shape == cond.shape
    assert tiny(head_mixing=False, head_width=24).condition(torch.arange(4), 4).shape == (4, 1, 16)
    first, last = cond * (torch.arange(40) < 16), cond * (torch.arange(40) >= 16)
    difference = model.transformer.embed(tokens, 1, cond[..., :16]) - model.transformer.embed(tokens, 1, 0 * cond[..., :16])
    assert torch.allclose(difference, cond[..., :16].sum(1, keepdim=True).expand(4, 16, 16) / 3, atol=1e-5)
    z = lambda cond: model.transformer(3 * [tokens], 0, cond)[1]
    assert torch.equal(z(cond), z(first)) and not torch.allclose(z(cond), z(last), atol=1e-3)
    z = torch.randn(4, 16, 16)
    steer = lambda z, cond: model.head.project(z, 1, cond)[1]
    assert torch.equal(steer(z, cond), steer(z, last)) and torch.allclose((steer(z, cond) - steer(z, first))[:, 0], cond[..., 16:].sum(1) / 3, atol=1e-5)
    assert torch.allclose((steer(z, cond) - steer(0 * z, cond))[:, 0], (z.sum(1) / 16) @ model.head.condition.weight.T, atol=1e-5)


def test_a_fresh_model_treats_no_label_like_a_class():
    transformer = FAR(FARConfig.preset("cifar")).transformer
    assert [p.std().item() for p in (transformer.label.weight, transformer.no_label)] == pytest.approx([1, 1], abs=0.2)


@pytest.mark.parametrize("width, head_width, settings", [(16, 24, {}), (24, 16, CAUSAL), (16, 30, dict(head_mixing=False, heads=4))])
def test_networks_of_unequal_width(width, head_width, settings):
    model, labels = tiny(width=width, head_width=head_width, **settings), torch.arange(4)
    assert model.level_losses(torch.randn(4, 1, 8, 8), labels).isfinite().all() and model.sample(labels, guidance=2.0, generator=seeded()).isfinite().all()


def test_mask_replaces_the_drawn_share_of_tokens(monkeypatch):
    assert torch.equal(tiny(mask="reference").transformer.mask_bounds, mask_bounds(3, "reference"))
    model = tiny(mask="text").train()
    bounds, tokens = [], torch.randn(50, 3, 16, 4)
    monkeypatch.setattr(far, "masked_share", lambda lower: bounds.append(lower) or torch.full_like(lower, 0.75))
    embed = lambda: model.transformer.embed(tokens.flatten(0, 1), torch.arange(3).repeat(50), torch.zeros(150, 1, 16)).unflatten(0, (50, 3))
    masked = embed()
    model.transformer.eval()
    clean = embed()
    assert len(bounds) == 1 and torch.equal(bounds[0], mask_bounds(3, "text").repeat(50))
    changed = (masked - clean).abs().amax(-1) > 1e-6
    assert (changed.sum(-1) == 12).all() and 0.6 < changed.float().mean((0, 1)).min()   # 0.75 of 16 tokens, every place alike
    position = model.transformer.mask_token + model.transformer.position + model.transformer.level.weight[:, None]  # [3, 16, 16]
    assert torch.allclose(masked[changed], position.expand(50, 3, 16, 16)[changed], atol=1e-5)


@pytest.mark.parametrize("N", [1, 4])
def test_few_tokens_are_masked_as_often_in_the_mean(N, monkeypatch):
    """0.3 of 1 or 4 tokens: rounded up and down, so that a single token is not always hidden."""
    model = tiny(mask="text", patch_size=8 // math.isqrt(N)).train()
    monkeypatch.setattr(far, "masked_share", lambda lower: torch.full_like(lower, 0.3))
    embed = lambda: model.transformer.embed(torch.ones(5000, N, 64 // N), 0, torch.zeros(5000, 1, 16))
    masked, _ = embed(), model.transformer.eval()
    count = ((masked - embed()).abs().amax(-1) > 1e-6).sum(1).float()
    assert count.mean().item() == pytest.approx(0.3 * N, abs=0.03) and count.min() == int(0.3 * N) and count.max() == int(0.3 * N) + 1


# ---------------------------------------------------------------------------------------------------------------------
# Sampling


def test_couple_noise():
    """Variance 1 for every token, correlation rho inside a cell and 0 across cells; cells are a 2 x 2 partition of the 4 x 4 grid."""
    noise, shared = torch.randn(50000, 16, 1, generator=seeded(1)), torch.randn(50000, 4, 1, generator=seeded(2))
    covariance = torch.cov(couple_noise(noise, shared, 2, 0.3)[..., 0].T)
    cell = [(n // 4 // 2, n % 4 // 2) for n in range(16)]
    for a in range(16):
        for b in range(16):
            assert covariance[a, b].item() == pytest.approx(1 if a == b else 0.3 if cell[a] == cell[b] else 0, abs=0.03)


def test_which_levels_are_coupled(monkeypatch):
    """Keeps 1/4, 1/2, 1 of 8 pixels are 2, 4, 8 cells a side on a grid of 4 x 4 tokens: only the first level shares noise,
    and none where the noise is low-passed: sharing would raise its deviation, like a temperature."""
    seen = []
    monkeypatch.setattr(far, "couple_noise", lambda noise, shared, side, rho: seen.append((side, rho, shared.shape[1])) or noise)
    tiny(coupling=0.2, target="next").sample(2), tiny(coupling=0.2, target="residual").sample(2)
    tiny(coupling=0.2).sample(2), tiny().sample(2, coupling=[0.0, 0.3, 0.3]), tiny().sample(2, coupling=[0.4, 0.3, 0.3])
    assert seen == [(2, 0.2, 4), (2, 0.4, 4)]


def test_labels_on_an_accelerator_are_not_waited_for(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "min", lambda *_: 1 / 0), monkeypatch.setattr(torch.Tensor, "max", lambda *_: 1 / 0)
    model = tiny().to("meta")
    assert model.condition(torch.zeros(3, dtype=torch.int64, device="meta"), 3).shape == (3, 1, 32)


@pytest.mark.parametrize("target", ["full", "next", "residual"])
@pytest.mark.parametrize("ordering", ["fourier", "dct"])
def test_step_rules(target, ordering):
    model = tiny(target=target, ordering=ordering)
    for rule in ("paper", "locked"):
        levels = model.sample(torch.arange(6), step_rule=rule, return_levels=True, generator=seeded())
        assert levels.shape == (6, 3, 1, 8, 8)
        kept = [(model.project(levels[:, i + 1], i + 1) - levels[:, i]).abs().max().item() for i in range(2)]
        assert max(kept) < 1e-4 if rule == "locked" or target == "residual" and max(kept) < 1e-4 else min(kept) > 1e-3 or target == "residual"
        for i in range(3):
            assert torch.allclose(model.project(levels[:, i], i + 1), levels[:, i], atol=1e-4)  # x_i lies in its subspace
    assert torch.equal(model.sample(torch.arange(6), step_rule=rule, generator=seeded()), levels[:, -1])


@pytest.mark.parametrize("settings", [{}, CAUSAL])
def test_sampling_from_a_known_level(settings):
    """What was drawn up to x_i goes on as it went: x_i known and the same noise give the same image. Known levels are P_j x."""
    model, labels = tiny(step_rule="locked", ordering="dct", **settings), torch.tensor([1, 2, 3])
    g = seeded()
    levels = model.sample(labels, guidance=2.0, generator=g, return_levels=True)
    for i in range(3):
        g = seeded()
        torch.randn(i * 3, 16, 4, generator=g)                                  # the noise of the levels before
        again = model.sample(labels, guidance=2.0, generator=g, known=(levels[:, -1], i), return_levels=True)
        assert torch.allclose(again, levels, atol=1e-4)
    image = (torch.rand(1, 1, 8, 8, generator=seeded(1)) * 255).byte()          # one picture, eight variations
    drawn = model.sample(8, known=(image, 2), generator=seeded(), return_levels=True)
    for i, keep in ((0, 0.25), (1, 0.5)):
        assert torch.allclose(drawn[:, i], far.dct(image / 127.5 - 1, keep).expand(8, -1, -1, -1), atol=1e-5)
    assert torch.allclose(far.dct(drawn[:, 2], 0.5), drawn[:, 1], atol=1e-4) and drawn[:, 2].std(0).min() > 0.01


@pytest.mark.parametrize("stops", [(0.5, 1.0), (0.25, 1.0), (1.0,)])
def test_stops_leave_levels_out(stops):
    """As a model that has these levels alone and, for each, the level embedding of the one with all three."""
    model, part, labels = tiny(), tiny(levels=stops), torch.tensor([1, 2, 3])
    rows, weights = [0, *((0.25, 0.5, 1.0).index(keep) + 1 for keep in stops[:-1])], model.state_dict()
    part.load_state_dict({name: value[rows] if name.endswith(("level.weight", "_scale")) else value for name, value in weights.items()})
    draw = lambda model, **kw: model.sample(labels, guidance=2.0, guidance_schedule="constant", generator=seeded(), return_levels=True, **kw)
    assert torch.allclose(draw(model, stops=stops), draw(part), atol=1e-5) and draw(part).shape[1] == len(stops)
    locked = draw(model, stops=(0.25, 1.0), step_rule="locked")                 # adds all frequencies beyond 0.25, and those alone
    assert torch.allclose(far.dct(locked[:, 1], 0.25), locked[:, 0], atol=1e-4) and (far.dct(locked[:, 1], 0.5) - locked[:, 0]).abs().max() > 0.01
    assert torch.equal(draw(model, stops=(0.25, 0.5, 1)), draw(model)) and not torch.allclose(draw(model)[:, -1], draw(part)[:, -1], atol=0.01)


def test_each_level_draws_with_its_own_settings(monkeypatch):
    """What the sampler of a level gets: the settings of the x_i it leaves, also where levels are left out; cells are those of the x_j it draws."""
    model, seen, guides, cells = tiny(patch_size=1), [], [], []
    run, guided, couple = model.head.path.sample, model.guided, far.couple_noise
    monkeypatch.setattr(model.head.path, "sample", lambda *args: seen.append(args[2:5]) or run(*args))
    monkeypatch.setattr(model, "guided", lambda *args: guides.append(args[3]) or guided(*args))
    monkeypatch.setattr(far, "couple_noise", lambda *args: cells.append(args[2:]) or couple(*args))
    settings = dict(head_steps=[1, 2, 3], temperature=[0.9, 0.8, 0.7], coupling=[0.1, 0.2, 0.3], solver="ddim", guidance=4.0, guidance_schedule="linear")
    for stops, states, sides in ((None, (0, 1, 2), [(2, 0.1), (4, 0.2)]), ((0.5, 1.0), (0, 2), [(4, 0.1)]), ((0.25, 1.0), (0, 1), [(2, 0.1)])):
        seen.clear(), guides.clear(), cells.clear()
        model.sample(torch.arange(2), stops=stops, **settings)
        assert seen == [([1, 2, 3][i], "ddim", [0.9, 0.8, 0.7][i]) for i in states] and guides == [1 + 3 * i / 3 for i in states] and cells == sides


@pytest.mark.parametrize("target", ["full", "next", "residual"])
def test_all_noise_of_a_level_lies_in_its_band_with_deviation_1(target, monkeypatch):
    """The first noise and what an ancestral sampler adds."""
    model, drawn = tiny(target=target), []
    model.set_scales(torch.randn(500, 1, 8, 8))
    monkeypatch.setattr(model.head.path, "sample", lambda network, noise, steps, solver, temperature, draw: drawn.append((noise, draw(noise))) or noise)
    model.sample(500, solver="ddpm")
    for i, (lower, upper) in enumerate(((0, 0.25), (0.25, 0.5), (0.5, 1))):
        for tokens in drawn[i]:
            x = unpatchify(tokens, 2, 1)
            beyond = dict(full=0 * x, next=x - far.dct(x, upper), residual=x - far.dct(x, upper) + far.dct(x, lower))[target]
            assert beyond.abs().max() < 1e-4 and x.std().item() == pytest.approx(1, abs=0.05)
        assert (drawn[i][0] - drawn[i][1]).abs().max() > 0.1


def test_filters_work_in_float32_under_autocast():
    model, x = tiny(), torch.randn(3, 1, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(model.project(x, 1), far.dct(x.double(), 0.25).float(), atol=1e-5)


def test_guidance_extrapolates_from_unlabelled_to_labelled():
    """One level, one head step, first order: the image is linear in the prediction, so x(g) = u + g (x(1) - u)."""
    model = tiny(levels=(1.0,), head_steps=1, solver="ddim")
    labels, draw = torch.full((5,), 3), lambda labels, **kw: model.sample(labels, generator=seeded(), **kw)
    u, x, x3 = draw(5), draw(labels), draw(labels, guidance=3.0, guidance_schedule="constant")
    assert (x - u).abs().max() > 0.01 and torch.allclose(x3, u + 3 * (x - u), atol=1e-4)
    assert torch.equal(draw(labels, guidance=3.0), x)                            # linear starts from 1 at the first level
    assert torch.allclose(draw(labels, guidance=0.0, guidance_schedule="constant"), u, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, CAUSAL])
def test_guidance_schedule_and_no_guidance_batch_where_it_is_1(settings, monkeypatch):
    """Per level 1 + (g - 1) i/F: against sampling by hand with doubled batches at every level."""
    model, sizes = tiny(**settings), []
    head = model.head.forward
    monkeypatch.setattr(model.head, "forward", lambda x, t, c: sizes.append(len(x)) or head(x, t, c))
    labels = torch.tensor([1, 2, 3])
    got = model.sample(labels, guidance=4.0, head_steps=2, generator=seeded(), solver="ddim", temperature=1.0)
    assert sizes == [3, 3, 6, 6, 6, 6]
    for same in ([1.0, 2.0, 3.0], torch.tensor([1.0, 2.0, 3.0]), torch.tensor(4.0)):  # a list is taken as it stands, one number follows the schedule
        assert torch.equal(model.sample(labels, guidance=same, head_steps=2, generator=seeded(), solver="ddim", temperature=1.0), got)
    for whom, guidance in ((labels, 1.0), (3, 4.0)):                            # without labels there is nothing to guide
        sizes.clear(), model.sample(whom, head_steps=2, guidance=guidance)
        assert sizes == [3] * 6
    transformer, g, x, visible = model.transformer, seeded(), torch.zeros(3, 1, 8, 8), []
    with torch.no_grad():
        for i in range(3):
            visible.append(patchify(x, 2))
            z = []
            for dropped in (False, True):
                cond = model.condition(None if dropped else labels, 3)
                z.append(((transformer(visible, 0, cond) if settings else transformer(visible[-1:], i, cond))[-1], cond))

            def network(x_t, t):
                p, u = (head(x_t, t.expand(3, 1), model.head.project(part, i, cond)) for part, cond in z)
                return u + (1 + 3 * i / 3) * (p - u)
            x = model.project(unpatchify(model.head.path.sample(network, torch.randn(3, 16, 4, generator=g), 2, "ddim"), 2, 1), i + 1)
    assert torch.allclose(got, x, atol=1e-3)


def test_sampling_is_the_same_in_training_mode_and_leaves_mode_and_random_state(monkeypatch):
    model = tiny(**CAUSAL, mask="text", dropout=0.5)
    want = model.sample(torch.arange(3), generator=seeded())
    model.train()
    state = torch.get_rng_state()
    assert torch.equal(model.sample(torch.arange(3), generator=seeded()), want) and model.training and model.head.training
    assert torch.equal(torch.get_rng_state(), state)
    for labels, generator in ((torch.tensor([10]), None), (1, 5), (1, 0)):
        with pytest.raises(ValueError):
            model.sample(labels, generator=generator)
    with monkeypatch.context() as broken, pytest.raises(ZeroDivisionError):     # also after a failure in the middle
        broken.setattr(model.head, "project", lambda *_: 1 / 0)
        model.sample(1)
    assert model.training and model.head.training
    torch.nn.Linear(8, 8)(want).sum().backward()                                # images may be used in another loss


def test_paper_temperature_and_head_steps():
    """0.8 to 1 and 40 to 100 over the levels, as written out; a single level takes the last."""
    model = tiny(head_steps=2)
    for temperature, same in (("paper", [0.8, 0.9, 1.0]), (np.array([0.8, 0.9, 1.0]), [0.8, 0.9, 1.0])):
        assert torch.allclose(model.sample(2, temperature=temperature, generator=seeded()), model.sample(2, temperature=same, generator=seeded()))
    assert far.per_level("paper", 3, "head_steps") == [40, 70, 100] and far.per_level("paper", 1, "head_steps") == [100]
    assert far.per_level("paper", 1, "temperature") == [1.0] and far.per_level(torch.tensor([3, 4]), 2, "head_steps") == [3, 4]


def test_labels_of_another_kind():
    for labels in ([0, 1], None, "cat", torch.tensor(3)):
        with pytest.raises(ValueError, match="labels are"):
            tiny().sample(labels)
    with pytest.raises(ValueError, match="labels are of type list"):
        tiny()(torch.zeros(2, 1, 8, 8), [0, 1])
    with pytest.raises(ValueError, match="no classes"):
        tiny(num_classes=0)(torch.zeros(2, 1, 8, 8), torch.zeros(2, dtype=torch.int64))
    model, words = tiny(**dict(CAUSAL, cond_dim=5)), torch.randn(2, 2, 5)
    assert torch.equal(model.sample(words.half(), generator=seeded()), model.sample(words.half().float(), generator=seeded()))


def test_sampling_is_reproducible_and_independent_of_the_batch():
    model, labels = tiny(solver="ddpm"), torch.arange(7)
    assert torch.equal(model.sample(labels, generator=seeded(3)), model.sample(labels, generator=seeded(3)))
    assert not torch.equal(model.sample(labels, generator=seeded(3)), model.sample(labels, generator=seeded(4)))
    parts = {batch: torch.cat([x for _, x in sample.draw_images(model, labels, 5, batch, False, coupling=0.2, guidance=2.0)]) for batch in (1, 3, 7)}
    assert torch.allclose(parts[1], parts[7], atol=1e-4) and torch.allclose(parts[3], parts[7], atol=1e-4)
    assert (parts[7][0] - parts[7][1]).abs().max() > 0.01
    other = torch.cat([x for _, x in sample.draw_images(model, labels, 6, 7, False)])
    assert (other - parts[7]).abs().max() > 0.01
    wide = tiny(image_size=64, patch_size=[8, 8, 2])                            # 1,024 tokens at the finer level, in a CPU's caches one image
    assert [start for start, _ in sample.draw_images(wide, labels[:2], progress=False, head_steps=1)] == [0, 1]
    assert [start for start, _ in sample.draw_images(model, labels, progress=False, head_steps=1)] == [0]


def test_head_steps_are_counted_per_level(monkeypatch):
    model, calls = tiny(), []
    head = model.head.forward
    monkeypatch.setattr(model.head, "forward", lambda x, t, c: calls.append(1) or head(x, t, c))
    for steps, count in ((2, 6), ([1, 2, 4], 7), ("paper", 210)):
        calls.clear()
        model.sample(2, head_steps=steps)
        assert len(calls) == count


# ---------------------------------------------------------------------------------------------------------------------
# Wrong settings and inputs: one sentence that says what was given and what is allowed


@pytest.mark.parametrize("settings, words", [
    (dict(patch_size=3), "divisible"), (dict(width=30, heads=4), "divisible"), (dict(width=30, heads=3), "by 4"), (dict(head_width=30, heads=4), "divisible"), (dict(head_width=30, heads=2), "head_width 30 .* by 4"),
    (dict(levels=(0.5, 0.25, 1)), "increase"), (dict(levels=(0.25, 0.5)), "exactly 1"), (dict(levels=()), "increase"), (dict(levels=(0.0, 1.0)), "increase"),
    (dict(levels=(0.5, 1.0, 1.5)), "increase"), (dict(ordering="spiral"), "fourier"), (dict(target="half"), "residual"), (dict(attention="full"), "markov"),
    (dict(prediction="x"), "eps"), (dict(schedule="square"), "cosine"), (dict(mask="some"), "reference"), (dict(solver="heun"), "dpmpp_2m"),
    (dict(head_steps=0), "at least 1"), (dict(head_steps=[1, 2]), "each of 3 levels"), (dict(depth=0), "at least 1"), (dict(label_dropout=1.5), "[0, 1]"),
    (dict(time_shift=0), "time_shift is 0"), (dict(time_shift=[0.5, 2]), "time_shift .* each of 3 levels"), (dict(time_shift="paper"), "time_shift is 'paper'"),
    (dict(levels_per_image=4), "levels"), (dict(levels=("a", 1)), "numbers"), (dict(ordering=["dct"]), "fourier"), (dict(cond_dim=3, cond_tokens=0), "cond_tokens"),
    (dict(colour=1), "unknown")])
def test_wrong_settings(settings, words):
    with pytest.raises(ValueError, match=words.replace("[", r"\[")):
        FARConfig.preset("digits", **settings)


def test_wrong_preset():
    with pytest.raises(ValueError, match="far_b"):
        FARConfig.preset("huge")


@pytest.mark.parametrize("images, labels, words", [
    (torch.zeros(2, 1, 9, 9), torch.zeros(2, dtype=torch.int64), "shape"), (torch.zeros(2, 3, 8, 8), torch.zeros(2, dtype=torch.int64), "shape"),
    (torch.zeros(1, 8, 8), torch.zeros(2, dtype=torch.int64), "shape"), (torch.zeros(2, 1, 8, 8, dtype=torch.float64), torch.zeros(2, dtype=torch.int64), "float32"),
    (torch.zeros(2, 1, 8, 8, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), "uint8"), (torch.zeros(2, 1, 8, 8), torch.tensor([0, 10]), "0 .. 9"),
    (torch.zeros(2, 1, 8, 8), torch.tensor([-1, 3]), "0 .. 9"), (torch.zeros(2, 1, 8, 8), torch.zeros(2), "int64"), (torch.zeros(2, 1, 8, 8), torch.zeros(3, dtype=torch.int64), "int64"),
    (np.zeros((2, 1, 8, 8), np.float32), torch.zeros(2, dtype=torch.int64), "of type ndarray"), (torch.zeros(0, 1, 8, 8), torch.zeros(0, dtype=torch.int64), "shape")])
def test_wrong_inputs(images, labels, words):
    for call in (tiny(), tiny().level_losses):
        with pytest.raises(ValueError, match=words):
            call(images, labels)


@pytest.mark.parametrize("labels, settings, words", [
    (torch.tensor([10]), {}, "0 .. 9"), (torch.tensor([0.5]), {}, "int64"), (0, {}, "one image or more"), (2, dict(head_steps=0), "at least 1"), (2, dict(head_steps=[1]), "levels"),
    (2, dict(solver="euler"), "ddim"), (2, dict(step_rule="free"), "locked"), (2, dict(guidance_schedule="cosine"), "constant"), (2, dict(guidance=-1.0), "at least 0"),
    (2, dict(temperature=[1.0]), "levels"), (2, dict(temperature=-1.0), "at least 0"), (2, dict(coupling=1.5), r"\[0, 1\]"), (2, dict(generator=[seeded()] * 3), "2 images"),
    (2, dict(coupling="paper"), "coupling is 'paper'"), (2, dict(guidance=math.inf), "guidance is inf"), (2, dict(guidance="2"), "must be a number"), (2, dict(guidance=[1, 2]), "each of 3 levels"), (True, {}, "labels are True"),
    (2, dict(temperature=math.inf), "temperature is inf"), (2, dict(generator=5), "torch.Generator"), (2, dict(steps=5), "head_steps"), (2, dict(width=5), "head_steps"),
    (2, dict(known=(torch.zeros(3, 1, 8, 8), 1)), "1 or 2 images"), (2, dict(known=(torch.zeros(2, 1, 8, 8), 3)), r"\[0, 1, 2\]"), (2, dict(known=(torch.zeros(2, 1, 9, 9), 1)), "shape"),
    *((2, dict(stops=stops), "stops must be") for stops in ((0.5,), (0.3, 1.0), (), 1.0)), (2, dict(stops=(0.5, 1.0), known=(torch.zeros(1, 1, 8, 8), 1)), r"\[0, 2\]"),
    *((2, dict(known=known), "known must be") for known in (5, torch.zeros(2, 1, 8, 8), (torch.zeros(2, 1, 8, 8),)))])
def test_wrong_sampling_arguments(labels, settings, words):
    with pytest.raises(ValueError, match=words):
        tiny().sample(labels, **settings)


@pytest.mark.parametrize("settings", [dict(target="next"), CAUSAL])
def test_no_stops_where_the_next_level_alone_can_follow(settings):
    with pytest.raises(ValueError, match="target full and attention markov"):
        tiny(**settings).sample(2, stops=(0.5, 1.0))


def test_wrong_sides_for_patchify_and_direction():
    with pytest.raises(ValueError, match="divisible"):
        patchify(torch.zeros(1, 1, 8, 8), 3)
    with pytest.raises(ValueError, match="reference"):
        mask_bounds(4, "up")
    with pytest.raises(ValueError, match="divisible"):
        patchify(torch.zeros(1, 1, 8, 8), 0)
    for shape in ((1, 15, 4), (1, 16, 3)):
        with pytest.raises(ValueError, match="no square grid of patches 1 x 2 x 2"):
            unpatchify(torch.zeros(shape), 2, 1)
    with pytest.raises(ValueError, match="whole number"):
        block_causal_mask(3, 4.0)


def test_uint8_and_float_images_agree():
    model, x = tiny(), torch.randint(256, (4, 1, 8, 8), dtype=torch.uint8)
    torch.manual_seed(0)
    a = model(x, torch.arange(4))
    torch.manual_seed(0)
    assert torch.equal(a, model(x.float() / 127.5 - 1, torch.arange(4)))


def test_far_needs_torch_only():
    tree = ast.parse(open(far.__file__).read())
    names = {a.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    names |= {node.module.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert names <= {"math", "dataclasses", "functools", "torch"}


# ---------------------------------------------------------------------------------------------------------------------
# Training and sampling from the command line


SMALL = ["--width", "16", "--head-width", "16", "--head-depth", "1", "--depth", "1", "--heads", "2", "--head-steps", "2", "--log-every", "5"]


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The digits run of the README, shortened to 300 steps."""
    out = str(tmp_path_factory.mktemp("digits"))
    train_cifar.main(["--data", "digits", "--steps", "300", "--ema", "0.99", "--out", out])
    return out


def test_short_digits_run_learns(digits):
    """Below a loss and above an accuracy that a broken step, label or schedule does not reach."""
    log = np.genfromtxt(os.path.join(digits, "log.csv"), delimiter=",", names=True)
    assert log["loss"][-1] < 0.42 and all(log[f"level_{i}"][-1] < log[f"level_{i}"][0] for i in (1, 2, 3))
    model, _ = sample.load_checkpoint(os.path.join(digits, "ckpt.pt"))
    images, truth, _ = train_cifar.load_digits()
    labels = torch.arange(200) % 10
    drawn = torch.cat([x for _, x in sample.draw_images(model, labels, progress=False)])
    distance = torch.cdist(sample.to_uint8(drawn).flatten(1).float(), images.flatten(1).float())
    nearest = truth[distance.topk(5, largest=False)[1]].mode(1)[0]              # read by five nearest neighbours
    assert (nearest == labels).float().mean() > 0.85
    spread = drawn.std(0).mean() / (images / 127.5 - 1).std(0).mean()
    assert 0.8 < spread < 1.2
    assert {"ckpt.pt", "log.csv", "samples.png", "levels.png"} == set(os.listdir(digits))
    assert Image.open(os.path.join(digits, "samples.png")).size == (502, 502)   # 10 x 10 digits of 48 pixels, gaps of 2
    assert Image.open(os.path.join(digits, "levels.png")).size == (3 * 50 + 2, 502)


def test_digits_data_is_the_uci_set():
    """The published facts of the set: 1,797 images, their class counts and the mean grey value 4.884 of 16."""
    images, labels, _ = train_cifar.load_digits()
    assert images.shape == (1797, 1, 8, 8) and images.dtype == torch.uint8
    assert torch.bincount(labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    grey = images.double() * 16 / 255
    assert (grey - grey.round()).abs().max() < 0.04 and grey.round().mean().item() == pytest.approx(4.8842, abs=1e-3)


@pytest.mark.parametrize("extra", [[], ["--paper"]])
def test_resume_is_bit_exact(tmp_path, extra):
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    flags = [*SMALL, *extra, "--head-steps", "2", "--lr", "1e-3", "--warmup", "1", "--lr-schedule", "constant", "--ema", "0.5", "--clip", "0.1", "--weight-decay", "0.5",
             "--flip", "--bf16", "--grad-accum", "2", "--batch", "32", "--seed", "3"]  # none the default: a resumed run keeps them all
    train_cifar.main([*flags, "--steps", "12", "--out", a])
    train_cifar.main([*flags, "--steps", "5", "--out", b])
    train_cifar.main(["--steps", "12", "--out", b, "--resume", "--log-every", "5", *extra])
    first, second = (torch.load(os.path.join(d, "ckpt.pt"), weights_only=True) for d in (a, b))
    assert first["step"] == second["step"] == 12
    for part in ("model", "ema"):
        assert all(torch.equal(first[part][k], second[part][k]) for k in first[part])
    assert not all(torch.equal(first["model"][k], first["ema"][k]) for k in first["model"])
    assert first["optimizer"]["param_groups"][0]["lr"] == second["optimizer"]["param_groups"][0]["lr"] == 1e-3
    assert len(open(os.path.join(a, "log.csv")).readlines()) == len(open(os.path.join(b, "log.csv")).readlines()) == 4
    assert not [name for name in os.listdir(a) if "part" in name]


def test_ctrl_c_saves_and_resume_goes_on_exactly(tmp_path, monkeypatch):
    """SIGINT in the middle of step 4: the step is finished and saved, and the resumed run equals one that was never stopped."""
    forward, calls, command = FAR.forward, [], [*SMALL, "--steps", "10", "--lr-schedule", "linear", "--out"]
    train_cifar.main([*command, str(tmp_path / "a")])

    def interrupted(self, *args):
        calls.append(1)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return forward(self, *args)
    monkeypatch.setattr(FAR, "forward", interrupted), monkeypatch.setattr(train_cifar, "count_flops", lambda function: dict(Global=1))
    with pytest.raises(SystemExit, match="saved"):
        train_cifar.main([*command, str(tmp_path / "b")])
    assert torch.load(tmp_path / "b" / "ckpt.pt", weights_only=True)["step"] == 4
    train_cifar.main([*command, str(tmp_path / "b"), "--resume"])
    first, second = (torch.load(tmp_path / d / "ckpt.pt", weights_only=True) for d in "ab")
    assert all(torch.equal(first["ema"][k], second["ema"][k]) for k in first["ema"])


def test_overwrite_forgets_the_old_run_at_once(tmp_path, monkeypatch):
    command = [*SMALL, "--steps", "2", "--out", str(tmp_path)]
    train_cifar.main(command)
    with pytest.raises(ValueError, match="haar: side 8"):                       # what cannot start forgets nothing
        train_cifar.main([*command, "--overwrite", "--ordering", "haar", "--levels", "0.1,1"])
    assert (tmp_path / "ckpt.pt").exists()
    monkeypatch.setattr(train_cifar, "epoch_order", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train_cifar.main([*command, "--overwrite"])
    assert not (tmp_path / "ckpt.pt").exists()


def test_learning_rate_schedule(tmp_path):
    """Linear: step k of n runs at lr (1 - k/n), counted from 0; constant: at lr; both after a linear warm-up."""
    for schedule, warmup, want in (("linear", "1", 1e-3 * (1 - 3 / 4)), ("constant", "1", 1e-3), ("constant", "8", 1e-3 * 4 / 8)):
        train_cifar.main([*SMALL, "--steps", "4", "--lr", "1e-3", "--lr-schedule", schedule, "--warmup", warmup, "--overwrite", "--out", str(tmp_path)])
        groups = torch.load(tmp_path / "ckpt.pt", weights_only=True)["optimizer"]["param_groups"]
        assert all(group["lr"] == pytest.approx(want) for group in groups)


def test_a_run_by_the_clock(tmp_path, monkeypatch):
    """A clock of one second a step: 0.1 minutes are six steps, the last at lr (1 - 5/6); a resumed run goes on where the clock stood, with the same limit unless told otherwise."""
    def run(*flags):
        monkeypatch.setattr(train_cifar, "time", types.SimpleNamespace(perf_counter=itertools.count().__next__))
        train_cifar.main([*flags, "--out", str(tmp_path)])
        state = torch.load(tmp_path / "ckpt.pt", weights_only=True)
        return state, (state["step"], state["seconds"], state["optimizer"]["param_groups"][0]["lr"])
    state, got = run(*SMALL, "--log-every", "100", "--max-minutes", "0.1", "--lr", "6e-3", "--warmup", "1")
    assert got == (6, 6, pytest.approx(1e-3))
    with pytest.raises(ValueError, match="finished, with 6 steps in 0.1 minutes"):
        run("--resume")
    torch.save({**state, "seconds": 3.0}, tmp_path / "ckpt.pt")                 # as if it had been stopped
    assert run("--resume", "--log-every", "100")[1] == (9, 6, pytest.approx(1e-3))
    assert run("--resume", "--log-every", "100", "--max-minutes", "0.2")[1] == (15, 12, pytest.approx(6e-3 / 12))


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    """At step 7 the loss of level 2 is infinite: the run stops, names step and level, and keeps the good checkpoint of step 5."""
    loss, weights = DiffusionHead.loss, []

    def broken(self, target, noise, z, i, cond, band):                          # passes 1 to 10 are the steps, 11 is the look at the levels
        weights.extend([self.output["16"].weight.detach().clone()] * self.training)
        return loss(self, target, noise, z, i, cond, band) * torch.where((i == 1) & (len(weights) in (7, 11)), math.inf, 1.0)
    monkeypatch.setattr(DiffusionHead, "loss", broken), monkeypatch.setattr(train_cifar, "count_flops", lambda function: dict(Global=1))
    with pytest.raises(ValueError, match=r"not finite since step 7, levels \[2\].*ckpt.pt holds the last good state"):
        train_cifar.main([*SMALL, "--levels-per-image", "0", "--save-minutes", "1e-9", "--steps", "20", "--out", str(tmp_path)])
    state = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    assert state["step"] == 5 and all(v.isfinite().all() for v in state["model"].values())
    assert len(weights) == 11 and not torch.equal(weights[5], weights[6]) and torch.equal(weights[6], weights[10])  # kept for the look


def test_ema_is_the_running_average(tmp_path, monkeypatch):
    """Step k weighs the new weights by 9/(10 + k) while that is more than 1 - decay: against the average worked out from saved steps."""
    weights, ema = [], None
    for k in range(1, 4):
        out = str(tmp_path / str(k))
        train_cifar.main([*SMALL, "--steps", str(k), "--lr-schedule", "constant", "--out", out])
        state = torch.load(os.path.join(out, "ckpt.pt"), weights_only=True)
        weights.append(state["model"]["head.output.16.weight"])
    start = torch.zeros_like(weights[0])                                        # this layer starts at zero
    ema = start
    for k, w in enumerate(weights, 1):
        ema = ema + 9 / (10 + k) * (w - ema)
    assert torch.allclose(state["ema"]["head.output.16.weight"], ema, atol=1e-7) and ema.abs().max() > 0
    average, decays = FAR.average, []
    monkeypatch.setattr(FAR, "average", lambda self, model, decay: decays.append(decay) or average(self, model, decay))
    train_cifar.main([*SMALL, "--steps", "12", "--ema", "0.5", "--out", str(tmp_path / "capped")])
    assert decays == [min(0.5, (1 + k) / (10 + k)) for k in range(1, 13)]


def test_weight_decay_spares_biases_norms_and_embeddings():
    model = tiny(**CAUSAL)
    groups = train_cifar.make_optimizer(model, 1e-3, 0.02).param_groups
    decayed, spared = (g["params"] for g in groups)
    assert [g["weight_decay"] for g in groups] == [0.02, 0.0]
    names = {id(p): n for n, p in model.named_parameters()}
    assert len(decayed) + len(spared) == len(names)
    assert all(names[id(p)].endswith("weight") and not any(w in names[id(p)] for w in ("level", "transformer.label", "no_label", "norm", "position")) for p in decayed)
    assert all(p.ndim == 1 or any(w in names[id(p)] for w in ("level", "transformer.label", "no_label", "position")) for p in spared)


def test_flips_mirror_half_of_the_images_left_to_right(tmp_path, monkeypatch):
    x, index, make_batch, flips = torch.arange(4 * 3 * 64, dtype=torch.uint8).view(4, 3, 8, 8), torch.arange(4).repeat(100), train_cifar.make_batch, []
    assert torch.equal(make_batch(x, index, torch.device("cpu"), False), x[index])
    batch = make_batch(x, index, torch.device("cpu"), True)
    same, mirrored = ((batch == other[index]).flatten(1).all(1) for other in (x, torch.from_numpy(np.asarray(x)[..., ::-1].copy())))
    assert (same ^ mirrored).all() and 0.4 < mirrored.float().mean() < 0.6
    monkeypatch.setattr(train_cifar, "make_batch", lambda images, index, device, flip, scale: flips.append(flip) or make_batch(images, index, device, flip, scale))
    for flag, want in (([], False), (["--flip"], True)):                        # the last batch is one of the training; digits are not mirrored
        train_cifar.main([*SMALL, "--steps", "1", "--out", str(tmp_path), "--overwrite", *flag])
        assert flips[-1] is want
    assert train_cifar.parse_args(["--data", "cifar10"]).flip


def test_epochs_visit_every_image_once(tmp_path, monkeypatch):
    """23 images, batches of 5: four steps an epoch, no image twice in one, another order in the next, and the same again for the same seed."""
    seen, make_batch = [], train_cifar.make_batch
    monkeypatch.setattr(train_cifar, "make_batch", lambda images, index, *rest: seen.append(index.tolist()) or make_batch(images, index, *rest))
    images, labels, info = train_cifar.load_digits()
    monkeypatch.setattr(train_cifar, "load_digits", lambda *_: (images[:23], labels[:23], info))
    for _ in range(2):
        train_cifar.main([*SMALL, "--steps", "8", "--batch", "5", "--overwrite", "--out", str(tmp_path)])
    steps = [index for index in seen if len(index) == 5]                        # the other call measures scales
    assert len(steps) == 16 and steps[:8] == steps[8:]
    epochs = [sum(steps[:4], []), sum(steps[4:8], [])]
    assert all(len(set(e)) == 20 and set(e) <= set(range(23)) for e in epochs) and epochs[0] != epochs[1]


def test_sample_writes_pictures_npz_and_pngs(digits, tmp_path):
    ckpt = os.path.join(digits, "ckpt.pt")
    arrays = []
    for batch in ("7", "12"):
        sample.main(["--ckpt", ckpt, "--labels", "1,4-5", "--n", "12", "--batch", batch, "--npz", str(tmp_path / "s.npz"), "--png", str(tmp_path / "png"), "--out", str(tmp_path)])
        arrays.append(np.load(tmp_path / "s.npz"))
    x, y = arrays[1]["arr_0"], arrays[1]["arr_1"]
    assert x.shape == (12, 8, 8, 1) and x.dtype == np.uint8 and y.dtype == np.int64 and y.tolist() == [1] * 4 + [4] * 4 + [5] * 4
    assert np.abs(x.astype(int) - arrays[0]["arr_0"]).max() <= 1                # whatever the batch size
    assert np.array_equal(np.asarray(Image.open(tmp_path / "png" / "000003.png")), x[3, :, :, 0])
    assert Image.open(tmp_path / "levels.png").size == (3 * 50 + 2, 3 * 50 + 2)    # the first image of each class
    grid = np.asarray(Image.open(tmp_path / "samples.png"))[2:50, 52:100, 0]    # second image, each pixel enlarged 6 times
    assert np.array_equal(grid[::6, ::6], x[1, :, :, 0]) and sorted(os.listdir(tmp_path)) == ["levels.png", "png", "s.npz", "samples.png"]


def test_variations_of_a_picture(digits, tmp_path):
    ckpt, picture = os.path.join(digits, "ckpt.pt"), np.load(os.path.join(ROOT, "assets", "digits.npz"))["images"][3]
    Image.fromarray(picture[:, :, 0]).resize((24, 24), Image.Resampling.NEAREST).save(tmp_path / "three.png")
    flags = ["--ckpt", ckpt, "--from", str(tmp_path / "three.png"), "--n", "6", "--labels", "3", "--out", str(tmp_path)]
    x = {}
    for keep in ("0.0", "0.5"):
        sample.main([*flags, "--keep", keep, "--npz", str(tmp_path / "x.npz")])
        x[keep] = far.dct(torch.from_numpy(np.load(tmp_path / "x.npz")["arr_0"]).permute(0, 3, 1, 2) / 127.5 - 1, 0.5)
    want = far.dct(torch.tensor(sample.read_image(str(tmp_path / "three.png"), 8, 1))[None] / 127.5 - 1, 0.5)
    assert (x["0.5"] - want).abs().mean() < 0.1 < (x["0.0"] - want).abs().mean()  # clamped to [-1, 1], so not exactly
    for wrong, words in ((["--keep", "0.3"], "0.25, 0.5"), ([], "0.25, 0.5"), (["--keep", "0.5", "--from", ckpt], "cannot be read as a picture"),
                         (["--keep", "0.5", "--from", ""], "needs --from"), (["--ordering", "raster"], "model's own, dct")):
        with pytest.raises(ValueError, match=words):
            sample.main([*flags, *wrong])


def test_an_ordering_of_the_user(tmp_path, monkeypatch, capsys):
    """Trained, resumed and sampled with a function in a file; one that breaks a law is told so; what it is not given by name is not run."""
    (tmp_path / "mine.py").write_text("def columns(x, keep):\n    return x * (0 * x[:1, :1, :1] + 1).cumsum(3).le(keep * x.shape[-1])\ndef half(x, keep):\n    return keep * x\n")
    name, out = f"{tmp_path}/mine.py:columns", str(tmp_path / "run")
    for flags in (["--steps", "2"], ["--steps", "4", "--resume"]):
        train_cifar.main([*SMALL, "--ordering", name, "--out", out, *flags])
    assert f"{name}:\n  all laws hold" in capsys.readouterr().out
    levels = np.asarray(Image.open(os.path.join(out, "levels.png")).convert("L"))[2:50, 2:50]
    assert len(np.unique(levels[:, 12:])) == 1 < len(np.unique(levels[:, :12]))   # x_1 shows two of eight columns
    ORDERINGS.pop(name)
    with pytest.raises(ValueError, match="add --ordering .*mine.py:columns"):
        sample.main(["--ckpt", os.path.join(out, "ckpt.pt"), "--out", out])
    sample.main(["--ckpt", os.path.join(out, "ckpt.pt"), "--out", out, "--ordering", name, "--n", "4"])
    capsys.readouterr()
    sample.load_ordering(f"{tmp_path}/mine.py:half", 8)
    assert "idempotent: broken at keep 0.5, largest error" in capsys.readouterr().out
    for wrong in (f"{tmp_path}/mine.py:rows", "nowhere.py:rows"):
        with pytest.raises(ValueError, match="must name a file and an ordering"):
            train_cifar.main(["--ordering", wrong])
    ORDERINGS.pop(name), ORDERINGS.pop(f"{tmp_path}/mine.py:half")


def test_a_sweep_resumes_and_writes_a_table_and_a_plot(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(train_cifar.SWEEPS, "targets", ["--target next", "--ordering high_to_low --levels 0.5,1", "--ordering high_to_low --levels 0.5,1 | --stops 1"])
    command, mains = [*SMALL, "--sweep", "targets", "--steps", "2", "--head-steps", "1", "--seed", "7", "--out", "elsewhere"], []
    draw, drawn_by = sample.main, []
    monkeypatch.setattr(sample, "main", lambda argv: drawn_by.append(argv) or draw(argv))
    train_cifar.main(command)
    assert len(drawn_by) == 15 and all(argv[argv.index("--device") + 1] == train_cifar.parse_args([]).device for argv in drawn_by)
    rows = list(csv.DictReader(open("out/targets.csv")))
    assert [(row["run"], row["seed"]) for row in rows] == [(run, seed) for run in train_cifar.SWEEPS["targets"] for seed in "012"]
    assert len({row["fd"] for row in rows}) == 9 and [[bool(row[f"deviation_{i}"]) for i in (1, 2, 3)] for row in rows[::3]] == [[1, 1, 1], [1, 1, 0], [0, 1, 0]]
    assert len(list(pathlib.Path("out/targets").glob("*/ckpt.pt"))) == 6 and all(Image.open(f"out/targets{part}.png").size[0] > 500 for part in ("", "_loss"))
    run, = (str(path) for path in pathlib.Path("out/targets").glob("target_next_seed_1_*"))
    model, state = sample.load_checkpoint(f"{run}/ckpt.pt")
    assert state["settings"]["seed"] == 1
    drawn = torch.cat([x for _, x in sample.draw_images(model, sample.parse_labels("0-9", 1797, 10), 1, return_levels=True)])
    data = far.dct(torch.from_numpy(np.load(train_cifar.DIGITS)["images"]).permute(0, 3, 1, 2) / 127.5 - 1, 0.25)
    assert float(rows[1]["deviation_1"]) == pytest.approx((drawn[:, 0].std(0).mean() / data.std(0).mean()).item(), rel=1e-4)
    os.remove(f"{run}/scores.json")                     # as if it had been stopped there
    train = train_cifar.train
    monkeypatch.setattr(train_cifar, "train", lambda args, *rest: mains.append(args.out) or train(args, *rest))
    train_cifar.main(command)
    assert mains == [run] and list(csv.DictReader(open("out/targets.csv"))) == rows


def test_every_run_of_a_sweep_is_possible(tmp_path, monkeypatch):
    """Hours of runs must not end at a wrong flag: all train a valid model, and each way of drawing draws from one."""
    monkeypatch.setitem(ORDERINGS, "high_to_low", lambda x, keep: x - far.dct(x, 1 - keep))
    runs = [flags.partition(" | ")[::2] for runs in train_cifar.SWEEPS.values() if isinstance(runs, list) for flags in runs]
    for drawn, run in {drawn: run for run, drawn in runs}.items():
        config = train_cifar.parse_args(run.split()).config
        torch.save(dict(config=config.to_dict(), ema=FAR(config).state_dict()), tmp_path / "ckpt.pt")
        sample.main(["--ckpt", str(tmp_path / "ckpt.pt"), "--n", "2", "--out", str(tmp_path), *drawn.split()])
    for run in {run for run, _ in runs}:
        assert train_cifar.parse_args(run.split()).config.num_classes == 10


def test_the_experiments_of_the_tutorial_are_sweeps(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path), monkeypatch.setenv("FAR_FAST", "1")
    for name in ("quantisation", "spectral_bias"):
        with train_cifar.plt.rc_context():                                      # the tutorial sets a resolution of its own
            train_cifar.main(["--sweep", name])
        assert Image.open(f"out/{name}.png").size[0] > 300
    few, many = csv.DictReader(open("out/quantisation.csv"))
    assert (few["bits"], many["bits"]) == ("128", "256") and 0.01 < float(many["error"]) < 0.7 * float(few["error"]) < 0.1  # 4 levels of 16 tokens of log2(K) bits
    start, *_, end = [row for row in csv.DictReader(open("out/spectral_bias.csv")) if row["seed"] == "0"]
    assert float(end["keep_0.125"]) < 0.9 * float(start["keep_0.125"]) and all(float(row["keep_1"]) == pytest.approx(1, abs=0.1) for row in (start, end))


def test_score_by_brute_force():
    g = np.random.default_rng(0)
    real, fake = g.integers(0, 200, (60, 2, 2, 1)).astype(np.uint8), g.integers(50, 256, (40, 2, 2, 1)).astype(np.uint8)
    truth, labels, k = g.integers(0, 3, 60), g.integers(0, 3, 40), 5
    got = sample.score(torch.from_numpy(fake), torch.from_numpy(labels), torch.from_numpy(real), torch.from_numpy(truth))
    a, b = fake.reshape(40, 4) / 255, real.reshape(60, 4) / 255
    A, B = np.cov(a.T), np.cov(b.T)
    fd = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(A + B - 2 * scipy.linalg.sqrtm(A @ B).real)
    far_from = lambda x, y: sorted(np.linalg.norm(x - other) for other in y)
    inside = lambda x, y: any(np.linalg.norm(x - other) <= far_from(other, y)[k] for other in y)   # [0] is the point itself
    votes = [np.bincount(truth[np.argsort([np.linalg.norm(x - other) for other in b])[:k]], minlength=3) for x in a]
    want = dict(fd=fd, precision=np.mean([inside(x, b) for x in a]), recall=np.mean([inside(x, a) for x in b]), class_acc=np.mean([v.argmax() == y for v, y in zip(votes, labels)]))
    assert 0.1 < want["recall"] < 0.9 and want == pytest.approx(got, abs=1e-6)
    same = sample.score(torch.from_numpy(real), torch.from_numpy(truth), torch.from_numpy(real), torch.from_numpy(truth))
    assert same["precision"] == same["recall"] == 1 and same["fd"] == pytest.approx(0, abs=1e-6)


def test_real_compares_and_export_keeps_guidance(digits, tmp_path, capsys):
    ckpt, out = os.path.join(digits, "ckpt.pt"), ["--out", str(tmp_path / "out")]
    sample.main(["--ckpt", ckpt, "--n", "60", "--npz", str(tmp_path / "a.npz"), *out])
    capsys.readouterr()
    sample.main(["--ckpt", ckpt, "--n", "60", "--real", str(tmp_path / "a.npz"), *out])     # against itself
    assert "fd 0.000 precision 1.000 recall 1.000" in capsys.readouterr().out.replace("-0.000", "0.000")
    sample.main(["--ckpt", ckpt, "--n", "8", "--labels", "none", "--npz", str(tmp_path / "none.npz"), *out])
    assert np.load(tmp_path / "none.npz").files == ["arr_0"]
    half = str(tmp_path / "new" / "half.pt")
    sample.main(["--ckpt", ckpt, "--export", half, "--guidance", "2.5", "--guidance-schedule", "constant"])
    model, rest = sample.load_checkpoint(half)
    whole, _ = sample.load_checkpoint(ckpt)
    assert model.config == dataclasses.replace(whole.config, guidance=2.5, guidance_schedule="constant") and os.path.getsize(half) < 0.2 * os.path.getsize(ckpt)
    assert all(v.dtype == torch.float32 and torch.equal(v, whole.state_dict()[k].half().float()) for k, v in model.state_dict().items())
    images = {}
    for name, flags in (("default", []), ("same", ["--guidance", "2.5", "--guidance-schedule", "constant"]), ("none", ["--guidance", "1"])):
        sample.main(["--ckpt", half, "--n", "10", "--npz", str(tmp_path / "g.npz"), *flags, *out])
        images[name] = np.load(tmp_path / "g.npz")["arr_0"]
    assert np.array_equal(images["default"], images["same"]) and not np.array_equal(images["default"], images["none"])


def test_bench_counts_the_operations_of_each_setting(tmp_path, capsys):
    """The transformer works once a level; the operations of the head are those of one step times the number of steps."""
    model = tiny(depth=1, head_depth=1)
    torch.save(dict(config=model.config.to_dict(), ema=model.state_dict()), tmp_path / "tiny.pt")
    sample.main(["--ckpt", str(tmp_path / "tiny.pt"), "--n", "10", "--real", os.path.join(ROOT, "assets", "digits.npz"), "--bench", "--out", str(tmp_path)])
    lines = re.findall(r"^(--.*)\n.*\n(.*) MFLOP an image, (.*) of them .*\nfd ", capsys.readouterr().out, re.M)
    counted = {flags: (1e6 * float(total), 1e6 * float(trunk)) for flags, total, trunk in lines}
    assert len(counted) == 15 and len({trunk for _, trunk in counted.values()}) == 1
    head = {flags: total - trunk for flags, (total, trunk) in counted.items()}
    for solver in ("ddim", "dpmpp_2m"):
        four = head[f"--solver {solver} --head-steps 4"]
        step = (head[f"--solver {solver} --head-steps 25"] - four) / 21         # of all levels
        for steps, mean in (("6", 6), ("8", 8), ("12", 12), ("4,8,12", 8), ("12,8,4", 8)):
            assert head[f"--solver {solver} --head-steps {steps}"] == pytest.approx(four + (mean - 4) * step, rel=0.01)
    assert head["--solver ddpm --head-steps paper --temperature paper"] == pytest.approx(four + 66 * step, rel=0.01)
    projected = model.head.project(torch.zeros(1, 16, 16), 0, torch.zeros(1, 1, 16))
    one = sample.count_flops(lambda: model.head(torch.zeros(1, 16, 4), torch.zeros(1, 1), projected))
    assert step == pytest.approx(3 * one["Global"], rel=0.01) and set(one) == {"Global", "DiffusionHead"} | {part for part in one if "." in part}


def test_paper_means_its_sampler_unless_told_otherwise(digits, tmp_path, monkeypatch):
    draw, seen = FAR.sample, []
    monkeypatch.setattr(FAR, "sample", lambda self, labels, **settings: seen.append(settings) or draw(self, labels, **{**settings, "head_steps": 1}))
    sample.main(["--ckpt", os.path.join(digits, "ckpt.pt"), "--n", "1", "--out", str(tmp_path), "--paper"])
    sample.main(["--ckpt", os.path.join(digits, "ckpt.pt"), "--n", "1", "--out", str(tmp_path), "--paper", "--solver", "ddim", "--temperature", "0.5"])
    for settings, want in zip(seen, (("ddpm", "paper", "paper"), ("ddim", "paper", 0.5)), strict=True):
        assert tuple(settings[name] for name in ("solver", "head_steps", "temperature")) == want


def test_grey_values_are_rounded_and_cut_off():
    shades = torch.arange(256)
    assert torch.equal(sample.to_uint8(shades / 127.5 - 1), shades.byte())
    assert sample.to_uint8(torch.tensor([99.6, 100.4, -3.0, 300.0]) / 127.5 - 1).tolist() == [100, 100, 0, 255]


def test_pictures_are_resized_without_aliasing(tmp_path):
    """A chessboard of single pixels is grey from afar."""
    Image.fromarray(np.uint8(np.indices((64, 64)).sum(0) % 2 * 255)).save(tmp_path / "board.png")
    assert np.abs(sample.read_image(tmp_path / "board.png", 8, 1).astype(int) - 127).max() < 20


def test_bfloat16_sampling_is_close(digits):
    model, _ = sample.load_checkpoint(os.path.join(digits, "ckpt.pt"))
    a, b = (torch.cat([x for _, x in sample.draw_images(model, torch.arange(40) % 10, bf16=bf16, head_steps=8, progress=False)]) for bf16 in (False, True))
    assert not torch.equal(a, b) and a.dtype == b.dtype == torch.float32 and (a - b).abs().mean() < 0.05
    draw = model.sample
    model.sample = lambda *rest, **settings: draw(*rest, **settings) if torch.is_inference_mode_enabled() else 1 / 0
    for _, x in sample.draw_images(model, torch.arange(3), bf16=True, progress=False):
        assert not torch.is_autocast_enabled("cpu") and not torch.is_inference_mode_enabled() and not x.is_inference()  # the caller's own modes stay as they were


@pytest.mark.parametrize("flags, steps, minutes", [([], None, 2.0), (["--steps", "7"], 7, None), (["--max-minutes", "3"], None, 3.0), (["--steps", "7", "--max-minutes", "3"], 7, 3.0),
                                                   (["--data", "cifar10"], 75500, None), (["--data", "cifar10", "--max-minutes", "3"], None, 3.0)])
def test_length_of_a_run(flags, steps, minutes):
    args = train_cifar.parse_args(flags)
    assert (args.steps, args.max_minutes, args.lr_schedule) == (steps, minutes, "linear")


def test_resumed_run_keeps_its_length(tmp_path, monkeypatch):
    seen = []
    train_cifar.main([*SMALL, "--steps", "6", "--out", str(tmp_path)])
    state = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    torch.save({**state, "step": 4}, tmp_path / "ckpt.pt")                      # as if it had been stopped
    monkeypatch.setattr(train_cifar, "train", lambda args, *_: seen.append((args.steps, args.max_minutes)))
    for flags in ([], ["--steps", "9"], ["--max-minutes", "1"]):
        train_cifar.main(["--out", str(tmp_path), "--resume", *flags])
    assert seen == [(6, None), (9, None), (None, 1.0)]


def test_scales_are_those_of_the_whole_set(tmp_path, monkeypatch):
    """Images sorted by class, the first half black: the deviation is not that of the first images."""
    images, labels, info = train_cifar.load_digits()
    images = torch.cat([torch.zeros_like(images), images, images])
    monkeypatch.setattr(train_cifar, "load_digits", lambda *_: (images, labels.repeat(3), info))
    train_cifar.main([*SMALL, "--steps", "1", "--target", "residual", "--out", str(tmp_path)])
    x = images / 127.5 - 1
    want = [(far.dct(x, b) - far.dct(x, a)).std().item() for a, b in ((0, 0.25), (0.25, 0.5), (0.5, 1))]
    assert torch.load(tmp_path / "ckpt.pt", weights_only=True)["model"]["data_scale"].tolist() == pytest.approx(want, rel=0.03)


def test_load_checkpoint_gives_ema_weights(digits):
    model, rest = sample.load_checkpoint(os.path.join(digits, "ckpt.pt"))
    state = torch.load(os.path.join(digits, "ckpt.pt"), weights_only=True)
    assert all(torch.equal(v, state["ema"][k]) for k, v in model.state_dict().items()) and rest["step"] == 300 and not model.training


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil",)


def test_bad_checkpoints(digits, tmp_path):
    whole = open(os.path.join(digits, "ckpt.pt"), "rb").read()
    (tmp_path / "cut.pt").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Evil(), protocol=2))
    torch.save({"weights": torch.zeros(3)}, tmp_path / "foreign.pt"), torch.save({"config": 5, "ema": {}}, tmp_path / "number.pt")
    state = torch.load(os.path.join(digits, "ckpt.pt"), weights_only=True)
    torch.save({**state, "config": {**state["config"], "width": 32}}, tmp_path / "other.pt")
    torch.save({**state, "ema": {name: value + math.nan for name, value in state["ema"].items()}}, tmp_path / "diverged.pt")
    for name, words in (("diverged", "not finite"), ("missing", "not a file"), ("cut", "cut off"), ("text", "cannot be read"), ("evil", "cannot be read"), ("foreign", "no FAR model"), ("number", "no FAR model"), ("other", "does not fit")):
        with pytest.raises(ValueError, match=words):
            sample.load_checkpoint(str(tmp_path / f"{name}.pt"))
    assert not os.path.exists("evil")


@pytest.mark.parametrize("flags, words", [
    (["--seed", "-1"], "at least 0"), (["--npz", "."], "is a folder"), (["--real", "nowhere"], "an npz file"), (["--real", "cut.npz"], "an npz file"), (["--export", "there/x.pt/.."], "is a folder"), (["--npz", "float.npz", "--real", "float.npz"], "is read here"), (["--real", "float.npz"], "uint8"), (["--real", "names.npz"], "uint8"), (["--labels", "0-10"], "10 classes"), (["--labels", "cat"], "not understood"), (["--labels", "1-3-5"], "not understood"), (["--labels", "5-3"], "out of range"), (["--n", "0"], "at least 1"), (["--head-steps", "0"], "at least 1")])
def test_wrong_sample_flags(digits, flags, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("float.npz", np.zeros((9, 8, 8, 1), np.float32), np.arange(9)), np.savez("names.npz", np.array(["a", "b"]))
    data = pathlib.Path(ROOT, "assets", "digits.npz").read_bytes()
    pathlib.Path("cut.npz").write_bytes(data[:2000] + bytes([data[2000] ^ 1]) + data[2001:])  # a damaged byte
    with pytest.raises(ValueError, match=words):
        sample.main(["--ckpt", os.path.join(digits, "ckpt.pt"), *flags])


@pytest.mark.parametrize("flags, words", [
    (["--seed", "-1"], "at least 0"), (["--max-minutes", "inf"], "below 1e9"), (["--path", "pictures"], "--data folder"), (["--weight-decay", "-1"], "at least 0"), (["--cond-dim", "4", "--cond-tokens", "2"], "has classes"), (["--steps", "0"], "above 0"), (["--batch", "5000"], "1797"), (["--num-classes", "5"], "10 classes"), (["--image-size", "16"], "images of"),
    (["--device", "warp"], "warp"), (["--levels", "0.5,0.2"], "increase"), (["--data", "folder", "--path", "nowhere"], "nowhere"), (["--data", "folder"], "--path is missing"), (["--data", "folder", "--path", ".", "--channels", "4"], "grey"),
    (["--resume"], "not a file"), (["--ema", "1"], "lie in"), (["--patch-size", "3"], "divisible")])
def test_wrong_training_flags(tmp_path, flags, words):
    with pytest.raises(ValueError, match=words):
        train_cifar.main(["--out", str(tmp_path / "run"), "--steps", "1", *flags] if "--steps" not in flags else ["--out", str(tmp_path / "run"), *flags])
    assert not os.path.exists(tmp_path / "run")


def test_a_run_is_not_overwritten(digits):
    for flags, words in ((["--steps", "1"], "--overwrite"), (["--steps", "300", "--resume"], "finished"), (["--steps", "600", "--resume", "--width", "32"], "contradicts"),
                         (["--steps", "600", "--resume", "--seed", "2"], "--seed 0")):
        with pytest.raises(ValueError, match=words):
            train_cifar.main(["--out", digits, *flags])


# ---------------------------------------------------------------------------------------------------------------------
# Data


def folder_config(size, channels=3):
    return FARConfig(image_size=size, channels=channels, patch_size=1)


def test_folder_of_images(tmp_path, monkeypatch):
    """Wide, tall, grey and small images become centred squares of the asked size; classes in sorted order."""
    monkeypatch.chdir(tmp_path)
    for name, size, mode in (("b/wide.png", (40, 20), "RGB"), ("b/tall.jpg", (20, 40), "RGB"), ("a/grey.png", (16, 16), "L"), ("a/small.png", (8, 8), "RGB")):
        os.makedirs(tmp_path / "train" / name[0], exist_ok=True)
        image = Image.new(mode, size, 0)
        image.paste(200 if mode == "L" else (200, 100, 50), (size[0] // 4, size[1] // 4, 3 * size[0] // 4, 3 * size[1] // 4))
        image.save(tmp_path / "train" / name)
    images, labels, info = train_cifar.load_folder(".", folder_config(16))
    assert images.shape == (4, 3, 16, 16) and images.dtype == torch.uint8 and info["classes"] == ["a", "b"] and labels.tolist() == [0, 0, 1, 1]
    assert images[0, :, 8, 8].tolist() == [200] * 3 and images[3, :, 8, 8].tolist() == [200, 100, 50]
    assert images[3, 0, 8, 0] > 150 and images[3, 0, 0, 8] < 20                 # wide: the crop cuts the sides, not the height
    assert train_cifar.load_folder(".", folder_config(8, 1))[0].shape == (4, 1, 8, 8)


def test_damaged_pictures_are_none_whatever_they_raise(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    for kind in ("png", "jpeg", "tiff", "ppm", "bmp", "gif"):
        path = tmp_path / f"x.{kind}"
        Image.fromarray(image).save(path)
        whole = path.read_bytes()
        assert sample.read_image(path, 16).shape == (3, 16, 16)
        for cut in (len(whole) // 2, 20, 10):
            path.write_bytes(whole[:cut])
            read = sample.read_image(path, 16)
            assert read is None or read.shape == (3, 16, 16)


def test_pictures_of_16_bits_and_of_turned_cameras(tmp_path):
    """A grey PNG of 16 bits keeps its shades; a photograph stands as its EXIF orientation says."""
    shades = np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(shades).save(tmp_path / "deep.png")
    assert np.array_equal(sample.read_image(tmp_path / "deep.png", 16, 1)[0], shades // 256)
    turned, exif = Image.fromarray(np.uint8(shades // 256)), Image.Exif()
    exif[0x0112] = 6                                                            # shown after a quarter turn clockwise
    turned.save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(sample.read_image(tmp_path / "turned.png", 16, 1)[0], np.rot90(shades // 256, -1))


def test_too_little_room_is_said_before_images_are_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.makedirs("set/train/a")
    Image.new("RGB", (8, 8)).save("set/train/a/0.png")
    monkeypatch.setattr(train_cifar.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=100))
    monkeypatch.setattr(train_cifar, "read_image", lambda *_, **__: 1 / 0)
    with pytest.raises(ValueError, match="more than is free"):
        train_cifar.load_folder("set", folder_config(8))


def test_folder_memory_map_is_used_again_and_built_anew(tmp_path, monkeypatch):
    """Decoded once; again after a change of a file, of the size, or after an interrupted build; bad images are named, or left out on request."""
    monkeypatch.chdir(tmp_path)
    os.makedirs("set[1].v2/train/a")
    for k in range(6):
        Image.new("RGB", (8, 8), (10 * k, 0, 0)).save(f"set[1].v2/train/a/{k}.png")
    reads, read_image = [], train_cifar.read_image
    monkeypatch.setattr(train_cifar, "read_image", lambda path, size, channels: reads.append(path) or read_image(path, size, channels))

    def load(size=8, count=6, **settings):
        reads.clear()
        images, labels, _ = train_cifar.load_folder("set[1].v2", folder_config(size), **settings)
        return images[:, 0, 0, 0].tolist(), len(labels), len(reads)
    assert load() == ([0, 10, 20, 30, 40, 50], 6, 6) and load() == ([0, 10, 20, 30, 40, 50], 6, 0)
    assert load(4)[2] == 6 and load()[2] == 0 and load(4)[2] == 0               # each size has its own
    Image.new("RGB", (8, 8), (200, 0, 0)).save("set[1].v2/train/a/3.png")
    assert load() == ([0, 10, 20, 200, 40, 50], 6, 6)
    os.remove("set[1].v2/train/a/0.png")
    assert load() == ([10, 20, 200, 40, 50], 5, 5)
    open("set[1].v2/train/a/1.png", "w").write("no image")
    with pytest.raises(ValueError, match="1 images cannot be read, first .*1.png.*--skip-bad"):
        load()
    assert load(skip_bad=True) == ([20, 200, 40, 50], 4, 5) and load(skip_bad=True)[2] == 0
    with pytest.raises(ValueError, match="1.png"):                              # leaving out is not remembered
        load()

    def interrupted(path, size, channels):
        if path.endswith("4.png"):
            raise KeyboardInterrupt
        return read_image(path, size, channels)
    monkeypatch.setattr(train_cifar, "read_image", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_cifar.load_folder("set[1].v2", folder_config(2), skip_bad=True)
    monkeypatch.setattr(train_cifar, "read_image", lambda path, size, channels: reads.append(path) or read_image(path, size, channels))
    assert load(2, skip_bad=True) == ([20, 200, 40, 50], 4, 5)

    def beside(path, size, channels):                                           # a second first run while this one builds
        if path.endswith("2.png"):
            monkeypatch.setattr(train_cifar, "read_image", read_image)
            assert train_cifar.load_folder("set[1].v2", folder_config(1), skip_bad=True)[0][:, 0, 0, 0].tolist() == [20, 200, 40, 50]
        return read_image(path, size, channels)
    monkeypatch.setattr(train_cifar, "read_image", beside)
    assert train_cifar.load_folder("set[1].v2", folder_config(1), skip_bad=True)[0][:, 0, 0, 0].tolist() == [20, 200, 40, 50]
    assert len(os.listdir("data")) == 4                                         # a folder a size: no unfinished one is left


def write_imagenet64(folder, evil=None):
    for k in range(1, 11):
        data = np.full((2, 3, 64, 64), k, np.uint8)
        data[:, 2, 5, 7] = 100 + k                                              # blue, row 5, column 7
        batch = {"data": data.reshape(2, -1), "labels": [k, 1001 - k], "mean": np.zeros(12288)}
        (folder / f"train_data_batch_{k}").write_bytes(pickle.dumps(evil if evil and k == 4 else batch, protocol=2))


def test_imagenet64_batches(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_imagenet64(tmp_path)
    for _ in range(2):                                                          # built, then used again
        images, labels, info = train_cifar.load_imagenet64(".", folder_config(64))
        assert images.shape == (20, 3, 64, 64) and images[6, 0, 0, 0] == 4 and images[6, 2, 5, 7] == 104 and images[6, 2, 7, 5] == 4
        assert labels.tolist() == [v for k in range(10) for v in (k, 999 - k)] and len(info["classes"]) == 1000
    new, old = (f"cnumpy.{core}.multiarray\n".encode() for core in ("_core", "core"))
    for before, after in ((new, old), (old, new)):                              # old numpy wrote the official files
        for k in range(1, 11):
            file = tmp_path / f"train_data_batch_{k}"
            file.write_bytes(file.read_bytes().replace(before, after))
        assert after in file.read_bytes() and train_cifar.load_imagenet64(".", folder_config(64))[0][6, 0, 0, 0] == 4
    for evil in (Evil(), {"data": np.zeros((2, 5), np.uint8), "labels": [1, 2]}, {"data": np.zeros((1, 12288), np.uint8), "labels": [0]}, {"labels": Evil()}, [1]):
        write_imagenet64(tmp_path, evil)
        with pytest.raises(ValueError, match="train_data_batch_4 is no batch"):
            train_cifar.load_imagenet64(".", folder_config(64))
    assert not os.path.exists("evil")
    os.remove("train_data_batch_7")
    with pytest.raises(ValueError, match="must hold train_data_batch_1"):
        train_cifar.load_imagenet64(".", folder_config(64))
    os.makedirs("train/cat")
    Image.new("RGB", (70, 80), (1, 2, 3)).save("train/cat/1.png")
    assert train_cifar.load_imagenet64(".", folder_config(64))[2]["classes"] == ["cat"]


def test_cifar10_through_torchvision(tmp_path, monkeypatch):
    """Small files in the official layout; and one sentence when nothing can be downloaded."""
    base = tmp_path / "cifar-10-batches-py"
    base.mkdir()
    for k, name in enumerate(["data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5"]):
        with open(base / name, "wb") as f:
            pickle.dump({"data": np.full((2, 3072), 10 * k, np.uint8), "labels": [k, 9 - k]}, f)
    with open(base / "batches.meta", "wb") as f:
        pickle.dump({"label_names": [f"class {k}" for k in range(10)]}, f)
    cifar = train_cifar.torchvision.datasets.CIFAR10
    monkeypatch.setattr(cifar, "_check_integrity", lambda self: True)
    monkeypatch.setitem(cifar.meta, "md5", None)
    images, labels, info = train_cifar.load_cifar10(str(tmp_path))
    assert images.shape == (10, 3, 32, 32) and images[4].unique().item() == 20 and labels.tolist() == [0, 9, 1, 8, 2, 7, 3, 6, 4, 5] and len(info["classes"]) == 10

    def offline(self):
        raise OSError("no network")
    monkeypatch.setattr(cifar, "download", offline)
    with pytest.raises(ValueError, match="--data folder"):
        train_cifar.load_cifar10(str(tmp_path))


# ---------------------------------------------------------------------------------------------------------------------
# Latents


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """A tiny AutoencoderKL of diffusers with random weights, saved to a folder: 16 pixels to 4 x 4 latents of 3 channels."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.AutoencoderKL(block_out_channels=(8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
                                    latent_channels=3, norm_num_groups=4, sample_size=16)
    path = str(tmp_path_factory.mktemp("vae"))
    model.save_pretrained(path)
    return path


@pytest.fixture
def reads(monkeypatch):
    """The paths of the pictures that train_cifar reads."""
    read_image, paths = train_cifar.read_image, []
    monkeypatch.setattr(train_cifar, "read_image", lambda path, size: paths.append(path) or read_image(path, size))
    return paths


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """Ten random 16-pixel pictures of two classes in tmp_path/pictures, which becomes the working folder's child."""
    monkeypatch.chdir(tmp_path)
    for k in range(10):
        os.makedirs(f"pictures/train/{'ab'[k % 2]}", exist_ok=True)
        Image.fromarray(np.random.default_rng(k).integers(0, 256, (16, 16, 3), np.uint8)).save(f"pictures/train/{'ab'[k % 2]}/{k}.png")
    return "pictures"


def cache(vae, pictures, out="latents", flags=()):
    train_cifar.main(["--cache-latents", pictures, "--vae", vae, "--path", out, "--image-size", "16", *flags])
    return train_cifar.load_latents(out)


def test_latents_are_the_moments_of_images_and_mirror_images(vae, pictures):
    moments, labels, info = cache(vae, pictures)
    assert moments.shape == (10, 2, 6, 4, 4) and moments.dtype == torch.float16 and labels.tolist() == [0] * 5 + [1] * 5 and info["vae"] == vae
    model = sample.load_vae(vae)
    image = torch.from_numpy(np.array(Image.open("pictures/train/b/3.png"))).permute(2, 0, 1)[None] / 127.5 - 1
    want = torch.cat([model.encode(x).latent_dist.parameters for x in (image, image.flip(3))])
    assert torch.allclose(moments[6].float(), want, atol=5e-3)                  # b/1, b/3, .. follow the five of a
    posterior = torch.cat([model.encode(torch.from_numpy(np.array(Image.open(f"pictures/train/{'ab'[k % 2]}/{k}.png"))).permute(2, 0, 1)[None] / 127.5 - 1)
                           .latent_dist.sample() for k in range(10) for _ in range(50)])
    assert info["scale"] * posterior.std().item() == pytest.approx(1, abs=0.05)


def test_latent_batches_are_drawn_from_the_posterior(vae, pictures):
    """Mean and deviation of many draws of one image, by flip, against the moments of its image or the equal mix with its mirror image."""
    moments, _, info = cache(vae, pictures)
    for flip in (False, True):
        torch.manual_seed(0)
        x = train_cifar.make_batch(moments, torch.zeros(20000, dtype=torch.int64), torch.device("cpu"), flip, info["scale"]) / info["scale"]
        mean, log_variance = moments[0].float().chunk(2, 1)                     # [2, 3, 4, 4] each
        if not flip:
            mean, log_variance = mean[:1], log_variance[:1]
        second = (log_variance.exp() + mean ** 2).mean(0)
        assert torch.allclose(x.mean(0), mean.mean(0), atol=0.05) and torch.allclose(x.square().mean(0), second, rtol=0.08)


def test_latents_restart_does_what_is_missing(vae, pictures, monkeypatch):
    """Stopped in the middle, the second run encodes the rest alone; nothing is taken for whole before; changed images start again."""
    whole = cache(vae, pictures, "whole")[0]
    read_image, reads = train_cifar.read_image, []
    monkeypatch.setattr(train_cifar.cache_latents, "__defaults__", (4,))        # batches of 4

    def stops(path, size):
        reads.append(path)
        if len(reads) > 4:
            raise KeyboardInterrupt
        return read_image(path, size)
    monkeypatch.setattr(train_cifar, "read_image", stops)
    with pytest.raises(KeyboardInterrupt):
        cache(vae, pictures)
    with pytest.raises(ValueError, match="no whole latents.json"):
        train_cifar.load_latents("latents")
    again = []
    monkeypatch.setattr(train_cifar, "read_image", lambda path, size: again.append(path) or read_image(path, size))
    moments = cache(vae, pictures)[0]
    assert len(again) == 6 and torch.allclose(moments.float(), whole.float(), atol=1e-2)
    Image.new("RGB", (16, 16)).save("pictures/train/a/0.png")
    again.clear(), reads.clear()
    monkeypatch.setattr(train_cifar, "read_image", stops)
    with pytest.raises(KeyboardInterrupt):
        cache(vae, pictures)
    with pytest.raises(ValueError, match="no whole latents.json"):              # the old one is not taken for the new one's
        train_cifar.load_latents("latents")
    monkeypatch.setattr(train_cifar, "read_image", lambda path, size: again.append(path) or read_image(path, size))
    moments, _, info = cache(vae, pictures)
    assert len(again) == 6
    train_cifar.main(["--cache-latents", pictures, "--vae", vae, "--path", "latents", "--image-size", "32"])
    again.clear()
    assert torch.equal(cache(vae, pictures)[0], moments) and len(again) == 10   # back to 16 pixels: nothing stale is kept
    shutil.copytree(vae, "another"), again.clear()
    assert cache("another", pictures)[2]["vae"] == "another" and len(again) == 10


def test_processes_share_out_the_latents(vae, pictures, reads, monkeypatch):
    """The second of two encodes every other image, the first the rest and, when all is there, the summary."""
    whole = cache(vae, pictures, "whole")[0]
    reads.clear()
    monkeypatch.setattr(train_cifar.dist, "get_world_size", lambda: 2), monkeypatch.setattr(train_cifar.dist, "barrier", lambda: None)
    files = [f"pictures/train/{'ab'[k % 2]}/{k}.png" for k in (0, 2, 4, 6, 8, 1, 3, 5, 7, 9)]
    with pytest.raises(ValueError, match="5 images cannot be read"):            # alone, without waiting for the second
        cache(vae, pictures)
    assert sorted(reads) == sorted(files[::2])
    reads.clear(), monkeypatch.setattr(train_cifar.dist, "get_rank", lambda: 1)
    with pytest.raises(ValueError, match="no whole latents.json"):
        cache(vae, pictures)
    assert sorted(reads) == sorted(files[1::2])
    reads.clear(), monkeypatch.setattr(train_cifar.dist, "get_rank", lambda: 0)
    assert torch.allclose(cache(vae, pictures)[0].float(), whole.float(), atol=1e-2) and not reads


def test_latents_of_images_that_cannot_be_read(vae, pictures, reads, monkeypatch):
    """They are named when all others are encoded; with --skip-bad, which tries them alone, other images take their places."""
    for k in (2, 3):
        open(f"pictures/train/{'ab'[k % 2]}/{k}.png", "w").write("no image")
    with pytest.raises(ValueError, match="2 images cannot be read, first .*2.png.*3.png.*--skip-bad"):
        cache(vae, pictures)
    with pytest.raises(ValueError, match="no whole latents.json"):
        train_cifar.load_latents("latents")
    reads.clear()
    moments, labels, info = cache(vae, pictures, flags=["--skip-bad"])
    assert sorted(map(os.path.basename, reads)) == ["2.png", "3.png"] and np.isfinite(info["scale"])
    assert torch.equal(moments[[1, 6]], moments[[0, 2]]) and labels.tolist() == [0] * 5 + [1, 0, 1, 1, 1]  # files: a/0, 2, 4, 6, 8, b/1, 3, 5, 7, 9
    assert len(moments.flatten(1).unique(dim=0)) == 8 and moments.flatten(1).any(1).all()
    with pytest.raises(ValueError, match="2 images cannot be read"):            # what this run has touched is not taken for whole
        cache(vae, pictures)
    with pytest.raises(ValueError, match="no whole latents.json"):
        train_cifar.load_latents("latents")
    for k in range(10):
        open(f"pictures/train/{'ab'[k % 2]}/{k}.png", "w").write("no image")
    with pytest.raises(ValueError, match="10 images cannot be read, .*repair or remove them$"):  # --skip-bad is there already
        cache(vae, pictures, flags=["--skip-bad"])
    monkeypatch.setattr(train_cifar.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=100))
    with pytest.raises(ValueError, match="moments.npy needs .*more than is free"):
        cache(vae, pictures, "elsewhere")


def test_training_on_latents_and_decoding(vae, pictures, capsys):
    cache(vae, pictures)
    flags = ["--data", "latents", "--path", "latents", "--preset", "cifar", "--image-size", "4", "--channels", "3", "--patch-size", "2", "--batch", "4", "--steps", "2", *SMALL]
    train_cifar.main([*flags, "--out", "run"])
    rest = sample.load_checkpoint("run/ckpt.pt")[1]
    assert rest["latents"] == {"vae": vae, "scale": train_cifar.load_latents("latents")[2]["scale"]}
    sample.main(["--ckpt", "run/ckpt.pt", "--n", "5", "--labels", "1", "--npz", "s.npz", "--out", "drawn"])
    x = np.load("s.npz")["arr_0"]
    model, _ = sample.load_checkpoint("run/ckpt.pt")
    sample.main(["--ckpt", "run/ckpt.pt", "--export", "half.pt"])
    assert sample.load_checkpoint("half.pt")[1]["latents"] == rest["latents"]
    latents = torch.cat([z for _, z in sample.draw_images(model, torch.ones(5, dtype=torch.int64), progress=False)])
    want = sample.load_vae(vae).decode(latents / rest["latents"]["scale"]).sample
    assert x.shape == (5, 16, 16, 3) and np.abs(x.astype(int) - sample.to_uint8(want).permute(0, 2, 3, 1).numpy()).max() <= 1
    with pytest.raises(ValueError, match="images of"):
        train_cifar.main(["--data", "latents", "--path", "latents", "--steps", "1", "--out", "other", "--batch", "4"])
    with pytest.raises(ValueError, match="AutoencoderKL"):
        sample.load_vae("pictures")


# ---------------------------------------------------------------------------------------------------------------------
# Speed and scale


@pytest.mark.parametrize("settings", [dict(), dict(attention="causal", levels_per_image=0, cond_tokens=3, head_mixing=False, head_draws=2),
                                      dict(levels_per_image=2, cond_tokens=1), dict(levels_per_image=0, head_draws=3)])
def test_counted_flops_of_a_training_step(settings):
    """Against the formula, within 5 %: 2 for each multiply-add of a matrix product forward, twice that backward."""
    c = FARConfig.preset("cifar", **settings)
    W, w, K, mix, F = c.width, c.head_width, c.cond_tokens, c.head_mixing, len(c.levels)
    share = (c.levels_per_image or F) / F if c.attention == "markov" else 1     # of the levels that an image trains
    run = lambda length: c.depth * length * (24 * W * W + 4 * length * W)       # the transformer's blocks on a sequence
    formula = 3 * run(K + sum(c.num_tokens)) if c.attention == "causal" else 0
    for N, D in zip(c.num_tokens, c.token_dim):
        steered = 1 if mix else N                                               # modulations a level and draw
        block = N * (16 * w * w + mix * (8 * w * w + 4 * N * w)) + steered * (12 if mix else 6) * w * w
        drawn = N * 4 * D * w + steered * (6 * w * w + 128 * w) + c.head_depth * block
        formula += 3 * share * (N * 2 * D * W + (run(K + N) if c.attention == "markov" else 0) + 2 * N * W * w + c.head_draws * drawn)
    model, images, labels = FAR(c), torch.zeros(6, 3, 32, 32), torch.zeros(6, dtype=torch.int64)
    assert sample.count_flops(lambda: model(images, labels).backward())["Global"] == pytest.approx(6 * formula, rel=0.05)


def test_far_h_takes_a_step_in_80_gb(monkeypatch):
    """On the meta device, all in float32: weights, their average, gradients and AdamW's two moments, and what the forward pass of one
    image keeps for the backward pass. Fused attention keeps queries, keys, values and its output: so does this stand-in."""
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda q, k, v, **settings: q * k * v)
    monkeypatch.setattr(torch, "autocast", lambda *args, **settings: contextlib.nullcontext())   # it does not know the meta device
    kept = {}
    with torch.device("meta"), torch.autograd.graph.saved_tensors_hooks(lambda x: kept.setdefault(x.untyped_storage()._cdata, x), lambda x: x):
        model = FAR(FARConfig.preset("far_h"))
        model(torch.zeros(1, 16, 16, 16), torch.zeros(1, dtype=torch.int64))
    weights = sum(p.nbytes for p in model.parameters())
    kept = sum(x.untyped_storage().nbytes() for x in kept.values())             # the weights among them
    assert 2 * weights < kept and 4 * weights + kept < 80e9, (weights, kept)


def test_compiled_training_equals_uncompiled(tmp_path, monkeypatch):
    """The captured graphs, run by PyTorch's own operators (no C++ compiler), leave the same weights. CUDA graphs, whose gradients live
    until the next run, only where a step is one run."""
    modes, compiled = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, mode=None: modes.append(mode) or compiled(model, backend="aot_eager"))
    for name, extra in (("a", []), ("b", ["--compile"]), ("c", ["--compile", "--grad-accum", "2"])):
        train_cifar.main([*SMALL, "--patch-size", "4,2,4", "--steps", "3", "--out", str(tmp_path / name), *extra])
    assert modes == ["reduce-overhead", None]
    first, second = (torch.load(tmp_path / d / "ckpt.pt", weights_only=True)["model"] for d in "ab")
    assert all(torch.allclose(first[k], second[k], atol=1e-5) for k in first)


def test_activation_checkpointing_changes_nothing(tmp_path, monkeypatch):
    """With the flag every block forgets and computes again: one of the transformer, and of the head for either size of patch."""
    seen, checkpoint = set(), train_cifar.checkpoint
    monkeypatch.setattr(train_cifar, "checkpoint", lambda f, *inputs, **settings: seen.add(f.__self__) or checkpoint(f, *inputs, **settings))
    for name, extra in (("a", []), ("b", ["--checkpoint-activations"])):
        assert not seen
        train_cifar.main([*SMALL, "--patch-size", "4,2,4", "--steps", "3", "--out", str(tmp_path / name), *extra])
    kinds = [type(block).__name__ for block in seen]
    first, second = (torch.load(tmp_path / d / "ckpt.pt", weights_only=True) for d in "ab")
    assert (kinds.count("Block"), kinds.count("HeadBlock")) == (first["config"]["depth"], 2 * first["config"]["head_depth"])
    assert all(torch.allclose(first["model"][k], second["model"][k], atol=1e-6) for k in first["model"])


def fix_noise_and_levels(setattr):
    """setattr: monkeypatch's, or in a process of its own the usual one."""
    setattr(FAR, "forward", lambda self, x, y: self.losses(x, y, 3).mean())
    setattr(torch, "randn_like", lambda x: torch.sin(1000 * x))
    setattr(far.Path, "draw_t", lambda self, *shape, device=None: torch.full(shape, 0.5))


def test_gradient_accumulation_averages(tmp_path, monkeypatch):
    """Two parts of 8 give the step of one batch of 16, when noise and levels do not depend on how the batch is split."""
    fix_noise_and_levels(monkeypatch.setattr)
    for name, extra in (("a", []), ("b", ["--grad-accum", "2"])):
        train_cifar.main([*SMALL, "--device", "cpu", "--steps", "3", "--batch", "16", "--label-dropout", "0", "--out", str(tmp_path / name), *extra])
    first, second = (torch.load(tmp_path / d / "ckpt.pt", weights_only=True)["model"] for d in "ab")
    assert all(torch.allclose(first[k], second[k], atol=1e-5) for k in first)


FIXED = """
import sys, torch
sys.path.insert(0, {root!r})
import test_far, train_cifar
torch.set_num_threads(1)
test_far.fix_noise_and_levels(setattr)
make = train_cifar.make_batch
def spy(images, index, *rest):
    torch.save((index, torch.initial_seed()), f"{{__file__}}.{{train_cifar.dist.get_rank()}}")
    return make(images, index, *rest)
train_cifar.make_batch = spy
train_cifar.main(sys.argv[1:])
train_cifar.dist.destroy_process_group()
"""


def launch(script, *flags):
    """Runs script under torchrun, in two processes that talk through gloo."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", str(script), *flags]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("world, device, backend", [(1, "cpu", "gloo"), (1, "cuda", "gloo"), (2, "cpu", "gloo"), (2, "cuda", "cpu:gloo,cuda:nccl")])
def test_processes_talk_about_tensors_on_the_cpu(world, device, backend, tmp_path, monkeypatch):
    """The clock and the loss that all ranks agree on lie on the CPU: PyTorch's default beside a GPU, NCCL alone, fails on them. Gradients of GPUs take NCCL."""
    def init(backend=None, **_):
        raise ValueError(f"backend {backend}.")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False), monkeypatch.setattr(torch.distributed, "init_process_group", init)
    monkeypatch.setattr(train_cifar, "use_device", torch.device), monkeypatch.setenv("WORLD_SIZE", str(world))
    with pytest.raises(ValueError, match=re.escape(f"backend {backend}.")):
        train_cifar.main([*SMALL, "--device", device, "--out", str(tmp_path)])


def test_two_processes_equal_one_with_the_doubled_batch(tmp_path, monkeypatch):
    """The step itself: noise and levels fixed, so that weights can be compared; also with accumulation in each process. Each rank notes its last images
    and its seed: shares of the second half of the last batch, and other noise (were it not fixed); one rank writes."""
    (tmp_path / "fixed.py").write_text(FIXED.format(root=ROOT))
    flags = [*SMALL, "--device", "cpu", "--batch", "16", "--steps", "3", "--log-every", "1", "--lr-schedule", "constant", "--label-dropout", "0"]
    fix_noise_and_levels(monkeypatch.setattr)
    train_cifar.main([*flags, "--out", str(tmp_path / "one")])
    out = launch(tmp_path / "fixed.py", *flags, "--out", str(tmp_path / "two"), "--grad-accum", "2")
    (mine, seed), (other, other_seed) = (torch.load(tmp_path / f"fixed.py.{rank}") for rank in (0, 1))
    assert torch.equal(torch.cat([mine, other]), train_cifar.epoch_order(1797, 0, 0)[40:48]) and seed != other_seed
    assert out.count("wrote") == 2 and sorted(os.listdir(tmp_path / "two")) == ["ckpt.pt", "levels.png", "log.csv", "samples.png"]
    first, second = (torch.load(tmp_path / d / "ckpt.pt", weights_only=True) for d in ("one", "two"))
    assert all(torch.allclose(first["model"][k], second["model"][k], atol=1e-5) for k in first["model"])
    for a, b in zip(first["log"], second["log"], strict=True):
        assert a[3] == pytest.approx(b[3], abs=2e-4)                            # the loss is averaged over ranks
    for name in ("one", "two"):
        train_cifar.main(["--device", "cpu", "--out", str(tmp_path / name), "--batch", "16", "--steps", "5", "--resume"])
    first, second = (torch.load(tmp_path / d / "ckpt.pt", weights_only=True)["model"] for d in ("one", "two"))
    assert all(torch.allclose(first[k], second[k], atol=1e-5) for k in first)


def test_kill_and_resume(tmp_path):
    """kill -9 in the middle of a run: the checkpoint is whole, and the resumed run logs what one that never stopped logs."""
    flags = [*SMALL, "--device", "cpu", "--log-every", "20", "--save-minutes", "1e-9", "--lr-schedule", "constant"]
    a, b = tmp_path / "a", tmp_path / "b"
    process = subprocess.Popen([sys.executable, os.path.join(ROOT, "train_cifar.py"), *flags, "--steps", "100000", "--out", str(b)],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while process.poll() is None and not ((b / "log.csv").exists() and len((b / "log.csv").read_text().splitlines()) > 2):
        time.sleep(0.01)
    process.kill(), process.wait()
    assert 20 <= torch.load(b / "ckpt.pt", weights_only=True)["step"] < 100
    threads = torch.get_num_threads()
    torch.set_num_threads(1)                                                    # as in the process that was killed
    try:
        train_cifar.main([*flags, "--steps", "100", "--out", str(a)])
        train_cifar.main([*flags, "--steps", "100", "--out", str(b), "--resume"])
    finally:
        torch.set_num_threads(threads)
    first, second = (torch.load(d / "ckpt.pt", weights_only=True) for d in (a, b))
    assert all(torch.equal(first["ema"][k], second["ema"][k]) for k in first["ema"])
    rows = [[line.split(",")[0:1] + line.split(",")[3:] for line in (d / "log.csv").read_text().splitlines()] for d in (a, b)]
    assert rows[0] == rows[1] and len(rows[0]) == 6


def test_shipped_cifar_weights():
    """The preset's model, under 25 MB; colours as published for CIFAR-10 (mean and deviation by channel), neighbours alike, and
    labels that steer: airplanes and ships are bluer than deer and frogs."""
    path = os.path.join(ROOT, "assets", "far_cifar10.pt")
    model, rest = sample.load_checkpoint(path)
    assert os.path.getsize(path) < 25e6 and model.config == FARConfig.preset("cifar", guidance=[1.5, 1.25], guidance_schedule="constant")
    labels = torch.tensor([0, 8, 4, 6]).repeat_interleave(8)
    x = torch.cat([x for _, x in sample.draw_images(model, labels, head_steps=6, progress=False)])
    pixels = x.clamp(-1, 1) / 2 + 0.5
    assert torch.allclose(pixels.mean((0, 2, 3)), torch.tensor([0.491, 0.482, 0.447]), atol=0.12)
    assert torch.allclose(pixels.std((0, 2, 3)), torch.tensor([0.247, 0.244, 0.262]), atol=0.07)
    assert np.corrcoef(x[..., :-1].flatten(), x[..., 1:].flatten())[0, 1] > 0.85
    blue = (x[:, 2] - x[:, :2].mean(1)).mean((1, 2))
    assert blue[:16].mean() > blue[16:].mean() + 0.1


# ---------------------------------------------------------------------------------------------------------------------
# Notebook


def test_notebook_runs_shortened_and_stands_executed(tmp_path, monkeypatch):
    """In a folder of its own, with FAR_FAST=1: no cell fails. As committed: executed once, top to bottom, with its pictures."""
    import nbclient
    import nbformat
    notebook = nbformat.read(os.path.join(ROOT, "tutorial.ipynb"), 4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert sum("image/png" in output.get("data", {}) for cell in cells for output in cell.outputs) >= 8
    assert not any(ROOT in str(output) or output.output_type == "error" for cell in cells for output in cell.outputs)
    monkeypatch.setenv("PYTHONPATH", ROOT), monkeypatch.setenv("FAR_FAST", "1")
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    text = "".join(output.get("text", "") for cell in cells for output in cell.outputs)
    assert "laws of high_to_low: all hold" in text and os.listdir(tmp_path) == ["out"]


def test_calibrated_coupling_gives_the_deviation_of_the_data():
    """calibrate_coupling of the notebook, on a model whose levels deviate (0.7 + rho) times as much as the data's, the last two less: rho of the first
    becomes 0.3, to a 32nd from below; the others, whose cells are no larger than tokens, stay 0; a level that varies enough stays 0 too."""
    with open(os.path.join(ROOT, "tutorial.ipynb"), encoding="utf-8") as f:
        source, = (text for text in ("".join(cell["source"]) for cell in json.load(f)["cells"]) if "def calibrate_coupling" in text)
    calibrate, model, images = {"np": np, "torch": torch}, tiny(), torch.randn(500, 1, 8, 8, generator=seeded())
    exec(source[:source.index("fine, _ =")], calibrate)
    for first, expected in ((0.7, 0.3), (1.1, 0.0)):
        def draw(labels, coupling, generator, return_levels):
            return torch.stack([(share + rho) * model.project(images, i + 1) for i, (share, rho) in enumerate(zip((first, 0.5, 0.5), coupling))], 1)
        model.sample = draw
        rho = calibrate["calibrate_coupling"](model, images, torch.arange(500) % 10)
        assert expected - 1 / 32 <= rho[0] <= expected and rho[1:] == [0, 0]


# ---------------------------------------------------------------------------------------------------------------------
# Exercises: each is one to three functions of far.py. exercise_NAME(far) grades a module far; no exercise needs another one's functions.


EXERCISES = {  # name -> (functions of far.py, points, hint)
    "low_pass": (["fourier"], 1, "keep the coefficients with |f_x| <= keep H/2 and |f_y| <= keep H/2; torch.fft.fftfreq(H, 1/H) counts cycles per image; the bound itself is kept"),
    "block_causal_mask": (["block_causal_mask"], 1, "True where the query's level is at least the key's; rows are queries; with markov only where they are equal"),
    "schedules": (["Path.__call__"], 2, "linear: alpha = 1 - t, sigma = t; cosine: alpha^2 = f(t)/f(0); then what the network predicts, a x + b eps"),
    "adaln_block": (["HeadBlock.forward"], 2, "normalise, scale by 1 + scale and shift, run the layer, add gate times the result; attention first, if there is mixing"),
    "diffusion_loss": (["Path.noise", "DiffusionHead.loss", "FAR.average"], 2, "x_t = alpha x + sigma eps, target a x + b eps; t / (1 - t) times the level's time_shift; several draws a token; the mean over tokens and numbers, one value a sequence; the average keeps a share decay of itself"),
    "second_order_sampler": (["Path.sample"], 3, "from t = 0.999 to 0; extrapolate xhat in log(alpha/sigma) from the last two, but not in the first and the last step; temperature scales all noise"),
    "guided_step": (["FAR.guided"], 3, "both halves see the same x_t; u + g (p - u) where p has the label; the condition is projected once, not once a step; self.band(.., i) cuts the prediction down to what the level draws"),
    "kv_cache": (["Attention.forward"], 2, "append the new keys and values to the cached ones, attend to all of them, and keep them for the next call"),
}


def exercise_low_pass(far):
    for H in (5, 8):
        n, frequencies = torch.arange(H, dtype=torch.float64), range(-(H // 2), (H - 1) // 2 + 1)
        for keep in (0.25, 0.5, 0.8):
            for fy in frequencies:
                for fx in frequencies:
                    wave = torch.cos(2 * math.pi * (fy * n[:, None] + fx * n) / H + 0.3)[None, None]
                    kept = max(abs(fy), abs(fx)) <= keep * H / 2
                    assert torch.allclose(far.fourier(wave, keep), wave * kept, atol=1e-6), f"frequency ({fy}, {fx}) of {H} pixels must be {'kept' if kept else 'removed'} at keep {keep}"
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(far.fourier(x, 1.0), x) and not far.fourier(x, 0.0).any(), "keep 1 gives the image, keep 0 nothing"


def exercise_block_causal_mask(far):
    for num_tokens, markov in itertools.product((2, [1, 3, 2]), (False, True)):
        mask, level = far.block_causal_mask(3, num_tokens, markov), np.repeat(range(3), num_tokens)
        for q, k in itertools.product(range(6), repeat=2):
            assert bool(mask[q, k]) == (level[q] == level[k] if markov else level[q] >= level[k]), f"num_tokens {num_tokens}, query {q}, key {k}, markov {markov}"


def exercise_schedules(far):
    t = torch.linspace(0.05, 0.95, 10, dtype=torch.float64)
    f = lambda s: np.cos((s + 0.008) / 1.008 * np.pi / 2) ** 2
    for schedule, alpha in (("linear", 1 - t.numpy()), ("cosine", np.sqrt(f(t.numpy()) / f(0)))):
        sigma = t.numpy() if schedule == "linear" else np.sqrt(1 - alpha ** 2)
        for prediction in ("v", "eps"):
            a, b = (0 * sigma, 1 + 0 * sigma) if prediction == "eps" else (-1 + 0 * sigma, 1 + 0 * sigma) if schedule == "linear" else (-sigma, alpha)
            for name, got, want in zip(("alpha", "sigma", "a", "b"), far.Path(schedule, prediction)(t), (alpha, sigma, a, b), strict=True):
                np.testing.assert_allclose(got, want, atol=1e-6, err_msg=f"{name} of {schedule}, {prediction}")


def exercise_adaln_block(far):
    torch.manual_seed(0)
    for mixing in (False, True):
        block, h, c = far.HeadBlock(8, 2, mixing), torch.randn(2, 3, 8), torch.randn(2, 1, 8)
        if mixing:
            block.attention.forward = lambda x: x.roll(1, 1) * 2                # a stand-in that mixes tokens
        part = block.modulation(torch.nn.functional.silu(c)).split(8, -1)
        norm, want = lambda x: (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt(), h
        if mixing:
            want = want + part[5] * 2 * (norm(want) * (1 + part[4]) + part[3]).roll(1, 1)
        want = want + part[2] * block.mlp(norm(want) * (1 + part[1]) + part[0])
        assert torch.allclose(block(h, c), want, atol=1e-5), f"mixing {mixing}"


def exercise_diffusion_loss(far):
    path = type("Fixed", (far.Path,), {"__call__": lambda self, t: (1 - t, t, -2 * torch.ones_like(t), 3 * torch.ones_like(t))})("linear", "v")
    x, eps, t = torch.randn(4, 5, 6), torch.randn(4, 5, 6), torch.rand(4, 5, 1)
    x_t, want = path.noise(x, eps, t)
    assert torch.allclose(x_t, (1 - t) * x + t * eps, atol=1e-6), "x_t = alpha x + sigma eps"
    assert torch.allclose(want, -2 * x + 3 * eps, atol=1e-6), "the network predicts a x + b eps"
    for mixing, level, shift in ((False, 0, 1), (True, torch.full((2000,), 2), 4)):
        head, seen = far.DiffusionHead(far.FARConfig.preset("digits", head_mixing=mixing, head_draws=3, time_shift=[1, 1, 4])), []
        head.path, head.project = path, lambda z, i, cond: (z, z)
        head.forward = lambda x_t, t, projected: seen.append((x_t, t, projected[0])) or torch.zeros_like(x_t)
        x, noise = torch.randn(2000, 4, 16) + torch.arange(2000)[:, None, None] / 1000, torch.randn(6000, 4, 16)
        loss = head.loss(x, noise, x[..., :1].expand(-1, -1, 128), level, torch.zeros(2000, 1, 128))
        x_t, t, z = seen[0]
        assert x_t.shape == (6000, 4, 16) and t.shape == (6000, 1 if mixing else 4), "head_draws draws, one t a token, or one a sequence with mixing"
        assert torch.equal(z[..., 0], x[..., 0].repeat_interleave(3, 0)), "each draw keeps its own condition"
        assert abs((t / (1 - t)).median().item() / shift - 1) < 0.15, "draw_t's times, t / (1 - t) times the level's time_shift"
        x = x.repeat_interleave(3, 0)
        eps = (x_t - (1 - t[..., None]) * x) / t[..., None]
        assert torch.allclose(eps, noise, atol=1e-2), "each draw has its own noise"
        want = (-2 * x + 3 * noise).square().mean((1, 2)).view(2000, 3).mean(1)
        assert loss.shape == want.shape and torch.allclose(loss, want, rtol=1e-4), "the mean over draws, tokens and numbers, one value a sequence"
        one = head.loss(x[[0, 3]], noise[:6], x[[0, 3], :, :1].expand(-1, -1, 128), level[:2] if mixing else level, torch.zeros(2, 1, 128), lambda prediction: prediction + 1)
        assert torch.allclose(one, (1 + 2 * x[:6] - 3 * noise[:6]).square().mean((1, 2)).view(2, 3).mean(1), rtol=1e-4), "the prediction goes through band"
    model = types.SimpleNamespace(config=far.FARConfig.preset("digits", levels_per_image=0), losses=lambda *_: torch.tensor([1.0, 2.0, 6.0]))
    assert far.FAR.forward(model, torch.zeros(5, 1, 8, 8)).item() == 3, "the loss is the mean over levels"
    ema, model = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    want = 0.9 * ema.weight.detach() + 0.1 * model.weight.detach()
    far.FAR.average(ema, model, 0.9)
    assert torch.allclose(ema.weight, want) and ema.weight.requires_grad, "the average becomes decay times itself plus 1 - decay times the model"


def exercise_second_order_sampler(far):
    """Against the exact flow of a Gaussian on the linear path, whose formulas stand here."""
    path = type("Linear", (far.Path,), {"__call__": lambda self, t: (1 - t, t, -torch.ones_like(t), torch.ones_like(t))})("linear", "v")
    calls = []

    def network(x_t, t):
        calls.append(float(t))
        v = (1 - t) ** 2 * 0.09 + t ** 2
        x = 0.5 + (1 - t) * 0.09 / v * (x_t - (1 - t) * 0.5)
        return (x_t - (1 - t) * x) / t - x
    noise = torch.linspace(-2, 2, 101, dtype=torch.float64)[:, None]
    exact = 0.5 + 0.3 * (noise - 0.001 * 0.5) / (0.001 ** 2 * 0.09 + 0.999 ** 2) ** 0.5
    error = {(solver, n): (path.sample(network, noise, n, solver) - exact).abs().mean().item() for solver in ("ddim", "dpmpp_2m") for n in (50, 150, 300)}
    assert calls[0] == pytest.approx(0.999) and len(calls) == 2 * 500, "steps evaluations, the first at t = 0.999"
    assert 1.7 < error["ddim", 150] / error["ddim", 300] < 2.3, "ddim: half the step, half the error"
    assert error["dpmpp_2m", 150] / error["dpmpp_2m", 300] > 3.2 and error["dpmpp_2m", 50] < 0.5 * error["ddim", 50], "dpmpp_2m: half the step, a quarter of the error"
    for solver in ("ddpm", "ddim", "dpmpp_2m"):
        noise = torch.randn(20000, 1, dtype=torch.float64, generator=seeded())
        spread = [path.sample(network, noise, 100, solver, T, lambda x: torch.randn(x.shape, dtype=x.dtype, generator=seeded())).std().item() for T in (1.0, 0.5, 0.0)]
        assert spread[1] == pytest.approx(0.5 * spread[0], rel=0.03) and spread[2] < 1e-6, f"{solver}: temperature scales all noise"


def exercise_guided_step(far):
    z, cond, projections, seen = torch.arange(4.0)[:, None, None].expand(4, 3, 2), torch.zeros(4, 1, 2), [], []
    head = lambda x_t, t, z: seen.append((x_t, t)) or x_t + z[..., :1] ** 2 + t[..., None]
    head.project = lambda *a: projections.append(1) or a[0]
    model, x_t = types.SimpleNamespace(head=head, band=lambda tokens, i: 10 * tokens), torch.randn(2, 3, 5)
    network = far.FAR.guided(model, z, 0, cond, 3.0)
    for t in (0.25, torch.tensor(0.25)):
        p, u = torch.tensor([0.0, 1.0])[:, None, None], torch.tensor([4.0, 9.0])[:, None, None]
        assert torch.allclose(network(x_t, t), 10 * (x_t + 0.25 + u + 3 * (p - u)), rtol=1e-4), "u + g (p - u), p the first half, cut down to the band"
        assert torch.equal(seen[-1][0][:2], seen[-1][0][2:]) and seen[-1][1].shape == (4, 1), "both halves see the same x_t, at one t a sequence"
    assert len(projections) == 1, "the condition is projected once a level"
    assert torch.allclose(far.FAR.guided(model, z[:2], 0, cond[:2], 1.0)(x_t, 0.25), 10 * (x_t + 0.25 + p), rtol=1e-4) and len(seen[-1][0]) == 2, "no second half where g is 1"


def exercise_kv_cache(far):
    torch.manual_seed(0)
    attention, x = far.Attention(8, 2), torch.randn(3, 6, 8)
    mask = torch.arange(6)[:, None] // 2 >= torch.arange(6) // 2
    q, k, v = (part.view(3, 6, 2, 4).transpose(1, 2) for part in attention.qkv(x).split(8, -1))
    weights = (q @ k.transpose(-1, -2) / 2).masked_fill(~mask, -math.inf).softmax(-1)
    want = attention.out((weights @ v).transpose(1, 2).reshape(3, 6, 8))
    assert torch.allclose(attention(x, mask), want, atol=1e-5), "softmax(q k / sqrt(d)) v over the keys that the mask admits"
    cache = {}
    parts = torch.cat([attention(x[:, i:i + 2], cache=cache) for i in (0, 2, 4)], 1)
    assert torch.allclose(parts, want, atol=1e-5), "block by block with a cache equals one pass with the mask"
    assert cache["k"].shape == (3, 2, 6, 4), "the cache holds all keys"


@pytest.mark.parametrize("name", EXERCISES)
def test_exercise(name, capsys):
    functions, points, hint = EXERCISES[name]
    try:
        globals()["exercise_" + name](importlib.import_module(os.environ.get("FAR_MODULE", "far")))
        earned, failure = points, None
    except Exception as error:                                                  # a student's code can raise anything
        earned, failure = 0, f"{name} ({', '.join(functions)}): {type(error).__name__} {error}. Hint: {hint}"
    if "FAR_MODULE" in os.environ:
        with capsys.disabled():
            print(f"\n{name:22} {earned} of {points} points")
    if failure:
        pytest.fail(failure, pytrace=False)


def find_functions(source):
    """Functions and methods of a module's source: qualified name -> node."""
    tree = ast.parse(source).body
    nodes = [(prefix, node) for outer in tree for prefix, body in (("", [outer]), (getattr(outer, "name", "") + ".", getattr(outer, "body", []) if isinstance(outer, ast.ClassDef) else [])) for node in body]
    return {prefix + node.name: node for prefix, node in nodes if isinstance(node, ast.FunctionDef)}


def blank(source, names):
    """far.py's source with the bodies of the exercises' functions replaced by `raise NotImplementedError`; signatures and docstrings stay."""
    functions, lines = find_functions(source), source.splitlines(True)
    nodes = {functions[function] for name in names for function in EXERCISES[name][0]}
    for node in sorted(nodes, key=lambda node: -node.lineno):
        body = node.body[1:] if ast.get_docstring(node) else node.body
        lines[body[0].lineno - 1:node.end_lineno] = [" " * node.body[0].col_offset + "raise NotImplementedError\n"]
    return "".join(lines)


def module_of(source, name="far_changed"):
    module = types.ModuleType(name)
    sys.modules[name] = module                                                  # dataclasses look it up
    exec(compile(source, name, "exec"), module.__dict__)
    return module


def failing(module):
    """Names of the exercises that a module far does not pass."""
    bad = set()
    for name in EXERCISES:
        try:
            globals()["exercise_" + name](module)
        except Exception:
            bad.add(name)
    return bad


FAR_SOURCE = open(os.path.join(ROOT, "far.py")).read()


@pytest.mark.parametrize("name", EXERCISES)
def test_blanking_fails_that_one_and_no_other(name):
    changed = blank(FAR_SOURCE, [name])
    assert failing(module_of(changed)) == {name} and changed.count("raise NotImplementedError") == len(EXERCISES[name][0])
    for function in EXERCISES[name][0]:
        node = find_functions(FAR_SOURCE)[function]
        assert node.end_lineno - node.body[1].lineno < 25 and ast.get_docstring(node) == ast.get_docstring(find_functions(changed)[function])


def test_blanking_all_from_the_command_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["test_far.py", "--blank", ",".join([*EXERCISES, "low_pass"])])  # one of them twice
    runpy.run_path(os.path.join(ROOT, "test_far.py"), run_name="__main__")
    assert failing(module_of(capsys.readouterr().out)) == set(EXERCISES) and failing(module_of(FAR_SOURCE)) == set()
    monkeypatch.setattr(sys, "argv", ["test_far.py", "--blank", "low_pas"])
    with pytest.raises(SystemExit, match="low_pass"):
        runpy.run_path(os.path.join(ROOT, "test_far.py"), run_name="__main__")


@pytest.mark.parametrize("exercise, right, wrong", [
    ("block_causal_mask", "level[:, None] >= level", "level >= level[:, None]"),                                    # transposed
    ("block_causal_mask", "level[:, None] >= level", "level[:, None] > level"),                                     # > for >=
    ("low_pass", "(radius <= keep * H / 2 + 1e-6)", "(radius < keep * H / 2 - 1e-6)"),                              # cutoff off by one
    ("low_pass", "(radius <= keep * H / 2 + 1e-6)", "(radius <= keep * H / 2 + 1)"),
    ("guided_step", "x_t.repeat(len(z) // len(x_t), 1, 1)", "torch.randn(len(z), *x_t.shape[1:])"),                 # halves with noise of their own
    ("guided_step", "u[0] + guidance * (p - u[0])", "p + guidance * (p - u[0])"),
    ("diffusion_loss", "else losses.mean()", "else losses.sum()"),                                                          # not averaged over levels
    ("diffusion_loss", ".square().mean((1, 2))", ".square().sum((1, 2))"),
    ("diffusion_loss", "t / (t + (1 - t) / ", "t / (t + (1 - t) * "),                                             # the time shift upside down
    ("diffusion_loss", "list(model.parameters()), 1 - decay)", "list(model.parameters()), 1.0)"),                 # EMA not used
    ("diffusion_loss", "list(model.parameters()), 1 - decay)", "list(model.parameters()), decay)"),
    ("schedules", "alpha, sigma, a, b = 1 - t, t, ", "alpha, sigma, a, b = t, 1 - t, "),
    ("adaln_block", "(1 + scale)", "scale"),
    ("second_order_sampler", "(xhat - last)", "(last - xhat)"),
    ("second_order_sampler", "temperature * deviation", "deviation"),
    ("kv_cache", "torch.cat([cache[name], new], 2)", "torch.cat([new, new], 2)"),
    ("kv_cache", "cache.update(k=k, v=v)", "pass")])
def test_students_mistakes_are_noticed(exercise, right, wrong):
    assert right in FAR_SOURCE
    assert failing(module_of(FAR_SOURCE.replace(right, wrong))) == {exercise}


def test_a_checkpoint_read_without_its_average_is_noticed(digits, monkeypatch):
    """The mistake `EMA not used`, made in sample.py: test_load_checkpoint_gives_ema_weights fails."""
    source = open(os.path.join(ROOT, "sample.py")).read()
    assert 'rest.pop("ema")' in source
    monkeypatch.setattr(sample, "load_checkpoint", module_of(source.replace('rest.pop("ema")', 'rest.pop("model")'), "sample_changed").load_checkpoint)
    with pytest.raises(AssertionError):
        test_load_checkpoint_gives_ema_weights(digits)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blank", required=True, help=f"comma-separated exercises of {', '.join(EXERCISES)}")
    wanted = parser.parse_args().blank.split(",")
    if not set(wanted) <= set(EXERCISES):
        sys.exit(f"test_far.py: {', '.join(set(wanted) - set(EXERCISES))}: no such exercise; there are {', '.join(EXERCISES)}")
    print(blank(FAR_SOURCE, wanted), end="")
