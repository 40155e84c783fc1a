"""Laws and values of FAR, each against an independent formula, library or brute force.

    pytest -q                    runs all
    pytest -q -m "not slow"      leaves the slowest out

The exercises come first: eight tasks, each one to four functions of far.py. The first command
writes far.py without their bodies, the tasks and a grader to a folder for students; the second
prints the points of what a student hands in, with a hint for each part that is missing:

    python test_far.py --handout DIR
    python test_far.py --grade SUBMISSION --json results.json

--blank low_pass,kv_cache takes some of the exercises; alone it prints far.py without their bodies.
"""

import argparse
import ast
import base64
import csv
import dataclasses
import faulthandler
import functools
import importlib
import importlib.util
import inspect
import io
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
import tempfile
import textwrap
import time
import traceback
import types
import zlib

import nbclient
import nbformat
import numpy as np
import pytest
import scipy.fft
import scipy.integrate
import scipy.linalg
import scipy.stats
import torch
from PIL import Image
from torch.nn.functional import adaptive_avg_pool2d, interpolate
from torch.utils.flop_counter import FlopCounterMode

import far
import sample
import train_cifar
from experiments import scenes, spectra, sweep
from far import (
    FAR,
    ORDERINGS,
    PAPER_LEVELS,
    PRESETS,
    DiffusionHead,
    FARConfig,
    Path,
    check_ordering,
    distinct_levels,
    head_step_schedule,
    loss_weights,
    mask_bounds,
    masked_share,
    patchify,
    sampling_mask,
    training_mask,
    unpatchify,
)

ROOT = os.path.dirname(os.path.abspath(__file__))
# ==== Exercises
# Each is a class: its docstring is the task, every method part_.. earns a point, and the docstring
# of the method is the hint. No exercise needs the solution of another one. From here to "Handouts"
# all is copied into the students' grade.py, and needs torch and numpy alone.
SCHEDULES = ("linear", "cosine")
PREDICTIONS = ("v", "eps")
SOLVERS = ("ddpm", "ddim", "dpmpp_2m")


class Wrong(Exception):
    """What a check says of a submission."""


def expect(ok, message):
    if not ok:
        raise Wrong(message)


def array(x):
    return torch.as_tensor(x).detach().double().numpy()


