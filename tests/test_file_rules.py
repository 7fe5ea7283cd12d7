"""Rules of files: a schema and a version per kind, sizes within the file, links and modes kept, any default device."""

import contextlib
import dataclasses
import errno
import json
import os
import random
import stat
import threading
import typing
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

import iia_ode as iia
from iia_ode import files, statistics
from iia_ode.cli import main
from iia_ode.denoisers import EDMDenoiser, ImageClassifier, UNet, classifier, pretrained, save_classifier, save_denoiser
from iia_ode.errors import FileFormatError, InputError, MismatchError
from iia_ode.files import FORMATS, check_writable, read_tensors, write_bytes, write_tensors
from iia_ode.iia import Window, fitted
from iia_ode.plan import Bands, Combine, LinearMap, PerCondition, reading
from iia_ode.teacher import teacher

F64 = torch.float64
SCHEMAS = {
    "fitted solver": fitted._Header,
    "plan": reading._PlanHeader,
    "run": reading._RunHeader,
    "teacher": teacher._Header,
    "model statistics": statistics.Header,
    "denoiser": pretrained._Header,
    "classifier": classifier._Header,
}


def plan_per_condition():
    plan = iia.get_solver("ddim").plan(iia.EDM(), iia.grids.karras(3))
    *code, last = plan.code
    constant = PerCondition("y", (0, 1), torch.zeros(2, 4, dtype=F64))
    return iia.Plan(iia.EDM(), plan.grid, (*code, Combine(last.terms, constant, last.step)), "per")


@pytest.fixture(scope="module")
def every_kind(tmp_path_factory):
    """A small file of each kind, with maps, constants and a search among them: (kind, tensors, header) by name."""
    folder = tmp_path_factory.mktemp("kinds")
    ode = iia.problems.Gaussian(torch.zeros(4), torch.ones(4)).ode(iia.EDM())
    x = 80 * torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
    method = iia.IIA("ddim", Window(bands=2), "trajectory", guard=False, intercept=True)
    table = torch.linspace(0.99, 0.01, 20, dtype=F64)
    grid = iia.grids.discrete(4, iia.Discrete(table))
    run = plan_per_condition().start(x, "data", conditioning={"y": torch.zeros(16, dtype=torch.long)})
    run.give(0.1 * x)
    made = {
        "fit": method.fit(ode, x, iia.grids.karras(4)),
        "search": iia.fit(ode, 3, x=x, budget="closed-form"),
        "plan": iia.get_solver("heun").plan(iia.Discrete(table), grid),
        "run": run,
        "teacher": iia.Teacher.solve(ode, x, 20.0, 0.0, steps=4),
        "statistics": iia.ModelStatistics(
            torch.arange(3.0), *torch.ones(3, 3, 4), schedule=iia.EDM().config(), about={"seed": 0}
        ),
    }
    paths = {name: value.save(folder / name) for name, value in made.items()}
    network = UNet(channels=(8,), blocks=1, classes=2, embedding=8)
    paths["denoiser"] = save_denoiser(folder / "denoiser", EDMDenoiser(network, 0.5, (1, 8, 8)), {})
    paths["classifier"] = save_classifier(folder / "classifier", ImageClassifier((1, 8, 8), (4,), 3, 2), {})
    found = Quiet()
    for name, path in paths.items():
        kind = files.read_kind(path)
        tensors, header = read_tensors(path, kind)
        found[name] = kind, tensors, {k: v for k, v in header.items() if k not in ("format", "kind", "library")}
    return found


@pytest.fixture(scope="module", autouse=True)
def no_waiting_for_the_disk():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


class Quiet(dict):
    """A dict that hypothesis need not print."""

    __repr__ = object.__repr__


NAMES = ["fit", "search", "plan", "run", "teacher", "statistics", "denoiser", "classifier"]

NETWORKS = {"denoiser", "classifier"}


