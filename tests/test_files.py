"""Files: what is saved comes back, what is wrong is refused, nothing is half written."""

import contextlib
import copy
import functools
import json
import os
import threading
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from support import ALL_SCHEDULES, ALPHAS_CUMPROD, mixture

import iia_ode as iia
from iia_ode.denoisers.pretrained import DIGITS_WEIGHTS
from iia_ode.errors import MismatchWarning
from iia_ode.files import check_writable, read_tensors, write_bytes, write_tensors
from iia_ode.iia import PRESETS
from iia_ode.iia.fitted import describe
from iia_ode.plan import Combine, Evaluate

F64 = torch.float64
ROOT = Path(__file__).parent.parent


def ode_on(schedule, **options):
    return mixture().ode(schedule, **options)


@functools.cache
def fitted(schedule=None, name="iia-edm", dtype=F64, n=4):
    schedule = schedule or iia.EDM()
    grid = iia.grids.karras(n, schedule=schedule, sigma_max=40.0)
    x = states(schedule).to(dtype)
    return iia.preset(name).fit(ode_on(schedule), x, grid)


def states(schedule, seed=0):
    t = schedule.t_of_noise_to_signal(40.0)
    return mixture().noisy(6, schedule, t, torch.Generator().manual_seed(seed))


@settings(max_examples=15)
@given(st.sampled_from(sorted(PRESETS)), st.sampled_from(ALL_SCHEDULES), st.sampled_from([torch.float32, F64]))
def test_samples_after_loading_are_bit_equal_to_those_before_saving(tmp_path_factory, name, schedule, dtype):
    fit = fitted(schedule, name, dtype)
    path = fit.save(tmp_path_factory.mktemp("fit") / "fit.safetensors")
    again = iia.load(path, schedule=schedule)
    x = states(schedule, seed=1).to(dtype)
    ode = ode_on(schedule)
    assert torch.equal(iia.sample(ode, x, solver=fit), iia.sample(ode, x, solver=again))
    assert (again.record, again.reports, again.name, again.nfe) == (fit.record, fit.reports, fit.name, fit.nfe)
    assert torch.equal(again.grid, fit.grid)
    assert str(again) == str(fit)
    assert again.explain() == fit.explain()


def test_the_file_is_plain_safetensors_with_one_json_string(tmp_path):
    path = fitted().save(tmp_path / "fit.safetensors")
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["iia_ode"])
        dtypes = {key: file.get_tensor(key).dtype for key in file.keys()}  # noqa: SIM118
    assert dtypes == {"grid": F64, "times": F64, "weights": F64}
    record = header["record"]
    assert header["kind"] == "fitted solver"
    assert header["format"] == 2
    assert record["library"] == iia.__version__
    assert record["base"] == {"name": "heun", "options": {}}
    assert record["target"] == {"name": "substeps", "options": {"substeps": 3}}
    assert (record["terms"], record["history"], record["ridge"], record["batch"]) == ("iia-edm", 1, 0.0, 6)
    assert (record["seed"], record["search"]) == (None, None)
    origin = record["origin"]
    assert (origin["schedule"], origin["prediction"]) == ({"type": "EDM"}, "data")
    assert (origin["state_shape"], origin["state_dtype"]) == ([4], "float64")
    assert len(header["reports"]) == 3


def test_a_discrete_schedule_travels_with_the_fit(tmp_path):
    path = fitted(iia.Discrete(ALPHAS_CUMPROD)).save(tmp_path / "fit.safetensors")
    assert iia.load(path).plan.schedule == iia.Discrete(ALPHAS_CUMPROD)


