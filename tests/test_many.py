"""Many samples in a folder: one seed each, by any number of processes, over any number of interruptions."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from support import F64, Recorder, generator, mixture

import iia_ode as iia
from iia_ode.errors import (
    FileFormatError,
    GridError,
    InputError,
    MismatchError,
    MissingDependencyError,
    NonFiniteError,
    UnknownNameError,
)
from iia_ode.many import claims, folder, read_samples, sampling
from iia_ode.noise import seed_generators, seeded_noise

ROOT = Path(__file__).parent.parent
GRID = iia.grids.karras(3)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setattr(sampling, "_PAUSE", 0.01)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


class Shift(torch.nn.Module):
    """Data at c: D(x, t) = c + (x - c) / (1 + t^2), which counts its samples and fails when told to."""

    def __init__(self):
        super().__init__()
        self.bias = torch.nn.Parameter(torch.zeros(1))
        self.rows, self.fails_after = 0, None

    def forward(self, x, t, c=None, text=None):
        self.rows += len(x)
        if self.fails_after is not None and self.rows > self.fails_after:
            raise KeyboardInterrupt
        shift = self.bias if c is None else c.to(x).reshape(-1, *[1] * (x.ndim - 1))
        if text is not None:
            shift = shift + torch.tensor([float(len(t)) for t in text]).to(x).reshape(-1, *[1] * (x.ndim - 1))
        return shift + (x - shift) / (1 + t.reshape(-1, *[1] * (x.ndim - 1)) ** 2)


def an_ode(**options):
    return iia.ProbabilityFlowODE(Shift(), iia.EDM(), "data", **options)


def content(place):
    """Samples by seed; every seed occurs once."""
    found = {}
    for seeds, samples in read_samples(place):
        for seed, sample in zip(seeds, samples, strict=True):
            assert seed not in found
            found[seed] = sample
    return found


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---- samples ---------------------------------------------------------------------------------------------------------


def test_the_samples_are_those_of_sample_from_seeded_noise(tmp_path):
    ode, seeds = an_ode(), [5, 0, 7, 2**32 - 1, 3]
    result = iia.sample_many(ode, "heun", seeds, (4,), tmp_path / "new" / "out", grid=GRID, batch=2)
    x = 80.0 * seeded_noise(seeds, (4,))
    expected = torch.cat([iia.sample(ode, part, GRID, "heun") for part in x.split(2)])
    found = content(result.folder)
    assert list(found) == seeds and torch.equal(torch.stack(list(found.values())), expected)
    assert result.made == 5 and [p.name for p in result.paths] == [f"samples-{k:06d}.safetensors" for k in range(3)]
    assert all(p.exists() for p in result.paths)


def test_a_fitted_solver_and_a_plan_bring_their_grids(tmp_path):
    ode = iia.problems.Gaussian(torch.zeros(4), torch.ones(4)).ode(iia.EDM())
    fit = iia.preset("iia-ddim").fit(ode, 80 * torch.randn(16, 4, generator=generator()), GRID)
    iia.sample_many(ode, fit, range(6), (4,), tmp_path / "fit", batch=4)
    iia.sample_many(ode, fit.plan, range(6), (4,), tmp_path / "plan", batch=4)
    assert equal(content(tmp_path / "fit"), content(tmp_path / "plan"))
    with pytest.raises(MismatchError, match="omit grid="):
        iia.sample_many(ode, fit, range(6), (4,), tmp_path / "other", grid=iia.grids.karras(4))


def test_conditions_are_taken_by_position_whatever_the_batch(tmp_path):
    ode, labels = an_ode(), torch.tensor([3.0, -1.0, 2.0, 0.5, 9.0])
    given = {
        "dict": {"c": labels, "text": ["a", "bb", "ccc", "", "e"]},
        "function": lambda seed: {"c": float(labels[seed]), "text": ["a", "bb", "ccc", "", "e"][seed]},
        "tensors": lambda seed: {"c": labels[seed], "text": ["a", "bb", "ccc", "", "e"][seed]},
    }
    found = {}
    for name, conditions in given.items():
        iia.sample_many(ode, "ddim", range(5), (4,), tmp_path / name, conditions, grid=GRID, batch=2)
        found[name] = content(tmp_path / name)
    assert equal(found["dict"], found["function"]) and equal(found["dict"], found["tensors"])
    for k, c in enumerate([4.0, 1.0, 5.0, 0.5, 10.0]):
        assert (found["dict"][k] - c).abs().max() < 1e-4 + 1.2
    one = an_ode(conditioning={"c": torch.zeros(1)})
    iia.sample_many(one, "ddim", range(5), (4,), tmp_path / "tensor", labels, grid=GRID, batch=2)
    own = an_ode(conditioning={"c": labels})
    iia.sample_many(own, "ddim", range(5), (4,), tmp_path / "own", grid=GRID, batch=2)
    assert equal(content(tmp_path / "tensor"), content(tmp_path / "own"))


def test_guidance_scales_per_sample_go_with_the_seeds(tmp_path):
    scales = torch.tensor([1.0, 2.0, 3.0])
    null = {"c": torch.zeros(1)}
    ode = an_ode(conditioning={"c": torch.ones(1)}, unconditional=null, guidance_scale=scales)
    iia.sample_many(ode, "ddim", range(3), (2,), tmp_path, grid=GRID, batch=2)
    for k, sample in content(tmp_path).items():
        single = an_ode(conditioning={"c": torch.ones(1)}, unconditional=null, guidance_scale=float(scales[k]))
        x = 80.0 * seeded_noise([k], (2,))
        torch.testing.assert_close(sample, iia.sample(single, x, GRID, "ddim")[0])


def test_latents_are_decoded_before_they_are_written(tmp_path):
    ode = an_ode()
    iia.sample_many(ode, "ddim", range(3), (4,), tmp_path / "a", grid=GRID)
    iia.sample_many(ode, "ddim", range(3), (4,), tmp_path / "b", grid=GRID, decode=lambda z: z.reshape(-1, 1, 2, 2) * 2)
    a, b = content(tmp_path / "a"), content(tmp_path / "b")
    assert all(torch.equal(b[k], 2 * a[k].reshape(1, 2, 2)) for k in a)
    with pytest.raises(InputError, match="decode must return"):
        iia.sample_many(ode, "ddim", range(3), (4,), tmp_path / "c", grid=GRID, decode=lambda z: z[:1])


def test_double_precision_states_stay_double(tmp_path):
    ode = mixture().ode(iia.EDM())
    iia.sample_many(ode, "ddim", range(3), (4,), tmp_path, grid=GRID, dtype=F64)
    assert next(iter(content(tmp_path).values())).dtype == F64


# ---- interruptions and processes -------------------------------------------------------------------------------------


def test_a_stopped_run_goes_on_and_ends_with_the_same_bits(tmp_path):
    conditions = {"c": torch.arange(10.0)}
    ode = an_ode()
    iia.sample_many(ode, "ddim", range(10), (4,), tmp_path / "whole", conditions, grid=GRID, batch=4)
    ode.model.rows, ode.model.fails_after = 0, 20  # in the second batch of 4
    with pytest.raises(KeyboardInterrupt):
        iia.sample_many(ode, "ddim", range(10), (4,), tmp_path / "parts", conditions, grid=GRID, batch=4)
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) == 1
    (tmp_path / "parts" / ".0123456789abcdef.tmp").touch()  # of a process killed while it wrote
    ode.model.fails_after = None
    result = iia.sample_many(ode, "ddim", range(10), (4,), tmp_path / "parts", conditions, grid=GRID, batch=4)
    assert result.made == 6 and equal(content(tmp_path / "parts"), content(tmp_path / "whole"))
    assert not list((tmp_path / "parts").glob("*.tmp"))
    ode.model.rows = 0
    again = iia.sample_many(ode, "ddim", range(10), (4,), tmp_path / "parts", conditions, grid=GRID, batch=4)
    assert again.made == 0 and ode.model.rows == 0


def test_killed_processes_leave_every_seed_once_and_the_bits_of_an_undisturbed_run():
    script = [sys.executable, str(ROOT / "benchmarks" / "many_images.py")]
    sizes = ["--seeds", "120", "--batch", "6", "--nfe", "2", "--kills", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*script, *sizes], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["kills"], result["fault"]) == (2, None)


@pytest.mark.parametrize("size", [2, 3])
def test_each_rank_makes_its_share_first_and_then_helps(tmp_path, monkeypatch, size):
    ode, order = an_ode(), []
    monkeypatch.setattr(folder.Folder, "write", lambda self, k, *_: order.append(k) or self._seen.update(self.names(k)))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", str(size))
    iia.sample_many(ode, "ddim", range(6), (4,), tmp_path, grid=GRID, batch=1)
    assert order == sorted(range(6), key=lambda k: k % size != 1)


def test_a_batch_claimed_by_another_process_is_waited_for_and_taken_over_when_that_process_ends(tmp_path):
    ode = an_ode()
    ready, told = os.pipe()
    other = os.fork()
    if not other:  # the other process, which never comes back to the test
        with claims.claims_on(tmp_path) as held:
            os.write(told, b"taken" if held.take(1) else b"free!")
            signal.pause()
    assert os.read(ready, 5) == b"taken"
    done = []
    worker = threading.Thread(
        target=lambda: done.append(iia.sample_many(ode, "ddim", range(6), (4,), tmp_path, grid=GRID, batch=2).made)
    )
    worker.start()
    while len(list(tmp_path.glob("*.safetensors"))) < 2:
        worker.join(0.01)
    worker.join(0.1)
    assert worker.is_alive() and not (tmp_path / "samples-000001.safetensors").exists()
    with pytest.raises(InputError, match="one call at a time"):
        iia.sample_many(ode, "ddim", range(6), (4,), tmp_path, grid=GRID, batch=2)
    os.kill(other, signal.SIGKILL)
    os.waitpid(other, 0)
    worker.join()
    assert done == [6] and list(content(tmp_path)) == list(range(6))


def test_two_processes_started_by_hand_share_a_folder(tmp_path):
    ready, told = os.pipe()
    for _ in range(2):
        if not os.fork():
            try:
                made = iia.sample_many(an_ode(), "ddim", range(60), (4,), tmp_path / "two", grid=GRID, batch=1).made
                os.write(told, bytes([made]))
            finally:
                os._exit(0)
    for _ in range(2):
        os.wait()
    assert sum(os.read(ready, 2)) == 60
    iia.sample_many(an_ode(), "ddim", range(60), (4,), tmp_path / "one", grid=GRID, batch=1)
    assert equal(content(tmp_path / "two"), content(tmp_path / "one"))


def test_without_locks_each_rank_makes_its_own_share_alone(tmp_path, monkeypatch):
    def no_locks(self, k):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(claims.Claims, "_lock", no_locks)
    ode = an_ode()
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        made = iia.sample_many(ode, "ddim", range(5), (4,), tmp_path, grid=GRID, batch=1).made
        assert made == (3 if rank == "0" else 2)
    assert list(content(tmp_path)) == list(range(5))


@pytest.mark.parametrize("rank", ["x", "2", "-1"])
def test_a_rank_that_is_none_is_refused(tmp_path, monkeypatch, rank):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="RANK and WORLD_SIZE"):
        iia.sample_many(an_ode(), "ddim", range(3), (4,), tmp_path, grid=GRID)


# ---- the manifest ----------------------------------------------------------------------------------------------------


def test_two_different_runs_do_not_mix_in_one_folder(tmp_path):
    ode, base = an_ode(), {"solver": "ddim", "seeds": range(4), "shape": (4,), "grid": GRID, "batch": 2}
    iia.sample_many(ode, out=tmp_path, **base)
    iia.sample_many(ode, out=tmp_path, **base)
    trained = an_ode()
    torch.nn.init.ones_(trained.model.bias)
    for other, changes, word in [
        (ode, {"solver": "heun"}, "solver"),
        (ode, {"grid": iia.grids.karras(4)}, "grid"),
        (ode, {"shape": (5,)}, "shape"),
        (ode, {"seeds": range(5)}, "seeds"),
        (ode, {"batch": 4}, "batch"),
        (ode, {"dtype": F64}, "dtype"),
        (ode, {"conditions": {"c": torch.ones(4)}}, "conditions"),
        (ode, {"decode": lambda x: x}, "decode"),
        (trained, {}, "model"),
        (an_ode(time="c_noise"), {}, "time"),
        (an_ode(guidance_rescale=0.5), {}, "guidance_rescale"),
    ]:
        with pytest.raises(MismatchError, match=f"another run, made with {word} .*use another folder"):
            iia.sample_many(other, out=tmp_path, **{**base, **changes})


def test_other_conditions_of_a_function_are_another_run(tmp_path):
    ode = an_ode()
    iia.sample_many(ode, "ddim", range(4), (4,), tmp_path, lambda seed: {"c": seed}, grid=GRID)
    with pytest.raises(MismatchError, match="conditions"):
        iia.sample_many(ode, "ddim", range(4), (4,), tmp_path, lambda seed: {"c": -seed}, grid=GRID)


def test_samples_without_their_manifest_and_damaged_manifests_are_refused(tmp_path):
    ode = an_ode()
    iia.sample_many(ode, "ddim", range(4), (4,), tmp_path, grid=GRID)
    manifest = tmp_path / "manifest.json"
    for text in ("{", "[]", '{"kind": "x", "format": 1}', '{"kind": "samples", "format": 9, "run": {}}'):
        manifest.write_text(text)
        with pytest.raises(FileFormatError, match="damaged, or from a later version"):
            iia.sample_many(ode, "ddim", range(4), (4,), tmp_path, grid=GRID)
    manifest.unlink()
    with pytest.raises(MismatchError, match=r"no manifest\.json"):
        iia.sample_many(ode, "ddim", range(4), (4,), tmp_path, grid=GRID)
    with pytest.raises(FileFormatError, match=r"no manifest\.json"):
        next(read_samples(tmp_path))


def test_a_file_of_another_run_is_found_when_it_is_read(tmp_path):
    ode = an_ode()
    for solver in ("ddim", "heun"):
        iia.sample_many(ode, solver, range(4), (4,), tmp_path / solver, grid=GRID)
    os.replace(tmp_path / "heun" / "samples-000000.safetensors", tmp_path / "ddim" / "samples-000000.safetensors")
    with pytest.raises(MismatchError, match="another run"):
        next(read_samples(tmp_path / "ddim"))


# ---- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"seeds": []}, InputError, "at least one seed"),
        ({"seeds": 5}, InputError, "such as range"),
        ({"seeds": [1, 2, 1]}, InputError, "seed 1 occurs more than once"),
        ({"seeds": [-1]}, InputError, "a seed must be"),
        ({"seeds": [2**32]}, InputError, "a seed must be"),
        ({"shape": (0,)}, InputError, "shape"),
        ({"batch": 0}, InputError, "batch"),
        ({"format": "jpeg"}, InputError, "format must be one of 'safetensors', 'png'"),
        ({"solver": "no"}, UnknownNameError, "unknown solver"),
        ({"solver": 3}, InputError, "a name, a Solver"),
        ({"grid": None}, GridError, "needs a grid"),
        ({"conditions": {"c": torch.ones(3)}}, InputError, "3 entries for a batch of 4"),
        ({"conditions": {"text": ["a", "b"]}}, InputError, "2 entries for a batch of 4"),
        ({"conditions": torch.ones(4)}, InputError, "single condition"),
        ({"conditions": 3}, InputError, "conditions must be"),
        ({"conditions": lambda seed: 3}, InputError, "same names for every seed"),
        ({"conditions": lambda seed: {"c": 1} if seed else {"d": 1}}, InputError, "same names for every seed"),
        ({"conditions": lambda seed: {"c": torch.ones(seed + 1)}}, InputError, "one kind and shape"),
        ({"conditions": lambda seed: {"c": seed if seed else "a"}}, InputError, "one kind and shape"),
        ({"conditions": lambda seed: {"c": torch.tensor(float("nan"))}}, NonFiniteError, "NaN"),
        ({"format": "png"}, InputError, "PNG files need images"),
    ],
)
def test_arguments_that_cannot_be_used_are_named(tmp_path, changes, error, words):
    options = {"solver": "ddim", "seeds": range(4), "shape": (4,), "grid": GRID, **changes}
    with pytest.raises(error, match=words):
        iia.sample_many(an_ode(), out=tmp_path, **options)


def test_a_model_of_another_size_is_refused_before_a_file_is_written(tmp_path):
    ode = an_ode(state_shape=(5,))
    with pytest.raises(InputError, match=r"\[B, 5\]"):
        iia.sample_many(ode, "ddim", range(4), (4,), tmp_path / "out", grid=GRID)
    assert not (tmp_path / "out").exists()


# ---- pictures and generators -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_images_become_png_files_named_by_their_seeds(tmp_path, channels):
    image = pytest.importorskip("PIL.Image")
    ode, seeds = an_ode(conditioning={"c": torch.zeros(1)}), [7, 123, 5]
    result = iia.sample_many(ode, "ddim", seeds, (channels, 4, 6), tmp_path / "png", grid=GRID, batch=2, format="png")
    assert [p.name for p in result.paths] == ["0000000007.png", "0000000123.png", "0000000005.png"]
    iia.sample_many(ode, "ddim", seeds, (channels, 4, 6), tmp_path / "exact", grid=GRID, batch=2)
    for path, sample in zip(result.paths, content(tmp_path / "exact").values(), strict=True):
        with image.open(path) as picture:
            assert picture.mode == ("L" if channels == 1 else "RGB") and picture.size == (6, 4)
            pixels = torch.tensor(list(picture.tobytes())).reshape(4, 6, channels).permute(2, 0, 1)
        torch.testing.assert_close(pixels / 127.5 - 1, sample.clamp(-1, 1), rtol=0, atol=0.5 / 127.5 + 1e-6)
    first = result.paths[0].read_bytes()
    result.paths[0].unlink()
    mark = result.paths[1].stat().st_mtime_ns
    again = iia.sample_many(ode, "ddim", seeds, (channels, 4, 6), tmp_path / "png", grid=GRID, batch=2, format="png")
    assert again.made == 2 and again.paths[0].read_bytes() == first and again.paths[1].stat().st_mtime_ns == mark
    with pytest.raises(FileFormatError, match="PNG files"):
        next(read_samples(tmp_path / "png"))


def test_png_files_without_pillow_are_an_error_with_advice(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'iia-ode\[png\]'"):
        iia.sample_many(an_ode(), "ddim", range(2), (1, 2, 2), tmp_path, grid=GRID, format="png")


@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(4, 8, 8), (3,)])
def test_diffusers_draws_the_noise_of_the_seeds_from_their_generators(dtype, shape):
    utilities = pytest.importorskip("diffusers.utils.torch_utils")
    seeds = [3, 0, 2**32 - 1]
    theirs = utilities.randn_tensor((3, *shape), generator=seed_generators(seeds), dtype=dtype)
    assert torch.equal(theirs, seeded_noise(seeds, shape, dtype=dtype))
    with pytest.raises(InputError, match="seed"):
        seed_generators([2**32])
    with pytest.raises(InputError, match="sequence"):
        seed_generators(3)


def test_an_ode_that_other_processes_share_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sampling, "ranks_of", lambda ode: object())
    with pytest.raises(InputError, match=r"without iia_ode\.distributed"):
        iia.sample_many(an_ode(), "ddim", range(3), (4,), tmp_path, grid=GRID)


def test_the_model_sees_one_batch_at_a_time(tmp_path):
    model = Recorder(torch.float32)
    ode = iia.ProbabilityFlowODE(model, iia.EDM(), "data")
    iia.sample_many(ode, "ddim", range(7), (4,), tmp_path, grid=GRID, batch=3)
    assert [len(call["x"]) for call in model.calls] == [3] * 6 + [1] * 3
