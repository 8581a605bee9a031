"""Record what optax.contrib.mechanize does, for core/test_goldens.py: the tests need no optax.

    python3 -m venv optax && optax/bin/pip install optax
    optax/bin/python tests/support/record_optax.py

The problem is a two-layer tanh network with its gradient written out, so that the test can take the
same steps without jax. ε = 1e-14 because optax recomputes Δ as (x − x_ref)/(S + ε): with its
default of 1e-8 that alone moves Σs by up to 1 %.
"""

import json
import sys
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parents[1] / "core" / "goldens" / "optax.json"
STEPS = 200
EPS = 1e-14
X_AT = (25, 50, 100, 200)  # steps after which the weights are kept

# Options by torch's names; optax's follow in `base_of`.
CASES = {
    "sgd": {"lr": 0.05},
    "momentum": {"lr": 0.05, "momentum": 0.9},
    "nesterov": {"lr": 0.05, "momentum": 0.9, "nesterov": True},
    "adam": {"lr": 1.0, "betas": [0.9, 0.999], "eps": 1e-8},
    "adamw": {"lr": 1.0, "betas": [0.9, 0.99], "eps": 1e-8, "weight_decay": 0.05},
}


def start():
    """Return the weights before the first step: the layers (4, 3) and (4,)."""
    i = np.arange(16, dtype=np.float64)
    w = np.sin(1.7 * i + 0.3)
    return [w[:12].reshape(4, 3), 0.5 * w[12:]]


def gradient(weights, t):
    """Return that of ½·mean((tanh(z Aᵀ) b − y)²) over twelve points z at step t.

    The targets y swing with t, as batches do: on a problem that can be solved, h falls to the
    rounding noise and then two equal programs part (Σs by 1e-1 after 130 steps of AdamW here).
    """
    a, b = weights
    k = np.arange(36, dtype=np.float64).reshape(12, 3)
    z = np.cos(0.9 * k + 0.1 * k**2)
    y = np.sin(3.0 * z[:, 0]) + z[:, 1] * z[:, 2] + np.cos(1.3 * t + k[:, 0])
    hidden = np.tanh(z @ a.T)
    error = (hidden @ b - y) / len(y)
    return [((error[:, None] * b) * (1 - hidden**2)).T @ z, hidden.T @ error]


def base_of(name, options):
    import optax

    o = dict(options)
    if name in ("adam", "adamw"):
        o["b1"], o["b2"] = o.pop("betas")
    make = {"adam": optax.adam, "adamw": optax.adamw}.get(name, optax.sgd)
    return make(o.pop("lr"), **o)


def record(name):
    import jax.numpy as jnp
    import optax

    weights = [jnp.asarray(w) for w in start()]
    mechanic = optax.contrib.mechanize(base_of(name, CASES[name]), eps=EPS)
    state = mechanic.init(weights)
    scale, x = [], {}
    for t in range(1, STEPS + 1):
        g = [jnp.asarray(g) for g in gradient([np.asarray(w) for w in weights], t)]
        updates, state = mechanic.update(g, state, weights)
        weights = optax.apply_updates(weights, updates)
        scale.append(float(state.s.sum()))
        if t in X_AT:
            x[t] = np.concatenate([np.asarray(w).ravel() for w in weights]).tolist()
    return {"options": CASES[name], "scale": scale, "x": x}


def main():
    import jax
    import optax

    jax.config.update("jax_enable_x64", True)
    made_with = {
        "python": sys.version.split()[0],
        "optax": optax.__version__,
        "jax": jax.__version__,
        "dtype": "float64",
        "eps": EPS,
        "weight_decay": 0.01,
        "s_init": 1e-6,
    }
    record_of = {"made with": made_with, **{name: record(name) for name in CASES}}
    lines = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in record_of.items())
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
