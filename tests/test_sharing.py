"""Sharing fits: notes, model cards, guidance scales that a fit serves, and the hub, stubbed at the wire."""

import base64
import hashlib
import json
import re
import sys
import warnings
from dataclasses import replace

import pytest
import torch
from support import generator, normal

import iia_ode as iia
from iia_ode.errors import FileFormatError, InputError, MismatchError, MismatchWarning, MissingDependencyError
from iia_ode.ode.guidance import Scales
from iia_ode.sharing.hub import names_a_repo
from iia_ode.sharing.records import Served
from iia_ode.sharing.serving import range_of

STDS = torch.linspace(0.2, 1.0, 4)


class Guided(torch.nn.Module):
    """Data N(y, diag): the exact denoiser, with a condition y per sample."""

    def __init__(self):
        super().__init__()
        self.register_buffer("std", STDS.clone())

    def forward(self, x, t, y):
        return y + self.std**2 / (self.std**2 + t[:, None] ** 2) * (x - y)


def guided(scale=2.0, model=None, n=32):
    y = {"y": torch.randn(n, 4, generator=generator(5))}
    null = {"y": torch.zeros(1, 4)}
    model = model or Guided()
    return iia.ProbabilityFlowODE(model, iia.EDM(), "data", conditioning=y, unconditional=null, guidance_scale=scale)


def noise(n, seed=0):
    return 80 * torch.randn(n, 4, generator=generator(seed))


@pytest.fixture(scope="module")
def found():
    """A fit by the search."""
    return iia.fit(guided(), 4, x=noise(32), budget="closed-form")


@pytest.fixture(scope="module")
def fitted():
    """A fit by IIA on a given grid, without a guard."""
    ode = iia.ProbabilityFlowODE(Guided(), iia.EDM(), "data", conditioning={"y": torch.zeros(1, 4)})
    return iia.preset("iia-ddim").fit(ode, noise(16), iia.grids.karras(4))


# ---- notes -----------------------------------------------------------------------------------------------------------


def test_notes_travel_with_the_file(tmp_path, fitted):
    noted = fitted.note(model="owner/model", revision="fp16", prompts={"count": 64, "kind": "captions"}).note(by="me")
    again = iia.load(noted.save(tmp_path / "fit"))
    assert again.record.notes == {
        "model": "owner/model",
        "revision": "fp16",
        "prompts": {"count": 64, "kind": "captions"},
        "by": "me",
    }
    assert again.plan == fitted.plan and fitted.record.notes == {}
    assert again.note(by=None, revision="main").record.notes["revision"] == "main"
    assert "by" not in again.note(by=None).record.notes
    assert "model: owner/model\n" in str(again)
    with pytest.raises(InputError, match="a note must be"):
        fitted.note(x=torch.ones(2))
    with pytest.raises(InputError, match="a note must be"):
        fitted.note(x=float("nan"))


def test_a_fit_records_its_versions_and_hardware(tmp_path, fitted, found):
    for fit in (fitted, found):
        told = iia.load(fit.save(tmp_path / "fit")).record.surroundings
        assert told["torch"] == torch.__version__ and told["device"].startswith("cpu") and told["python"]


# ---- cards -----------------------------------------------------------------------------------------------------------


def test_a_card_tells_how_to_use_the_fit_and_how_it_compares(found):
    yaml = pytest.importorskip("yaml")
    card = found.note(model="owner/model", license="apache-2.0", prompts="64 captions").card("me/solver")
    _, head, body = card.split("---\n", 2)
    header = yaml.safe_load(head)
    assert header["license"] == "apache-2.0" and header["base_model"] == "owner/model"
    assert header["library_name"] == "iia_ode" and "diffusion" in header["tags"]
    assert 'fit = iia.load("me/solver")' in body and "iia.sample(ode, 80 * noise, solver=fit)" in body
    search, end = found.record.search, found.record.endpoint
    assert f"{end.fit:.3g}" in body and f"| {search.rival} (without a fit" in body and f"{end.base:.3g}" in body
    for word in ("4 evaluations", "prompts | 64 captions", torch.__version__, found.record.library, "@", "EDM", "[4]"):
        assert word in body
    assert found.record.origin.fingerprint in body


def test_every_table_of_a_card_has_rows_of_equal_width(found, fitted):
    for fit in (found, fitted.note(odd="a | b\nc")):
        lines = [re.sub(r"\\\|", "", line) for line in fit.card().splitlines()]
        for one, two in zip(lines, lines[1:], strict=False):
            if one.startswith("|") and two.startswith("|"):
                assert one.count("|") == two.count("|")


def test_a_card_of_a_fit_without_a_guard_claims_no_errors(fitted):
    card = fitted.card()
    assert "The errors were not measured." in card and "No license was noted" in card