def test_a_schedule_from_functions_has_to_be_given_and_has_to_be_the_same(tmp_path):
    mine = iia.Schedule.from_functions(lambda t: 1 - t, lambda t: t)
    other = iia.Schedule.from_functions(lambda t: 1 - t * t, lambda t: t)
    path = fitted(mine).save(tmp_path / "fit.safetensors")
    with pytest.raises(iia.errors.FileFormatError, match=r"does not hold the schedule.*pass schedule=") as caught:
        iia.load(path)
    assert "damaged" not in str(caught.value)
    with pytest.raises(iia.errors.InputError, match=r"must be a Schedule such as iia_ode.EDM\(\), got str"):
        iia.load(path, schedule="EDM")
    with pytest.raises(iia.errors.MismatchError, match="was made for schedule FromFunctions"):
        iia.load(path, schedule=other)
    assert iia.load(path, schedule=mine).nfe == 7


def test_a_file_is_described_without_its_schedule_as_it_is_with_it(tmp_path):
    for schedule in (iia.VP(), iia.Discrete(ALPHAS_CUMPROD), iia.Schedule.from_functions(lambda t: 1 - t, lambda t: t)):
        fit = fitted(schedule)
        assert describe(fit.save(tmp_path / "fit.safetensors")) == str(fit)


def test_a_citation_names_the_papers_of_the_method_and_of_its_base_as_the_references_do():
    references = " ".join((ROOT / "docs" / "references.bib").read_text().split())
    own = {"edm": "karras2022edm", "ddim": "song2021ddim", "spndm": "liu2022pndm", "ipndm": "zhang2023deis"}
    for name, key in {**own, "dpmpp_2m": "lu2022dpmsolverpp"}.items():
        entries = fitted(name=f"iia-{name}").citation().split("\n\n")
        assert [e.splitlines()[0].split("{")[1] for e in entries] == ["zhang2024iia,", f"{key},"]
        for line in (line for e in entries for line in e.splitlines()[1:-1]):
            assert line.split("= ")[1] in references
    method = iia.IIA("midpoint", terms="biia-edm", guard=False)
    midpoint = method.fit(ode_on(iia.EDM()), states(iia.EDM()), iia.grids.karras(3))
    assert midpoint.citation().count("@") == 1


def test_weights_that_are_tensors_and_constants_come_back_too(tmp_path):
    weight = torch.tensor([1.0, 2.0, 0.5, 0.25], dtype=F64)
    code = (Evaluate(0, 40.0, "data"), Combine(((0, weight), (1, -0.5)), torch.ones(4, dtype=F64), step=1))
    plan = iia.Plan(iia.EDM(), (40.0, 1.0), code, "mine")
    fit = iia.FittedSolver(plan, (), fitted().record)
    again = iia.load(fit.save(tmp_path / "fit.safetensors"))
    x = states(iia.EDM())
    assert torch.equal(again.plan.run(ode_on(iia.EDM()), x), plan.run(ode_on(iia.EDM()), x))


@settings(max_examples=15)
@given(st.sampled_from(iia.solver_names()), st.sampled_from(ALL_SCHEDULES))
def test_a_plan_runs_from_its_file_as_it_did_before(tmp_path_factory, name, schedule):
    try:
        plan = iia.get_solver(name).plan(schedule, iia.grids.karras(6, 0.1, 40.0, schedule=schedule))
    except iia.IIAError:  # solvers that cannot step so
        assume(False)
    again = iia.load(plan.save(tmp_path_factory.mktemp("plan") / "plan.safetensors"), schedule=schedule)
    assert (again.name, again.grid, again.nfe) == (plan.name, plan.grid, plan.nfe)
    x, ode = states(schedule), ode_on(schedule)
    assert torch.equal(iia.sample(ode, x, solver=again), iia.sample(ode, x, solver=plan))


def test_a_plan_behind_a_warm_start_is_saved_and_knows_its_schedule(tmp_path):
    schedule = iia.Discrete(ALPHAS_CUMPROD)
    top, level = (schedule.t_of_noise_to_signal(v) for v in (40.0, 5.0))
    warm = iia.WarmStart.gaussian(schedule, top, level, mean=torch.zeros(4), covariance=torch.eye(4))
    plan = warm.then(iia.get_solver("ipndm3").plan(schedule, iia.grids.karras(4, 0.1, 5.0, schedule=schedule)))
    path = plan.save(tmp_path / "plan.safetensors")
    x = states(schedule)
    assert torch.equal(iia.load(path).run(ode_on(schedule), x), plan.run(ode_on(schedule), x))
    with pytest.raises(iia.errors.MismatchError, match="was made for schedule Discrete"):
        iia.load(path, schedule=iia.VP())


