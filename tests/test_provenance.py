"""Provenance: a record goes through JSON unchanged, and a file with another layout is refused by the name of the field."""

import copy
import json
import os
import warnings
from dataclasses import MISSING, fields, is_dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import iia_ode as iia
from iia_ode.errors import FileFormatError, FingerprintWarning, MismatchError, MismatchWarning
from iia_ode.files import from_json, read_tensors, to_json, write_tensors
from iia_ode.iia.provenance import (
    UNJUDGED,
    Endpoint,
    Ingredient,
    Named,
    Record,
    RefinementRecord,
    SearchRecord,
    Split,
    StageCost,
    StepReport,
    TeacherOptions,
)
from iia_ode.ode.origin import Origin
from iia_ode.sharing.records import InUse, Served

NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
WHOLE = st.integers(-(10**20), 10**20)
JSON = st.recursive(
    st.none() | st.booleans() | WHOLE | NUMBERS | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
OBJECTS = st.dictionaries(st.text(), JSON, max_size=3)
SHAPES = st.lists(st.integers(0, 9), max_size=3).map(tuple)


def many(entries, most=3):
    return st.lists(entries, max_size=most).map(tuple)


def maybe(entries):
    return st.none() | entries


ORIGINS = st.builds(
    Origin,
    schedule=st.builds(lambda kind, more: {**more, "type": kind}, st.text(), OBJECTS),
    prediction=st.text(),
    guidance_scale=NUMBERS,
    conditioning=st.dictionaries(st.text(), SHAPES | st.text(), max_size=3),
    state_shape=SHAPES,
    state_dtype=st.text(),
    fingerprint=st.text(),
)
INGREDIENTS = st.builds(Ingredient, st.text(), maybe(NUMBERS), WHOLE, NUMBERS, st.just(False))
CHOSEN = st.builds(Ingredient, st.text(), NUMBERS, WHOLE, NUMBERS, st.just(True))
REFINEMENTS = st.integers(1, 4).flatmap(
    lambda n: st.builds(
        RefinementRecord,
        *[st.lists(maybe(NUMBERS), min_size=n, max_size=n).map(tuple)] * 2,
        st.integers(0, n - 1),
        st.text(),
    )
)
SEARCHES = st.builds(
    SearchRecord,
    rival=st.text(),
    budget=OBJECTS,
    ingredients=st.builds(lambda a, one, b: (*a, one, *b), many(INGREDIENTS, 2), CHOSEN, many(INGREDIENTS, 2)),
    refinement=maybe(REFINEMENTS),
    steps=maybe(st.builds(Split, WHOLE, WHOLE)),
    costs=st.dictionaries(st.text(), st.builds(StageCost, WHOLE, NUMBERS), max_size=3),
    fitted_to_all=st.booleans(),
    given=WHOLE,
    final_draws=WHOLE,
    checkpointed=st.booleans(),
    seconds=NUMBERS,
)
RECORDS = st.builds(
    Record,
    library=st.text(),
    base=st.builds(Named, st.text(), OBJECTS),
    terms=st.text(),
    target=st.builds(Named, st.text(), OBJECTS),
    history=WHOLE,
    ridge=NUMBERS | st.just("auto"),
    guard=st.booleans(),
    intercept=st.booleans(),
    origin=ORIGINS,
    batch=WHOLE,
    held_out=WHOLE,
    endpoint=st.builds(
        Endpoint, maybe(NUMBERS), maybe(NUMBERS), st.booleans(), st.text(), st.text(), WHOLE, maybe(WHOLE)
    ),
    teacher=maybe(st.builds(TeacherOptions, st.text(), NUMBERS, WHOLE)),
    evaluations=WHOLE,
    sample_evaluations=WHOLE,
    seed=maybe(WHOLE),
    search=maybe(SEARCHES),
)
REPORTS = st.integers(0, 3).flatmap(
    lambda n: st.builds(
        StepReport,
        symbols=st.lists(st.text(), min_size=n, max_size=n).map(tuple),
        **dict.fromkeys(("values", "base_values", "corrections"), st.lists(NUMBERS, min_size=n, max_size=n).map(tuple)),
        **dict.fromkeys(("t", "s", "before", "after", "condition", "ridge", "intercept"), NUMBERS),
        **dict.fromkeys(("held_before", "held_after"), maybe(NUMBERS)),
        **dict.fromkeys(("index", "rank"), WHOLE),
        accepted=st.booleans(),
    )
)


@settings(max_examples=25)
@given(RECORDS | REPORTS)
def test_a_record_goes_through_json_unchanged(value):
    text = json.dumps(to_json(value), allow_nan=False)
    again = from_json(type(value), json.loads(text), "this record")
    assert again == value
    assert repr(again) == repr(value)  # -0.0 and the types of numbers too


def a_record():
    """A record in which every optional part is present."""
    return Record(
        library="1.0",
        base=Named("ddim", {}),
        terms="window",
        target=Named("trajectory", {"steps": 60}),
        history=1,
        ridge="auto",
        guard=False,
        intercept=False,
        origin=Origin({"type": "EDM"}, "data", 2.0, {"y": (3,), "text": "str"}, (4,), "float64", "Model.0123"),
        batch=8,
        held_out=4,
        endpoint=Endpoint(0.2, 0.1, False, "solver expab4", "why", 4, 50, 0.05),
        teacher=TeacherOptions("expab4", 0.002, 60),
        evaluations=10,
        sample_evaluations=80,
        seed=3,
        search=SearchRecord(
            rival="ipndm3",
            budget={"draws": 0},
            ingredients=(Ingredient("ipndm3, not fitted", 0.2, 5, 0.5), Ingredient("scalars", 0.1, 5, 0.5, True)),
            refinement=RefinementRecord((0.3, None), (0.2, 0.1), 1, "it had made as many iterations as allowed"),
            steps=Split(4, 1),
            costs={"teacher": StageCost(40, 1.0)},
            fitted_to_all=True,
            given=6,
            final_draws=2,
            checkpointed=False,
            seconds=1.0,
            from_images=True,
        ),
        served=(Served(2.0, 0.1, "ipndm3", 0.2),),
        in_use=(InUse("DDIMScheduler()", 5, 0.3, 0.1, 4),),
    )


def a_report():
    return StepReport(0, 80.0, 1.0, ("z",), (0.1,), (0.0,), (0.1,), 2.0, 1.0, 2.0, 1.0, True, 1, 1.0, 0.0, 0.1)


def nodes(value, path=()):
    """The path to every dataclass in a value, and the dataclass."""
    if is_dataclass(value):
        yield path, value
        for field in fields(value):
            yield from nodes(getattr(value, field.name), (*path, field.name))
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, tuple) else ():
        yield from nodes(value[key], (*path, key))


