"""Steps compiled for other devices, and counts from a compiled program's text."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import benchmarks
import wmkp
from benchmarks import compiled, hlo
from benchmarks.targets import TARGETS
from wmkp import noise

S = jax.ShapeDtypeStruct


def text_of(fun, *args):
    return hlo.parse(jax.jit(fun).lower(*args).compile().as_text())


def test_products_and_their_operations_are_counted():
    """Products in plain code, in a loop and as a convolution are counted. XLA gives the same count for the first."""
    x, w, image, kernel = jnp.ones((8, 16)), jnp.ones((16, 4)), jnp.ones((1, 6, 6, 3)), jnp.ones((3, 3, 3, 5))
    dot = jax.jit(jnp.dot).lower(x, w)
    program = hlo.parse(dot.compile().as_text())
    assert hlo.products(program) == {"convolution": 0, "dot": 1, "library": 0}
    assert hlo.flops(program) == 2 * 8 * 16 * 4 == dot.cost_analysis()["flops"]
    three_times = lambda x, w: jax.lax.fori_loop(0, 3, lambda i, y: y + (x + i) @ w, jnp.zeros((8, 4)))
    assert hlo.flops(text_of(three_times, x, w)) == 3 * 2 * 8 * 16 * 4
    convolve = lambda x, w: jax.lax.conv_general_dilated(
        x, w, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    program = text_of(convolve, image, kernel)
    assert hlo.products(program)["convolution"] == 1 and hlo.flops(program) == 2 * 16 * 5 * 27


@pytest.mark.parametrize(
    ("target", "shapes"),
    [
        ("convForward", ("[8,6,6,4]", "[8,8,8,3]", "[4,3,3,3]")),
        ("convBackwardInput", ("[8,8,8,3]", "[8,6,6,4]", "[4,3,3,3]")),
        ("convBackwardFilter", ("[4,3,3,3]", "[8,8,8,3]", "[8,6,6,4]")),
    ],
)
def test_a_librarys_convolution_is_counted_in_all_three_directions(target, shapes):
    result, left, right = (f"bf16{shape}{{3,2,1,0}}" for shape in shapes)
    text = f"""
ENTRY %main (a: bf16[1], b: bf16[1]) -> bf16[1] {{
  %a = {left} parameter(0)
  %b = {right} parameter(1)
  ROOT %c = ({result}, u8[64]{{0}}) custom-call(%a, %b), dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn${target}"
}}
"""
    program = hlo.parse(text)
    assert hlo.products(program) == {"convolution": 0, "dot": 0, "library": 1}
    assert hlo.flops(program) == 2 * (8 * 6 * 6 * 4) * (3 * 3 * 3)
    numbers = [8 * 6 * 6 * 4, 8 * 8 * 8 * 3, 4 * 3 * 3 * 3]
    assert hlo.traffic(program) == 2 * sum(numbers) + 64


def test_a_librarys_matrix_product_is_counted():
    text = """
