"""Random programs of jax.numpy and lax: gradients equal those of a reference that uses only JAX's derivatives.

A program consists of closures that ask ``env`` for parameters and products. So the same program runs as it is, for wmkp,
and as the reference. In the reference each product of a weight expression T(W) with an activation a has the value
``op(a, T(W))``. Its derivative by a reads T(B). Its derivatives by W and B are those of T(W) and T(B). This is
equations 3, 4 and 15 for every use, by stop_gradient alone.

Other programs may contain a product that B cannot follow. wmkp must refuse such a program if an error passes the
product. A numerical test tells hand-written products that are only gains from those that carry errors back.

This command runs a thousand programs of each kind. Each seed gives others. The statistics count the refused ones:
``FUZZ_EXAMPLES=1000 pytest -n 0 -m slow tests/test_fuzz.py --hypothesis-seed=1 --hypothesis-show-statistics``
"""

import itertools
import math
import os
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, event, given, note, settings
from hypothesis import strategies as st
from jax import lax

import wmkp

pytestmark = pytest.mark.usefixtures("quick_compile")

stop = lax.stop_gradient
N = 3  # samples


@pytest.fixture(scope="module", autouse=True)
def double():
    """Turns float64 on for this module."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


class Env:
    """Gives a program its parameters and computes its products."""

    def __init__(self, params, feedback=None, data=None):
        self.params, self.feedback, self.data = params, feedback, data

    def inside(self, slices):
        """The environment inside a scan, with slices of (W, B) in place of stacked parameters."""
        feedback = None if self.feedback is None else {**self.feedback, **slices[1]}
        return Env({**self.params, **slices[0]}, feedback, self.data)

    def product(self, op, a, weight):
        w = weight(self.params, self.data)
        if self.feedback is None:
            return op(a, w)
        b = weight(self.feedback, self.data)
        back, learn = op(a, stop(b)), op(stop(a), b)
        return op(stop(a), w) + (back - stop(back)) + (learn - stop(learn))


class Builder:
    """Draws programs. Each method returns a function, and ``self.text`` records what was drawn."""

    def __init__(self, draw, wild):
        self.draw, self.shapes, self.text, self.wild = draw, {}, [], wild
        self.must_refuse = False
        self.gain = False  # whether the last hand-written product is a gain
        self.selected = False  # whether data selects from the current weight
        self.rng = np.random.default_rng(draw(st.integers(0, 2**20)))
        self.active = False  # whether the current activation depends on a parameter
        self.drawn = 0  # how often a parameter was taken
        self.names = set()  # the parameters of the current weight
        self.chosen, self.again = set(), set()  # parameters that data selects from, and shared parameters

    def choose(self, *options):
        return self.draw(st.sampled_from(options))

    def constant(self, *shape):
        return self.rng.normal(size=shape)

    # --- parameters and weight expressions, functions (params, data) -> array

    def param(self, shape, stack=None):
        self.drawn += 1
        same = [n for n, (s, k) in self.shapes.items() if s == shape and k == stack]
        if same and self.draw(st.integers(0, 4)) == 0:
            name = self.choose(*same)  # shared
            self.again.add(name)
        else:
            name = f"p{len(self.shapes)}"
            self.shapes[name] = (shape, stack)
        self.names.add(name)
        return lambda p, d: p[name]

    def weight(self, shape, depth=0, stack=None):
        """A weight expression of this shape that B can follow."""
        if depth >= 3 or self.draw(st.integers(0, 2)) == 0:
            return self.param(shape, stack)
        inner = lambda s: self.weight(tuple(s), depth + 1, stack)
        kind = self.choose(
            "transpose", "reshape", "slice", "concatenate", "pad", "scale", "mask", "where", "where2", "sum", "shift", "neg",
            "cast", "rev", "broadcast", "index", "dynamic", "take", "data index", "roll", "jit", "cond", "barrier", "div",
            "split", "stack", "remat", "data mask", "squeeze", "difference", "swap", "take_along", "unstack", "identity vmap", "norm",
        )  # fmt: skip
        selects = kind in ("data mask", "data index", "dynamic", "cond")
        if (selects and sum(n > 1 for n in shape) < 2) or (kind == "broadcast" and self.selected):
            kind = "neg"  # wmkp treats a weight of one axis that data selects from as a gain
        self.selected |= selects
        self.text.append(kind)
        axis = self.draw(st.integers(0, len(shape) - 1))
        size = shape[axis]
        grown = lambda by: [s + by * (i == axis) for i, s in enumerate(shape)]
        without = [s for i, s in enumerate(shape) if i != axis] or [1]
        c, order = self.constant(*shape), self.rng.permutation(size)
        mask, start, half = c > 0, int(self.rng.integers(3)), int(self.rng.integers(2))
        axes = self.rng.permutation(len(shape)).tolist()
        double = lambda w: 2 * w
        norm = lambda w: jnp.sqrt(0.1 + jnp.sum(w**2))
        same = {
            "scale": lambda w, d: w * (2.0, -0.5, c, c.reshape(-1, shape[-1])[0])[start + half], "div": lambda w, d: w / 3.0,
            "mask": lambda w, d: w * mask, "where": lambda w, d: jnp.where(mask, w, 0.1), "shift": lambda w, d: w + c,
            "data mask": lambda w, d: jnp.where(d["flag"] > 0, w, -w), "neg": lambda w, d: -w,
            "cast": lambda w, d: w.astype(jnp.float32).astype(jnp.float64), "rev": lambda w, d: jnp.flip(w, axis),
            "take": lambda w, d: jnp.take(w, order, axis=axis), "roll": lambda w, d: jnp.roll(w, 1, axis),
            "take_along": lambda w, d: jnp.take_along_axis(w, np.argsort(c, axis), axis=axis),
            "identity vmap": lambda w, d: jax.vmap(double)(w), "barrier": lambda w, d: lax.optimization_barrier(w),
        }  # fmt: skip
        two = {
            "where2": lambda v, w: jnp.where(mask, v, w), "sum": lambda v, w: v + w, "difference": lambda v, w: v - 2 * w
        }  # fmt: skip
        other = {  # made of a weight of another shape
            "transpose": ([shape[i] for i in np.argsort(axes)], lambda w, d: w.transpose(axes)),
            "reshape": ([math.prod(shape)] if half else [*shape[:-2], *shape[:-3:-1]], lambda w, d: w.reshape(shape)),
            "slice": (grown(2), lambda w, d: lax.slice_in_dim(w, start, start + size, axis=axis)),
            "squeeze": ([*shape[:axis], 1, *shape[axis:]], lambda w, d: jnp.squeeze(w, axis)),
            "index": ([2, *shape], lambda w, d: w[(0, 1, -1)[start]]), "unstack": ([2, *shape], lambda w, d: sum(w)),
            "data index": ([4, *shape], lambda w, d: w[d["k"]]),
            "dynamic": (grown(2), lambda w, d: lax.dynamic_slice_in_dim(w, d["k"] % 3, size, axis)),
            "split": (grown(size), lambda w, d: jnp.split(w, 2, axis)[half]),
            "broadcast": (without, lambda w, d: jnp.broadcast_to(
                w if len(shape) == 1 else jnp.expand_dims(w, axis), shape)),
        }  # fmt: skip
        if size > 1:
            other["pad"] = grown(-1), lambda w, d: jnp.pad(w, [(int(i == axis), 0) for i in range(len(shape))])
        if len(shape) > 1:
            other["swap"] = [*shape[:-2], shape[-1], shape[-2]], lambda w, d: jnp.swapaxes(w, -1, -2)
        if kind in same:
            w = inner(shape)
            return lambda p, d: same[kind](w(p, d), d)
        if kind in two:
            v, w = inner(shape), inner(shape)
            return lambda p, d: two[kind](v(p, d), w(p, d))
        if kind in other:
            w = inner(other[kind][0])
            return lambda p, d: other[kind][1](w(p, d), d)
        if kind in ("jit", "remat"):
            w, around = inner(shape), jax.jit if kind == "jit" else jax.checkpoint
            return lambda p, d: around(lambda p, d: 2 * w(p, d))(p, d)
        if kind == "cond":
            v, w = inner(shape), inner(shape)
            return lambda p, d: lax.cond(d["flag"] > 0, lambda: v(p, d), lambda: -w(p, d))
        if kind == "concatenate" and size > 1:
            v, w = inner(grown(1 - size)), inner(grown(-1))
            return lambda p, d: jnp.concatenate([v(p, d), w(p, d)], axis)
        if kind == "stack" and size == 2:
            v, w = inner(without), inner(without)
            return lambda p, d: jnp.stack([v(p, d), w(p, d)], axis).reshape(shape)
        if kind == "norm" and math.prod(shape) > 1:
            before, self.selected = self.selected, False
            w = inner(shape)
            static, self.selected = not self.selected, before or self.selected
            # A norm that depends on data is not recomputed for B, so leave it out.
            return lambda p, d: w(p, d) / norm(w(p, d)) if static else w(p, d)
        return self.param(shape, stack)

    # --- blocks, functions (env, a of shape (N, size)) -> array of shape (N, other size)

    def product(self, size, out, stack=None):
        kind = self.choose(
            "dot", "einsum", "left", "tensordot", "vmap", "heads", "groups", "conv", "depthwise", "conv left"
        )
        self.text.append(f"{kind} {size}->{out}")
        if kind == "groups" and size >= 4 and out >= 4:
            shape = (2, size // 2, out // 2)
            op = lambda a, w: jnp.einsum("ngi,gio->ngo", a.reshape(N, 2, -1), w).reshape(N, out)
        elif kind == "heads" and out % 2 == 0:
            shape = (size, 2, out // 2)
            op = lambda a, w: jnp.einsum("ni,ihk->nhk", a, w).reshape(N, out)
        elif kind == "conv" and out % size == 0:
            shape = (out // size, 1, 3)
            op = lambda a, w: lax.conv_general_dilated(a[:, None], w, (1,), "SAME").reshape(N, out)
        elif kind == "depthwise" and size % 2 == 0 and out == size:
            shape = (2, 1, 3)
            op = lambda a, w: lax.conv_general_dilated(
                a.reshape(N, 2, -1), w, (1,), "SAME", rhs_dilation=(2,), feature_group_count=2
            ).reshape(N, out)
        elif kind == "tensordot":
            shape = (out, size)
            op = lambda a, w: jnp.tensordot(a, w, ((1,), (1,)))
        elif kind == "left":
            shape = (out, size)
            op = lambda a, w: (w @ a.T).T
        elif kind == "vmap":
            shape = (size, out)
            op = lambda a, w: jax.vmap(lambda row: row @ w)(a)
        elif kind == "einsum":
            shape = (out, size)
            op = lambda a, w: jnp.einsum("ni,oi->no", a, w)
        else:
            shape = (size, out)
            op = jnp.dot
        self.selected, self.names = False, set()
        weight = self.weight(shape, stack=stack)
        self.chosen |= self.names if self.selected else set()
        if self.wild and self.draw(st.integers(0, 3)) == 0:
            op, weight = self.unfollowable(op, weight, shape, size, out)
        self.active = True
        if self.gain:  # a gain is no projection and passes the error as in backprop
            self.gain = False
            return lambda env, a: op(a, weight(env.params, env.data))
        return lambda env, a: env.product(op, a, weight)

    def unfollowable(self, op, weight, shape, size, out):
        """A product that B cannot follow or that no product primitive makes, or a linear map that B can follow."""
        whole, other = self.param(shape), self.param(shape)  # a factor for each neuron would be a gain of the weight
        square, mixing = self.param((shape[0], shape[0])), self.constant(shape[0], shape[0])
        changed = {
            "tanh": lambda p, d: jnp.tanh(weight(p, d)),
            "matmul": lambda p, d: jnp.tensordot(square(p, d), weight(p, d), 1),
            "product": lambda p, d: (weight(p, d) + whole(p, d)) * other(p, d),
            "sort": lambda p, d: jnp.sort(weight(p, d), 0),
            "square": lambda p, d: weight(p, d) ** 2,
            "max": lambda p, d: jnp.maximum(weight(p, d), 0.0),
            "scan": lambda p, d: lax.scan(lambda c, _: (jnp.sin(c), None), weight(p, d), None, 2)[0],
        }
        linear = {
            "mixing": lambda p, d: jnp.tensordot(mixing, weight(p, d), 1),
            "cumsum": lambda p, d: jnp.cumsum(weight(p, d), 0),
            "centred": lambda p, d: weight(p, d) - jnp.sum(weight(p, d), 0),
        }
        matrix = self.param((size, out))
        by_hand = {
            "sum": lambda a, w: (a[:, :, None] * w).sum(1),
            "sum, transposed": lambda a, w: (a[:, :, None] * w).transpose(1, 0, 2).sum(0),
            "sum, other order": lambda a, w: (w.T[None] * a[:, None]).sum(2),
            "sum, reshaped": lambda a, w: (a[:, :, None] * w).reshape(N, size, out, 1).sum(1)[..., 0],
            "sum, shifted": lambda a, w: (a[:, :, None] * w + 1.0).sum(1),
            "sum, scaled": lambda a, w: (2.0 * (a[:, :, None] * w)).sum(1),
            "sum, masked": lambda a, w: jnp.where(np.arange(size)[:, None] >= 0, a[:, :, None] * w, 0).sum(1),
            "mean": lambda a, w: (a[:, :, None] * w).mean(1),
            "broadcast first": lambda a, w: (jnp.tanh(jnp.broadcast_to(a[:, :, None], (N, size, out))) * w).sum(1),
            "tanh": lambda a, w: jnp.tanh(a[:, :, None] * w).sum(1),
            "running sum": lambda a, w: jnp.cumsum(jnp.sin(a)[:, :, None] * w, 1)[:, -1],
            "greatest": lambda a, w: (a[:, :, None] * w).max(1),
            "quotient": lambda a, w: (a[:, :, None] / (w + 3.0)).sum(1),
            "contracted": lambda a, w: jnp.einsum("nio,i->no", a[:, :, None] * w, np.arange(1.0, size + 1)),
            "repeated": lambda a, w: jnp.tanh(jnp.repeat(a, out, 1) * w.reshape(-1)).reshape(N, size, out).sum(1),
            "rows": lambda a, w: sum(jnp.tanh(a[:, i : i + 1] * w[i]) for i in range(size)),
            "scanned rows": lambda a, w: lax.scan(
                lambda c, row: (c + jnp.tanh(row[0][:, None] * row[1]), None), jnp.zeros((N, out)), (a.T, w)
            )[0],
            "vmap": lambda a, w: jax.vmap(lambda r: jax.vmap(lambda c: (r * c).sum(), 1)(w))(a),
            "fft": lambda a, w: jnp.fft.irfft(jnp.fft.rfft(a)[:, :, None] * jnp.fft.rfft(w, axis=0), size, axis=1)[
                :, 0
            ],
            "tanh of all": lambda a, w: jnp.tanh(a[:, :, None] * w).reshape(N, -1)[:, :out],
            "gelu": lambda a, w: jax.nn.gelu(w.T * a[:, None]).sum(2),
            "outer": lambda a, w: jnp.tanh(jnp.einsum("nj,k->njk", a, np.ones(out)) * w).sum(1),
            "edges": lambda a, w: (
                jax.ops.segment_sum(
                    a.T[np.arange(size * out) // out] * w.reshape(-1, 1), np.arange(size * out) % out, out
                ).T
            ),
            "gain": lambda a, w: jnp.tanh((a * w[:, 0])[:, :, None] + np.ones(out)).sum(1),
            "scatter, gain": lambda a, w: jnp.sin(a.at[0].mul(2.0) * w[:, 0]) @ np.ones((size, out)),
        }
        kind = self.choose(
            *(("weight", k) for k in changed), *(("linear", k) for k in linear), *(("hand", k) for k in by_hand)
        )
        if kind[0] == "linear":
            self.text.append(str(kind))
            return op, linear[kind[1]]
        if kind[1] == "matmul" and self.selected:
            kind = ("weight", "tanh")  # a selected weight times a parameter looks like activities (docs, Limits)
        if kind[0] == "hand" and not self.fans_out(by_hand[kind[1]], size, out):
            self.text.append(f"{kind}, a gain")
            self.gain = True
            return by_hand[kind[1]], matrix
        self.text.append(f"UNFOLLOWABLE {kind}, active {self.active}")
        self.must_refuse |= self.active and (kind[0] == "weight" or min(size, out) > 1)  # (one axis: docs, Limits)
        if kind[0] == "weight":
            return op, changed[kind[1]]
        return by_hand[kind[1]], matrix

    def fans_out(self, op, size, out):
        """Whether W carries a neuron's errors back by more than one sum that varies with W, found numerically.

        The activities are zero, so that W does not enter the state of any neuron after it.
        """
        error = jax.jacobian(lambda a, w: op(jnp.zeros((N, size)).at[0].set(a), w)[0])
        errors = jax.jit(jax.vmap(error, (None, 0)))(np.zeros(size), self.constant(4, size, out))
        changes = np.asarray(errors[1:] - errors[0])  # (draws of W, out, size)
        return any(np.linalg.matrix_rank(changes[:, :, j], 1e-9) > 1 for j in range(size))

    def local(self, size):
        """A block that is no projection: a bias, a gain, a nonlinearity or another operation on activations."""
        kind = self.choose(
            "bias", "gain", "gelu", "relu", "layer norm", "softmax", "attention", "sort", "cumsum", "permute", "dynamic slice",
            "pad", "where", "max", "custom_jvp", "custom_vjp", "embedding", "gated", "logsumexp", "prelu", "clip", "while",
            "stop", "layout", "segment", "embedding sum", "outer", "thresholds", "gain first", "bias of a part",
        )  # fmt: skip
        self.text.append(kind)
        v = (
            self.param((size,))
            if kind in ("bias", "gain", "layer norm", "prelu", "gain first", "bias of a part")
            else None
        )
        if kind == "bias":
            return lambda env, a: a + v(env.params, env.data)
        if kind == "gain":
            return lambda env, a: a * v(env.params, env.data)
        if kind == "layer norm":
            return lambda env, a: (
                (a - a.mean(1, keepdims=True)) * lax.rsqrt(a.var(1, keepdims=True) + 0.1) * v(env.params, env.data)
            )
        if kind == "prelu":
            return lambda env, a: jnp.where(a > 0, a, a * v(env.params, env.data))
        if kind == "gain first":  # the order of factors in normalizations
            return lambda env, a: (lax.rsqrt(a.var(1, keepdims=True) + 0.1) * v(env.params, env.data)) * a
        if kind == "bias of a part":
            return lambda env, a: a.at[0].add(v(env.params, env.data))
        if kind == "thresholds":
            matrix = self.param((size, 3))
            return lambda env, a: jnp.tanh(a[:, :, None] + matrix(env.params, env.data)).sum(2)
        if kind in ("embedding", "embedding sum"):
            self.active = True
            e = self.param((5, size))
            if kind == "embedding":
                return lambda env, a: a + e(env.params, env.data)[env.data["ids"]]
            return lambda env, a: a + e(env.params, env.data)[env.data["ids"][:, None] % np.arange(1, 3)].sum(1)
        relu7 = jax.custom_jvp(lambda x: jnp.clip(x, -1, 1))
        relu7.defjvp(lambda x, t: (relu7(*x), 7 * t[0]))
        through = jax.custom_vjp(lambda x: jnp.sign(x) + x)
        through.defvjp(lambda x: (through(x), x), lambda x, g: (g * jnp.cos(x),))
        order = self.rng.permutation(size)
        mask = self.constant(N, size) > 0

        def attention(a):
            s = a.reshape(N, size, 1)
            return (jax.nn.softmax(s @ s.swapaxes(1, 2), -1) @ s).reshape(N, size)

        functions = {
            "gelu": jax.nn.gelu, "relu": jax.nn.relu, "softmax": jax.nn.softmax, "attention": attention,
            "sort": lambda a: jnp.sort(a, 1), "cumsum": lambda a: jnp.cumsum(a, 1), "permute": lambda a: a[:, order],
            "pad": lambda a: jnp.pad(a, ((0, 0), (1, 0)))[:, :-1] + a, "where": lambda a: jnp.where(mask, a, jnp.sin(a)),
            "max": lambda a: jnp.maximum(a, a.max(0)), "custom_jvp": relu7, "custom_vjp": through,
            "gated": lambda a: a * jax.nn.sigmoid(a[:, order]), "logsumexp": lambda a: a - jax.nn.logsumexp(a, 1, keepdims=True),
            "clip": lambda a: jnp.clip(a, -0.7, 0.7), "stop": lambda a: a + stop(a[:, ::-1]),
            "layout": lambda a: a.T.reshape(-1, N).T, "segment": lambda a: jax.ops.segment_sum(a, np.arange(N) % 2, N),
            "outer": lambda a: (a[:, :, None] * a[:, None]).sum(2),
            "while": lambda a: a + lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, jnp.sin(c[1])), (0, stop(a)))[1],
        }  # fmt: skip
        if kind == "dynamic slice":
            return lambda env, a: lax.dynamic_slice(jnp.concatenate([a, a * a], 1), (0, env.data["k"]), (N, size))
        return lambda env, a: functions[kind](a)

    def block(self, size, depth=0):
        """Draws a block and returns it with the size of its output."""
        kind = self.choose(
            "product", "product", "product", "local", "local", "chain", "residual", "concatenate", "remat", "jit", "scan",
            "recurrent", "cond", "switch", "fori", "vmap", "twice", "outputs scanned", "frozen",
        ) if depth < 3 else self.choose("product", "local")  # fmt: skip
        if kind == "product":
            out = self.choose(2, 4, 6, size)
            return self.product(size, out), out
        if kind == "local":
            return self.local(size), size
        self.text.append(kind + "(")
        result = self.nested(kind, size, depth)
        self.text.append(")")
        return result

    def same_size(self, size, depth):
        """A block that keeps the size."""
        f, out = self.block(size, depth + 1)
        if out == size:
            return f
        g = self.product(out, size)
        return lambda env, a: g(env, f(env, a))

    def nested(self, kind, size, depth):
        if kind == "chain":
            f, middle = self.block(size, depth + 1)
            g, out = self.block(middle, depth + 1)
            return (lambda env, a: g(env, f(env, a))), out
        if kind == "concatenate":
            before = self.active
            f, one = self.block(size, depth + 1)
            after, self.active = self.active, before
            g, two = self.block(size, depth + 1)
            self.active |= after
            return (lambda env, a: jnp.concatenate([f(env, a), g(env, a)], 1)), one + two
        if kind in ("scan", "outputs scanned"):
            self.active = True  # from the second step on, because of the product
            product, local = self.product(size, size, stack=2), self.local(size)
            names = [n for n, (_, k) in self.shapes.items() if k == 2]

            def scanned(env, a):
                sliced = lambda tree: {} if tree is None else {n: tree[n] for n in names}
                step = lambda h, s: ((y := jnp.tanh(local(env, product(env.inside(s), h)))), y)
                h, ys = lax.scan(step, a, (sliced(env.params), sliced(env.feedback)))
                return h if kind == "scan" else ys.sum(0)

            return scanned, size
        if kind in ("recurrent", "fori"):
            before, drawn = self.active, self.drawn
            self.active = True  # from the second step on, if a parameter is drawn
            f = self.same_size(size, depth)
            self.active = before or self.drawn > drawn
            if kind == "fori":
                return (lambda env, a: lax.fori_loop(0, 2, lambda i, h: jnp.tanh(f(env, h)), a)), size
            return (lambda env, a: lax.scan(lambda h, _: (jnp.tanh(f(env, h)), None), a, None, 2)[0]), size
        if kind in ("cond", "switch"):
            before = self.active
            f = self.same_size(size, depth)
            after, self.active = self.active, before
            g = self.same_size(size, depth)
            self.active |= after
            if kind == "cond":
                return (lambda env, a: lax.cond(env.data["flag"] > 0, lambda: f(env, a), lambda: g(env, a))), size
            return (
                lambda env, a: lax.switch(env.data["k"] % 3, [lambda: f(env, a), lambda: g(env, a), lambda: a])
            ), size
        f, out = self.block(size, depth + 1)
        if kind == "residual" and out == size:
            return (lambda env, a: a + f(env, a)), size
        if kind == "remat":
            return (
                lambda env, a: jax.checkpoint(lambda p, b, a: f(Env(p, b, env.data), a))(env.params, env.feedback, a)
            ), out
        if kind == "jit":
            return (
                lambda env, a: jax.jit(lambda p, b, d, a: f(Env(p, b, d), a))(env.params, env.feedback, env.data, a)
            ), out
        if kind == "vmap":
            return (lambda env, a: jax.vmap(lambda a: f(env, a))(jnp.stack([a, 2 * a])).sum(0)), out
        if kind == "twice" and out == size:
            return (lambda env, a: f(env, jnp.tanh(f(env, a)))), out
        if kind == "frozen":
            return (lambda env, a: f(env, stop(a)) + f(env, a)), out
        return f, out


class Program:
    """A random ``loss(env, x)`` with its parameters, its data and a text of its parts."""

    def __init__(self, draw, wild):
        builder = Builder(draw, wild)
        size = builder.choose(2, 4)
        blocks, first = [], size
        for _ in range(draw(st.integers(1, 4))):
            f, size = builder.block(size)
            blocks.append(f)
            builder.text.append(";")
        head = builder.product(size, 2)

        def loss(env, x):
            for f in blocks:
                x = f(env, x)
            return jnp.mean(jnp.sin(head(env, x)) + 0.1 * head(env, x) ** 2)

        self.loss, self.must_refuse, self.text = loss, builder.must_refuse, " ".join(builder.text)
        self.partly = builder.chosen & builder.again
        rng = builder.rng
        full = {n: (shape if stack is None else (stack, *shape)) for n, (shape, stack) in builder.shapes.items()}
        self.params = {n: rng.normal(size=s) / 1.5 for n, s in full.items()}
        self.feedback = {n: rng.normal(size=s) / 1.5 for n, s in full.items()}
        self.x = rng.normal(size=(N, first))
        self.data = {
            "flag": np.asarray(rng.normal()), "k": np.asarray(rng.integers(0, 4)), "ids": rng.integers(0, 5, N)
        }  # fmt: skip

    def __repr__(self):
        return f"{self.text}\n{ {n: x.shape for n, x in self.params.items()} }"

    def fun(self, params, x, data):
        return self.loss(Env(params, None, data), x)

    def reference(self, params, feedback, x, data):
        return self.loss(Env(params, feedback, data), x)


@st.composite
def programs(draw, wild=False):
    return Program(draw, wild)


KP = wmkp.kolen_pollack()
LARGE = int(os.environ.get("FUZZ_EXAMPLES", "0"))
COUNT = itertools.count(1)


def close(ours, theirs, what):
    # The tolerance allows for casts of weights to float32.
    for name in theirs:
        if ours[name] is not None:
            size = 1e-3 + np.max(np.abs(theirs[name]))
            np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=1e-6 * size, err_msg=f"{what} of {name}")


def check(program):
    note(repr(program))
    if LARGE and next(COUNT) % 50 == 0:
        jax.clear_caches()  # keeps memory constant
    args = program.x, program.data
    try:
        entries = jax.eval_shape(partial(wmkp.init_feedback, jax.random.key(0), KP, program.fun), program.params, *args)
    except wmkp.WeightTransportError as error:
        event("refused")
        assert "params[" in str(error) and "backprop()" in str(error)
        strict = "two parameters that data has touched" in str(error)  # a learned lookup meets a selected weight
        strict |= "of a weight with gains" in str(error) and "norm" in program.text.split()  # such as joined weights
        # A number over its norm is its sign.
        alone = {name for name, w in program.params.items() if w.size == 1}
        strict |= (
            "'integer_pow'" in str(error)
            and "norm" in program.text.split()
            and any(f"params['{name}']" in str(error) for name in alone)
        )
        # The outer product sums activities that a norm has just scaled, so the scale acts as a sum's weights.
        strict |= "mul by copies of an activation" in str(error) and {"norm", "outer"} <= {*program.text.split()}
        strict |= "element by element" in str(error) and "a gain" in program.text  # the gain is a column of a matrix
        # The mean or variance of a norm sums what a gain has just scaled (docs, troubleshooting).
        strict |= "mul, then reduce_sum" in str(error) and not {"layer", "first"}.isdisjoint(program.text.split())
        # A hand-written gain leaves equal sums for all neurons, and the weights of the next product fan them out.
        strict |= "mul by copies of an activation" in str(error) and "('hand', 'gain'), a gain" in program.text
        assert strict or "UNFOLLOWABLE" in program.text, f"refused: {error}"
        return
    except ValueError as error:  # all products are hand-written and no error passes them, or they are gains
        assert "no projection" in str(error) and "'hand'" in program.text and not program.must_refuse
        return
    event("accepted")
    value, expected = jax.jit(jax.value_and_grad(program.fun))(program.params, *args)
    gradient = jax.jit(wmkp.value_and_grad(program.fun, KP))
    mirrored = {n: w if entries[n] is not None else None for n, w in program.params.items()}
    ours, (grads, _) = gradient(program.params, mirrored, *args)
    np.testing.assert_allclose(ours, value, rtol=1e-12)
    close(grads, expected, "with B = W, the gradient")
    assert not program.must_refuse, "weights were transported in silence"
    if "UNFOLLOWABLE" in program.text:  # the product acts on data alone and has no effect on errors
        return
    feedback = {n: b if entries[n] is not None else None for n, b in program.feedback.items()}
    _, (grads, signal) = gradient(program.params, feedback, *args)
    filled = {n: np.zeros(program.params[n].shape) if b is None else b for n, b in feedback.items()}
    expected, learned = jax.jit(jax.grad(program.reference, argnums=(0, 1)))(program.params, filled, *args)
    close(grads, expected, "the gradient")
    if None in entries.values():  # data may mix a shared parameter with one that has no B (docs, Limits)
        learned = {n: x for n, x in learned.items() if n not in program.partly}
    close(signal, learned, "the signal")


SETTINGS = settings(
    deadline=None,
    derandomize=not LARGE,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.slow
@settings(SETTINGS, max_examples=LARGE or 5)
@given(programs())
def test_random_programs(program):
    check(program)


@pytest.mark.slow
@settings(SETTINGS, max_examples=LARGE or 8)
@given(programs(wild=True))
def test_random_programs_that_feedback_cannot_always_follow(program):
    check(program)


@pytest.mark.slow
@settings(SETTINGS, max_examples=LARGE or 12)
@given(programs())
def test_orthogonal_noise_mirrors_random_programs_exactly(program):
    """Orthogonal noise gives back the used entries of every weight exactly, or mirror mode raises an error."""
    note(repr(program))
    if LARGE and next(COUNT) % 50 == 0:
        jax.clear_caches()
    args = program.fun, program.params, program.x, program.data
    whole = math.lcm(720, *(p.fan_in for p in wmkp.projections(*args).values()))  # a multiple of every fan_in
    try:
        rule = wmkp.weight_mirror(noise="orthogonal", num_samples=whole)
        found = jax.jit(partial(wmkp.mirror_signals, jax.random.key(0), rule, program.fun))(*args[1:])
    except wmkp.WeightTransportError:  # sums of weights, and weights that data selects
        event("refused")
        return
    event("mirrored")
    for name, signal in found.items():
        if signal is not None:
            used = np.abs(signal) > 1e-9
            np.testing.assert_allclose(np.asarray(signal)[used], np.asarray(program.params[name])[used], atol=1e-6)