def compare(got, want, what, mistakes=(), tolerance=1e-5):
    """Wrong unless got is a tensor that equals want; if one of the mistakes gives it, says which.

    mistakes: pairs (what was done, the value that comes of it).
    """
    want = array(want)
    # A subclass of Tensor could claim to equal anything.
    expect(type(got) is torch.Tensor, f"{what} is of type {type(got).__name__}, not a tensor")
    expect(not got.is_complex(), f"{what} is complex: take the real part")
    got = array(got)
    shapes = f"{what} has the shape {list(got.shape)}, not {list(want.shape)}"
    expect(got.shape == want.shape, shapes)
    bad = np.count_nonzero(~np.isfinite(got))
    expect(bad == 0, f"{what} is not a number (NaN or infinite) in {bad} of {got.size} places")
    error = np.abs(got - want)
    if error.max() <= tolerance:
        return
    for mistake, value in [*mistakes, ("it has the wrong sign", -want)]:
        expect(np.abs(got - array(value)).max() > tolerance, f"{what}: {mistake}")
    place = np.unravel_index(error.argmax(), error.shape)
    where = [int(index) for index in place]
    raise Wrong(f"{what} is wrong: at {where} it is {got[place]:.4g}, not {want[place]:.4g}")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class LowPass:
    """Write `fourier`, the filter that makes the levels (paper: section 4.1, page 4).

    x [B, C, H, H] and 0 < keep < 1 (0 and 1 are taken care of) -> the image without its high
    frequencies, real, like x. With frequencies f counted in whole cycles per image, those with
    |f_x| <= keep H/2 and |f_y| <= keep H/2 stay as they are, and all others go. About 4 lines.
    """

    functions = ["fourier"]
    section = "4.1"
    minutes = 20
    teaches = "the 2-D Fourier transform of an image, frequencies in cycles per image"

    def check_waves(self, far, on_the_bound):
        for H, keep in itertools.product((5, 8), (0.25, 0.5, 0.8)):
            n = torch.arange(H, dtype=torch.float64)
            frequencies = range(-(H // 2), (H - 1) // 2 + 1)
            for fy, fx in itertools.product(frequencies, repeat=2):
                largest, bound = max(abs(fy), abs(fx)), keep * H / 2
                if (largest == bound) != on_the_bound:
                    continue
                wave = torch.cos(2 * math.pi * (fy * n[:, None] + fx * n) / H + 0.3)
                x = torch.stack([wave, 2 * wave])[None]
                want = x * (largest <= bound)
                mistakes = [
                    ("it must not stay", x),
                    ("it must not go", 0 * x),
                    ("take the real part, not the absolute value", want.abs()),
                ]
                where = f"f_y = {fy}, f_x = {fx} of {H} pixels, bound keep H/2 = {bound:g}"
                compare(far.fourier(x.clone(), keep), want, f"a wave of {where}", mistakes)

    def part_low_waves_stay_and_high_ones_go(self, far):
        """torch.fft.fft2, a mask of zeros and ones, ifft2 and its real part; torch.fft.fftfreq(H,
        1/H) lists the frequencies in cycles per image; both f_x and f_y must be low."""
        self.check_waves(far, on_the_bound=False)

    def part_the_bound_itself_stays(self, far):
        """<=, not <; add 1e-6 to the bound against rounding."""
        self.check_waves(far, on_the_bound=True)


class BlockCausalMask:
    """Write `block_causal_mask`: which token may see which (paper: section 4.1, causal attention).

    The sequence holds num_levels blocks of num_tokens tokens. Returns bool [F N, F N], True where
    the query (row) may attend to the key (column): level(q) >= level(k); with markov only within
    its own level. About 4 lines.
    """

    functions = ["block_causal_mask"]
    section = "4.1"
    minutes = 10
    teaches = "causal attention over frequency levels"
    level = np.arange(6) // 2

    def check(self, mask, want, mistakes):
        compare(mask, want, "the mask of 3 levels of 2 tokens", mistakes)
        expect(mask.dtype == torch.bool, f"the mask is {mask.dtype}, not bool")

    def part_causal(self, far):
        """repeat_interleave gives the level of each token; compare it as a column (queries) with
        itself as a row (keys)."""
        want = self.level[:, None] >= self.level
        mistakes = [
            ("rows and columns are swapped", want.T),
            ("a token does not see its own level", self.level[:, None] > self.level),
            ("a token sees none of its level that stand after it", np.tri(6)),
        ]
        self.check(far.block_causal_mask(3, 2), want, mistakes)

    def part_markov(self, far):
        """Here a token sees its own level alone: == in place of >=."""
        want = self.level[:, None] == self.level
        mistakes = [("markov is ignored", self.level[:, None] >= self.level)]
        self.check(far.block_causal_mask(3, 2, True), want, mistakes)


class KVCache:
    """Write `Attention.forward` (paper: section 4.1, causal attention over levels).

    x [S, T, W] -> [S, T, W]. self.qkv(x) holds q, k and v, in this order, W numbers each; the h-th
    W/heads of them belong to head h. A head computes softmax(q k / sqrt(W/heads)) v over the keys
    that mask admits, all where mask is None; self.out reads the heads side by side. In training
    (self.training) the share self.dropout of the attention weights is dropped.

    cache: None, or a dict, empty at the first call, that this function fills: queries see the
    tokens of all earlier calls as well, whose keys it keeps as "k" and values as "v", [S, heads,
    T', W/heads]. mask: bool, True where allowed, of T queries and all keys, those of the cache
    first: [T, T + T'], or one per sequence, [S, 1, T, T + T']. far.py imports
    scaled_dot_product_attention, which may be used. About 12 lines.
    """

    functions = ["Attention.forward"]
    section = "4.1"
    minutes = 30
    teaches = "attention by hand, dropout, keys and values kept between levels"
    mask = torch.arange(6)[:, None] // 2 >= torch.arange(6) // 2

    def setting(self, far):
        """An attention of 2 heads of 4 numbers, and 3 sequences of 6 tokens in blocks of 2."""
        return far.Attention(8, 2), torch.randn(3, 6, 8)

    def heads(self, attention, x, mask, divisor=2.0):
        """What the heads compute by the formula, [S, heads, T, W/heads], and their k and v."""
        parts = attention.qkv(x).split(8, -1)
        q, k, v = (part.view(3, -1, 2, 4).transpose(1, 2) for part in parts)
        scores = q @ k.transpose(-1, -2) / divisor
        return scores.masked_fill(~mask, -math.inf).softmax(-1) @ v, k, v

    def by_hand(self, attention, *rest):
        heads, _, _ = self.heads(attention, *rest)
        return attention.out(heads.transpose(1, 2).reshape(3, -1, 8))

    def part_attention(self, far):
        """softmax(q k / sqrt(d)) v by head, over the keys that the mask admits, d = W/heads; swap
        heads and tokens back before they are joined, and end with self.out."""
        attention, x = self.setting(far)
        want = self.by_hand(attention, x, self.mask)
        free = self.by_hand(attention, x, torch.ones_like(self.mask))
        heads, _, _ = self.heads(attention, x, self.mask)
        mistakes = [
            ("the mask is ignored", free),
            ("q k is not divided", self.by_hand(attention, x, self.mask, 1.0)),
            ("q k is divided by sqrt(W)", self.by_hand(attention, x, self.mask, 8**0.5)),
            ("the heads do not stand side by side", attention.out(heads.reshape(3, 6, 8))),
            ("self.out is missing", heads.transpose(1, 2).reshape(3, 6, 8)),
        ]
        compare(attention(x, self.mask), want, "the output with a mask", mistakes)
        compare(attention(x), free, "the output without a mask")
        masks = torch.rand(3, 1, 6, 6) < 0.5
        masks |= self.mask.T
        want = self.by_hand(attention, x, masks)
        compare(attention(x, masks), want, "the output with a mask per sequence")

    def part_cache(self, far):
        """torch.cat the cached keys and values with the new ones along the tokens; attend to all of
        them; put them into the dict for the next call."""
        attention, x = self.setting(far)
        blocks = x[:, :2], x[:, 2:4], x[:, 4:]
        _, k, v = self.heads(attention, x, self.mask)
        together = attention(x, self.mask)
        alone = torch.cat([attention(block) for block in blocks], 1)
        cache, got = {}, []
        for i, block in enumerate(blocks):
            got.append(attention(block, cache=cache))
            if i == 0:
                expect({"k", "v"} <= set(cache), 'the cache must hold "k" and "v"')
                k, v = k[:, :, :2], v[:, :, :2]
                compare(cache["k"], k, 'the "k" in the cache', [("these are the values", v)])
                compare(cache["v"], v, 'the "v" in the cache', [("these are the keys", k)])
        mistakes = [("earlier blocks are forgotten", alone)]
        compare(torch.cat(got, 1), together, "block by block, not at once, the output", mistakes)
        cache = {}
        first = attention(x[:, :4], self.mask[:4, :4], cache)
        compare(first, together[:, :4], "the output of a first call with mask and cache")
        second = attention(x[:, 4:], self.mask[4:], cache)
        compare(second, together[:, 4:], "the output of a second call with mask and cache")

    def part_dropout(self, far):
        """scaled_dot_product_attention takes dropout_p: self.dropout in training, and 0 in
        evaluation mode."""
        attention = far.Attention(8, 2, dropout=0.5)
        attention.out = torch.nn.Identity()
        x = torch.randn(50, 1, 8)
        v = attention.qkv(x)[..., 16:]

        # One token sees itself alone: a head gives v, or with half of the weights dropped 0 or 2 v.
        def factors(y):
            return (array(y) / array(v)).reshape(100, 4).round(3)

        in_evaluation = attention.eval()(x)
        dropped = set(factors(in_evaluation).flatten()) == {0.0, 2.0}
        expect(not dropped, "weights are dropped in evaluation mode")
        compare(in_evaluation, v, "the output of a single token in evaluation mode")
        in_training = factors(attention.train()(x))
        expect((in_training != 1).any(), "nothing is dropped in training with dropout 0.5")
        by_head = (in_training == in_training[:, :1]).all()
        right = by_head and set(in_training.flatten()) == {0.0, 2.0}
        expect(right, "dropout 0.5 must drop half of the attention weights and double the others")


class Schedules:
    """Write `Path.__call__`: the noise schedules (paper: section 4.2, diffusion loss).

    Times t in [0, 1], any shape -> alpha, sigma, a, b, tensors like t, the constant ones too:
    x_t = alpha x + sigma eps, and the network predicts a x + b eps. The formulas stand in the
    docstring of `Path`; schedule and prediction are attributes. sigma is 0 at t = 0, also where
    rounding makes 1 - alpha^2 negative. About 10 lines.
    """

    functions = ["Path.__call__"]
    section = "4.2"
    minutes = 20
    teaches = "noise schedules, noise and velocity prediction as one formula"
    t = torch.linspace(0, 1, 11, dtype=torch.float64)

    def cosine(self):
        def f(t):
            return np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2

        square = f(self.t.numpy()) / f(0)
        return np.sqrt(square), np.sqrt(1 - square)

    def check_path(self, far, schedule, alpha, sigma):
        mistakes_of_alpha = [("this is sigma", sigma), ("this is its square", alpha**2)]
        mistakes_of_sigma = [("this is alpha", alpha), ("this is its square", sigma**2)]
        for prediction in PREDICTIONS:
            got = far.Path(schedule, prediction)(self.t)
            compare(got[0], alpha, f"alpha of {schedule}", mistakes_of_alpha, 1e-6)
            compare(got[1], sigma, f"sigma of {schedule}", mistakes_of_sigma, 1e-6)

    def part_linear(self, far):
        """alpha = 1 - t and sigma = t."""
        t = self.t.numpy()
        self.check_path(far, "linear", 1 - t, t)

    def part_cosine(self, far):
        """f(t)/f(0) is the square of alpha; sigma^2 = 1 - alpha^2, with clamp(min=0) before the
        root."""
        self.check_path(far, "cosine", *self.cosine())

    def part_prediction(self, far):
        """eps: a = 0, b = 1. v: a = -1, b = 1 if linear and a = -sigma, b = alpha if cosine. All
        are tensors like t, such as torch.ones_like(t)."""
        zero, one = torch.zeros_like(self.t), torch.ones_like(self.t)
        for schedule, prediction in itertools.product(SCHEDULES, PREDICTIONS):
            alpha, sigma, got_a, got_b = far.Path(schedule, prediction)(self.t)
            a, b = zero, one
            if (schedule, prediction) == ("linear", "v"):
                a, b = -one, one
            if (schedule, prediction) == ("cosine", "v"):
                a, b = -sigma, alpha
            what = f"of {schedule}, {prediction}"
            compare(got_a, a, f"a {what}", [("a and b are swapped", b)], 1e-6)
            compare(got_b, b, f"b {what}", [("a and b are swapped", a)], 1e-6)


class AdaLNBlock:
    """Write the `forward` of `HeadBlock` and `MixingBlock`: how the condition steers the head
    (paper: section 4.2; the block is MAR's and DiT's, "AdaLN-Zero").

    h [S, N, w], steer [S, N or 1, w] -> [S, N, w]. self.modulation(silu(steer)) holds shift, scale
    and gate, in this order, w numbers each. h becomes h + gate * layer(self.norm(h) * (1 + scale) +
    shift), where layer is self.mlp in `HeadBlock`. In `MixingBlock` there are 6 w numbers, first
    for self.attention, then for self.mlp, which works on the result. About 2 and 3 lines.
    """

    functions = ["HeadBlock.forward", "MixingBlock.forward"]
    section = "4.2"
    minutes = 20
    teaches = "adaptive layer norm: how a condition steers a network"

    def by_hand(self, h, layers, numbers, one=1, residual=1, gated=True, normal=True):
        """numbers: shift, scale and gate of each layer; the other settings make mistakes."""
        for k, layer in enumerate(layers):
            shift, scale, gate = numbers[3 * k : 3 * k + 3]
            if not gated:
                gate = 1
            normed = h
            if normal:
                normed = torch.nn.functional.layer_norm(h, (8,))
            h = residual * h + gate * layer(normed * (one + scale) + shift)
        return h

    def mistakes(self, h, layers, numbers):
        """Mistakes with h, the layers and the numbers of modulation."""
        both = h
        for k, layer in enumerate(layers):
            both = both + self.by_hand(h, [layer], numbers[3 * k :]) - h
        found = [
            ("scale in place of 1 + scale", self.by_hand(h, layers, numbers, one=0)),
            ("h is not added", self.by_hand(h, layers, numbers, residual=0)),
            ("the gate is missing", self.by_hand(h, layers, numbers, gated=False)),
            ("self.norm is missing", self.by_hand(h, layers, numbers, normal=False)),
            ("the layers are in the wrong order", self.by_hand(h, layers[::-1], numbers)),
            ("the mlp must read the result of the attention", both),
        ]
        for order in itertools.permutations(range(3)):
            if order != (0, 1, 2):
                shuffled = [numbers[k - k % 3 + order[k % 3]] for k in range(len(numbers))]
                value = self.by_hand(h, layers, shuffled)
                found.append(("the order is shift, scale, gate", value))
        return found

    def check_block(self, block, *layers):
        torch.nn.init.normal_(block.modulation.weight)
        for rows in (1, 3):
            h, steer = torch.randn(2, 3, 8), torch.randn(2, rows, 8)
            numbers = block.modulation(torch.nn.functional.silu(steer)).split(8, -1)
            without_silu = self.by_hand(h, layers, block.modulation(steer).split(8, -1))
            want = self.by_hand(h, layers, numbers)
            mistakes = [("silu is missing", without_silu), *self.mistakes(h, layers, numbers)]
            compare(block(h.clone(), steer), want, "the output", mistakes)

    def part_block_of_the_paper(self, far):
        """norm(h), times 1 + scale, plus shift, through the mlp; times gate and added to h."""
        block = far.HeadBlock(8)
        self.check_block(block, block.mlp)

    def part_mixing_block(self, far):
        """The same twice: with attention first, then with the mlp on the result; each has its own
        shift, scale and gate."""
        block = far.MixingBlock(8, 2)

        def mix_tokens(x, mask=None, cache=None):
            return 2 * x.roll(1, 1)

        block.attention.forward = mix_tokens
        self.check_block(block, mix_tokens, block.mlp)


class DiffusionLoss:
    """Write what training computes (paper: section 4.2, diffusion loss and loss weights).

    `Path.noise`: x and eps of one shape, t that broadcasts -> x_t = alpha x + sigma eps, and what
    the network should predict, a x + b eps; self(t) gives alpha, sigma, a and b.

    `DiffusionHead.loss`: target and noise [S, N, D] -> the mean squared error of each item, [S].
    self.read(z, level, labels) gives added and steer, [S, N or 1, w]. self.path.draw_t(*shape,
    device=..) draws a time for each row of steer: for every token, or where these are denoised
    together one for all of an item. self.time_shift[level] then multiplies the odds t/(1 - t).
    self.path.noise gives x_t, and self(x_t, t, added, steer), t [S, N or 1], the prediction, which
    goes through cut(..) before it is compared.

    `FAR.forward`: read_images(self, images) gives x as float32, self.levels_to_train(B) the levels
    of B images, [B, L], self.losses(x, labels, level) their losses, [B, L]. The mean over all of
    self.loss_weights[level] times the loss.

    `FAR.average`: each parameter of self becomes, in place, decay times itself plus 1 - decay times
    that of model; the buffers unit and noise_unit are copied. About 2, 7, 4 and 4 lines.
    """

    functions = ["Path.noise", "DiffusionHead.loss", "FAR.forward", "FAR.average"]
    section = "4.2"
    minutes = 40
    teaches = "forward diffusion, the diffusion loss of a token, averaged weights"

    def strange_path(self, far, run):
        """A path of other numbers than any real one; run.drawn keeps the times that are drawn."""

        class Strange(far.Path):
            def __call__(self, t):
                return 1 - t, t / 2, -2 * torch.ones_like(t), 3 * torch.ones_like(t)

            def noise(self, x, eps, t):
                return (1 - t) * x + t / 2 * eps, 3 * eps - 2 * x

            def draw_t(self, *shape, device=None):
                run.drawn = 0.2 + 0.5 * torch.rand(shape)
                return run.drawn

        return Strange("linear", "v")

    def run(self, far, mixing=False, time_shift=1.0, cut=torch.clone):
        """The loss of 6 items of 4 tokens, where the network predicts zeros, and all that goes in
        and out."""
        settings = dict(head_mixing=mixing, time_shift=time_shift, attention="markov")
        head = far.FAR(far.FARConfig.preset("digits", **settings)).head
        run = types.SimpleNamespace(drawn=None, t=None, read=None)
        head.path = self.strange_path(far, run)
        times = 4
        if mixing:
            times = 1

        def read(z, level, labels):
            run.read = labels
            return z + 1, level[:, None, None].expand(6, times, 128)

        def forward(x_t, t, added, steer):
            run.x_t, run.t, run.added, run.steer = x_t, t, added, steer
            return torch.zeros_like(x_t)

        head.read, head.forward = read, forward
        run.x, run.noise = torch.randn(2, 6, 4, 16)
        run.z, run.level = torch.randn(6, 4, 128), torch.arange(6) % 3
        run.labels = torch.zeros(6, 1, dtype=torch.int64)
        run.loss = head.loss(run.x, run.noise, run.z, run.level, run.labels, cut)
        expect(run.t is not None, "the network, self(..), is not asked")
        return run

    def drawn(self, run):
        expect(run.drawn is not None, "the times are not from self.path.draw_t")
        return run.drawn

    def part_noise(self, far):
        """x_t = alpha x + sigma eps; the network predicts a x + b eps; self(t) gives all four."""
        path = self.strange_path(far, None)
        x, eps, t = torch.randn(4, 5, 6), torch.randn(4, 5, 6), torch.rand(4, 5, 1)
        x_t, target = far.Path.noise(path, x, eps, t)
        swapped = t / 2 * x + (1 - t) * eps
        compare(x_t, (1 - t) * x + t / 2 * eps, "x_t", [("alpha and sigma are swapped", swapped)])
        mistakes = [
            ("this is the noise, whatever is predicted", eps),
            ("a and b are swapped", 3 * x - 2 * eps),
            ("this is the velocity, whatever is predicted", eps - x),
        ]
        compare(target, -2 * x + 3 * eps, "what the network should predict", mistakes)

    def part_loss(self, far):
        """The mean of the squared error over the tokens and their numbers, not over items; the
        prediction goes through cut(..) first."""

        def cut(prediction):
            return 2 * prediction + 1

        run = self.run(far, cut=cut)
        wanted = 3 * run.noise - 2 * run.x
        square = (1 - wanted).square()
        mistakes = [
            ("this is the sum of the squares", square.sum((1, 2))),
            ("the error is not squared", (1 - wanted).abs().mean((1, 2))),
            ("cut is missing", wanted.square().mean((1, 2))),
            ("cut belongs to the prediction, not to the error", cut(wanted).square().mean((1, 2))),
            ("cut belongs to the prediction, not to the error", cut(-wanted).square().mean((1, 2))),
        ]
        compare(run.loss, square.mean((1, 2)), "the loss of 6 items", mistakes, 1e-4)

    def part_what_the_network_sees(self, far):
        """x_t and t, then added and steer from self.read(z, level, labels)."""
        for mixing in (False, True):
            run = self.run(far, mixing)
            t = run.t[..., None]
            x_t = (1 - t) * run.x + t / 2 * run.noise
            mistakes = [("this is the target, without noise", run.x)]
            compare(run.x_t, x_t, "what the network sees as x_t at its t", mistakes)
            compare(run.added, run.z + 1, "what the network sees as added")
            compare(run.steer[:, 0, 0], run.level, "what the network sees as steer")
            expect(run.read is run.labels, "self.read needs the labels")

    def part_times(self, far):
        """self.path.draw_t(S, N) gives each token its own time, and (S, 1) all tokens of an item
        the same where they are denoised together: the first two sizes of steer."""
        for mixing, shape in ((False, [6, 4]), (True, [6, 1])):
            run = self.run(far, mixing)
            drawn = list(self.drawn(run).shape)
            expect(drawn == shape, f"times of the shape {drawn} are drawn where steer has {shape}")
            compare(run.t, run.drawn, "the times of the network, where time_shift is 1")

    def part_time_shift(self, far):
        """The odds t / (1 - t) are multiplied by the time_shift of the item's level."""
        for mixing in (False, True):
            run = self.run(far, mixing, time_shift=[0.5, 1, 4])
            shift = torch.tensor([0.5, 1, 4])[run.level][:, None]
            drawn = self.drawn(run)
            odds = drawn / (1 - drawn)
            mistakes = [
                ("time_shift is ignored", odds),
                ("they are divided by time_shift", odds / shift),
                ("t is multiplied, not its odds", shift * drawn / (1 - shift * drawn)),
            ]
            got = run.t / (1 - run.t)
            compare(got, shift * odds, "the odds of the times", mistakes, 1e-4)

    def part_weights_of_levels(self, far):
        """read_images(self, images), self.levels_to_train(B), self.losses(x, labels, level), and
        self.loss_weights[level] times the loss, all averaged."""
        level, labels = torch.tensor([[0, 1], [1, 2]]), torch.tensor([5, 6])
        loss, weight = torch.tensor([[1.0, 10], [10, 100]]), torch.tensor([2.0, 3, 4])

        def levels_to_train(B):
            expect(B == 2, f"levels_to_train needs the number of images, 2, not {B}")
            return level

        def losses(x, given, its_level):
            compare(x, -torch.ones(2, 1, 8, 8), "what self.losses gets as images of uint8 zeros")
            expect(given is labels, "self.losses needs the labels")
            compare(its_level, level, "what self.losses gets as level")
            return loss

        model = types.SimpleNamespace(
            config=far.FARConfig.preset("digits"),
            device=torch.device("cpu"),
            levels_to_train=levels_to_train,
            losses=losses,
            loss_weights=weight,
        )
        got = far.FAR.forward(model, torch.zeros(2, 1, 8, 8, dtype=torch.uint8), labels)
        weighted = weight[level] * loss
        mistakes = [
            ("the weights of the levels are missing", loss.mean()),
            ("this is the sum, not the mean", weighted.sum()),
            ("the losses of an image are added up", weighted.sum(1).mean()),
            ("it is divided by the weights", weighted.sum() / weight[level].sum()),
        ]
        compare(got, weighted.mean(), "the loss of two images", mistakes)

    def part_average(self, far):
        """In place, decay times self plus 1 - decay times model; copy_(..) copies the units."""
        average, model = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
        for k, owner in enumerate((average, model)):
            owner.register_buffer("unit", torch.full((3,), k + 1.0))
            owner.register_buffer("noise_unit", torch.full((3,), k + 3.0))
        old, new = average.weight.detach().clone(), model.weight.detach().clone()
        parameter = average.weight
        far.FAR.average(average, model, 0.9)
        expect(average.weight is parameter, "the parameters must be changed in place")
        mistakes = [
            ("decay and 1 - decay are swapped", 0.1 * old + 0.9 * new),
            ("they are as before", old),
            ("they are those of the model", new),
        ]
        want = 0.9 * old + 0.1 * new
        compare(average.weight.data, want, "the averaged weights", mistakes)
        compare(model.weight.data, new, "the weights of the model, which must not change")
        for name, want in (("unit", [2.0] * 3), ("noise_unit", [4.0] * 3)):
            got = getattr(average, name)
            compare(got, want, f"{name}, to be copied from the model,")
            expect(got is not getattr(model, name), f"{name} is shared with the model, not copied")


class SecondOrderSampler:
    """Write `Path.sample`: from noise to data (paper: section 4.2; its docstring has the solvers).

    times = self.times(steps, solver) are steps + 1 numbers, from noise down to t = 0. Step n goes
    from t = times[n] to s = times[n + 1]: network(x, t), t a tensor without dimensions, gives the
    prediction; self.denoise(x, prediction, t) the data xhat; self.step(x, xhat, t, s, ancestral,
    variance) the mean of the next x and its deviation, ancestral True for ddpm. x starts as the
    noise, times sigma of the first time if that is below 0.99. It ends at s = 0, where the mean is
    xhat itself: the last step adds no noise and does not extrapolate, as log(alpha/sigma) is
    infinite there. About 20 lines.

    dpmpp_2m gives self.step, in place of xhat, xhat + ratio/2 (xhat - the xhat of the last step),
    ratio: this step over the last one in log(alpha/sigma); self(times) gives alpha and sigma.
    """

    functions = ["Path.sample"]
    section = "4.2"
    minutes = 60
    teaches = "DDPM, DDIM and a multistep solver in one loop"
    noise = torch.linspace(-2, 2, 21, dtype=torch.float64)[:, None]

    def path(self, far, first=0.999):
        """A path of other times and deviations than any real one; its last step ends at xhat."""

        class Strange(far.Path):
            def __call__(self, t):
                return 1 - t, t, -torch.ones_like(t), torch.ones_like(t)

            def times(self, steps, solver):
                return first * torch.linspace(1, 0, steps + 1) ** 2

            def denoise(self, x_t, prediction, t):
                return x_t - t * prediction

            def step(self, x_t, x_hat, t, s, ancestral, variance=0.0):
                mean = x_hat + (s / t) ** (1 + ancestral) * (x_t - x_hat)
                return mean, ancestral * (0.3 + variance) * t

        return Strange("linear", "v")

    def network(self, x_t, t):
        return torch.sin(2 * x_t + t)

    def draws(self):
        """draw() -> noise, the same from each source."""
        generator = seeded(5)

        def draw():
            return torch.randn(21, 1, generator=generator, dtype=torch.float64)

        return draw

    def by_hand(
        self, path, solver, steps, factor=0.5, power=1, start=1, later=1, last=0, variance=0.0
    ):
        """The sampler written out. factor * ratio^power: of the extrapolation; start, later, last:
        of the noise at the start, in the steps, in the last step."""
        times, draw = path.times(steps, solver), self.draws()
        log_ratio = torch.log((1 - times) / times)
        x, x_hat_before = start * self.noise, None
        if times[0] < 0.99:
            x = times[0] * x
        for n in range(steps):
            t, s = times[n], times[n + 1]
            x_hat = path.denoise(x, self.network(x, t), t)
            ahead = x_hat
            if solver == "dpmpp_2m" and 0 < n < steps - 1:
                ratio = (log_ratio[n + 1] - log_ratio[n]) / (log_ratio[n] - log_ratio[n - 1])
                ahead = x_hat + factor * ratio**power * (x_hat - x_hat_before)
            x_hat_before = x_hat
            x, deviation = path.step(x, ahead, t, s, solver == "ddpm", variance)
            scale = later
            if n == steps - 1:
                scale = last
            if solver == "ddpm":
                x = x + scale * deviation * draw()
        return x

    def sample(self, path, *rest, network=None, draw=None):
        network, draw = network or self.network, draw or self.draws()
        return path.sample(network, self.noise.clone(), draw, *rest)

    def part_first_order(self, far):
        """ddim: x becomes the mean that self.step gives, from times[n] to times[n + 1]."""
        path, times = self.path(far), []

        def network(x_t, t):
            times.append(t)
            return self.network(x_t, t)

        got = self.sample(path, 5, "ddim", network=network)
        expect(len(times) == 5, f"5 steps call the network {len(times)} times")
        scalars = all(type(t) is torch.Tensor and t.ndim == 0 for t in times)
        expect(scalars, "the network needs a time without dimensions, times[n]")
        compare(
            torch.stack(times), path.times(5, "ddim")[:-1], "the list of the times of the calls"
        )
        compare(got, self.by_hand(path, "ddim", 5), "x", tolerance=1e-4)
        path = self.path(far, 0.95)
        mistakes = [("it does not start at sigma", self.by_hand(path, "ddim", 5, start=1 / 0.95))]
        got, want = self.sample(path, 5, "ddim"), self.by_hand(path, "ddim", 5)
        compare(got, want, "x from a first time of 0.95", mistakes, 1e-4)

    def part_second_order(self, far):
        """dpmpp_2m: replace xhat by xhat + ratio/2 (xhat - the last xhat), ratio: this step over
        the last one in log(alpha/sigma); but not in the first step and not in the last."""
        path = self.path(far)
        for steps in (1, 2, 6):

            def by_hand(factor, power, steps=steps):
                return self.by_hand(path, "dpmpp_2m", steps, factor, power)

            mistakes = [
                ("your step lacks the ratio", by_hand(0.5, 0)),
                ("the ratio is upside down", by_hand(0.5, -1)),
                ("your step has the wrong sign", by_hand(-0.5, 1)),
                ("your step lacks the ratio and has the wrong sign", by_hand(-0.5, 0)),
                ("your step lacks the factor 1/2", by_hand(1, 1)),
                ("this is ddim: nothing is extrapolated", by_hand(0, 1)),
            ]
            got = self.sample(path, steps, "dpmpp_2m")
            compare(got, by_hand(0.5, 1), f"x after {steps} step(s)", mistakes, 1e-4)

    def part_noise_of_the_steps(self, far):
        """ddpm: add temperature times the deviation times draw(); none of it in the last step."""
        path, drawn = self.path(far), []

        def draw():
            drawn.append(1)
            return self.noise

        self.sample(path, 5, "ddpm", draw=draw)
        calls = len(drawn)
        expect(calls in (4, 5), f"draw() is called {calls} times in 5 steps, of which 4 add noise")
        for variance in (0.0, 1.0):
            settings = dict(variance=variance)
            mistakes = [
                ("the last step adds noise", self.by_hand(path, "ddpm", 5, last=1, **settings)),
                ("no step adds noise", self.by_hand(path, "ddpm", 5, later=0, **settings)),
                ("variance is ignored", self.by_hand(path, "ddpm", 5)),
                ("these are the steps of ddim, not ancestral ones", self.by_hand(path, "ddim", 5)),
            ]
            want = self.by_hand(path, "ddpm", 5, **settings)
            got = self.sample(path, 5, "ddpm", 1.0, variance)
            compare(got, want, f"x at variance {variance:g}", mistakes, 1e-4)

    def part_temperature(self, far):
        """ddpm: it scales the noise of the steps; ddim and dpmpp_2m: that of the start."""
        path = self.path(far)  # two steps, so that nothing is extrapolated
        for solver in SOLVERS:
            start, later = 0.5, 1
            if solver == "ddpm":
                start, later = 1, 0.5
            mistakes = [
                ("it is ignored", self.by_hand(path, solver, 2)),
                ("it scales the noise of the start", self.by_hand(path, solver, 2, start=0.5)),
                ("it scales all noise", self.by_hand(path, solver, 2, start=0.5, later=0.5)),
            ]
            want = self.by_hand(path, solver, 2, start=start, later=later)
            got = self.sample(path, 2, solver, 0.5)
            compare(got, want, f"x of {solver} at temperature 0.5", mistakes, 1e-4)


class GuidedStep:
    """Write `FAR.guided`: classifier-free guidance (paper: section 5; Ho & Salimans 2021).

    z [S, N, W], the number i of a level, labels [S, ..], guidance -> a function network(x_t, t),
    x_t [B, N, D] and t a tensor without dimensions, that returns the prediction [B, N, D]. Either
    S = B, and there is nothing to guide; or S = 2 B: the first half of z and labels has labels, the
    second none, and the prediction is without + guidance (with - without). Both see the same x_t.

    self.head.read(z, level, labels), level [S], gives added and steer; neither depends on x_t or t,
    so it is called once. self.head(x_t, times, added, steer) takes x_t [S, N, D] and times [S, 1].
    self.cut(prediction, level), level [B], leaves what the level draws. About 10 lines.
    """

    functions = ["FAR.guided"]
    section = "5"
    minutes = 30
    teaches = "classifier-free guidance without doing work twice"

    def run(self, far, S, guidance, factor=1):
        """The function network for z = 0, 1, 2, .. by sequence, and all that goes into the head,
        which is written out, like a cut that multiplies by factor."""
        run = types.SimpleNamespace(reads=[], x_t=None, t=None)
        run.labels = torch.zeros(S, 1, dtype=torch.int64)

        class Head:
            def read(self, z, level, labels):
                run.reads.append((level, labels))
                return z**2, 2 * z**2

            def __call__(self, x_t, t, added, steer):
                run.x_t, run.t, run.added, run.steer = x_t, t, added, steer
                sizes = f"self.head gets {len(x_t)} sequences as x_t, but {len(added)} as added"
                expect(len(x_t) == len(added), sizes)
                return x_t + added[..., :1] + torch.as_tensor(t).flatten()[0]

        def cut(tokens, level):
            if factor != 1:
                compare(level, np.ones(len(tokens)), "level for self.cut")
            return factor * tokens

        model = types.SimpleNamespace(head=Head(), cut=cut, device=torch.device("cpu"))
        z = torch.arange(float(S))[:, None, None].expand(S, 3, 2)
        run.network = far.FAR.guided(model, z, 1, run.labels, guidance)
        return run

    def part_extrapolation(self, far):
        """u + guidance (p - u), p the first half (with label) and u the second (without); cut down
        to what the level draws with self.cut(.., level), level [B]."""
        run = self.run(far, 4, 3.0, factor=10)
        x_t = torch.randn(2, 3, 5)
        p, u = torch.tensor([0.0, 1.0])[:, None, None], torch.tensor([4.0, 9.0])[:, None, None]
        p, u = x_t + 0.25 + p, x_t + 0.25 + u
        mistakes = [
            ("self.cut is missing", u + 3 * (p - u)),
            ("guidance is ignored", 10 * p),
            ("with and without label are swapped", 10 * (p + 3 * (u - p))),
            ("it is p + guidance (p - u)", 10 * (p + 3 * (p - u))),
            ("it is u + guidance p", 10 * (u + 3 * p)),
        ]
        got = run.network(x_t, torch.tensor(0.25))
        compare(got, 10 * (u + 3 * (p - u)), "the prediction", mistakes, 1e-3)

    def part_what_the_head_sees(self, far):
        """x_t.repeat puts it once before each half; the head wants times [S, 1]; head.read the
        level of each of the S sequences."""
        run = self.run(far, 4, 3.0)
        x_t = torch.randn(2, 3, 5)
        run.network(x_t, torch.tensor(0.25))
        mistakes = [("the images are in the wrong order", x_t.repeat_interleave(2, 0))]
        compare(run.x_t, torch.cat([x_t, x_t]), "what the head sees as x_t", mistakes)
        compare(run.t, np.full((4, 1), 0.25), "what the head sees as times")
        compare(run.steer, 2 * run.added, "what the head sees as steer")
        level, labels = run.reads[0]
        compare(level, np.ones(4), "level for self.head.read")
        expect(labels is run.labels, "self.head.read needs the labels")

    def part_no_work_twice(self, far):
        """head.read outside of the inner function: once per level, not once per step; no second
        half where S is B."""
        run = self.run(far, 4, 3.0)
        for t in (0.9, 0.5, 0.1):
            run.network(torch.randn(2, 3, 5), torch.tensor(t))
        expect(len(run.reads) == 1, f"three steps call head.read {len(run.reads)} times, not once")
        run = self.run(far, 2, 1.0)
        x_t = torch.randn(2, 3, 5)
        p = torch.tensor([0.0, 1.0])[:, None, None]
        got = run.network(x_t, torch.tensor(0.25))
        compare(got, x_t + 0.25 + p, "the prediction without guidance", tolerance=1e-3)


EXERCISES = {
    "low_pass": LowPass,
    "block_causal_mask": BlockCausalMask,
    "kv_cache": KVCache,
    "schedules": Schedules,
    "adaln_block": AdaLNBlock,
    "diffusion_loss": DiffusionLoss,
    "second_order_sampler": SecondOrderSampler,
    "guided_step": GuidedStep,
}


# ==== Grading
# A submission runs in a process of its own (python -I, in a folder that holds nothing else, as the
# module far): no copy of far.py can be imported, an endless loop costs one exercise, and what it
# prints is not read. It may import ALLOWED, and must not use the names below nor change torch and
# numpy. Not stopped: a name put together as a string, getattr(torch, "o" + "s"), to read the checks
# or to reach files; and a body that is copied by hand, as far.py is public. For marks that matter
# run the grader in a container, as Gradescope does, and read the submissions.
ALLOWED = "__future__ contextlib dataclasses functools itertools math numpy torch typing".split()
REFUSED_FUNCTIONS = "__import__ exec eval compile open globals".split()
REFUSED_NAMES = "sys os importlib inspect hub load _getframe tb_frame f_back f_locals".split()
REFUSED_NAMES += "f_globals __globals__ __builtins__ __subclasses__ __loader__ __spec__".split()
NOT_FILLED_IN = "not filled in"


def parts_of(name):
    return [part for part in vars(EXERCISES[name]) if part.startswith("part_")]


def in_words(part):
    return part.removeprefix("part_").replace("_", " ")


def grade(name, module):
    """What the module earns in an exercise: {part: None, or what is wrong}."""
    exercise = EXERCISES[name]()
    results = {}
    for part in parts_of(name):
        check = getattr(exercise, part)
        torch.manual_seed(0)
        try:
            check(module)
            results[part] = None
        except BaseException as error:  # a submission may raise anything, SystemExit too
            results[part] = f"{explain(error, module)}. Hint: {' '.join(check.__doc__.split())}"
            if isinstance(error, NotImplementedError) and str(error).startswith("exercise "):
                results[part] = NOT_FILLED_IN
    return results


def explain(error, module):
    """An exception in a line, with the last line of the module that it went through."""
    reason = (str(error).splitlines() or [""])[0]
    if isinstance(error, Wrong):
        return reason
    where = ""
    for frame in traceback.extract_tb(error.__traceback__):
        if frame.filename == module.__file__:
            where = f" in line {frame.lineno}"
    return f"{type(error).__name__}{where}: {reason}".removesuffix(": ")


def find_functions(tree):
    """Functions and methods of a module: {qualified name: node}."""
    found = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = node
        if isinstance(node, ast.ClassDef):
            for method in node.body:
                if isinstance(method, ast.FunctionDef):
                    found[f"{node.name}.{method.name}"] = method
    return found


def refused(tree):
    """What a submission must not use: [(line, what)]."""
    found = []
    for node in ast.walk(tree):
        imported, used = [], []
        if isinstance(node, ast.Import):
            imported = [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            imported = [f"{node.module or ''}.{alias.name}" for alias in node.names]
        if isinstance(node, ast.Attribute):
            used = [node.attr]
        if isinstance(node, ast.Name):
            used = [node.id]
            if node.id in REFUSED_FUNCTIONS:
                found.append((node.lineno, f"uses {node.id}"))
        for path in imported:
            root, *rest = path.split(".")
            used += rest
            if root not in ALLOWED:
                found.append((node.lineno, f"imports {path}"))
        found += [(node.lineno, f"uses {name}") for name in used if name in REFUSED_NAMES]
    return sorted(found)


def exercise_at(tree, line):
    """The exercise in whose functions a line stands, or None."""
    functions = find_functions(tree)
    for name, exercise in EXERCISES.items():
        for function in exercise.functions:
            node = functions.get(function)
            if node and node.lineno <= line <= node.end_lineno:
                return name
    return None


def watched():
    """What no submission may change: {name: value}."""
    values = {}
    for owner in (torch, torch.nn.functional, np, math, itertools):
        for name, value in vars(owner).items():
            values[f"{owner.__name__}.{name}"] = value
    for name in dir(torch.Tensor):
        values[f"torch.Tensor.{name}"] = inspect.getattr_static(torch.Tensor, name)
    return values


def work(names, seconds):
    """In the process of a submission: grades the far.py that lies here.

    Writes lines of JSON: what is wrong with the file, or null; then [exercise, results] for each,
    until one is not done after so many seconds, or has changed what it must not.
    """
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # nothing else that is printed gets out

    def say(value):
        channel.write(json.dumps(value) + "\n")
        channel.flush()

    def changes():
        after = watched()
        return [name for name, value in before.items() if after.get(name) is not value]

    before = watched()
    spec = importlib.util.spec_from_file_location("far", "far.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["far"] = module  # dataclasses look it up
    faulthandler.dump_traceback_later(seconds, exit=True)
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        return say(explain(error, module))
    if changes():
        return say(f"it changes {', '.join(changes())}")
    say(None)
    for name in names:
        faulthandler.dump_traceback_later(seconds, exit=True)
        results = grade(name, module)
        if changes():
            say([name, dict.fromkeys(results, f"it changes {', '.join(changes())}")])
            return None
        say([name, results])
    return None


def start_work(program, names, folder, seconds):
    """`work` in a process of its own -> (the values it wrote, how it ended if not well)."""
    # -I leaves out PYTHONPATH and the user's own packages, where torch may be.
    places = {str(pathlib.Path(module.__file__).parents[1]) for module in (torch, np)}
    program = f"import sys\nsys.path += {sorted(places)}\n{program}\nwork({names}, {seconds})\n"
    done = subprocess.run(
        [sys.executable, "-I", "-"],
        input=program,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        cwd=folder,
    )
    values = [json.loads(line) for line in done.stdout.splitlines()]
    if done.returncode == 0:
        return values, None
    where = ""
    if line := re.search(r'far\.py", line (\d+)', done.stderr):
        where = f" in line {line[1]}"
    if done.stderr.startswith("Timeout"):
        return values, f"not done after {seconds:g} seconds{where}: an endless loop?"
    return values, f"it ends the process{where}"


def grade_submission(program, text, names, seconds):
    """The bytes of a far.py -> ({exercise: {part: None, or what is wrong}}, words on the file).

    program: the source of this grader. If the words are not "", nothing could be graded.
    """
    try:
        tree = ast.parse(text)
    except SyntaxError as error:
        return {}, f"line {error.lineno}: {error.msg}"
    except ValueError as error:
        return {}, str(error)
    results = {}
    for line, what in refused(tree):
        allowed = f"only {', '.join(ALLOWED)} may be imported, and no other code may be run"
        message = f"line {line} {what}, which earns nothing: {allowed}"
        name = exercise_at(tree, line)
        if name not in names:
            return {}, message
        results[name] = dict.fromkeys(parts_of(name), message)
    with tempfile.TemporaryDirectory() as folder:
        pathlib.Path(folder, "far.py").write_bytes(text)
        while left := [name for name in names if name not in results]:
            values, end = start_work(program, left, folder, seconds)
            if not values:
                return {}, f"{end or 'it ends the process'}, when it is imported"
            if values[0]:
                return {}, values[0]
            graded = dict(values[1:])
            results.update(graded)
            ungraded = [name for name in left if name not in graded]
            if ungraded and (end or not graded):
                message = end or "it ends the process"
                results[ungraded[0]] = dict.fromkeys(parts_of(ungraded[0]), message)
    return {name: results[name] for name in names}, ""


def points(results):
    return sum(message is None for message in results.values())


def what_is_missing(results):
    """Lines on the parts of an exercise that earn nothing; one where all say the same."""
    messages = set(results.values())
    if len(messages) == 1:
        return [message for message in messages if message]
    lines = []
    for part, message in results.items():
        if message:
            lines.append(f"{in_words(part)}: {message}")
    return lines


def table(results, trouble, names):
    """The results as text: exercise, points, what is missing, and the total."""
    rows = [("exercise", "points", ["what is missing"])]
    total, most = 0, 0
    for name in names:
        parts, possible = results.get(name, {}), len(parts_of(name))
        rows.append((name, f"{points(parts)} of {possible}", what_is_missing(parts)))
        total, most = total + points(parts), most + possible
    rows.append(("total", f"{total} of {most}", [trouble]))
    lines = []
    for name, earned, missing in rows:
        head = f"{name:22}{earned:10}"
        for text in missing or [""]:
            lines += textwrap.wrap(head + text, 100, subsequent_indent=" " * 34)
            head = " " * 32
    return "\n".join(lines)


def gradescope(results, trouble, names):
    """The results in the form of Gradescope's results.json."""
    tests = []
    for name in names:
        parts = results.get(name, {})
        output = "\n".join(what_is_missing(parts))
        most = len(parts_of(name))
        tests.append(dict(name=name, score=points(parts), max_score=most, output=output))
    return dict(score=sum(test["score"] for test in tests), output=trouble, tests=tests)


def grade_file(program, submission, names, seconds=60.0, json_file=None):
    """Prints the table of a submission, and writes the json_file if there is one.

    program: the source of this grader. Exits with a sentence on files that are no such files.
    """
    if not os.path.isfile(submission):
        sys.exit(f"{submission} is not a file")
    if not 0 < seconds < math.inf:
        sys.exit(f"--seconds is {seconds:g}; it must be above 0")
    if json_file and not os.path.isdir(os.path.dirname(os.path.abspath(json_file))):
        sys.exit(f"{json_file} cannot be written: there is no such folder")
    text = pathlib.Path(submission).read_bytes()
    results, trouble = grade_submission(program, text, names, seconds)
    print(table(results, trouble, names))
    if json_file:
        write_whole(json_file, json.dumps(gradescope(results, trouble, names), indent=1))


def write_whole(path, text):
    """Writes a file whole or not at all; exits with a sentence where that fails."""
    part = f"{path}.part"
    try:
        with open(part, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(part, path)
    except OSError as error:
        sys.exit(f"{path} cannot be written: {error}")
    finally:
        if os.path.exists(part):
            os.remove(part)


def grade_from_command_line(program, names, text, submission):
    """What grade.py runs; text says what it is, submission is graded where none is named."""
    parser = argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("submission", nargs="?", default=submission)
    parser.add_argument("--json", metavar="FILE", help="write results.json as Gradescope reads it")
    parser.add_argument("--seconds", type=float, default=60.0, help="limit for each exercise")
    args = parser.parse_args()
    grade_file(program, args.submission, names, args.seconds, args.json)


# ==== Handouts
GRADE_PY = '''"""Grades the exercises in far.py:

    python grade.py [SUBMISSION] [--json results.json] [--seconds 60]

Prints a table: exercise, points, what is missing. Needs Python 3.10 or newer, torch and numpy. The
checks stand below, compressed, because they hold answers.
"""

import base64
import pathlib
import sys
import zlib

try:
    import numpy  # noqa: F401
    import torch  # noqa: F401
except ImportError as error:
    sys.exit(f"grade.py needs torch and numpy (pip install torch numpy): {{error}}")

EXERCISES = {names}
CHECKS = """
{checks}"""

source = zlib.decompress(base64.b64decode(CHECKS)).decode("utf-8")
grader = {{"__name__": "grader"}}
exec(compile(source, "grader", "exec"), grader)
far = pathlib.Path(__file__).parent / "far.py"
grader["grade_from_command_line"](source, EXERCISES, __doc__, far)
'''

README_MD = """# Exercises: a generative model from low to high frequencies

far.py is the method of *Frequency Autoregressive Image Generation with Continuous Tokens* (Yu et
al., 2025, [arXiv 2503.05305](https://arxiv.org/abs/2503.05305)) in one file. The bodies of some of
its functions are left out. You write them:

1. `pip install torch numpy` (Python 3.10 or newer).
2. Read the lines at the top of far.py: the loop, an example with shapes, the letters.
3. Take the exercises in the order of the table, which is that of the paper; none needs another.
   Read the task, the docstring of the function, its class and what it calls. Where it says
   `raise NotImplementedError(..)` write the body. Change nothing else.
4. `python grade.py` prints what you have earned, and a hint where something is missing, as often as
   you like; `--help` lists its options.

far.py may import {allowed}. A submission that imports anything
else, a copy of far.py above all, or runs code from elsewhere earns nothing for it.

| exercise | functions | in the paper | minutes | points | teaches |
|---|---|---|---|---|---|
{rows}
"""


def grader_source():
    """The exercises and the grading of this file: a program that needs torch and numpy alone."""
    source = pathlib.Path(__file__).read_text(encoding="utf-8")
    imports, allowed = [], {*sys.stdlib_module_names, "numpy", "torch"}
    for node in ast.parse(source).body:
        if isinstance(node, ast.Import) and node.names[0].name in allowed:
            imports.append(ast.unparse(node))
    start, end = source.index("# ==== Exercises\n"), source.index("# ==== Handouts\n")
    return "\n".join([*imports, source[start:end]])


def blank(source, names):
    """far.py's source without the bodies of the functions of some exercises; docstrings stay."""
    exercise_of = {}
    for name in names:
        for function in EXERCISES[name].functions:
            exercise_of[function] = name
    functions = find_functions(ast.parse(source))
    lines = source.splitlines(True)
    # From the last to the first, so that the numbers of the lines before stay right.
    for function in reversed(functions):
        if function not in exercise_of:
            continue
        node = functions[function]
        body = node.body
        if ast.get_docstring(node):
            body = body[1:]
        stub = f'raise NotImplementedError("exercise {exercise_of[function]}")\n'
        lines[body[0].lineno - 1 : node.end_lineno] = [" " * body[0].col_offset + stub]
    return "".join(lines)


def instructions(names):
    """README.md for students: what to do, and the tasks."""
    rows, tasks = [], []
    for name in names:
        exercise, parts = EXERCISES[name], parts_of(name)
        functions = ", ".join(f"`{function}`" for function in exercise.functions)
        row = [f"`{name}`", functions, exercise.section, exercise.minutes, len(parts)]
        rows.append("| " + " | ".join(map(str, [*row, exercise.teaches])) + " |")
        parts = ", ".join(in_words(part) for part in parts)
        task = inspect.cleandoc(exercise.__doc__)
        tasks.append(f"\n## {name}\n\n{task}\n\nA point each: {parts}.\n")
    return README_MD.format(allowed=", ".join(ALLOWED), rows="\n".join(rows)) + "".join(tasks)


def write_handout(folder, names):
    """Writes far.py without some bodies, grade.py and README.md for students, and the licence."""
    if os.path.exists(folder) and not (os.path.isdir(folder) and not os.listdir(folder)):
        sys.exit(f"test_far.py: {folder} is there already; a handout needs a new or empty folder")
    checks = base64.encodebytes(zlib.compress(grader_source().encode(), 9)).decode()
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        sys.exit(f"test_far.py: {folder} cannot be made: {error}")
    for name, text in (
        ("far.py", blank(far_source(), names)),
        ("grade.py", GRADE_PY.format(names=names, checks=checks)),
        ("README.md", instructions(names)),
        ("LICENSE", read_text("LICENSE")),
    ):
        write_whole(os.path.join(folder, name), text)


def read_text(name):
    """A file of this folder."""
    return pathlib.Path(ROOT, name).read_text(encoding="utf-8")


def far_source():
    return read_text("far.py")


def exercises_named(text):
    """Exercises, comma-separated, or "all" -> their names; exits where one is unknown."""
    names = list(dict.fromkeys(text.split(",")))
    if names == ["all"]:
        return list(EXERCISES)
    unknown = [name for name in names if name not in EXERCISES]
    if unknown:
        allowed = ", ".join(["all", *EXERCISES])
        sys.exit(f"test_far.py: {', '.join(unknown)}: no such exercise; there are {allowed}")
    return names


def main():
    tasks = [f"{name}: {exercise.__doc__}" for name, exercise in EXERCISES.items()]
    parser = argparse.ArgumentParser(
        description="\n".join([__doc__, *tasks]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--blank", metavar="NAMES", help="exercises, comma-separated, or all")
    parser.add_argument("--handout", metavar="DIR", help="write far.py, grade.py and README.md")
    parser.add_argument("--grade", metavar="SUBMISSION", help="print the points of a far.py")
    parser.add_argument("--json", metavar="FILE", help="with --grade: Gradescope's results.json")
    parser.add_argument("--seconds", type=float, default=60.0, help="limit for each exercise")
    args = parser.parse_args()
    names = exercises_named(args.blank or "all")
    if args.grade:
        grade_file(grader_source(), args.grade, names, args.seconds, args.json)
    elif args.handout:
        write_handout(args.handout, names)
    elif args.blank:
        print(blank(far_source(), names), end="")
    else:
        parser.error("one of --blank, --handout and --grade is needed")


# ==== Helpers
TARGETS = ("full", "next", "residual")


@pytest.fixture(autouse=True)
def the_same_random_numbers():
    torch.manual_seed(0)


@pytest.fixture
def record(monkeypatch):
    """record(owner, name): a list that receives the arguments of every later call owner.name(..)"""

    def start(owner, name):
        function = getattr(owner, name)
        calls = []

        @functools.wraps(function)
        def recorded(*arguments, **settings):
            bound = inspect.signature(function).bind(*arguments, **settings)
            calls.append(tuple(bound.arguments.values()))
            return function(*arguments, **settings)

        monkeypatch.setattr(owner, name, recorded)
        return calls

    return start


def tiny(seed=0, **settings):
    """A small model of 8 x 8 images, 16 tokens and 3 levels.

    All its weights are random, so that nothing hides behind weights that start at zero.
    """
    small = dict(
        patch_size=2,
        width=16,
        depth=2,
        heads=2,
        head_width=16,
        head_depth=2,
        head_steps=3,
        temperature=1.0,
    )
    torch.manual_seed(seed)
    model = FAR(FARConfig.preset("digits", **{**small, **settings})).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def some_labels(model, B):
    """Labels of B images: classes 0, 1, .., or embeddings where the model takes those."""
    c = model.config
    if c.cond_dim:
        return torch.randn(B, c.cond_tokens, c.cond_dim, generator=seeded())
    return torch.arange(B) % c.num_classes


def some_images(B, size=8, channels=1):
    return torch.randn(B, channels, size, size)


def largest_difference(a, b):
    return (a - b).abs().max().item()


# ==== The exercises themselves
@pytest.mark.parametrize("name", EXERCISES)
def test_exercise(name):
    """far.py earns all points."""
    assert not any(grade(name, far).values())


def load_module(source, folder):
    """A module from changed source of far.py, written to a folder."""
    file = folder / "far_changed.py"
    file.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", EXERCISES)
def test_a_blank_exercise_is_not_filled_in_and_costs_no_other(name, tmp_path):
    changed = blank(far_source(), [name])
    module = load_module(changed, tmp_path)
    for other in EXERCISES:
        missing = {NOT_FILLED_IN} if other == name else {None}
        assert set(grade(other, module).values()) == missing
    before, after = (find_functions(ast.parse(source)) for source in (far_source(), changed))
    for function in before:
        text = ast.get_docstring(after[function])
        assert text == ast.get_docstring(before[function])
        is_blank = "raise NotImplementedError" in ast.unparse(after[function])
        assert is_blank == (function in EXERCISES[name].functions)
        assert not is_blank or len(after[function].body) == 1 + bool(text)


# Lines of far.py.
LEVELS = "return level[:, None] >= level"
NORMED = "self.mlp(self.norm(h) * (1 + scale) + shift)"
MEAN = "error.square().mean((1, 2))"
CUT = "cut(self(x_t, t, added, steer)) - wanted"
SHIFTED = "t = t / (t + (1 - t) / self.time_shift[level][:, None])"
WEIGHTED = "(self.loss_weights[level] * losses).mean()"
AVERAGED = "get_ema_multi_avg_fn(decay)"
AHEAD = "after / before / 2 * (x_hat - last)"
STEP = "self.step(x, ahead, t, s, ancestral, variance)"
GUIDED = "without + guidance * (with_label - without)"
READ_AGAIN = "            B = len(x_t)\n            self.head.read(z, level, labels)\n"
TIMES = "torch.full((S, 1), float(t), device=z.device)"

# By exercise: a line, what students write in place of it, the parts that it costs, what is said.
MISTAKES = {
    "low_pass": [
        ("keep * H / 2 + 1e-6", "keep * H / 2 - 1e-6", "bound", "it must not go"),
        ("keep * H / 2 + 1e-6", "keep * H + 1e-6", "low_waves", "f_x = -1 of 5 .* must not stay"),
        ("low[:, None] & low", "low[:, None] | low", "low_waves", "f_x = 0 of 5 .* must not stay"),
        ("& low)).real", "& low)).abs()", "low_waves bound", "real part, not the absolute"),
        ("& low)).real", "& low))", "low_waves bound", "complex: take the real part"),
    ],
    "block_causal_mask": [
        (LEVELS, "return level[:, None] > level", "causal", "does not see its own level"),
        (LEVELS, "return level >= level[:, None]", "causal", "rows and columns are swapped"),
        (LEVELS, "return (level[:, None] >= level).tril()", "causal", "none of its level"),
        (LEVELS, "return (level[:, None] >= level).int()", "causal", "not bool"),
        ("    if markov:", "    if False:", "markov", "markov is ignored"),
    ],
    "kv_cache": [
        ("attn_mask=mask", "attn_mask=None", "attention cache", "the mask is ignored"),
        ("self.out(y.transpose(1, 2)", "self.out(y", "attention cache", "side by side"),
        ("dropout_p=dropout", "dropout_p=0.0", "dropout", "nothing is dropped in training"),
        ("self.dropout if self.training else 0.0", "self.dropout", "dropout", "in evaluation"),
        ("cache.update(k=k, v=v)", "pass", "cache", 'must hold "k" and "v"'),
        ("cache.update(k=k, v=v)", "cache.update(k=v, v=k)", "cache", "these are the values"),
        ("            if cache:", "            if False:", "cache", "earlier blocks are forgotten"),
    ],
    "schedules": [
        ("alpha, sigma = 1 - t, t", "alpha, sigma = t, 1 - t", "linear", "this is sigma"),
        ("alpha**2).clamp(min=0).sqrt()", "alpha**2)", "cosine", "sigma .* this is its square"),
        (
            "(1 - alpha**2).clamp(min=0)",
            "(1 - (alpha + 1e-9) ** 2)",
            "cosine predict",
            "NaN .* in 1",
        ),
        ("a, b = -one, one", "a, b = -1, 1", "prediction", "int, not a tensor"),
        ("a, b = -sigma, alpha", "a, b = sigma, alpha", "prediction", "wrong sign"),
        ("a, b = -sigma, alpha", "a, b = alpha, -sigma", "prediction", "a and b are swapped"),
        ("a, b = 0 * one, one", "pass", "prediction", "a of linear, eps is wrong"),
    ],
    "adaln_block": [
        (NORMED, "self.mlp(self.norm(h) * scale + shift)", "block_of", "in place of 1"),
        (NORMED, "self.mlp(h * (1 + scale) + shift)", "block_of", "self.norm is missing"),
        ("h + gate * self", "h + self", "block_of", "the gate is missing"),
        ("h + gate * self", "gate * self", "block_of", "h is not added"),
        ("shift, scale, gate = self", "gate, shift, scale = self", "block_of", "the order is"),
        ("h = h + gate1 * self", "h = h - gate1 * self", "mixing", "the output is wrong"),
    ],
    "diffusion_loss": [
        ("* eps, a * x + b * eps", "* eps, eps", "noise", "this is the noise"),
        (MEAN, "error.square().mean()", "loss", r"the shape \[\], not \[6\]"),
        (MEAN, "error.square().sum((1, 2))", "loss", "this is the sum"),
        (CUT, "self(x_t, t, added, steer) - wanted", "loss", "cut is missing"),
        (CUT, "cut(self(x_t, t, added, steer) - wanted)", "loss", "belongs to the prediction"),
        ("draw_t(*steer.shape[:2]", "draw_t(len(z), 1", "times", r"\[6, 1\] .* steer has \[6, 4\]"),
        (SHIFTED, "pass", "time_shift", "time_shift is ignored"),
        (SHIFTED, SHIFTED.replace(") /", ") *"), "time_shift", "they are divided"),
        (WEIGHTED, "losses.mean()", "weights", "the weights .* are missing"),
        (WEIGHTED, WEIGHTED.replace(".m", ".sum(1).m"), "weights", "are added up"),
        (AVERAGED, "get_ema_multi_avg_fn(1 - decay)", "average", "decay and 1 - decay are swapped"),
        ("self.unit.copy_(model.unit)", "self.unit = model.unit", "average", "unit is shared"),
    ],
    "second_order_sampler": [
        (AHEAD, "(x_hat - last) / 2", "second", "step lacks the ratio. Hint"),
        (AHEAD, "after / before / 2 * (last - x_hat)", "second", "step has the wrong sign"),
        (AHEAD, "(last - x_hat) / 2", "second", "lacks the ratio and has the wrong sign"),
        (AHEAD, "before / after / 2 * (x_hat - last)", "second", "the ratio is upside down"),
        (AHEAD, "after / before * (x_hat - last)", "second", "lacks the factor 1/2"),
        ("0 < n < steps - 1:", "n < 0:", "second", "this is ddim"),
        ("0 < n < steps - 1:", "0 < n:", "second temperature", "not a number"),
        ("ancestral and n < steps - 1", "ancestral", "noise temperature", "last step adds noise"),
        (STEP, "self.step(x, ahead, t, s, ancestral)", "noise", "variance is ignored"),
        ("temperature * deviation", "deviation", "temperature", "ddpm .* it is ignored"),
        ("x = sigma[0] * x", "pass", "first", "it does not start at sigma"),
    ],
    "guided_step": [
        (GUIDED, "with_label + guidance * (with_label - without)", "extra", r"is p \+ guidance"),
        (GUIDED, "with_label", "extrapolation", "guidance is ignored"),
        ("with_label, without = pred", "without, with_label = pred", "extra", "are swapped"),
        ("self.cut(prediction, level[:B])", "prediction", "extrapolation", "cut is missing"),
        (f"times = {TIMES}", "times = t", "head_sees", r"\[\], not \[4, 1\]"),
        ("            B = len(x_t)\n", READ_AGAIN, "twice", "call head.read 4 times, not once"),
    ],
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_of_students_cost_their_part_and_are_named(name, tmp_path):
    for line, wrong, parts, words in MISTAKES[name]:
        source = far_source()
        assert source.count(line) == 1, line
        results = grade(name, load_module(source.replace(line, wrong), tmp_path))
        missing = {part: message for part, message in results.items() if message}
        assert len(missing) == len(parts.split()), (line, wrong)
        for part, beginning in zip(missing, parts.split(), strict=True):
            assert beginning in part
            assert "Hint: " in missing[part]
        assert re.search(words, next(iter(missing.values()))), (line, wrong)


def run_main(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["test_far.py", *map(str, flags)])
    main()


def test_a_handout_holds_all_that_students_need(tmp_path, monkeypatch, capsys):
    """far.py without the bodies, tasks, and a grader with no answer in clear, which runs alone."""
    folder = tmp_path / "handout"
    run_main(monkeypatch, "--handout", folder)
    assert sorted(os.listdir(folder)) == ["LICENSE", "README.md", "far.py", "grade.py"]
    blanked = (folder / "far.py").read_text()
    run_main(monkeypatch, "--blank", "all")
    assert capsys.readouterr().out == blanked == blank(far_source(), EXERCISES)
    text = (folder / "README.md").read_text()
    for name, exercise in EXERCISES.items():
        functions = ", ".join(f"`{function}`" for function in exercise.functions)
        assert re.search(rf"\| `{name}` \| {functions} \|.*\| {len(parts_of(name))} \|", text)
        assert inspect.cleandoc(exercise.__doc__) in text
    assert "fft" not in (folder / "grade.py").read_text()
    imports = [node for node in ast.walk(ast.parse(grader_source())) if hasattr(node, "names")]
    modules = {alias.name for node in imports for alias in node.names}
    assert {"torch", "numpy"} <= modules <= {"torch", "numpy", *sys.stdlib_module_names}

    submission, results = tmp_path / "submitted.py", tmp_path / "results.json"
    submission.write_text(blank(far_source(), ["kv_cache"]))
    monkeypatch.setattr(sys, "argv", ["grade.py", str(submission), "--json", str(results)])
    runpy.run_path(str(folder / "grade.py"), run_name="__main__")
    table = capsys.readouterr().out
    assert "kv_cache              0 of 3    not filled in\n" in table
    assert table.endswith("\ntotal                 23 of 26\n")
    for name in set(EXERCISES) - {"kv_cache"}:
        assert re.search(rf"\n{name} +(.) of \1\n", table)
    gradescope = json.loads(results.read_text())
    assert gradescope["score"] == sum(test["score"] for test in gradescope["tests"]) == 23
    assert gradescope["tests"][2] == dict(
        name="kv_cache", score=0, max_score=3, output="not filled in"
    )


def with_body(source, function, body):
    """far.py's source with another body of a function."""
    node = find_functions(ast.parse(source))[function]
    lines = source.splitlines(True)
    indent = " " * node.body[0].col_offset
    lines[node.body[0].lineno - 1 : node.end_lineno] = [f"{indent}{line}\n" for line in body]
    return "".join(lines)


def test_tricks_cost_their_exercise_and_no_other(tmp_path, monkeypatch, capsys):
    """Also an endless loop; what is printed is no result."""
    source = far_source()
    lie = 'print(\'["schedules", {"part_linear": null}]\')'
    for function, *body in (
        ("fourier", "import far_copy", "return far_copy.fourier(x, keep)"),
        ("block_causal_mask", "while True:", "    pass"),
        ("Path.__call__", lie, "raise SystemExit"),
        (
            "HeadBlock.forward",
            "Equal = type('Equal', (torch.Tensor,), {})",
            "return h.as_subclass(Equal)",
        ),
        ("FAR.guided", "torch.Tensor.__sub__ = None", "return torch.relu"),
    ):
        source = with_body(source, function, body)
    (tmp_path / "far.py").write_text(source)
    names = "low_pass,block_causal_mask,schedules,adaln_block,guided_step"
    flags = ["--grade", tmp_path / "far.py", "--blank", names, "--seconds", "3"]
    run_main(monkeypatch, *flags)
    table = " ".join(capsys.readouterr().out.split())
    for words in (
        r"low_pass 0 of 2 line \d+ imports far_copy, which earns nothing",
        r"block_causal_mask 0 of 2 not done after 3 seconds in line \d+: an endless loop\?",
        "schedules 0 of 3 linear: SystemExit in line",
        "adaln_block 1 of 2 block of the paper: the output is of type Equal, not a tensor",
        "guided_step 0 of 3 it changes torch.Tensor.__sub__",
        "total 1 of 12$",
    ):
        assert re.search(words, table)


@pytest.mark.parametrize(
    "line, words",
    [
        ("def f(:", "line 1: invalid syntax"),
        ("import far", "line 1 imports far, which earns nothing"),
        ("from . import far", "imports .far"),
        ("from torch import hub", "uses hub"),
        ("exec(open('far.py').read())", "uses exec"),
        ("torch.sys.modules['far']", "uses sys"),
        ("torch.relu = 1 / 0", "ZeroDivisionError in line 1: division by zero"),
        ("import torch; torch.relu = abs", "it changes torch.relu"),
    ],
)
def test_files_that_earn_nothing_are_said_once(line, words):
    names = list(EXERCISES)
    text = f"{line}\n{far_source()}".encode()
    results, trouble = grade_submission(grader_source(), text, names, 60)
    assert results == {} and words in trouble
    said = " ".join(table(results, trouble, names).split())
    assert said.count(words) == 1 and f"total 0 of 26 {trouble[:20]}" in said
    assert gradescope(results, trouble, names)["output"] == trouble


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--blank", "low_pas"], "low_pas: no such exercise; there are all, low_pass"),
        (["--handout", ROOT], "a handout needs a new or empty folder"),
        (["--grade", "nowhere.py"], "nowhere.py is not a file"),
        (["--grade", "far.py", "--seconds", "0"], "--seconds is 0; it must be above 0"),
        (["--grade", "far.py", "--json", "no/where.json"], "there is no such folder"),
    ],
)
def test_wrong_flags_of_the_exercises(flags, words, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit, match=words):
        run_main(monkeypatch, *flags)


# ==== Orderings
@pytest.mark.parametrize("name", ["fourier", "dct", "haar", "raster", "shuffle"])
def test_orderings_are_nested_projections(name):
    sizes = (7, 8, 16)
    if name == "haar":
        sizes = (8, 16, 32)
    for size in sizes:
        assert check_ordering(ORDERINGS[name], size) == []


@pytest.mark.parametrize("name", ORDERINGS)
def test_keep_0_shows_nothing_and_keep_1_all(name):
    x = some_images(2, 7, 3)
    assert torch.equal(ORDERINGS[name](x, 1.0), x)
    assert not ORDERINGS[name](x, 0.0).any()


def never_empty(x, keep):
    return far.dct(x, max(keep, 0.125))


def never_whole(x, keep):
    return far.dct(x, min(keep, 0.875))


def without_sign(x, keep):
    if 0 < keep < 1:
        return far.dct(x, keep).abs()
    return far.dct(x, keep)


def fading(x, keep):
    return keep * x


def random_pixels(x, keep):
    if keep == 1:
        return x
    return x * (torch.rand(8, 8, generator=seeded(int(1000 * keep))) < keep)


def mean_of_the_batch(x, keep):
    if 0 < keep < 1:
        return far.dct(x.mean(0, keepdim=True), keep).expand_as(x)
    return far.dct(x, keep)


def not_a_number(x, keep):
    if keep == 0.25:
        return x * math.nan
    return far.dct(x, keep)


def wrong_shape_at_a_quarter(x, keep):
    if keep == 0.25:
        return x[..., :4]
    return far.dct(x, keep)


@pytest.mark.parametrize(
    "ordering, laws",
    [
        (never_empty, ["zero at 0"]),
        (never_whole, ["identity at 1"]),
        (without_sign, ["linear", "idempotent", "nested"]),
        (fading, ["idempotent", "nested"]),
        (random_pixels, ["nested"]),
        (mean_of_the_batch, ["each image by itself"]),
        (not_a_number, ["linear", "idempotent", "each image by itself", "nested"]),
        (wrong_shape_at_a_quarter, ["shape"]),
        (ORDERINGS["resize"], ["idempotent", "nested"]),  # nearly a projection
    ],
)
def test_check_ordering_names_the_broken_laws(ordering, laws):
    broken = check_ordering(ordering, 8)
    assert [line.split(":")[0] for line in broken] == laws


def test_check_ordering_says_where_and_by_how_much():
    (line,) = check_ordering(never_whole, 8)
    x = torch.randn(2, 2, 3, 8, 8, generator=seeded())[0]
    error = largest_difference(far.dct(x, 0.875), x)
    assert line == f"identity at 1: broken at keep 1, largest error {error:.3g}"


def rows_in_place(x, keep):
    x[:, :, math.ceil(keep * x.shape[2]) :] = 0
    return x


def rows_copied(x, keep):
    return rows_in_place(x.clone(), keep)


def rows_fading_in_place(x, keep):
    return rows_in_place(x, keep).mul_(keep)


def test_an_ordering_may_write_into_its_input(monkeypatch):
    assert check_ordering(rows_in_place, 8) == []
    broken = check_ordering(rows_fading_in_place, 8)
    assert [line.split(":")[0] for line in broken] == ["idempotent", "nested"]
    images = some_images(4)
    before = images.clone()
    losses, drawn = [], []
    for ordering in (rows_in_place, rows_copied):
        monkeypatch.setitem(ORDERINGS, "rows", ordering)
        model = tiny(ordering="rows", target="residual", step_rule="locked")
        torch.manual_seed(1)
        losses.append(model.level_losses(images, torch.arange(4)))
        drawn.append(model.sample(4, start=(images, 1), generator=seeded()))
    assert torch.equal(*losses)
    assert torch.equal(*drawn)
    assert torch.equal(images, before)
    assert distinct_levels((0.25, 0.5, 1.0), rows_in_place, 8) == [0.25, 0.5, 1.0]


def test_an_ordering_may_compute_in_double_precision(monkeypatch):
    def double(x, keep):
        return far.dct(x.double(), keep)

    monkeypatch.setitem(ORDERINGS, "double", double)
    for target in TARGETS:
        a = tiny(ordering="double", target=target).sample(3, generator=seeded())
        b = tiny(ordering="dct", target=target).sample(3, generator=seeded())
        assert a.dtype == torch.float32
        assert torch.allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("H", [5, 8, 100])
@pytest.mark.parametrize("keep", [0.07, 0.25, 0.5, 0.58])
def test_dct_against_scipy(H, keep):
    x = torch.randn(2, 3, H, H, dtype=torch.float64)
    coefficients = scipy.fft.dctn(x.numpy(), axes=(2, 3), norm="ortho")
    kept = np.arange(H) < round(keep * H, 9)
    coefficients *= kept[:, None] * kept
    want = scipy.fft.idctn(coefficients, axes=(2, 3), norm="ortho")
    np.testing.assert_allclose(far.dct(x, keep), want, atol=1e-10)


def test_resize_is_area_down_and_bicubic_up():
    x = some_images(1, 8, 2)
    means = x.view(1, 2, 2, 4, 2, 4).mean((3, 5))  # areas of 4 x 4 pixels at k = 2
    want = interpolate(means, size=(8, 8), mode="bicubic")
    assert torch.allclose(far.resize(x, 0.25), want, atol=1e-5)
    mean = x.mean((2, 3), keepdim=True).expand_as(x)
    assert torch.allclose(far.resize(x, 0.01), mean, atol=1e-5)  # k is at least 1
    three = interpolate(adaptive_avg_pool2d(x, 3), size=(8, 8), mode="bicubic")
    assert torch.allclose(far.resize(x, 0.35), three, atol=1e-5)  # 2.8 is rounded


# Subbands (down, across) that haar keeps, by bands 0 .. 3 of 1, 1, 2 and 4 wavelets.
COARSEST = [(0, 0)]
TWO_BY_TWO = [(0, 0), (0, 1), (1, 0), (1, 1)]
FOUR_BY_FOUR = list(itertools.product(range(3), repeat=2))
HAAR_BANDS = {
    1 / 8: COARSEST,
    0.15: COARSEST,
    1 / 6: [(0, 0), (0, 1)],
    5 / 24: [(0, 0), (0, 1), (1, 0)],
    1 / 4: TWO_BY_TWO,
    1 / 3: TWO_BY_TWO + [(0, 2), (1, 2)],
    5 / 12: TWO_BY_TWO + [(0, 2), (1, 2), (2, 0), (2, 1)],
    1 / 2: FOUR_BY_FOUR,
    2 / 3: FOUR_BY_FOUR + [(0, 3), (1, 3), (2, 3)],
}


@pytest.mark.parametrize("keep", HAAR_BANDS)
def test_haar_is_the_projection_on_wavelet_subbands(keep):
    """The orthonormal Haar basis by its recursion."""
    W = np.ones((1, 1))
    while len(W) < 8:
        coarse = np.kron(W, [1, 1])
        fine = np.kron(np.eye(len(W)), [1, -1])
        W = np.concatenate([coarse, fine]) / math.sqrt(2)
    band = [0, 1, 2, 2, 3, 3, 3, 3]
    kept = np.zeros((8, 8))
    for down, across in itertools.product(range(8), repeat=2):
        kept[down, across] = (band[down], band[across]) in HAAR_BANDS[keep]
    x = torch.randn(1, 2, 8, 8, dtype=torch.float64)
    want = W.T @ ((W @ x.numpy() @ W.T) * kept) @ W
    np.testing.assert_allclose(far.haar(x, keep), want, atol=1e-10)


def test_raster_shows_whole_rows():
    x = some_images(1, 16)
    for keep, rows in ((0.25, 4), (0.3, 5), (0.01, 1)):
        shown = far.raster(x, keep)
        assert torch.equal(shown[:, :, :rows], x[:, :, :rows])
        assert not shown[:, :, rows:].any()


def test_shuffle_shows_one_more_cell_at_a_time_in_random_order():
    x = some_images(1, 16)
    shown = []
    for n in range(65):
        pixels = far.shuffle(x, n / 64) != 0
        cells = pixels.view(8, 2, 8, 2).permute(0, 2, 1, 3).reshape(64, 4)
        assert torch.equal(cells.all(1), cells.any(1))  # a cell is shown as a whole
        shown.append(cells.all(1))
    order = []
    for before, after in itertools.pairwise(shown):
        (new,) = (after & ~before).nonzero().flatten().tolist()
        assert not (before & ~after).any()
        order.append(new)
    assert sorted(order) == list(range(64))
    assert abs(np.corrcoef(order, range(64))[0, 1]) < 0.3
    small = far.shuffle(torch.ones(1, 1, 8, 8), 20 / 64).flatten() != 0
    assert torch.equal(small, shown[20])  # the same order at every size and call


def test_filters_work_in_float32_under_autocast():
    model, x = tiny(), some_images(3)
    with torch.autocast("cpu", torch.bfloat16):
        low = model.low_pass(x, 1)
    assert low.dtype == torch.float32
    assert torch.allclose(low, far.dct(x.double(), 0.25).float(), atol=1e-5)


@pytest.mark.parametrize("ordering", ORDERINGS)
@pytest.mark.parametrize("size", [4, 8, 16, 24, 64])
def test_levels_of_the_paper_s_recipe_show_more_each_time(ordering, size):
    """No two show the same, nor nothing; and what is left out shows what another one shows."""
    candidates = PAPER_LEVELS
    if size < 16:
        candidates = (0.25, 0.5, 0.75, 1.0)
    levels = FARConfig.preset("digits", paper=True, image_size=size, ordering=ordering).levels
    assert levels[-1] == 1 and set(levels) <= set(candidates)
    x = some_images(1, size)
    shown = [ORDERINGS[ordering](x, keep) for keep in (0.0, *levels)]
    for one, other in itertools.combinations(shown, 2):
        assert largest_difference(one, other) > 1e-3
    for keep in candidates:
        image = ORDERINGS[ordering](x, keep)
        assert min(largest_difference(image, other) for other in shown) < 1e-5


def test_distinct_levels_show_something():
    def nothing_below_a_half(x, keep):
        if keep < 0.5:
            return torch.zeros_like(x)
        return far.dct(x, keep)

    assert distinct_levels((0.1, 0.4, 0.5, 1.0), nothing_below_a_half, 8) == [0.5, 1.0]


# ==== Settings
def on_meta(config):
    """A model that holds no numbers, to count its parameters or operations."""
    with torch.device("meta"):
        return FAR(config)


def millions(module):
    return sum(p.numel() for p in module.parameters()) / 1e6


@pytest.mark.parametrize(
    "name, trunk, total",
    [("far_b", 172, 208), ("far_l", 406, 451), ("far_h", 791, 812), ("far_t2i", 405, 426)],
)
def test_the_paper_s_models_have_its_sizes(name, trunk, total):
    model = on_meta(FARConfig.preset(name, paper=True))
    assert millions(model.transformer) == pytest.approx(trunk, rel=0.02)
    assert millions(model) == pytest.approx(total, rel=0.05)
    assert millions(on_meta(FARConfig.preset(name)).transformer) == pytest.approx(trunk, rel=0.02)


def test_the_model_of_texts_takes_a_step():
    """All its widths and 300 words, but one block, two levels and one draw."""
    small = dict(depth=1, head_depth=1, levels=(0.5, 1.0), head_draws=1)
    model = FAR(FARConfig.preset("far_t2i", **small))
    words = torch.randn(1, 300, 1536)
    words[:, 20:] = 0
    loss = model(torch.randn(1, 16, 16, 16), words)
    loss.backward()
    weights = loss_weights(2).mean().item()
    assert loss.item() == pytest.approx(2 * weights, rel=0.1)  # of the velocity eps - x
    assert model.head.output.weight.grad.any()


@pytest.mark.parametrize("name", ["digits", "cifar", "imagenet64"])
def test_the_trunk_does_about_half_of_the_work_or_more(name, monkeypatch):
    """Of the arithmetic of the forward pass in training, and so of all of it."""
    c = FARConfig.preset(name)
    model = on_meta(c)

    def low_pass(self, x, i):
        return x.clone()

    monkeypatch.setattr(FAR, "low_pass", low_pass)
    images = torch.zeros(1, c.channels, c.image_size, c.image_size, device="meta")
    labels = torch.zeros(1, dtype=torch.int64, device="meta")
    with FlopCounterMode(display=False) as counter:
        model(images, labels)
    count = counter.get_flop_counts()
    assert sum(count["FAR.transformer"].values()) > 0.45 * sum(count["Global"].values())


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "cifar_cascade"])
def test_paper_means_the_paper_s_recipe(name):
    c = FARConfig.preset(name, paper=True)
    assert c.attention == "causal"
    assert not c.head_mixing
    assert c.head_draws == 4
    assert (c.prediction, c.schedule, c.solver) == ("eps", "cosine", "ddpm")
    assert c.target == "full"
    assert c.step_rule == "paper"
    assert c.mask == (name == "far_t2i")
    assert c.variance == 1
    assert c.loss_weighting
    assert set(c.level_time_shift) == {1}
    assert c.ordering == FARConfig.preset(name).ordering
    F = len(c.levels)
    assert F in (4, 10)
    np.testing.assert_allclose(c.level_head_steps, np.linspace(40, 100, F).round())
    np.testing.assert_allclose(c.level_temperature, np.linspace(0.8, 1, F))
    assert c.guidance_schedule == "linear"


def test_levels_of_the_paper():
    """On 16 x 16 tokens squares of 2, 3, .., 10 and 16; smaller images have four levels."""
    sides = [16 * keep for keep in PAPER_LEVELS]
    assert sides == [2, 3, 4, 5, 6, 7, 8, 9, 10, 16]
    assert FARConfig.preset("far_b", paper=True).levels == PAPER_LEVELS
    assert FARConfig.preset("far_b").levels == PAPER_LEVELS
    assert FARConfig.preset("digits", paper=True).levels == (0.25, 0.5, 0.75, 1.0)


def test_overrides_win_over_preset_and_recipe():
    c = FARConfig.preset("digits", paper=True, width=32, levels=(0.5, 1.0), solver="ddim")
    assert (c.width, c.levels, c.solver) == (32, (0.5, 1.0), "ddim")
    assert c.level_head_steps == [40, 100]
    assert c.level_temperature == [0.8, 1.0]
    assert FARConfig.preset("digits", head_depth=7).head_depth == 7
    assert len(FARConfig.preset("digits", paper=True, image_size=16).levels) == 10
    steps = [1, 2, 3, 4]
    assert FARConfig.preset("digits", paper=True, head_steps=steps).level_head_steps == steps
    assert FARConfig.preset("cifar_cascade", levels=(0.25, 0.5, 1)).level_time_shift == [1, 1, 1]
    assert FARConfig.preset("scenes", levels=(0.25, 0.5, 1)).level_time_shift == [6, 6, 6]


def test_one_number_becomes_one_per_level():
    c = FARConfig(levels=(0.25, 0.5, 0.75, 1), guidance=5, head_steps=7, temperature=0.9)
    assert c.level_guidance == [1, 2, 3, 4]  # 1 + (g - 1) i/F
    assert c.level_head_steps == [7, 7, 7, 7]
    assert c.level_temperature == [0.9] * 4
    assert c.level_time_shift == [1.0] * 4
    c = FARConfig(levels=(0.5, 1), guidance=5, guidance_schedule="constant")
    assert c.level_guidance == [5, 5]
    c = FARConfig(levels=(0.5, 1), guidance=[3, 2], head_steps=[4, 5], temperature=[0.5, 1])
    assert c.level_guidance == [3, 2]  # a list is taken as it stands
    assert c.level_head_steps == [4, 5]
    assert c.level_temperature == [0.5, 1]


def test_sizes_that_follow():
    c = FARConfig(image_size=12, channels=2, patch_size=3)
    assert (c.grid, c.num_tokens, c.token_dim) == (4, 16, 18)


def test_numbers_of_numpy_and_torch_become_python_s(tmp_path):
    """So that a checkpoint loads without running code, and its config equals the one saved."""
    c = FARConfig(
        image_size=np.int64(16),
        levels=np.array([0.25, 1.0]),
        guidance=np.float32(1.5),
        head_steps=[np.int32(3), torch.tensor(4)],
        temperature=torch.tensor([0.5, 1.0]),
        time_shift=(np.float64(0.5), 2),
        mask=np.bool_(True),
        dropout=np.float16(0.5),
    )
    assert c == FARConfig(
        image_size=16,
        levels=(0.25, 1.0),
        guidance=1.5,
        head_steps=[3, 4],
        temperature=[0.5, 1.0],
        time_shift=[0.5, 2],
        mask=True,
        dropout=0.5,
    )
    torch.save(c.to_dict(), tmp_path / "config.pt")
    loaded = torch.load(tmp_path / "config.pt", weights_only=True)
    assert FARConfig.from_dict(loaded) == c
    assert FARConfig.from_dict(json.loads(json.dumps(c.to_dict()))) == c


# ==== Tokens
def test_patchify_by_brute_force():
    x, p = some_images(2, 6, 3), 2
    tokens = patchify(x, p)
    assert tokens.shape == (2, 9, 12)
    for row, column in itertools.product(range(3), repeat=2):
        patch = x[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        assert torch.equal(tokens[:, 3 * row + column], patch.flatten(1))
    assert torch.equal(unpatchify(tokens, p, 3), x)


# ==== Schedules over levels
def test_schedules_over_levels_by_hand():
    np.testing.assert_allclose(loss_weights(3), [1.5, 1 + math.sqrt(3) / 2, 2], rtol=1e-6)
    np.testing.assert_allclose(mask_bounds(4), [0.7, 0.525, 0.35, 0.175], rtol=1e-6)
    assert head_step_schedule(4) == [40, 60, 80, 100]
    assert head_step_schedule(1) == [100]
    assert head_step_schedule(3, 2, 4) == [2, 3, 4]
    assert far.rising(0.8, 1.0, 3) == pytest.approx([0.8, 0.9, 1.0])


@pytest.mark.parametrize("lower", [0.0, 0.35, 0.7])
def test_masked_share_is_a_truncated_gaussian(lower):
    share = masked_share(torch.full((100, 200), lower))
    assert share.shape == (100, 200)
    assert lower <= share.min()
    assert share.max() <= 1
    want = scipy.stats.truncnorm((lower - 1) / 0.25, 0, loc=1, scale=0.25)
    assert scipy.stats.kstest(share.flatten().numpy(), want.cdf).pvalue > 1e-3


@pytest.mark.parametrize("N", [1, 4, 16])
@pytest.mark.parametrize("share", [0.3, 0.75, 1.0])
def test_training_hides_its_share_of_the_tokens(N, share, monkeypatch):
    """In the mean, also where that is no whole number; every token alike; each row by itself."""
    bounds = []

    def fixed_share(lower):
        bounds.append(lower)
        return torch.full_like(lower, share)

    monkeypatch.setattr(far, "masked_share", fixed_share)
    lower = torch.rand(4000, 3)
    hidden = training_mask(lower, N)
    assert bounds[0] is lower
    assert hidden.shape == (4000, 3, N)
    assert hidden.dtype == torch.bool
    count = hidden.sum(-1).float()
    assert count.min() >= math.floor(share * N)
    assert count.max() <= math.ceil(share * N)
    assert count.mean().item() == pytest.approx(share * N, abs=0.03)
    each = hidden.float().mean((0, 1))
    assert torch.allclose(each, torch.full((N,), share), atol=0.03)
    if N == 16 and share < 1:
        assert len(hidden.flatten(0, 1).unique(dim=0)) > 1000


def test_sampling_hides_the_first_tokens_of_an_order():
    order = torch.stack([torch.randperm(16) for _ in range(3)])
    for F in (1, 2, 3, 10):
        for i in range(F):
            hidden = sampling_mask(order, i, F)
            count = sum(rank < round(16 * math.cos(math.pi / 2 * i / F), 9) for rank in range(16))
            assert hidden.sum(1).tolist() == [count] * 3
            assert torch.equal(hidden, order < count)
        assert sampling_mask(order, 0, F).all()


# ==== Transformer
VARIANTS = [
    dict(),
    dict(cond_tokens=3),
    dict(cond_tokens=0),
    dict(cond_dim=5, cond_tokens=2),
    dict(attention="markov"),
    dict(attention="markov", cond_tokens=0),
]


def all_levels(B, F=3):
    return torch.arange(F).expand(B, -1)


def z_of_all_levels(model, tokens, labels, hidden=None):
    """z [B, F, N, W] in one pass, as in training, of tokens [B, F, N, D]; hidden: [B, F, N]."""
    labels = far.read_labels(model, labels, len(tokens))
    level = all_levels(len(tokens)).flatten()
    if hidden is not None:
        hidden = hidden.flatten(0, 1)
    return model.transformer(tokens.flatten(0, 1), level, labels, hidden).unflatten(0, (-1, 3))


@pytest.mark.parametrize("settings", VARIANTS)
def test_a_level_never_sees_a_later_one(settings):
    """Token 5 of a level is changed: all tokens of this level and of later ones move, no other."""
    model = tiny(**settings)
    tokens = torch.randn(2, 3, 16, 4)
    labels = some_labels(model, 2)
    before = z_of_all_levels(model, tokens, labels)
    for level in range(3):
        changed = tokens.clone()
        changed[:, level, 5] += 1
        moved = (z_of_all_levels(model, changed, labels) - before).abs().amax(-1)
        assert not moved[:, :level].any()
        assert (moved[:, level] > 1e-6).all()
        if model.config.attention == "causal":
            assert (moved[:, level + 1 :] > 1e-7).all()
        else:
            assert not moved[:, level + 1 :].any()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("settings", VARIANTS)
def test_level_by_level_with_a_cache_is_the_pass_of_training(settings, masked):
    """Also with hidden tokens, and with the half without label of guidance."""
    model = tiny(mask=masked, **settings)
    tokens = torch.randn(2, 3, 16, 4)
    hidden = None
    if masked:
        hidden = torch.rand(2, 3, 16) < 0.5
    labels = some_labels(model, 2)
    with_label = z_of_all_levels(model, tokens, labels, hidden)[:1]
    without = z_of_all_levels(model, tokens, None, hidden)[1:]
    z = torch.cat([with_label, without])
    labels = torch.cat([far.read_labels(model, labels, 2)[:1], model.no_labels(1)])
    cache = [{} for _ in model.transformer.blocks]
    for i in range(3):
        hidden_now = None
        if masked:
            hidden_now = hidden[:, i]
        got = model.transformer.next_level(tokens[:, i], i, labels, cache, hidden_now)
        assert torch.allclose(got, z[:, i], atol=1e-5)


def test_positions_are_sines_and_cosines_of_row_and_column():
    e = far.sincos_2d(5, 16)
    assert e.shape == (25, 16)
    for place, k in itertools.product(range(25), range(4)):
        row, column = place // 5, place % 5
        frequency = 100 ** (-k / 4)
        want = [math.sin(row * frequency), math.cos(row * frequency)]
        want += [math.sin(column * frequency), math.cos(column * frequency)]
        assert e[place, [k, 4 + k, 8 + k, 12 + k]].tolist() == pytest.approx(want, abs=1e-5)
    fresh = FAR(FARConfig.preset("digits"))
    assert torch.equal(fresh.transformer.position, far.sincos_2d(2, 128))
    assert torch.equal(fresh.head.position, far.sincos_2d(2, 128))


def test_tokens_are_embedded_with_position_level_and_label():
    model = tiny(mask=True)
    transformer = model.transformer
    tokens, label = torch.randn(6, 16, 4), torch.randn(6, 1, 16)
    level, hidden = torch.tensor([0, 2, 1, 1, 0, 2]), torch.rand(6, 16) < 0.5
    got = transformer.embed(tokens, level, label, hidden)
    for s, n in itertools.product(range(6), range(16)):
        want = transformer.input(tokens[s, n])
        if hidden[s, n]:
            want = transformer.mask_token
        want = want + transformer.position[n] + transformer.level.weight[level[s]]
        assert torch.allclose(got[s, n], want + label[s, 0], atol=1e-5)


@pytest.mark.parametrize("attention", ["causal", "markov"])
def test_the_condition_stands_in_front(attention, record):
    """K copies of the class with positions of their own, or K embeddings."""
    for settings in (dict(cond_tokens=3), dict(cond_dim=5, cond_tokens=3)):
        model = tiny(attention=attention, **settings)
        calls = record(model.transformer.blocks[0], "forward")
        labels = some_labels(model, 2)
        z_of_all_levels(model, torch.randn(2, 3, 16, 4), labels)
        sequence = calls[0][0]
        labels = far.read_labels(model, labels, 2)
        want = model.transformer.label(labels) + model.transformer.condition_position
        if attention == "markov":
            want = want.repeat_interleave(3, 0)  # a sequence per level
            assert sequence.shape == (6, 3 + 16, 16)
        else:
            assert sequence.shape == (2, 3 + 3 * 16, 16)
        assert torch.allclose(sequence[:, :3], want, atol=1e-5)


@pytest.mark.parametrize("place", ["attention", "branches"])
def test_dropout_is_in_every_block_and_for_training_alone(place):
    model, tokens = tiny(dropout=0.3), torch.randn(2, 3, 16, 4)
    for block in model.transformer.blocks:
        assert block.attention.dropout == block.dropout.p == 0.3
        if place == "attention":
            block.dropout.p = 0.0
        else:
            block.attention.dropout = 0.0
    a, b = (z_of_all_levels(model.train(), tokens, None) for _ in range(2))
    c, d = (z_of_all_levels(model.eval(), tokens, None) for _ in range(2))
    assert torch.equal(c, d)
    assert not torch.allclose(a, b)


def test_a_block_normalises_what_its_layers_read():
    """Pre-norm: x + attention(norm(x)), then the same with the mlp."""
    block, x = tiny().transformer.blocks[0], torch.randn(2, 5, 16)
    mask = torch.rand(5, 5) < 0.7
    mask |= torch.eye(5, dtype=torch.bool)
    want = x + block.attention(block.norm1(x), mask)
    want = want + block.mlp(block.norm2(want))
    assert torch.allclose(block(x, mask), want, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        dict(width=16, head_width=24),
        dict(width=24, head_width=16, cond_tokens=2),
        dict(width=16, head_width=30, head_mixing=False, heads=4),  # a token head has no attention
        dict(width=16, head_width=24, cond_dim=5, cond_tokens=2),
    ],
)
def test_networks_of_unequal_width(settings, record):
    model = tiny(**settings)
    labels = some_labels(model, 4)
    calls = record(model.head, "forward")
    losses = model.level_losses(some_images(4), labels)
    assert losses.isfinite().all()
    assert (losses > 0).all()
    drawn = model.sample(labels, guidance=2.0, generator=seeded())
    assert drawn.isfinite().all()
    assert calls[0][3].shape[-1] == settings["head_width"]


def test_the_worked_example_of_the_docstring(record):
    """Shapes of the preset digits, as they stand at the top of far.py."""
    model = FAR(FARConfig.preset("digits"))
    into_transformer = record(model.transformer, "forward")
    into_block = record(model.transformer.blocks[0], "forward")
    into_head = record(model.head, "loss")
    losses = model.losses(some_images(2), torch.arange(2), all_levels(2))
    assert into_transformer[0][0].shape == (2 * 3, 4, 16)
    assert into_block[0][0].shape == (2, 1 + 3 * 4, model.config.width)
    target, noise, z, *_ = into_head[0]
    assert target.shape == noise.shape == (2 * 3, 4, 16)
    assert z.shape == (2 * 3, 4, model.config.width)
    assert losses.shape == (2, 3)
    drawn = model.sample(1, return_levels=True)[0, :, 0]
    for i, side in enumerate((2, 4, 8)):
        spectrum = scipy.fft.dctn(drawn[i].numpy(), norm="ortho")
        assert np.abs(spectrum[:side, :side]).max() > 0.1
        spectrum[:side, :side] = 0
        assert np.abs(spectrum).max() < 1e-5


# ==== Path and samplers
def prediction_of(path, x, x_t, t):
    """What a network that knows the data x predicts at x_t."""
    alpha, sigma, a, b = path(t)
    eps = (x_t - alpha * x) / sigma.clamp(min=1e-6)
    if path.prediction == "eps":
        return eps
    return a * x + b * eps


def gaussian_predictor(path, mean, std):
    """The exact prediction for data N(mean, std^2), from Bayes' rule."""

    def network(x_t, t):
        alpha, sigma, _, _ = path(t)
        gain = alpha * std**2 / (alpha**2 * std**2 + sigma**2)
        return prediction_of(path, mean + gain * (x_t - alpha * mean), x_t, t)

    return network


def two_point_predictor(path, a):
    """The exact prediction for data that is -a or a, each with probability 1/2."""

    def network(x_t, t):
        alpha, sigma, _, _ = path(t)
        return prediction_of(path, a * torch.tanh(alpha * a * x_t / sigma**2), x_t, t)

    return network


def normal_source(n, seed=1):
    """draw() -> [n, 1] normal numbers in double precision."""
    generator = seeded(seed)

    def draw():
        return torch.randn(n, 1, generator=generator, dtype=torch.float64)

    return draw


def no_draw():
    raise AssertionError("a deterministic solver draws no noise")


PATHS = list(itertools.product(SCHEDULES, PREDICTIONS))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_velocity_points_along_the_path(schedule):
    """(a, b) is parallel to the derivative of (alpha, sigma) by t."""
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    alpha, sigma, a, b = (v.numpy() for v in Path(schedule, "v")(t))
    slope_of_alpha = np.gradient(alpha, 0.01)[1:-1]
    slope_of_sigma = np.gradient(sigma, 0.01)[1:-1]
    np.testing.assert_allclose(a[1:-1] * slope_of_sigma, b[1:-1] * slope_of_alpha, rtol=0.02)
    assert (b[1:-1] * slope_of_sigma > 0).all()


@pytest.mark.parametrize("schedule, prediction", PATHS)
def test_denoise_inverts_noise(schedule, prediction):
    path = Path(schedule, prediction)
    x, eps, t = torch.randn(5, 4), torch.randn(5, 4), torch.rand(5, 1) * 0.9 + 0.02
    assert torch.allclose(path.denoise(*path.noise(x, eps, t), t), x, atol=1e-4)


def test_training_times():
    """Linear: log(t / (1 - t)) is normal. Cosine: uniform."""
    t = Path("linear", "v").draw_t(100, 200)
    assert t.shape == (100, 200)
    assert scipy.stats.kstest(t.logit().flatten().numpy(), "norm").pvalue > 1e-3
    t = Path("cosine", "eps").draw_t(20000)
    assert t.shape == (20000,)
    assert scipy.stats.kstest(t.numpy(), "uniform").pvalue > 1e-3


@pytest.mark.parametrize("schedule, prediction", PATHS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_times_of_the_sampler(schedule, prediction, solver):
    """Evenly from noise to data; noise prediction with a deterministic solver starts later."""
    path = Path(schedule, prediction)
    times = path.times(7, solver)
    assert times.shape == (8,)
    assert times[-1] == 0
    assert np.allclose(np.diff(times), -times[0] / 7)
    if prediction == "eps" and solver != "ddpm":
        assert path(times[0])[0] > 0.05 - 1e-6
        assert times[0] > 0.9
    else:
        assert times[0].item() == pytest.approx(0.999)


@pytest.mark.parametrize("schedule, prediction", PATHS)
@pytest.mark.parametrize(
    "solver, variance", [("ddpm", 0), ("ddpm", 1), ("ddim", 0), ("dpmpp_2m", 0)]
)
def test_samplers_reproduce_known_distributions(schedule, prediction, solver, variance):
    path, n = Path(schedule, prediction), 10000
    draw = normal_source(n)

    def sample_with(network):
        return path.sample(network, draw(), draw, 300, solver, variance=variance)

    x = sample_with(gaussian_predictor(path, 0.5, 0.3))
    assert x.mean().item() == pytest.approx(0.5, abs=0.015)
    assert x.std().item() == pytest.approx(0.3, rel=0.04)
    x = sample_with(two_point_predictor(path, 0.8))
    assert x.mean().item() == pytest.approx(0, abs=0.03)
    assert (x.abs() - 0.8).abs().quantile(0.99).item() < 0.05


@pytest.mark.parametrize("schedule, steps", [("linear", 150), ("cosine", 30)])
@pytest.mark.parametrize("solver, order", [("ddim", 1), ("dpmpp_2m", 2)])
def test_order_of_convergence(schedule, steps, solver, order):
    """Halving the step divides the error by 2^order, against the exact flow of a Gaussian: each
    quantile keeps its place."""
    path = Path(schedule, "v")
    noise = torch.linspace(-2, 2, 101, dtype=torch.float64)[:, None]
    alpha, sigma, _, _ = path(torch.tensor(0.999, dtype=torch.float64))
    exact = 0.5 + 0.3 * (noise - alpha * 0.5) / (alpha**2 * 0.09 + sigma**2).sqrt()
    errors = []
    for n in (steps, 2 * steps):
        x = path.sample(gaussian_predictor(path, 0.5, 0.3), noise, no_draw, n, solver)
        errors.append((x - exact).abs().mean().item())
    ratio = errors[0] / errors[1]
    if order == 1:
        assert 1.7 < ratio < 2.3
    else:
        assert ratio > 3.2


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_ancestral_step_is_bayes_rule(schedule):
    """Its mean and deviation are those of x_s given x_t and x, where x_t is x_s times a number plus
    noise; and x_s of a right x has the variance of the path."""
    path = Path(schedule, "v")
    t, s = torch.tensor([0.7, 0.31], dtype=torch.float64)
    alpha, sigma, _, _ = path(t)
    alpha_s, sigma_s, _, _ = path(s)
    x, eps = torch.randn(2, 6, dtype=torch.float64)
    x_t = alpha * x + sigma * eps
    gain = alpha / alpha_s
    added = sigma**2 - gain**2 * sigma_s**2
    precision = 1 / sigma_s**2 + gain**2 / added
    mean, deviation = path.step(x_t, x, t, s, ancestral=True)
    want = (alpha_s * x / sigma_s**2 + gain * x_t / added) / precision
    np.testing.assert_allclose(mean, want, rtol=1e-6)
    assert deviation.item() ** 2 == pytest.approx(1 / precision.item(), rel=1e-6)
    _, larger = path.step(x_t, x, t, s, ancestral=True, variance=1)
    assert larger.item() ** 2 == pytest.approx(added.item(), rel=1e-6)
    _, between = path.step(x_t, x, t, s, ancestral=True, variance=0.5)
    assert between.item() ** 2 == pytest.approx((1 / precision + added).item() / 2, rel=1e-6)
    mean, deviation = path.step(x_t, x, t, s, ancestral=False)
    np.testing.assert_allclose(mean, alpha_s * x + sigma_s * eps, rtol=1e-6)
    assert deviation == 0


# ==== Diffusion head
@pytest.mark.parametrize("mixing", [True, False])
def test_a_mixing_head_sees_its_own_level_and_no_other(mixing):
    """Token 5 of the second of three sequences is changed, in the noise or in z."""
    model = tiny(head_mixing=mixing)
    level, labels = torch.tensor([1, 1, 1]), torch.full((3, 1), 4)
    x_t, z = torch.randn(3, 16, 4), torch.randn(3, 16, 16)
    t = torch.rand(3, 1)

    def output(x_t, z):
        return model.head(x_t, t, *model.head.read(z, level, labels))

    for changes_z in (False, True):
        other_x_t, other_z = x_t.clone(), z.clone()
        if changes_z:
            other_z[1, 5] += 1
        else:
            other_x_t[1, 5] += 1
        moved = (output(other_x_t, other_z) - output(x_t, z)).abs().amax(-1)  # [3, 16]
        assert not moved[[0, 2]].any()
        assert moved[1, 5] > 1e-4
        others = torch.cat([moved[1, :5], moved[1, 6:]])
        if mixing:
            assert (others > 1e-6).all()
        else:
            assert not others.any()


def test_predictions_are_float32_under_autocast():
    """So that loss and sampler do not compute in bfloat16."""
    model = tiny()
    level, labels = torch.tensor([0, 1]), torch.zeros(2, 1, dtype=torch.int64)
    with torch.autocast("cpu", torch.bfloat16):
        read = model.head.read(torch.randn(2, 16, 16), level, labels)
        prediction = model.head(torch.randn(2, 16, 4), torch.rand(2, 1), *read)
        losses = model.level_losses(some_images(2))
        drawn = model.sample(2)
    assert prediction.dtype == losses.dtype == drawn.dtype == torch.float32


def test_the_head_knows_the_time_by_sines_and_cosines_of_1000_t(record):
    """32 cosines and 32 sines, with periods from 2 pi to nearly 10,000 times as long."""
    model = tiny()
    calls = record(model.head.time, "forward")
    x_t, times = torch.zeros(2, 16, 4), torch.tensor([[0.25], [0.7]])
    added = torch.zeros(2, 16, 16)
    output = model.head(x_t, times, added, added)
    assert largest_difference(output[0], output[1]) > 1e-4
    other = model.head(x_t, times, torch.randn(2, 16, 16), added)
    assert largest_difference(other, output) > 1e-4
    got = calls[0][0]
    for s, t in enumerate((0.25, 0.7)):
        angle = 1000 * t / 10000 ** (np.arange(32) / 32)
        want = np.concatenate([np.cos(angle), np.sin(angle)])
        np.testing.assert_allclose(got[s, 0], want, atol=1e-3)


def test_what_the_head_reads():
    """Level and z steer it. With mixing, which denoises all tokens at one time, it is the mean over
    tokens and labels, and z with positions is added to the noisy tokens."""
    level, z, labels = torch.tensor([2, 0]), torch.randn(2, 16, 16), torch.randn(2, 3, 5)
    head = tiny(cond_dim=5, cond_tokens=3).head
    added, steer = head.read(z, level, labels)
    want = head.z(z).mean(1) + head.level.weight[level] + head.label(labels.mean(1))
    assert torch.allclose(steer, want[:, None], atol=1e-5)
    assert torch.allclose(added, head.z(z) + head.position, atol=1e-5)
    head = tiny(head_mixing=False).head
    added, steer = head.read(z, level, None)
    assert torch.allclose(steer, head.z(z) + head.level.weight[level][:, None], atol=1e-5)
    assert added == 0


@pytest.mark.parametrize("mixing", [True, False])
def test_a_fresh_head_is_adaln_zero(mixing):
    """Every block starts as the identity, and the head predicts zeros."""
    head = FAR(FARConfig.preset("digits", head_mixing=mixing)).head
    h, steer = torch.randn(2, 4, 128), torch.randn(2, 1, 128)
    for block in head.blocks:
        assert torch.equal(block(h, steer), h)
    labels = torch.zeros(2, 1, dtype=torch.int64)
    read = head.read(torch.randn(2, 4, 128), torch.tensor([0, 1]), labels)
    assert not head(torch.randn(2, 4, 16), torch.rand(2, 1), *read).any()


# ==== Loss
def part_of(target, x, i):
    """What level i of tiny's levels 1/4, 1/2, 1 draws of images x, by the formula."""
    shown, next_shown = ((0.0, 0.25), (0.25, 0.5), (0.5, 1.0))[i]
    if target == "full":
        return x
    if target == "next":
        return far.dct(x, next_shown)
    return far.dct(x, next_shown) - far.dct(x, shown)


@pytest.mark.parametrize("attention", ["causal", "markov"])
@pytest.mark.parametrize("target", TARGETS)
def test_inputs_targets_and_noise_of_each_level(target, attention, record):
    """x_i comes in. The target, the noise and the prediction lie in what the level draws, in units
    where the noise (and the residual) has deviation 1."""
    model = tiny(target=target, attention=attention, head_draws=2)
    images, white = some_images(500), some_images(3000)
    model.set_units(images)
    into_transformer, into_loss = record(model.transformer, "forward"), record(model.head, "loss")
    model.level_losses(images, torch.arange(500) % 10)
    ((tokens, *_),) = into_transformer
    ((targets, noise, _, level, labels, cut),) = into_loss
    assert level.tolist() == [0, 0, 1, 1, 2, 2] * 500
    assert torch.equal(labels[:, 0], (torch.arange(500) % 10).repeat_interleave(6))
    cut_white, cut_noise = cut(patchify(white, 2)), cut(noise)
    for i, keep in enumerate((0.0, 0.25, 0.5)):
        assert torch.allclose(tokens[i::3], patchify(far.dct(images, keep), 2), atol=1e-5)
        drawn = part_of(target, images, i)
        if target == "residual":
            drawn = drawn / drawn.std()
        drawn = patchify(drawn, 2).repeat_interleave(2, 0)
        mine = level == i
        assert torch.allclose(targets[mine], drawn, atol=1e-4)
        assert noise[mine].std().item() == pytest.approx(1, abs=0.05)
        assert torch.allclose(cut_noise[mine], noise[mine], atol=1e-4)
        want = patchify(part_of(target, white[mine], i), 2)
        assert torch.allclose(cut_white[mine], want, atol=1e-4)
    assert len(noise.flatten(1).unique(dim=0)) == 3000  # each draw has its own


@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(cond_dim=5, cond_tokens=2),
        dict(mask=True),
        dict(attention="markov", levels_per_image=1),
        dict(attention="markov", levels_per_image=2, head_mixing=False, cond_tokens=0),
        dict(attention="markov", levels_per_image=0),
    ],
)
@pytest.mark.parametrize("B", [1, 5])
def test_levels_in_one_batch_have_the_losses_of_each_alone(settings, B, record, monkeypatch):
    """Each image and level by itself, with z from the pass that sampling makes."""
    model = tiny(target="residual", head_draws=2, **settings)
    images, labels = some_images(B), some_labels(model, B)
    model.set_units(some_images(100))

    def draw_t(self, *shape, device=None):
        return torch.full(shape, 0.5)

    monkeypatch.setattr(Path, "draw_t", draw_t)
    level = model.levels_to_train(B)
    into_transformer, into_loss = record(model.transformer, "forward"), record(model.head, "loss")
    losses = model.losses(images, labels, level)
    assert losses.shape == level.shape
    hidden = into_transformer[0][3]
    noise = into_loss[0][1]
    losses = losses.flatten()
    inner = far.read_labels(model, labels, B)
    item = 0
    for b in range(B):
        cache = [{} for _ in model.transformer.blocks]
        label = inner[b : b + 1]
        for i in level[b].tolist():
            visible = patchify(far.dct(images[b : b + 1], (0, 0.25, 0.5)[i]), 2)
            hidden_now = hidden
            if hidden is not None:
                hidden_now = hidden[item : item + 1]
            z = model.transformer.next_level(visible, i, label, cache, hidden_now)
            target = patchify(part_of("residual", images[b : b + 1], i), 2) / model.unit[i]

            def cut(prediction, i=i):
                return patchify(part_of("residual", unpatchify(prediction, 2, 1), i), 2)

            want = []
            for draw in (2 * item, 2 * item + 1):
                eps = noise[draw : draw + 1]
                loss = model.head.loss(target, eps, z, torch.tensor([i]), label, cut)
                want.append(loss.item())
            assert losses[item].item() == pytest.approx(sum(want) / 2, rel=1e-3)
            item += 1


def test_a_level_that_adds_nothing_draws_nothing():
    """Two levels of the same frequencies: nothing is divided by the deviation of zeros."""
    model = tiny(target="residual", levels=(0.2, 0.22, 1.0))
    images = some_images(20)
    model.set_units(images)
    assert model.level_losses(images, torch.arange(20) % 10).isfinite().all()
    drawn = model.sample(5, return_levels=True)
    assert torch.allclose(drawn[:, 0], drawn[:, 1], atol=1e-4)
    assert drawn[:, 0].std() > 0.01
    assert (drawn[:, 2] - drawn[:, 1]).std() > 0.1


@pytest.mark.parametrize(
    "B, L", [(12, 1), (12, 2), (12, 3), (7, 1), (7, 2), (2, 1), (1, 1), (5, 0)]
)
def test_every_image_trains_L_levels_and_every_level_its_share(B, L):
    model = tiny(attention="markov", levels_per_image=L)
    L = L or 3
    for _ in range(10):
        levels = model.levels_to_train(B)
        assert levels.shape == (B, L)
        assert all(len(set(row)) == L for row in levels.tolist())
        share = torch.bincount(levels.flatten(), minlength=3)
        assert share.max() - share.min() <= 1
    first = [model.levels_to_train(B)[0, 0].item() for _ in range(300)]
    if L < 3:
        assert min(np.bincount(first, minlength=3)) > 60  # no level is always the first image's


def test_causal_attention_trains_all_levels_whatever_is_asked():
    levels = tiny(levels_per_image=1).levels_to_train(4)
    assert levels.tolist() == [[0, 1, 2]] * 4


@pytest.mark.parametrize("settings", [dict(), dict(mask=True), dict(loss_weighting=False)])
@pytest.mark.parametrize("attention", ["causal", "markov"])
def test_level_losses_say_what_training_says(settings, attention):
    """The loss is their weighted mean, and the same in both modes: masks hide tokens in both."""
    model = tiny(**settings, attention=attention, levels_per_image=0, label_dropout=0.0)
    images, labels = some_images(20), torch.arange(20) % 10
    weights = loss_weights(3)
    if not model.config.loss_weighting:
        weights = torch.ones(3)
    losses = []
    for training in (True, False):
        torch.manual_seed(1)
        loss = model.train(training)(images, labels).item()
        torch.manual_seed(1)
        losses.append(model.level_losses(images, labels))
        assert loss == pytest.approx((weights * losses[-1]).mean().item(), rel=1e-5)
    assert torch.equal(*losses)


def test_masks_hide_inputs_by_the_bounds_of_their_levels(record, monkeypatch):
    model, bounds = tiny(mask=True), []
    mask = torch.rand(18, 16) < 0.5

    def fixed_mask(lower, N):
        bounds.append((lower, N))
        return mask

    monkeypatch.setattr(far, "training_mask", fixed_mask)
    into_transformer = record(model.transformer, "forward")
    model(some_images(6), torch.arange(6))
    ((lower, N),) = bounds
    assert N == 16
    assert torch.equal(lower, mask_bounds(3).repeat(6))
    assert into_transformer[0][3] is mask


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 1.0])
def test_labels_are_dropped_in_training_alone(dropout, training):
    model = tiny(label_dropout=dropout).train(training)
    images, labels, losses = some_images(8), torch.arange(8), []
    for given in (labels, labels.flip(0)):
        torch.manual_seed(1)
        losses.append(model(images, given).item())
    assert (losses[0] == losses[1]) == (dropout == 1.0 and training)


@pytest.mark.parametrize("settings", [dict(), dict(cond_dim=5, cond_tokens=2)])
def test_a_share_of_the_images_loses_its_label(settings):
    """Each image for itself, and its whole label."""
    model = tiny(label_dropout=0.3, **settings).train()
    labels = far.read_labels(model, some_labels(model, 3000), 3000)
    after = model.drop_labels(labels)
    kept = (after == labels).flatten(1)
    assert torch.equal(kept.all(1), kept.any(1))
    assert kept.all(1).float().mean().item() == pytest.approx(0.7, abs=0.03)
    dropped = after[~kept.all(1)]
    assert torch.equal(dropped, model.no_labels(len(dropped)))


def test_no_label_is_a_class_of_its_own():
    """Index num_classes, which no image may ask for; a fresh model treats it like a class."""
    model = tiny()
    assert model.no_labels(3).tolist() == [[10], [10], [10]]
    assert far.read_labels(model, None, 2).tolist() == [[10], [10]]
    assert far.read_labels(model, torch.tensor([3, 9]), 2).tolist() == [[3], [9]]
    assert model.transformer.label.weight.shape == (11, 16)
    assert tiny(num_classes=0).no_labels(2).tolist() == [[0], [0]]
    assert tiny(num_classes=0).transformer.label.weight.shape == (1, 16)
    fresh = FAR(FARConfig.preset("cifar")).transformer.label.weight
    assert fresh[10].std().item() == pytest.approx(1, abs=0.2)
    assert fresh[:10].std().item() == pytest.approx(1, abs=0.2)
    fresh = FAR(FARConfig.preset("cifar", cond_dim=256, cond_tokens=2)).no_label
    assert fresh.std().item() == pytest.approx(1, abs=0.2)


def test_embeddings_condition_by_each_of_their_tokens():
    """As of a text: any of the K changes loss and images; None is a learned embedding."""
    model = tiny(cond_dim=5, cond_tokens=3)
    words = torch.randn(2, 3, 5)
    before = model.sample(words, generator=seeded())
    for k in range(3):
        changed = words.clone()
        changed[:, k] += 1
        after = model.sample(changed, generator=seeded())
        assert largest_difference(after, before) > 1e-3
    swapped = model.sample(words.flip(1), generator=seeded())
    assert largest_difference(swapped, before) > 1e-4  # their order counts
    nothing = model.sample(2, generator=seeded())
    learned = model.no_label.detach().expand(2, 3, 5)
    assert torch.equal(nothing, model.sample(learned, generator=seeded()))
    halves = model.sample(words.half(), generator=seeded())
    assert torch.equal(halves, model.sample(words.half().float(), generator=seeded()))


@pytest.mark.parametrize("attention", ["causal", "markov"])
@pytest.mark.parametrize("mixing", [True, False])
def test_padding_of_texts_changes_nothing(attention, mixing):
    """Rows of zeros behind 3 words: loss and images are those of a model that takes 3 words."""
    settings = dict(attention=attention, head_mixing=mixing, cond_dim=5, mask=True)
    long, short = tiny(cond_tokens=6, **settings), tiny(cond_tokens=3, **settings)
    weights = long.state_dict()
    weights["transformer.condition_position"] = weights["transformer.condition_position"][:3]
    weights["no_label"] = weights["no_label"][:, :3]
    short.load_state_dict(weights)
    words = torch.randn(2, 3, 5)
    words[1, 2] = 0  # the second text is shorter
    padded = torch.cat([words, torch.zeros(2, 3, 5)], 1)
    images = some_images(2)
    results = []
    for model, labels in ((short, words), (long, padded)):
        torch.manual_seed(1)
        losses = model.level_losses(images, labels)
        results.append((losses, model.sample(labels, generator=seeded(), return_levels=True)))
    for got, want in zip(*results, strict=True):
        assert torch.allclose(got, want, atol=1e-4)
    # A text that is all padding says nothing, and is no reason for NaN.
    assert long.sample(torch.zeros(2, 6, 5), generator=seeded()).isfinite().all()


def test_units_are_deviations_of_what_levels_draw():
    """Of white images the share of the frequencies; dct keeps 2 x 2, 4 x 4 and 8 x 8 of them."""
    shares = np.array([4, 12, 48]) / 64
    model = tiny(target="residual")
    model.set_units(3 * some_images(4000))
    np.testing.assert_allclose(model.noise_unit, np.sqrt(shares), rtol=0.03)
    np.testing.assert_allclose(model.unit, 3 * np.sqrt(shares), rtol=0.03)
    model = tiny(target="next")
    model.set_units(3 * some_images(4000))
    np.testing.assert_allclose(model.noise_unit, np.sqrt(np.cumsum(shares)), rtol=0.03)
    assert model.unit.tolist() == [1, 1, 1]
    model = tiny()
    model.set_units(3 * some_images(10))
    assert model.noise_unit.tolist() == model.unit.tolist() == [1, 1, 1]


# ==== Sampling
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("rule", ["paper", "locked"])
@pytest.mark.parametrize("ordering", ["fourier", "dct"])
def test_step_rules(target, rule, ordering, monkeypatch):
    """Against their formulas, from the images that the head draws."""
    model = tiny(target=target, ordering=ordering, step_rule=rule)
    drawn, draw_image = [], model.draw_image

    def recorded(*arguments):
        drawn.append(draw_image(*arguments))
        return drawn[-1]

    monkeypatch.setattr(model, "draw_image", recorded)
    levels = model.sample(torch.arange(6), return_levels=True, generator=seeded())
    assert levels.shape == (6, 3, 1, 8, 8)
    x = torch.zeros(6, 1, 8, 8)
    keeps = (0.0, 0.25, 0.5, 1.0)
    for i in range(3):
        low = ORDERINGS[ordering](drawn[i], keeps[i])
        want = ORDERINGS[ordering](drawn[i], keeps[i + 1])
        if rule == "locked":
            want = x + want - low
        assert torch.allclose(levels[:, i], want, atol=1e-4)
        change = largest_difference(ORDERINGS[ordering](levels[:, i], keeps[i]), x)
        stays = rule == "locked" or target == "residual" or i == 0
        assert (change < 1e-4) == stays
        x = levels[:, i]
    assert torch.equal(model.sample(torch.arange(6), generator=seeded()), levels[:, -1])


def test_a_residual_is_drawn_on_top_of_what_is_shown(monkeypatch):
    """A head that draws zeros leaves x_i as it is; one that draws ones adds a unit."""
    model = tiny(target="residual")
    model.unit.copy_(torch.tensor([2.0, 3.0, 4.0]))
    for value in (0.0, 1.0):

        def drawn(network, noise, value=value, **rest):
            return torch.full_like(noise, value)

        monkeypatch.setattr(model.head.path, "sample", drawn)
        x, z = some_images(2), torch.zeros(2, 16, 16)
        draw = far.noise_source(seeded(), 2, x.device)
        got = model.draw_image(x, z, 1, model.no_labels(2), draw, model.config)
        assert torch.allclose(got, x + 3 * value)


@pytest.mark.parametrize("settings", [dict(), dict(attention="markov"), dict(mask=True)])
def test_sampling_from_a_given_level_goes_on_as_it_went(settings, monkeypatch):
    """x_i given and the same noise from there give the same image."""
    model, labels = tiny(step_rule="locked", **settings), torch.tensor([1, 2, 3])
    draws = []

    def recording(generator, B, device):
        def draw(*shape):
            draws.append(torch.randn(B, *shape))
            return draws[-1]

        return draw

    monkeypatch.setattr(far, "noise_source", recording)
    levels = model.sample(labels, guidance=2.0, return_levels=True)
    orders = len(draws) - 3  # with masks the first draw is the order of the tokens
    for i in range(3):
        left = draws[:orders] + draws[orders + i :]

        def replaying(generator, B, device, left=left):
            def draw(*shape):
                return left.pop(0)

            return draw

        monkeypatch.setattr(far, "noise_source", replaying)
        start = (levels[:, -1], i)
        again = model.sample(labels, guidance=2.0, start=start, return_levels=True)
        assert torch.allclose(again, levels, atol=1e-4)
        assert not left


def test_variations_of_one_picture():
    model = tiny(step_rule="locked")
    picture = torch.randint(256, (1, 1, 8, 8), dtype=torch.uint8)
    drawn = model.sample(8, start=(picture, 2), generator=seeded(), return_levels=True)
    for i, keep in enumerate((0.25, 0.5)):
        want = far.dct(picture / 127.5 - 1, keep).expand(8, -1, -1, -1)
        assert torch.allclose(drawn[:, i], want, atol=1e-5)
    assert torch.allclose(far.dct(drawn[:, 2], 0.5), drawn[:, 1], atol=1e-4)
    assert drawn[:, 2].std(0).min() > 0.01


def test_the_head_does_not_run_where_levels_are_given(record):
    model = tiny()
    calls = record(model.head, "forward")
    model.sample(2, start=(some_images(2), 2), head_steps=4)
    assert len(calls) == 4


@pytest.mark.parametrize("kept", [(0.5, 1.0), (0.25, 1.0), (1.0,)])
def test_levels_left_out(kept):
    """As a model that has these levels alone and the level embeddings of the one with all."""
    model, labels = tiny(attention="markov"), torch.tensor([1, 2, 3])
    part = tiny(attention="markov", levels=kept)
    states = [0] + [(0.25, 0.5, 1.0).index(keep) + 1 for keep in kept[:-1]]
    weights = model.state_dict()
    for name in weights:
        if name.endswith(("level.weight", "unit")):
            weights[name] = weights[name][states]
    part.load_state_dict(weights)
    settings = dict(guidance=2.0, guidance_schedule="constant", return_levels=True)
    got = model.sample(labels, levels=kept, generator=seeded(), **settings)
    want = part.sample(labels, generator=seeded(), **settings)
    assert got.shape == (3, len(kept), 1, 8, 8)
    assert torch.allclose(got, want, atol=1e-5)
    whole = model.sample(labels, generator=seeded(), **settings)
    assert not torch.allclose(whole[:, -1], want[:, -1], atol=0.01)
    every = model.sample(labels, levels=(0.25, 0.5, 1), generator=seeded(), **settings)
    assert torch.equal(every, whole)


def test_locked_steps_over_a_level_add_all_that_lies_between():
    model = tiny(attention="markov", step_rule="locked")
    drawn = model.sample(4, levels=(0.25, 1.0), return_levels=True)
    assert torch.allclose(far.dct(drawn[:, 1], 0.25), drawn[:, 0], atol=1e-4)
    assert largest_difference(far.dct(drawn[:, 1], 0.5), drawn[:, 0]) > 0.01


@pytest.mark.parametrize("levels, states", [(None, [0, 1, 2]), ((0.5, 1.0), [0, 2]), ((1.0,), [0])])
def test_each_level_draws_with_its_own_settings(levels, states, record):
    """Those of the x_i that it starts from, also where levels are left out."""
    model = tiny(attention="markov")
    into_sampler, into_guided = record(model.head.path, "sample"), record(model, "guided")
    model.sample(
        torch.arange(2),
        levels=levels,
        head_steps=[1, 2, 3],
        temperature=[0.9, 0.8, 0.7],
        guidance=4.0,
        solver="ddpm",
        variance=0.3,
    )
    settings = [call[3:] for call in into_sampler]
    assert settings == [([1, 2, 3][i], "ddpm", [0.9, 0.8, 0.7][i], 0.3) for i in states]
    assert [call[1] for call in into_guided] == states
    assert [call[3] for call in into_guided] == [1 + i for i in states]


@pytest.mark.parametrize("target", TARGETS)
def test_all_noise_of_a_level_lies_in_what_it_draws_with_deviation_1(target, monkeypatch):
    """The noise of the start and that of ancestral steps."""
    model = tiny(target=target)
    model.set_units(some_images(500))
    noises = []

    def sampler(network, noise, draw, **rest):
        noises.append((noise, draw()))
        return noise

    monkeypatch.setattr(model.head.path, "sample", sampler)
    model.sample(500)
    assert len(noises) == 3
    for i, pair in enumerate(noises):
        assert largest_difference(*pair) > 0.1
        for noise in pair:
            x = unpatchify(noise, 2, 1)
            assert torch.allclose(part_of(target, x, i), x, atol=1e-4)
            assert x.std().item() == pytest.approx(1, abs=0.05)


def draw_by_hand(model, labels, guidance, steps, generator):
    """Guided sampling from the pass of training: both halves whole at every level."""
    B, p = len(labels), model.config.patch_size
    x, visible = torch.zeros(B, 1, 8, 8), torch.zeros(B, model.F, 16, 4)
    for i in range(model.F):
        visible[:, i] = patchify(x, p)
        conditions = []
        for given in (labels, None):
            z = z_of_all_levels(model, visible, given)[:, i]
            inner = far.read_labels(model, given, B)
            conditions.append(model.head.read(z, torch.full((B,), i), inner))

        def network(x_t, t, i=i, conditions=conditions):
            t = torch.full((B, 1), float(t))
            p, u = (model.head(x_t, t, *condition) for condition in conditions)
            return u + guidance[i] * (p - u)

        noise = torch.randn(B, 16, 4, generator=generator)
        tokens = model.head.path.sample(network, noise, no_draw, steps, "ddim")
        x = far.dct(unpatchify(tokens, p, 1), model.config.levels[i])
    return x


@pytest.mark.parametrize("settings", [dict(), dict(attention="markov"), dict(head_mixing=False)])
def test_guided_sampling_by_hand(settings, record):
    """g at level i is 1 + (g - 1) i/F; where it is 1, the half without label is left out."""
    model, labels = tiny(solver="ddim", head_steps=2, **settings), torch.tensor([1, 2, 3])
    with torch.no_grad():
        want = draw_by_hand(model, labels, [1, 2, 3], 2, seeded())
    into_head = record(model.head, "forward")
    for guidance in (4.0, [1.0, 2.0, 3.0], np.array([1.0, 2.0, 3.0]), torch.tensor(4.0)):
        into_head.clear()
        got = model.sample(labels, guidance=guidance, generator=seeded())
        assert torch.allclose(got, want, atol=1e-3)
        assert [len(call[0]) for call in into_head] == [3, 3, 6, 6, 6, 6]


def test_no_half_without_labels_where_nothing_is_guided(record):
    model = tiny()
    into_transformer = record(model.transformer, "next_level")
    into_head = record(model.head, "forward")
    for labels, guidance in ((torch.arange(3), 1.0), (3, 4.0)):
        into_transformer.clear()
        into_head.clear()
        model.sample(labels, guidance=guidance, head_steps=2)
        assert [len(call[0]) for call in into_transformer] == [3, 3, 3]
        assert [len(call[0]) for call in into_head] == [3] * 6


def test_sampling_hides_tokens_in_one_order_per_image(record):
    """The same at all levels and in both halves of guidance."""
    model = tiny(mask=True)
    masks = record(far, "sampling_mask")
    into_transformer = record(model.transformer, "next_level")
    model.sample(torch.arange(5), guidance=2.0, generator=seeded())
    assert [call[1:] for call in masks] == [(0, 3), (1, 3), (2, 3)]
    rank = masks[0][0]
    assert torch.equal(rank.sort().values, torch.arange(16).expand(5, -1))
    assert len(rank.unique(dim=0)) > 1
    for i, call in enumerate(into_transformer):
        assert masks[i][0] is rank
        assert torch.equal(call[4], sampling_mask(rank, i, 3).repeat(2, 1))


def test_every_token_is_drawn_whether_hidden_or_not(monkeypatch):
    """The image of the next level shows what the head drew, at hidden places too."""
    model = tiny(mask=True, levels=(0.5, 1.0), ordering="raster")

    def sampler(network, noise, **rest):
        return torch.arange(16.0)[None, :, None].expand_as(noise) + 1

    monkeypatch.setattr(model.head.path, "sample", sampler)
    tokens = patchify(model.sample(3), 2)
    assert torch.equal(tokens, torch.arange(1.0, 17)[None, :, None].expand(3, 16, 4))


def test_masks_may_be_left_out_in_sampling(record):
    model = tiny(mask=True)
    calls = record(model.transformer, "next_level")
    without = model.sample(3, mask=False, generator=seeded())
    assert [call[4] for call in calls] == [None] * 3
    assert largest_difference(without, model.sample(3, generator=seeded())) > 0.01


def test_sampling_is_the_same_in_training_mode(monkeypatch):
    """It leaves the mode and the random state as they were, also after an error."""
    model = tiny(mask=True, dropout=0.5)
    want = model.sample(torch.arange(3), generator=seeded())
    model.train()
    state = torch.get_rng_state()
    assert torch.equal(model.sample(torch.arange(3), generator=seeded()), want)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert model.head.training

    def broken(*arguments):
        raise ZeroDivisionError

    monkeypatch.setattr(model.head, "read", broken)
    with pytest.raises(ZeroDivisionError):
        model.sample(1)
    assert model.training
    assert model.head.training


def test_drawn_images_may_be_used_in_a_loss():
    image = tiny().sample(2)
    assert not image.requires_grad
    torch.nn.Linear(8, 8)(image).sum().backward()


def test_generators():
    """One for all or one per image, in which case an image does not depend on the others."""
    model, labels = tiny(solver="ddpm", mask=True), torch.arange(7)

    def draw(rows, **settings):
        generators = [seeded(100 + row) for row in rows]
        return model.sample(labels[rows], generator=generators, guidance=2.0, **settings)

    together = draw(list(range(7)))
    for rows in ([0], [3, 4], [6, 5, 1]):
        assert torch.allclose(draw(rows), together[rows], atol=1e-4)
    assert largest_difference(together[0], together[1]) > 0.01
    a, b, c = (model.sample(labels, generator=seeded(seed)) for seed in (3, 3, 4))
    assert torch.equal(a, b)
    assert largest_difference(a, c) > 0.01
    torch.manual_seed(5)
    a = model.sample(labels)
    assert largest_difference(a, model.sample(labels)) > 0.01
    torch.manual_seed(5)
    assert torch.equal(model.sample(labels), a)


def test_sample_may_change_the_schedule_of_guidance_alone(record):
    model = tiny(guidance=4.0)
    calls = record(model, "guided")
    model.sample(torch.arange(2))
    model.sample(torch.arange(2), guidance_schedule="constant")
    assert [call[3] for call in calls] == [1, 2, 3, 4, 4, 4]


def test_settings_of_sample_are_for_one_call():
    model, labels = tiny(), torch.arange(4)
    before = model.config.to_dict()
    plain = model.sample(labels, generator=seeded())
    model.sample(labels, guidance=3.0, head_steps=2, solver="ddim", step_rule="locked")
    assert model.config.to_dict() == before
    assert torch.equal(model.sample(labels, generator=seeded()), plain)


def test_labels_on_an_accelerator_are_not_waited_for(monkeypatch):
    def wait(*arguments):
        raise AssertionError("this would wait for the device")

    for name in ("min", "max", "item"):
        monkeypatch.setattr(torch.Tensor, name, wait)
    model = tiny().to("meta")
    labels = torch.zeros(3, dtype=torch.int64, device="meta")
    assert far.read_labels(model, labels, 3).shape == (3, 1)


# ==== Training and sampling together
PICTURES = torch.tensor(
    [
        [[1, -1, -1, 1], [-1, 1, 1, -1], [1, 1, -1, -1], [-1, 1, -1, 1]],
        [[-1, -1, 1, 1], [1, -1, 1, -1], [-1, 1, 1, 1], [1, -1, -1, 1]],
    ]
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(target="next", attention="markov"),
        dict(target="residual", attention="markov", levels_per_image=1, time_shift=[0.35, 2.5]),
        dict(head_mixing=False, mask=True, schedule="cosine", solver="ddpm"),
        dict(prediction="eps"),
    ],
)
def test_a_trained_model_draws_what_it_learned(settings):
    """Two pictures of 4 x 4 pixels, a class each: hundreds of steps, then every class has its own;
    signs, units, levels, labels and times of training and sampling belong together."""
    small = dict(
        image_size=4,
        patch_size=2,
        levels=(0.5, 1.0),
        num_classes=2,
        width=32,
        depth=2,
        head_width=32,
        head_depth=1,
        head_steps=12,
    )
    torch.manual_seed(0)
    model = FAR(FARConfig.preset("digits", **{**small, **settings}))
    labels = torch.arange(32) % 2
    images = 0.4 * PICTURES[labels][:, None].float()
    model.set_units(images)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(250):
        optimizer.zero_grad()
        model(images, labels).backward()
        optimizer.step()
    for guidance in (1.0, 1.5):
        drawn = model.sample(labels, guidance=guidance, generator=seeded())
        assert (drawn - images).abs().mean((1, 2, 3)).median() < 0.1


