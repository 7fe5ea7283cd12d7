"""The command line on a model of the user's own, and folders of many samples."""

import sys
import textwrap
from pathlib import Path

import pytest
import torch
from support import run

import iia_ode as iia
from iia_ode.files import read_tensors
from iia_ode.many import read_samples
from iia_ode.noise import sample_seeds, seeded_noise

MODELS = """
    import torch
    from types import SimpleNamespace
    import iia_ode as iia

    STDS = torch.linspace(0.2, 1.0, 4)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.std = torch.nn.Parameter(STDS.clone())
        def forward(self, x, t, c=None):
            shift = 0.0 if c is None else c.to(x).reshape(-1, 1)
            gain = self.std**2 / (self.std**2 + t[:, None] ** 2)
            return shift + gain * (x - shift)

    def ode(**options):
        return iia.ProbabilityFlowODE(Model(), iia.EDM(), "data", **options)

    plain = lambda: ode(state_shape=(4,))
    pair = lambda: (ode(conditioning={"c": torch.tensor([1.0, 2.0, 3.0])}), (4,))
    instance = ode(state_shape=(4,))
    guided = lambda: (
        ode(conditioning={"c": torch.ones(1)}, unconditional={"c": torch.zeros(1)}, guidance_scale=2.0), (4,)
    )
    whole = lambda: SimpleNamespace(
        ode=ode(), shape=(4,), conditions=lambda seed: {"c": float(seed % 5)}, decode=lambda x: x.reshape(-1, 1, 2, 2),
        sigma_max=20.0,
    )
    flow = lambda: (iia.ProbabilityFlowODE(lambda x, t: x, iia.FlowMatching(), "velocity", tag="v"), (4,))
    bare = lambda: ode()
    nothing = lambda: 3
    odd = lambda: SimpleNamespace(ode=ode(), shape=(4,), conditions=3)
    number = 3
    def needing(path): return ode(), (4,)
    def missing():
        import no_such_package
"""


@pytest.fixture(autouse=True)
def models(tmp_path, monkeypatch):
    (tmp_path / "my_models.py").write_text(textwrap.dedent(MODELS))
    (tmp_path / "broken.py").write_text("import no_such_package\n")
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    yield
    for name in ("my_models", "broken"):
        sys.modules.pop(name, None)


def make(name):
    sys.path.insert(0, ".")
    try:
        import my_models
    finally:
        sys.path.pop(0)
    return getattr(my_models, name)


def samples(place):
    return torch.cat([x for _, x in read_samples(place)])


# ---- own models ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "pair", "instance"])
def test_samples_of_an_own_model_are_those_of_the_python_api(capsys, name):
    status, _, error = run(capsys, "sample", "heun", "--model", f"my_models:{name}", "--nfe", "5", "--samples", "7")
    assert (status, error) == (0, "")
    tensors, about = read_tensors("build/samples/samples.safetensors", "samples")
    seeds, ode = sample_seeds(0, range(7)), iia.ProbabilityFlowODE(make("Model")(), iia.EDM(), "data")
    if name == "pair":
        ode = ode.condition(c=torch.tensor([1.0 + seed % 3 for seed in seeds]))
    grid = iia.get_solver("heun").grid_for(5, iia.grids.karras, ode.schedule)
    assert torch.equal(tensors["samples"], iia.sample(ode, 80.0 * seeded_noise(seeds, (4,)), grid, "heun"))
    assert about["setting"] == f"my_models:{name}"


def test_a_fit_of_an_own_model_is_the_fit_of_the_python_api(capsys):
    options = ["--nfe", "3", "--budget", "closed-form", "--samples", "16", "--out", "fit.safetensors"]
    status, _, error = run(capsys, "fit", "--model", "my_models:plain", *options)
    assert (status, error) == (0, "")
    expected = iia.fit(make("plain")(), 3, noise=seeded_noise(sample_seeds(0, range(16)), (4,)), budget="closed-form")
    assert iia.load("fit.safetensors").plan == expected.plan
    status, _, error = run(capsys, "sample", "fit.safetensors", "--model", "my_models:plain", "--seeds", "0-4")
    assert (status, error) == (0, "") and samples("build/samples").shape == (5, 4)


def test_trajectories_of_an_own_model_are_saved_and_serve_another_fit(capsys):
    options = ["--nfe", "2", "--budget", "closed-form", "--samples", "16", "--out", "a.safetensors"]
    assert run(capsys, "fit", "--model", "my_models:whole", *options, "--save-teacher", "t.safetensors")[0] == 0
    options[-1] = "b.safetensors"
    assert run(capsys, "fit", "--model", "my_models:whole", *options, "--teacher", "t.safetensors")[0] == 0
    assert iia.load("a.safetensors").plan == iia.load("b.safetensors").plan
    assert iia.load("a.safetensors").plan.grid[0] == 20.0


def test_a_flow_starts_at_its_noise_in_a_fit(capsys):
    options = ["--nfe", "2", "--budget", "closed-form", "--samples", "16", "--out", "a.safetensors"]
    assert run(capsys, "fit", "--model", "my_models:flow", *options)[0] == 0
    assert iia.load("a.safetensors").plan.grid[0] == 1.0


def test_solvers_are_compared_on_an_own_model(capsys):
    options = ["--solvers", "ddim,iia-ddim,heun", "--nfe", "4", "--samples", "8", "--fit-samples", "16", "--out", "c"]
    status, out, _ = run(capsys, "compare", "--model", "my_models:pair", *options)
    assert status == 0 and "my_models:pair" in Path("c/compare.json").read_text()
    assert all(name in out for name in ("ddim", "iia-ddim"))


