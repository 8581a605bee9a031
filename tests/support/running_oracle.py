"""The running form once more, in numpy, written from its definition: the oracle of all backends.

x += S·u with the S of the steps before; afterwards S moves by what this step has shown.
"""

import numpy as np
from support.oracle import Oracle

SHARE_OF_NORM, SHARE_OF_LOSS, LARGEST_RATIO, LEAST_RMS = 0.46, 1 / 13, 30.0, 0.02
HELD = MEMORY_OF_NORM = 10
GAIN, LARGEST_MOVE, BIAS = 3.0, 0.03, 0.25
OUTLIER, REGROWTH = 10.0, 2.0
CEILING_BY_LOSS, CEILING_BY_NORMS = 6.0, 2.0
LEAST_IN_PART = 8192
"""Elements of a weight from which on its start may be kept for one block of 128 in eight."""


class Scale:
    """What one S has seen."""

    def __init__(self, start):
        self.s, self.given = start or 0.0, start is not None
        self.learning = False
        self.steps = 0
        self.updates, self.ratios = [], []  # ‖u‖; ‖u‖/‖g‖
        self.decreases = []  # loss/(‖g‖·‖u‖), over all scales, at first
        self.first_ratio, self.first_s = 1.0, 0.0
        self.squares, self.moves = 0.0, 0
        self.last_factor = self.highest = self.largest = 0.0

    def note(self, update, gradient):
        self.updates.append(update)
        self.ratios.append(update / gradient)

    def by_norms(self, norm, size, sizes):
        """S of which a step is a share of ‖x‖, a smaller one of more weights."""
        share = SHARE_OF_NORM / np.cbrt(sizes)
        return share * max(norm, LEAST_RMS * size**0.5) / lately(self.updates)

    def by_loss(self):
        """S of which a step lowers the loss by a share of it at most; 0 without losses."""
        if not self.decreases:
            return 0.0
        return SHARE_OF_LOSS * np.exp(np.mean(np.log(self.decreases)))

    def by_both(self, by_norms):
        """Between what the loss and what the norms say, the former within limits."""
        by_loss = self.by_loss() or by_norms
        by_loss = np.clip(by_loss, by_norms / LARGEST_RATIO, LARGEST_RATIO * by_norms)
        return np.sqrt(by_loss * by_norms)


def lately(values):
    """The geometric mean of the last MEMORY_OF_NORM values, roughly."""
    weights = (1 - 1 / MEMORY_OF_NORM) ** np.arange(len(values))[::-1]
    return np.exp(np.dot(weights, np.log(values)) / weights.sum())


class RunningOracle(Oracle):
    """As the Oracle; `xs` are the unrounded weights."""

    def __init__(self, params, base="adamw", s_init=None, x_ref_every=1, **options):
        options.pop("variant", None)
        super().__init__(params, base, s_init=1.0, **options)
        self.every = [own.pop("x_ref_every", x_ref_every) for own in self.options]
        self.start = [x.copy() for x in self.x]
        self.began = False
        self.rows = [Scale(s_init) for _ in range(max(self.row) + 1)]
        self.peaks = [own["lr"] for own in self.options]

    @property
    def scale(self):
        return np.array([row.s for row in self.rows])

    def step(self, grads, lr_factor=1.0, loss=None):
        gs = [None if g is None else np.asarray(g, dtype=self.dtype) for g in grads]
        if self.maximize:
            gs = [None if g is None else -g for g in gs]
        if not self.began:
            if not any(np.any(g != 0) for g in gs if g is not None):
                return
            self.began, self.start = True, [x.copy() for x in self.x]
        if all(g is None for g in gs):
            return
        with np.errstate(invalid="ignore", over="ignore"):
            sums = self.move(gs, lr_factor)
        self.learn(sums, lr_factor, loss)

    def move(self, gs, lr_factor):
        """h, ‖g‖², ‖x‖², ‖u‖² at the peak lr and the size, of each scale; x += S·u."""
        sums = np.zeros((5, len(self.rows)))
        for i, (g, x) in enumerate(zip(gs, self.x, strict=True)):
            if g is None:
                continue
            options = {**self.options[i], "lr": self.options[i]["lr"] * lr_factor}
            u = self.base(np.where(np.isfinite(g), g, 0.0), x, self.state[i], **options)
            uu = self.dot(u, u) / lr_factor**2 if lr_factor else 0.0
            h = self.promise(g, x - self.start[i], self.every[i])
            found = h, self.dot(g, g), self.dot(x, x), uu, x.size
            sums[:, self.row[i]] += found
            self.x[i] = self.round_x(x + self.rows[self.row[i]].s * u)
        return sums

    def promise(self, g, displacement, every):
        """⟨g, x − x_ref⟩, or what some of its elements say of it: those of each eighth block."""
        if every == 1 or g.size < LEAST_IN_PART:
            return self.dot(g, displacement)
        known = np.arange(g.size) // 128 % every == 0
        return every * self.dot(g.ravel()[known], displacement.ravel()[known])

    def learn(self, sums, lr_factor, loss):
        power = np.sqrt(sums[1].sum() * sums[3].sum())
        finite = np.isfinite(sums).all(axis=0)
        self.nonfinite_steps += int(not finite.all())
        for row, (h, gg, xx, uu, size), known in zip(self.rows, sums.T, finite, strict=True):
            if not known or gg == 0 or uu == 0:
                continue
            row.steps += 1
            last = row.last_factor if row.learning else row.highest
            rises, row.last_factor = lr_factor > 1.000001 * last, lr_factor
            row.highest = max(row.highest, lr_factor)
            row.note(np.sqrt(uu), np.sqrt(gg))
            if not row.learning and (rises or row.steps <= HELD):
                self.estimate(row, loss, power, np.sqrt(xx), size, sums[4].sum())
                row.largest = max(row.largest, row.s)
            else:
                self.follow(row, h, lr_factor, rises, np.sqrt(xx), size, sums[4].sum())
                row.largest = max(row.largest, row.s * lr_factor)

    @staticmethod
    def estimate(row, loss, power, norm, size, sizes):
        if row.given:
            return
        if loss is not None and 0 < loss < np.inf and 0 < power < np.inf:
            row.decreases.append(loss / power)
        row.s = row.first_s = row.by_both(row.by_norms(norm, size, sizes))
        row.first_ratio = lately(row.ratios)

    @staticmethod
    def follow(row, h, lr_factor, rises, norm, size, sizes):
        if not row.learning:
            row.learning = True
            if not row.given and lr_factor < row.highest:
                row.s /= row.highest
        before = row.s
        grown = max(1.0, row.first_ratio / lately(row.ratios))
        bound = CEILING_BY_NORMS * row.by_norms(norm, size, sizes) / lr_factor
        if row.decreases:
            bound = CEILING_BY_LOSS * row.first_s * grown / lr_factor
        if row.squares > 0:
            h = np.clip(h, -OUTLIER * row.squares**0.5, OUTLIER * row.squares**0.5)
        # Of n squares the last has the weight 1/(1 + n/4).
        row.squares = row.squares + (h * h - row.squares) / (1 + row.moves / 4)
        row.moves += 1
        if row.squares > 0:
            z = np.clip(-h / row.squares**0.5, -1, 1)
            row.s *= np.exp(min(LARGEST_MOVE, GAIN / (row.steps + 1)) * (z + BIAS))
        if not row.given and row.s > before:
            row.s = max(before, min(row.s, bound))
        if rises and row.largest:
            row.s = min(row.s, REGROWTH * row.largest / lr_factor)
