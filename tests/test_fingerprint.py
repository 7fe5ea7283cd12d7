"""Who the model is: weights are recognised through wrappers and casts, and other weights never pass for them."""

import copy
import functools
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import F64, gaussian, normal
from torch import nn

import iia_ode as iia
from iia_ode import ProbabilityFlowODE
from iia_ode.errors import FingerprintWarning, InputError
from iia_ode.ode import Fingerprint, Wrapped, cached

GRID = iia.grids.karras(3, 0.05, 10.0)


def network(seed: int = 0, width: int = 50) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, width), nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, 3))


def fingerprint(model: object, **options: object) -> Fingerprint:
    return ProbabilityFlowODE(model, iia.EDM(), **options).fingerprint()


class Deep(nn.Module):
    """A network one attribute deep, as a model."""

    def __init__(self, n: nn.Module) -> None:
        super().__init__()
        self.n = n

    def forward(self, x, t):
        return self.n(x)


class Slot(nn.Module):
    """A network under another name."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.module = net

    def forward(self, x, t):
        return self.module(x)


WRAPPERS = {
    "one attribute deep": Deep,
    "module": Slot,
    "two deep": lambda net: Slot(Deep(net)),
    "data parallel": nn.DataParallel,
    "compiled": lambda net: torch.compile(Deep(net), backend="eager"),
    "average": torch.optim.swa_utils.AveragedModel,
    "bound method": lambda net: Deep(net).forward,
    "partial": lambda net: functools.partial(Deep(net)),
}


# ---- the same weights ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WRAPPERS)
def test_the_same_weights_are_recognised_through_wrappers(name):
    net = network()
    wrapped = WRAPPERS[name](net)
    assert fingerprint(wrapped) == fingerprint(net) == fingerprint(WRAPPERS[name](copy.deepcopy(net)))
    assert fingerprint(WRAPPERS[name](network(1))) != fingerprint(net)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, F64], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_the_same_weights_are_recognised_in_another_dtype(dtype, seed):
    net = network(seed)
    cast = copy.deepcopy(net).to(dtype)
    assert fingerprint(cast) == fingerprint(net)
    assert fingerprint(net) == str(fingerprint(cast))  # as a file has it
    assert len({fingerprint(net), fingerprint(cast)}) == 1
    assert fingerprint(Deep(cast)) == fingerprint(net)
    assert fingerprint(copy.deepcopy(network(seed + 1)).to(dtype)) != fingerprint(net)
    mixed = copy.deepcopy(net)
    mixed[1].to(dtype)
    assert fingerprint(mixed) == fingerprint(net)


def test_a_model_in_double_precision_is_its_cast_to_any_other():
    net = network().double()
    with torch.no_grad():
        for p in net.parameters():
            p += 1e-9 * torch.randn_like(p)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert fingerprint(copy.deepcopy(net).to(dtype)) == fingerprint(net)
    other = copy.deepcopy(net)
    other[0].weight.data[0, 0] += 1e-15
    assert fingerprint(other) != fingerprint(net)


def test_a_fit_is_used_without_a_warning_by_the_same_network_in_half_precision():
    net = network()
    fit = iia.preset("iia-ddim").fit(ProbabilityFlowODE(Deep(net), iia.EDM()), 10 * torch.randn(16, 3), GRID)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        iia.sample(ProbabilityFlowODE(Slot(copy.deepcopy(net).bfloat16()), iia.EDM()), 10 * normal(2, 3), solver=fit)


def test_the_fingerprint_does_not_depend_on_schedule_condition_or_prediction():
    model, c = network(), torch.zeros(4)
    other = ProbabilityFlowODE(model, iia.VP(), "noise", conditioning={"c": c})
    assert other.fingerprint() == other.condition(c=2 * c).fingerprint() == fingerprint(model)


def test_counters_of_calls_are_no_weights_and_running_statistics_are():
    norm = nn.BatchNorm1d(3)
    before = fingerprint(norm)
    norm.num_batches_tracked += 1
    assert fingerprint(norm) == before
    norm.running_mean += 1
    assert fingerprint(norm) != before


# ---- other weights ---------------------------------------------------------------------------------------------------


@settings(max_examples=10)
@given(st.integers(0, 10**6), st.booleans())
def test_the_smallest_change_of_one_weight_anywhere_is_noticed(place, half):
    model = nn.Embedding(1001, 131)  # several blocks and a rest
    with torch.no_grad():
        model.weight.copy_(torch.linspace(0.5, 1, model.weight.numel()).reshape(1001, 131))
    model = model.bfloat16() if half else model
    before = fingerprint(model)
    flat = model.weight.data.view(-1)
    place %= flat.numel()
    flat[place] = torch.nextafter(flat[place], 2 * flat[place])
    assert fingerprint(model) != before


def _swap(a: torch.Tensor, b: torch.Tensor) -> None:
    kept = a.clone()
    a.copy_(b)
    b.copy_(kept)


CHANGES = {
    "exponential moving average, swapped in": lambda n: [p.data.copy_(torch.randn_like(p)) for p in n.parameters()],
    "other data": lambda n: setattr(n[0].weight, "data", torch.randn_like(n[0].weight)),
    "a loaded state": lambda n: n.load_state_dict(network(9).state_dict()),
    "a step of training": lambda n: (
        n(torch.ones(1, 3)).sum().backward(),
        torch.optim.SGD(n.parameters(), lr=1e-3).step(),
    ),
    "in place": lambda n: n[1].bias.data.add_(1e-6),
    "another parameter": lambda n: setattr(n[0], "weight", nn.Parameter(torch.randn_like(n[0].weight))),
    "layers of one shape, exchanged": lambda n: _swap(n[1].weight.data, n[2].weight.data),
    "rows, permuted": lambda n: n[1].weight.data.copy_(n[1].weight.data.flip(0)),
    "columns, permuted": lambda n: n[1].weight.data.copy_(n[1].weight.data.flip(1)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_weights_changed_in_any_way_are_noticed_by_the_same_ode(change):
    net = network()
    ode, before = ProbabilityFlowODE(Deep(net), iia.EDM()), fingerprint(Deep(net))
    assert ode.fingerprint() == before
    kept = copy.deepcopy(net.state_dict())
    CHANGES[change](net)
    assert ode.fingerprint() != before
    net.load_state_dict(kept)
    assert ode.fingerprint() == before == fingerprint(net)


def test_writes_through_data_are_noticed_by_the_check_of_a_fit():
    net = network()
    ode = ProbabilityFlowODE(Deep(net), iia.EDM())
    fit = iia.preset("iia-ddim").fit(ode, 10 * torch.randn(16, 3), GRID)
    assert ode.fingerprint() == fit.record.origin.fingerprint
    for p in net.parameters():
        p.data.copy_(torch.randn_like(p))
    fresh = ProbabilityFlowODE(Deep(net), iia.EDM())
    for o in (ode, fresh):
        assert o.fingerprint() != fit.record.origin.fingerprint
        with pytest.warns(FingerprintWarning):
            iia.sample(o, 10 * torch.randn(2, 3), solver=fit)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.bool], ids=str)
def test_weights_of_whole_numbers_are_told_apart(dtype):
    one, other = nn.Module(), nn.Module()
    for module, value in ((one, 0), (other, 1)):
        table = torch.zeros(70_000, dtype=dtype)
        table[69_000] = value
        module.register_buffer("table", table)
    assert fingerprint_of_module(one) != fingerprint_of_module(other)
    assert fingerprint_of_module(one) == fingerprint_of_module(copy.deepcopy(one))


def fingerprint_of_module(module: nn.Module) -> Fingerprint:
    module.forward = lambda x, t: x  # type: ignore[assignment]
    return fingerprint(module)


def test_two_problems_have_two_fingerprints():
    ode = gaussian().ode(iia.EDM())
    other = iia.problems.Gaussian(2 * gaussian().mean, gaussian().variance).ode(iia.EDM())
    assert ode.fingerprint() == gaussian().ode(iia.EDM()).fingerprint() != other.fingerprint()


# ---- functions -------------------------------------------------------------------------------------------------------


def test_a_function_without_weights_is_unknown_and_told_by_its_code():
    def scaled(factor):
        return lambda x, t: factor * x

    prints = [fingerprint(f) for f in (lambda x, t: x, lambda x, t: 2 * x, scaled(1.0), scaled(2.0))]
    assert not any(p.known for p in prints) and len(set(map(str, prints))) == 4
    assert fingerprint(scaled(2.0)) == prints[3]


def test_a_function_over_a_network_is_known_by_the_weights_and_its_code():
    net, other = network(), network(1)

    def over(n):
        return lambda x, t: n(x)

    assert fingerprint(over(net)).known
    assert fingerprint(over(net)) == fingerprint(over(copy.deepcopy(net))) != fingerprint(over(other))
    assert fingerprint(over(net)) != fingerprint(lambda x, t: 2 * net(x))


def test_counters_and_memory_for_results_do_not_change_a_fingerprint():
    net, calls, memory, kept = network(), 0, torch.zeros(2, 3), {}

    def counted(x, t):
        nonlocal calls
        calls += 1
        kept[calls] = memory.copy_(net(x))
        return memory

    class Counting(Wrapped):
        calls = 0
        last = None

        def output(self, x, t):
            self.calls, self.last = self.calls + 1, self.inner.output(x, t)
            return self.last

    for ode in (ProbabilityFlowODE(counted, iia.EDM()), Counting(ProbabilityFlowODE(Deep(net), iia.EDM()))):
        before = ode.fingerprint()
        ode.output(torch.ones(2, 3), 1.0)
        assert str(ode.fingerprint()) == str(before) and before.known


def test_an_unknown_model_says_so_in_the_record_and_warns_of_nothing(recwarn):
    ode = ProbabilityFlowODE(lambda x, t: 0.5 * x, iia.EDM())
    fit = iia.preset("iia-ddim").fit(ode, 10 * torch.randn(16, 3), GRID)
    assert fit.record.origin.fingerprint.startswith("unknown")
    iia.sample(ProbabilityFlowODE(lambda x, t: 0.4 * x, iia.EDM()), 10 * normal(2, 3), solver=fit)
    iia.sample(ProbabilityFlowODE(Deep(network()), iia.EDM()), 10 * normal(2, 3), solver=fit)
    assert not recwarn.list


def test_a_tag_names_a_model_in_the_file_of_a_fit(tmp_path):
    def tagged(tag):
        return ProbabilityFlowODE(lambda x, t: 0.5 * x, iia.EDM(), tag=tag)

    fit = iia.preset("iia-ddim").fit(tagged("v1"), 10 * torch.randn(16, 3), GRID)
    found = iia.load(fit.save(tmp_path / "fit.safetensors"))
    assert found.record.origin.fingerprint == "tag-v1" == cached(Wrapped(tagged("v1"))).fingerprint()
    iia.sample(tagged("v1"), 10 * normal(2, 3), solver=found)
    with pytest.warns(FingerprintWarning, match="tag-v1"):
        iia.sample(tagged("v2"), 10 * normal(2, 3), solver=found)
    assert "tag" not in tagged("v1").settings  # another model has another name
    with pytest.raises(InputError, match="my-model-v2"):
        tagged(3)


# ---- changed outputs -------------------------------------------------------------------------------------------------


def test_an_ode_that_changes_the_output_has_a_fingerprint_of_its_own():
    class Scaled(Wrapped):
        def __init__(self, inner, factor):
            super().__init__(inner)
            self.factor = factor

        def output(self, x, t):
            return self.factor * self.inner.output(x, t)

    class Louder(ProbabilityFlowODE):
        def output(self, x, t):
            return 2 * super().output(x, t)

    plain = ProbabilityFlowODE(Deep(network()), iia.EDM())
    odes = [plain, Louder(plain.model, iia.EDM())]
    odes += [Scaled(plain, f) for f in (2.0, 3.0, nn.Parameter(torch.ones(3)), nn.Parameter(torch.zeros(3)))]
    assert len({str(ode.fingerprint()) for ode in odes}) == len(odes)
    for ode in odes:
        assert Wrapped(cached(ode)).fingerprint() == ode.fingerprint() == ode.subset(slice(0, 1), 2).fingerprint()
    half = Scaled(ProbabilityFlowODE(Deep(network().bfloat16()), iia.EDM()), 2.0)
    assert half.fingerprint() == odes[2].fingerprint()


def test_arguments_of_a_partial_are_part_of_the_model() -> None:
    net = torch.nn.Linear(3, 3)

    def labelled(x: torch.Tensor, t: torch.Tensor, label: object) -> torch.Tensor:
        return net(x)

    prints = [
        iia.ProbabilityFlowODE(functools.partial(labelled, label=label), iia.EDM()).fingerprint()
        for label in (3, 5, torch.tensor(3), torch.tensor(5))
    ]
    assert all(a != b for i, a in enumerate(prints) for b in prints[:i])


# ---- numbers that are configuration, and numbers that change in use ---------------------------------------------------


class Guided:
    """A model in plain Python with an interval of guidance, a count of calls and a log."""

    def __init__(self, net, low, high):
        self.net, self.low, self.options, self.calls, self.log = net, low, {"high": [high]}, 0, [0, []]

    def __call__(self, x, t):
        self.calls += 1
        self.log[0] += 1
        self._note(t)
        return self.net(x)

    def _note(self, t):
        self.log[1].append(float(t[0]))
        self.last = float(t[0])

    def widen(self, low):  # never called by an evaluation: `low` is configuration
        self.low = low


def test_whole_numbers_of_closures_and_wrappers_are_part_of_the_model():
    net = network()

    def between(low, high, names=("a",)):
        interval = [low, {"high": high, "names": names}]
        return lambda x, t: net(x) * ((t > interval[0]) & (t < interval[1]["high"]))[:, None]

    class Interval(Wrapped):
        def __init__(self, inner, low, high):
            super().__init__(inner)
            self.low, self.rest = low, (high, "cfg")

        def output(self, x, t):
            return self.inner.output(x, t) if self.low < t < self.rest[0] else x

    def closed(low):
        class Closed(Wrapped):
            def output(self, x, t):
                return self.inner.output(x, t) if low < t else x

        return Closed(ProbabilityFlowODE(Deep(net), iia.EDM()))

    plain = ProbabilityFlowODE(Deep(net), iia.EDM())
    families = (
        [fingerprint(between(*own)) for own in ((1, 5), (1, 6), (2, 5), (1, 5, ("b",)))],
        [fingerprint(Guided(net, *own)) for own in ((1, 5), (1, 6), (2, 5))],
        [Interval(plain, *own).fingerprint() for own in ((1, 5), (1, 6), (2, 5))],
        [closed(low).fingerprint() for low in (1, 2)],
    )
    for found in families:
        assert len(set(map(str, found))) == len(found)
    assert fingerprint(between(1, 5)) == families[0][0] and fingerprint(Guided(net, 1, 5)) == families[1][0]


def test_an_evaluation_never_changes_a_fingerprint():
    net, counts, total, seen = network(), {"calls": 0}, 0, [0.0]

    def counting(x, t):
        nonlocal total
        total += 1
        counts["calls"] += 1
        seen.append(float(t[0]))
        return net(x)

    class Rotary(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()
            self.register_buffer("table", torch.ones(1), persistent=False)
            self.register_buffer("shift", torch.ones(3), persistent=False)

        def forward(self, x, t):
            self.table = torch.ones(len(x))
            return self.net(x) + self.shift

    rotary, guided = Rotary(), Guided(net, 1, 5)
    for model in (counting, guided, rotary):
        ode = ProbabilityFlowODE(model, iia.EDM())
        before = str(ode.fingerprint())
        ode.output(torch.ones(2, 3), 1.0)
        assert str(ode.fingerprint()) == before
    before = fingerprint(rotary)
    rotary.shift += 1  # a buffer that the model only reads is part of the model
    assert fingerprint(rotary) != before
    before = fingerprint(guided)
    guided.widen(3)
    assert fingerprint(guided) != before


def test_tied_weights_equal_their_untied_twins():
    tied = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    tied[2].weight = tied[0].weight
    untied = copy.deepcopy(tied)
    untied[2].weight = nn.Parameter(untied[0].weight.detach().clone())
    assert fingerprint_of_module(tied) == fingerprint_of_module(untied)
    with torch.no_grad():
        untied[2].weight += 1
    assert fingerprint_of_module(tied) != fingerprint_of_module(untied)


def test_a_loaded_fit_samples_inside_transforms_of_torch_func(tmp_path):
    model = Deep(network()).double()
    ode = ProbabilityFlowODE(model, iia.EDM())
    path = iia.preset("iia-ddim").fit(ode, 10 * torch.randn(16, 3, dtype=torch.float64), GRID).save(tmp_path / "f")
    fit, x = iia.load(path), normal(2, 3).double()
    fresh = ProbabilityFlowODE(copy.deepcopy(model), iia.EDM())  # with no fingerprint yet
    found = torch.func.jacrev(lambda z: iia.sample(fresh, z, solver=fit))(x)
    assert found.shape == (2, 3, 2, 3) and found.isfinite().all()
    late = ProbabilityFlowODE(copy.deepcopy(model), iia.EDM())
    assert torch.func.vmap(lambda z: iia.sample(late, z[None], solver=fit)[0])(x).shape == x.shape
