"""`prune_module` on torch modules: the masks of plain torch loops, torch's own patches, and what is left alone."""

import copy
from typing import Any

import numpy as np
import pytest

from sparseopt.pruning import Recipe, prune_module
from sparseopt.pruning.modules.torch_module import TorchModule
from tests.layers.layers import wanda

torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
nn, functional = torch.nn, torch.nn.functional

pytestmark = pytest.mark.oracle

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def tokens(*shape: int) -> Any:
    return torch.randint(3, 64, shape)


def llama() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, vocab_size=64, max_position_embeddings=32))


def t5() -> tuple[Any, list[Any]]:
    sizes = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    batches = [{"input_ids": tokens(2, size), "decoder_input_ids": tokens(2, size - 2)} for size in (7, 5)]
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0)), batches


def bert() -> tuple[Any, list[Any]]:
    mask = (torch.arange(7) < torch.tensor([[5], [7]])).long()
    batches = [{"input_ids": tokens(2, 7), "attention_mask": mask} for _ in range(2)]
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES, vocab_size=64)), batches


def resnet() -> tuple[Any, list[Any]]:
    config = transformers.ResNetConfig(embedding_size=4, hidden_sizes=[8, 16], depths=[2, 2], layer_type="basic")
    batches = [{"pixel_values": torch.randn(2, 3, 32, 32, dtype=torch.float64)} for _ in range(2)]
    return transformers.ResNetForImageClassification(config), batches


# With the prefixes of their blocks, in the order of execution.
MODELS = {
    "t5": (t5, ["encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1"]),
    "bert": (bert, [f"bert.encoder.layer.{index}" for index in range(2)]),
    "resnet": (resnet, [f"resnet.encoder.stages.{s}.layers.{index}" for s in range(2) for index in range(2)]),
}


def feed(module: Any, batch: Any) -> Any:
    return module(**batch)


def squares_of(part: Any, x: Any) -> np.ndarray:
    """The sums of the squares of what a linear or convolution reads, `[in]`."""
    if isinstance(part, nn.Conv2d):
        rows = functional.unfold(x, part.kernel_size, part.dilation, part.padding, part.stride)
        return (rows**2).sum((0, 2)).numpy()
    return (x.reshape(-1, x.shape[-1]) ** 2).sum(0).numpy()


def pruned_by_hooks(model: Any, batches: list[Any], blocks: list[str]) -> dict[str, np.ndarray]:
    """The weights of Wanda, by hooks and loops: all batches run whole again for each block."""
    model, found = copy.deepcopy(model).eval(), {}
    for block in blocks:
        named = model.get_submodule(block).named_modules()
        parts = {f"{block}.{name}": part for name, part in named if isinstance(part, nn.Linear | nn.Conv2d)}
        squares: dict[Any, Any] = dict.fromkeys(parts.values(), 0)

        def hook(part: Any, inputs: Any, squares: dict[Any, Any] = squares) -> None:
            squares[part] = squares[part] + squares_of(part, inputs[0])

        hooks = [part.register_forward_pre_hook(hook) for part in parts.values()]
        with torch.no_grad():
            for batch in batches:
                feed(model, batch)
            for each in hooks:
                each.remove()
            for name, part in parts.items():
                weight = part.weight.reshape(len(part.weight), -1).numpy()
                found[name] = wanda(weight, np.diag(squares[part]), "per-row", 0.5).reshape(part.weight.shape)
                part.weight.copy_(torch.from_numpy(found[name]))
    return found


@pytest.mark.parametrize("name", MODELS)
def test_the_masks_are_those_of_plain_torch(name: str) -> None:
    make, blocks = MODELS[name]
    model, batches = make()
    model = model.double()
    found, report = prune_module(model, batches, Recipe(method="wanda"), call=feed)
    assert report.parts == blocks
    expected = pruned_by_hooks(model, batches, blocks)
    assert {r.layer for r in report.layers} == set(expected)
    for each, weight in expected.items():
        np.testing.assert_array_equal(found.get_submodule(each).weight.detach(), weight)
    assert {"lm_head", "classifier", "classifier.1"} & set(report.left_out)


def seen_by(part: Any, x: Any) -> tuple[Any, np.ndarray]:
    """The Gram of what a layer reads, and its weight as a matrix."""
    opened = TorchModule(nn.Sequential(part, nn.ReLU(inplace=True)))
    with opened.watching():
        return opened.read_by(x, {"0": opened.linears["0"].layout})["0"], opened.read("0").astype(np.float64)


PADDED = [{"padding": (1, 2), "padding_mode": mode} for mode in ("reflect", "replicate", "circular")]
STRIDED = [{"stride": (2, 1), "padding": (1, 0)}, {"kernel_size": (4, 3), "padding": "same"}, {"dilation": (1, 2)}]