def changed(body, path, change):
    """A copy of a JSON object, with the object at the path changed."""
    mutant = copy.deepcopy(body)
    node = mutant
    for key in path:
        node = node[key]
    change(node)
    return mutant


def wrong_values(value):
    """JSON values of types that a field with this value cannot have."""
    yield [{}]
    if not isinstance(value, str) or value == "auto":
        yield "x"
    if not isinstance(value, bool | int | float) and value != "auto":
        yield 1.5
    if isinstance(value, bool):
        yield 1
    elif isinstance(value, int):
        yield from (1.5, True)
    if not (value is None or isinstance(value, dict)):
        yield {}


CASES = [
    pytest.param(whole, path, node, field, id=".".join([type(whole).__name__, *map(str, path), field.name]))
    for whole in (a_record(), a_report())
    for path, node in nodes(whole)
    for field in fields(node)
]


@pytest.mark.parametrize(("whole", "path", "node", "field"), CASES)
def test_a_field_that_is_missing_or_of_another_type_is_named(whole, path, node, field):
    body = to_json(whole)
    without = changed(body, path, lambda n: n.pop(field.name))
    if field.default is MISSING and field.default_factory is MISSING:
        with pytest.raises(FileFormatError, match=rf"^the file is damaged, or from another.*`{field.name}`"):
            from_json(type(whole), without, "the file")
    elif not getattr(node, "chosen", False):  # one ingredient has to be chosen
        default = field.default if field.default_factory is MISSING else field.default_factory()
        with_default = changed(body, path, lambda n: n.update({field.name: default}))
        assert from_json(type(whole), without, "") == from_json(type(whole), with_default, "")
    for value in wrong_values(getattr(node, field.name)):
        mutant = changed(body, path, lambda n, v=value: n.update({field.name: v}))
        with pytest.raises(FileFormatError, match=rf"damaged.*`header.*\b{field.name}\b"):
            from_json(type(whole), mutant, "the file")


