"""Mechanic once more, in numpy and in the paper's letters: the oracle of all backends.

It is written from the definition (arXiv 2306.00144 and this project's rules for it) and shares no
line with the package, so that the two can agree only by both being right.
"""

import numpy as np

TUNER_BETAS = (0.9, 0.99, 0.999, 0.9999, 0.99999, 0.999999)

# s0 in units of s_init; then ε inside m, clamp of h, floor of the stored r. "annealed" is optax's
# with λ and ε per unit of the peak lr, and s moves by lr/(peak lr) of its update.
VARIANTS = {
    "optax": {"s_init": 1e-6, "s0": 1, "m0": 0.0, "eps_in_m": 1, "clamp_h": 1, "floor_r": 0},
    "annealed": {"s_init": None, "s0": "1/n", "m0": 0.0, "eps_in_m": 1, "clamp_h": 1, "floor_r": 0},
    "paper": {"s_init": 1e-8, "s0": 0, "m0": 0.0, "eps_in_m": 0, "clamp_h": 0, "floor_r": 1},
    "pytorch": {"s_init": 1e-8, "s0": 0, "m0": 1e-6, "eps_in_m": 0, "clamp_h": 0, "floor_r": 1},
}


# A base takes g and the weights before the step, keeps its own state and returns its update u.


def sgd(g, x, state, lr, momentum=0.0, dampening=0.0, nesterov=False, weight_decay=0.0):
    d = g + weight_decay * x
    if momentum:
        # As in torch, the first gradient that a weight gets enters undampened.
        old = state.get("buf")
        state["buf"] = d if old is None else momentum * old + (1 - dampening) * d
        d = d + momentum * state["buf"] if nesterov else state["buf"]
    return -lr * d


def adam_direction(g, state, betas, eps):
    b1, b2 = betas
    t = state["t"] = state.get("t", 0) + 1
    state["m"] = b1 * state.get("m", 0 * g) + (1 - b1) * g
    state["v"] = b2 * state.get("v", 0 * g) + (1 - b2) * g * g
    return (state["m"] / (1 - b1**t)) / (np.sqrt(state["v"] / (1 - b2**t)) + eps)


def adamw(g, x, state, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01):
    return -lr * (adam_direction(g, state, betas, eps) + weight_decay * x)


def adam(
    g, x, state, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, decoupled_weight_decay=False
):
    if decoupled_weight_decay:
        return adamw(g, x, state, lr, betas, eps, weight_decay)
    return -lr * adam_direction(g + weight_decay * x, state, betas, eps)


def lion(g, x, state, lr, betas=(0.9, 0.99), weight_decay=0.0):
    b1, b2 = betas
    m = state.get("m", 0 * g)
    state["m"] = b2 * m + (1 - b2) * g
    return -lr * (np.sign(b1 * m + (1 - b1) * g) + weight_decay * x)


BASES = {"sgd": sgd, "adam": adam, "adamw": adamw, "lion": lion}