def test_the_hubs_own_reader_takes_the_header_of_a_card(found):
    hub = pytest.importorskip("huggingface_hub")
    card = hub.ModelCard(found.note(license="mit", model="owner/model").card())
    assert (card.data.license, card.data.library_name, card.data.base_model) == ("mit", "iia_ode", "owner/model")


# ---- guidance scales -------------------------------------------------------------------------------------------------


def test_a_fit_serves_the_scales_that_were_measured_and_warns_outside_of_them_only(tmp_path, found):
    model = Guided()
    with pytest.warns(MismatchWarning, match="guidance_scale 2.0"):
        found.check(guided(3.0, model))
    served = found.serves(guided(1.0, model), noise(32, 1), [1.0, 3.0, 2.0])
    served = iia.load(served.save(tmp_path / "fit"))
    assert [s.scale for s in served.record.served] == [1.0, 2.0, 3.0]
    assert served.record.origin.serves == (1.0, 3.0)
    for scale in (1.0, 1.5, 2.0, 3.0, torch.tensor([1.0, 2.5])):
        served.check(guided(scale, model, n=2))
    with pytest.warns(MismatchWarning, match=r"2.0 \(measured from 1 to 3\), and this ODE has 3.5"):
        served.check(guided(3.5, model))
    with pytest.warns(MismatchWarning, match="measured from 1 to 3"):
        served.check(guided(torch.tensor([1.0, 4.0]), model, n=2))
    with pytest.warns(MismatchWarning, match="measured from 1 to 3"):
        served.check(guided(lambda t: 5.0 if t < 1 else 1.0, model))
    served.check(guided(lambda t: 3.0 if t < 1 else 1.0, model))
    assert "The fit serves guidance scales from 1 to 3" in served.card() and "serves 1 to 3" in str(served)


def test_a_fit_may_measure_its_range_of_scales_at_once():
    budget = iia.Budget(teacher_steps=12, trials=2)
    fit = iia.fit(guided(), 2, x=noise(32), budget=budget, scales=[2.0, 1.0])
    assert [s.scale for s in fit.record.served] == [1.0, 2.0]
    with pytest.raises(InputError, match="a guidance scale must be"):
        iia.fit(guided(), 2, x=noise(32), budget=budget, scales=["strong"])


def test_the_errors_at_a_scale_are_those_of_runs_at_that_scale(found):
    ode, x = guided(n=16), noise(16, 2)
    entry = found.serves(ode, x, [2.5]).record.served[0]
    teacher = iia.Teacher.solve(guided(2.5, n=16), x, 80.0, 0.0)
    final = found.plan.run(guided(2.5, n=16), x)
    assert entry.error == pytest.approx(float((final - teacher.final).square().mean().sqrt()), rel=1e-4)
    assert entry.rival in ("dpmpp_2m", "ipndm3", "heun") and entry.rival_error > 0


@pytest.mark.parametrize(
    ("good", "expected"),
    [
        ({1.0: True, 3.0: True}, (1.0, 3.0)),
        ({1.0: False, 3.0: True}, (2.0, 3.0)),
        ({0.5: True, 1.0: False, 3.0: True, 5.0: False, 7.0: True}, (2.0, 3.0)),
        ({}, (2.0, 2.0)),
    ],
)
def test_the_range_ends_before_a_scale_at_which_another_solver_is_better(good, expected):
    served = [Served(scale, 1.0, "heun", 2.0 if fine else 0.5) for scale, fine in sorted(good.items())]
    assert range_of(served, 2.0) == expected


def test_scales_that_cannot_be_measured_are_named(found):
    with pytest.raises(InputError, match="scales must be numbers"):
        found.serves(guided(n=8), noise(8), 2.0)
    with pytest.raises(InputError, match="a guidance scale must be"):
        found.serves(guided(n=8), noise(8), ["a"])
    record = found.record
    timed = replace(record, origin=replace(record.origin, guidance_scale=Scales("per time", (1.0, 2.0))))
    with pytest.raises(InputError, match="function of the time"):
        replace(found, record=timed).serves(guided(n=8), noise(8), [1.0])
    plain = iia.ProbabilityFlowODE(Guided(), iia.EDM(), "data", conditioning={"y": torch.zeros(1, 4)})
    with pytest.raises(InputError, match="guidance needs"):
        found.serves(plain, noise(8), [1.0, 2.0])
    with pytest.raises(MismatchError):
        other = iia.ProbabilityFlowODE(
            Guided(), iia.EDM(), "data", conditioning={"y": torch.zeros(1, 1)}, unconditional={"y": torch.zeros(1, 1)}
        )
        found.serves(other, noise(8), [1.0])


# ---- folders and the hub ---------------------------------------------------------------------------------------------