@pytest.mark.parametrize(("whole", "path"), [(w, path) for w in (a_record(), a_report()) for path, _ in nodes(w)])
def test_a_field_of_a_later_version_is_ignored(whole, path):
    body = changed(to_json(whole), path, lambda n: n.update({"of a later version": 1}))
    assert from_json(type(whole), body, "the file") == whole


@pytest.mark.parametrize(
    ("kind", "change", "text"),
    [
        (Origin, {"schedule": {}}, "field `type` of `schedule` must be the name"),
        (StepReport, {"values": []}, "must have equal lengths - at `header.reports"),
        (RefinementRecord, {"best": 2}, "an entry at index `best` - at `header.record.search.refinement`"),
        (RefinementRecord, {"best": -1}, "an entry at index `best`"),
        (RefinementRecord, {"train": [1.0]}, "must have equal lengths"),
        (Ingredient, {"chosen": True}, "exactly one chosen entry"),
        (SearchRecord, {"ingredients": []}, "exactly one chosen entry, with an error - at `header.record.search`"),
    ],
)
def test_fields_that_contradict_each_other_are_refused_by_load(tmp_path, kind, change, text):
    path = a_fit().save(tmp_path / "fit.safetensors")
    tensors, header = read_tensors(path, "fitted solver")
    roots = {"record": a_record(), "reports": (a_report(),)}
    place = next((root, *at) for root, value in roots.items() for at, node in nodes(value) if type(node) is kind)
    body = changed(header, place, lambda n: n.update(change))
    for key in ("kind", "format"):
        del body[key]
    with pytest.raises(FileFormatError, match=rf"fit\.safetensors' is damaged, or from another version.*{text}"):
        iia.load(write_tensors(path, "fitted solver", tensors, body))


def a_fit():
    plan = iia.get_solver("ddim").plan(iia.EDM(), torch.tensor([80.0, 1.0], dtype=torch.float64))
    return iia.FittedSolver(plan, (a_report(),), a_record())


def test_a_record_that_load_would_refuse_is_refused_by_save(tmp_path):
    fit = a_fit()
    for record, text in [
        (replace(fit.record, history=1.5), r"the account of ddim is damaged.*`header.record.history`"),
        (replace(fit.record, ridge="best"), r"`header.record.ridge`"),
        (replace(fit.record, endpoint=replace(UNJUDGED, base=float("nan"))), "not plain JSON"),
        (replace(fit.record, base=Named("ddim", {"weights": torch.ones(2)})), "not plain JSON"),
    ]:
        with pytest.raises(FileFormatError, match=text):
            replace(fit, record=record).save(tmp_path / "fit.safetensors")
    assert os.listdir(tmp_path) == []


