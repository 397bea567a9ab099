"""The service answers as the model does, whoever asks and how many; or it says what is wrong."""

import asyncio
import base64
import hashlib
import json
import re
import shutil
import sys
import threading

import hypothesis
import numpy as np
import pytest
from scipy import stats
from starlette.testclient import TestClient
from tensorflow_probability import distributions as tfd

from benchmarks import load
from mdn.cli.main import main
from mdn.errors import RunError
from mdn.export.distribution import export_distribution
from mdn.serving.app import make_app
from mdn.serving.batching import Batcher
from mdn.serving.calls import Call, RequestError, Signature, Spec
from mdn.serving.codec import decode, encode
from mdn.serving.limits import Limits
from mdn.serving.model import ServedModel, find_saved_model
from mdn.serving.server import bind, check_name

# On one worker, which makes the fixtures once.
pytestmark = pytest.mark.xdist_group("serving")

PREDICT = "/v1/models/mdn:predict"
SPACE, KIND = [50.0, 120.5, None], ["flat", "house", "tent"]
X = [[0.5, -1.0], [0.0, 2.0]]
LIMITS = Limits(max_bytes=40_000, max_rows=200, max_samples=500, max_values=20_000)


@pytest.fixture(scope="module")
def one(exports, served):
    with TestClient(make_app(served["one"], "mdn", LIMITS)) as client:
        yield exports["one"][0], client


@pytest.fixture(scope="module")
def three(exports, served):
    with TestClient(make_app(served["three"], "mdn", LIMITS)) as client:
        yield exports["three"][0], client


def ask(client, signature=None, status=200, **body):
    if signature is not None:
        body["signature_name"] = signature
    answer = client.post(PREDICT, json=body)
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    return answer.json()


def close(found, expected, **tolerance):
    np.testing.assert_allclose(
        np.array(found, float), expected, **{"rtol": 1e-5, "atol": 1e-5} | tolerance
    )


# ---------------------------------------------------------------------- answers


def test_rows_and_columns_have_the_models_answers(one):
    model, client = one
    x = {"floor space": np.array(SPACE[:2]), "kind": np.array(KIND[:2], object)}
    density = model.predict_distribution(x)
    columns = {"floor_space": SPACE[:2], "kind": KIND[:2]}
    outputs = ask(client, inputs=columns)["outputs"]
    for name, value in {"mean": density.mean(), **density.mixture_parameters()._asdict()}.items():
        close(outputs[name], value, rtol=1e-4)
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    predictions = ask(client, "serving_default", instances=rows)["predictions"]
    assert [row["loc"] for row in predictions] == outputs["loc"]
    # A single output comes without its name, as TensorFlow Serving has it.
    y = [[300.0], [None]]
    log_prob = ask(client, "log_prob", inputs={**columns, "y": y})["outputs"]
    close(log_prob, density.log_prob(np.array(y, np.float32)), rtol=1e-4)
    rows = [{**row, "y": value} for row, value in zip(rows, y, strict=True)]
    close(ask(client, "log_prob", instances=rows)["predictions"], log_prob)


def test_the_other_signatures(three):
    model, client = three
    density = model.predict_distribution(np.array(X))
    p = [0.0, 0.1, 0.9]
    quantile = ask(client, "quantile", inputs={"x": X, "p": p})["outputs"]
    assert quantile[0] == [[None] * 3] * 2  # minus infinity, which JSON has not
    close(quantile[1:], density.quantile(np.array(p[1:], np.float32)), rtol=1e-4)
    interval = ask(client, "interval", inputs={"x": X, "level": 0.8})["outputs"]
    close(interval["lower"], quantile[1], rtol=1e-4)
    draw = {"x": X, "n": 7, "seed": [1, 2]}
    sample = ask(client, "sample", inputs=draw)["outputs"]
    assert np.shape(sample) == (7, 2, 3)
    assert ask(client, "sample", inputs=draw)["outputs"] == sample
    assert ask(client, "sample", inputs={**draw, "seed": [1, 3]})["outputs"] != sample
    given = ask(client, "condition", instances=[{"x": X[0], "y": [None, 1.5, None]}])
    expected = model.predict_distribution(np.array(X[:1])).condition({1: 1.5})
    (given,) = given["predictions"]
    assert given["mean"][1] == 1.5
    close(given["mean"][::2], expected.mean()[0], rtol=1e-4)
    # The only input needs no name.
    assert ask(client, instances=X) == ask(client, instances=[{"x": x} for x in X])
    assert ask(client, inputs=X) == ask(client, "serving_matrix", inputs={"x": X})