@pytest.mark.parametrize("options", STRIDED + PADDED)
def test_the_patches_of_a_convolution_are_those_of_unfold(options: dict[str, Any]) -> None:
    part, x = nn.Conv2d(3, 4, **({"kernel_size": (3, 2)} | options), bias=False), torch.randn(2, 3, 7, 6)
    found, weight = seen_by(part, x)
    mode = {"zeros": "constant"}.get(part.padding_mode, part.padding_mode)
    padded = functional.pad(x, part._reversed_padding_repeated_twice, mode=mode).double()
    rows = functional.unfold(padded, part.kernel_size, part.dilation, 0, part.stride).transpose(1, 2).flatten(0, 1)
    np.testing.assert_allclose(found.gram, rows.T @ rows, rtol=1e-5, atol=1e-5)
    assert int(found.tokens) == len(rows)
    output = part(x).detach().flatten(2).transpose(1, 2).flatten(0, 1)
    np.testing.assert_allclose(rows.numpy() @ weight.T, output, rtol=1e-4, atol=1e-5)


def test_convolutions_of_lines_and_volumes_have_the_patches_that_give_their_outputs() -> None:
    line = nn.Conv1d(3, 4, 3, dilation=2, padding=2, bias=False), torch.randn(2, 3, 9)
    volume = nn.Conv3d(3, 4, (2, 1, 2), stride=(1, 2, 1), bias=False), torch.randn(2, 3, 4, 5, 4)
    for part, x in (line, volume):
        found, weight = seen_by(part, x)
        squares = (part(x).detach().double() ** 2).flatten(2).sum((0, 2))
        np.testing.assert_allclose(np.diag(weight @ np.asarray(found.gram, np.float64) @ weight.T), squares, rtol=1e-4)