class Oracle:
    """Mechanic around one base. `params` is a list of arrays, or of groups as torch takes them.

    Options carry the names of the public optimizers. `round_x` stands for the weights' storage.
    `dtype` is the width of every array and of the arithmetic on them: float64 is the oracle,
    float32 the plainest implementation at that width, whose error is the yardstick for ours.
    """

    def __init__(
        self,
        params,
        base="adamw",
        variant="annealed",
        scale_per="model",
        s_decay=0.01,
        s_init=None,
        tuner_eps=1e-8,
        tuner_betas=TUNER_BETAS,
        round_x=lambda x: x,
        dtype=np.float64,
        maximize=False,
        **options,
    ):
        self.variant = VARIANTS[variant]
        self.s_init = self.variant["s_init"] if s_init is None else s_init
        self.base, self.options, self.maximize = BASES[base], [], maximize
        self.s_decay, self.eps, self.betas = s_decay, tuner_eps, np.array(tuner_betas)
        self.round_x, self.dtype = round_x, dtype

        self.x, self.row = [], []  # row[i]: which scale weight i belongs to
        groups = params if isinstance(params[0], dict) else [{"params": params}]
        for k, group in enumerate(groups):
            own = {name: value for name, value in group.items() if name != "params"}
            for x in group["params"]:
                self.row.append({"model": 0, "group": k, "parameter": len(self.x)}[scale_per])
                self.x.append(np.array(x, dtype=dtype))
                self.options.append({**options, **own})
        if variant == "annealed":
            peak = max(own["lr"] for own in self.options)
            self.s_decay, self.eps = s_decay * peak, tuner_eps * peak
        self.state = [{} for _ in self.x]
        self.delta = [np.zeros_like(x) for x in self.x]
        self.x_ref = None  # taken at the first step with a gradient that is not all zeros
        self.nonfinite_steps = 0

        shape = (max(self.row) + 1, len(self.betas))
        s0 = 1 / len(self.betas) if self.variant["s0"] == "1/n" else self.variant["s0"]
        self.s = np.full(shape, s0 * self.s_init)
        self.m = np.full(shape, self.variant["m0"])
        self.r, self.v = np.zeros(shape), np.zeros(shape)

    @property
    def scale(self):
        """S = Σ s, one number a scale."""
        return self.s.sum(axis=1)

    def unrounded(self, i):
        """x_ref + S·Δ of weight i before `round_x`."""
        return self.x_ref[i] + float(self.scale[self.row[i]]) * self.delta[i]

    def dot(self, a, b):
        return float(np.dot(a.ravel().astype(np.float64), b.ravel().astype(np.float64)))

    def step(self, grads, lr_factor=1.0):
        """Take a step from a list of gradients, None where a weight has none.

        `lr_factor` is lr/(peak lr), as a schedule has it; the tuner heeds it in "annealed" alone.
        """
        self.lr_factor = lr_factor
        gs = [None if g is None else np.asarray(g, dtype=self.dtype) for g in grads]
        if self.maximize:
            gs = [None if g is None else -g for g in gs]
        if all(g is None for g in gs):
            return
        if self.x_ref is None:
            if not any(np.any(g != 0) for g in gs if g is not None):
                return
            self.x_ref = [x.copy() for x in self.x]
        with np.errstate(invalid="ignore", over="ignore"):
            self.tune(*self.accumulate(gs))
        for i in range(len(self.x)):
            self.x[i] = self.round_x(self.unrounded(i))

    def accumulate(self, gs):
        """The four sums of every scale from the old Δ and the weights before the step; Δ += u."""
        g_delta, x_delta, gg, xx = np.zeros((4, len(self.s)))
        for i, (g, x) in enumerate(zip(gs, self.x, strict=True)):
            k = self.row[i]
            x_delta[k] += self.dot(x, self.delta[i])
            xx[k] += self.dot(x, x)
            if g is None:
                continue
            g_delta[k] += self.dot(g, self.delta[i])
            gg[k] += self.dot(g, g)
            g = np.where(np.isfinite(g), g, self.dtype(0))
            options = {**self.options[i], "lr": self.options[i]["lr"] * self.lr_factor}
            self.delta[i] = self.delta[i] + self.base(g, x, self.state[i], **options)
        return g_delta, x_delta, gg, xx

    def tune(self, g_delta, x_delta, gg, xx):
        beta, n = self.betas, len(self.betas)
        decay = self.s_decay * self.scale * np.sqrt(gg) / (np.sqrt(xx) + self.eps)
        h = g_delta + decay * x_delta
        finite = np.isfinite([h, g_delta, x_delta, gg, xx]).all(axis=0)
        self.nonfinite_steps += int(not finite.all())
        for k in np.flatnonzero(finite):
            m_prev, s_prev = self.m[k].copy(), self.s[k].copy()
            h_hat = np.clip(h[k], -m_prev, m_prev) if self.variant["clamp_h"] else h[k]
            self.m[k] = np.maximum(beta * m_prev, abs(h[k]) + self.variant["eps_in_m"] * self.eps)
            self.v[k] = beta**2 * self.v[k] + h[k] ** 2
            r = beta * self.r[k] - h_hat * s_prev
            self.r[k] = np.maximum(0, r) if self.variant["floor_r"] else r
            wealth = self.s_init / n * self.m[k] + np.maximum(0, r)
            s = wealth / (np.sqrt(self.v[k]) + self.eps)
            part = self.lr_factor if self.variant is VARIANTS["annealed"] else 1.0
            self.s[k] = part * s + (1 - part) * s_prev
