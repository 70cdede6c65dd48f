"""Networks, and the folder from which one is built again."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mnist.errors import UserError
from mnist.models import MODELS, Net, build_model, count_parameters
from mnist.saved_model import ModelConfig, load_model, save_model

DIGITS = ModelConfig("mlp", tuple("0123456789"), (28, 28), "mnist")


def tutorial_state(path: Path) -> dict[str, Tensor]:
    """What the tutorial's own code saves: the weights of four linear layers, fc1 to fc4."""
    sizes = [784, 64, 64, 64, 10]
    layers = {f"fc{i + 1}": nn.Linear(sizes[i], sizes[i + 1]) for i in range(4)}
    torch.save(nn.ModuleDict(layers).state_dict(), path)
    state: dict[str, Tensor] = torch.load(path, weights_only=True)
    return state


def test_a_state_dict_of_the_tutorials_code_loads_and_gives_the_same_outputs(tmp_path: Path) -> None:
    state = tutorial_state(tmp_path / "net.pt")
    net = Net()
    net.load_state_dict(state)
    images = torch.rand(20, 1, 28, 28)
    hidden = images.view(-1, 784)
    for layer in ("fc1", "fc2", "fc3"):
        hidden = (hidden @ state[f"{layer}.weight"].T + state[f"{layer}.bias"]).clamp(min=0)
    expected = (hidden @ state["fc4.weight"].T + state["fc4.bias"]).softmax(dim=1).log()
    torch.testing.assert_close(net(images), expected)
    torch.testing.assert_close(net(images.view(-1, 784)), expected)  # as the tutorial calls it
    assert count_parameters(net) == 784 * 64 + 64 + 2 * (64 * 64 + 64) + 64 * 10 + 10


@pytest.mark.parametrize("name", MODELS)
def test_every_network_gives_log_probabilities_of_any_number_of_classes(name: str) -> None:
    output = build_model(name, 7)(torch.rand(5, 1, 28, 28))
    assert output.shape == (5, 7)
    torch.testing.assert_close(output.exp().sum(dim=1), torch.ones(5))


def test_a_saved_model_is_built_again_with_no_flag(tmp_path: Path) -> None:
    model = build_model("cnn", 10)
    config = ModelConfig("cnn", tuple("0123456789"), (28, 28), "mnist")
    save_model(model, tmp_path / "model", config)
    again, found = load_model(tmp_path / "model")
    images = torch.rand(3, 1, 28, 28)
    assert torch.equal(again(images), model.eval()(images))
    assert found == config
    assert {path.name for path in tmp_path.rglob("*")} == {"model", "model.safetensors", "config.json"}
    assert json.loads((tmp_path / "model" / "config.json").read_text())["architecture"] == "cnn"


def test_weights_that_are_not_finite_are_never_saved_and_the_model_before_stays(tmp_path: Path) -> None:
    model = Net()
    save_model(model, tmp_path / "model", DIGITS)
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    with torch.no_grad():
        model.fc2.bias[3] = float("nan")
    with pytest.raises(UserError, match=r"fc2\.bias"):
        save_model(model, tmp_path / "model", DIGITS)
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_saving_again_replaces_the_model(tmp_path: Path) -> None:
    save_model(Net(), tmp_path / "model", DIGITS)
    newer = Net()
    save_model(newer, tmp_path / "model", DIGITS)
    images = torch.rand(3, 1, 28, 28)
    assert torch.equal(load_model(tmp_path / "model")[0](images), newer(images))


def test_a_folder_without_a_model_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing-here.*config\.json"):
        load_model(tmp_path / "nothing-here")