class Block(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(width, width)
        self.dropout, self.act = nn.Dropout(0.5), nn.ReLU(inplace=True)

    def forward(self, x: Any) -> Any:
        return x + self.dropout(self.down(self.act(self.up(self.norm(x)))))


class Net(nn.Module):
    def __init__(self, block: Any = Block, count: int = 3) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Linear(8, 8), nn.ModuleList([block() for _ in range(count)])

    def forward(self, x: Any) -> Any:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return x


@pytest.fixture
def batches(_seeded: None) -> list[Any]:
    return [torch.randn(17, 8) for _ in range(3)]


def weights(module: Any) -> list[Any]:
    return [value.clone() for value in module.state_dict().values()]


def same(one: list[Any], two: list[Any]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("fails", [False, True])
def test_modes_hooks_and_forward_are_as_before(fails: bool, batches: list[Any]) -> None:
    net, seen = Net(), []
    net.blocks[0].eval()
    net.blocks[1].up.register_forward_hook(lambda *_: seen.append(1))
    own = net.blocks[2].down.forward
    net.blocks[2].down.forward = lambda x: own(x)
    net.config = type("Config", (), {"use_cache": True})()
    forward, modes, before = net.blocks[2].down.forward, [part.training for part in net.modules()], weights(net)
    calls, recipe = [], Recipe(method="wanda")

    def call(module: Any, batch: Any) -> Any:
        calls.append(module.config.use_cache)
        if fails and len(calls) == 4:
            raise KeyError("four")
        return module(batch)

    if fails:
        with pytest.raises(KeyError, match="four"):
            prune_module(net, batches, recipe, call=call, inplace=True)
        found = net
    else:
        found, _ = prune_module(net, batches, recipe, call=call)
        assert same(before, weights(net))
        assert found is not net
        assert prune_module(net, batches, recipe, call=call, inplace=True)[0] is net
        assert same(weights(found), weights(net))
    assert seen
    assert not any(calls)
    for each in (found, net):
        assert [part.training for part in each.modules()] == modes
        assert [name for name, part in each.named_modules() if "forward" in vars(part)] == ["blocks.2.down"]
        assert each.config.use_cache
    assert net.blocks[2].down.forward is forward
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_module_keeps_its_dtype_and_its_kept_weights() -> None:
    model = llama().bfloat16()
    found, report = prune_module(model, [{"input_ids": tokens(2, 7)}], Recipe(method="wanda"), call=feed)
    assert len(report.layers) == 14
    for record in report.layers:
        before, after = (each.get_submodule(record.layer).weight for each in (model, found))
        assert after.dtype == torch.bfloat16
        assert int((after == 0).sum()) == after.numel() // 2
        assert torch.equal(after, before * (after != 0))


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated")
def test_a_cache_and_blocks_that_write_to_their_input_change_nothing(batches: list[Any]) -> None:
    class Writing(Block):
        def forward(self, x: Any) -> Any:
            y = self.down(self.act(self.up(self.norm(x))))
            x += y
            return x

    net, writing = Net(), Net(Writing)
    writing.load_state_dict(net.state_dict())
    found = [prune_module(each, batches, Recipe(method="wanda"))[0] for each in (net, writing)]
    assert same(*map(weights, found))

    model, given = llama(), [{"input_ids": tokens(2, 7)} for _ in range(2)]

    def cached(module: Any, batch: Any) -> Any:
        return module(**batch, past_key_values=transformers.DynamicCache(), use_cache=True)

    found = [prune_module(model, given, Recipe(method="wanda"), call=call)[0] for call in (feed, cached)]
    assert same(*map(weights, found))


def test_a_linear_is_seen_before_its_input_is_written_to() -> None:
    part, x = nn.Linear(512, 8), torch.randn(4096, 512)

    def wipe(_: Any, given: Any, __: Any) -> None:
        given[0].fill_(7.0)

    part.register_forward_hook(wipe)
    found, _ = seen_by(part, x.clone())
    np.testing.assert_allclose(found.gram, x.double().T @ x.double(), rtol=1e-4, atol=1e-1)


def test_what_hides_its_weight_is_left_out_and_the_rest_is_pruned() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    # The fast path of torch does not call these.
    _, report = prune_module(encoder, [torch.randn(2, 4, 8)], Recipe(method="wanda"))
    assert {r.layer for r in report.layers} == {f"layers.{i}.linear{j}" for i in range(2) for j in (1, 2)}
    assert "without a call" in report.left_out["layers.0.self_attn.out_proj"]
    net = Net()
    nn.utils.parametrizations.weight_norm(net.blocks[1].up)
    _, report = prune_module(net, [torch.randn(5, 8)], Recipe(method="wanda"))
    assert "computed from others" in report.left_out["blocks.1.up"]
    assert len(report.layers) == 5


def test_shared_blocks_and_tied_weights_are_pruned_once(batches: list[Any]) -> None:
    net = Net()
    net.blocks = nn.ModuleList([net.blocks[0]] * 3)
    net.again = net.blocks[0].up
    _, report = prune_module(net, batches, Recipe(method="wanda"))
    assert {r.layer: r.tokens for r in report.layers} == dict.fromkeys(["blocks.0.up", "blocks.0.down"], 9 * 17)
    net = Net()
    net.blocks[1].up.weight = net.blocks[0].up.weight
    found, _ = prune_module(net, batches, Recipe(method="wanda"))
    assert found.blocks[1].up.weight is found.blocks[0].up.weight
    net.stem.weight = net.blocks[0].up.weight
    with pytest.raises(ValueError, match=r"blocks.0.up shares its weight with stem"):
        prune_module(net, batches, Recipe(method="wanda"))


class Routed(nn.Module):
    """One of four experts for each token; never the last."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(8, 4), nn.ModuleList([Block() for _ in range(4)])
        nn.init.constant_(self.router.bias[3:], -100.0)

    def forward(self, x: Any) -> Any:
        y, chosen = x.clone(), self.router(x).argmax(1)
        for index, expert in enumerate(self.experts):
            if (chosen == index).any():
                y[chosen == index] += expert(x[chosen == index])
        return y


def test_experts_that_no_batch_or_only_some_reach_are_pruned() -> None:
    torch.manual_seed(2)  # other experts have as many tokens as in the dense module, in other batches
    given = [torch.randn(12, 8) for _ in range(24)]
    recipe = Recipe(method="wanda", propagate=0.5, min_expert_tokens=1)
    _, report = prune_module(Net(Routed, 2), given, recipe)
    assert len(report.layers) == 2 * 9
    assert sum(r.tokens for r in report.layers if r.layer.endswith(".up")) == 2 * 12 * 24
    # By magnitude.
    starved = {f"blocks.{index}.experts.3.{name}" for index in range(2) for name in ("up", "down")}
    assert {r.layer for r in report.layers if r.starved} == starved


def test_effort_most_says_that_nothing_is_trained_and_the_error_of_a_grid_is_of_what_the_dtype_stores() -> None:
    net, x = nn.Sequential(nn.Linear(16, 16)).half(), torch.randn(64, 16).half()
    recipe = Recipe(effort="most", method="wanda", propagate=0.0, sparsity=0.0, bits="int8")
    found, report = prune_module(net, [x], recipe)
    assert "not done: train_epochs (by gradients in JAX, and the module is one of torch)" in str(report)
    assert {"train_epochs", "distil_epochs"} < report.not_done.keys()
    before, after = (each[0].weight.detach().double() for each in (net, found))
    change = (x.double() @ (after - before).T).square().sum() / (x.double() @ before.T).square().sum()
    np.testing.assert_allclose(report.grids[0].relative_error, float(change), rtol=1e-3)


ERRORS = [
    (lambda xs: prune_module(torch.compile(Net(), backend="eager"), xs), "compiled OptimizedModule"),
    (lambda xs: prune_module(nn.Sequential(nn.utils.weight_norm(nn.Linear(8, 8))), xs), "cannot be copied"),
    (lambda xs: prune_module(nn.Linear(8, 8), xs), "prune_layer"),
    (lambda xs: prune_module(Net(), xs, params={}), "is for Linen"),
    (lambda xs: prune_module(Net(), xs, loss=lambda *_: 0), "gradients in JAX"),
    (lambda xs: prune_module(Net(), xs, Recipe(train_epochs=1)), "train_epochs trains"),
    (lambda xs: prune_module(Net(), {"x": xs}), r"say \[batch\]"),
    (lambda xs: prune_module(Net(), [xs[0][:, :3]]), "cannot be multiplied"),
]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(("call", "words"), ERRORS)
def test_an_error_names_what_cannot_be_done(call: Any, words: str, batches: list[Any]) -> None:
    with pytest.raises((ValueError, RuntimeError), match=words):
        call(batches)