def test_distribution_without_features(tmp_path):
    path = export_distribution(tfd.Gamma(2.0, 1.0), tmp_path / "sm")
    with TestClient(make_app(ServedModel(path), "mdn")) as client:
        assert ask(client, inputs={})["outputs"]["mean"] == 2.0
        density = ask(client, "log_prob", inputs={"y": [0.5, 1.5]})["outputs"]
        close(density, stats.gamma(2.0).logpdf([0.5, 1.5]))
        answer = ask(client, None, 400, instances=[{}])
        assert "takes nothing once for all rows" in answer["error"]


def test_missing_values_are_null_both_ways(one, three):
    (found,) = ask(three[1], "mean_stddev", instances=[[0.5, None]])["predictions"]
    assert found == {"mean": [None] * 3, "stddev": [None] * 3}  # no train row lacked it
    client = one[1]
    row = {"floor_space": None, "kind": "flat"}
    (found,) = ask(client, "mean_stddev", instances=[row])["predictions"]
    assert found == {"mean": [None], "stddev": [None]}
    kinds = [None, "", "never seen", {"b64": base64.b64encode(b"tent").decode()}]
    found = ask(client, inputs={"floor_space": [50.0] * 4, "kind": kinds})["outputs"]["mean"]
    assert found == [found[0]] * 4  # the slot of unknown ones


def test_status_metadata_and_versions(one):
    _, client = one
    status = client.get("/v1/models/mdn").json()["model_version_status"]
    assert status == [
        {"version": "1", "state": "AVAILABLE", "status": {"error_code": "OK", "error_message": ""}}
    ]
    metadata = client.get("/v1/models/mdn/metadata").json()
    assert metadata["model_spec"] == {"name": "mdn", "signature_name": "", "version": "1"}
    inputs = metadata["metadata"]["signature_def"]["signature_def"]["log_prob"]["inputs"]
    assert inputs["kind"]["dtype"] == "DT_STRING"
    assert inputs["kind"]["tensor_shape"] == {
        "dim": [{"size": "-1", "name": ""}],
        "unknown_rank": False,
    }
    for path in ("/v1/models/mdn", "/v1/models/mdn/metadata"):
        versioned = path.replace("mdn", "mdn/versions/1", 1)
        assert client.get(versioned).json() == client.get(path).json()
    row = {"floor_space": 1.0, "kind": "flat"}
    body = {"instances": [row]}
    assert client.post("/v1/models/mdn/versions/1:predict", json=body).json() == ask(
        client, **body
    )
    assert client.get("/healthz").json() == {"status": "ok"}


@pytest.mark.parametrize(
    ("method", "path", "status", "message"),
    [
        ("GET", "/v1/models/other", 404, "the model is at /v1/models/mdn"),
        ("POST", "/v1/models/mdn/versions/2:predict", 404, "the model is at"),
        ("POST", "/v1/models/mdn:classify", 404, "the model is at"),
        ("GET", "/../../etc/passwd", 404, "the model is at"),
        ("GET", PREDICT, 405, "use POST"),
        ("DELETE", "/v1/models/mdn", 405, "use GET, HEAD"),
    ],
)
def test_paths_and_methods(method, path, status, message, one):
    answer = one[1].request(method, path)
    assert answer.status_code == status
    assert message in answer.json()["error"]


def test_metrics_count_requests_and_batches(three):
    _, client = three

    def count():
        text = client.get("/metrics").text
        found = re.search(r'mdn_requests_total\{endpoint="predict",status="200"\} (\S+)', text)
        rows = re.search(r"mdn_batch_rows_sum (\S+)", text)
        return float(found[1]) if found else 0.0, float(rows[1])

    before = count()
    ask(client, instances=X)
    after = count()
    assert (after[0] - before[0], after[1] - before[1]) == (1.0, 2.0)


# ---------------------------------------------------------------------- mistakes

ROW = {"floor_space": 1.0, "kind": "flat"}
NAN = '{"instances": [{"floor_space": %s, "kind": "flat"}]}'


