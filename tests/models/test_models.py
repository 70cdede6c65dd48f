"""Networks, and saving and loading them."""

import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchvision import models

from mnist.config.recipes import RECIPES
from mnist.data.splits import ImageData, Split
from mnist.errors import ConfigError, UserError
from mnist.launch.hardware import choose_threads
from mnist.models.by_name import build_model, check_batch
from mnist.models.networks import MODELS, Convolution, Net, Normalized, count_parameters
from mnist.models.saved import ModelConfig, load_model, save_model

DIGITS = ModelConfig("mlp", tuple("0123456789"), (28, 28), "mnist")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Many small operations would wait for another thread, for long on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_the_tutorials_state_dict_loads_and_gives_the_same_outputs(tmp_path: Path) -> None:
    sizes = [784, 64, 64, 64, 10]
    layers = nn.ModuleDict({f"fc{i + 1}": nn.Linear(sizes[i], sizes[i + 1]) for i in range(4)})
    torch.save(layers.state_dict(), tmp_path / "net.pt")  # as the tutorial's code does
    state = torch.load(tmp_path / "net.pt", weights_only=True)
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
def test_normalization_makes_an_inverted_image_its_negative(name: str) -> None:
    images = torch.rand(8, 3, 64, 64).square()  # more dark than bright
    seen = []
    for pictures in (images, 1 - images):
        mean, std = pictures.mean(dim=(0, 2, 3)).tolist(), pictures.std(dim=(0, 2, 3)).tolist()
        model = build_model(name, 3, (3, 64, 64), normalization=(mean, std))
        assert isinstance(model, Normalized)
        model.net = nn.Identity()
        seen.append(model(pictures))
    torch.testing.assert_close(seen[0], -seen[1], atol=1e-5, rtol=0)
    assert not isinstance(build_model(name, 3, (3, 64, 64)), Normalized)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("classes", [2, 7])
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 8, 8), (3, 64, 64), (1, 100, 40), (3, 31, 57), (3, 224, 224)])
def test_networks_return_log_probabilities_for_any_shape_and_number_of_classes(
    name: str, classes: int, shape: tuple[int, int, int]
) -> None:
    if name == "cnn-quick":  # needs 17 pixels per side
        shape = (shape[0], max(17, shape[1]), max(17, shape[2]))
    output = build_model(name, classes, shape)(torch.rand(5, *shape))
    assert output.shape == (5, classes)
    torch.testing.assert_close(output.exp().sum(dim=1), torch.ones(5))


PLAIN: dict[str, Callable[[], nn.Module]] = {  # the same networks in plain layers
    "mlp": lambda: nn.Sequential(
        *(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU()),
        *(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10), nn.LogSoftmax(dim=1)),
    ),
    "cnn": lambda: nn.Sequential(
        *(nn.Conv2d(1, 16, 5, padding=2), nn.MaxPool2d(2), nn.ReLU()),
        *(nn.Conv2d(16, 32, 5, padding=2), nn.MaxPool2d(2), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(32 * 7 * 7, 128), nn.ReLU(), nn.Linear(128, 10), nn.LogSoftmax(dim=1)),
    ),
}


@pytest.mark.parametrize("name", PLAIN)
def test_networks_start_with_torchs_weights_and_compute_what_plain_layers_do(name: str) -> None:
    torch.manual_seed(0)
    model = build_model(name, 10)
    torch.manual_seed(0)
    plain = PLAIN[name]()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    images = torch.rand(2, 1, 28, 28)
    torch.testing.assert_close(model(images), plain(images))


@pytest.mark.parametrize(("name", "height"), [("cnn", 3), ("cnn-quick", 16)])
def test_a_cnn_refuses_images_that_are_too_small(name: str, height: int) -> None:
    build_model(name, 10, (1, height + 1, 28))
    with pytest.raises(ConfigError, match=f"--model {name}: does not accept images of 28 x {height} pixels"):
        build_model(name, 10, (1, height, 28))


def outputs_of_convolutions(model: nn.Module, images: Tensor) -> list[Tensor]:
    seen: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda module, inputs, output: seen.append(output))
    model(images)
    return seen


