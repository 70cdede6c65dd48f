"""Reading datasets, and the batches made of them."""

import gzip
import shutil
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from accelerate.utils import DataLoaderConfiguration
from torch.utils.data import DataLoader

from mnist.config.settings import PROJECT_FOLDER, DataOptions
from mnist.data.datasets import FILES, SOURCES, load_dataset, read_idx
from mnist.data.loader import BatchDataset, BatchLoader, Training, build_loader, evaluation_splits, place_images
from mnist.data.splits import ImageData, MappedImages, Split
from mnist.data.transforms import augmentation_parameters
from mnist.errors import ConfigError, UserError
from mnist.training.lean import LeanAccelerator

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
def test_checksums_and_file_names_are_torchvisions(name: str) -> None:
    theirs = getattr(torchvision.datasets, SOURCES[name].torchvision_class)
    assert {f"{file}.gz": md5 for file, md5 in SOURCES[name].md5.items()} == dict(theirs.resources)
    if name != "mnist":  # there: "0 - zero"
        assert list(SOURCES[name].class_names) == theirs.classes


def test_unpacked_files_are_used_without_a_network(tmp_path: Path, no_network: None) -> None:
    unpack_mnist(tmp_path / "FashionMNIST" / "raw", count=100)
    data = load_dataset("fashion-mnist", tmp_path)
    assert data.class_names[0] == "T-shirt/top"
    assert len(data.train) == len(data.test) == 100
    assert "checksums differ from those of the published files: train-images-idx3-ubyte, " in data.notes[0]


def test_recompressed_files_are_used_with_a_note_except_mnist(tmp_path: Path, no_network: None) -> None:
    for name in ("FashionMNIST", "MNIST"):
        unpack_mnist(tmp_path / name / "raw", count=100)
        for path in (tmp_path / name / "raw").iterdir():
            path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert f"{FILES[0]}.gz" in load_dataset("fashion-mnist", tmp_path).notes[0]
    with pytest.raises(UserError, match="corrupt, MD5"):
        load_dataset("mnist", tmp_path)


def test_a_failed_download_names_the_missing_files_and_their_folder(tmp_path: Path, no_network: None) -> None:
    with pytest.raises(UserError) as caught:
        load_dataset("kmnist", tmp_path)
    message = str(caught.value)
    assert str(tmp_path / "KMNIST" / "raw") in message
    assert all(f"{file}.gz" in message and SOURCES["kmnist"].md5[file] in message for file in FILES)


def test_only_the_missing_file_of_mnist_is_named_with_git_as_its_source(tmp_path: Path, no_network: None) -> None:
    shutil.copytree(RAW, tmp_path / "MNIST" / "raw")
    (tmp_path / "MNIST" / "raw" / f"{FILES[3]}.gz").unlink()
    with pytest.raises(UserError, match=rf"{FILES[3]}\.gz.*\n.*git checkout -- data") as caught:
        load_dataset("mnist", tmp_path)
    assert f"{FILES[0]}.gz" not in str(caught.value)