def text(**body):
    return json.dumps(body)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("", "the body is no JSON"),
        ("{", "the body is no JSON"),
        (b"\xff\xfe{}", "the body is no JSON"),
        ("[" * 20_000, "the body is no JSON"),
        (NAN % "NaN", "the body is no JSON"),
        (NAN % "-Infinity", "the body is no JSON"),
        (NAN % "1e400", ""),
        (NAN % "1e39", "floor_space of row 0 is 1e+39: float32 cannot hold it"),
        (NAN % ("9" * 400), ""),
        (NAN % '"big"', 'floor_space of row 0 is the string "big": it must be a number, or null'),
        (NAN % "true", "floor_space of row 0 is true: it must be a number"),
        (NAN % "[1]", "floor_space of row 0 is a list: it must be a number"),
        ("[]", "the body is a list: it must be an object"),
        ("{}", 'give either "instances", rows, or "inputs", columns'),
        (text(instances=[ROW], inputs={}), "give either"),
        (text(instances=[ROW], signature="params"), 'unknown key "signature": the keys are'),
        (text(instances=[ROW], signature_name="nope"), 'no signature "nope": choose one of'),
        (text(instances=[ROW], signature_name=None), "signature_name is null: choose"),
        (text(instances=[ROW], signature_name=["params"]), "signature_name is a list: choose"),
        (f'{{"signature_name": {"[" * 300}{"]" * 300}}}', "signature_name is a list: choose"),
        (text(instances=ROW), '"instances" is an object: it must be a list of rows'),
        (text(instances=[]), "floor_space has no rows: give at least one"),
        (text(instances=[ROW, 3]), "row 1 is the number 3: it must be an object with"),
        (text(instances=[{"kind": "flat"}]), "row 0 lacks floor_space: serving_default takes"),
        (text(instances=[{**ROW, "sise": 1}]), 'row 0 has "sise": serving_default takes'),
        (text(instances=[{**ROW, "floor space": 1}]), 'row 0 has "floor space"'),
        (text(instances=[{**ROW, "kind": 3}]), "kind of row 0 is the number 3: it must be"),
        (text(instances=[{**ROW, "kind": {"b64": "?"}}]), "kind of row 0 is no base64"),
        (NAN.replace("flat", "\\ud800") % 1, ""),
        (text(inputs={"floor_space": [1.0]}), '"inputs" lacks kind'),
        (text(inputs={"floor_space": [1, 2], "kind": ["a"]}), "of rows: floor_space 2, kind 1"),
        (text(inputs={"floor_space": 1.0, "kind": "a"}), "floor_space is the number 1.0"),
        (text(signature_name="log_prob", instances=[{**ROW, "y": [1, 2]}]), "y of row 0 has 2"),
        (text(inputs=[1.0]), '"inputs" is a list: it must be an object'),
        (text(instances=[ROW] * 201), "201 rows: give at most 200 at once"),
        (text(inputs={"floor_space": [1] * 201, "kind": [""] * 201}), "201 rows"),
        (text(signature_name="sample", instances=[ROW]), "takes n, seed once for all rows"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_mistakes_are_answered_with_their_reason(body, message, one):
    answer = one[1].post(PREDICT, content=body)
    assert answer.status_code == 400
    (reason,) = answer.json().values()
    assert message in reason
    assert "\n" not in reason
    assert "Traceback" not in reason
    ask(one[1], instances=[ROW])  # and the service goes on


@pytest.mark.parametrize(
    ("signature", "inputs", "message"),
    [
        ("sample", {"n": 501}, "n is 501: give 1 to 500"),
        ("sample", {"n": 2**31}, "n is 2147483648: int32 cannot hold it"),
        ("sample", {"n": 0}, "n is 0: give 1 to 500"),
        ("sample", {"n": -1}, "n is -1: give 1 to 500"),
        ("sample", {"n": 1.5}, "n is the number 1.5: it must be a whole number"),
        ("sample", {"n": None}, "n is null: it must be a whole number"),
        ("sample", {"n": [3]}, "n is a list: it must be a whole number"),
        ("sample", {"seed": [1]}, "seed has 1 entries: give 2"),
        ("sample", {"seed": [1, 2**31]}, "seed, entry 1 is 2147483648"),
        ("sample", {"x": X * 20, "n": 500}, "would have 60000 numbers: ask for at most 20000"),
        ("quantile", {"p": [1.5]}, "p has 1.5: probabilities are from 0 to 1"),
        ("quantile", {"p": [None]}, "p has null: probabilities are from 0 to 1"),
        ("quantile", {"p": []}, "p has no entries: give at least one"),
        ("quantile", {"p": 0.5}, "p is the number 0.5: it must be a list"),
        ("quantile", {"p": [0.5] * 9000}, "the answer would have 54000 numbers"),
        ("interval", {"level": 1.0}, "level is 1: it must be between 0 and 1"),
        ("interval", {"level": None}, "level is null: it must be between 0 and 1"),
        ("condition", {"y": [[1.0, 2.0], [1.0, 2.0]]}, "y of row 0 has 2 entries: give 3"),
        ("condition", {"y": [[1.0, 2.0, None]]}, "different numbers of rows: x 2, y 1"),
        ("log_prob", {"x": [[1.0, "a"]]}, 'x of row 0, entry 1 is the string "a"'),
        ("log_prob", {"x": [[1.0, 2.0], [1.0]]}, "x of row 1 has 1 entries: give 2"),
    ],
    ids=str,
)  # fmt: skip
def test_mistakes_in_the_inputs_of_a_signature(signature, inputs, message, three):
    others = {
        "sample": {"n": 1, "seed": [0, 0]},
        "quantile": {"p": [0.5]},
        "interval": {"level": 0.5},
    }.get(signature, {"y": [[0.0] * 3] * 2})
    answer = ask(three[1], signature, 400, inputs={"x": X, **others, **inputs})
    assert message in answer["error"]


def test_sequences_have_one_number_of_steps_and_their_answers_count_them():
    inputs = {"x": Spec("float32", (None, None, 2)), "y": Spec("float32", (None, None, 1))}
    signature = Signature("log_prob", inputs, {"log_prob": Spec("float32", (None, None))})

    def found(steps, known, limits=LIMITS):
        given = {"x": [[[1, None]] * steps] * 3, "y": [[[1]] * known] * 3}
        body = text(signature_name="log_prob", inputs=given)
        return decode(body.encode(), {"log_prob": signature}, limits)

    assert found(5, 5).values == 15
    with pytest.raises(RequestError, match="different numbers of steps: x 5, y 4"):
        found(5, 4)
    with pytest.raises(RequestError, match="would have 15 numbers: ask for at most 14"):
        found(5, 5, Limits(max_values=14))


def test_draws_and_quantiles_are_counted_for_each_component(served):
    signatures = served["one"].signatures
    features = {"floor_space": [50.0, 80.0], "kind": ["flat", "house"]}

    def found(signature, limit, **shared):
        body = text(signature_name=signature, inputs={**features, **shared})
        return decode(body.encode(), signatures, Limits(max_terms=limit))

    for signature, shared in (
        ("quantile", {"p": [0.1, 0.5, 0.9]}),
        ("sample", {"n": 3, "seed": [0, 1]}),
    ):
        assert found(signature, 12, **shared).terms == 3 * 2 * 2  # of two rows and two components
        with pytest.raises(RequestError, match=r"6 numbers, each from 2 components.* at most 5"):
            found(signature, 11, **shared)
    assert found("mean_stddev", 1).terms == 0


def test_flipped_bits_of_a_request_are_answered(three):
    rng = np.random.default_rng(0)
    whole = text(signature_name="condition", instances=[{"x": X[0], "y": [None, 1.5, None]}])
    statuses = set()
    for _ in range(150):
        body = bytearray(whole.encode())
        body[rng.integers(len(body))] ^= 1 << rng.integers(8)
        answer = three[1].post(PREDICT, content=bytes(body))
        statuses.add(answer.status_code)
        assert "\n" not in answer.json().get("error", "")
    assert statuses == {200, 400}


def test_large_body_is_413_however_it_is_sent(one):
    _, client = one
    body = text(instances=[ROW] * 2000)
    assert len(body) > LIMITS.max_bytes
    for content in (body, (body[i : i + 999].encode() for i in range(0, len(body), 999))):
        answer = client.post(PREDICT, content=content)
        assert answer.status_code == 413
        assert answer.json() == {"error": "the body has more than 40000 bytes: ask for fewer rows"}


def test_failure_inside_has_no_trace_in_the_answer(served, monkeypatch):
    def fail(calls):
        raise AssertionError("a secret path")

    monkeypatch.setattr(served["three"], "answer", fail)
    app = make_app(served["three"], "mdn")
    with TestClient(app, raise_server_exceptions=False) as client:
        answer = client.post(PREDICT, json={"instances": X})
        assert answer.status_code == 500
        assert answer.json() == {"error": "the service failed at this request: its log says how"}
        assert client.get("/healthz").status_code == 200


# ---------------------------------------------------------------------- batches

DOUBLE = Signature("double", {"x": Spec("float32", (None,))}, {"y": Spec("float32", (None,))})
DRAW = Signature("draw", {**DOUBLE.inputs, "seed": Spec("int32", (2,))}, DOUBLE.outputs)
GATE_LIMITS = Limits(max_rows=4, max_waiting=6)


def call(*values, signature=DOUBLE, **shared):
    return Call(signature, {"x": np.array(values, np.float32)}, shared)


class Gate:
    """A model that doubles numbers, refuses negative ones, and waits until it is opened."""

    def __init__(self):
        self.open = threading.Event()
        self.batches = []

    def __call__(self, calls):
        assert self.open.wait(10)
        self.batches.append([c.rows["x"].tolist() for c in calls])
        if any((c.rows["x"] < 0).any() for c in calls):
            raise RequestError("negative")
        return [{"y": 2 * c.rows["x"]} for c in calls]


def run(calls):
    """Return the outcome of calls that come at once, and the batches."""

    async def main():
        gate = Gate()
        batcher = Batcher(gate, GATE_LIMITS)
        tasks = [asyncio.create_task(batcher(c)) for c in calls]
        await asyncio.sleep(0.05)
        gate.open.set()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        batcher.close()
        return outcomes, gate.batches

    return asyncio.run(main())


def test_what_waits_is_one_batch_up_to_its_limit_and_each_has_its_own():
    outcomes, batches = run([call(1), call(2, 3), call(4), call(5, 6)])
    assert batches == [[[1.0], [2.0, 3.0], [4.0]], [[5.0, 6.0]]]
    assert [o["y"].tolist() for o in outcomes] == [[2.0], [4.0, 6.0], [8.0], [10.0, 12.0]]


def test_one_to_blame_does_not_spoil_the_others():
    outcomes, _ = run([call(1), call(2), call(-3), call(4)])
    assert isinstance(outcomes[2], RequestError)
    assert [o["y"].tolist() for i, o in enumerate(outcomes) if i != 2] == [[2.0], [4.0], [8.0]]


def test_draws_stand_alone_as_others_would_change_them():
    seed = np.zeros(2, np.int32)
    _, batches = run([call(i, signature=DRAW, seed=seed) for i in range(3)])
    assert batches == [[[0.0]], [[1.0]], [[2.0]]]


def test_full_queue_sends_back():
    outcomes, _ = run([call(i) for i in range(9)])
    refused = [o for o in outcomes if isinstance(o, RequestError)]
    assert {o.status for o in refused} == {503}
    assert len(refused) == 3


def test_batches_of_a_model_are_its_answers_one_by_one(served):
    """Also where the rows are on the second axis."""
    model = served["three"]
    for body in (
        {"signature_name": "quantile", "inputs": {"x": None, "p": [0.2, 0.5]}},
        {"signature_name": "serving_default", "inputs": {"x": None}},
    ):
        calls = []
        for x in (X, X[1:], [[3.0, 3.0]]):
            body["inputs"]["x"] = x
            calls.append(decode(text(**body).encode(), model.signatures, LIMITS))
        for one_call, outputs in zip(calls, model.answer(calls), strict=True):
            (alone,) = model.answer([one_call])
            assert outputs.keys() == alone.keys()
            for name, value in outputs.items():
                close(value, alone[name])
            json.loads(encode(one_call, outputs))


@pytest.mark.parametrize("case", ["one", "three"])
def test_warm_up_asks_every_signature(case, served, monkeypatch):
    model, asked = served[case], []
    answer = model.answer
    monkeypatch.setattr(model, "answer", lambda calls: asked.append((calls, answer(calls))))
    model.warm_up()
    assert [calls[0].signature.name for calls, _ in asked] == list(model.signatures)
    assert all(outputs[0] for _, outputs in asked)


# ---------------------------------------------------------------------- documents

SLOW = list(hypothesis.HealthCheck)


@pytest.mark.parametrize("case", ["one", "three"])
def test_no_request_that_the_document_allows_or_forbids_is_a_500(case, request):
    """And what it forbids is refused, with the status and in the form that it states."""
    # Here, as it takes seconds, and other workers do not need it.
    import schemathesis
    from schemathesis.specs.openapi.checks import positive_data_acceptance

    # Those that a document cannot meet: it cannot state that columns have equally many rows.
    unmet = [positive_data_acceptance]
    _, client = request.getfixturevalue(case)
    schema = schemathesis.openapi.from_asgi("/openapi.json", client.app)
    forbidden = schema[PREDICT]["POST"].as_strategy(
        generation_mode=schemathesis.GenerationMode.NEGATIVE
    )

    @hypothesis.given(case=schema.as_strategy() | forbidden)
    @hypothesis.settings(max_examples=60, deadline=None, suppress_health_check=SLOW)
    def check(case):
        case.call_and_validate(excluded_checks=unmet)

    check()


def test_document_states_the_inputs(one):
    document = one[1].get("/openapi.json").json()
    body = document["paths"][PREDICT]["post"]["requestBody"]["content"]["application/json"]
    rows = {form["title"]: form for form in body["schema"]["anyOf"]}["log_prob by row"]
    item = rows["properties"]["instances"]["items"]
    assert item["required"] == ["floor_space", "kind", "y"]
    assert item["properties"]["kind"] == {"type": ["string", "null"]}
    assert item["properties"]["floor_space"]["description"] == "column floor space"
    assert item["properties"]["floor_space"]["type"] == ["number", "null"]


def test_page_runs_its_own_code_alone(one):
    answer = one[1].get("/")
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy
    (script,) = re.findall(r"<script>(.*?)</script>", answer.text, flags=re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert not re.search(r"innerHTML|eval\(|https?://(?!www\.w3\.org/2000/svg)", answer.text)


# ---------------------------------------------------------------------- the command


def test_places_without_a_model_are_named(tmp_path):
    with pytest.raises(RunError, match="is no folder"):
        find_saved_model(tmp_path / "none")
    with pytest.raises(RunError, match="is neither a run nor a SavedModel"):
        find_saved_model(tmp_path)
    (tmp_path / ".hydra").mkdir()
    with pytest.raises(RunError, match="write it with mdn export"):
        find_saved_model(tmp_path)


def test_taken_port_wrong_host_and_wrong_name():
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        with pytest.raises(RunError, match="in use; give another --port"):
            bind("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(RunError, match="no address 'no host'"):
        bind("no host", 0)
    with pytest.raises(RunError, match=r"cannot listen on 192\.0\.2\.1"):
        bind("192.0.2.1", 0)
    for name in ("", "a/b", "..", "a b"):
        with pytest.raises(ValueError, match="use letters and digits"):
            check_name(name)


def test_missing_extra_is_one_line_with_the_remedy(exports, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "mdn.serving.server")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.setattr(sys, "argv", ["mdn", "serve", str(exports["one"][1])])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    _, err = capsys.readouterr()
    assert err == "error: mdn serve needs uvicorn: pip install 'mdn[serve]'\n"


def test_changed_export_is_refused(exports, tmp_path):
    path = shutil.copytree(exports["one"][1], tmp_path / "sm")
    description = json.loads((path / "mdn.json").read_text())
    description["features"][1]["shape"] = "?"
    (path / "mdn.json").write_text(json.dumps(description))
    with pytest.raises(RunError, match=r"mdn.json: features\.1\.shape is wrong"):
        ServedModel(path)


@pytest.mark.slow
def test_many_clients_have_their_own_answers_and_a_stop_loses_none(exports):
    """A process of its own, as a user starts it."""
    server = load.Server(str(exports["one"][1]))
    try:
        found = asyncio.run(load.load(server.port, clients=50, seconds=2.0))
        assert found.errors == []
        assert len(found.latencies) >= 100
        code, statuses = asyncio.run(load.drain(server, clients=20))
    finally:
        server.kill()
    assert len(statuses) >= 5  # were in flight
    assert set(statuses) == {200}
    assert code == 0
