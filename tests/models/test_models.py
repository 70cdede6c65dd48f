"""Networks, and the folder from which one is built again."""

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
from mnist.models.networks import MODELS, Net, Normalized, count_parameters
from mnist.models.saved import ModelConfig, load_model, save_model

DIGITS = ModelConfig("mlp", tuple("0123456789"), (28, 28), "mnist")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Else each of many small operations waits for another thread, for long where the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
def test_a_normalized_network_sees_of_dark_on_white_the_negative_of_white_on_black(name: str) -> None:
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
def test_every_network_gives_log_probabilities_for_any_shape_and_number_of_classes(
    name: str, classes: int, shape: tuple[int, int, int]
) -> None:
    if name == "cnn-quick":  # which takes them from 17 pixels a side on
        shape = (shape[0], max(17, shape[1]), max(17, shape[2]))
    output = build_model(name, classes, shape)(torch.rand(5, *shape))
    assert output.shape == (5, classes)
    torch.testing.assert_close(output.exp().sum(dim=1), torch.ones(5))


PLAIN: dict[str, Callable[[], nn.Module]] = {  # the networks for digits, as anybody would write them
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
def test_the_networks_for_digits_begin_with_torchs_own_weights_and_compute_what_plain_layers_do(name: str) -> None:
    torch.manual_seed(0)
    model = build_model(name, 10)
    torch.manual_seed(0)
    plain = PLAIN[name]()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    images = torch.rand(2, 1, 28, 28)
    torch.testing.assert_close(model(images), plain(images))


@pytest.mark.parametrize(("name", "height"), [("cnn", 3), ("cnn-quick", 16)])
def test_a_cnn_refuses_images_of_which_nothing_would_be_left(name: str, height: int) -> None:
    build_model(name, 10, (1, height + 1, 28))
    with pytest.raises(ConfigError, match=f"--model {name}: does not take images of 28 x {height} pixels"):
        build_model(name, 10, (1, height, 28))


def outputs_of_convolutions(model: nn.Module, images: Tensor) -> list[Tensor]:
    """What each of them makes of the images."""
    seen: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda module, given, output: seen.append(output))
    model(images)
    return seen


@pytest.mark.parametrize("name", ["cnn-quick", "cnn-deep"])
@pytest.mark.parametrize("channels", [1, 3])
def test_strided_networks_compute_channels_last_and_their_weights_stay_contiguous(name: str, channels: int) -> None:
    model = build_model(name, 10, (channels, 28, 28))
    outputs = outputs_of_convolutions(model, torch.rand(5, channels, 28, 28))
    assert all(output.is_contiguous(memory_format=torch.channels_last) for output in outputs)
    outputs[-1].sum().backward()
    convolutions = [it for it in model.parameters() if it.grad is not None]
    assert len(convolutions) == 2 * len(outputs)
    assert all(it.is_contiguous() and it.grad.is_contiguous() for it in convolutions if it.grad is not None)


def test_what_comes_into_a_strided_network_neither_grows_nor_fades_on_its_way() -> None:
    torch.manual_seed(0)
    first, *_, last = outputs_of_convolutions(build_model("cnn-deep", 10), torch.rand(50, 1, 28, 28))
    assert 0.3 < float(last.detach().square().mean() / first.detach().square().mean()) < 3


@pytest.mark.parametrize("recipe", RECIPES)
def test_no_recipes_network_looks_at_the_whole_batch_or_draws_at_random(recipe: str) -> None:
    model = build_model(RECIPES[recipe].model, 10).train()
    images = torch.rand(6, 1, 28, 28)
    torch.testing.assert_close(model(images), torch.cat([model(images[:2]), model(images[2:])]))