def test_guidance_is_the_models_own_or_the_given_one(capsys):
    found = {}
    for scale in (None, "1.5", "2"):
        options = [] if scale is None else ["--guidance", scale]
        command = ["sample", "ddim", "--model", "my_models:guided", "--samples", "2", "--out", f"g{scale}", *options]
        assert run(capsys, *command)[0] == 0
        found[scale] = read_tensors(f"g{scale}/samples.safetensors", "samples")[0]["samples"]
    assert torch.equal(found[None], found["2"]) and not torch.equal(found[None], found["1.5"])
    status, _, error = run(capsys, "sample", "ddim", "--model", "my_models:plain", "--guidance", "2")
    assert status == 2 and "guidance needs conditioning=" in error


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("my_models", "--model takes module:function"),
        ("no_such:plain", "no module 'no_such'"),
        ("my_models:other", "no function 'other'; it has"),
        ("my_models:number", "no function 'number'"),
        ("my_models:needing", "needing is called without arguments (missing a required argument: 'path')"),
        ("my_models:nothing", "must return a ProbabilityFlowODE"),
        ("my_models:bare", "does not give the shape"),
        ("my_models:odd", "conditions must be a function"),
    ],
)
def test_a_model_that_is_none_is_one_line_of_error(capsys, model, words):
    status, _, error = run(capsys, "sample", "ddim", "--model", model)
    assert (status, len(error.splitlines())) == (2, 1) and words in error


def test_a_package_that_an_own_model_misses_is_named(capsys):
    for model in ("broken:plain", "my_models:missing"):
        with pytest.raises(ModuleNotFoundError, match="no_such_package"):
            run(capsys, "sample", "ddim", "--model", model)


def test_a_model_and_a_setting_do_not_go_together(capsys):
    status, _, error = run(capsys, "sample", "ddim", "--model", "my_models:plain", "--setting", "mixture")
    assert status == 2 and "leave out --setting" in error


# ---- many samples ----------------------------------------------------------------------------------------------------


def test_seeds_make_a_folder_that_a_second_command_finishes(capsys):
    command = ["sample", "ddim", "--model", "my_models:whole", "--nfe", "4", "--seeds", "3-8,20", "--batch", "3"]
    status, out, error = run(capsys, *command)
    assert (status, error) == (0, "") and "7 samples in build/samples, 7 of them by this process now" in out
    assert [seed for seeds, _ in read_samples("build/samples") for seed in seeds] == [3, 4, 5, 6, 7, 8, 20]
    found = make("whole")()
    ode = found.ode.condition(c=torch.tensor([seed % 5.0 for seed in (3, 4, 5)]))
    grid = iia.grids.karras(4, sigma_max=20.0)
    first = iia.sample(ode, 20.0 * seeded_noise([3, 4, 5], (4,)), grid, "ddim").reshape(3, 1, 2, 2)
    torch.testing.assert_close(samples("build/samples")[:3], first)
    assert "0 of them by this process now" in run(capsys, *command)[1]
    status, _, error = run(capsys, *command, "--nfe", "5")
    assert status == 2 and "another run" in error


def test_a_setting_with_classes_draws_every_class_as_often(capsys):
    pytest.importorskip("PIL.Image")
    command = ["sample", "ddim", "--nfe", "2", "--seeds", "0-11", "--format", "png", "--out", "digits"]
    assert run(capsys, *command)[0] == 0
    command[-1] = "exact"
    assert run(capsys, *[v for v in command if v not in ("--format", "png")])[0] == 0
    model = iia.denoisers.digits()
    labels = torch.tensor([*range(10), 0, 1])
    ode = iia.ProbabilityFlowODE(model, iia.EDM(), "data", conditioning={"class_labels": labels})
    expected = iia.sample(ode, 80.0 * seeded_noise(range(12), (1, 8, 8)), iia.grids.karras(2), "ddim")
    torch.testing.assert_close(samples("exact"), expected)
    assert len(list(Path("digits").glob("*.png"))) == 12


def test_each_rank_writes_its_share_without_meeting_the_others(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, said in (("1", ""), ("0", "written: 4 samples in out, 0 of them")):
        monkeypatch.setenv("RANK", rank)
        status, out, _ = run(capsys, "sample", "ddim", "--model", "my_models:plain", "--seeds", "0-3", "--out", "out")
        assert status == 0 and out.startswith(said) and bool(out) == bool(said)
    monkeypatch.setenv("RANK", "x")
    status, _, error = run(capsys, "sample", "ddim", "--model", "my_models:plain", "--seeds", "0-3", "--out", "out")
    assert status == 2 and "RANK must be the number of a process" in error


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--seeds", "5-3"], "'5-3' is no seed and no range"),
        (["--seeds", "a"], "no seed and no range"),
        (["--seeds", "0-99999999999"], "more than"),
        (["--seeds", "0-3,2"], "seed 2 occurs more than once"),
        (["--seeds", "0-3", "--samples", "4"], "--samples does not go with --seeds"),
        (["--seeds", "0-3", "--seed", "4"], "--seed does not go with --seeds"),
        (["--batch", "4"], "--batch goes with --seeds"),
        (["--format", "png"], "--format goes with --seeds"),
    ],
)
def test_options_of_many_samples_that_do_not_go_together_are_one_line_of_error(capsys, options, words):
    status, _, error = run(capsys, "sample", "ddim", "--model", "my_models:plain", *options)
    assert (status, len(error.splitlines())) == (2, 1) and words in error
