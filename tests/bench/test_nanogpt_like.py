"""Tests of the yardstick: it is the model that it is raced against."""

import jax
import numpy as np
import pytest

from fm_jax.bench import versus
from fm_jax.models import zoo

LENGTH, ROWS = 7, 3


@pytest.fixture
def ours(model_config, random_params):
    """Return a model of GPT-2's shape and params of it."""
    config = model_config(
        **{name: value for name, value in versus.SHAPE.items() if name != "window"},
        num_kv_heads=4,
        head_dim=3,
        norm_epsilon=1e-5,
        num_layers=2,
        max_length=LENGTH,
    )
    model = zoo.build(config)
    return model, random_params(model.abstract)


def _theirs(config, params):
    """Return the PyTorch model with our params."""
    torch = pytest.importorskip("torch")
    from fm_jax.bench import nanogpt_like

    width = config.embed_dim
    net = nanogpt_like.Decoder(
        layers=config.num_layers,
        width=width,
        heads=config.num_heads,
        hidden=config.mlp_dim,
        vocab=config.vocab_size,
        length=LENGTH,
    )
    blocks = params["blocks"]
    weights = {
        "tokens.weight": params["embedding"],
        "positions.weight": params["position_embedding"],
        "norm.weight": params["final_norm"]["scale"],
    }
    for layer in range(config.num_layers):
        attention, mlp = (
            jax.tree.map(lambda x, layer=layer: np.asarray(x[layer]), blocks[name])
            for name in ("attention", "mlp")
        )
        parts = [
            attention[name]["kernel"].reshape(width, -1)
            for name in ("query", "key", "value")
        ]
        weights |= {
            f"blocks.{layer}.qkv.weight": np.concatenate(parts, axis=1).T,
            f"blocks.{layer}.out.weight": attention["out"]["kernel"]
            .reshape(-1, width)
            .T,
            f"blocks.{layer}.up.weight": mlp["up"]["kernel"].T,
            f"blocks.{layer}.down.weight": mlp["down"]["kernel"].T,
            f"blocks.{layer}.norms.0.weight": blocks["attention_norm"]["scale"][layer],
            f"blocks.{layer}.norms.1.weight": blocks["mlp_norm"]["scale"][layer],
        }
    net.load_state_dict({k: torch.from_numpy(np.array(v)) for k, v in weights.items()})
    return torch, net


def test_it_has_our_loss_and_our_gradients(ours):
    model, params = ours
    torch, net = _theirs(model.config, params)
    rng = np.random.default_rng(5)
    ids_BT = rng.integers(0, model.config.vocab_size, (ROWS, LENGTH + 1))
    tokens_BT, targets_BT = ids_BT[:, :-1], ids_BT[:, 1:]
    positions_BT = np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1))
    ones_BT = np.ones((ROWS, LENGTH), np.int32)

    def loss(params):
        hidden_BTD, _ = model.hidden(params, tokens_BT, positions_BT, ones_BT)
        logits_BTV = model.logits(params, hidden_BTD)
        logp_BTV = jax.nn.log_softmax(logits_BTV)
        picked = jax.numpy.take_along_axis(logp_BTV, targets_BT[..., None], axis=-1)
        return -picked.mean()

    value, gradients = jax.value_and_grad(loss)(params)
    theirs = net(torch.from_numpy(tokens_BT), torch.from_numpy(targets_BT))
    theirs.backward()
    assert theirs.item() == pytest.approx(float(value), rel=1e-5)
    norms = [p.grad.norm().item() for p in net.parameters()]
    whole = np.linalg.norm([np.linalg.norm(g) for g in jax.tree.leaves(gradients)])
    assert np.linalg.norm(norms) == pytest.approx(whole, rel=1e-5)


def test_its_parameters_are_as_many_as_ours(ours):
    model, params = ours
    _, net = _theirs(model.config, params)
    counted = sum(weight.numel() for weight in net.parameters())
    assert counted == sum(leaf.size for leaf in jax.tree.leaves(params))