def settled(config):
    """What a config means, whether its levels were set by one number or by a list."""
    raw = ("guidance", "guidance_schedule", "head_steps", "temperature", "time_shift")
    return {name: value for name, value in vars(config).items() if name not in raw}


def shipped_weights(name, limit):
    """The model of a file in assets, smaller than limit bytes."""
    path = os.path.join(ROOT, "assets", name)
    assert os.path.getsize(path) < limit
    model, rest = sample.load_checkpoint(path)
    assert rest["classes"][:2] == ["airplane", "automobile"]
    return model


def check_labels_steer(model):
    """Airplanes and ships are bluer than deer and frogs; neighbours are alike. Returns images."""
    labels = torch.tensor([0, 8, 4, 6]).repeat_interleave(4)
    x = model.sample(labels, head_steps=5, generator=seeded())
    blue = (x[:, 2] - x[:, :2].mean(1)).mean((1, 2))
    assert blue[:8].mean() > blue[8:].mean() + 0.1
    assert np.corrcoef(x[..., :-1].flatten(), x[..., 1:].flatten())[0, 1] > 0.85
    return x


@pytest.mark.slow
def test_shipped_laptop_weights():
    """Pictures with labels that steer, with the contrast of photographs in low and high bands."""
    model = shipped_weights("far_cifar10_cpu.pt", 8.1e6)
    config = FARConfig.preset("cifar_laptop", guidance=[4.0, 2.5, 1.0])
    assert settled(model.config) == settled(config)
    x = check_labels_steer(model)
    coarse = far.dct(x, 0.25)
    assert 0.35 < coarse.std() < 0.65
    assert 0.1 < (x - coarse).std() < 0.3


