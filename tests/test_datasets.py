"""Fashion-MNIST's files, resized digits, and the classifiers of both."""

import gzip
import re
import struct
import sys

import pytest
import torch
from support import run

import iia_ode as iia
from iia_ode.denoisers import ClassifierOptions, ImageClassifier, classifier, load_classifier, save_classifier
from iia_ode.denoisers.datasets import FASHION_CLASSES
from iia_ode.errors import FileFormatError, InputError, MissingDependencyError
from iia_ode.files import read_tensors, write_tensors

CLASSIFIERS = {
    "digits": (classifier.DIGITS_CLASSIFIER, classifier.DIGITS_CLASSIFIER_OPTIONS),
    "fashion": (classifier.FASHION_CLASSIFIER, classifier.FASHION_CLASSIFIER_OPTIONS),
}


def idx(values, sizes):
    return struct.pack(f">BBBB{len(sizes)}I", 0, 0, 8, len(sizes), *sizes) + bytes(values)


@pytest.fixture
def folder(tmp_path):
    """Fashion-MNIST with 30 training images, of which image k has gray level k, and 10 test images, all white."""
    for part, count, gray in (("train", 30, range(30)), ("t10k", 10, [255] * 10)):
        images = idx([value for value in gray for _ in range(28 * 28)], (count, 28, 28))
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
        labels = idx([k % 10 for k in range(count)], (count,))
        (tmp_path / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))
    return tmp_path


def test_fashion_images_are_scaled_from_black_at_minus_one_to_white_at_one_and_the_test_images_marked(folder):
    images, labels, test = iia.denoisers.fashion_data(folder)
    assert (images.shape, images.dtype, labels.dtype) == ((40, 1, 28, 28), torch.float32, torch.int64)
    assert torch.equal(images[:30, 0, 5, 5], torch.arange(30) / 127.5 - 1)
    assert torch.equal(test, torch.arange(40) >= 30)
    assert bool((images[test] == 1).all())
    assert labels[:12].tolist() == [*range(10), 0, 1]
    assert len(FASHION_CLASSES) == 10


def test_missing_fashion_data_name_the_package_that_brings_them(tmp_path):
    with pytest.raises(MissingDependencyError, match="apt-get install dataset-fashion-mnist") as caught:
        iia.denoisers.fashion_data(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"no gzip", "cannot be read"),
        (gzip.compress(idx(range(30), (30,)))[:-9], "cannot be read"),
        (gzip.compress(b"\0\0\x0d\x01" + bytes(40)), "no IDX file of bytes in 1 dimensions"),
        (gzip.compress(idx([], (3, 28, 28))), "no IDX file of bytes in 1 dimensions"),
        (gzip.compress(idx(range(29), (30,))), r"should have values of shape \[30\], and has 29 values"),
        (gzip.compress(idx(range(29), (29,))), "has 30 images and 29 labels"),
    ],
    ids=["no gzip", "cut", "floats", "images", "short", "fewer"],  # compressed bytes hold the time of day
)
def test_damaged_fashion_data_are_refused(folder, content, text):
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(content)
    with pytest.raises(FileFormatError, match=text):
        iia.denoisers.fashion_data(folder)


def test_digits_are_resized_without_a_change_of_their_range_or_their_look():
    small, labels = iia.denoisers.digits_data()
    large, same = iia.denoisers.digits_data(28)
    assert large.shape == (1797, 1, 28, 28)
    assert torch.equal(labels, same)
    assert float(large.abs().max()) <= 1
    back = torch.nn.functional.interpolate(large[:50], size=(8, 8), mode="area")
    assert float((back - small[:50]).square().mean().sqrt()) < 0.25 * float(small.std())


# ---- classifiers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_classifier_is_small_and_its_card_states_the_figures_of_its_file(name):
    weights, options = CLASSIFIERS[name]
    about = read_tensors(weights, "classifier")[1]["about"]
    assert weights.stat().st_size < 500_000
    assert about["options"] == options.to_dict()
    card = weights.with_suffix(".md").read_text()
    for key in ("train_accuracy", "test_accuracy"):
        assert f"{about[key]:.2%}" in card
    for key in ("epochs", "batch", "seed"):
        assert re.search(rf"{key}\W+{about['options'][key]}\b", card)
    assert f"iia-ode train {name}-classifier" in card
    assert about["test_accuracy"] > 0.9