def test_a_damaged_plan_is_refused(tmp_path):
    plan = iia.get_solver("heun").plan(iia.EDM(), iia.grids.karras(3))
    tensors, header = read_tensors(plan.save(tmp_path / "plan.safetensors"), "plan")
    bad = [(tensors | {"weights": tensors["weights"][:-1]}, header), (tensors | {"x": tensors["grid"]}, header)]
    bad += [({k: v for k, v in tensors.items() if k != gone}, header) for gone in tensors]
    bad += [(tensors, {k: v for k, v in header.items() if k != gone}) for gone in ("name", "code", "schedule")]
    for parts, body in bad:
        rest = {k: v for k, v in body.items() if k not in ("kind", "format")}
        with pytest.raises(iia.errors.FileFormatError, match=r"is damaged|no valid plan"):
            iia.load(write_tensors(tmp_path / "bad.safetensors", "plan", parts, rest))


# ---- a fit is used only where it belongs -----------------------------------------------------------------------------


def test_a_file_fitted_for_another_schedule_is_refused(tmp_path):
    fit = iia.load(fitted(iia.EDM()).save(tmp_path / "fit.safetensors"))
    with pytest.raises(iia.errors.MismatchError, match=r"fitted for schedule .*EDM.* this ODE has .*VP.*Fit again"):
        iia.sample(ode_on(iia.VP()), states(iia.EDM()), solver=fit)
    vp = fitted(iia.VP())
    with pytest.raises(iia.errors.MismatchError, match="schedule"):
        iia.sample(ode_on(iia.VP(beta_1=19.0)), states(iia.VP()), solver=vp)


def test_another_prediction_type_or_condition_or_shape_is_refused_and_another_guidance_scale_warned_of():
    fit, x = fitted(), states(iia.EDM())
    with pytest.raises(iia.errors.MismatchError, match="prediction data, and this ODE has noise"):
        iia.sample(ode_on(iia.EDM(), prediction="noise"), x, solver=fit)

    def model(x, t, y):
        return torch.zeros_like(x)

    def guided(scale, **conditioning):
        null = {k: torch.zeros(1) for k in conditioning}
        return iia.ProbabilityFlowODE(
            model, iia.EDM(), conditioning=conditioning, unconditional=null, guidance_scale=scale
        )

    own = iia.preset("iia-ddim").fit(guided(2.0, y=torch.ones(6)), x, iia.grids.karras(3))
    with pytest.warns(MismatchWarning, match=r"guidance_scale 2.0, and this ODE has 3.0") as caught:
        iia.sample(guided(3.0, y=torch.ones(6)), x, solver=own)
    assert len(caught) == 1
    with pytest.raises(iia.errors.MismatchError, match=r"conditions of shapes \(per sample\) y \[\], .* has z \[\]"):
        iia.sample(guided(2.0, z=torch.ones(6)), x, solver=own)
    with pytest.raises(iia.errors.MismatchError, match=r"\(per sample\) y \[\], and this ODE has y \[3\]"):
        iia.sample(guided(2.0, y=torch.ones(6, 3)), x, solver=own)


def test_a_fit_brings_its_own_grid():
    fit, x = fitted(), states(iia.EDM())
    assert torch.equal(iia.sample(ode_on(iia.EDM()), x, fit.grid, fit), iia.sample(ode_on(iia.EDM()), x, solver=fit))
    with pytest.raises(iia.errors.MismatchError, match="has its own grid of 5 times"):
        iia.sample(ode_on(iia.EDM()), x, iia.grids.karras(7), fit)