ENTRY %main (a: bf16[5,7], b: bf16[7,9]) -> bf16[5,9] {
  %a = bf16[5,7]{1,0} parameter(0)
  %b = bf16[7,9]{1,0} parameter(1)
  ROOT %c = (bf16[5,9]{1,0}, s8[64]{0}) custom-call(%a, %b), custom_call_target="__cublas$lt$matmul", backend_config={
"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}
}
""".replace("={\n", "={")
    program = hlo.parse(text)
    assert hlo.products(program)["library"] == 1 and hlo.flops(program) == 2 * 5 * 9 * 7


def test_collectives_are_counted_with_their_bytes():
    """An all-reduce of 4 KiB and an all-gather of 8 x 512 B each count once, with 4096 bytes."""
    mesh = Mesh(np.array(jax.devices()[:8]), ("d",))
    spec = PartitionSpec("d")
    x = jax.device_put(jnp.ones((8, 1024)), NamedSharding(mesh, spec))
    program = text_of(
        jax.shard_map(lambda x: jax.lax.psum(x, "d"), mesh=mesh, in_specs=spec, out_specs=PartitionSpec()), x
    )
    assert hlo.collectives(program) == {"all-reduce": {"count": 1, "bytes": 4096}}
    y = jax.device_put(jnp.ones((8, 128)), NamedSharding(mesh, spec))
    gather = lambda y: jax.lax.all_gather(y, "d", tiled=True)
    program = text_of(jax.shard_map(gather, mesh=mesh, in_specs=spec, out_specs=PartitionSpec(), check_vma=False), y)
    assert hlo.collectives(program) == {"all-gather": {"count": 1, "bytes": 4096}}


def test_asynchronous_operations_count_once_and_prefetches_are_no_copies():
    text = """
ENTRY %main (a: f32[4,8]) -> f32[4,8] {
  %a = f32[4,8]{1,0:T(8,128)} parameter(0)
  %start = (f32[4,8]{1,0:T(8,128)}, f32[32,8]{1,0:T(8,128)}) all-gather-start(%a), dimensions={0}
  %done = f32[32,8]{1,0:T(8,128)} all-gather-done(%start)
  %near = (f32[4,8]{1,0:T(8,128)S(1)}, f32[4,8]{1,0}, u32[]{:S(2)}) copy-start(%a)
  %there = f32[4,8]{1,0:T(8,128)S(1)} copy-done(%near)
  ROOT %whole = f32[4,8]{1,0:T(8,128)} copy(%there)
}
"""
    program = hlo.parse(text)
    assert hlo.collectives(program) == {"all-gather": {"count": 1, "bytes": 1024}}
    assert hlo.copies(program, {(4, 8)}) == {"all": 1, "bytes": 128, "of weights": 1, "weights' bytes": 128}
    assert hlo.copies(program, {(8, 4)})["of weights"] == 0
    # Of the prefetch and of the copy only the ends in main memory count, beside the gather's 1,280.
    assert hlo.traffic(program) == 1280 + 128 + 128


@dataclasses.dataclass
class Lowered:
    """A program that adds its text to a list at each compilation."""

    text: str
    compilations: list

    def as_text(self):
        return self.text

    def compile(self):
        self.compilations.append(self.text)
        return self.text


def figures(over=1.0):
    return {
        "flops": 100.0 * over, "bytes": 1000.0 * over, "temporaries": int(500 * over), "arguments": int(64 * over), "peak": 600,
        "products' flops": 100.0, "kernels' bytes": 1000.0, "products": {"dot": 3}, "copies": {"of weights": 0}, "collectives": {},
    }  # fmt: skip


def test_what_is_kept_is_not_compiled_again(tmp_path, monkeypatch):
    """A kept program is not compiled again, under its own name or another. A changed program is compiled."""
    compilations = []
    texts = {"BP": "backprop", "FA": "fa", "WM": "fa", "WM mirror": "mirror"}
    monkeypatch.setattr(compiled, "lowered", lambda target, name, step: Lowered(texts[step], compilations))
    monkeypatch.setattr(compiled.hlo, "figures", lambda *_: figures())
    for _ in range(2):
        kept = compiled.Kept(tmp_path / "tpu.json")
        for step in texts:
            compiled.measure(kept, "v5e", "ResNet-18", step)
        assert compilations == ["backprop", "fa", "mirror"]
    assert kept.programs["v5e: ResNet-18: WM"]["same as"] == "v5e: ResNet-18: FA"
    rows = {row.name: row for row in benchmarks.read(tmp_path / "tpu.json")}
    assert rows["v5e: ResNet-18: WM over BP, operations"].verdict == "pass"
    assert rows["v5e: ResNet-18: WM mirror step, bytes over those of engaged steps (1)"].verdict == "fail"
    texts["FA"] = "another"
    compiled.measure(kept, "v5e", "ResNet-18", "FA")
    assert compilations[3:] == ["another"]
    assert json.loads((tmp_path / "tpu.json").read_text())["programs"].keys() == kept.programs.keys()


def test_what_b_must_move_is_counted():
    """Momentum SGD keeps one moment, and AdamW two: an optimizer reads and writes B and these, and the error path reads B."""
    plain, size = {"arguments": 1000}, 64
    for model, moments in (("ResNet-50", 1), ("GPT-2 small", 2)):
        own = (1 + moments) * size
        assert compiled.moved(f"v5e: {model}: FA", {"arguments": 1000 + size}, plain) == size
        assert compiled.moved(f"v5e: {model}: KP", {"arguments": 1000 + own}, plain) == size + 2 * own


def test_the_largest_batch_is_found_by_a_line(tmp_path, monkeypatch):
    """With 1 GB and 100 MB per example, the largest batch is (memory - 1 GB) / 100 MB, rounded down."""
    key = "v5e: ResNet-50: BP"
    kept = compiled.Kept(tmp_path / "tpu.json")
    peak = lambda batch: 10**9 + 10**8 * batch
    kept.programs[key] = {"peak": peak(128)}
    monkeypatch.setattr(compiled, "held", lambda target, name, step, batch: peak(batch))
    compiled.largest(kept, "v5e", "ResNet-50", "BP", 1)
    assert kept.programs[f"{key}, largest batch"]["batch"] == (TARGETS["v5e"].memory - 10**9) // 10**8


def test_a_case_of_shapes_makes_no_arrays():
    """All parameters of GPT-2 small are shapes, 124 million parameters in all."""
    this = compiled.case("GPT-2 small", 2)
    leaves = jax.tree.leaves(this.params)
    assert all(isinstance(x, S) for x in leaves)
    assert round(sum(x.size for x in leaves) / 1e6) == 124


@pytest.mark.parametrize("n", [1, 3, 147, 65535])
def test_accelerators_work_the_hartley_matrix_out_element_by_element(n):
    """The Hartley matrix's entries computed by angle agree with float64 to 5e-7."""
    rows = np.unique(np.linspace(0, n - 1, 50).astype(np.int64))
    angle = rows[:, None] * np.arange(n) % n * (2 * np.pi / n)
    found = jax.jit(noise._cas_by_angle, static_argnums=2)(rows[:, None], np.arange(n)[None], n)
    np.testing.assert_allclose(found, np.cos(angle) + np.sin(angle), atol=5e-7, rtol=0)


@pytest.mark.skipif(not benchmarks.installed("libtpu"), reason="libtpu is not installed")
def test_a_small_step_compiles_for_a_described_tpu(tmp_path):
    """A KP step has backprop's products, at most 1.1 times its operations, and no more copies of weights."""
    params = {"a": S((256, 256), jnp.float32), "b": S((256, 128), jnp.float32)}
    x = S((64, 256), jnp.float32)

    def loss_fn(params, model_state, x, key):
        return ((jnp.tanh(x @ params["a"]) @ params["b"]) ** 2).mean(), (model_state, {})

    this = compiled.models.Case(loss_fn, params, None, compiled.models.SGD, x)
    target = TARGETS["v5e"]
    batch = compiled.targets.placed(x, target, batch=True)
    plain, state = compiled.backprop(this, target)
    steps = wmkp.make_steps(loss_fn, wmkp.kolen_pollack(), this.optimizer, params, x)
    own = compiled.targets.placed(jax.eval_shape(steps.init, jax.random.key(0), params), target)
    shapes = {(256, 256), (256, 128)}
    bp, kp = (
        hlo.figures(low.compile(), shapes) for low in (plain.lower(state, batch), steps.engaged_step.lower(own, batch))
    )
    assert kp["products"] == bp["products"] and bp["flops"] <= kp["flops"] <= 1.1 * bp["flops"]
    assert kp["copies"]["of weights"] <= bp["copies"]["of weights"]