@pytest.mark.slow
def test_shipped_cifar_weights():
    """Units by formula; pictures with the contrast and the spectrum of photographs, and with
    labels that steer."""
    model = shipped_weights("far_cifar10.pt", 25e6)
    config = FARConfig.preset("cifar_cascade", guidance=[1.5, 1.25])
    assert settled(model.config) == settled(config)
    # dct keeps 8 x 8 of 32 x 32 coefficients; the published means and deviations of CIFAR-10.
    np.testing.assert_allclose(model.noise_unit, np.sqrt([1 / 16, 15 / 16]), rtol=0.01)
    mean, deviation = np.array([[0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]])
    variance = 4 * ((deviation**2).mean() + mean.var())
    assert model.unit.square().sum().item() == pytest.approx(variance, rel=0.02)
    x = check_labels_steer(model)
    coarse = far.dct(x, 0.25)
    assert 0.7 < coarse.std() / model.unit[0] < 1.15
    assert 0.45 < (x - coarse).std() / model.unit[1] < 1.15  # few steps blur


# ==== Errors: one sentence that says what was given and what is allowed
@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(name="huge"), "preset is 'huge'; it must be one of digits, cifar"),
        (dict(name="cifar_cascade", paper=True), "cifar_cascade is no FAR"),
        (dict(colour=1), r"unknown settings \['colour'\]; allowed: image_size"),
        (dict(ordering="spiral"), "ordering is 'spiral'; it must be one of fourier, dct"),
        (dict(ordering=["dct"]), r"ordering is \['dct'\]"),
        (dict(depth=0), "depth is 0; it must be a whole number of at least 1"),
        (dict(depth=True), "depth is True; it must be a whole number"),
        (dict(num_classes=-1), "num_classes is -1; .* at least 0"),
        (dict(label_dropout=1.5), r"label_dropout is 1.5; it must lie in \[0, 1\]"),
        (dict(dropout="a"), r"dropout is 'a'; it must lie in \[0, 1\]"),
        (dict(head_mixing=1), "head_mixing is 1; it must be True or False"),
        (dict(levels=(0.5, 0.25, 1)), "must increase"),
        (dict(levels=(0.5, 0.5, 1)), "must increase"),
        (dict(levels=(0.25, 0.5)), "exactly 1"),
        (dict(levels=(0.0, 1.0)), "above 0"),
        (dict(levels=()), "must increase"),
        (dict(levels=("a", 1)), "must increase"),
        (dict(levels=1.0), "levels are 1.0; they must increase"),
        (dict(levels_per_image=4), "levels_per_image is 4, more than the 3 levels"),
        (dict(patch_size=3), "image_size 8 is not divisible by 3"),
        (dict(width=30, heads=3), "width 30 is not divisible by 4"),
        (dict(width=32, heads=3), "width 32 is not divisible by 3"),
        (dict(head_width=30, heads=2), "head_width 30 is not divisible by 4"),
        (dict(head_width=32, width=60, heads=3), "head_width 32 is not divisible by 3"),
        (dict(cond_dim=3, cond_tokens=0), "cond_dim needs cond_tokens"),
        (dict(head_steps=0), "head_steps is 0; .* whole number >= 1, or 3, one per level"),
        (dict(head_steps=2.5), "head_steps is 2.5"),
        (dict(head_steps=[1, 2]), r"head_steps is \[1, 2\]; .* or 3, one per level"),
        (dict(temperature=-1.0), "temperature is -1.0; it must be a number >= 0"),
        (dict(temperature=math.inf), "temperature is inf"),
        (dict(temperature="paper"), "temperature is 'paper'; it must be a number"),
        (dict(guidance=math.nan), "guidance is .*nan.*; it must be a number"),
        (dict(time_shift=0), "time_shift is 0; it must be a number >= 0.001"),
    ],
)
def test_impossible_settings(settings, words):
    with pytest.raises(ValueError, match=words):
        FARConfig.preset(**{"name": "digits", **settings})