def test_other_weights_of_the_model_give_a_warning_and_the_same_weights_none():
    torch.manual_seed(0)
    first, second = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

    def ode(layer):
        class Model(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = layer

            def forward(self, x, t):
                return self.layer(x / (1 + t[:, None]))

        return iia.ProbabilityFlowODE(Model(), iia.EDM())

    x = states(iia.EDM()).float()
    fit = iia.preset("iia-edm").fit(ode(first), x, iia.grids.karras(3))
    with pytest.warns(iia.errors.FingerprintWarning, match="the weights were not made for it"):
        iia.sample(ode(second), x, solver=fit)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        iia.sample(ode(first), x, solver=fit)


# ---- damaged files ---------------------------------------------------------------------------------------------------


def test_a_missing_foreign_or_truncated_file_is_refused(tmp_path):
    with pytest.raises(iia.errors.FileFormatError, match="no file"):
        iia.load(tmp_path / "nothing.safetensors")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(iia.errors.FileFormatError, match="not a readable safetensors file"):
        iia.load(tmp_path / "text")
    path = fitted().save(tmp_path / "fit.safetensors")
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    with pytest.raises(iia.errors.FileFormatError, match="not a readable safetensors file"):
        iia.load(path)
    save_file({"weights": torch.ones(2)}, tmp_path / "foreign.safetensors")
    with pytest.raises(iia.errors.FileFormatError, match="not written by iia_ode"):
        iia.load(tmp_path / "foreign.safetensors")


def test_one_load_reads_every_kind_of_file(tmp_path):
    x = states(iia.EDM())
    written = [
        fitted(),
        iia.get_solver("heun").plan(iia.EDM(), iia.grids.karras(3)),
        iia.Teacher.solve(ode_on(iia.EDM()), x, 40.0, 0.0, steps=8),
        iia.ModelStatistics(torch.tensor([0.0, 1.0]), *torch.ones(3, 2), schedule=iia.EDM().config()),
    ]
    for number, one in enumerate(written):
        path = one.save(tmp_path / f"{number}.safetensors")
        assert type(iia.load(path)) is type(one)
        assert type(iia.load(path, schedule=iia.EDM())) is type(one)
        with pytest.raises(iia.errors.MismatchError, match="EDM"):
            iia.load(path, schedule=iia.VP())
        with pytest.raises(iia.errors.InputError, match="must be a Schedule"):
            iia.load(path, schedule="EDM")
    assert iia.load(DIGITS_WEIGHTS).state_shape == (1, 8, 8)
    with pytest.raises(iia.errors.InputError, match="omit schedule="):
        iia.load(DIGITS_WEIGHTS, schedule=iia.EDM())


def test_a_file_of_an_unknown_kind_or_a_newer_format_is_refused(tmp_path):
    with pytest.raises(
        iia.errors.FileFormatError, match=r"holds a 'soup'; iia_ode\.load reads 'fitted solver', 'plan'"
    ):
        iia.load(write_tensors(tmp_path / "soup.safetensors", "soup", {}, {}))
    with pytest.raises(iia.errors.FileFormatError, match="holds a 'denoiser', expected a 'plan'"):
        read_tensors(DIGITS_WEIGHTS, "plan")
    path = fitted().save(tmp_path / "fit.safetensors")
    rewrite(path, lambda header, tensors: header.update(format=99))
    with pytest.raises(iia.errors.FileFormatError, match=r"format version 99; this iia_ode reads up to 2. Upgrade"):
        iia.load(path)


def rewrite(path, change):
    header, tensors = contents(path)
    change(header, tensors)
    save_file(tensors, path, {"iia_ode": json.dumps(header)})


def contents(path):
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["iia_ode"])
        return header, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


DELETED = object()
REPLACEMENTS = [DELETED, None, 1, "x", [], {}, -1, 1.5, True, 1e300, [[]], {"type": "EDM"}]


def places(node, path=()):
    """The path to every node of a JSON value but itself."""
    for key in node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
        yield (*path, key)
        yield from places(node[key], (*path, key))