def test_a_flipped_bit_is_an_error_with_both_checksums(tmp_path: Path) -> None:
    path = tmp_path / f"{FILES[3]}.gz"
    content = bytearray((RAW / path.name).read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"{path}: .*ec29112dd5afa0611ce80d1b7f02629c.*git checkout"):
        read_idx(path, SOURCES["mnist"].md5[FILES[3]])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("raw", b"", "not an IDX file"),
        ("raw", b"hello, world", "not an IDX file"),
        ("raw", b"\0\0\x08\3\0\0", "not an IDX file"),
        ("raw", struct.pack(">BBBBI", 0, 0, 8, 1, 10) + b"123", "3 bytes of data"),
        ("raw", struct.pack(">BBBBI", 0, 0, 8, 1, 2) + b"123", "3 bytes of data"),
        ("labels.gz", (RAW / f"{FILES[3]}.gz").read_bytes()[:2000], r"not a complete \.gz file"),
    ],
)
def test_an_incomplete_file_is_an_error_with_its_name(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{tmp_path / name}: {message}"):
        read_idx(tmp_path / name)


def test_images_and_labels_that_do_not_match_are_refused(tmp_path: Path) -> None:
    unpack_mnist(tmp_path / "KMNIST" / "raw", count=20)
    labels = tmp_path / "KMNIST" / "raw" / FILES[1]
    labels.write_bytes(struct.pack(">BBBBI", 0, 0, 8, 1, 19) + labels.read_bytes()[8:27])
    with pytest.raises(UserError, match="do not match"):
        load_dataset("kmnist", tmp_path)
    labels.write_bytes(struct.pack(">BBBBI", 0, 0, 8, 1, 20) + bytes([99] * 20))
    with pytest.raises(UserError, match="contains label 99, but there are only 10 classes"):
        load_dataset("kmnist", tmp_path)


def test_validation_images_are_the_last_training_images(digits: ImageData) -> None:
    cut = load_dataset("mnist", PROJECT_FOLDER / "data", DataOptions(validation_size=1000, limit_train_images=500))
    assert cut.validation is not None
    assert torch.equal(cut.validation.images[:], digits.train.images[-1000:])
    assert torch.equal(cut.train.images[:], digits.train.images[:500])
    whole = load_dataset("mnist", PROJECT_FOLDER / "data", DataOptions(validation_size=1000, limit_train_images=60_000))
    assert len(whole.train) == 59_000
    with pytest.raises(ConfigError, match="--validation-size 60000"):
        load_dataset("mnist", PROJECT_FOLDER / "data", DataOptions(validation_size=60_000))


def test_batches_equal_torchvisions_to_tensor(digits: ImageData) -> None:
    X, y, weight = next(iter(build_loader(digits.test, 10)))
    to_tensor = torchvision.transforms.ToTensor()
    expected = torch.stack([to_tensor(image.numpy()) for image in digits.test.images[:10]])
    assert torch.equal(X, expected)
    assert torch.equal(y, digits.test.labels[:10])
    assert torch.equal(weight, torch.ones(10))


def numbered(count: int) -> Split:
    """Images whose label is their number."""
    return Split(torch.zeros(count, 2, 2, dtype=torch.uint8), torch.arange(count))


def test_an_epoch_has_every_image_once_in_an_order_of_its_own() -> None:
    batches = build_loader(numbered(107), 10, training=Training(seed=3))
    orders = []
    for epoch in (1, 2):
        batches.dataset.set_epoch(epoch)  # type: ignore[attr-defined]
        orders.append(torch.cat([y[weight > 0] for _, y, weight in batches]))
        assert sorted(orders[-1].tolist()) == list(range(107))
    assert not torch.equal(orders[0], orders[1])


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        torch.rand(seed + 7)  # must not matter
        batches = build_loader(numbered(50), 10, training=Training(seed))
        batches.dataset.set_epoch(epoch)  # type: ignore[attr-defined]
        return torch.cat([y for _, y, _ in batches]).tolist()

    assert order(1, 2) == order(1, 2)
    assert order(1, 2) != order(2, 1)


def test_prepared_batches_skip_torchs_iterator_and_come_in_its_order(fresh_accelerate: None) -> None:
    ours, theirs = (build_loader(numbered(57), 10, training=Training(seed=0)) for _ in range(2))
    prepared = LeanAccelerator(cpu=True, dataloader_config=DataLoaderConfiguration(split_batches=True)).prepare(ours)
    assert type(prepared.base_dataloader) is BatchLoader
    for one, other in zip(prepared, DataLoader.__iter__(theirs), strict=True):
        assert all(torch.equal(mine, its) for mine, its in zip(one, other, strict=True))


def test_iterating_draws_nothing_from_the_global_generator() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    list(build_loader(numbered(50), 10, training=Training(seed=0)))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(("count", "windows"), [(100, [40, 40, 20]), (107, [40, 40, 27]), (120, [40, 40, 40])])
def test_each_optimizer_step_averages_over_its_actual_number_of_images(count: int, windows: list[int]) -> None:
    batches = build_loader(numbered(count), 10, num_processes=3, training=Training(seed=0, accumulation_steps=4))
    weights = [weight for _, _, weight in batches]
    for index, images in enumerate(windows):
        window = torch.cat(weights[4 * index : 4 * index + 4])
        real = window[window > 0]
        assert len(real) == images
        # accelerator.backward divides by 4, DistributedDataParallel by 3
        np.testing.assert_allclose(real, 4 * 3 / images, rtol=1e-6)


Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


KINDS = ("light", "writing", "photo")


def augmented(digits: ImageData, kind: str, processes: int, rank: int, first: int = 0) -> list[Batch]:
    """A process's batches in the second epoch of 107 images, global batch size 20, starting at batch `first`."""
    split = digits.train.take(slice(0, 107))
    if kind == "photo":
        noise = np.random.default_rng(0).integers(0, 256, (107, 24, 24, 3), np.uint8)
        split = Split(torch.from_numpy(noise), split.labels)
    size = -(-20 // processes) * processes
    batches = build_loader(split, 20, processes, training=Training(seed=3, augment=kind))
    batches.dataset.set_epoch(1)  # type: ignore[attr-defined]
    share = size // processes
    starts = range(first * size + rank * share, 6 * size, size)
    return [batches.dataset.__getitems__(range(start, start + share)) for start in starts]  # type: ignore[attr-defined]


@pytest.mark.parametrize("processes", [1, 3])
def test_a_balanced_loss_gives_every_class_the_same_weight(processes: int) -> None:
    labels = torch.tensor([0] * 36 + [2] * 4 + [3] * 80)  # no image of class 1
    split = Split(torch.zeros(len(labels), 4, 4, dtype=torch.uint8), labels)
    batches = list(build_loader(split, 10, processes, training=Training(0, balanced=True)))  # 12 steps
    y, sample_weight = (torch.cat([batch[part] for batch in batches]) for part in (1, 2))
    sums = torch.bincount(y, sample_weight)
    torch.testing.assert_close(sums / processes, torch.tensor([4.0, 0.0, 4.0, 4.0]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("processes", [2, 3])  # 20 does not divide by 3: a batch is filled up
def test_augmentation_does_not_depend_on_the_number_of_processes(processes: int, kind: str, digits: ImageData) -> None:
    alone = augmented(digits, kind, 1, 0)
    shares = [augmented(digits, kind, processes, rank) for rank in range(processes)]
    for number, (X, y, _) in enumerate(alone):
        together = [torch.cat([share[number][part] for share in shares])[:20] for part in (0, 1)]
        assert torch.equal(X, together[0])
        assert torch.equal(y, together[1])


@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_resumed_midway_has_the_same_images(
    kind: str, digits: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BatchDataset, "READ_AHEAD", 40 * 28 * 28)
    whole, rest = augmented(digits, kind, 1, 0), augmented(digits, kind, 1, 0, first=3)
    for left, right in zip(whole[3:], rest, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_augmented_images_resemble_the_originals_and_differ_per_epoch(digits: ImageData) -> None:
    split = digits.train.take(slice(0, 50))
    plain, changed = (
        build_loader(split, 50, training=Training(seed=0, augment=augment)) for augment in ("none", "light")
    )
    (X, *others), (Z, *same) = next(iter(plain)), next(iter(changed))
    assert all(torch.equal(a, b) for a, b in zip(others, same, strict=True))
    assert not any(torch.allclose(before, after) for before, after in zip(X, Z, strict=True))
    assert F.cosine_similarity(X.flatten(1), Z.flatten(1)).median() > 0.4  # still the same digits
    changed.dataset.set_epoch(1)  # type: ignore[attr-defined]
    assert not torch.equal(changed.dataset.parameters[0], augmentation_parameters(50, 0, 0, flip=False))  # type: ignore[attr-defined]


def test_writing_is_not_mirrored(digits: ImageData) -> None:
    assert [name for name, source in SOURCES.items() if source.flips] == ["fashion-mnist"]
    assert not digits.flips
    split = digits.train.take(slice(0, 50))
    for flips in (False, True):
        batches = build_loader(split, 50, training=Training(seed=0, augment="light", flips=flips))
        assert bool(batches.dataset.parameters[..., 4].any()) is flips  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("free", "homes"),
    [(4 * 170, ["meta"] * 3), (4 * 169, ["meta", "meta", "cpu"]), (4 * 116, ["meta", "cpu", "cpu"]), (0, ["cpu"] * 3)],
)
def test_splits_together_take_at_most_a_quarter_of_a_devices_free_memory(
    free: int, homes: list[str], digits: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mnist.data.loader.device_memory", lambda device: (free * 784, free * 784))
    train, rest, meta = digits.train.take(slice(0, 107)), digits.test, torch.device("meta")  # shapes without data
    data = ImageData("x", ("0",), train, rest.take(slice(0, 10)), rest.take(slice(0, 53)))
    placed = place_images(data, meta)
    splits = [placed.train, placed.validation, placed.test]
    assert [split.images[:].device.type for split in splits if split] == homes
    for batch in build_loader(placed.train, 20, 3, meta, Training(seed=0, augment="light")):
        assert [values.device.type for values in batch] == ["meta"] * 3
        assert [values.shape for values in batch] == [(21, 1, 28, 28), (21,), (21,)]


@pytest.mark.parametrize("mapped", [0, MappedImages.MAPPED])
def test_images_in_a_file_are_copied_to_a_device_piece_by_piece(
    mapped: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MappedImages, "MAPPED", mapped)
    monkeypatch.setattr(MappedImages, "PIECE", 1 << 20)
    content = torch.randint(256, (10_007, 28, 28), dtype=torch.uint8)
    (tmp_path / "images").write_bytes(content.numpy().tobytes())
    images = MappedImages(tmp_path / "images", tuple(content.shape))
    assert torch.equal(images.to(torch.device("cpu")), content)
    tracemalloc.start()
    assert images.to(torch.device("meta")).shape == content.shape
    assert tracemalloc.get_traced_memory()[1] < 2.5 * 2**20  # NumPy's arrays count
    tracemalloc.stop()


def test_on_the_cpu_images_are_not_copied(digits: ImageData) -> None:
    batches = build_loader(digits.train, 10, device=torch.device("cpu"))
    assert batches.dataset.split.images.data_ptr() == digits.train.images[:].data_ptr()  # type: ignore[attr-defined]


def test_a_batch_larger_than_the_training_images_is_refused() -> None:
    message = r"--global-batch-size 120 \(--batch-size 60 x 2 processes\): larger than the 100"
    with pytest.raises(ConfigError, match=message):
        build_loader(numbered(100), 120, num_processes=2, training=Training(seed=0))
    assert len(build_loader(numbered(100), 500)) == 1  # fine in evaluation


def test_training_images_are_evaluated_all_or_as_a_fixed_sample() -> None:
    few, many, test = numbered(20), numbered(1000), numbered(10)
    splits = evaluation_splits(ImageData("few", ("0",), few, None, test), seed=0)
    assert list(splits) == ["train", "test"]
    assert splits["train"] is few
    data = ImageData("many", ("0",), many, few, test)
    splits = evaluation_splits(data, seed=0)
    assert list(splits) == ["train", "val", "test"]
    assert len(set(splits["train"].labels.tolist())) == 10
    assert torch.equal(splits["train"].labels, evaluation_splits(data, seed=0)["train"].labels)