def test_every_setting_that_is_a_name_has_its_choices():
    named = {f.name for f in dataclasses.fields(FARConfig) if f.type is str}
    assert named == set(far.CHOICES)


CLASSES = torch.zeros(2, dtype=torch.int64)
IMAGES = torch.zeros(2, 1, 8, 8)


@pytest.mark.parametrize(
    "images, words",
    [
        (torch.zeros(2, 1, 9, 9), r"of shape \[2, 1, 9, 9\]; allowed: .* shape \[B, 1, 8, 8\]"),
        (torch.zeros(2, 8, 8), r"of shape \[2, 8, 8\]"),
        (torch.zeros(0, 1, 8, 8), r"of shape \[0, 1, 8, 8\]"),
        (torch.zeros(2, 1, 8, 8, dtype=torch.float64), "images are torch.float64"),
        (np.zeros((2, 1, 8, 8), np.float32), "images are of type ndarray"),
    ],
)
def test_images_of_another_kind(images, words):
    model = tiny()
    for call in (model, model.level_losses):
        with pytest.raises(ValueError, match=words):
            call(images, CLASSES)


@pytest.mark.parametrize("scale", [16.0, 255.0, math.nan])
def test_float_images_of_another_range(scale):
    """Levels of grey as floats: 0 .. 16, 0 .. 255; and a NaN. Latents of unit variance are fine."""
    model, images = tiny(), torch.rand(2, 1, 8, 8)
    wrong = "float images have a root mean square of .*: scale them to about .* or give uint8"
    for call in (model, model.level_losses):
        with pytest.raises(ValueError, match=wrong):
            call(scale * images, CLASSES)
        call(2 * some_images(2), CLASSES)


def test_a_start_of_another_kind():
    with pytest.raises(ValueError, match=r"images are .* of shape \[2, 1, 9, 9\]; allowed: .*"):
        tiny().sample(2, start=(torch.zeros(2, 1, 9, 9), 1))


@pytest.mark.parametrize(
    "settings, labels, words",
    [
        (dict(), torch.tensor([0, 10]), r"labels lie in 0 .. 10; allowed: 0 .. 9"),
        (dict(), torch.tensor([-1, 3]), r"labels lie in -1 .. 3; allowed: 0 .. 9"),
        (dict(), torch.zeros(2), r"labels are torch.float32 .*; allowed: int64 of shape \[2\]"),
        (dict(), torch.zeros(3, dtype=torch.int64), r"allowed: int64 of shape \[2\]"),
        (dict(), [0, 1], "labels are of type list"),
        (dict(num_classes=0), CLASSES, "this model has no classes; give no labels"),
        (dict(cond_dim=5), torch.zeros(2, 1, 4), r"allowed: float32 .* of shape \[2, 1, 5\]"),
    ],
)
def test_labels_of_another_kind(settings, labels, words):
    model = tiny(**settings)
    for call in (model, model.level_losses):
        with pytest.raises(ValueError, match=words):
            call(IMAGES, labels)


MARKOV = dict(attention="markov")


@pytest.mark.parametrize(
    "settings, labels, arguments, words",
    [
        (dict(), 0, dict(), "labels are 0; allowed: a tensor for one image or more, or their num"),
        (dict(), True, dict(), "labels are True"),
        (dict(), [0, 1], dict(), r"labels are \[0, 1\]"),
        (dict(), torch.tensor(3), dict(), r"labels are tensor\(3\)"),
        (dict(), CLASSES[:0], dict(), r"labels are tensor\(\[\]"),
        (dict(), torch.tensor([10]), dict(), r"allowed: 0 .. 9"),
        (dict(), torch.tensor([0.5]), dict(), "int64"),
        (dict(), 2, dict(width=5), r"unknown settings \['width'\]; allowed: .*head_steps"),
        (dict(), 2, dict(head_steps=0), "head_steps is 0"),
        (dict(), 2, dict(mask=True), "mask is True, but this model was trained without"),
        (dict(), 2, dict(generator=5), "torch.Generator, or a list of one for each of 2"),
        (dict(), 2, dict(generator=[seeded()] * 3), "one for each of 2 images"),
        (dict(), 2, dict(generator=[]), "one for each of 2 images"),
        (dict(), 2, dict(start=5), r"start must be .* 1 or 2 images, and a level of \[0, 1, 2\]"),
        (dict(), 2, dict(start=(IMAGES,)), "start must be a tuple"),
        (dict(), 2, dict(start=(IMAGES, 3)), r"a level of \[0, 1, 2\]"),
        (dict(), 2, dict(start=(torch.zeros(3, 1, 8, 8), 1)), "1 or 2 images"),
        (MARKOV, 2, dict(levels=(0.5, 1), start=(IMAGES, 1)), r"a level of \[0, 2\]"),
        (MARKOV, 2, dict(levels=(0.5,)), r"levels are .*; allowed: some of \(0.25, 0.5, 1.0\)"),
        (MARKOV, 2, dict(levels=(0.3, 1.0)), "levels are .*; allowed: some of"),
        (MARKOV, 2, dict(levels=1.0), "levels are .*; allowed: some of"),
        (dict(), 2, dict(levels=(0.5, 1)), "target full, attention markov"),
        ({**MARKOV, "target": "next"}, 2, dict(levels=(0.5, 1)), "target full, attention markov"),
    ],
)
def test_wrong_arguments_of_sample(settings, labels, arguments, words):
    with pytest.raises(ValueError, match=words):
        tiny(**settings).sample(labels, **arguments)


@pytest.mark.parametrize("p", [0, 3, -2])
def test_patches_that_do_not_fit(p):
    with pytest.raises(ValueError, match=f"8 x 8 are not divisible by the patch side {p}"):
        patchify(IMAGES, p)


@pytest.mark.parametrize("N, D", [(15, 4), (16, 3)])
def test_tokens_that_are_no_image(N, D):
    with pytest.raises(ValueError, match="no square grid of patches 1 x 2 x 2"):
        unpatchify(torch.zeros(1, N, D), 2, 1)


def test_haar_needs_sides_that_divide():
    with pytest.raises(ValueError, match="haar: side 7 is not divisible by 4, .* keep 0.25"):
        far.haar(torch.zeros(1, 1, 7, 7), 0.25)