@pytest.mark.parametrize("name", ["cnn-quick", "cnn-deep"])
@pytest.mark.parametrize("channels", [1, 3])
def test_strided_networks_compute_channels_last_with_contiguous_weights(name: str, channels: int) -> None:
    model = build_model(name, 10, (channels, 28, 28))
    outputs = outputs_of_convolutions(model, torch.rand(5, channels, 28, 28))
    assert all(output.is_contiguous(memory_format=torch.channels_last) for output in outputs)
    outputs[-1].sum().backward()
    convolutions = [it for it in model.parameters() if it.grad is not None]
    assert len(convolutions) == 2 * len(outputs)
    assert all(it.is_contiguous() and it.grad.is_contiguous() for it in convolutions if it.grad is not None)


@pytest.mark.parametrize(
    ("shape", "settings"),
    [
        ((1, 28, 28), (24, 5, 2, 0)),
        ((24, 12, 12), (32, 3, 2, 0)),
        ((3, 9, 14), (4, 3, 1, 1)),
        ((2, 7, 8), (5, 5, 2, 2)),
    ],
)
def test_a_convolution_by_matrix_multiplication_has_the_same_outputs_and_gradients(
    shape: tuple[int, int, int], settings: tuple[int, ...]
) -> None:
    filters, size, stride, padding = settings
    convolution = Convolution(shape[0], filters, size, stride, padding).double()
    X = torch.randn(3, *shape, dtype=torch.float64, requires_grad=True)
    results = []
    for compute in (convolution, convolution.product):
        output = compute(X)
        gradients = torch.autograd.grad(output.sin().sum(), [X, *convolution.parameters()])
        results.append([output, *gradients])
    torch.testing.assert_close(*results, rtol=0, atol=1e-12)


def test_activations_of_strided_networks_neither_grow_nor_vanish() -> None:
    torch.manual_seed(0)
    first, *_, last = outputs_of_convolutions(build_model("cnn-deep", 10), torch.rand(50, 1, 28, 28))
    assert 0.3 < float(last.detach().square().mean() / first.detach().square().mean()) < 3


def test_a_pooling_from_3_x_3_to_3_x_3_is_left_out() -> None:
    model, images = build_model("cnn-quick", 10), torch.rand(2, 1, 28, 28)
    output = model(images)
    assert not any(isinstance(module, nn.MaxPool2d) for module in model.modules())
    model.pool = nn.MaxPool2d(1, 1)
    assert torch.equal(model(images), output)


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_networks_treat_each_image_alone_and_deterministically(recipe: str) -> None:
    shape = (3, 64, 64) if recipe == "photos" else (1, 28, 28)
    model = build_model(RECIPES[recipe].model, 10, shape).train()
    images = torch.rand(6, *shape)
    torch.testing.assert_close(model(images), torch.cat([model(images[:2]), model(images[2:])]))


FAMILIES = {  # the smallest model of each of torchvision's families, and an image size for it
    "resnet18": 28,
    "mobilenet_v2": 28,
    "mobilenet_v3_small": 28,
    "efficientnet_b0": 28,
    "shufflenet_v2_x0_5": 28,
    "mnasnet0_5": 28,
    "squeezenet1_1": 28,
    "regnet_y_400mf": 28,
    "googlenet": 28,
    "swin_t": 28,
    "densenet121": 64,
    "convnext_tiny": 64,
    "inception_v3": 75,
}
QUICK = {"resnet18", "mobilenet_v3_small", "squeezenet1_1", "googlenet"}


