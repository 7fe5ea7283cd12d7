"""The denoisers that ship with the package, and their training."""

import re
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import iia_ode as iia
from iia_ode.denoisers import EDMDenoiser, TrainingOptions, UNet, load_denoiser, save_denoiser, training
from iia_ode.denoisers.datasets import DIGITS_SOURCE, FASHION_SOURCE, PATCHES_SOURCE
from iia_ode.denoisers.pretrained import (
    DIGITS_OPTIONS,
    DIGITS_WEIGHTS,
    FASHION_OPTIONS,
    FASHION_WEIGHTS,
    PATCHES_OPTIONS,
    PATCHES_WEIGHTS,
)
from iia_ode.denoisers.training import edm_loss, train_edm
from iia_ode.files import read_tensors, write_tensors

LEVELS = [0.05, 0.5, 2.0]
SHIPPED = {
    "digits": (DIGITS_WEIGHTS, DIGITS_SOURCE, DIGITS_OPTIONS, 5_000_000),
    "fashion": (FASHION_WEIGHTS, FASHION_SOURCE, FASHION_OPTIONS, 2_000_000),
    "patches": (PATCHES_WEIGHTS, PATCHES_SOURCE, PATCHES_OPTIONS, 4_000_000),
}


@pytest.fixture(scope="module")
def model():
    return iia.denoisers.digits()


@pytest.fixture(scope="module")
def data():
    return iia.denoisers.digits_data()


@pytest.fixture(scope="module")
def patch_model():
    return iia.denoisers.patches()


@pytest.fixture(scope="module")
def patch_data():
    return iia.denoisers.patches_data()


def noisy(images, sigma, seed=0):
    return images + sigma * torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))


def test_the_weights_load_without_scikit_learn_and_without_a_network_connection(monkeypatch):
    def refuse(*_, **__):
        raise OSError("no network")

    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setattr("socket.socket.connect", refuse)
    assert iia.denoisers.digits()(torch.zeros(2, 1, 8, 8), torch.ones(2)).shape == (2, 1, 8, 8)
    assert iia.denoisers.patches()(torch.zeros(2, 3, 16, 16), torch.ones(2)).shape == (2, 3, 16, 16)
    assert iia.denoisers.fashion()(torch.zeros(2, 1, 28, 28), torch.ones(2)).shape == (2, 1, 28, 28)
    sources = Path(iia.__file__).parent.rglob("*.py")
    assert not any(re.search(r"^(import|from) sklearn", source.read_text(), re.M) for source in sources)


@pytest.mark.parametrize("name", ["digits", "patches"])
def test_without_scikit_learn_the_data_names_the_extra_that_brings_it(monkeypatch, name):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(iia.errors.MissingDependencyError, match=r"pip install 'iia-ode\[train\]'"):
        getattr(iia.denoisers, f"{name}_data")()


@pytest.mark.parametrize(("weights", "source", "options", "size"), SHIPPED.values(), ids=SHIPPED)
def test_the_weights_are_a_few_megabytes(weights, source, options, size):
    assert weights.stat().st_size <= size


@pytest.mark.parametrize("name", SHIPPED)
def test_the_model_card_states_the_figures_of_the_weights_file(name):
    weights = SHIPPED[name][0]
    about = read_tensors(weights, "denoiser")[1]["about"]
    card = weights.with_suffix(".md").read_text()
    for key in ("train_loss", "held_out_loss"):
        assert f"{about[key]:.4f}" in card
    for key in ("steps", "batch", "seed"):
        assert re.search(rf"{key}\W+{about['options'][key]}\b", card)
    assert f"iia-ode train {name}" in card


@pytest.mark.parametrize("sigma", LEVELS)
def test_it_denoises(model, data, sigma):
    images, labels = data[0][:100], data[1][:100]
    x = noisy(images, sigma)
    error = (model(x, torch.full((100,), sigma), labels) - images).square().mean().sqrt()
    # Linear shrinkage to the mean image is the best that needs no network.
    mean, variance = images.mean(0), images.var(0)
    linear = mean + variance / (variance + sigma**2) * (x - mean)
    assert error < 0.9 * (linear - images).square().mean().sqrt()


def test_labels_carry_information_and_no_label_is_the_null_label(model, data):
    images, labels = data[0][:100], data[1][:100]
    x, sigma = noisy(images, 2.0), torch.full((100,), 2.0)
    right = (model(x, sigma, labels) - images).square().mean()
    null = (model(x, sigma) - images).square().mean()
    wrong = (model(x, sigma, (labels + 1) % 10) - images).square().mean()
    assert right < null < wrong
    assert torch.equal(model(x[:9], sigma[:9]), model(x[:9], sigma[:9], torch.full((9,), 10)))