def test_far_needs_torch_alone():
    names = set()
    for node in ast.walk(ast.parse(far_source())):
        if isinstance(node, ast.Import):
            names.update(alias.name.split(".")[0] for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    assert names <= {"contextlib", "dataclasses", "functools", "math", "torch"}


# ==== Scripts: training
SMALL = "--width 16 --head-width 16 --head-depth 1 --depth 1 --heads 2 --head-steps 2".split()
SMALL += "--log-every 5 --threads 1 --device cpu".split()


def run(out, *flags):
    """A short training of a small model on digits."""
    train_cifar.main([*SMALL, "--out", str(out), *flags])


def load(out, *parts):
    """A checkpoint, or parts of it."""
    state = torch.load(pathlib.Path(out, "ckpt.pt"), weights_only=True)
    if not parts:
        return state
    return [state[part] for part in parts]


def same(a, b, atol=0.0):
    """Do two dicts of tensors agree?"""
    assert a.keys() == b.keys()
    return all(torch.allclose(a[name], b[name], rtol=0, atol=atol) for name in a)


def log_rows(out):
    """The rows of log.csv without the clock: step, loss, x_1, .."""
    rows = []
    for line in pathlib.Path(out, "log.csv").read_text().splitlines():
        step, _, _, *losses = line.split(",")
        rows.append([step, *losses])
    return rows


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The digits run of the README, shortened."""
    out = tmp_path_factory.mktemp("digits")
    flags = "--data digits --steps 200 --log-every 50 --ema 0.98 --depth 2 --width 64 --threads 1"
    train_cifar.main([*flags.split(), "--head-width", "96", "--out", str(out)])
    return out


@pytest.mark.slow
def test_short_digits_run_learns(digits, capsys):
    """Below a loss and above an accuracy that a broken step, label or schedule does not reach."""
    log = np.genfromtxt(digits / "log.csv", delimiter=",", names=True)
    assert log["loss"][-1] < 0.85
    for i in (1, 2, 3):
        assert log[f"x_{i}"][-1] < log[f"x_{i}"][0]
    model, rest = sample.load_checkpoint(digits / "ckpt.pt")
    assert rest["classes"] == list("0123456789")
    images, truth, *_ = train_cifar.load_digits()
    labels = torch.arange(200) % 10
    drawn = torch.cat([x for _, x in sample.draw_images(model, labels, progress=False)])

    pixels = sample.to_uint8(drawn).flatten(1).float()
    distance = torch.cdist(pixels, images.flatten(1).float())
    read = truth[distance.topk(5, largest=False).indices].mode(1).values
    assert (read == labels).float().mean() > 0.8
    spread = drawn.std(0).mean() / (images / 127.5 - 1).std(0).mean()
    assert 0.8 < spread < 1.2
    assert sorted(os.listdir(digits)) == ["ckpt.pt", "levels.png", "log.csv", "samples.png"]
    # 10 x 10 digits of 48 pixels with gaps of 2; three levels of ten.
    assert Image.open(digits / "samples.png").size == (502, 502)
    assert Image.open(digits / "levels.png").size == (3 * 50 + 2, 502)


def test_digits_data_is_the_uci_set():
    """The published facts: 1,797 images, their class counts, the mean grey value 4.884 of 16."""
    images, labels, *_ = train_cifar.load_digits()
    assert images.shape == (1797, 1, 8, 8) and images.dtype == torch.uint8
    assert torch.bincount(labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    grey = images.double() * 16 / 255
    assert (grey - grey.round()).abs().max() < 0.04
    assert grey.round().mean().item() == pytest.approx(4.8842, abs=1e-3)


@pytest.mark.parametrize("extra", [[], ["--paper"]])
def test_resume_is_bit_exact(tmp_path, extra):
    """No setting is the default: a resumed run keeps them all."""
    a, b = tmp_path / "a", tmp_path / "b"
    flags = "--lr 1e-3 --warmup 1 --lr-schedule constant --ema 0.5 --clip 0.1 --weight-decay 0.5"
    flags += " --flip --bf16 --grad-accum 2 --batch 32 --seed 3 --head-steps 1"
    run(a, *flags.split(), *extra, "--steps", "12")
    run(b, *flags.split(), *extra, "--steps", "5")
    resume = ["--steps", "12", "--out", str(b), "--resume", "--log-every", "5", *extra]
    train_cifar.main(resume)
    first, second = load(a), load(b)
    assert first["step"] == second["step"] == 12
    assert same(first["model"], second["model"]) and same(first["ema"], second["ema"])
    assert not same(first["model"], first["ema"])
    for state in (first, second):
        assert state["optimizer"]["param_groups"][0]["lr"] == 1e-3
    assert first["settings"] == second["settings"]
    # Steps 5, 10 and 12; the run that stopped at 5 measured there too.
    assert log_rows(a) == log_rows(b) and len(log_rows(a)) == 4
    assert not [name for name in os.listdir(a) if "part" in name]


def test_ctrl_c_saves_and_resume_goes_on_exactly(tmp_path, monkeypatch):
    """In the middle of step 4: the step is finished and saved, and nothing is lost."""
    run(tmp_path / "a", "--steps", "8")
    forward, steps = FAR.forward, []

    def interrupted(self, *args):
        if torch.is_grad_enabled():
            steps.append(1)
            if len(steps) == 4:
                os.kill(os.getpid(), signal.SIGINT)
        return forward(self, *args)

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(FAR, "forward", interrupted)
    with pytest.raises(SystemExit, match="stopped at step 4, saved"):
        run(tmp_path / "b", "--steps", "8")
    assert signal.getsignal(signal.SIGINT) == before
    assert load(tmp_path / "b")["step"] == 4
    run(tmp_path / "b", "--steps", "8", "--resume")
    assert same(*load(tmp_path / "a", "ema"), *load(tmp_path / "b", "ema"))


def test_overwrite_deletes_once_the_new_run_is_sure_to_start(tmp_path, monkeypatch):
    run(tmp_path, "--steps", "2")
    before = (tmp_path / "log.csv").read_text()
    flags = ["--steps", "2", "--overwrite"]
    with pytest.raises(ValueError, match="haar: side 8"):
        run(tmp_path, *flags, "--ordering", "haar", "--levels", "0.1,1")
    monkeypatch.setattr(train_cifar, "epoch_order", lambda *_: 1 / 0)  # in the first step
    with pytest.raises(ZeroDivisionError):
        run(tmp_path, *flags)
    assert (tmp_path / "ckpt.pt").exists() and (tmp_path / "log.csv").read_text() == before

    monkeypatch.undo()
    monkeypatch.setattr(train_cifar.Run, "read_clock", lambda *_: 1 / 0)  # after it
    with pytest.raises(ZeroDivisionError):
        run(tmp_path, *flags)
    assert not (tmp_path / "ckpt.pt").exists()
    assert len((tmp_path / "log.csv").read_text().splitlines()) == 1


def test_a_second_run_into_the_same_folder_is_refused(tmp_path, monkeypatch):
    """While the first runs, and nothing of it is touched; in another folder it may run."""
    step, tried = train_cifar.Run.step, []

    def second(self):
        monkeypatch.setattr(train_cifar.Run, "step", step)
        for flags in ([], ["--overwrite"]):
            with pytest.raises(ValueError, match="another run writes into .* at this moment"):
                run(tmp_path / "a", "--steps", "1", *flags)
        run(tmp_path / "b", "--steps", "1")
        tried.append(1)
        step(self)

    monkeypatch.setattr(train_cifar.Run, "step", second)
    run(tmp_path / "a", "--steps", "6")
    assert tried and load(tmp_path / "a")["step"] == 6 and len(log_rows(tmp_path / "a")) == 3
    run(tmp_path / "a", "--steps", "7", "--resume")


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    """The sentence names the file and the cause; what was there stays."""
    path = tmp_path / "x.bin"
    sample.write_file(path, lambda file: file.write(b"old"))

    def full(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    def stopped(file):
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(ValueError, match="x.bin cannot be written .*No space left"):
        sample.write_file(path, full)
    with pytest.raises(KeyboardInterrupt):
        sample.write_file(path, stopped)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["x.bin"]

    save = torch.save
    monkeypatch.setattr(torch, "save", lambda *_: full(io.BytesIO()))
    with pytest.raises(ValueError, match="ckpt.pt cannot be written"):
        run(tmp_path / "run", "--steps", "1")
    monkeypatch.setattr(torch, "save", save)
    assert os.listdir(tmp_path / "run") == ["log.csv"]


@pytest.mark.parametrize(
    "schedule, warmup, want",
    [("linear", "1", 1e-3 * (1 - 3 / 4)), ("constant", "1", 1e-3), ("constant", "8", 1e-3 * 4 / 8)],
)
def test_learning_rate_schedule(tmp_path, schedule, warmup, want):
    """Step k of n runs at lr (1 - k/n), counted from 0; constant at lr; after a warm-up."""
    flags = ["--lr", "1e-3", "--lr-schedule", schedule, "--warmup", warmup]
    run(tmp_path, "--steps", "4", *flags)
    for group in load(tmp_path)["optimizer"]["param_groups"]:
        assert group["lr"] == pytest.approx(want)


def test_a_run_by_the_clock(tmp_path, monkeypatch):
    """One second a step: 0.1 minutes are six steps, the last at lr (1 - 5/6).

    A resumed run goes on where the clock stood.
    """

    def timed(*flags):
        clock = types.SimpleNamespace(perf_counter=itertools.count().__next__)
        monkeypatch.setattr(train_cifar, "time", clock)
        run(tmp_path, "--log-every", "100", *flags)
        state = load(tmp_path)
        rate = state["optimizer"]["param_groups"][0]["lr"]
        return state, (state["step"], state["seconds"], rate)

    state, got = timed("--max-minutes", "0.1", "--lr", "6e-3", "--warmup", "1")
    assert got == (6, 6, pytest.approx(1e-3))
    with pytest.raises(ValueError, match="finished, with 6 steps in 0.1 minutes"):
        timed("--resume")
    torch.save({**state, "seconds": 3.0}, tmp_path / "ckpt.pt")  # as if it had been stopped
    assert timed("--resume")[1] == (9, 6, pytest.approx(1e-3))
    assert timed("--resume", "--max-minutes", "0.2")[1] == (15, 12, pytest.approx(6e-3 / 12))


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    """At step 7 the loss of level 2 is infinite: the run names both and keeps what is good."""
    loss, weights = DiffusionHead.loss, []

    def broken(self, target, noise, z, levels, *rest):
        step = torch.is_grad_enabled()
        if step:
            weights.append(self.output.weight.detach().clone())
        losses = loss(self, target, noise, z, levels, *rest)
        if self.training and (len(weights) == 7 if step else len(weights) >= 7):
            losses = losses * torch.where(levels == 1, math.inf, 1.0)
        return losses

    monkeypatch.setattr(DiffusionHead, "loss", broken)
    words = "not finite since step 7, that of x_2: .*ckpt.pt holds the last good state"
    with pytest.raises(ValueError, match=words):
        run(tmp_path, "--save-minutes", "1e-9", "--steps", "20")
    state = load(tmp_path)
    assert state["step"] == 5
    assert all(tensor.isfinite().all() for tensor in state["model"].values())
    # The weights stay as they were, for the look at the levels.
    assert not torch.equal(weights[5], weights[6])
    assert torch.equal(weights[6], weights[7]) and torch.equal(weights[6], weights[9])


def test_ema_is_the_running_average(tmp_path, monkeypatch):
    """Step k weighs the new weights by 9/(10 + k) while that is more than 1 - decay."""
    name, weights = "head.output.weight", []
    for k in range(1, 4):
        run(tmp_path / str(k), "--steps", str(k), "--lr-schedule", "constant")
        model, ema = load(tmp_path / str(k), "model", "ema")
        weights.append(model[name])
    average = torch.zeros_like(weights[0])  # this layer starts at zero
    for k, w in enumerate(weights, 1):
        average = average + 9 / (10 + k) * (w - average)
    assert torch.allclose(ema[name], average, atol=1e-7) and average.abs().max() > 0

    blend, decays = FAR.average, []

    def spy(self, model, decay):
        decays.append(decay)
        blend(self, model, decay)

    monkeypatch.setattr(FAR, "average", spy)
    run(tmp_path / "capped", "--steps", "12", "--ema", "0.5")
    assert decays == [min(0.5, (1 + k) / (10 + k)) for k in range(1, 13)]


def test_weight_decay_spares_biases_norms_and_embeddings():
    model = tiny(cond_tokens=2)
    decayed, spared = train_cifar.make_optimizer(model, 1e-3, 0.02).param_groups
    assert decayed["weight_decay"] == 0.02 and spared["weight_decay"] == 0
    names = {id(p): name for name, p in model.named_parameters()}
    assert len(decayed["params"]) + len(spared["params"]) == len(names)
    other = ("level", "label", "norm", "position")
    for p in decayed["params"]:
        name = names[id(p)]
        assert name.endswith("weight") and not any(word in name for word in other)
    for p in spared["params"]:
        assert p.ndim == 1 or any(word in names[id(p)] for word in other)


def test_flips_mirror_half_of_the_images_left_to_right():
    cpu = torch.device("cpu")
    x = torch.arange(4 * 3 * 64, dtype=torch.uint8).view(4, 3, 8, 8)
    data = train_cifar.Data(x, torch.arange(4), list("abcd"))
    index = torch.arange(4).repeat(100)
    assert torch.equal(train_cifar.make_batch(data, index, cpu, False), x[index])
    batch = train_cifar.make_batch(data, index, cpu, True)
    mirror = torch.from_numpy(x.numpy()[..., ::-1].copy())
    kept = (batch == x[index]).flatten(1).all(1)
    mirrored = (batch == mirror[index]).flatten(1).all(1)
    assert (kept ^ mirrored).all() and 0.4 < mirrored.float().mean() < 0.6
    flips = [train_cifar.parse_args(["--data", data]).flip for data in ("digits", "cifar10")]
    assert flips == [False, True] and train_cifar.parse_args(["--flip"]).flip


def test_epochs_visit_every_image_once(tmp_path, monkeypatch):
    """23 images, batches of 5, mirrored on request: four steps an epoch.

    No image twice in one, another order in the next, the same again for the same seed.
    """
    seen, make_batch = [], train_cifar.make_batch

    def spy(data, index, device, flip):
        if len(index) == 5:
            seen.append((index.tolist(), flip))
        return make_batch(data, index, device, flip)

    data = train_cifar.load_digits()
    few = data._replace(images=data.images[:23], labels=data.labels[:23])
    monkeypatch.setattr(train_cifar, "make_batch", spy)
    monkeypatch.setattr(train_cifar, "load_digits", lambda: few)
    for flag in ("--flip", "--no-flip"):
        run(tmp_path, "--steps", "8", "--batch", "5", "--overwrite", flag)
    steps = [index for index, _ in seen]
    assert len(steps) == 16 and steps[:8] == steps[8:]
    assert [flip for _, flip in seen] == [True] * 8 + [False] * 8
    epochs = [sum(steps[:4], []), sum(steps[4:8], [])]
    for epoch in epochs:
        assert len(set(epoch)) == 20 and set(epoch) <= set(range(23))
    assert epochs[0] != epochs[1]
    train_cifar.epoch_order.cache_clear()
    torch.manual_seed(7)  # the order depends on epoch and seed alone
    assert train_cifar.epoch_order(23, 1, 0)[:20].tolist() == epochs[1]


@pytest.mark.parametrize(
    "flags, steps, minutes",
    [
        ("", None, 2.0),
        ("--steps 7", 7, None),
        ("--max-minutes 3", None, 3.0),
        ("--steps 7 --max-minutes 3", 7, 3.0),
        ("--data cifar10 --max-minutes 3", None, 3.0),
    ],
)
def test_length_of_a_run(flags, steps, minutes):
    args = train_cifar.parse_args(flags.split())
    assert (args.steps, args.max_minutes, args.lr_schedule) == (steps, minutes, "linear")


def test_a_resumed_run_keeps_its_length_and_data(tmp_path, monkeypatch):
    run(tmp_path, "--steps", "6")
    torch.save({**load(tmp_path), "step": 4}, tmp_path / "ckpt.pt")  # as if it had been stopped
    lengths = []
    for flags in ([], ["--steps", "9"], ["--max-minutes", "1"]):
        args = train_cifar.parse_args(["--out", str(tmp_path), "--resume", *flags])
        lengths.append((args.steps, args.max_minutes))
    assert lengths == [(6, None), (9, None), (None, 1.0)]

    other = train_cifar.load_digits()._replace(classes=list("abcdefghij"))
    monkeypatch.setattr(train_cifar, "load_digits", lambda: other)
    with pytest.raises(ValueError, match="classes of the data are not those of the run"):
        run(tmp_path, "--resume")


def test_units_are_those_of_the_whole_set(tmp_path, monkeypatch):
    """Sorted by class, the first half black: what the first images show is not the unit."""
    data = train_cifar.load_digits()
    images = torch.cat([torch.zeros_like(data.images), data.images, data.images])
    large = data._replace(images=images, labels=data.labels.repeat(3))
    monkeypatch.setattr(train_cifar, "load_digits", lambda: large)
    run(tmp_path, "--steps", "1", "--target", "residual")
    x = images / 127.5 - 1
    want = []
    for a, b in ((0, 0.25), (0.25, 0.5), (0.5, 1)):
        want.append((far.dct(x, b) - far.dct(x, a)).std().item())
    for part in load(tmp_path, "model", "ema"):
        assert part["unit"].tolist() == pytest.approx(want, rel=0.03)


def test_levels_of_another_number_need_no_other_setting():
    """Lists of the preset with one number per level give way to the default."""
    flags = ["--preset", "cifar_cascade", "--levels"]
    config = train_cifar.parse_args([*flags, "0.25,0.5,1"]).config
    assert config.time_shift == 1.0 and config.target == "residual"
    with pytest.raises(ValueError, match="time_shift"):
        train_cifar.parse_args([*flags, "0.25,0.5,1", "--time-shift", "1,2"])
    paper = train_cifar.parse_args(["--paper", "--levels", "0.5,1"]).config
    assert paper.head_steps == [40, 100]


def test_levels_that_show_nothing_new_are_named(capsys):
    """Keeps 0.26 and 0.3 of the 8 cosines of an axis are three each."""
    config = FARConfig.preset("digits", levels=(0.1, 0.25, 0.26, 0.3, 1.0))
    train_cifar.warn_of_equal_levels(config)
    words = "levels [0.26] show nothing, or the same as the next one, at 8 x 8 pixels"
    assert words in capsys.readouterr().out
    train_cifar.warn_of_equal_levels(FARConfig.preset("digits"))
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--seed -1", "seed must lie in"),
        ("--max-minutes inf", "below 1e9"),
        ("--steps 0", "above 0"),
        ("--weight-decay -1", "at least 0"),
        ("--ema 1", "lie in"),
        ("--path pictures", "--data folder"),
        ("--vae x", "needs --data folder"),
        ("--text-encoder x", "needs --data captions"),
        ("--data captions --text-encoder x", "--path is missing"),
        ("--data captions --path experiments --text-encoder x", "neither .* nor .* is a file"),
        ("--data folder --path nowhere", "nowhere is no folder"),
        ("--data folder", "--path is missing"),
        ("--data folder --path . --channels 4", "grey"),
        ("--batch 5000", "1797"),
        ("--batch 6 --grad-accum 4", "not divisible"),
        ("--num-classes 5", "10 classes"),
        ("--image-size 16", "images of"),
        ("--cond-dim 4 --cond-tokens 2", "for Python"),
        ("--preset far_t2i --image-size 8 --channels 1", "for texts: --data captions"),
        ("--device warp", "warp is not usable"),
        ("--levels 0.5,0.2", "increase"),
        ("--patch-size 3", "divisible"),
        ("--resume", "not a file"),
        ("--resume --overwrite", "exclude"),
    ],
)
def test_wrong_training_flags(tmp_path, flags, words):
    with pytest.raises(ValueError, match=words):
        train_cifar.main(["--out", str(tmp_path / "run"), *flags.split()])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--steps 1", "--overwrite"),
        ("--steps 200 --resume", "finished"),
        ("--steps 600 --resume --width 32", "width contradicts"),
        ("--steps 600 --resume --seed 2", "--seed 0"),
        ("--steps 600 --resume --batch 32", "--batch 64"),
        ("--steps 600 --resume --preset cifar", "--preset digits"),
        ("--steps 600 --resume --paper", "has no --paper"),
    ],
)
def test_a_run_is_not_overwritten(digits, flags, words):
    with pytest.raises(ValueError, match=words):
        train_cifar.main(["--out", str(digits), *flags.split()])


def test_without_the_modules_that_windows_lacks(tmp_path, monkeypatch, capsys):
    for name in ("resource", "fcntl"):
        monkeypatch.setitem(sys.modules, name, None)
    script = runpy.run_path(os.path.join(ROOT, "train_cifar.py"))
    script["main"]([*SMALL, "--steps", "2", "--out", str(tmp_path)])
    out = capsys.readouterr().out
    assert "M parameters" in out and "peak memory" not in out


# ==== Scripts: sampling
def draw(ckpt, out, *flags):
    return sample.main(["--ckpt", str(ckpt), "--out", str(out), "--device", "cpu", *flags])


def test_sample_writes_pictures_npz_and_pngs(digits, tmp_path):
    arrays = []
    for batch in ("7", "12"):
        flags = ["--labels", "1,4-5", "--n", "12", "--batch", batch, "--npz", f"{tmp_path}/s.npz"]
        draw(digits / "ckpt.pt", tmp_path, *flags, "--png", f"{tmp_path}/png{batch}")
        arrays.append(np.load(tmp_path / "s.npz"))
    x, y = arrays[1]["arr_0"], arrays[1]["arr_1"]
    assert x.shape == (12, 8, 8, 1) and x.dtype == np.uint8
    assert y.dtype == np.int64 and y.tolist() == [1] * 4 + [4] * 4 + [5] * 4
    assert np.abs(x.astype(int) - arrays[0]["arr_0"]).max() <= 1  # whatever the batch size
    assert sorted(os.listdir(tmp_path / "png12")) == [f"{i:06d}.png" for i in range(12)]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "png12/000003.png")), x[3, :, :, 0])
    # The first image of each class; the second image, each pixel enlarged 6 times.
    assert Image.open(tmp_path / "levels.png").size == (3 * 50 + 2, 3 * 50 + 2)
    grid = np.asarray(Image.open(tmp_path / "samples.png"))[2:50, 52:100, 0]
    assert np.array_equal(grid[::6, ::6], x[1, :, :, 0])
    names = ["levels.png", "png12", "png7", "s.npz", "samples.png"]
    assert sorted(os.listdir(tmp_path)) == names
    with pytest.raises(ValueError, match="png7 holds 12 pictures already: choose an empty one"):
        draw(digits / "ckpt.pt", tmp_path, "--n", "3", "--png", f"{tmp_path}/png7")


def test_pictures_are_all_there_or_none(digits, tmp_path, monkeypatch):
    """Stopped in the middle, --png leaves an empty folder, and samples.png is not written."""
    add = sample.Drawing.add

    def stops(self, start, levels):
        add(self, start, levels)
        if start > 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(sample.Drawing, "add", stops)
    with pytest.raises(KeyboardInterrupt):
        flags = ["--n", "6", "--batch", "3", "--png", f"{tmp_path}/png"]
        draw(digits / "ckpt.pt", tmp_path / "out", *flags)
    assert not os.listdir(tmp_path / "png") and not os.listdir(tmp_path / "out")


def test_variations_of_a_picture(digits, tmp_path):
    """What the picture shows at --keep stays, and at 0 nothing does."""
    picture = train_cifar.load_digits().images[3, 0].numpy()
    image = Image.fromarray(picture).resize((24, 24), Image.Resampling.NEAREST)
    image.save(tmp_path / "three.png")
    flags = ["--from", f"{tmp_path}/three.png", "--n", "6", "--labels", "3"]
    low = {}
    for keep in ("0.0", "0.5"):
        npz = ["--keep", keep, "--npz", f"{tmp_path}/x.npz"]
        draw(digits / "ckpt.pt", tmp_path, *flags, *npz)
        x = torch.from_numpy(np.load(tmp_path / "x.npz")["arr_0"]).permute(0, 3, 1, 2)
        low[keep] = far.dct(x / 127.5 - 1, 0.5)
    small = torch.tensor(sample.read_image(tmp_path / "three.png", 8, 1))[None]
    want = far.dct(small / 127.5 - 1, 0.5)
    # Clamped to [-1, 1], so not exactly.
    assert (low["0.5"] - want).abs().mean() < 0.1 < (low["0.0"] - want).abs().mean()
    c = sample.load_checkpoint(digits / "ckpt.pt")[0].config
    for rule in ("paper", "locked"):
        args = sample.make_parser().parse_args([*flags, "--keep", "0.5", "--step-rule", rule])
        assert sample.variation_settings(args, c, None)["step_rule"] == rule
    args.step_rule = None
    settings = sample.variation_settings(args, c, None)
    assert settings["step_rule"] == "locked" and settings["start"][1] == 2
    for wrong, words in (
        (["--keep", "0.3"], "0.25, 0.5"),
        ([], "--from needs --keep"),
        (["--keep", "0.5", "--from", str(digits / "ckpt.pt")], "cannot be read as a picture"),
        (["--keep", "0.5", "--from", ""], "needs --from"),
        (["--keep", "0.5", "--levels", "1"], "must be 0 or one of --levels"),
        (["--keep", "0.5", "--ordering", "raster"], "model's own, dct"),
    ):
        with pytest.raises(ValueError, match=words):
            draw(digits / "ckpt.pt", tmp_path, *flags, *wrong)


def save_model(path, **more):
    """A checkpoint of a small model with random weights."""
    model = tiny(**more)
    torch.save(dict(config=model.config.to_dict(), ema=model.state_dict()), path)
    return model


def test_fewer_levels(tmp_path):
    """Drawn as FAR.sample does, one column of levels.png for each; scored by their own names."""
    model = save_model(tmp_path / "m.pt", attention="markov")
    flags = ["--n", "10", "--levels", "0.25,1", "--npz", f"{tmp_path}/x.npz"]
    real = ["--real", train_cifar.DIGITS]
    scores = draw(tmp_path / "m.pt", tmp_path, *flags, *real)
    drawn = sample.draw_images(model, torch.arange(10), progress=False, levels=[0.25, 1.0])
    want = sample.to_uint8(next(drawn)[1]).permute(0, 2, 3, 1)
    assert np.array_equal(np.load(tmp_path / "x.npz")["arr_0"], want)
    assert Image.open(tmp_path / "levels.png").size == (2 * 50 + 2, 502)
    assert [name for name in scores if "deviation" in name] == ["deviation_1", "deviation_3"]
    with pytest.raises(ValueError, match="levels are .*allowed"):
        draw(tmp_path / "m.pt", tmp_path, "--levels", "0.3,1")


MINE = """
def columns(x, keep):
    return x * (0 * x[:1, :1, :1] + 1).cumsum(3).le(keep * x.shape[-1])

def half(x, keep):
    return keep * x
"""


def test_an_ordering_of_the_user(tmp_path, monkeypatch, capsys):
    """Trained, resumed and sampled with a function in a file; told which laws it breaks."""
    (tmp_path / "mine.py").write_text(MINE)
    name, out = f"{tmp_path}/mine.py:columns", tmp_path / "run"
    monkeypatch.setattr(sample, "ORDERINGS", ORDERINGS)
    for flags in (["--steps", "2"], ["--steps", "4", "--resume"]):
        run(out, "--ordering", name, *flags)
    assert f"{name}:\n  all laws hold" in capsys.readouterr().out
    levels = np.asarray(Image.open(out / "levels.png").convert("L"))[2:50, 2:50]
    assert len(np.unique(levels[:, 12:])) == 1 < len(np.unique(levels[:, :12]))  # x_1: 2 columns
    ORDERINGS.pop(name)
    # What it is not given by name is not run.
    with pytest.raises(ValueError, match="add --ordering .*mine.py:columns"):
        draw(out / "ckpt.pt", out)
    draw(out / "ckpt.pt", out, "--ordering", name, "--n", "4")
    sample.load_ordering(f"{tmp_path}/mine.py:half", 8)
    assert "idempotent: broken at keep 0.5, largest error" in capsys.readouterr().out
    for wrong in (f"{tmp_path}/mine.py:rows", "nowhere.py:rows"):
        with pytest.raises(ValueError, match="must name a file and an ordering"):
            train_cifar.main(["--ordering", wrong])
    ORDERINGS.pop(name)
    ORDERINGS.pop(f"{tmp_path}/mine.py:half")


def brute_force_scores(fake, labels, real, truth, k):
    """`sample.score` by definition, with loops over images [n, D]."""
    A, B = np.cov(fake.T), np.cov(real.T)
    root = scipy.linalg.sqrtm(A @ B).real
    fd = ((fake.mean(0) - real.mean(0)) ** 2).sum() + np.trace(A + B - 2 * root)

    def distances(x, others):
        return np.array([np.linalg.norm(x - other) for other in others])

    def inside(x, others):
        radii = [np.sort(distances(other, others))[k] for other in others]  # [0] is itself
        return bool((distances(x, others) <= radii).any())

    right = []
    for x, label in zip(fake, labels, strict=True):
        nearest = np.argsort(distances(x, real))[:k]
        right.append(np.bincount(truth[nearest], minlength=3).argmax() == label)
    precision = np.mean([inside(x, real) for x in fake])
    recall = np.mean([inside(x, fake) for x in real])
    return dict(fd=fd, precision=precision, recall=recall, class_acc=np.mean(right))


def test_score_by_brute_force():
    g = np.random.default_rng(0)
    real = g.integers(0, 200, (60, 2, 2, 1)).astype(np.uint8)
    fake = g.integers(50, 256, (40, 2, 2, 1)).astype(np.uint8)
    truth, labels = g.integers(0, 3, 60), g.integers(0, 3, 40)
    flat = (fake.reshape(40, 4) / 255, labels, real.reshape(60, 4) / 255, truth)
    want = brute_force_scores(*flat, k=5)
    fake, labels, real, truth = map(torch.from_numpy, (fake, labels, real, truth))
    assert 0.1 < want["recall"] < 0.9
    assert sample.score(fake, labels, real, truth) == pytest.approx(want, abs=1e-6)
    itself = sample.score(real, truth, real, truth)
    assert itself["precision"] == itself["recall"] == 1
    assert itself["fd"] == pytest.approx(0, abs=1e-6)


def test_scores_do_not_depend_on_the_parts(monkeypatch):
    """More images than fit into one part of 1,000."""
    images, labels, *_ = train_cifar.load_digits()
    half = images[::2], labels[::2]
    whole = sample.score(images, labels, *half)
    split = torch.Tensor.split
    monkeypatch.setattr(torch.Tensor, "split", lambda x, n: split(x, n // 10))
    assert sample.score(images, labels, *half) == pytest.approx(whole, abs=1e-6)


def test_real_images_from_a_file_or_a_folder(digits, tmp_path, capsys):
    """Samples compared with themselves; as npz and as folders of classes in another order."""
    ckpt = digits / "ckpt.pt"
    draw(ckpt, tmp_path / "out", "--n", "60", "--npz", f"{tmp_path}/a.npz")
    arrays = np.load(tmp_path / "a.npz")
    for i, (image, label) in enumerate(zip(arrays["arr_0"], arrays["arr_1"], strict=True)):
        folder = tmp_path / "a" / "train" / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[:, :, 0]).save(folder / f"{i}.png")
    (tmp_path / "a/train/.ipynb_checkpoints").mkdir()
    model, _ = sample.load_checkpoint(ckpt)
    drawn = sample.draw_images(
        model, sample.parse_labels(None, 60, 10), progress=False, return_levels=True
    )
    shown = next(drawn)[1][:, 1]  # x_2
    data = torch.from_numpy(arrays["arr_0"]).permute(0, 3, 1, 2) / 127.5 - 1
    deviation = shown.std(0).mean() / far.dct(data, 0.5).std(0).mean()
    for real in ("a.npz", "a"):
        capsys.readouterr()
        scores = draw(ckpt, tmp_path / "out", "--n", "60", "--real", f"{tmp_path}/{real}")
        assert "precision 1.000 recall 1.000 class_acc" in capsys.readouterr().out
        assert scores["fd"] == pytest.approx(0, abs=1e-4)
        assert scores["deviation_2"] == pytest.approx(deviation.item(), rel=1e-4)
        text = (tmp_path / "out" / "scores.json").read_text()
        assert text == sample.json.dumps(scores, indent=1)
        assert scores["class_acc"] > 0.7
    (tmp_path / "a/train/3").rename(tmp_path / "a/train/three")
    with pytest.raises(ValueError, match="classes that the model has not: .'three'."):
        draw(ckpt, tmp_path, "--n", "60", "--real", f"{tmp_path}/a")


def test_export_keeps_the_sampling_settings(digits, tmp_path):
    ckpt, half = digits / "ckpt.pt", tmp_path / "new" / "half.pt"
    chosen = "--guidance 2.5 --guidance-schedule constant".split()
    draw(ckpt, tmp_path, "--export", str(half), *chosen)
    (model, rest), (whole, _) = sample.load_checkpoint(half), sample.load_checkpoint(ckpt)
    want = dataclasses.replace(whole.config, guidance=2.5, guidance_schedule="constant")
    assert model.config == want and rest["classes"] == list("0123456789")
    assert os.path.getsize(half) < 0.2 * os.path.getsize(ckpt)
    rounded = {name: value.half().float() for name, value in whole.state_dict().items()}
    assert same(model.state_dict(), rounded)
    images = {}
    for name, flags in (("default", []), ("same", chosen), ("none", ["--guidance", "1"])):
        draw(half, tmp_path, "--n", "10", "--npz", f"{tmp_path}/g.npz", *flags)
        images[name] = np.load(tmp_path / "g.npz")["arr_0"]
    assert np.array_equal(images["default"], images["same"])
    assert not np.array_equal(images["default"], images["none"])
    draw(half, tmp_path, "--n", "8", "--labels", "none", "--npz", f"{tmp_path}/none.npz")
    assert np.load(tmp_path / "none.npz").files == ["arr_0"]


def test_paper_means_its_sampler_unless_told_otherwise(digits):
    recipe = far.paper_recipe(8, "dct", [0.25, 0.5, 1.0])
    assert recipe["head_steps"] == [40, 70, 100] and recipe["solver"] == "ddpm"
    c = sample.load_checkpoint(digits / "ckpt.pt")[0].config
    args = sample.make_parser().parse_args(["--paper"])
    want = {n: recipe[n] for n in ("solver", "variance", "head_steps", "temperature")}
    assert sample.sampling_settings(args, c) == want
    args = sample.make_parser().parse_args("--paper --solver ddim --temperature 0.5".split())
    assert sample.sampling_settings(args, c) == {**want, "solver": "ddim", "temperature": 0.5}


@pytest.mark.parametrize(
    "text, want",
    [
        ("0-2", [0, 0, 1, 1, 2, 2]),
        ("3", [3] * 6),
        ("2,0", [2, 2, 2, 0, 0, 0]),
        ("cat,dog", [0, 0, 0, 1, 1, 1]),
        ("well-fed,3", [2, 2, 2, 3, 3, 3]),
        (None, [0, 0, 1, 2, 2, 3]),
        ("none", 6),
    ],
)
def test_labels_by_number_and_by_name(text, want):
    labels = sample.parse_labels(text, 6, 4, ["cat", "dog", "well-fed", "x"])
    if torch.is_tensor(labels):
        labels = labels.tolist()
    assert labels == want


def test_labels_of_a_model_without_classes():
    assert sample.parse_labels(None, 6, 0) == sample.parse_labels("none", 6, 0) == 6
    with pytest.raises(ValueError, match="has no classes: leave out --labels"):
        sample.parse_labels("3", 6, 0)


def test_grey_values_are_rounded_and_cut_off():
    shades = torch.arange(256)
    assert torch.equal(sample.to_uint8(shades / 127.5 - 1), shades.byte())
    beyond = torch.tensor([99.6, 100.4, -3.0, 300.0])
    assert sample.to_uint8(beyond / 127.5 - 1).tolist() == [100, 100, 0, 255]


def test_bfloat16_sampling_is_close(digits):
    model, _ = sample.load_checkpoint(digits / "ckpt.pt")
    labels = torch.arange(40) % 10
    a, b = (
        torch.cat([x for _, x in sample.draw_images(model, labels, bf16=bf16, progress=False)])
        for bf16 in (False, True)
    )
    assert a.dtype == b.dtype == torch.float32
    assert not torch.equal(a, b) and (a - b).abs().mean() < 0.05
    # The caller's own modes stay as they were.
    for _, x in sample.draw_images(model, torch.arange(3), bf16=True, progress=False):
        assert not torch.is_autocast_enabled("cpu") and not torch.is_inference_mode_enabled()
        assert not x.is_inference()


def test_load_checkpoint_gives_ema_weights(digits):
    model, rest = sample.load_checkpoint(digits / "ckpt.pt")
    state = load(digits)
    assert same(model.state_dict(), state["ema"]) and not same(state["ema"], state["model"])
    assert rest["step"] == 200 and not model.training


class Evil:
    """What a pickle can do."""

    def __reduce__(self):
        return os.system, ("touch evil",)


def test_bad_checkpoints(digits, tmp_path, monkeypatch):
    """One sentence for each; of weights that do not fit it names which."""
    monkeypatch.chdir(tmp_path)
    whole = (digits / "ckpt.pt").read_bytes()
    state = load(digits, "config", "ema")
    config, ema = state
    pathlib.Path("cut.pt").write_bytes(whole[: len(whole) // 2])
    pathlib.Path("text.pt").write_text("hello")
    pathlib.Path("evil.pt").write_bytes(pickle.dumps(Evil(), protocol=2))
    nan = {name: value + math.nan for name, value in ema.items()}
    renamed = {name.replace("head.z", "head.q"): value for name, value in ema.items()}
    for name, content in (
        ("foreign", {"weights": torch.zeros(3)}),
        ("list", [1, 2]),
        ("number", dict(config=5, ema={})),
        ("setting", dict(config={**config, "colour": 3}, ema=ema)),
        ("wider", dict(config={**config, "head_width": 128}, ema=ema)),
        ("renamed", dict(config=config, ema=renamed)),
        ("diverged", dict(config=config, ema=nan)),
    ):
        torch.save(content, f"{name}.pt")
    for name, words in (
        ("missing", "not a file"),
        ("cut", "cut off"),
        ("text", "cannot be read"),
        ("evil", "cannot be read"),
        ("foreign", "holds no FAR model: .* with weights"),
        ("list", "holds no FAR model: .* of type list"),
        ("number", "no FAR model"),
        ("setting", "does not fit .*colour"),
        ("wider", r"head.input.weight has shape \[96, 16\], not \[128, 16\]"),
        ("renamed", "head.z.weight is missing.*head.q.weight is not known"),
        ("diverged", "not finite"),
    ):
        with pytest.raises(ValueError, match=words):
            sample.load_checkpoint(f"{name}.pt")
    assert not os.path.exists("evil")


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--seed -1", "at least 0"),
        ("--n 0", "at least 1"),
        ("--npz .", "is a folder"),
        ("--export there/x.pt/..", "is a folder"),
        ("--out float.npz/x", "float.npz/x is no folder to write to"),
        ("--npz float.npz --real float.npz", "is read here"),
        ("--real nowhere", "an npz file"),
        ("--real cut.npz", "an npz file"),
        ("--real float.npz", "shapes"),
        ("--real names.npz", "shapes"),
        ("--real wrong.npz", "more than 5, uint8 .8, 8, 1."),
        ("--labels 0-10", "10 classes"),
        ("--labels cat", "not understood"),
        ("--labels 1-3-5", "not understood"),
        ("--labels 5-3", "out of range"),
        ("--labels none --real wrong.npz", "needs labels"),
        ("--prompt two", "--prompt is for models of texts"),
        ("--head-steps 0", ">= 1"),
        ("--head-steps 1,2", "head_steps"),
    ],
)
def test_wrong_sample_flags(digits, flags, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("float.npz", np.zeros((9, 8, 8, 1), np.float32), np.arange(9))
    np.savez("names.npz", np.array(["a", "b"]))
    np.savez("wrong.npz", np.zeros((9, 8, 8, 3), np.uint8), np.arange(9))
    data = bytearray(pathlib.Path(train_cifar.DIGITS).read_bytes())
    data[2000] ^= 1
    pathlib.Path("cut.npz").write_bytes(data)
    with pytest.raises(ValueError, match=words):
        sample.main(["--ckpt", str(digits / "ckpt.pt"), *flags.split()])


# ==== Scripts: pictures and data sets
SHADES = np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16)
GREY = np.uint8(SHADES // 256)


def picture(kind):
    """(image, what read_image makes of it at 16 x 16 in grey, the tolerance)."""
    if kind == "16 bits":
        return Image.fromarray(SHADES), GREY, 0
    if kind == "32 bits":
        return Image.fromarray(SHADES.astype(np.int32) * 2**15), GREY, 0
    if kind == "float to 1":
        return Image.fromarray(np.float32(GREY / 255)), GREY, 1
    if kind == "float to 255":
        return Image.fromarray(np.float32(GREY)), GREY, 1
    if kind == "palette":
        return Image.fromarray(GREY).convert("P"), GREY, 0
    if kind == "bits":
        return Image.fromarray(GREY > 127), np.uint8(255 * (GREY > 127)), 0
    pixels = np.zeros((16, 16, 4), np.uint8)  # black, also where nothing is seen
    pixels[4:12, 4:12, 3] = 255
    want = 255 - pixels[..., 3]
    if kind == "half alpha":
        pixels[..., 3] //= 2
        want = 255 - pixels[..., 3]
    if kind == "grey alpha":
        return Image.fromarray(np.ascontiguousarray(pixels[..., 2:])), want, 0
    return Image.fromarray(pixels), want, 1


KINDS = ("16 bits", "32 bits", "float to 1", "float to 255", "palette", "bits")
KINDS += ("alpha", "half alpha", "grey alpha")


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_of_every_mode(tmp_path, kind):
    """Deep ones keep their shades; what is transparent is white, whatever colour hides there."""
    image, want, tolerance = picture(kind)
    path = tmp_path / ("x.tif" if "float" in kind or "32" in kind else "x.png")
    image.save(path)
    grey = sample.read_image(path, 16, 1)[0]
    assert np.abs(grey.astype(int) - want).max() <= tolerance
    colour = sample.read_image(path, 16)
    assert colour.shape == (3, 16, 16) and np.abs(colour[0].astype(int) - want).max() <= tolerance


def test_turned_and_fine_pictures(tmp_path):
    """A photograph stands as its EXIF orientation says; a fine chessboard is grey from afar."""
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    Image.fromarray(GREY).save(tmp_path / "turned.png", exif=exif)
    turned = sample.read_image(tmp_path / "turned.png", 16, 1)[0]
    assert np.array_equal(turned, np.rot90(GREY, -1))
    board = np.uint8(np.indices((64, 64)).sum(0) % 2 * 255)
    Image.fromarray(board).save(tmp_path / "board.png")
    small = sample.read_image(tmp_path / "board.png", 8, 1).astype(int)
    assert np.abs(small - 127).max() < 20


@pytest.mark.parametrize("kind", ["png", "tiff", "ppm", "bmp", "gif", "jpeg"])
def test_damaged_pictures_are_none_whatever_they_raise(tmp_path, kind):
    """Cut off in the header; cut off in the middle (JPEG decodes what is there)."""
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    path = tmp_path / f"x.{kind}"
    Image.fromarray(noise).save(path)
    whole = path.read_bytes()
    assert sample.read_image(path, 16).shape == (3, 16, 16)
    for cut in (10, 20, len(whole) // 2):
        path.write_bytes(whole[:cut])
        assert sample.read_image(path, 16) is None
    Image.fromarray(np.full((8, 8), math.nan, np.float32)).save(tmp_path / "nan.tiff")
    assert sample.read_image(tmp_path / "nan.tiff", 8) is None


def folder_config(size, channels=3):
    return FARConfig(image_size=size, channels=channels, patch_size=1)


def save_picture(path, colour=(0, 0, 0), size=(8, 8)):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def test_folder_of_images(tmp_path, monkeypatch):
    """Wide, tall, grey and small images become centred squares of the size asked for."""
    monkeypatch.chdir(tmp_path)
    for name, size, mode in (
        ("b/wide.png", (40, 20), "RGB"),
        ("b/deeper/tall.jpg", (20, 40), "RGB"),
        ("a/grey.PNG", (16, 16), "L"),
        ("a/small.png", (8, 8), "RGB"),
    ):
        path = pathlib.Path("train", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.new(mode, size, 0)
        colour = 200 if mode == "L" else (200, 100, 50)
        quarter = size[0] // 4, size[1] // 4
        image.paste(colour, (*quarter, 3 * quarter[0], 3 * quarter[1]))
        image.save(path)
    pathlib.Path("train/b/notes.txt").write_text("no picture")
    data = train_cifar.load_folder(".", folder_config(16))
    assert data.images.shape == (4, 3, 16, 16) and data.images.dtype == torch.uint8
    assert data.classes == ["a", "b"] and data.labels.tolist() == [0, 0, 1, 1]
    grey, _, _, wide = data.images
    assert grey[:, 8, 8].tolist() == [200] * 3 and wide[:, 8, 8].tolist() == [200, 100, 50]
    assert wide[0, 8, 0] > 150 and wide[0, 0, 8] < 20  # the crop cuts the sides, not the height
    assert train_cifar.load_folder(".", folder_config(8, 1)).images.shape == (4, 1, 8, 8)


def test_classes_are_shown_kept_and_used_by_name(tmp_path, monkeypatch, capsys):
    """In the order of their numbers; hidden folders are left out, and it says so."""
    monkeypatch.chdir(tmp_path)
    for k in range(12):
        for n in range(2):
            save_picture(f"set/train/kind {k}/{n}.png", (20 * k, 100 * n, 0))
    save_picture("set/train/.ipynb_checkpoints/x.png")
    save_picture("set/train/kind 3/.cache/x.png")
    flags = "--data folder --path set --image-size 8 --batch 4 --steps 1".split()
    run("run", *flags)
    out = capsys.readouterr().out
    assert "12 classes, 24 images: 0 kind 0, 1 kind 1, 2 kind 2" in out and "11 kind 11" in out
    for hidden in ("set/train/.ipynb_checkpoints", "set/train/kind 3/.cache"):
        assert f"left out the hidden folder {hidden}\n" in out
    model, rest = sample.load_checkpoint("run/ckpt.pt")
    assert model.config.num_classes == 12
    assert rest["classes"] == [f"kind {k}" for k in range(12)]
    flags = ["--n", "4", "--npz", "x.npz", "--labels", "kind 10,2"]
    draw("run/ckpt.pt", "drawn", *flags)
    assert np.load("x.npz")["arr_1"].tolist() == [10, 10, 2, 2]
    many = train_cifar.Data(torch.zeros(1200, 1), None, [str(k) for k in range(40)])
    assert train_cifar.describe(many).startswith("40 classes, 1,200 images: 0 0, 1 1, ")
    assert train_cifar.describe(many).endswith("9 9, ..")


@pytest.mark.parametrize(
    "files, words",
    [
        (["train/a/0.png", "train/a/1.png"], "all pixels of all images have one value"),
        (["train/0.png"], "holds no folders, one for each class"),
        (["train/a/0.png", "train/b/notes.txt"], "train/b holds no pictures"),
        (["a/0.png"], "train is not a folder"),
    ],
)
def test_folders_that_cannot_be_trained_on(tmp_path, monkeypatch, files, words):
    monkeypatch.chdir(tmp_path)
    for file in files:
        save_picture(f"set/{file}.png")
        os.rename(f"set/{file}.png", f"set/{file}")
    flags = "--data folder --path set --image-size 8 --batch 1 --steps 1".split()
    with pytest.raises(ValueError, match=words):
        run("run", *flags)
    assert not os.path.exists("run")


def test_too_little_room_is_said_before_images_are_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_picture("set/train/a/0.png")
    room = types.SimpleNamespace(free=100)
    monkeypatch.setattr(train_cifar.shutil, "disk_usage", lambda path: room)
    monkeypatch.setattr(train_cifar, "read_image", lambda *_, **__: 1 / 0)
    with pytest.raises(ValueError, match="images.npy needs .* more than is free"):
        train_cifar.load_folder("set", folder_config(8))


class Reads:
    """Reads pictures as sample.read_image does, and keeps their paths; `stop_at` one of them."""

    def __init__(self, monkeypatch, stop_at=None):
        self.paths, self.stop_at = [], stop_at
        self.read = sample.read_image
        monkeypatch.setattr(train_cifar, "read_image", self)

    def __call__(self, path, *size, **settings):
        if self.stop_at and path.endswith(self.stop_at):
            self.stop_at = None
            raise KeyboardInterrupt
        self.paths.append(path)
        return self.read(path, *size, **settings)


@pytest.fixture
def reds(tmp_path, monkeypatch):
    """Six pictures with 0, 10, .. 50 of red; load(size, ..) -> (their reds, how many were read)."""
    monkeypatch.chdir(tmp_path)
    for k in range(6):
        save_picture(f"set[1].v2/train/a/{k}.png", (10 * k, 0, 0))
    reads = Reads(monkeypatch)

    def load_reds(size=8, **settings):
        reads.paths.clear()
        data = train_cifar.load_folder("set[1].v2", folder_config(size), **settings)
        assert len(data.images) == len(data.labels)
        return data.images[:, 0, 0, 0].tolist(), len(reads.paths)

    return load_reds


def test_two_runs_may_decode_a_folder_at_once(reds, monkeypatch):
    rename = pathlib.Path.rename

    def rename_too_late(new, folder):
        shutil.copytree(new, folder)  # the other run
        return rename(new, folder)

    monkeypatch.setattr(pathlib.Path, "rename", rename_too_late)
    assert reds() == ([0, 10, 20, 30, 40, 50], 6)

    def refuse(new, folder):
        raise OSError("no space")

    monkeypatch.setattr(pathlib.Path, "rename", refuse)
    with pytest.raises(OSError, match="no space"):
        reds(4)


def test_a_folder_is_decoded_once_and_again_when_it_changes(reds):
    all_six = [0, 10, 20, 30, 40, 50]
    assert reds() == (all_six, 6) and reds() == (all_six, 0)
    assert reds(4)[1] == 6 and reds()[1] == 0 and reds(4)[1] == 0  # each size has its own
    save_picture("set[1].v2/train/a/3.png", (200, 0, 0))
    assert reds() == ([0, 10, 20, 200, 40, 50], 6)
    os.remove("set[1].v2/train/a/0.png")
    assert reds() == ([10, 20, 200, 40, 50], 5)
    pathlib.Path("set[1].v2/train/a/1.png").write_text("no image")
    with pytest.raises(ValueError, match="1 images cannot be read, first .*1.png.*--skip-bad"):
        reds()
    rest = [20, 200, 40, 50]
    assert reds(skip_bad=True) == (rest, 5) and reds(skip_bad=True) == (rest, 0)
    with pytest.raises(ValueError, match="1.png"):  # leaving out is not remembered
        reds()


def test_a_map_that_is_not_finished_is_not_used(reds, monkeypatch):
    """Stopped in the middle; and a second first run while the first still reads."""
    Reads(monkeypatch, stop_at="4.png")
    with pytest.raises(KeyboardInterrupt):
        reds(2)
    reads = Reads(monkeypatch)
    assert reds(2)[0] == [0, 10, 20, 30, 40, 50] and len(reads.paths) == 6

    def beside(path, **settings):
        if path.endswith("2.png"):
            monkeypatch.setattr(train_cifar, "read_image", sample.read_image)
            assert reds(1)[0] == [0, 10, 20, 30, 40, 50]
        return sample.read_image(path, **settings)

    monkeypatch.setattr(train_cifar, "read_image", beside)
    assert reds(1)[0] == [0, 10, 20, 30, 40, 50]
    assert len(os.listdir("data")) == 2  # one folder a size: nothing unfinished is left


def write_imagenet64(evil=None):
    """Ten small batches in the official layout; the fourth may be another thing."""
    for k in range(1, 11):
        data = np.full((2, 3, 64, 64), k, np.uint8)
        data[:, 2, 5, 7] = 100 + k  # blue, row 5, column 7
        labels = [k, 1001 - k]
        batch = {"data": data.reshape(2, -1), "labels": labels, "mean": np.zeros(12288)}
        if evil is not None and k == 4:
            batch = evil
        content = pickle.dumps(batch, protocol=2)
        pathlib.Path(f"train_data_batch_{k}").write_bytes(content)


def test_imagenet64_batches(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_imagenet64()
    for _ in range(2):  # built, then used again
        images, labels, classes, *_ = train_cifar.load_imagenet64(".")
        assert images.shape == (20, 3, 64, 64) and len(classes) == 1000
        assert images[6, :, 5, 7].tolist() == [4, 4, 104] and images[6, 2, 7, 5] == 4
        assert labels.tolist() == [v for k in range(10) for v in (k, 999 - k)]
    # The official files were written by a numpy whose modules had other names.
    names = [f"cnumpy.{core}.multiarray\n".encode() for core in ("_core", "core")]
    for before, after in (names, names[::-1]):
        for k in range(1, 11):
            file = pathlib.Path(f"train_data_batch_{k}")
            file.write_bytes(file.read_bytes().replace(before, after))
        assert after in file.read_bytes()
        assert train_cifar.load_imagenet64(".").images[6, 0, 0, 0] == 4
    os.remove("train_data_batch_7")
    with pytest.raises(ValueError, match="must hold train_data_batch_1"):
        train_cifar.load_imagenet64(".")


@pytest.mark.parametrize(
    "batch",
    [
        Evil(),
        {"data": np.zeros((2, 5), np.uint8), "labels": [1, 2]},
        {"data": np.zeros((1, 12288), np.uint8), "labels": [0]},
        {"labels": Evil()},
        [1],
    ],
)
def test_imagenet64_batches_that_are_something_else(tmp_path, monkeypatch, batch):
    monkeypatch.chdir(tmp_path)
    write_imagenet64(batch)
    with pytest.raises(ValueError, match="train_data_batch_4 is no batch"):
        train_cifar.load_imagenet64(".")
    assert not os.path.exists("evil")


def test_imagenet64_may_be_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_picture("train/cat/1.png", (1, 2, 3), (70, 80))
    args = train_cifar.parse_args(["--data", "imagenet64", "--path", "."])
    data = train_cifar.load_data(args, args.config)
    assert data.classes == ["cat"] and data.images.shape == (1, 3, 64, 64)


def test_cifar10_through_torchvision(tmp_path, monkeypatch):
    """Small files in the official layout; one sentence when nothing can be downloaded."""
    base = tmp_path / "cifar-10-batches-py"
    base.mkdir()
    for k in range(5):
        batch = {"data": np.full((2, 3072), 10 * k, np.uint8), "labels": [k, 9 - k]}
        (base / f"data_batch_{k + 1}").write_bytes(pickle.dumps(batch))
    names = {"label_names": [f"class {k}" for k in range(10)]}
    (base / "batches.meta").write_bytes(pickle.dumps(names))
    cifar = train_cifar.torchvision.datasets.CIFAR10
    monkeypatch.setattr(cifar, "_check_integrity", lambda self: True)
    monkeypatch.setitem(cifar.meta, "md5", None)
    images, labels, classes, *_ = train_cifar.load_cifar10(str(tmp_path))
    assert images.shape == (10, 3, 32, 32) and images[4].unique().item() == 20
    assert labels.tolist() == [0, 9, 1, 8, 2, 7, 3, 6, 4, 5]
    assert classes == names["label_names"]

    def offline(self):
        raise OSError("no network")

    monkeypatch.setattr(cifar, "download", offline)
    with pytest.raises(ValueError, match="--data folder"):
        train_cifar.load_cifar10(str(tmp_path))


# ==== Scripts: latents of a VAE
@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """A tiny AutoencoderKL with random weights: 16 pixels to 4 x 4 latents of 3 channels."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=3,
        norm_num_groups=4,
        sample_size=16,
    )
    path = str(tmp_path_factory.mktemp("vae"))
    model.save_pretrained(path)
    return path


