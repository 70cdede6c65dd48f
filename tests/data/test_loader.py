"""Reading data sets, and the batches made of them."""

import gzip
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision

from mnist.config.settings import PROJECT_FOLDER, DataOptions
from mnist.data.datasets import FILES, SOURCES, load_dataset, read_idx
from mnist.data.loader import BatchDataset, Training, build_loader, evaluation_splits
from mnist.data.splits import ImageData, Split
from mnist.data.transforms import augmentation_parameters
from mnist.errors import ConfigError, UserError

RAW = PROJECT_FOLDER / "data" / "MNIST" / "raw"


def unpack_mnist(folder: Path, *, count: int = 60_000) -> None:
    """Write MNIST's first images of each file, unpacked, into `folder`."""
    folder.mkdir(parents=True)
    for file in FILES:
        content = gzip.decompress((RAW / f"{file}.gz").read_bytes())
        header = 4 + 4 * content[3]
        (images,) = struct.unpack(">I", content[4:8])
        size = (len(content) - header) // images
        kept = min(count, images)
        (folder / file).write_bytes(
            content[:4] + struct.pack(">I", kept) + content[8:header] + content[header:][: kept * size]
        )


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Send every download to a port where nothing listens."""
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")


def test_mnist_is_read_as_torchvision_reads_it(digits: ImageData, tmp_path: Path) -> None:
    unpack_mnist(tmp_path / "MNIST" / "raw")
    for train, split in ((True, digits.train), (False, digits.test)):
        theirs = torchvision.datasets.MNIST(str(tmp_path), train=train)
        assert torch.equal(split.images[:], theirs.data)
        assert torch.equal(split.labels, theirs.targets)
    assert (len(digits.train), len(digits.test), digits.notes) == (60_000, 10_000, ())


def test_reading_leaves_the_data_folder_as_it_was() -> None:
    before = sorted((path.name, path.stat().st_mtime_ns) for path in RAW.iterdir())
    load_dataset("mnist", PROJECT_FOLDER / "data")
    assert sorted((path.name, path.stat().st_mtime_ns) for path in RAW.iterdir()) == before


@pytest.mark.parametrize("name", SOURCES)
def test_sums_and_file_names_are_torchvisions(name: str) -> None:
    theirs = getattr(torchvision.datasets, SOURCES[name].torchvision_class)
    assert {f"{file}.gz": md5 for file, md5 in SOURCES[name].md5.items()} == dict(theirs.resources)
    if name != "mnist":  # there: "0 - zero"
        assert list(SOURCES[name].class_names) == theirs.classes


def test_unpacked_files_of_another_data_set_are_used_without_a_network(tmp_path: Path, no_network: None) -> None:
    unpack_mnist(tmp_path / "FashionMNIST" / "raw", count=100)
    data = load_dataset("fashion-mnist", tmp_path)
    assert data.class_names[0] == "T-shirt/top"
    assert len(data.train) == len(data.test) == 100
    assert "not byte for byte as published: train-images-idx3-ubyte, " in data.notes[0]


def test_files_compressed_again_are_used_with_a_note_but_mnist_must_be_the_published_one(
    tmp_path: Path, no_network: None
) -> None:
    for name in ("FashionMNIST", "MNIST"):
        unpack_mnist(tmp_path / name / "raw", count=100)
        for path in (tmp_path / name / "raw").iterdir():
            path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert f"{FILES[0]}.gz" in load_dataset("fashion-mnist", tmp_path).notes[0]
    with pytest.raises(UserError, match="corrupt, MD5"):
        load_dataset("mnist", tmp_path)


def test_without_a_network_missing_files_are_named_with_the_folder_for_them(tmp_path: Path, no_network: None) -> None:
    with pytest.raises(UserError) as caught:
        load_dataset("kmnist", tmp_path)
    message = str(caught.value)
    assert str(tmp_path / "KMNIST" / "raw") in message
    assert all(f"{file}.gz" in message and SOURCES["kmnist"].md5[file] in message for file in FILES)


def test_only_the_missing_file_is_asked_for_and_git_has_mnist(tmp_path: Path, no_network: None) -> None:
    shutil.copytree(RAW, tmp_path / "MNIST" / "raw")
    (tmp_path / "MNIST" / "raw" / f"{FILES[3]}.gz").unlink()
    with pytest.raises(UserError) as caught:
        load_dataset("mnist", tmp_path)
    assert f"{FILES[3]}.gz" in str(caught.value)
    assert f"{FILES[0]}.gz" not in str(caught.value)
    assert "git checkout -- data" in str(caught.value)


def test_a_flipped_bit_is_found_and_named_with_both_sums(tmp_path: Path) -> None:
    path = tmp_path / "t10k-labels-idx1-ubyte.gz"
    content = bytearray((RAW / path.name).read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_idx(path, SOURCES["mnist"].md5["t10k-labels-idx1-ubyte"])
    message = str(caught.value)
    assert str(path) in message
    assert "ec29112dd5afa0611ce80d1b7f02629c" in message
    assert "git checkout" in message


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "not an IDX file"),
        (b"hello, world", "not an IDX file"),
        (b"\0\0\x08\3\0\0", "not an IDX file"),
        (struct.pack(">BBBBI", 0, 0, 8, 1, 10) + b"123", "3 bytes of data"),
        (struct.pack(">BBBBI", 0, 0, 8, 1, 2) + b"123", "3 bytes of data"),
    ],
)
def test_a_raw_file_that_is_not_whole_is_refused_by_name(content: bytes, word: str, tmp_path: Path) -> None:
    (tmp_path / "broken").write_bytes(content)
    with pytest.raises(UserError, match=word) as caught:
        read_idx(tmp_path / "broken")
    assert str(tmp_path / "broken") in str(caught.value)


def test_a_truncated_gz_file_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "labels.gz"
    path.write_bytes((RAW / f"{FILES[3]}.gz").read_bytes()[:2000])
    with pytest.raises(UserError, match=r"labels\.gz: not a whole \.gz file"):
        read_idx(path)


def test_images_and_labels_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    unpack_mnist(tmp_path / "KMNIST" / "raw", count=20)
    labels = tmp_path / "KMNIST" / "raw" / FILES[1]
    labels.write_bytes(struct.pack(">BBBBI", 0, 0, 8, 1, 19) + labels.read_bytes()[8:27])
    with pytest.raises(UserError, match="do not belong together"):
        load_dataset("kmnist", tmp_path)
    labels.write_bytes(struct.pack(">BBBBI", 0, 0, 8, 1, 20) + bytes([99] * 20))
    with pytest.raises(UserError, match="class 99 of only 10"):
        load_dataset("kmnist", tmp_path)


def test_validation_images_are_the_last_training_images_and_are_not_trained_on(digits: ImageData) -> None:
    cut = load_dataset("mnist", PROJECT_FOLDER / "data", DataOptions(validation_size=1000, limit_train_images=500))
    assert cut.validation is not None
    assert torch.equal(cut.validation.images[:], digits.train.images[-1000:])
    assert torch.equal(cut.train.images[:], digits.train.images[:500])
    whole = load_dataset("mnist", PROJECT_FOLDER / "data", DataOptions(validation_size=1000, limit_train_images=60_000))
    assert len(whole.train) == 59_000
    with pytest.raises(ConfigError, match="--validation-size 60000"):
        load_dataset("mnist", PROJECT_FOLDER / "data", DataOptions(validation_size=60_000))


def test_batches_hold_what_to_tensor_makes_of_the_images(digits: ImageData) -> None:
    X, y, weight = next(iter(build_loader(digits.test, 10)))
    to_tensor = torchvision.transforms.ToTensor()
    expected = torch.stack([to_tensor(image.numpy()) for image in digits.test.images[:10]])
    assert torch.equal(X, expected)
    assert torch.equal(y, digits.test.labels[:10])
    assert torch.equal(weight, torch.ones(10))


def numbered(count: int) -> Split:
    """Images whose class is their number."""
    return Split(torch.zeros(count, 2, 2, dtype=torch.uint8), torch.arange(count))


def test_an_epoch_holds_every_image_once_and_the_next_one_in_another_order() -> None:
    batches = build_loader(numbered(107), 10, training=Training(seed=3))
    orders = []
    for epoch in (1, 2):
        batches.dataset.set_epoch(epoch)  # type: ignore[attr-defined]
        orders.append(torch.cat([y[weight > 0] for _, y, weight in batches]))
        assert sorted(orders[-1].tolist()) == list(range(107))
    assert not torch.equal(orders[0], orders[1])


def test_the_order_is_a_function_of_seed_and_epoch_alone() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        torch.rand(seed + 7)  # whatever else draws numbers
        batches = build_loader(numbered(50), 10, training=Training(seed))
        batches.dataset.set_epoch(epoch)  # type: ignore[attr-defined]
        return torch.cat([y for _, y, _ in batches]).tolist()

    assert order(1, 2) == order(1, 2)
    assert order(1, 2) != order(2, 1)


def test_iterating_draws_nothing_from_the_global_generator() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    list(build_loader(numbered(50), 10, training=Training(seed=0)))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(("count", "windows"), [(100, [40, 40, 20]), (107, [40, 40, 27]), (120, [40, 40, 40])])
def test_the_weights_of_each_optimizer_step_make_a_mean_over_its_true_number_of_images(
    count: int, windows: list[int]
) -> None:
    batches = build_loader(numbered(count), 10, num_processes=3, training=Training(seed=0, accumulation_steps=4))
    weights = [weight for _, _, weight in batches]
    for index, images in enumerate(windows):
        window = torch.cat(weights[4 * index : 4 * index + 4])
        real = window[window > 0]
        assert len(real) == images
        # 4 and 3: what accelerator.backward and DistributedDataParallel divide by
        np.testing.assert_allclose(real, 4 * 3 / images, rtol=1e-6)


Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def augmented(digits: ImageData, processes: int, rank: int, first: int = 0) -> list[Batch]:
    """What a process gets of the second epoch of 107 images in batches of 20, from the batch `first` on."""
    split = digits.train.take(slice(0, 107))
    size = -(-20 // processes) * processes
    batches = build_loader(split, 20, processes, training=Training(seed=3, augment=True))
    batches.dataset.set_epoch(1)  # type: ignore[attr-defined]
    share = size // processes
    starts = range(first * size + rank * share, 6 * size, size)
    return [batches.dataset.__getitems__(range(start, start + share)) for start in starts]  # type: ignore[attr-defined]


@pytest.mark.parametrize("processes", [2, 3])  # 20 does not divide by 3: a batch is filled up
def test_an_image_is_augmented_alike_whatever_the_number_of_processes(processes: int, digits: ImageData) -> None:
    alone = augmented(digits, 1, 0)
    shares = [augmented(digits, processes, rank) for rank in range(processes)]
    for number, (X, y, _) in enumerate(alone):
        together = [torch.cat([share[number][part] for share in shares])[:20] for part in (0, 1)]
        assert torch.equal(X, together[0])
        assert torch.equal(y, together[1])


def test_an_epoch_that_is_entered_in_its_middle_has_the_same_images(
    digits: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BatchDataset, "READ_AHEAD", 40 * 28 * 28)
    whole, rest = augmented(digits, 1, 0), augmented(digits, 1, 0, first=3)
    for left, right in zip(whole[3:], rest, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_augmented_images_are_those_of_the_split_changed_and_otherwise_in_each_epoch(digits: ImageData) -> None:
    split = digits.train.take(slice(0, 50))
    plain, changed = (build_loader(split, 50, training=Training(seed=0, augment=augment)) for augment in (False, True))
    (X, *others), (Z, *same) = next(iter(plain)), next(iter(changed))
    assert all(torch.equal(a, b) for a, b in zip(others, same, strict=True))
    assert not any(torch.allclose(before, after) for before, after in zip(X, Z, strict=True))
    assert F.cosine_similarity(X.flatten(1), Z.flatten(1)).median() > 0.4  # still the same digits
    changed.dataset.set_epoch(1)  # type: ignore[attr-defined]
    assert not torch.equal(changed.dataset.parameters, augmentation_parameters(50, 0, 0, flip=False))  # type: ignore[attr-defined]


def test_only_what_is_not_written_is_mirrored(digits: ImageData) -> None:
    assert {name: source.flips for name, source in SOURCES.items()} == {
        "mnist": False,
        "fashion-mnist": True,
        "kmnist": False,
    }
    assert not digits.flips
    split = digits.train.take(slice(0, 50))
    for flips in (False, True):
        batches = build_loader(split, 50, training=Training(seed=0, augment=True, flips=flips))
        assert bool(batches.dataset.parameters[:, 4].any()) is flips  # type: ignore[attr-defined]


@pytest.mark.parametrize(("free", "home"), [(4 * 107 * 784, "meta"), (4 * 107 * 784 - 1, "cpu")])
def test_images_that_take_a_quarter_of_an_accelerators_free_memory_lie_there(
    free: int, home: str, digits: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mnist.data.loader.free_memory", lambda device: free)
    split, meta = digits.train.take(slice(0, 107)), torch.device("meta")  # a device that holds shapes alone
    batches = build_loader(split, 20, 3, meta, Training(seed=0, augment=True))
    assert {values.device.type for values in batches.dataset.split} == {home}  # type: ignore[attr-defined]
    for batch in batches:
        assert [values.device.type for values in batch] == ["meta"] * 3
        assert [values.shape for values in batch] == [(21, 1, 28, 28), (21,), (21,)]


def test_on_the_cpu_images_are_not_copied(digits: ImageData) -> None:
    batches = build_loader(digits.train, 10, device=torch.device("cpu"))
    assert batches.dataset.split.images.data_ptr() == digits.train.images[:].data_ptr()  # type: ignore[attr-defined]


def test_a_batch_larger_than_the_training_images_is_refused() -> None:
    with pytest.raises(
        ConfigError,
        match=r"--global-batch-size 120 \(--batch-size 60 x 2 processes\): larger than the 100",
    ):
        build_loader(numbered(100), 120, num_processes=2, training=Training(seed=0))
    assert len(build_loader(numbered(100), 500)) == 1  # in evaluation it is filled up


def test_in_sample_figures_are_taken_on_all_training_images_or_a_fixed_sample() -> None:
    few, many, test = numbered(20), numbered(1000), numbered(10)
    splits = evaluation_splits(ImageData("few", ("0",), few, None, test), seed=0)
    assert list(splits) == ["train", "test"]
    assert splits["train"] is few
    data = ImageData("many", ("0",), many, few, test)
    splits = evaluation_splits(data, seed=0)
    assert list(splits) == ["train", "val", "test"]
    assert len(set(splits["train"].labels.tolist())) == 10
    assert torch.equal(splits["train"].labels, evaluation_splits(data, seed=0)["train"].labels)