def test_guidance_moves_samples_towards_their_class(model, data):
    """A nearest-centroid reader agrees with the label at least as often under guidance as without."""
    centroids = torch.stack([data[0][data[1] == k].mean(0) for k in range(10)]).flatten(1)
    labels = torch.arange(20) % 10
    x = 80 * torch.randn((20, 1, 8, 8), generator=torch.Generator().manual_seed(3))
    agree = {}
    for scale in (0.0, 1.0, 2.0):
        ode = iia.ProbabilityFlowODE(
            model,
            iia.EDM(),
            conditioning={"class_labels": labels},
            unconditional={"class_labels": torch.tensor([10])},
            guidance_scale=scale,
        )
        samples = iia.sample(ode, x, iia.grids.karras(9), "dpmpp_2m").flatten(1)
        agree[scale] = float((torch.cdist(samples, centroids).argmin(1) == labels).float().mean())
    assert agree[0.0] < 0.3 < 0.7 < agree[1.0] <= agree[2.0]


def test_a_half_precision_copy_agrees_with_the_full_one(model):
    ode = iia.ProbabilityFlowODE(model, iia.EDM())
    half = iia.ProbabilityFlowODE(load_denoiser(DIGITS_WEIGHTS).bfloat16(), iia.EDM())
    x = 80 * torch.randn((3, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    full, rough = (iia.sample(o, x, iia.grids.karras(6), "heun") for o in (ode, half))
    assert rough.dtype == torch.float32
    assert float((full - rough).square().mean().sqrt()) < 0.1


def test_wrong_shapes_are_refused_with_the_right_one(model):
    ode = iia.ProbabilityFlowODE(model, iia.EDM())
    with pytest.raises(iia.errors.InputError, match=r"must have shape \[B, 1, 8, 8\], got \[4, 3, 8, 8\]"):
        iia.sample(ode, torch.randn(4, 3, 8, 8), iia.grids.karras(3), "heun")
    with pytest.raises(iia.errors.InputError, match=r"\[B, 1, 8, 8\], got \[8, 8\]"):
        iia.sample(ode, torch.randn(8, 8), iia.grids.karras(3), "heun")
    with pytest.raises(iia.errors.InputError, match="a denoiser of images"):
        model(torch.zeros(1, 8, 8), torch.ones(1))
    with pytest.raises(iia.errors.InputError, match=r"class_labels must be integers of shape \[2\]"):
        model(torch.zeros(2, 1, 8, 8), torch.ones(2), torch.ones(2))


def test_patches_held_out_share_no_pixel_with_those_trained_on(monkeypatch):
    """In photographs whose pixels are all different, colours tell where a patch is from."""
    place = torch.arange(427 * 640).reshape(427, 640)
    photograph = torch.stack([place % 256, place // 256 % 256, place // 65536], dim=-1).to(torch.uint8).numpy()
    monkeypatch.setattr("sklearn.datasets.load_sample_images", lambda: SimpleNamespace(images=[photograph]))
    images, held_out = iia.denoisers.patches_data()
    images = images.double()
    means, weights = images.add(1).mul(127.5), torch.tensor([1, 256, 65536]).double()
    whole = (means - means.round()).abs().amax(dim=(1, 2, 3)) < 1e-3  # halved patches have fractions
    places = (means.round() * weights[:, None, None]).sum(1).long()
    seen, unseen = (places[whole & part].unique() for part in (~held_out, held_out))
    assert len(seen) and len(unseen)
    assert not set(seen.tolist()) & set(unseen.tolist())
    assert 0.05 < float(held_out.float().mean()) < 0.1


@pytest.mark.parametrize("sigma", [0.1, 0.3, 1.0, 3.0])
def test_it_denoises_patches_of_places_it_has_not_seen(patch_model, patch_data, sigma):
    images, held_out = patch_data
    seen, unseen = images[~held_out][::10], images[held_out][::16]
    x = noisy(unseen, sigma)
    error = (patch_model(x, torch.full((len(x),), sigma)) - unseen).square().mean().sqrt()
    # Shrinkage of each pixel to the mean patch: what is optimal for Gaussian pixels of the same variance.
    mean, variance = seen.mean(0), seen.var(0)
    pixelwise = mean + variance / (variance + sigma**2) * (x - mean)
    assert error < 0.7 * (pixelwise - unseen).square().mean().sqrt()


def test_evaluating_the_patches_denoiser_gives_the_held_out_loss_of_its_card(patch_model, patch_data):
    about = read_tensors(PATCHES_WEIGHTS, "denoiser")[1]["about"]
    images = patch_data[0][patch_data[1]][::2]
    generator = torch.Generator().manual_seed(7)
    options = PATCHES_OPTIONS
    sigma = torch.exp(options.log_sigma_mean + options.log_sigma_std * torch.randn(len(images), generator=generator))
    noise = torch.randn(images.shape, generator=generator)
    parts = zip(images.split(256), sigma.split(256), noise.split(256), strict=True)
    losses = [float(edm_loss(patch_model, x, torch.zeros(len(x)).long(), s, n)) * len(x) for x, s, n in parts]
    assert sum(losses) / len(images) == pytest.approx(about["held_out_loss"], rel=0.1)


def test_a_network_without_classes_takes_no_labels(patch_model):
    x, sigma = torch.randn(2, 3, 16, 16), torch.ones(2)
    assert patch_model.network.classes == 0
    assert torch.equal(patch_model(x, sigma), patch_model(x, sigma, torch.zeros(2).long()))
    with pytest.raises(iia.errors.InputError, match=r"must have shape \[B, 3, 16, 16\], got \[4, 1, 8, 8\]"):
        iia.sample(iia.ProbabilityFlowODE(patch_model, iia.EDM()), torch.randn(4, 1, 8, 8), iia.grids.karras(3), "heun")


def train(data, *, checkpoint=None, channels=(8, 16), **options):
    """A network small enough to train in a test."""

    def build():
        return EDMDenoiser(UNet(channels=channels, blocks=1, embedding=16), 0.75, (1, 8, 8))

    images, labels, chosen = data[0][:80], data[1][:80], TrainingOptions(**{"batch": 16, **options})
    return train_edm(build, images, labels, chosen, progress=False, checkpoint=checkpoint)


def test_training_is_seeded_and_lowers_the_loss(tmp_path, data):
    some, again, first = (train(data, **options) for options in ({"steps": 3}, {"steps": 3}, {"steps": 50, "lr": 0.02}))
    for a, b in zip(some.denoiser.parameters(), again.denoiser.parameters(), strict=True):
        assert torch.equal(a, b)
    untrained, other = train(data, steps=1), train(data, steps=1, seed=1)
    assert first.held_out_loss < 0.9 * untrained.held_out_loss
    assert other.held_out_loss != untrained.held_out_loss
    path = save_denoiser(tmp_path / "net.safetensors", first.denoiser, {"note": "test"})
    x, sigma = torch.randn(3, 1, 8, 8), torch.ones(3)
    assert torch.equal(load_denoiser(path)(x, sigma), first.denoiser(x, sigma))


def test_an_interrupted_training_continues_with_the_same_result(tmp_path, monkeypatch, data):
    expected, path = train(data, steps=6), tmp_path / "state.safetensors"
    monkeypatch.setattr("iia_ode.denoisers.training._SECONDS", -1.0)
    steps = iter(range(4))
    original = training._step

    def interrupted(*arguments):
        next(steps)  # the fifth step does not come
        return original(*arguments)

    with monkeypatch.context() as patch, pytest.raises(StopIteration):
        patch.setattr(training, "_step", interrupted)
        train(data, steps=6, checkpoint=path)
    found = train(data, steps=6, checkpoint=path)
    for a, b in ((found.denoiser, expected.denoiser), (found.halfway, expected.halfway)):
        for name, value in a.state_dict().items():
            assert torch.equal(value, b.state_dict()[name])
    assert found.held_out_loss == expected.held_out_loss
    assert not torch.equal(found.halfway.network.stem.weight, found.denoiser.network.stem.weight)
    with pytest.raises(iia.errors.MismatchError, match="delete the file to start anew"):
        train(data, steps=7, checkpoint=path)


def test_a_checkpoint_of_another_network_is_refused(tmp_path, monkeypatch, data):
    path = tmp_path / "state.safetensors"
    monkeypatch.setattr("iia_ode.denoisers.training._SECONDS", -1.0)
    train(data, steps=2, checkpoint=path)
    with pytest.raises(iia.errors.FileFormatError, match="does not hold the state of this network's training"):
        train(data, steps=2, checkpoint=path, channels=(8,))


def test_the_weights_halfway_are_those_of_a_less_trained_model(data, monkeypatch):
    """Both halves of the training use the rates of the whole: it is no training with half of the steps."""
    found = train(data, steps=40, lr=0.02)
    x, sigma = noisy(data[0][:40], 0.5), torch.full((40,), 0.5)
    halfway, final = ((model(x, sigma) - data[0][:40]).square().mean() for model in (found.halfway, found.denoiser))
    assert final < halfway
    assert not found.halfway.training
    assert not any(p.requires_grad for p in found.halfway.parameters())


def test_samples_of_a_denoiser_are_nearer_to_the_data_than_noise_is():
    pytest.importorskip("torchmetrics")
    found = iia.denoisers.fashion_classifier()
    labels = torch.arange(60) % 10
    ode = iia.ProbabilityFlowODE(iia.denoisers.fashion(), iia.EDM(), conditioning={"class_labels": labels})
    x = 80 * torch.randn((60, 1, 28, 28), generator=torch.Generator().manual_seed(0))
    samples = iia.sample(ode, x, iia.grids.karras(9), "dpmpp_2m")
    near, far = (iia.metrics.frechet_classifier_distance(v, found) for v in (samples, torch.randn(60, 1, 28, 28)))
    assert near < 0.2 * far
    assert float((found(samples).argmax(1) == labels).float().mean()) > 0.7


@pytest.mark.parametrize("channels", [1, 3])
def test_a_network_of_patches_has_outputs_like_its_images_and_starts_at_the_mean(channels):
    network = UNet(channels, (8, 16), blocks=1, classes=0, embedding=8, patch=2)
    x = torch.randn(2, channels, 12, 12)
    assert network.stem.in_channels == 4 * channels
    assert torch.equal(
        network(x, torch.zeros(2), torch.zeros(2).long()), torch.zeros_like(x)
    )  # its head starts at zero


def test_training_leaves_the_global_random_state_alone(data):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train(data, steps=1)
    assert torch.equal(torch.rand(3), expected)


def test_training_for_no_steps_or_on_no_images_is_refused():
    for options in ({"steps": 0}, {"batch": 0}, {"steps": -1}):
        with pytest.raises(iia.errors.InputError, match="of the training must be a whole number, at least 1, got"):
            TrainingOptions(**options)


@pytest.mark.parametrize("held_out", [0.0, 1.0, torch.zeros(20).bool(), torch.ones(20).bool()])
def test_a_training_that_holds_out_nothing_or_everything_is_refused(data, held_out):
    def build():
        return EDMDenoiser(UNet(channels=(8,), blocks=1, classes=0, embedding=8), 0.75, (1, 8, 8))

    with pytest.raises(iia.errors.InputError, match=r"of 20 images, (0|20) would be held out: hold out at least one"):
        train_edm(build, data[0][:20], None, TrainingOptions(steps=1), held_out=held_out, progress=False)


def test_training_draws_the_same_numbers_whatever_the_default_device(data):
    expected = train(data, steps=1)
    torch.set_default_device("meta")
    try:
        found = train(data, steps=1)
    finally:
        torch.set_default_device(None)
    assert found.held_out_loss == expected.held_out_loss


@pytest.mark.parametrize(("weights", "source", "options", "size"), SHIPPED.values(), ids=SHIPPED)
def test_the_file_says_what_training_would_write(weights, source, options, size):
    header = read_tensors(weights, "denoiser")[1]
    assert header["about"].keys() == {"data", "options", "train_loss", "held_out_loss"}
    assert header["about"]["data"] == source
    assert header["about"]["options"] == options.to_dict()


def test_a_changed_weight_or_header_is_refused(tmp_path, model):
    raw = save_denoiser(tmp_path / "net.safetensors", model, {}).read_bytes()
    for damaged in (raw.replace(b"[48, 72]", b"[40, 72]"), raw[:-1] + bytes([raw[-1] ^ 1])):
        (tmp_path / "net.safetensors").write_bytes(damaged)
        with pytest.raises(iia.errors.FileFormatError, match="checksum does not match"):
            load_denoiser(tmp_path / "net.safetensors")


@pytest.mark.parametrize("channels", [[40, 72], [], "x", None, [-8], [7], [0, 0]])
def test_a_file_that_does_not_fit_its_header_is_refused(tmp_path, model, channels):
    config = {**model.config, "network": {**model.config["network"], "channels": channels}}
    path = write_tensors(tmp_path / "net.safetensors", "denoiser", model.state_dict(), {"config": config})
    with (
        warnings.catch_warnings(),
        pytest.raises(iia.errors.FileFormatError, match=r"does not hold the network|is damaged"),
    ):
        warnings.simplefilter("ignore")  # torch warns of layers without weights
        load_denoiser(path)