PLACES = [f"set/train/{'ab'[k % 2]}/{k}.png" for k in (0, 2, 4, 6, 8, 1, 3, 5, 7, 9)]


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """Ten random 16-pixel pictures of two classes, PLACES."""
    monkeypatch.chdir(tmp_path)
    for k, path in enumerate(PLACES):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        noise = np.random.default_rng(k).integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(noise).save(path)


def latents(vae, size=4, **settings):
    cpu = torch.device("cpu")
    return train_cifar.load_latents("set", vae, folder_config(size), cpu, **settings)


def picture_tensor(path):
    return torch.from_numpy(sample.read_image(path, 16).copy())[None] / 127.5 - 1


def test_latents_are_the_moments_of_images_and_mirror_images(vae, pictures):
    data = latents(vae)
    assert data.images.shape == (10, 2, 6, 4, 4) and data.images.dtype == torch.float16
    assert data.labels.tolist() == [0] * 5 + [1] * 5 and data.classes == ["a", "b"]
    model = sample.load_vae(vae)
    image = picture_tensor(PLACES[6])
    both = torch.cat([image, image.flip(3)])
    want = model.encode(both).latent_dist.parameters
    assert torch.allclose(data.images[6].float(), want, atol=5e-3)
    # The scale gives draws variance 1.
    x = torch.cat([picture_tensor(path) for path in PLACES * 50])
    drawn = model.encode(x).latent_dist.sample()
    assert data.latents["vae"] == vae
    assert data.latents["scale"] * drawn.std().item() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("flip", [False, True])
def test_latent_batches_are_drawn_from_the_posterior(vae, pictures, flip):
    """Many draws of one image against its moments, or the equal mix with its mirror image."""
    data = latents(vae)
    torch.manual_seed(0)
    index = torch.zeros(20000, dtype=torch.int64)
    x = train_cifar.make_batch(data, index, torch.device("cpu"), flip) / data.latents["scale"]
    mean, log_variance = data.images[0].float().chunk(2, 1)  # [2, 3, 4, 4] each
    if not flip:
        mean, log_variance = mean[:1], log_variance[:1]
    second = (log_variance.exp() + mean**2).mean(0)
    assert torch.allclose(x.mean(0), mean.mean(0), atol=0.05)
    assert torch.allclose(x.square().mean(0), second, rtol=0.08)


def test_a_restart_encodes_what_is_missing(vae, pictures, monkeypatch):
    """Other images, another size or another VAE start anew."""
    whole = latents(vae).images.float()
    reads = Reads(monkeypatch)
    assert torch.equal(latents(vae).images.float(), whole) and not reads.paths
    Image.new("RGB", (16, 16)).save(PLACES[0])
    monkeypatch.setattr(train_cifar.encode_missing, "__defaults__", (4,))  # batches of 4
    Reads(monkeypatch, stop_at=PLACES[5])
    with pytest.raises(KeyboardInterrupt):
        latents(vae)
    reads = Reads(monkeypatch)
    data = latents(vae)
    assert sorted(reads.paths) == sorted(PLACES[4:])
    assert torch.allclose(data.images[1:].float(), whole[1:], atol=1e-2)
    for changed in (dict(size=8), dict(vae=os.path.relpath(vae))):
        reads.paths.clear()
        latents(**dict(dict(vae=vae), **changed))
        assert len(reads.paths) == 10


def test_processes_share_out_the_images(vae, pictures, monkeypatch):
    """The first of two encodes every other one; the second, started later, the rest."""
    whole = latents(vae).images.float()
    os.utime(PLACES[0], (0, 0))  # encoded again
    reads = Reads(monkeypatch)
    monkeypatch.setattr(train_cifar, "processes", lambda: (0, 2))
    with pytest.raises(ValueError, match="5 images cannot be read"):  # alone, without waiting
        latents(vae)
    assert sorted(reads.paths) == sorted(PLACES[::2])
    reads.paths.clear()
    monkeypatch.setattr(train_cifar, "processes", lambda: (1, 2))
    data = latents(vae)
    assert sorted(reads.paths) == sorted(PLACES[1::2])
    assert torch.allclose(data.images.float(), whole, atol=1e-2)


def test_latents_of_images_that_cannot_be_read(vae, pictures, monkeypatch):
    """Named when all others are encoded; with skip_bad left out, and tried again each time."""
    whole = latents(vae).images.clone()
    for n in (1, 6):
        pathlib.Path(PLACES[n]).write_text("no image")
    words = "2 images cannot be read, first .*2.png.*3.png.*--skip-bad"
    with pytest.raises(ValueError, match=words):
        latents(vae)
    reads = Reads(monkeypatch)
    data = latents(vae, skip_bad=True)
    assert sorted(reads.paths) == sorted([PLACES[1], PLACES[6]])
    # The last take the places of those that are missing: a8 -> 9, a6 -> 8.
    order = [0, 8, 2, 3, 4, 5, 9, 7]
    assert torch.allclose(data.images.float(), whole[order].float(), atol=1e-2)
    assert data.labels.tolist() == [order_label // 5 for order_label in order]
    with pytest.raises(ValueError, match="2 images cannot be read"):
        latents(vae)
    for path in PLACES:
        pathlib.Path(path).write_text("no image")
    with pytest.raises(ValueError, match="10 images cannot be read, .*repair or remove them$"):
        latents(vae, skip_bad=True)
    room = types.SimpleNamespace(free=100)
    monkeypatch.setattr(train_cifar.shutil, "disk_usage", lambda path: room)
    with pytest.raises(ValueError, match="moments.npy needs .*more than is free"):
        latents(vae, 8)


def test_training_on_latents_and_decoding(vae, pictures):
    flags = "--data folder --path set --preset cifar --image-size 4 --channels 3 --patch-size 2"
    flags = [*flags.split(), "--vae", vae, "--batch", "4"]
    run("run", *flags, "--steps", "2")
    model, rest = sample.load_checkpoint("run/ckpt.pt")
    assert rest["latents"] == latents(vae).latents and rest["classes"] == ["a", "b"]
    run("run", "--resume", "--steps", "3")  # its data and VAE are known
    model, rest = sample.load_checkpoint("run/ckpt.pt")
    assert rest["step"] == 3

    draw("run/ckpt.pt", "drawn", "--n", "5", "--labels", "b", "--npz", "x.npz")
    x = np.load("x.npz")["arr_0"]
    drawn = sample.draw_images(model, torch.ones(5, dtype=torch.int64), progress=False)
    z = torch.cat([z for _, z in drawn])
    want = sample.load_vae(vae).decode(z / rest["latents"]["scale"]).sample
    want = sample.to_uint8(want).permute(0, 2, 3, 1).numpy()
    assert x.shape == (5, 16, 16, 3) and np.abs(x.astype(int) - want).max() <= 1
    draw("run/ckpt.pt", "drawn", "--export", "half.pt")
    assert sample.load_checkpoint("half.pt")[1]["latents"] == rest["latents"]
    with pytest.raises(ValueError, match=r"images of \[3, 4, 4\], the model takes \[5, 4, 4\]"):
        run("other", *flags, "--channels", "5", "--steps", "1")
    with pytest.raises(ValueError, match="AutoencoderKL"):
        sample.load_vae("set")


# ==== Scripts: captions
WORDS = "a red green blue dot on the left right of some dark night".split()


def save_encoder(folder, kind):
    """A tiny text encoder of transformers with random weights, width 12: words, <s> and </s>."""
    import tokenizers
    import transformers

    words = ["[PAD]", "[UNK]", "<s>", "</s>", *WORDS]
    numbers = {word: n for n, word in enumerate(words)}
    model = tokenizers.models.WordLevel(numbers, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3)]
    )
    tokens = dict(unk_token="[UNK]", eos_token="</s>", model_max_length=20)
    if kind != "Llama":
        tokens["pad_token"] = "[PAD]"
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    own = dict(vocab_size=len(words), hidden_size=12, intermediate_size=8)
    own.update(num_hidden_layers=1, num_attention_heads=2)
    if kind == "CLIP":
        vision = dict(own, image_size=8, patch_size=8)
        own = dict(text_config=dict(own, eos_token_id=3), vision_config=vision)
    if kind == "T5":
        own = dict(vocab_size=len(words), d_model=12, d_kv=6, d_ff=8, num_layers=1, num_heads=2)
    config = getattr(transformers, f"{kind}Config")(**own)
    getattr(transformers, f"{kind}Model")(config).save_pretrained(folder)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """The folder of a tiny BERT."""
    folder = str(tmp_path_factory.mktemp("bert"))
    save_encoder(folder, "Bert")
    return folder


@pytest.mark.parametrize("kind", ["Bert", "T5", "CLIP", "Llama"])
def test_embeddings_are_the_last_hidden_states_of_each_text_alone(tmp_path, kind):
    """Whatever stands beside it in the batch; zeros behind its last token."""
    import transformers

    save_encoder(tmp_path, kind)
    encoder = sample.TextEncoder(str(tmp_path))
    model = getattr(transformers, f"{kind}Model").from_pretrained(tmp_path).eval()
    if kind == "T5":
        model = model.get_encoder()
    if kind == "CLIP":
        model = model.text_model
    texts = ["a red dot", "green", "a blue dot on the left of the night some dark"]
    assert encoder.lengths(texts) == [5, 3, 13]
    got = encoder(texts, 8)
    assert got.shape == (3, 8, 12) and got.dtype == torch.float32
    for text, row in zip(texts, got, strict=True):
        # What is too long loses words, and not the mark at its end.
        tokens = [2, *(4 + WORDS.index(word) for word in text.split()[:6]), 3]
        want = model(input_ids=torch.tensor([tokens])).last_hidden_state[0]
        assert torch.allclose(row[: len(tokens)], want, atol=1e-5)
        assert (row[len(tokens) :] == 0).all() and want.abs().sum(1).min() > 0


CAPTIONS = [
    ["a red dot"],
    ["green", "a green dot", "a dot on the left"],
    ["a red dot", "night"],
    ["a blue dot on the left of the dark"],
]


def write_captions(folder="set", texts=CAPTIONS, **changes):
    """Pictures of 0, 10, 20, .. of red and their metadata.jsonl."""
    lines = []
    for k, text in enumerate(texts):
        save_picture(f"{folder}/more/{k}.png", (10 * k, 0, 0))
        if len(text) == 1:
            text = text[0]
        lines.append(json.dumps(dict(file_name=f"more/{k}.png", text=text)))
    for n, line in changes.items():
        lines[int(n.removeprefix("line"))] = line
    pathlib.Path(folder, "metadata.jsonl").write_text("\n".join(lines) + "\n\n")


def captions_args(encoder, *flags):
    flags = ["--data", "captions", "--path", "set", "--text-encoder", encoder, *flags]
    flags += ["--image-size", "8", "--batch", "2", "--steps", "4"]
    args = train_cifar.parse_args([*SMALL, *flags])
    args.device = torch.device("cpu")
    return args


def load_captions(encoder, *flags):
    args = captions_args(encoder, *flags)
    return train_cifar.load_data(args, args.config)


@pytest.fixture
def captions(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_captions()


@pytest.mark.parametrize("folder", ["set", "set/train"])
def test_each_image_has_the_embeddings_of_its_captions(encoder, tmp_path, monkeypatch, folder):
    """Equal captions are encoded once; a step draws each caption of an image equally often."""
    monkeypatch.chdir(tmp_path)
    write_captions(folder)
    data = load_captions(encoder)
    assert data.images[:, 0, 0, 0].tolist() == [0, 10, 20, 30]
    assert data.embeddings.shape == (6, 16, 12) and data.embeddings.dtype == torch.float16
    assert data.text["captions"] == list(dict.fromkeys(itertools.chain(*CAPTIONS)))
    used = data.embeddings.float()[data.embeddings.any(2)]
    assert len(used) == sum(2 + len(text.split()) for text in data.text["captions"])
    assert data.text["scale"] * used.std().item() == pytest.approx(1, abs=5e-3)

    torch.manual_seed(0)
    drawn = train_cifar.pick_embeddings(data, torch.arange(4).repeat(3000), "cpu")
    own = sample.TextEncoder(encoder)
    for k, texts in enumerate(CAPTIONS):
        want = data.text["scale"] * own(texts, 16)  # [captions of the image, 16, 12]
        distance = (drawn[k::4, None] - want).abs().amax((2, 3))
        assert distance.amin(1).max() < 5e-3
        shares = torch.bincount(distance.argmin(1)) / 3000
        assert (shares - 1 / len(texts)).abs().max() < 0.04


def test_captions_are_encoded_once_and_images_stay(encoder, captions, monkeypatch):
    """A restart does what is missing; other captions, tokens or weights start anew."""
    encode = sample.TextEncoder.__call__
    encoded = []

    def note(self, texts, K):
        if stop in texts:
            raise KeyboardInterrupt
        encoded.extend(texts)
        return encode(self, texts, K)

    def encoded_by(*flags):
        encoded.clear()
        data = load_captions(encoder, *flags)
        assert encoded.pop(0) == "a"  # the width is that of the first caption
        return encoded, data

    monkeypatch.setattr(sample.TextEncoder, "__call__", note)
    monkeypatch.setattr(train_cifar.encode_missing_captions, "__defaults__", (2,))  # a batch
    stop = None
    load_captions(encoder)
    reads = Reads(monkeypatch)
    write_captions(texts=[["a", "dark"], ["the", "night"], ["blue", "dark night"], ["dot"]])
    for k in range(4):
        os.utime(f"set/more/{k}.png", (0, 0))
    stop = "dark night"
    with pytest.raises(KeyboardInterrupt):
        load_captions(encoder)
    stop = None
    found, data = encoded_by()
    assert found == ["blue", "dark night", "dot"]
    want = encode(sample.TextEncoder(encoder), ["dark", "blue"], 8)
    assert torch.allclose(data.embeddings[[1, 4]].float(), want, atol=2e-3)
    assert data.labels.tolist() == [[0, 1], [2, 3], [4, 5], [6, -1]]

    reads.paths.clear()
    assert encoded_by()[0] == []
    assert len(encoded_by("--cond-tokens", "6")[0]) == 7
    os.utime(pathlib.Path(encoder, "model.safetensors"), (0, 0))
    assert len(encoded_by()[0]) == 7
    metadata = pathlib.Path("set/metadata.jsonl")
    metadata.write_text(metadata.read_text().replace("dot", "red"))
    assert len(encoded_by()[0]) == 7 and not reads.paths


def test_processes_share_out_the_captions(encoder, captions, monkeypatch):
    """The first of two encodes every other one; the second, started later, the rest."""
    whole = load_captions(encoder).embeddings.clone()
    write_captions(texts=[*CAPTIONS[:3], [CAPTIONS[3][0], "some night"]])
    for rank, done in ((0, 4), (1, 7)):
        monkeypatch.setattr(train_cifar, "processes", lambda rank=rank: (rank, 2))
        data = load_captions(encoder)
        assert data.embeddings.any(2).any(1).sum() == done
    assert torch.allclose(data.embeddings[:6].float(), whole.float(), atol=2e-3)


@pytest.mark.parametrize(
    "line, words",
    [
        ("{", r"metadata.jsonl, line 2 cannot be used \(JSONDecodeError"),
        ("7", "line 2 .*no file_name"),
        ('{"file_name": "more/0.png"}', "line 2 .*no text"),
        ('{"file_name": "more/0.png", "text": []}', "line 2 .*no text"),
        ('{"file_name": "more/0.png", "text": " "}', "line 2 .*a caption is empty"),
        ('{"file_name": "more/0.png", "text": ["a", 3]}', "line 2 .*a caption is empty"),
        ('{"file_name": "more/9.png", "text": "a"}', "line 2 .*more/9.png is not a file"),
        ('{"file_name": "metadata.jsonl", "text": "a"}', "1 images cannot be read.*--skip-bad"),
    ],
)
def test_captions_that_cannot_be_used(encoder, captions, line, words):
    write_captions(line1=line)
    with pytest.raises(ValueError, match=words):
        load_captions(encoder)


def test_wrong_encoders_and_numbers_of_tokens(encoder, captions, monkeypatch, capsys):
    with pytest.raises(ValueError, match="--text-encoder is missing"):
        train_cifar.parse_args(["--data", "captions", "--path", "set"])
    with pytest.raises(ValueError, match="--num-classes is not for"):
        load_captions(encoder, "--num-classes", "3")
    with pytest.raises(ValueError, match="from ./nothing-there; it needs pip install transformers"):
        load_captions("./nothing-there")
    with pytest.raises(ValueError, match="--cond-tokens is 21; .* reads 3 to 20"):
        load_captions(encoder, "--cond-tokens", "21")
    assert not capsys.readouterr().out
    data = load_captions(encoder, "--cond-tokens", "5")
    assert data.embeddings.shape[1] == 5
    assert "2 of 6 captions have more than 5 tokens and are cut" in capsys.readouterr().out
    write_captions(texts=[["a"], ["a " * 30], ["the"]])
    assert load_captions(encoder).embeddings.shape[1] == 20
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match="pip install transformers"):
        load_captions(encoder)


def test_a_bad_image_leaves_with_its_captions(encoder, vae, captions):
    """Of pixels and of latents, whose last image moves to its place."""
    pathlib.Path("set/more/1.png").write_text("no image")
    data = load_captions(encoder, "--skip-bad")
    assert data.images[:, 0, 0, 0].tolist() == [0, 20, 30]
    assert data.labels.tolist() == [[0, -1, -1], [0, 4, -1], [5, -1, -1]]
    flags = ["--vae", vae, "--preset", "cifar", "--channels", "3"]
    data = load_captions(encoder, "--skip-bad", *flags)
    assert data.labels.tolist() == [[0, -1, -1], [5, -1, -1], [0, 4, -1]]
    assert data.images.shape == (3, 2, 6, 8, 8) and data.latents["vae"] == vae
    assert not captions_args(encoder, *flags).flip


CAPTIONED = "--data captions --path set --image-size 8 --batch 2 --lr-schedule constant".split()


@pytest.fixture(scope="module")
def captioned(encoder, tmp_path_factory):
    """A folder with a short run on captions in out/."""
    folder = tmp_path_factory.mktemp("captioned")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_captions()
        run("out", *CAPTIONED, "--text-encoder", encoder, "--steps", "4")
    return folder


def test_training_on_captions_resumes_exactly(captioned, encoder, monkeypatch, capsys):
    """It goes on with the captions that it would have drawn; the last picture is of captions."""
    monkeypatch.chdir(captioned)
    run("half", *CAPTIONED, "--text-encoder", encoder, "--steps", "2")
    run("half", "--resume", "--steps", "4")
    assert same(*load("out", "model"), *load("half", "model"))
    model, rest = sample.load_checkpoint("half/ckpt.pt")
    c = model.config
    assert (c.num_classes, c.cond_tokens, c.cond_dim) == (0, 16, 12)
    assert rest["text"]["encoder"] == encoder and rest["settings"]["flip"] is False
    assert "6 captions of 16 tokens, 4 images: a red dot; green;" in capsys.readouterr().out
    assert os.path.exists("half/samples.png")
    for wrong, words in (
        (["--text-encoder", "x"], f"has --text-encoder {encoder}"),
        (["--cond-tokens", "8"], "contradicts"),
    ):
        with pytest.raises(ValueError, match=words):
            run("half", "--resume", "--steps", "9", *wrong)


def test_prompts_are_drawn_and_kept_with_the_images(captioned, encoder, tmp_path, monkeypatch):
    """Image i depends on seed, i and its prompt."""
    monkeypatch.chdir(tmp_path)
    state = load(captioned / "out")
    for name, weights in state["ema"].items():
        if weights.ndim > 1:  # a new model draws the same whatever the prompt
            torch.nn.init.normal_(state["ema"][name], std=0.2)
    torch.save(state, "random.pt")
    model, rest = sample.load_checkpoint("random.pt")
    two = ["a red dot", "night"]
    flags = ["--prompt", two[0], "--prompt", two[1], "--n", "5", "--guidance", "2"]
    draw("random.pt", "drawn", *flags, "--npz", "x.npz", "--png", "pngs")
    images, prompts = np.load("x.npz").values()
    assert prompts.tolist() == two[:1] * 3 + two[1:] * 2
    embeddings = rest["text"]["scale"] * sample.TextEncoder(encoder)(two, 16)
    generators = [torch.Generator().manual_seed(sample.seed_of(0, i)) for i in range(5)]
    want = model.sample(embeddings[[0, 0, 0, 1, 1]], generator=generators, guidance=2.0)
    want = sample.to_uint8(want).permute(0, 2, 3, 1).numpy()
    assert np.abs(images.astype(int) - want).max() <= 1
    # The folder of PNGs is one to train on.
    files, labels, captions = train_cifar.list_captions("pngs")
    assert captions == two and labels == [[0]] * 3 + [[1]] * 2
    assert np.array_equal(np.asarray(Image.open(files[4])), images[4])

    pathlib.Path("two.txt").write_text("night\n\na red dot\n")
    draw("random.pt", "drawn", "--prompts", "two.txt", *flags[4:], "--npz", "y.npz")
    others, prompts = np.load("y.npz").values()
    assert prompts.tolist() == two[1:] * 3 + two[:1] * 2
    changed = [not np.array_equal(*pair) for pair in zip(images, others, strict=True)]
    assert changed == [True] * 5