@pytest.mark.parametrize(
    ("name", "size"),
    [pytest.param(*it, marks=[] if it[0] in QUICK else pytest.mark.slow) for it in FAMILIES.items()],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_torchvisions_models_adapt_to_channels_and_classes_and_are_loaded_again(
    name: str, size: int, channels: int, tmp_path: Path
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = build_model(name, 3, (channels, size, size))
    images = torch.rand(4, channels, size, size)
    output = model(images)  # in training mode, in which auxiliary heads would return outputs too
    torch.testing.assert_close(output.exp().sum(dim=1), torch.ones(4))
    assert output.shape == (4, 3)
    output[:, 0].sum().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    config = ModelConfig(name, ("a", "b", "c"), (size, size), "photographs", channels)
    save_model(model, tmp_path / "model", config)
    again, found = load_model(tmp_path / "model")
    assert found == config
    with torch.no_grad():
        assert torch.equal(again(images), model.eval()(images))


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("vgg11", (1, 28, 28), ["28 x 28", "--image-size 32"]),
        ("alexnet", (3, 64, 28), ["28 x 64", "--image-size 63"]),
        ("maxvit_t", (3, 64, 64), ["64 x 64", "--image-size 224"]),
        ("vit_b_32", (3, 64, 96), ["96 x 64", "--image-size 224"]),
        ("vit_b_32", (3, 28, 28), ["28 x 28", "--image-size 224"]),
    ],
)
def test_an_unsupported_image_size_is_refused_with_a_supported_one(
    name: str, shape: tuple[int, int, int], words: list[str]
) -> None:
    with pytest.raises(ConfigError, match=f"--model {name}: does not accept images of") as caught:
        build_model(name, 3, shape)
    assert all(word in str(caught.value) for word in words)


def test_batch_size_1_is_refused_for_networks_with_batchnorm() -> None:
    with pytest.raises(ConfigError, match="--batch-size 1: this network has BatchNorm"):
        check_batch(build_model("resnet18", 3, (3, 32, 32)), 1, (3, 32, 32))
    model = build_model("resnet18", 3, (3, 64, 64))
    check_batch(model, 1, (3, 64, 64))  # 2 x 2 values are left of it
    assert int(model.state_dict()["net.bn1.num_batches_tracked"]) == 0
    check_batch(build_model("resnet18", 3, (3, 32, 32)), 2, (3, 32, 32))
    check_batch(build_model("cnn", 3, (3, 32, 32)), 1, (3, 32, 32))


def test_a_vision_transformer_is_built_for_the_size_of_the_images() -> None:
    assert build_model("vit_b_32", 3, (1, 64, 64))(torch.rand(2, 1, 64, 64)).shape == (2, 3)


@pytest.mark.parametrize("name", ["cnm", "raft_large", "quantized_resnet18"])
def test_unknown_models_are_refused(name: str) -> None:
    message = f"--model {name}: neither mlp nor cnn nor cnn-quick nor cnn-deep nor one of torchvision's"
    with pytest.raises(ConfigError, match=message):
        build_model(name, 3)


def test_a_model_for_gray_images_predicts_what_the_color_one_does() -> None:
    torch.manual_seed(0)
    color = build_model("resnet18", 3, (3, 32, 32)).eval()
    torch.manual_seed(0)
    gray = build_model("resnet18", 3, (1, 32, 32)).eval()
    images = torch.rand(4, 1, 32, 32)
    normalized = (images - gray.mean) / gray.std * color.std + color.mean  # type: ignore[operator]
    torch.testing.assert_close(gray(images), color(normalized), atol=1e-4, rtol=1e-4)