FAMILIES = {  # of torchvision's models, the smallest of each, and a size that it takes
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
def test_models_of_torchvision_fit_channels_and_classes_and_are_built_again(
    name: str, size: int, channels: int, tmp_path: Path
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = build_model(name, 3, (channels, size, size))
    images = torch.rand(4, channels, size, size)
    output = model(images)  # in training mode, where auxiliary heads would answer too
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
def test_a_size_that_a_model_does_not_take_is_refused_with_one_that_it_takes(
    name: str, shape: tuple[int, int, int], words: list[str]
) -> None:
    with pytest.raises(ConfigError, match=f"--model {name}: does not take images of") as caught:
        build_model(name, 3, shape)
    assert all(word in str(caught.value) for word in words)


def test_one_image_at_a_time_is_refused_for_a_network_with_batchnorm() -> None:
    with pytest.raises(ConfigError, match="--batch-size 1: this network has BatchNorm"):
        check_batch(build_model("resnet18", 3, (3, 32, 32)), 1, (3, 32, 32))
    model = build_model("resnet18", 3, (3, 64, 64))
    check_batch(model, 1, (3, 64, 64))  # 2 x 2 places are left of it
    assert int(model.state_dict()["net.bn1.num_batches_tracked"]) == 0
    check_batch(build_model("resnet18", 3, (3, 32, 32)), 2, (3, 32, 32))
    check_batch(build_model("cnn", 3, (3, 32, 32)), 1, (3, 32, 32))


def test_a_vision_transformer_is_built_for_the_size_of_the_images() -> None:
    assert build_model("vit_b_32", 3, (1, 64, 64))(torch.rand(2, 1, 64, 64)).shape == (2, 3)


@pytest.mark.parametrize("name", ["cnm", "raft_large", "quantized_resnet18"])
def test_what_is_no_classification_model_is_refused(name: str) -> None:
    with pytest.raises(
        ConfigError, match=f"--model {name}: neither mlp nor cnn nor cnn-quick nor cnn-deep nor one of torchvision's"
    ):
        build_model(name, 3)


def test_a_model_for_grey_images_answers_as_that_in_colour_to_a_grey_picture() -> None:
    torch.manual_seed(0)
    colour = build_model("resnet18", 3, (3, 32, 32)).eval()
    torch.manual_seed(0)
    grey = build_model("resnet18", 3, (1, 32, 32)).eval()
    images = torch.rand(4, 1, 32, 32)
    normalised = (images - grey.mean) / grey.std * colour.std + colour.mean  # type: ignore[operator]
    torch.testing.assert_close(grey(images), colour(normalised), atol=1e-4, rtol=1e-4)


@pytest.fixture
def weights_of_resnet18(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """A file such as torchvision would download, where it would lie; and no network to download it again."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    torch.manual_seed(7)
    state: dict[str, Tensor] = models.resnet18().state_dict()
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(state, tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth")
    return state


@pytest.mark.parametrize("channels", [1, 3])
def test_pretrained_weights_are_taken_for_all_but_the_last_layer(
    channels: int, weights_of_resnet18: dict[str, Tensor]
) -> None:
    model = build_model("resnet18", 3, (channels, 64, 64), pretrained=True)
    found = {name.removeprefix("net."): value for name, value in model.state_dict().items()}
    assert found["fc.weight"].shape == (3, 512)
    if channels == 1:
        weights_of_resnet18["conv1.weight"] = weights_of_resnet18["conv1.weight"].sum(dim=1, keepdim=True)
    for name, value in weights_of_resnet18.items():
        assert name.startswith("fc.") or torch.equal(found[name], value), name


def test_a_saved_model_is_built_again_without_the_weights_that_it_began_with(
    weights_of_resnet18: dict[str, Tensor], tmp_path: Path
) -> None:
    model = build_model("resnet18", 3, (3, 64, 64), pretrained=True)
    save_model(model, tmp_path / "model", ModelConfig("resnet18", ("a", "b", "c"), (64, 64), "photographs", 3))
    (tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth").unlink()
    again, _ = load_model(tmp_path / "model")
    images = torch.rand(2, 3, 64, 64)
    assert torch.equal(again(images), model.eval()(images))


def test_pretrained_weights_that_cannot_be_had_are_named_with_the_place_for_them(
    weights_of_resnet18: dict[str, Tensor], tmp_path: Path
) -> None:
    file = tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match="damaged"):
        build_model("resnet18", 3, (3, 64, 64), pretrained=True)
    file.unlink()
    with pytest.raises(UserError, match=r"--pretrained: the weights of resnet18 cannot be had \(URLError") as caught:
        build_model("resnet18", 3, (3, 64, 64), pretrained=True)
    assert "download.pytorch.org" in str(caught.value)
    assert str(file) in str(caught.value)
    with pytest.raises(ConfigError, match="--pretrained: there are no such weights for cnn"):
        build_model("cnn", 3, pretrained=True)


def test_every_model_of_torchvision_has_pretrained_weights_and_a_smallest_size() -> None:
    for name in models.list_models(module=models):
        weights = models.get_model_weights(name).DEFAULT
        assert weights.url.startswith("https://download.pytorch.org/models/")
        assert weights.meta["min_size"]
        assert weights.transforms().mean


def test_choosing_the_threads_leaves_a_model_with_batchnorm_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    model = build_model("resnet18", 3, (3, 64, 64))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert choose_threads(model, torch.rand(10, 3, 64, 64)) >= 1
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())


def test_a_description_tells_colour_from_grey_and_an_old_one_means_grey(tmp_path: Path) -> None:
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