def test_prompts_with_an_encoder_that_moved(captioned, encoder, tmp_path, monkeypatch):
    """Without prompts captions of the training are drawn, also from the weights alone."""
    monkeypatch.chdir(tmp_path)
    state = load(captioned / "out")
    state["text"]["encoder"] = "./gone"
    torch.save(state, "moved.pt")
    with pytest.raises(ValueError, match="no text encoder can be loaded from ./gone"):
        draw("moved.pt", "drawn", "--n", "2")
    draw("moved.pt", "drawn", "--text-encoder", encoder, "--export", "half.pt")
    draw("half.pt", "drawn", "--n", "12", "--npz", "x.npz")
    want = [text for text in state["text"]["captions"] for _ in range(2)]
    assert np.load("x.npz")["arr_1"].tolist() == want


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--labels", "3"], "--labels is for models of classes"),
        (["--prompt", " "], "a prompt is empty"),
        (["--prompt", "a " * 15], "has 17 tokens, the model reads 16"),
        (["--prompt", "a", "--prompt", "dot", "--n", "1"], "--n 1 is less than the 2 prompts"),
        (["--prompts", "nowhere.txt"], "--prompts nowhere.txt cannot be read"),
        (["--text-encoder", "wide"], "wide gives 24 numbers a token, the model takes 12"),
        (["--real", "set"], "--real needs labels"),
    ],
)
def test_wrong_prompts(captioned, encoder, flags, words, monkeypatch):
    monkeypatch.chdir(captioned)
    call = sample.TextEncoder.__call__
    start = sample.TextEncoder.__init__

    def wide(self, texts, K):
        return call(self, texts, K).repeat(1, 1, 2)

    def from_here(self, name, device):
        start(self, encoder, device)

    if "wide" in flags:
        monkeypatch.setattr(sample.TextEncoder, "__init__", from_here)
        monkeypatch.setattr(sample.TextEncoder, "__call__", wide)
    with pytest.raises(ValueError, match=words):
        draw("out/ckpt.pt", "drawn", *flags)


# ==== Scripts: speed and scale
def test_counted_operations():
    """Of attention: four products with W x W matrices per token, q k, and the weights times v; two
    operations for each multiply-add."""
    attention, x = far.Attention(8, 2), torch.zeros(3, 5, 8)
    counted = train_cifar.count_flops(functools.partial(attention, x))
    assert counted == 2 * 3 * (5 * 4 * 8 * 8 + 2 * 5 * 5 * 8)


class NoAutocast:
    """In place of torch.autocast, which does not know the meta device."""

    def __init__(self, *args, **settings):
        pass

    def __enter__(self):
        pass

    def __exit__(self, *args):
        pass


def test_far_h_takes_a_step_in_80_gb(monkeypatch):
    """On the meta device, in float32: what the forward pass of one image keeps, the weights, their
    average, gradients and AdamW's two moments. Fused attention keeps q, k, v and its output."""

    def attention(q, k, v, **settings):
        return q * k * v

    monkeypatch.setattr(far, "scaled_dot_product_attention", attention)
    monkeypatch.setattr(torch, "autocast", NoAutocast)
    kept = {}

    def keep(x):
        kept[x.untyped_storage()._cdata] = x
        return x

    def give(x):
        return x

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, give)
    with torch.device("meta"), hooks:
        model = FAR(FARConfig.preset("far_h"))
        model(torch.zeros(1, 16, 16, 16), torch.zeros(1, dtype=torch.int64))
    weights = sum(p.nbytes for p in model.parameters())
    total = sum(x.untyped_storage().nbytes() for x in kept.values())  # the weights among them
    assert 2 * weights < total and 4 * weights + total < 80e9


def test_a_step_waits_for_nothing(tmp_path, monkeypatch):
    """No value of a tensor is asked for within a step: on a GPU that would wait for it."""
    step, inside = train_cifar.Run.step, []

    def watched(self):
        inside.append(1)
        step(self)
        inside.pop()

    def forbid(name):
        usual = getattr(torch.Tensor, name)

        def asked(self, *args, **settings):
            assert not inside, name
            return usual(self, *args, **settings)

        monkeypatch.setattr(torch.Tensor, name, asked)

    # Labels on the CPU are checked there.
    monkeypatch.setattr(far, "read_labels", lambda model, labels, B: labels[:, None])
    monkeypatch.setattr(train_cifar.Run, "step", watched)
    for name in "item tolist cpu numpy nonzero __bool__ __float__ __int__".split():
        forbid(name)
    run(tmp_path, "--steps", "3", "--mask", "--target", "residual")


@pytest.mark.slow
def test_compiled_training_equals_uncompiled(tmp_path, monkeypatch):
    """The captured graphs, run by PyTorch's own operators (no C++ compiler).

    CUDA graphs, whose gradients live until the next run, only where a step is one run.
    """
    modes, compiled = [], torch.compile

    def compile_without_compiler(model, mode=None):
        modes.append(mode)
        if mode is None:
            return model
        return compiled(model, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", compile_without_compiler)
    for name, extra in (("a", []), ("b", ["--compile"]), ("c", ["--compile", "--grad-accum", "2"])):
        run(tmp_path / name, "--steps", "3", *extra)
    assert modes == ["reduce-overhead", None]
    assert same(*load(tmp_path / "a", "model"), *load(tmp_path / "b", "model"), atol=1e-5)


@pytest.mark.parametrize("extra", [[], ["--no-head-mixing"]])
def test_activation_checkpointing_changes_nothing(tmp_path, monkeypatch, extra):
    """With the flag every block of transformer and head forgets and computes again."""
    seen, checkpoint = set(), train_cifar.checkpoint

    def spy(function, *inputs, **settings):
        seen.add(function.__self__)
        return checkpoint(function, *inputs, **settings)

    monkeypatch.setattr(train_cifar, "checkpoint", spy)
    run(tmp_path / "a", "--steps", "3", "--depth", "2", *extra)
    assert not seen
    run(tmp_path / "b", "--steps", "3", "--depth", "2", "--checkpoint-activations", *extra)
    assert len(seen) == 3
    assert same(*load(tmp_path / "a", "model"), *load(tmp_path / "b", "model"), atol=1e-6)


def fix_noise(setattr):
    """setattr: monkeypatch's, or in a process of its own the usual one."""

    def noise(x):
        return torch.ones_like(x).cumsum(-1).sin()

    def half(self, *shape, device=None):
        return torch.full(shape, 0.5)

    setattr(torch, "randn_like", noise)
    setattr(far.Path, "draw_t", half)


@pytest.mark.parametrize("attention", ["causal", "markov"])
def test_gradient_accumulation_averages(tmp_path, monkeypatch, attention):
    """Two parts of 8 give the step of one batch of 16, where both draw the same noise."""
    flags = ["--batch", "16", "--label-dropout", "0", "--steps", "3", "--attention", attention]
    flags += ["--levels-per-image", "0"]
    fix_noise(monkeypatch.setattr)
    run(tmp_path / "a", *flags)
    run(tmp_path / "b", *flags, "--grad-accum", "2")
    assert same(*load(tmp_path / "a", "model"), *load(tmp_path / "b", "model"), atol=1e-5)
    (a,), (b,) = load(tmp_path / "a", "log")[0], load(tmp_path / "b", "log")[0]
    assert a[3] == pytest.approx(b[3], abs=2e-4)


def test_as_many_threads_as_are_fastest(monkeypatch):
    threads = []
    rates = {12: 3, 6: 50, 3: 100, 1: 20}  # of a busy machine, by threads

    def calls_per_second(function, device, seconds):
        return rates[threads[-1]]

    monkeypatch.setattr(sample, "calls_per_second", calls_per_second)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 12)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    assert sample.choose_threads(None) == 3
    assert threads == [12, 6, 3, 1, 3]


def test_the_fastest_number_of_threads_stays_set(monkeypatch):
    before = torch.get_num_threads()
    rates = {4: 2.0, 2: 3.0, 1: 3.0}

    def calls_per_second(function, device, seconds):
        return rates[torch.get_num_threads()]

    monkeypatch.setattr(sample, "calls_per_second", calls_per_second)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    try:
        torch.set_num_threads(4)
        with sample.fastest_threads(tiny()):
            assert torch.get_num_threads() == 2
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)


def test_drawing_takes_as_many_threads_as_are_fastest_and_gives_them_back(monkeypatch):
    before = torch.get_num_threads()
    calls = []

    def choose_threads(function):
        calls.append(function())
        torch.set_num_threads(before + 3)

    monkeypatch.setattr(sample, "choose_threads", choose_threads)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with sample.fastest_threads(tiny()):
        assert torch.get_num_threads() == before
    monkeypatch.delenv("OMP_NUM_THREADS")
    for settings in (dict(), dict(cond_dim=5)):
        with sample.fastest_threads(tiny(**settings)):
            assert torch.get_num_threads() == before + 3
        assert torch.get_num_threads() == before
    assert len(calls) == 2  # a pass of the model is what is timed


@pytest.mark.parametrize(
    "world, device, backend",
    [(2, "cpu", "gloo"), (2, "cuda", "cpu:gloo,cuda:nccl"), (1, "cuda", "")],
)
def test_processes_talk_about_tensors_on_the_cpu(world, device, backend, monkeypatch):
    """The clock and the loss that all agree on lie there: NCCL alone fails on them."""
    backends = []

    def init(backend=None, **_):
        backends.append(backend)

    monkeypatch.setattr(torch.distributed, "init_process_group", init)
    monkeypatch.setenv("WORLD_SIZE", str(world))
    train_cifar.join_processes(torch.device(device))
    assert "".join(backends) == backend


FIXED = """
import sys, torch
sys.path[:0] = {folders!r}
import {module} as tests
import train_cifar
torch.set_num_threads(1)
tests.fix_noise(setattr)
make = train_cifar.make_batch
def spy(data, index, *rest):
    rank, _ = train_cifar.processes()
    torch.save((index, torch.initial_seed()), f"{{__file__}}.{{rank}}")
    return make(data, index, *rest)
train_cifar.make_batch = spy
train_cifar.main(sys.argv[1:])
train_cifar.dist.destroy_process_group()
"""


def launch(script, *flags):
    """Runs a script in two processes that talk through gloo; returns what it prints."""
    torchrun = "-m torch.distributed.run --nproc_per_node=2".split()
    torchrun += "--rdzv_backend=c10d --rdzv_endpoint=localhost:0".split()
    command = [sys.executable, *torchrun, str(script), *flags]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_two_processes_equal_one_with_the_doubled_batch(tmp_path, monkeypatch):
    """The step itself: with the noise fixed weights can be compared, also with accumulation.

    Each process notes its last images and its seed: shares of the second half of the last batch,
    and other noise (were it not fixed). One process writes.
    """
    flags = ["--batch", "16", "--steps", "3", "--log-every", "1", "--label-dropout", "0"]
    flags += ["--lr-schedule", "constant"]
    here = pathlib.Path(__file__)
    script = tmp_path / "fixed.py"
    script.write_text(FIXED.format(folders=[sample.ROOT, str(here.parent)], module=here.stem))
    out = launch(script, *SMALL, *flags, "--out", f"{tmp_path}/two", "--grad-accum", "2")
    fix_noise(monkeypatch.setattr)
    run(tmp_path / "one", *flags)
    (mine, seed), (other, other_seed) = (torch.load(f"{tmp_path}/fixed.py.{r}") for r in (0, 1))
    order = train_cifar.epoch_order(1797, 0, 0)
    assert torch.equal(torch.cat([mine, other]), order[40:48]) and seed != other_seed
    assert out.count("wrote") == 2
    names = ["ckpt.pt", "levels.png", "log.csv", "samples.png"]
    assert sorted(os.listdir(tmp_path / "two")) == names
    assert same(*load(tmp_path / "one", "model"), *load(tmp_path / "two", "model"), atol=1e-5)
    # The loss is averaged over the processes.
    for a, b in zip(*load(tmp_path / "one", "log"), *load(tmp_path / "two", "log"), strict=True):
        assert a[3] == pytest.approx(b[3], abs=2e-4)
    # A run of two goes on in one.
    run(tmp_path / "two", "--batch", "16", "--steps", "4", "--resume")
    assert load(tmp_path / "two")["step"] == 4


@pytest.mark.slow
def test_kill_and_resume(tmp_path):
    """kill -9 in the middle of a run: the checkpoint is whole, and nothing is lost."""
    flags = [*SMALL, "--log-every", "20", "--save-minutes", "1e-9", "--lr-schedule", "constant"]
    a, b = tmp_path / "a", tmp_path / "b"
    script = os.path.join(sample.ROOT, "train_cifar.py")
    command = [sys.executable, script, *flags, "--steps", "100000", "--out", str(b)]
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    process = subprocess.Popen(command, **quiet, env={**os.environ, "OMP_NUM_THREADS": "1"})
    log = b / "log.csv"
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") > 2):
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert 20 <= load(b)["step"] < 100
    train_cifar.main([*flags, "--steps", "100", "--out", str(a)])
    train_cifar.main([*flags, "--steps", "100", "--out", str(b), "--resume"])
    assert same(*load(a, "ema"), *load(b, "ema"))
    assert log_rows(a) == log_rows(b) and len(log_rows(a)) == 6


# ==== Experiments
RINGS = """
import torch
from far import exact_ends


@exact_ends
def rings(x, keep):
    f = torch.fft.fftfreq(x.shape[-1])
    radius = (f[:, None] ** 2 + f**2).sqrt()
    low = radius <= keep * radius.max() + 1e-6
    return torch.fft.ifft2(torch.fft.fft2(x) * low).real
"""
TINY = ["--seeds", "0", "--steps", "2", "--n", "12", "--batch", "8"]
TINY += ["--width", "16", "--depth", "1", "--head-width", "16", "--head-steps", "1"]


@pytest.mark.slow
def test_a_sweep_takes_an_ordering_and_does_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(far.ORDERINGS, "mine.py:rings", raising=False)
    pathlib.Path("mine.py").write_text(RINGS)
    command = ["orderings", "--rows", "dct", "--ordering", "mine.py:rings", *TINY]
    trained = []
    run = subprocess.run

    def counted(command, **settings):
        trained.append(command)
        return run(command, **settings)

    monkeypatch.setattr(sweep.subprocess, "run", counted)
    sweep.main(command)
    assert len(trained) == 2  # the row that was asked for, and the ordering
    assert "mine.py:rings" in trained[1] and "mine.py:rings" not in trained[0]
    with open("out/sweep/orderings/scores.csv") as file:
        lines = list(csv.DictReader(file))
    assert [line["row"] for line in lines] == ["dct", "mine.py:rings"]
    assert lines[0]["fd"] != lines[1]["fd"]
    assert lines[0]["calls"] == "3.0"  # one head step at each of three levels
    assert pathlib.Path("out/sweep/orderings/plot.png").stat().st_size > 1000

    # Started again, nothing is trained; scores that are missing are made again, and are the same.
    missing = next(pathlib.Path("out/sweep/models").glob("*/scores_*.json"))
    missing.unlink()
    sweep.main(command)
    assert len(trained) == 2
    with open("out/sweep/orderings/scores.csv") as file:
        again = list(csv.DictReader(file))
    assert [line["fd"] for line in again] == [line["fd"] for line in lines]

    # A changed file is another ordering, and is trained; a run that fails ends the sweep.
    pathlib.Path("mine.py").write_text(RINGS + "\n")

    def fail(command, **settings):
        trained.append(command)
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(sweep.subprocess, "run", fail)
    with pytest.raises(SystemExit, match="this run failed"):
        sweep.main(command)
    assert len(trained) == 3 and "mine.py:rings" in trained[2]


def test_a_sweep_draws_from_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = far.FAR(far.FARConfig.preset("digits", width=16, depth=1, head_width=16))
    torch.save(dict(config=model.config.to_dict(), ema=model.state_dict()), "mine.pt")
    monkeypatch.setattr(sweep.subprocess, "run", None)  # nothing is trained
    rows = "temperature 0.9,guidance falling 2.0"
    command = ["draws", "--ckpt", "mine.pt", "--rows", rows, "--seeds", "0", "--n", "20"]
    drawn = []
    draw_images = sample.draw_images

    def noted(model, labels, seed, **settings):
        drawn.append(settings)
        return draw_images(model, labels, seed, **settings, head_steps=1)

    monkeypatch.setattr(sample, "draw_images", noted)
    sweep.main([*command, "--real", train_cifar.DIGITS])
    assert [settings.get("temperature") for settings in drawn] == [0.9, None]
    assert drawn[1]["guidance"] == [2.0, 1.5, 1.0]
    with open("out/sweep/draws/scores.csv") as file:
        lines = list(csv.DictReader(file))
    assert [line["row"] for line in lines] == rows.split(",")
    # With guidance the head reads each picture twice.
    assert [line["calls"] for line in lines] == ["3.0", "5.0"]
    assert not any(pathlib.Path("out/sweep").rglob("ckpt.pt"))


def test_every_row_of_a_sweep_is_a_possible_model(tmp_path):
    for rows in sweep.COMPARISONS.values():
        for row in rows.values():
            settings = dict(row)
            draw = dict(settings.pop("draw", {}))
            levels = draw.pop("levels", [1.0])
            for name in ("curve", "value"):
                settings.pop(name, None)
            if ":" in settings.get("ordering", ""):
                del settings["ordering"]
            flags = sweep.to_flags(settings)
            if "--data" in flags:
                flags += ["--path", str(tmp_path)]
            config = train_cifar.parse_args([*flags, "--out", str(tmp_path)]).config
            assert set(levels) <= set(config.levels)
            far.sampling_config(far.FAR(config), draw)


NUMBERS = "zero one two three four five six seven eight nine".split()
SCENE_COLOURS = "red green blue yellow pink white".split()
SYNONYMS = "scarlet emerald azure golden magenta snowy".split()


def read_caption(caption):
    """What a caption of scenes.py says, by its words: digits, colours, the relation or None."""
    plural = {f"{word}s": n for n, word in enumerate(NUMBERS)}
    plural["sixes"] = 6
    words = caption.split()
    for word in words:
        if word in plural:
            groups = {"two": 2, "three": 3, "four": 4, "pair": 2, "trio": 3, "quartet": 4}
            (count,) = (groups[other] for other in words if other in groups)
            return (plural[word],) * count, (), None
    digits, colours = [], []
    for word in words:
        if word in NUMBERS or word.isdigit():
            digits.append(int(word) if word.isdigit() else NUMBERS.index(word))
        for names in (SCENE_COLOURS, SYNONYMS):
            if word in names:
                colours.append(SCENE_COLOURS[names.index(word)])
    relation = None
    for pattern, name in (
        ("left", "left"),
        ("right", "right"),
        ("above|over|on top", "above"),
        ("below|under|beneath", "below"),
    ):
        if re.search(pattern, caption):
            relation = name
    return tuple(digits), tuple(colours), relation


def test_captions_of_scenes_say_what_scenes_are():
    """Each caption belongs to one scene, and its words name all that is in it."""
    known = scenes.scenes_by_caption()
    said = 0
    for kind in scenes.all_scenes().values():
        for scene in kind:
            captions = scenes.captions_of(scene) + scenes.captions_of(scene, seen=False)
            said += len(captions)
            assert all(known[caption] is scene or known[caption] == scene for caption in captions)
    assert said == len(known)
    for caption, scene in itertools.islice(known.items(), 0, None, 17):
        assert read_caption(caption) == (scene.digits, scene.colours, scene.relation), caption
        assert not re.search(r"\ba [aei]|\ban [^aei]", caption)


def test_held_out_scenes_are_some_of_each_colour_count_and_relation():
    every = scenes.all_scenes()
    for kind, least, most in (
        ("single object", 0, 0),
        ("two objects", 0, 0),
        ("counting", 0.1, 0.25),
        ("colours", 0.1, 0.25),
        ("position", 0.1, 0.25),
    ):
        held_out = [scene for scene in every[kind] if scenes.is_held_out(scene)]
        assert least <= len(held_out) / len(every[kind]) <= most
        for part in ("digits", "colours", "relation"):
            values = {str(getattr(scene, part)) for scene in every[kind]}
            if len(values) <= 10:  # colours and relations, all of which are held out somewhere
                assert {str(getattr(scene, part)) for scene in held_out} in (values, set())
    for scene in every["position"]:  # 3 left of 7 is 7 right of 3
        a, b = scene.digits
        opposite = dict(left="right", right="left", above="below", below="above")[scene.relation]
        same = scenes.Scene("position", (b, a), (), opposite)
        assert scenes.is_held_out(same) == scenes.is_held_out(scene)
    for scene in every["colours and position"][::7]:
        parts = [scenes.Scene("colours", (d,), (c,)) for d, c in zip(*scene[1:3], strict=True)]
        parts.append(scenes.Scene("position", scene.digits, (), scene.relation))
        assert scenes.is_held_out(scene) == any(map(scenes.is_held_out, parts))


def test_scenes_are_judged_by_all_that_is_said():
    """Real ones hold, but for a few unclear digits; those of another scene do not."""
    judge = scenes.Judge()
    _, digits = scenes.load_digits()
    rng = np.random.default_rng(0)
    every = [scene for kind in scenes.all_scenes().values() for scene in kind]
    chosen = [every[k] for k in rng.permutation(len(every))[:150]]
    every = scenes.all_scenes()
    for kind in ("single object", "counting", "position"):
        chosen += every[kind][::3]
    pictures = np.stack([scenes.draw_scene(scene, digits, rng) for scene in chosen])
    found = judge.find(pictures)
    right = [judge.holds(*pair) for pair in zip(chosen, found, strict=True)]
    assert np.mean(right) > 0.96
    opposite = dict(left="right", right="left", above="below", below="above")
    across = dict(left="above", right="below", above="left", below="right")
    for scene, digits, good in zip(chosen, found, right, strict=True):
        wrong = [scene._replace(digits=(*scene.digits, 3))]
        wrong.append(scene._replace(digits=scene.digits[1:]))
        wrong.append(scene._replace(digits=((scene.digits[0] + 1) % 10, *scene.digits[1:])))
        if scene.relation:
            wrong.append(scene._replace(relation=opposite[scene.relation]))
            wrong.append(scene._replace(relation=across[scene.relation]))
        if scene.colours:
            wrong.append(scene._replace(colours=scene.colours[1:] + scene.colours[:1]))
        for other in wrong:
            assert other == scene or not (good and judge.holds(other, digits))


def test_scenes_to_train_on_and_the_one_hot_encoder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    scenes.main(["set", "--n", "150"])
    files, labels, captions = train_cifar.list_captions("set")
    judge = scenes.Judge()
    known = scenes.scenes_by_caption()
    pictures = [sample.read_image(file, 24).transpose(1, 2, 0) for file in files]
    seen = judge.find(pictures)
    right = []
    for two, found in zip(labels, seen, strict=True):
        first, second = (known[captions[number]] for number in two)
        assert first == second and not scenes.is_held_out(first)
        right.append(judge.holds(first, found))
        if right[-1]:  # what is left open is not held out either
            assert not any(scenes.colour_held_out(digit, colour) for digit, colour, _ in found)
            if len({digit for digit, _, _ in found}) == 2:
                (a, _, place_a), (b, _, place_b) = found
                holding = [r for r in scenes.RELATIONS if scenes.holds(r, place_a, place_b)]
                assert len(holding) == 1 and not scenes.relation_held_out(a, b, holding[0])
    assert np.mean(right) > 0.9

    prompts = {}
    for name in ("seen", "heldout", "unseen"):
        prompts[name] = pathlib.Path(f"set/prompts_{name}.txt").read_text().splitlines()
        held_out = [scenes.is_held_out(known[prompt]) for prompt in prompts[name]]
        assert held_out == [name == "heldout"] * len(held_out)
    assert set(prompts["seen"]) <= set(captions)
    assert not set(prompts["unseen"]) & set(captions)

    encoder = sample.TextEncoder("set/one-hot")
    words = ["a red three", "three red sevens", "a crimson three"]
    rows = encoder(words, 4)
    one_hot = rows / rows.amax((1, 2), keepdim=True)
    assert ((one_hot == 0) | (one_hot == 1)).all()
    assert one_hot.sum(2).tolist() == [[1, 1, 1, 0]] * 3
    a, red, three = one_hot[0, :3].argmax(1).tolist()
    assert one_hot[1, :2].argmax(1).tolist() == [three, red]
    assert one_hot[2, 0].argmax() == a and one_hot[2, 1].argmax() not in (a, red, three)

    np.savez("good.npz", np.stack(pictures), np.array([captions[two[0]] for two in labels]))
    np.savez("other.npz", np.stack(pictures), np.array(["a cat"] * len(pictures)))
    capsys.readouterr()
    scenes.main(["--score", "good.npz"])
    lines = capsys.readouterr().out.splitlines()
    kinds = [known[captions[two[0]]].kind for two in labels]
    shares = []
    for kind in scenes.WORDINGS:
        shares.append(np.mean([good for good, k in zip(right, kinds, strict=True) if k == kind]))
    cells = [f"{share:.2f}" for share in (*shares, np.mean(shares))]
    assert lines[2] == f"| good.npz | {' | '.join(cells)} |"
    assert lines[3].startswith("| real scenes for its prompts | ")
    for wrong, words in (
        (["--score", "other.npz"], "'a cat'. are no captions"),
        (["--score", train_cifar.DIGITS], "no file of sample.py --npz"),
        (["set"], "metadata.jsonl exists"),
        ([], "a folder to write, or --score"),
    ):
        with pytest.raises(ValueError, match=words):
            scenes.main(wrong)


def test_energy_by_band_is_that_of_the_coefficients_of_the_dct():
    images = torch.randint(0, 256, (5, 8, 8, 3), dtype=torch.uint8)
    x = images.double().numpy() / 127.5 - 1
    squares = scipy.fft.dctn(x, axes=(1, 2), norm="ortho") ** 2
    index = np.arange(8)
    larger = np.maximum(index[:, None], index)
    for bands in (1, 4, 8):
        band = larger * bands // 8
        wanted = [squares[:, band == k].sum() / 5 for k in range(bands)]
        np.testing.assert_allclose(spectra.energy_by_band(images, bands), wanted)


def test_spectra_of_samples_against_real_images(tmp_path, capsys):
    real = np.load(train_cifar.DIGITS)["images"]
    sharp, pale = str(tmp_path / "sharp.npz"), str(tmp_path / "pale.npz")
    np.savez(sharp, real)
    # Grey is 127.5. Half of the contrast, up to rounding, is a quarter of the energy.
    np.savez(pale, (real / 2.0 + 63.75).round().astype(np.uint8))
    picture = str(tmp_path / "new" / "spectra.png")
    spectra.main([sharp, pale, "--real", train_cifar.DIGITS, "--bands", "4", "--out", picture])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].endswith("sharp | 1.00 | 1.00 | 1.00 | 1.00 |")
    assert lines[3].endswith("pale | 0.25 | 0.25 | 0.25 | 0.25 |")
    assert os.path.getsize(picture) > 1000

    for wrong, message in (
        (["--real", train_cifar.DIGITS, __file__], "must be an npz file of sample.py --npz"),
        (["--real", train_cifar.DIGITS, sharp, "--bands", "9"], "--bands is 9; .* 1 .. 8"),
        (["--real", __file__, sharp], "--real .* must be a folder of images, or an npz file"),
    ):
        with pytest.raises(ValueError, match=message):
            spectra.main(wrong)


def test_a_sweep_names_what_it_does_not_know():
    with pytest.raises(ValueError, match="--rows has .'fast'.; targets has full, next, residual"):
        sweep.main(["targets", "--rows", "full,fast"])
    with pytest.raises(ValueError, match="--seeds is 1,x"):
        sweep.main(["targets", "--seeds", "1,x"])
    with pytest.raises(ValueError, match="claim needs --score, or --real"):
        sweep.main(["claim", "--path", "images"])
    with pytest.raises(ValueError, match="--ckpt trains nothing; it is for sampler and draws"):
        sweep.main(["targets", "--ckpt", "mine.pt"])
    with pytest.raises(ValueError, match="--ckpt trains nothing; it cannot take --width 16"):
        sweep.main(["draws", "--ckpt", "mine.pt", "--width", "16"])
    with pytest.raises(ValueError, match="--ckpt trains nothing; it cannot take --ordering"):
        sweep.main(
            ["draws", "--ckpt", "mine.pt", "--ordering", "experiments/orderings.py:high_to_low"]
        )
    with pytest.raises(ValueError, match="--ckpt trains nothing; it cannot take --max-minutes"):
        sweep.main(["draws", "--ckpt", "mine.pt", "--max-minutes", "1"])
    with pytest.raises(ValueError, match="mine.pt is not a file"):
        sweep.main(["draws", "--ckpt", "mine.pt"])


# ==== README
README = pathlib.Path(far.__file__).parent / "README.md"


def defined_at(source):
    """Line of each function, class, method and constant: {"FAR.sample": 1011, ..}."""
    tree = ast.parse(source)
    lines = {name: node.lineno for name, node in find_functions(tree).items()}
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            lines[node.name] = node.lineno
        if isinstance(node, ast.Assign):
            lines[ast.unparse(node.targets[0])] = node.lineno
    return lines


def python_blocks(text):
    """The blocks of Python in a text of Markdown."""
    return re.findall(r"^```python\n(.*?)^```", text, re.S | re.M)


def test_readme_links_to_the_lines_of_far():
    lines = defined_at(far_source())
    links = re.findall(r"\[`([\w.]+)`\]\(far\.py#L(\d+)\)", README.read_text())
    assert len(links) > 15
    assert links == [(name, str(lines[name])) for name, _ in links]


def test_the_loop_of_readme_trains_and_draws(tmp_path, monkeypatch):
    """Its steps are fewer here; that 500 draw digits was seen."""
    (loop,) = [block for block in python_blocks(README.read_text()) if "AdamW" in block]
    assert len(loop.splitlines()) < 22
    digits = loop.replace("assets/digits.npz", train_cifar.DIGITS.replace(os.sep, "/"))
    monkeypatch.chdir(tmp_path)
    pathlib.Path("loop.py").write_text(digits.replace("range(500)", "range(3)"))
    names = runpy.run_path("loop.py")
    assert Image.open("digits.png").size == (10 * 50 + 2, 52)
    fresh = names["FAR"](names["FARConfig"].preset("digits")).state_dict()
    moved = names["average"].state_dict()
    assert not torch.equal(moved["head.output.weight"], fresh["head.output.weight"])


# ==== The notebook
NOTEBOOK = pathlib.Path(far.__file__).parent / "tutorial.ipynb"


def test_the_notebook_quotes_far_as_it_stands():
    """Each line in a block of Python in its texts, one in sections 1 to 17, is a line of far.py."""
    code = {line.strip() for line in far_source().splitlines()}
    cells = nbformat.read(NOTEBOOK, 4).cells
    texts = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    blocks = python_blocks(texts)
    assert len(blocks) == 17
    assert {line for block in blocks for line in block.splitlines()} <= code


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(cells):
    """What the cells print, as one text."""
    outputs = [output for cell in cells for output in cell.outputs]
    return "".join(output.get("text", "") for output in outputs)


def check_loop_and_ordering(cells):
    """The loop written out draws what FAR.sample draws, and the new ordering keeps the laws."""
    text = printed(cells)
    difference = text.split("largest difference to FAR.sample: ")[1].split()[0]
    assert float(difference) < 1e-5
    assert "laws of high_to_low: all hold" in text


def test_the_notebook_is_stored_with_its_figures():
    """As executed: once, from top to bottom, without an error or a warning; small, in short cells,
    a figure in the first three."""
    notebook = nbformat.read(NOTEBOOK, 4)
    cells = code_cells(notebook)
    outputs = [output for cell in cells for output in cell.outputs]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert {output.output_type for output in outputs} <= {"stream", "display_data"}
    assert all(output.get("name", "stdout") == "stdout" for output in outputs)
    assert not any(str(NOTEBOOK.parent) in str(output) for output in outputs)
    check_loop_and_ordering(cells)

    pictures = [cell for cell in notebook.cells if "image/png" in str(cell.get("outputs"))]
    assert len(pictures) >= 16 and pictures[0] in notebook.cells[:3]
    assert len(notebook.cells) <= 40
    assert max(len(cell.source.splitlines()) for cell in cells) <= 25
    assert NOTEBOOK.stat().st_size < 1.5e6


@pytest.mark.slow
def test_the_notebook_runs_shortened(tmp_path, monkeypatch):
    """With FAR_FAST=1, in a folder of its own, in which it leaves nothing but out/."""
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOK.parent))
    monkeypatch.setenv("FAR_FAST", "1")
    notebook = nbformat.read(NOTEBOOK, 4)
    resources = {"metadata": {"path": str(tmp_path)}}
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources=resources
    )
    client.execute()
    check_loop_and_ordering(code_cells(notebook))
    assert set(os.listdir(tmp_path)) <= {"out"}


if __name__ == "__main__":
    main()
