"""Training on the dense model's answers, of one block and of all together: facts of both, and of each alone."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from sparseopt.layers.bits import multiples_of, parse_bits
from sparseopt.models import Block, open_model
from sparseopt.models.decoder.attention import QUERY_CHUNK
from sparseopt.pruning.base.activations import Batches, DiskBatches, Stream
from sparseopt.pruning.memory import distillation_bytes
from sparseopt.pruning.train import distillation, training
from sparseopt.pruning.train.distillation import Distillation, distil
from sparseopt.pruning.train.reconstruction import Reconstruction, channel_weights, reconstruct_block, stream_loss
from sparseopt.pruning.train.training import LEAST_SIZE, TrainingStatus
from tests.jitted import run
from tests.models.tiny import VOCAB

WINDOWS, HELDOUT, TIME = 8, 4, 24


@pytest.fixture(scope="module", autouse=True)
def slices(module_monkeypatch):
    """The logits of a batch do not fit into one slice, nor into any number of them."""
    module_monkeypatch.setattr(distillation, "LOGIT_ROWS", 10)


@pytest.fixture(scope="module")
def model(models):
    return open_model(models("biased"))


def through(blocks, x):
    for block in blocks:
        x = run(block, x)
    return x


def parameters(blocks):
    flat = [nnx.to_flat_state(nnx.state(block)) for block in blocks]
    return {f"{i}.{'.'.join(path)}": np.array(value) for i, state in enumerate(flat) for path, value in state}


def assert_same_bits(before, after):
    for name, value in before.items():
        assert value.tobytes() == after[name].tobytes(), name


def told_nothing(*_):
    pass


class OfBlock:
    """The first block, trained alone."""

    exact, numbers = 1e-12, (0,)
    # Whole batches a step: the forward programs of training and judging are then the same.
    quick = Reconstruction(epochs=6, learning_rate=3e-2, patience=6)
    falls = (0.5, 0.8)
    # A warm-up over nearly all steps: the first epochs are calm, then the rate becomes far too large.
    wild = Reconstruction(epochs=20, learning_rate=1.0, warmup=0.99, patience=20, divergence=1.5)

    def __init__(self, model):
        self.model = model
        tokens = np.random.default_rng(4).integers(0, len(VOCAB), (WINDOWS + HELDOUT, TIME))
        # Some tokens are far larger than the others, as in real models.
        x = model.embedding()(jnp.asarray(tokens)).at[:, 0].multiply(self.large)
        before = [x[start : start + HELDOUT] for start in range(0, len(x), HELDOUT)]
        after = [through(self.dense(), part) for part in before]
        self.streams = tuple(Stream(Batches(each[:-1]), Batches(each[-1:])) for each in (before, after))

    large = 100

    def dense(self):
        return [self.model.block(index) for index in self.numbers]

    def pruned(self):
        """The blocks with the larger half of every linear, and the masks of what is kept."""
        blocks, masks = self.dense(), []
        for block in blocks:
            weights = {name: block.read(f"{name}.weight") for name in block.linears}
            masks.append({name: jnp.abs(weight) > jnp.median(jnp.abs(weight)) for name, weight in weights.items()})
            block.write({f"{name}.weight": jnp.where(masks[-1][name], weights[name], 0) for name in weights})
        return blocks, masks

    def train(self, blocks, masks, settings=None, streams=None, told=told_nothing):
        return reconstruct_block(blocks[0], masks[0], *(streams or self.streams), settings or self.quick)

    def without_masks(self, blocks):
        return [{name: jnp.ones(block.weight_shape(name), bool) for name in block.linears} for block in blocks]

    def loss(self, blocks, x, dense):
        return float(stream_loss(through(blocks, x), dense, channel_weights(self.streams[1].calibration)))


class OfModel(OfBlock):
    """All blocks, trained together on the logits."""

    exact, numbers, large = 1e-6, (0, 1, 2), 1
    quick = Distillation(epochs=12, learning_rate=2e-2, windows=4, patience=12)
    falls = (0.5, 0.9)
    wild = replace(quick, epochs=30, learning_rate=1.0, warmup=0.99, patience=30, divergence=1.2)

    def train(self, blocks, masks, settings=None, streams=None, told=told_nothing):
        return distil(blocks, self.model.head(), *(streams or self.streams), settings or self.quick, told, masks)

    def without_masks(self, blocks):
        return None

    def loss(self, blocks, x, dense):
        """The divergence in float64, from the definition."""
        head = self.model.head()
        p, q = (np.asarray(head(rows), np.float64) for rows in (dense, through(blocks, x)))
        p, q = (np.exp(z - z.max(-1, keepdims=True)) for z in (p, q))
        p, q = (z / z.sum(-1, keepdims=True) for z in (p, q))
        return float(np.mean(np.sum(p * np.log(p / q), axis=-1)))


@pytest.fixture(scope="module")
def of_block(model):
    return OfBlock(model)


@pytest.fixture(scope="module")
def of_model(model):
    return OfModel(model)


@pytest.fixture(params=["of_block", "of_model"])
def task(request):
    return request.getfixturevalue(request.param)


def test_the_loss_falls_and_is_that_of_what_was_left(task):
    (blocks, masks), told, settings = task.pruned(), [], task.quick
    record = task.train(blocks, masks, told=lambda *event: told.append(event))
    assert record.status == TrainingStatus.FINISHED.name
    assert record.epochs == settings.epochs
    assert record.steps == settings.epochs * WINDOWS // settings.windows
    assert record.last_loss < task.falls[0] * record.first_loss
    assert record.heldout_best < task.falls[1] * record.heldout_first
    before, after = task.streams
    for loss, name in ((record.last_loss, "calibration"), (record.heldout_best, "heldout")):
        pairs = zip(getattr(before, name), getattr(after, name), strict=True)
        assert loss == pytest.approx(np.mean([task.loss(blocks, *pair) for pair in pairs]), rel=1e-4)
    if isinstance(task, OfModel):
        assert record.kind == "distillation"
        assert told == [("distillation, step", done, record.steps) for done in range(1, record.steps + 1)]


def test_masked_entries_stay_zero_and_all_others_are_trained(task):
    blocks, masks = task.pruned()
    if isinstance(task, OfModel):
        # A linear without a mask is trained whole.
        del masks[1]["mlp.down_proj"]
    before = parameters(blocks)
    task.train(blocks, masks)
    after = parameters(blocks)
    for name, value in before.items():
        block, _, path = name.partition(".")
        mask = masks[int(block)].get(path.removesuffix(".weight"))
        if mask is not None:
            assert np.array_equal(after[name] != 0, mask), name
        changed = after[name] != value
        assert changed.mean() > 0.9 * (1.0 if mask is None else np.mean(mask)), name


def test_what_gives_the_dense_answer_keeps_every_bit(task):
    blocks = task.dense()
    before = parameters(blocks)
    record = task.train(blocks, task.without_masks(blocks))
    assert record.status == TrainingStatus.EXACT.name
    assert record.epochs == record.steps == 0
    assert record.first_loss == record.last_loss
    assert abs(record.last_loss) < task.exact
    assert_same_bits(before, parameters(blocks))


def test_what_was_won_before_training_diverges_is_kept(task):
    blocks, masks = task.pruned()
    record = task.train(blocks, masks, task.wild)
    assert record.status == TrainingStatus.DIVERGED.name
    assert 0 < record.best_epoch < record.epochs < task.wild.epochs
    before, after = task.streams
    assert record.heldout_best == pytest.approx(task.loss(blocks, before.heldout[0], after.heldout[0]), rel=1e-4)
    assert record.heldout_best < record.heldout_first


@pytest.mark.parametrize("heldout", [True, False])
def test_a_learning_rate_of_a_million_leaves_the_start_and_says_so(task, heldout):
    blocks, masks = task.pruned()
    before = parameters(blocks)
    streams = task.streams if heldout else [Stream(each.calibration, Batches()) for each in task.streams]
    record = task.train(blocks, masks, replace(task.quick, learning_rate=1e6), streams)
    assert record.status in (TrainingStatus.DIVERGED.name, TrainingStatus.NONFINITE.name)
    assert "smaller learning rate" in TrainingStatus[record.status].value
    assert record.epochs <= 1
    assert record.best_epoch == 0
    assert record.last_loss == record.first_loss
    assert record.heldout_best == record.heldout_first
    assert_same_bits(before, parameters(blocks))


@pytest.mark.parametrize("part", ["calibration", "heldout"])
@pytest.mark.parametrize("place", [0, 1])
def test_an_activation_that_is_not_a_number_changes_nothing_and_is_told(task, place, part):
    (blocks, masks), streams = task.pruned(), list(task.streams)
    before = parameters(blocks)
    broken = Batches([x.at[1, 3, 5].set(jnp.nan) for x in getattr(streams[place], part)])
    streams[place] = replace(streams[place], **{part: broken})
    record = task.train(blocks, masks, streams=streams)
    assert record.status == TrainingStatus.NONFINITE.name
    assert record.steps == 0
    assert_same_bits(before, parameters(blocks))


def test_the_seed_decides_and_the_place_of_the_streams_does_not(task, tmp_path):
    def on_disk(batches):
        found = DiskBatches(tmp_path)
        for batch in batches:
            found.append(batch)
        return found

    def trained(seed, streams=None):
        blocks, masks = task.pruned()
        task.train(blocks, masks, replace(task.quick, epochs=1, seed=seed), streams)
        return parameters(blocks)

    first, moved = trained(0), [Stream(on_disk(each.calibration), on_disk(each.heldout)) for each in task.streams]
    assert_same_bits(first, trained(0, moved))
    assert not np.array_equal(first["0.mlp.up_proj.weight"], trained(1)["0.mlp.up_proj.weight"])


def test_one_program_serves_all_blocks_and_settings_and_another_run(task, monkeypatch):
    blocks, masks = task.pruned()
    task.train(blocks, masks, replace(task.quick, epochs=1))
    traced, call = [], Block.__call__
    monkeypatch.setattr(Block, "__call__", lambda self, *given: traced.append(1) or call(self, *given))
    others = type(task)(task.model)
    blocks, masks = others.pruned()
    traced.clear()
    other = replace(task.quick, epochs=2, learning_rate=1e-3, warmup=0, clip=1.0, seed=3)
    assert task.train(blocks, masks, other).compile_seconds == 0
    assert not traced


WRONG = {"epochs": 0, "learning_rate": 0.0, "warmup": 1.0, "windows": 0, "clip": -1, "patience": 0, "divergence": 1}


def test_what_cannot_be_is_said_before_any_work(task):
    blocks, masks = task.pruned()
    with pytest.raises(ValueError, match=f"the {task.quick.what} cannot be used") as caught:
        task.train(blocks, masks, replace(task.quick, **WRONG))
    assert {line.split()[0] for line in str(caught.value).splitlines()[1:]} == set(WRONG)
    with pytest.raises(ValueError, match=r"learning_rate must be positive and finite, given nan"):
        replace(task.quick, learning_rate=math.nan).check()


def test_the_loss_is_the_mean_relative_error_of_a_token(rng):
    target = rng.normal(size=(2, 5, 8)).astype(np.float32) * np.array([1e3, 1, 1, 1, 0], np.float32)[:, None]
    output = target + rng.normal(size=target.shape).astype(np.float32)
    error, size = ((output - target) ** 2).sum(-1), (target**2).sum(-1)
    relative = (error[:, :4] / size[:, :4]).sum() / 10
    assert float(stream_loss(output, target, np.ones(8))) == pytest.approx(relative, rel=1e-5)
    assert float(stream_loss(7 * target, 7 * target, np.ones(8))) == 0


def test_the_loss_does_not_depend_on_the_scale_of_a_channel(rng):
    """Where all tokens are equally large: then the share of a channel is its mean square."""
    target = rng.choice([-1, 1], (2, 5, 8)).astype(np.float32)
    output = target + rng.normal(size=target.shape).astype(np.float32)
    scale = np.array([10, 3, 1, 1, 1, 1, 1, 0.3], np.float32)
    losses = [float(stream_loss(s * output, s * target, channel_weights([s * target]))) for s in (1, scale)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    np.testing.assert_array_equal(channel_weights([0 * target]), np.ones(8))


def test_a_kept_entry_may_start_at_zero(of_block):
    blocks, masks = of_block.pruned()
    name = "mlp.up_proj"
    place = tuple(np.argwhere(np.asarray(masks[0][name]))[7])
    blocks[0].write({f"{name}.weight": blocks[0].read(f"{name}.weight").at[place].set(0)})
    of_block.train(blocks, masks)
    assert blocks[0].read(f"{name}.weight")[place] != 0


def test_only_linears_with_a_mask_are_trained_and_norms_if_asked_for(of_block):
    blocks, masks = of_block.pruned()
    before = parameters(blocks)
    settings = Reconstruction(epochs=1, learning_rate=1e-3, train_norms=False)
    of_block.train(blocks, [{"mlp.gate_proj": masks[0]["mlp.gate_proj"]}], settings)
    after = parameters(blocks)
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {"0.mlp.gate_proj.weight", "0.mlp.gate_proj.bias"}


@pytest.mark.parametrize("number", [0, pytest.param("experts", marks=pytest.mark.thorough)])
def test_of_weights_on_a_grid_the_scales_are_trained_and_the_multiples_stay(of_block, models, number):
    bits, (before, after) = parse_bits("int4:8"), of_block.streams
    block = of_block.dense()[0] if number == 0 else open_model(models(number)).block(0)

    def on_grid(weight):
        groups = np.asarray(weight).reshape(-1, 8)
        scale = (np.abs(groups).max(axis=1, keepdims=True) / 7).astype(np.float16).astype(np.float32)
        return (scale * np.clip(np.rint(groups / scale), -8, 7)).reshape(weight.shape)

    names = [name for name in block.linears if name != "self_attn.k_proj"]
    block.write({f"{name}.weight": on_grid(block.read(f"{name}.weight")) for name in names})
    kept, start = block.copy(), parameters([block])
    nothing = {name: jnp.zeros(block.weight_shape(name), bool) for name in block.linears}
    settings = replace(of_block.quick, learning_rate=1e-2)
    record = reconstruct_block(block, nothing, before, after, settings, 0, dict.fromkeys(names, bits))
    assert record.heldout_best < 0.98 * record.heldout_first
    for name in names:
        (old, first), (new, last) = (
            multiples_of(np.asarray(each.read(f"{name}.weight")), bits) for each in (kept, block)
        )
        assert np.array_equal(old, new), name
        assert not np.array_equal(first, last), name
    changed = {name for name, value in parameters([block]).items() if not np.array_equal(value, start[name])}
    assert "0.self_attn.k_proj.weight" not in changed
    assert "0.attention_norm.weight" in changed


def test_a_step_is_relative_to_the_size_of_the_weights(of_block):
    """The up projection 8 times as large, and what reads it an eighth: the same function, trained to the same."""

    def trained(scale):
        (block,), masks = of_block.pruned()
        scales = {"mlp.up_proj.weight": scale, "mlp.up_proj.bias": scale, "mlp.down_proj.weight": 1 / scale}
        block.write({path: factor * block.read(path) for path, factor in scales.items()})
        return of_block.train([block], masks, replace(of_block.quick, epochs=2, clip=1e9))

    plain, scaled = trained(1), trained(8)
    assert scaled.first_loss == pytest.approx(plain.first_loss, rel=1e-5)
    assert scaled.last_loss == pytest.approx(plain.last_loss, rel=1e-3)
    assert plain.last_loss < 0.9 * plain.first_loss


def test_training_stops_when_the_heldout_loss_no_longer_falls(of_block):
    """Held-out targets around what the pruned block gives already: every step leads away from them."""
    (blocks, masks), (before, after) = of_block.pruned(), of_block.streams
    start = parameters(blocks)
    near = Stream(after.calibration, Batches([1.001 * run(blocks[0], x) for x in before.heldout]))
    settings = Reconstruction(epochs=9, learning_rate=1e-3, patience=2, divergence=math.inf)
    record = of_block.train(blocks, masks, settings, (before, near))
    assert record.status == TrainingStatus.STOPPED.name
    assert (record.epochs, record.best_epoch) == (2, 0)
    assert record.heldout_best == record.heldout_first
    assert_same_bits(start, parameters(blocks))


def test_without_heldout_tokens_the_calibration_loss_decides_and_windows_a_step_divide_a_batch(of_block):
    blocks, masks = of_block.pruned()
    streams = [Stream(each.calibration, Batches()) for each in of_block.streams]
    record = of_block.train(blocks, masks, streams=streams)
    assert record.heldout_first is record.heldout_best is None
    assert record.last_loss < 0.5 * record.first_loss
    settings = Reconstruction(epochs=1, learning_rate=1e-4, windows=3)
    assert of_block.train(*of_block.pruned(), settings, streams).steps == WINDOWS // 2


def test_the_gradient_through_a_block_is_that_of_finite_differences(of_block, rng):
    """Also over more than one chunk of queries, where scores of later keys are minus infinity."""
    tokens = jnp.asarray(rng.integers(0, len(VOCAB), (2, QUERY_CHUNK + 22)))
    x = of_block.model.embedding()(tokens)
    target = run(of_block.dense()[0], x)
    graph, start = nnx.split(of_block.pruned()[0][0])

    @jax.jit
    def loss(params):
        return stream_loss(nnx.merge(graph, params)(x), target, jnp.ones(x.shape[-1]))

    gradient = jax.jit(jax.grad(loss))(start)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))
    paths = [path for path, _ in nnx.to_flat_state(start)]
    leaves, structure = jax.tree.flatten(start)
    for i, (path, slope) in enumerate(zip(paths, jax.tree.leaves(gradient), strict=True)):
        # Along the gradient of one parameter, where the difference is far above the rounding of float32.
        size = float(jnp.linalg.norm(slope))
        step = 3e-3 / size
        ends = [structure.unflatten([*leaves[:i], leaves[i] + by * slope, *leaves[i + 1 :]]) for by in (step, -step)]
        difference = (float(loss(ends[0])) - float(loss(ends[1]))) / (2 * step)
        assert difference == pytest.approx(size**2, rel=2e-2), path


def test_one_free_linear_ends_at_the_least_squares_optimum(model, of_block):
    """With only `down_proj` free the block is linear in what is trained: the optimum is a small problem a row."""
    name, inputs = "mlp.down_proj", list(of_block.streams[0].calibration)
    (block,) = of_block.dense()
    weight = block.read(f"{name}.weight")
    mask = jnp.abs(weight) > jnp.median(jnp.abs(weight))
    block.write({f"{name}.weight": jnp.where(mask, weight, 0), f"{name}.bias": jnp.zeros(32)})
    targets = [run(model.block(1), x) for x in inputs]
    settings = Reconstruction(
        epochs=200, learning_rate=0.2, windows=4, clip=1e3, patience=200, divergence=math.inf, train_norms=False
    )
    streams = Stream(Batches(inputs), Batches()), Stream(Batches(targets), Batches())
    record = of_block.train([block], [{name: mask}], settings, streams)

    @jax.jit
    def output_and_hidden(block, x):
        taken = {}
        return block(x, tap=lambda tap, value: taken.setdefault(tap, value)), taken["mlp_hidden"]

    y = np.asarray(jnp.concatenate(targets), np.float64)
    output, hidden = (np.asarray(value, np.float64) for value in output_and_hidden(block, jnp.concatenate(inputs)))
    hidden = np.column_stack([hidden.reshape(-1, mask.shape[1]), np.ones(y[..., 0].size)])
    # The bias is one more input, of one.
    weight = np.column_stack([np.asarray(block.read(f"{name}.{part}"), np.float64) for part in ("weight", "bias")])
    tokens = len(hidden)
    weights = channel_weights(targets)
    root = 1 / np.sqrt((weights * y.reshape(tokens, -1) ** 2).sum(-1) * tokens)
    rest = (y - output).reshape(tokens, -1) + hidden @ weight.T
    optimum = 0.0
    for row in range(mask.shape[0]):
        chosen = np.append(np.asarray(mask[row]), True)
        design, wanted = hidden[:, chosen] * root[:, None], rest[:, row] * root
        best = np.linalg.lstsq(design, wanted, rcond=None)[0]
        optimum += weights[row] * np.sum((design @ best - wanted) ** 2)
    assert optimum < 0.9 * record.first_loss
    assert optimum * (1 - 1e-4) <= record.last_loss <= 1.01 * optimum


def test_rates_rise_and_fall_and_are_never_zero():
    rates = Reconstruction(learning_rate=0.5, warmup=0.25).rates(16)
    assert rates.dtype == np.float32
    assert (np.diff(rates[:4]) > 0).all()
    assert (np.diff(rates[4:]) < 0).all()
    assert rates.max() < 0.5
    assert rates.max() == pytest.approx(0.5, rel=0.02)
    assert 0 < rates[-1] < 0.01
    np.testing.assert_allclose(Reconstruction(learning_rate=0.5, warmup=0).rates(1), [0.25])


def trainer_of(of_model, settings):
    blocks, _ = of_model.pruned()
    masks, head = [{}] * len(blocks), of_model.model.head()
    return blocks, distillation._ModelTrainer(head, told_nothing, blocks, masks, *of_model.streams, settings)


def test_a_step_follows_the_gradient_of_the_whole_model(of_model, monkeypatch):
    monkeypatch.setattr(training, "_adam", optax.identity())
    blocks, trainer = trainer_of(of_model, replace(of_model.quick, clip=1e6))
    (before, after), head = of_model.streams, of_model.model.head()
    rows, rate = np.array([2, 1, 3, 0], np.int32), np.float32(0.5)
    split = [nnx.split(block) for block in blocks]
    x, dense = before.calibration[1], after.calibration[1]

    @jax.jit
    @jax.value_and_grad
    def whole(params):
        y = x
        for (graph, _), own in zip(split, params, strict=True):
            y = nnx.merge(graph, own)(y)
        log_p, log_q = jax.nn.log_softmax(head(dense)), jax.nn.log_softmax(head(y))
        return jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1))

    start = [params for _, params in split]
    loss, gradient = whole(start)
    found, norm = trainer.step(1, rows, rate)
    assert float(found) == pytest.approx(float(loss), rel=1e-5)
    norms = [math.sqrt(sum(float(jnp.sum(g * g)) for g in jax.tree.leaves(own))) for own in gradient]
    assert float(norm) == pytest.approx(max(norms), rel=1e-4)

    def moved_by(p, new):
        """Relative to the root mean square of the tensor."""
        return (p - new) / (rate * jnp.maximum(jnp.sqrt(jnp.mean(p * p)), LEAST_SIZE))

    moved = jax.tree.map(moved_by, start, [state.params for state in trainer.states])
    for one, other in zip(jax.tree.leaves(gradient), jax.tree.leaves(moved), strict=True):
        np.testing.assert_allclose(other, one, atol=2e-6, rtol=1e-3)


def test_a_gradient_that_is_not_finite_ends_the_training_at_the_start(of_model, monkeypatch):
    blocks, _ = of_model.pruned()
    before, plain = parameters(blocks), distillation._step_of_block

    def broken(state, fixed, x, after, *rest):
        return plain(state, fixed, x, after * jnp.nan, *rest)

    monkeypatch.setattr(distillation, "_step_of_block", broken)
    record = of_model.train(blocks, None)
    assert record.status == TrainingStatus.NONFINITE.name
    assert (record.steps, record.epochs) == (1, 0)
    assert_same_bits(before, parameters(blocks))


def test_all_processes_continue_with_the_blocks_of_the_first(of_model, monkeypatch):
    blocks, _ = of_model.pruned()
    monkeypatch.setattr(distillation.processes, "count", lambda: 2)
    monkeypatch.setattr(distillation, "agreed", lambda own: jax.tree.map(np.ones_like, own))
    of_model.train(blocks, None, replace(of_model.quick, epochs=1))
    assert all((value == 1).all() for value in parameters(blocks).values())
    assert run(blocks[0], jnp.ones((HELDOUT, TIME, 32))).shape == (HELDOUT, TIME, 32)


def test_the_estimate_covers_the_weights_and_moments_that_are_held(of_model):
    blocks, trainer = trainer_of(of_model, of_model.quick)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves([trainer.states, [nnx.state(block) for block in blocks]]))
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(nnx.state(block))) for block in blocks]
    parts = distillation_bytes(of_model.model.config, sum(sizes), max(sizes), TIME)
    assert held == pytest.approx(parts["blocks"] - 4 * 4 * max(sizes), rel=1e-3)
    assert parts["activations of a step"] >= 4 * (len(blocks) + 1) * TIME * 32
    assert parts["embedding and head"] > of_model.model.head().lm_head.weight[...].nbytes


def test_the_best_state_is_replaced_block_by_block(of_model, monkeypatch):
    """No second copy of all blocks is ever held, which no estimate counts."""
    blocks, trainer = trainer_of(of_model, of_model.quick)
    trainer.keep()
    held, plain = [], nnx.update

    def live():
        return sum(array.nbytes for array in jax.live_arrays())

    before = live()
    monkeypatch.setattr(training.nnx, "update", lambda *given: (held.append(live()), plain(*given)))
    trainer.keep()
    largest = max(sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(block))) for block in blocks)
    assert len(held) == len(blocks)
    assert max(held) - before <= largest + 1000