@pytest.fixture
def weights_of_resnet18(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """Weights in torchvision's cache, without a network to download them again."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    torch.manual_seed(7)
    state: dict[str, Tensor] = models.resnet18().state_dict()
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(state, tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth")
    return state


@pytest.mark.parametrize("channels", [1, 3])
def test_pretrained_weights_are_loaded_for_all_but_the_last_layer(
    channels: int, weights_of_resnet18: dict[str, Tensor]
) -> None:
    model = build_model("resnet18", 3, (channels, 64, 64), pretrained=True)
    found = {name.removeprefix("net."): value for name, value in model.state_dict().items()}
    assert found["fc.weight"].shape == (3, 512)
    if channels == 1:
        weights_of_resnet18["conv1.weight"] = weights_of_resnet18["conv1.weight"].sum(dim=1, keepdim=True)
    for name, value in weights_of_resnet18.items():
        assert name.startswith("fc.") or torch.equal(found[name], value), name


def test_a_saved_model_is_loaded_without_its_pretrained_weights(
    weights_of_resnet18: dict[str, Tensor], tmp_path: Path
) -> None:
    model = build_model("resnet18", 3, (3, 64, 64), pretrained=True)
    save_model(model, tmp_path / "model", ModelConfig("resnet18", ("a", "b", "c"), (64, 64), "photographs", 3))
    (tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth").unlink()
    again, _ = load_model(tmp_path / "model")
    images = torch.rand(2, 3, 64, 64)
    assert torch.equal(again(images), model.eval()(images))


def test_unavailable_pretrained_weights_are_an_error_with_their_url_and_path(
    weights_of_resnet18: dict[str, Tensor], tmp_path: Path
) -> None:
    file = tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match="damaged"):
        build_model("resnet18", 3, (3, 64, 64), pretrained=True)
    for content in (torch.zeros(3), [1], {"fc.weight": torch.zeros(3)}):
        torch.save(content, file)
        with pytest.raises(ConfigError, match="damaged") as refused:
            build_model("resnet18", 3, (3, 64, 64), pretrained=True)
        assert len(str(refused.value)) < 1000
    file.unlink()
    with pytest.raises(UserError, match=r"--pretrained: the weights of resnet18 are not available \(URLE") as caught:
        build_model("resnet18", 3, (3, 64, 64), pretrained=True)
    assert "download.pytorch.org" in str(caught.value)
    assert str(file) in str(caught.value)
    with pytest.raises(ConfigError, match="--pretrained: cnn has no pretrained weights"):
        build_model("cnn", 3, pretrained=True)


def test_all_of_torchvisions_models_have_pretrained_weights_and_a_smallest_size() -> None:
    for name in models.list_models(module=models):
        weights = models.get_model_weights(name).DEFAULT
        assert weights.url.startswith("https://download.pytorch.org/models/")
        assert weights.meta["min_size"]
        assert weights.transforms().mean


def test_choosing_threads_does_not_change_batchnorm_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    model = build_model("resnet18", 3, (3, 64, 64))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert choose_threads(model, torch.rand(10, 3, 64, 64)) >= 1
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())


def test_a_saved_model_keeps_its_channels_which_default_to_gray(tmp_path: Path) -> None:
    for channels, shape in ((1, (5, 20, 30)), (3, (5, 20, 30, 3))):
        split = Split(torch.zeros(shape, dtype=torch.uint8), torch.zeros(5, dtype=torch.int64))
        config = ModelConfig.of("cnn", ImageData("made up", ("a", "b"), split, None, split))
        assert config.image_shape == (channels, 20, 30)
        save_model(build_model("cnn", 2, config.image_shape), tmp_path / "model", config)
        assert load_model(tmp_path / "model")[1] == config
    save_model(Net(), tmp_path / "model", DIGITS)
    values = json.loads((tmp_path / "model" / "config.json").read_text())
    del values["channels"]
    (tmp_path / "model" / "config.json").write_text(json.dumps(values))
    assert load_model(tmp_path / "model")[1] == DIGITS


def test_saving_replaces_the_model_and_loading_needs_no_settings(tmp_path: Path) -> None:
    save_model(Net(), tmp_path / "model", DIGITS)
    model, config = build_model("cnn", 10), ModelConfig("cnn", tuple("0123456789"), (28, 28), "mnist")
    save_model(model, tmp_path / "model", config)
    again, found = load_model(tmp_path / "model")
    images = torch.rand(3, 1, 28, 28)
    assert torch.equal(again(images), model.eval()(images))
    assert found == config
    assert {path.name for path in tmp_path.rglob("*")} == {"model", "model.safetensors", "config.json"}
    assert json.loads((tmp_path / "model" / "config.json").read_text())["architecture"] == "cnn"


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    model = Net()
    save_model(model, tmp_path / "model", DIGITS)
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    with torch.no_grad():
        model.fc2.bias[3] = float("nan")
    with pytest.raises(UserError, match=r"fc2\.bias"):
        save_model(model, tmp_path / "model", DIGITS)
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing-here.*config\.json"):
        load_model(tmp_path / "nothing-here")