def test_a_folder_with_a_solver_loads_as_its_solver(tmp_path, fitted):
    fitted.save(tmp_path / "solver.safetensors")
    fitted.note(nfe=8).save(tmp_path / "eight.safetensors")
    assert iia.load(tmp_path).plan == fitted.plan
    assert iia.load(str(tmp_path), file="eight.safetensors").record.notes == {"nfe": 8}
    with pytest.raises(InputError, match="revision is for a repository"):
        iia.load(tmp_path, revision="main")
    (tmp_path / "solver.safetensors").unlink()
    with pytest.raises(FileFormatError, match=r"without a file 'solver.safetensors': take file='eight.safetensors'"):
        iia.load(tmp_path)


def test_a_local_path_is_never_looked_up_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    for path in ("folder/fit", "folder/fit.safetensors", "other/fit.safetensors", "fit", "a/b/c", "/tmp/x", "./x"):
        assert not names_a_repo(path)
        with pytest.raises(FileFormatError, match="no file"):
            iia.load(path)
    assert names_a_repo("owner/name") and names_a_repo("org-1/stable-diffusion_2.1")


def test_the_hub_without_its_client_is_an_error_with_advice(monkeypatch, fitted):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingDependencyError, match=r"no local file 'owner/name'.*pip install 'iia-ode\[hub\]'"):
        iia.load("owner/name")
    with pytest.raises(MissingDependencyError, match=r"pip install 'iia-ode\[hub\]'"):
        fitted.push_to_hub("owner/name")
    with pytest.raises(InputError, match="such as 'owner/name'"):
        fitted.push_to_hub("name")


class Hub:
    """The hub's side of the wire, for one repository."""

    def __init__(self):
        self.files: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.created: list[dict] = []

    def __call__(self, request):
        from httpx2 import Response
        from huggingface_hub import constants

        path, commit = request.url.path, "0" * 40
        self.asked.append(f"{request.method} {path}")
        if path == "/api/repos/create":
            self.created.append(json.loads(request.content))
            return Response(200, json={"url": f"{constants.ENDPOINT}/owner/name", "id": "1", "name": "owner/name"})
        if path == "/api/validate-yaml":
            return Response(200, json={"errors": [], "warnings": []})
        if "/preupload/" in path:
            names = [file["path"] for file in json.loads(request.content)["files"]]
            modes = [{"path": n, "uploadMode": "regular", "shouldIgnore": False, "oid": None} for n in names]
            return Response(200, json={"files": modes})
        if "/commit/" in path:
            for line in map(json.loads, request.content.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return Response(200, json={"commitUrl": f"{constants.ENDPOINT}/owner/name/commit/0", "commitOid": commit})
        if found := re.fullmatch(r"/owner/name/resolve/(main|v1)/(.+)", path):
            if found[2] not in self.files:
                return Response(404, headers={"X-Error-Code": "EntryNotFound"})
            data = self.files[found[2]]
            headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": commit}
            return Response(200, headers=headers, content=data)
        if path.startswith("/owner/name/resolve/"):
            return Response(404, headers={"X-Error-Code": "RevisionNotFound"})
        return Response(404, headers={"X-Error-Code": "RepoNotFound"})


@pytest.fixture
def wire(monkeypatch, tmp_path):
    """The hub's client over a stub of the wire."""
    hub, httpx = pytest.importorskip("huggingface_hub"), pytest.importorskip("httpx2")
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    server, factory = Hub(), _http._GLOBAL_CLIENT_FACTORY
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    hub.set_client_factory(lambda: httpx.Client(transport=httpx.MockTransport(server), follow_redirects=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the client about itself
        yield server
    hub.set_client_factory(factory)


def test_a_fit_comes_back_from_the_hub_with_its_card_beside_it(wire, found, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    noted = found.note(model="owner/model")
    address = noted.push_to_hub("owner/name", token="hf_x", private=True)
    assert address.endswith("/owner/name/commit/0") and "private" in json.dumps(wire.created[0])
    assert wire.files["README.md"].decode() == noted.card("owner/name")
    again = iia.load("owner/name", revision="v1")
    assert again.plan == found.plan and again.record == noted.record
    x = normal(3, 4).float() * 80
    assert torch.equal(iia.sample(guided(n=3), x, solver=again), iia.sample(guided(n=3), x, solver=found))
    noted.note(nfe=8).push_to_hub("owner/name", file="eight.safetensors", card=False, token="hf_x")
    assert iia.load("owner/name", file="eight.safetensors").record.notes["nfe"] == 8
    assert set(wire.files) == {"README.md", "solver.safetensors", "eight.safetensors"}


@pytest.mark.parametrize(
    ("repo", "options", "word"),
    [
        ("owner/other", {}, "'owner/other'"),
        ("owner/name", {"revision": "v9"}, "at revision 'v9'"),
        ("owner/name", {"file": "no.safetensors"}, r"'no\.safetensors' of 'owner/name'"),
    ],
)
def test_a_repository_revision_or_file_that_does_not_exist_is_named(wire, found, repo, options, word):
    found.push_to_hub("owner/name", token="hf_x")
    with pytest.raises(FileFormatError, match=f"the hub did not give .*{word}"):
        iia.load(repo, **options)