def test_every_part_of_a_record_comes_back_from_a_file_and_is_described(tmp_path):
    fit = a_fit()
    again = iia.load(fit.save(tmp_path / "fit.safetensors"))
    assert (again.record, again.reports) == (fit.record, fit.reports)
    assert str(again) == str(fit) and again.explain() == fit.explain()
    for part in ("expab4", "scalars", "ipndm3", "1 of 1 iterations", "2 made for the last choice", "seed 3"):
        assert part in str(fit)
    assert "fell from 0.2 to 0.1" in fit.explain() and "6 were asked for" in fit.explain()


@settings(max_examples=15)
@given(RECORDS, many(REPORTS))
def test_any_record_can_be_described_and_explained(record, reports):
    fit = iia.FittedSolver(a_fit().plan, reports, record)
    assert str(fit).startswith("ddim: ")
    assert fit.explain()


# ---- the origin ------------------------------------------------------------------------------------------------------


def an_ode(**changes):
    options = {"conditioning": {"y": torch.ones(6, 3)}, "unconditional": {"y": torch.zeros(3)}, "guidance_scale": 2.0}
    return iia.ProbabilityFlowODE(torch.nn.Linear(4, 4), iia.EDM(), **{**options, **changes})


def test_the_origin_of_an_ode_matches_it_and_names_what_differs_in_another():
    ode, x = an_ode(), torch.zeros(6, 4)
    origin = Origin.of(ode, x)
    assert origin.conditioning == {"y": (3,)} and origin.state_dtype == "float32"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        origin.check(ode, x, name="this fit")
        origin.check(ode, name="this fit")
    for change, text in [
        ({"schedule": {"type": "VP"}}, r"this fit was fitted for schedule VP, and this ODE has EDM"),
        ({"prediction": "noise"}, "for prediction noise, and this ODE has data"),
        ({"conditioning": {"y": (2,)}}, r"y \[2\], and this ODE has y \[3\]"),
        ({"conditioning": {}}, r"none, and this ODE has y \[3\]"),
        ({"state_shape": (5,)}, r"for states \[B, 5\], got \[6, 4\]"),
    ]:
        with pytest.raises(MismatchError, match=text):
            replace(origin, **change).check(ode, x, name="this fit")
    with pytest.warns(MismatchWarning, match=r"guidance_scale 1.5, and this ODE has 2.0"):
        replace(origin, guidance_scale=1.5).check(ode, x, name="this fit")
    with pytest.raises(MismatchError, match=r"guidance_scale 1.5, .* Make one for this ODE"):
        replace(origin, guidance_scale=1.5).check(ode, x, name="this teacher", made="made", strict_guidance=True)
    with pytest.warns(FingerprintWarning, match="with fingerprint Other.1"):
        replace(origin, fingerprint="Other.1").check(ode, x, name="this fit")


# ---- a search --------------------------------------------------------------------------------------------------------


def test_a_search_that_no_fit_wins_returns_its_rival_with_an_account_of_its_own():
    """Two training samples of a wild model: nothing that is fitted to them does better than the solver without a fit."""

    def wild(x, t):
        return torch.tanh(3 * torch.sin(7 * x) / (1 + t[:, None] ** 2))

    z = torch.randn(8, 2, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    budget = iia.Budget(teacher_steps=20, trials=2, held_out=0.7)
    ode = iia.ProbabilityFlowODE(wild, iia.EDM())
    found = iia.fit(ode, 2, noise=z, budget=budget)
    record, search = found.record, found.record.search
    assert record.base.name == "ipndm3"
    assert search.chosen is search.ingredients[0] and search.rival == "ipndm3"
    own = record.endpoint.teacher_error
    end = search.chosen.error
    assert record.endpoint == Endpoint(end, end, True, "none", "", judged=6, teacher_error=own)
    assert "Judged on 6 samples" in found.explain()
    assert (record.batch, record.held_out, search.steps, found.reports) == (8, 6, None, ())
    assert record.origin == Origin.of(ode, z)
    assert str(found).splitlines()[0] == "iia-2: ipndm3, 2 steps, 2 evaluations"
    assert str(found).splitlines()[3] == "chosen: ipndm3, not fitted"