def used(value):
    """What a file's object says and gives; the object is used in every way that reads its parts."""
    if isinstance(value, iia.FittedSolver):
        return [str(value), value.explain(), value.table(), value.citation(), hash(value.plan)]
    if isinstance(value, iia.Plan):
        return [str(value), hash(value)]
    if isinstance(value, iia.Teacher):
        return [value.final.tolist(), value.at(5.0).tolist(), str(value.final.dtype)]
    if isinstance(value, iia.ModelStatistics):
        value.check(iia.EDM())
        return [repr(value), value.digest]
    if isinstance(value, EDMDenoiser):
        image, level = torch.ones(1, 1, 8, 8, device="cpu", dtype=torch.float32), torch.ones(1, device="cpu")
        return value(image, level.float()).tolist()
    if isinstance(value, ImageClassifier):
        return value(torch.ones(1, 1, 8, 8, device="cpu", dtype=torch.float32)).tolist()
    if value is None:  # refused
        return []
    found = [value.data.tolist() if value.seen else None]
    while not value.done:
        value.give(0.1 * value.state)
    return [*found, value.state.tolist()]


class Largest(TorchDispatchMode):
    """Size in bytes of the largest tensor made inside."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else [out]:
            if isinstance(value, torch.Tensor) and value.device.type != "meta":
                self.size = max(self.size, value.untyped_storage().nbytes())
        return out


# ---- one schema with its version -------------------------------------------------------------------------------------


def layout(kind):
    """The fields of a dataclass with their types, the fields of dataclasses among the types included."""
    found = {}
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        default = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        found[f"{kind.__name__}.{field.name}"] = [str(hints[field.name]).replace("iia_ode.", ""), default]
        for part in (hints[field.name], *parts(hints[field.name])):
            if dataclasses.is_dataclass(part):
                found |= layout(part)
    return found


def parts(hint):
    for part in typing.get_args(hint):
        yield part
        yield from parts(part)


def test_a_change_of_a_schema_other_than_a_new_field_with_a_default_needs_a_new_format_version():
    """After a new version in FORMATS, write the layouts here anew: tests/data/file_schemas.json."""
    stored = json.loads((Path(__file__).parent / "data" / "file_schemas.json").read_text())
    for kind, schema in SCHEMAS.items():
        version, fields = stored[kind]["version"], stored[kind]["fields"]
        assert FORMATS.get(kind, 1) == version
        now = layout(schema)
        assert {k: v for k, v in now.items() if k in fields} == fields
        assert all(default for k, (_, default) in now.items() if k not in fields)


@pytest.mark.parametrize("name", NAMES)
def test_a_file_without_a_field_loads_with_the_default_or_is_refused_when_it_is_read(tmp_path, every_kind, name):
    kind, tensors, header = every_kind[name]
    for path in [p for p in places(header) if isinstance(p[-1], str) and not any(k in p for k in range(1, 9))]:
        mutant = json.loads(json.dumps(header))
        del at(mutant, path[:-1])[path[-1]]
        file = write_tensors(tmp_path / "file", kind, tensors, mutant)
        try:
            value = iia.load(file)
        except FileFormatError as error:
            assert "damaged" in str(error) or "holds no valid" in str(error) or "does not hold" in str(error)
        else:
            used(value)


def test_a_file_of_another_format_version_is_refused_with_advice(tmp_path, every_kind):
    kind, tensors, header = every_kind["fit"]
    for version, text in ((1, r"has format version 1 of a 'fitted solver'.*Make the file again"), (99, "Upgrade")):
        body = json.dumps({**header, "format": version, "kind": kind, "sha256": "?"})
        save_file(tensors, tmp_path / "old", {"iia_ode": body})
        with pytest.raises(FileFormatError, match=text):
            iia.load(tmp_path / "old")
    for version in (True, 1.0, "2", None, []):
        save_file(tensors, tmp_path / "old", {"iia_ode": json.dumps({**header, "format": version, "kind": kind})})
        with pytest.raises(FileFormatError, match="is damaged: its header is not valid"):
            iia.load(tmp_path / "old")


def test_a_record_of_an_older_layout_is_refused_when_it_is_read_and_never_later(tmp_path, every_kind, capsys):
    """A file whose search lacks a field loaded once, and then broke print and explain."""
    kind, tensors, header = every_kind["search"]
    mutant = json.loads(json.dumps(header))
    del mutant["record"]["search"]["final_draws"]
    path = write_tensors(tmp_path / "old.safetensors", kind, tensors, mutant)
    with pytest.raises(FileFormatError, match=r"another version of iia_ode.*final_draws"):
        iia.load(path)
    with pytest.raises(SystemExit):
        main(["show", str(path)])
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and "final_draws" in said[0]


# ---- damage ----------------------------------------------------------------------------------------------------------


def places(node, path=()):
    for key in node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
        yield (*path, key)
        yield from places(node[key], (*path, key))


def at(node, path):
    for key in path:
        node = node[key]
    return node


def nested(levels):
    value = []
    for _ in range(levels):
        value = [value]
    return value


HUGE = {"kind": "bands", "shape": [1, 8000, 8000], "bands": 1, "channels": None, "axes": None}
VALUES = [None, 0, -1, 2, 10**9, 2**63, 10**400, 1.5, 1e300, True, "", "x", "all", "matrix", "\ud800", [], {}, [[]]]
VALUES += [[10**9], [-3], [0], [10**5, 10**5], {"type": "EDM"}, {"map": HUGE, "digest": "?"}, nested(40), nested(300)]


def damaged(header, tensors, chance):
    """The parts of a file with one or two of them removed, repeated or replaced."""
    header, tensors = json.loads(json.dumps(header)), dict(tensors)
    for _ in range(chance.choice([1, 1, 2])):
        if chance.random() < 0.75:
            *above, key = chance.choice(list(places(header)))
            node, kind = at(header, above), chance.random()
            if kind < 0.2:
                del node[key]
            elif kind < 0.3 and isinstance(node, list):
                node.append(node[key])
            else:
                node[key] = chance.choice(VALUES)
        else:
            key = chance.choice(list(tensors))
            v = tensors[key]
            empty = torch.zeros(0, 10**12), torch.zeros(10**12, 0, dtype=F64)
            cut, flat = (v[:0], v.flip(0)) if v.ndim else (v, v)
            tensors[key] = chance.choice(
                [cut, flat, v.reshape(-1), v[None], v.float(), v.half(), v.long(), v.bool(), *empty]
            )
            if chance.random() < 0.2:
                tensors[chance.choice(["x", "constant.1", "run.value.0", "data"])] = tensors.pop(key)
    return header, tensors


@settings(max_examples=100)
@given(st.sampled_from(NAMES), st.integers(0, 10**6))
def test_a_damaged_file_is_refused_or_works_and_takes_memory_in_proportion_to_its_size(every_kind, scratch, name, seed):
    """Damage with a right checksum: the checksum would catch any accident."""
    kind, *parts_ = every_kind[name]
    header, tensors = damaged(parts_[1], parts_[0], random.Random(seed))
    try:
        path = write_tensors(scratch, kind, tensors, header)
    except FileFormatError:
        return
    with Largest() as largest, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value = None
        with contextlib.suppress(FileFormatError, MismatchError):
            value = iia.load(path)
        with contextlib.suppress(iia.IIAError):
            used(value)
    assert largest.size < 8 * path.stat().st_size + 2**21


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("scratch") / "file"


@settings(max_examples=60)
@given(st.sampled_from(NAMES), st.integers(0, 10**6))
def test_a_file_with_other_bytes_is_refused_or_works(every_kind, scratch, name, seed):
    kind, tensors, header = every_kind[name]
    chance, data = random.Random(seed), bytearray(write_tensors(scratch, kind, tensors, header).read_bytes())
    if chance.random() < 0.3:
        del data[chance.randrange(len(data)) :]
    else:
        for _ in range(chance.choice([1, 1, 4])):
            data[chance.randrange(chance.choice([16, 200, len(data)]))] ^= 1 << chance.randrange(8)
    scratch.write_bytes(data)
    with contextlib.suppress(FileFormatError, MismatchError):
        iia.load(scratch)


def test_a_small_file_that_names_huge_sizes_is_refused_before_anything_is_built(tmp_path, every_kind):
    kind, tensors, header = every_kind["fit"]
    body = json.loads(json.dumps(header))
    step = next(item for item in body["code"] if item[0] == "combine" and len(item) == 4)
    key = next(iter(step[3]))
    for shape in ([1, 8000, 8000], [10**5, 10**5], [10**9]):
        about = {"map": {**HUGE, "shape": shape}, "digest": "?"}
        for place in (key, "constant.2"):
            step[3][place] = about
            path = write_tensors(tmp_path / "huge", kind, tensors, body)
            with Largest() as largest, pytest.raises(FileFormatError):
                iia.load(path)
            assert largest.size < 2**20
    changes = {
        "denoiser": (
            {"channels": [10**6] * 3},
            {"blocks": 10**9},
            {"embedding": 2**40},
            {"classes": 10**12},
            {"patch": 10**6},
        ),
        "classifier": (
            {"channels": [10**6] * 2},
            {"shape": [1, 10**9, 10**9]},
            {"features": 2**40},
            {"classes": 10**12},
        ),
    }
    for name, change in [(name, change) for name, several in changes.items() for change in several]:
        kind, tensors, header = every_kind[name]
        body = json.loads(json.dumps(header))
        config = body["config"]
        config.get("network", config).update(change)
        path = write_tensors(tmp_path / "huge", kind, tensors, body)
        with Largest() as largest, pytest.raises(FileFormatError):
            iia.load(path)
        assert largest.size < 2**20


def test_a_map_of_a_large_sample_costs_nothing_until_it_is_applied(tmp_path):
    plan = iia.get_solver("ddim").plan(iia.EDM(), iia.grids.karras(2))
    *code, last = plan.code
    with Largest() as largest:
        weight = LinearMap(Bands((1, 1500, 1500), 4), torch.full((4,), last.terms[0][1], dtype=F64))
        terms = ((last.terms[0][0], weight), *last.terms[1:])
        wide = iia.Plan(iia.EDM(), plan.grid, (*code, Combine(terms, None, last.step)), "wide")
        again = iia.load(wide.save(tmp_path / "wide"))
        assert again == wide and str(again) == str(wide)
        assert again.code[-1].terms[0][1].mean == pytest.approx(last.terms[0][1])
    assert largest.size < 2**22


@pytest.mark.parametrize("shape", [(7,), (3, 12), (3, 5, 8), (3, 300, 400)])
@pytest.mark.parametrize("channels", [None, "luma-chroma"])
def test_groups_counted_block_by_block_are_those_of_the_whole(shape, channels):
    for bands in (1, 2, 3, "all"):
        if bands == "all" and len(shape) == 3 and shape[1] > 100:
            continue
        found = Bands(shape, bands, channels)
        assert torch.equal(found.sizes, torch.bincount(found._index.flatten()).double())
        assert found.count == len(found.sizes) == len(found.names)


# ---- default devices and dtypes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_file_loads_and_is_saved_alike_under_any_default_device_and_dtype(tmp_path, every_kind, name):
    kind, tensors, header = every_kind[name]
    path = write_tensors(tmp_path / "file", kind, tensors, header)
    expected = used(iia.load(path))
    for change, value, back in [
        (torch.set_default_device, "meta", None),
        *((torch.set_default_dtype, d, torch.float32) for d in (F64, torch.float16, torch.bfloat16)),
    ]:
        change(value)
        try:
            loaded = iia.load(path)
            assert used(loaded) == expected
            if name not in NETWORKS:
                iia.load(path).save(tmp_path / "again")
        finally:
            change(back)
        if name not in NETWORKS:
            assert used(iia.load(tmp_path / "again")) == expected


def test_a_loaded_object_does_not_change_with_its_file(tmp_path, every_kind):
    """A write into the same file, as by cp, reaches the memory of everybody who has mapped the file."""
    kind, tensors, header = every_kind["teacher"]
    path = write_tensors(tmp_path / "file", kind, tensors, header)
    value = iia.load(path)
    before = value.final.clone()
    path.write_bytes(bytes(path.stat().st_size))
    assert torch.equal(value.final, before)


# ---- links, modes and places -----------------------------------------------------------------------------------------


def a_plan(solver="ddim"):
    return iia.get_solver(solver).plan(iia.EDM(), iia.grids.karras(4))


def test_saving_onto_a_link_writes_the_file_behind_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    a_plan().save("v1.safetensors")
    os.symlink("v1.safetensors", "latest.safetensors")
    os.symlink("latest.safetensors", "link to the link")
    for link in ("latest.safetensors", "link to the link"):
        assert a_plan("heun").save(link) == Path(link)
        assert os.path.islink(link) and iia.load("v1.safetensors").name == iia.load(link).name == "heun"
        a_plan().save("v1.safetensors")
    os.symlink("folder/new.safetensors", "nowhere")
    a_plan().save("nowhere")
    assert os.path.islink("nowhere") and iia.load("folder/new.safetensors").name == "ddim"
    os.symlink("circle 2", "circle 1")
    os.symlink("circle 1", "circle 2")
    os.symlink("folder", "link to a folder")
    for place, number in (("circle 1", errno.ELOOP), ("link to a folder", errno.EISDIR), ("", errno.EISDIR)):
        for act in (a_plan().save, check_writable):
            with pytest.raises(OSError) as caught:
                act(place)
            assert (caught.value.errno, caught.value.filename) == (number, place)
    assert a_plan().save("link to a folder/other").exists() and not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664, 0o666])
def test_an_existing_file_keeps_its_mode_and_its_content_stays_private_throughout(tmp_path, monkeypatch, mode):
    path = a_plan().save(tmp_path / "plan")
    os.chmod(path, mode)
    seen, replace = [], os.replace

    def spy(source, target):
        seen.append(stat.S_IMODE(os.stat(source).st_mode))
        replace(source, target)

    real = os.open

    def opened(name, flags, permissions=0o777):
        if str(name).endswith(".tmp"):
            assert not permissions & 0o077
        return real(name, flags, permissions)

    monkeypatch.setattr(os, "replace", spy)
    monkeypatch.setattr(os, "open", opened)
    a_plan("heun").save(path)
    assert seen == [mode] == [stat.S_IMODE(path.stat().st_mode)]
    assert iia.load(path).name == "heun"


def test_other_hard_links_keep_the_old_content(tmp_path):
    path = a_plan().save(tmp_path / "plan")
    os.link(path, tmp_path / "other")
    a_plan("heun").save(path)
    assert (iia.load(path).name, iia.load(tmp_path / "other").name) == ("heun", "ddim")


def test_a_file_that_must_not_be_written_and_a_device_are_left_alone(tmp_path, monkeypatch):
    path = a_plan().save(tmp_path / "plan")
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda *_: False)  # the user of the tests may be allowed everything
        for act in (a_plan("heun").save, check_writable):
            with pytest.raises(PermissionError, match=r"Permission denied: '.*plan'"):
                act(path)
    assert iia.load(path).name == "ddim"
    os.mkfifo(tmp_path / "pipe")
    for place in ("/dev/null", tmp_path / "pipe"):
        with pytest.raises(OSError, match="Not a regular file"):
            write_bytes(place, b"x")
        with pytest.raises(FileFormatError, match="no file"):
            iia.load(place)
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_an_error_of_writing_names_the_file_that_was_asked_for(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", str(next(tmp_path.glob("*.tmp"))))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*/plan'") as caught:
        a_plan().save(tmp_path / "plan")
    assert caught.value.errno == errno.ENOSPC and os.listdir(tmp_path) == []


@pytest.mark.parametrize("path", [3, None, 1.5, ["x"], "a\0b", object()])
def test_what_is_no_path_is_refused_by_name(path):
    for act in (a_plan().save, iia.load, check_writable):
        with pytest.raises(InputError, match="path"):
            act(path)


def test_any_kind_of_path_and_any_name_will_do(tmp_path):
    for path in (str(tmp_path / "name"), tmp_path / "ä ö 😀", os.fsencode(tmp_path / "bytes"), tmp_path / ".hidden"):
        a_plan().save(path)
        assert iia.load(path).name == "ddim"
    with pytest.raises(FileFormatError, match="is a folder"):
        iia.load(tmp_path)


def test_writers_at_the_same_time_leave_one_whole_file(tmp_path):
    path, names = a_plan().save(tmp_path / "plan"), ("ddim", "heun")
    writers = [threading.Thread(target=lambda p: [p.save(path) for _ in range(20)], args=(a_plan(n),)) for n in names]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert iia.load(path).name in names
    assert os.listdir(tmp_path) == ["plan"]