def test_the_classifier_of_digits_reads_images_that_it_has_not_seen_and_knows_its_training_data(monkeypatch):
    found = iia.denoisers.digits_classifier()
    images, labels = iia.denoisers.digits_data()
    assert float((found(images[4::5]).argmax(1) == labels[4::5]).float().mean()) > 0.95
    seen = found.features(images[torch.arange(len(images)) % 5 != 4]).double()
    assert torch.allclose(seen.mean(0), found.mean, atol=1e-5)
    assert torch.allclose(seen.T.cov(), found.covariance, atol=1e-4)


def test_classifiers_load_without_data_and_clip_what_a_screen_clips(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    found = iia.denoisers.fashion_classifier()
    x = 2 * torch.randn(3, 1, 28, 28)
    assert torch.equal(found.features(x), found.features(x.clamp(-1, 1)))
    assert found.features(x).shape == (3, 64)
    with pytest.raises(InputError, match=r"takes images \[B, 1, 28, 28\], got \[3, 1, 8, 8\]"):
        found(torch.zeros(3, 1, 8, 8))


def small_training(folder, **options):
    return iia.denoisers.train_fashion_classifier(
        ClassifierOptions(**{"epochs": 1, "batch": 10, **options}), folder=folder, progress=False
    )


def test_training_a_classifier_is_seeded_and_comes_back_from_its_file(folder, tmp_path):
    state = torch.get_rng_state()
    some, again = (small_training(folder).classifier for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    path = save_classifier(tmp_path / "net.safetensors", some, {"note": "test"})
    loaded = load_classifier(path)
    x = torch.randn(4, 1, 28, 28)
    for other in (again, loaded):
        assert torch.equal(other(x), some(x))
        assert torch.equal(other.covariance, some.covariance)
    assert not torch.equal(small_training(folder, seed=1).classifier(x), some(x))
    assert not any(p.requires_grad for p in loaded.parameters())


@pytest.mark.parametrize("options", [{"epochs": 0}, {"batch": 0}, {"shift": -1}])
def test_a_training_of_a_classifier_with_options_out_of_range_is_refused(options):
    with pytest.raises(InputError, match="of the training must be a whole number"):
        ClassifierOptions(**options)


@pytest.mark.parametrize("channels", [[8, 32, 64], [], "x", [-8, 1, 1]])
def test_a_file_that_does_not_fit_its_header_is_refused(tmp_path, channels):
    network = ImageClassifier()
    config = {**network.config, "channels": channels}
    path = write_tensors(tmp_path / "net", "classifier", network.state_dict(), {"config": config})
    with pytest.raises(FileFormatError, match=r"does not hold the network|is damaged"):
        load_classifier(path)


def test_the_commands_train_both_networks_from_a_folder_of_data(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    short = ["--data", str(folder), "--batch", "4"]
    status, printed, _ = run(capsys, "train", "fashion", *short, "--steps", "2", "--checkpoint", "state")
    assert (status, "held out" in printed) == (0, True)
    whole, half = (iia.load(f"fashion{end}.safetensors") for end in ("", "-halfway"))
    assert {v.dtype for v in whole.parameters()} == {torch.float16}
    assert not torch.equal(whole.network.stem.weight, half.network.stem.weight)
    assert iia.load("fashion-classifier.safetensors").shape == (1, 28, 28)
    status, printed, _ = run(
        capsys, "train", "fashion-classifier", *short, "--epochs", "1", "--out", "alone.safetensors"
    )
    assert (status, bool(re.search(r"on test images \d+\.\d\d%", printed))) == (0, True)
    assert iia.load("alone.safetensors").shape == (1, 28, 28)
    status, _, error = run(capsys, "train", "fashion", "--data", str(tmp_path / "nowhere"))
    assert status == 2
    assert "apt-get install dataset-fashion-mnist" in error