def mutations(header, first):
    """The header with one node deleted or replaced: each node with a third of the replacements in turn, from `first` on."""
    for i, path in enumerate(places(header)):
        for value in REPLACEMENTS[(first + i) % 3 :: 3]:
            mutant = copy.deepcopy(header)
            *above, key = path
            parent = mutant
            for k in above:
                parent = parent[k]
            if value is DELETED:
                del parent[key]
            elif json.dumps(parent[key]) == json.dumps(value):
                continue
            else:
                parent[key] = value
            yield mutant


def tensor_mutations(tensors):
    """The tensors with one of them gone, resized, retyped or changed in value, and with one too many."""
    for name, value in tensors.items():
        others = {k: v for k, v in tensors.items() if k != name}
        yield others
        yield {**tensors, f"{name}2": value.clone()}
        bits = value.clone().view(torch.int64)
        bits[-1] ^= 1
        for changed in (
            *(value * torch.nan, value * 1.5, value[:-1], value[:0], torch.cat([value, value[-1:]]), value[None]),
            *(value.float(), value.long(), value.flip(0), bits, bits.view(F64), value.sum()),
        ):
            yield {**others, name: changed.contiguous()}


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Header and tensors of a small file, and a path for its mutants."""
    path = fitted(n=3).save(tmp_path_factory.mktemp("mutants") / "fit.safetensors")
    return *contents(path), path


def test_every_change_of_a_header_is_refused(stored):
    header, tensors, path = stored
    count = 0
    for mutant in mutations(header, 0):
        save_file(tensors, path, {"iia_ode": json.dumps(mutant)})
        with pytest.raises(iia.errors.FileFormatError, match=r"damaged|holds a|format version"):
            iia.load(path)
        count += 1
    assert count > 300


def test_every_change_of_a_tensor_is_refused(stored):
    header, tensors, path = stored
    for mutant in tensor_mutations(tensors):
        save_file(mutant, path, {"iia_ode": json.dumps(header)})
        with pytest.raises(iia.errors.FileFormatError, match="damaged or edited: its checksum does not match"):
            iia.load(path)


def test_a_file_of_wrong_layout_is_refused_even_if_its_checksum_is_right(stored, monkeypatch):
    """Such a file is no accident; still it loads as a fitted solver that can be shown and run, or is refused."""
    header, tensors, path = stored
    monkeypatch.setattr(os, "fsync", lambda _: None)
    del header["sha256"]
    ode, x = ode_on(iia.EDM()), states(iia.EDM())
    refused = 0
    for mutant, kept in [
        *((h, tensors) for h in mutations(header, 1)),
        *((header, t) for t in tensor_mutations(tensors)),
    ]:
        write_tensors(path, mutant.get("kind"), kept, {k: v for k, v in mutant.items() if k not in ("kind", "format")})
        try:
            fit = iia.load(path)
        except iia.errors.FileFormatError:
            refused += 1
            continue
        assert str(fit)
        assert fit.explain()
        with warnings.catch_warnings(), contextlib.suppress(iia.IIAError):
            warnings.simplefilter("ignore", iia.errors.FingerprintWarning)
            warnings.simplefilter("ignore", MismatchWarning)
            iia.sample(ode, x, solver=fit)
    assert refused > 300


def test_a_header_that_is_no_object_is_refused(stored):
    _, tensors, path = stored
    for text in ("", "{", "[]", "1", "null", '"x"', "NaN", "[" * 100_000, '{"format": NaN, "kind": "fitted solver"}'):
        save_file(tensors, path, {"iia_ode": text})
        with pytest.raises(iia.errors.FileFormatError, match="damaged"):
            iia.load(path)


# ---- writing ---------------------------------------------------------------------------------------------------------


def test_a_write_that_fails_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    path = fitted().save(tmp_path / "fit.safetensors")
    before = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    for name in ("replace", "fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, fail)
            with pytest.raises(OSError, match="disk full"):
                fitted(n=6).save(path)
        assert path.read_bytes() == before
        assert os.listdir(tmp_path) == ["fit.safetensors"]


def test_a_header_that_is_not_plain_json_is_refused_before_anything_is_written(tmp_path):
    for value in (torch.ones(1), float("nan"), object()):
        with pytest.raises(iia.errors.FileFormatError, match="not plain JSON"):
            write_tensors(tmp_path / "x.safetensors", "test", {}, {"value": value})
    assert os.listdir(tmp_path) == []


def test_written_tensors_come_back_from_any_layout(tmp_path):
    tensor = torch.arange(12.0).reshape(3, 4).T
    given = {"t": tensor, "shares its memory": tensor[1:], "expanded": torch.ones(1).expand(3)}
    path = write_tensors(tmp_path / "new folder" / "x.safetensors", "test", given, {"note": "ok"})
    tensors, header = read_tensors(path, "test")
    assert all(torch.equal(tensors[k], v) for k, v in given.items())
    assert header["note"] == "ok"


def test_a_written_file_has_the_permissions_of_any_new_file(tmp_path):
    plain = tmp_path / "plain"
    plain.write_bytes(b"")
    assert write_bytes(tmp_path / "ours", b"").stat().st_mode == plain.stat().st_mode


def test_writing_leaves_the_umask_alone_for_other_threads(tmp_path, monkeypatch):
    def refuse(_):
        raise AssertionError("the umask belongs to the whole process")

    monkeypatch.setattr(os, "umask", refuse)
    threads = [threading.Thread(target=write_bytes, args=(tmp_path / "same", b"x" * 1000)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert os.listdir(tmp_path) == ["same"]
    assert (tmp_path / "same").read_bytes() == b"x" * 1000


def test_a_place_that_cannot_be_written_is_known_before_the_work(tmp_path):
    check_writable(tmp_path / "new" / "file")
    assert os.listdir(tmp_path / "new") == []
    for path in (tmp_path, "/dev/null/file"):
        with pytest.raises(OSError, match=r"Is a directory|File exists"):
            check_writable(path)


@pytest.fixture
def meta_by_default():
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


def test_the_checksum_is_of_what_a_reader_sees(tmp_path):
    header = {"tuple": (1, 2.0), "keys": {10: "a", 9: "b"}, "text": "naïve\n\ud83d\ude00"}
    kinds = [torch.bool, torch.int8, torch.int64, torch.float16, torch.bfloat16, torch.float32, F64]
    tensors = {str(k): torch.arange(6).reshape(2, 3).to(k) for k in kinds}
    tensors |= {"scalar": torch.tensor(1.0), "empty": torch.zeros(0, 3)}
    again, read = read_tensors(write_tensors(tmp_path / "x.safetensors", "test", tensors, header), "test")
    assert all(torch.equal(again[k], v) and again[k].dtype == v.dtype for k, v in tensors.items())
    assert read["tuple"] == [1, 2.0]
    assert read["keys"] == {"9": "b", "10": "a"}


def test_a_default_device_does_not_reach_files_and_networks(tmp_path, meta_by_default):
    denoiser = iia.denoisers.digits()
    assert {v.device.type for v in [*denoiser.state_dict().values(), denoiser.network.frequencies]} == {"cpu"}
    assert denoiser(torch.zeros(1, 1, 8, 8, device="cpu"), torch.ones(1, device="cpu")).isfinite().all()
    code = (Evaluate(0, 40.0, "data"), Combine(((0, 0.5), (1, 0.5)), None, step=1))
    record = iia.load(saved_on_the_cpu(tmp_path)).record
    fit = iia.FittedSolver(iia.Plan(iia.EDM(), (40.0, 1.0), code, "mine"), (), record)
    assert iia.load(fit.save(tmp_path / "own.safetensors")).grid.tolist() == [40.0, 1.0]


def saved_on_the_cpu(folder):
    with torch.device("cpu"):
        return fitted().save(folder / "fit.safetensors")
