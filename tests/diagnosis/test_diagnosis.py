import json
import math
import pickle
import sys
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from diagnostic_maps import make_diagnosis, make_saliency, random_saliency

from stepflow_tl.diagnosis import LAYER_METRICS, Diagnosis, diagnose
from stepflow_tl.diagnosis.layer_metrics import decay_slope
from stepflow_tl.diagnosis.shares import MapShares
from stepflow_tl.errors import GradientError, MissingExtraError, ResultFileError, TraceError


def test_a_diagnosis_holds_the_measures_of_the_map():
    saliency = random_saliency("QTTTTSS", 1, n_layers=8, head_gains=(1.0, 3.0), lengths=(3, 1, 2, 5, 1, 2, 1))
    diagnosis = diagnose(saliency, window=1, recent=2, pooling="causal_mean")
    rows = MapShares.of(saliency, "causal_mean", window=1, recent=2)
    for name, metric in LAYER_METRICS.items():
        torch.testing.assert_close(getattr(diagnosis, name), metric.values(rows))
        assert diagnosis.metrics[name] is getattr(diagnosis, name)
    slope = decay_slope(diagnosis.thinking_share, saliency.layers, 8)
    assert diagnosis.decay_slope == pytest.approx(float(slope))
    assert torch.equal(diagnosis.rows_without_mass, rows.rows_without_mass)
    assert diagnosis.reasons == {}
    assert (diagnosis.n_question, diagnosis.n_thinking, diagnosis.n_summary) == (1, 4, 2)


@pytest.mark.parametrize(
    ("segments", "metric", "reason"),
    [
        ("QTT", "thinking_share", "the trace has no summary step"),
        ("QTT", "final_block", "the trace has no summary step"),
        ("QTT", "decay_slope", "the trace has no summary step"),
        ("QTS", "lock_in", "needs 2 thinking steps, the trace has 1"),
        ("QSS", "thinking_share", "the trace has no thinking step"),
        ("TTS", "question_share", "the trace has no question step"),
        ("QTTS", "recency", "needs more than recent=2 thinking steps, the trace has 2"),
    ],
)
def test_what_does_not_apply_is_nan_and_the_reason_is_printed(segments, metric, reason):
    diagnosis = diagnose(random_saliency(segments, 0), recent=2)
    assert torch.as_tensor(getattr(diagnosis, metric)).isnan().all()
    assert diagnosis.reasons[metric] == reason
    footer = str(diagnosis).rsplit("---\n", 1)[1]
    assert any(metric in line and reason in line for line in footer.splitlines())


def test_every_nan_has_a_reason_and_every_reason_a_nan():
    for segments in ("T", "TT", "QT", "S", "QS", "QTS", "QTTS", "QTTTSS", "TTSS"):
        diagnosis = diagnose(random_saliency(segments, 3), recent=2)
        values = {name: getattr(diagnosis, name) for name in LAYER_METRICS}
        values["decay_slope"] = torch.tensor(diagnosis.decay_slope)
        assert {name for name, column in values.items() if column.isnan().any()} == set(diagnosis.reasons), (
            segments
        )


def test_a_layer_without_mass_is_named_and_counted():
    maps = torch.ones(4, 4, 4, dtype=torch.float64).tril()
    maps[2, 1:3] = 0
    diagnosis = diagnose(make_saliency("QTTS", maps))
    assert diagnosis.lock_in.isnan().tolist() == [False, False, True, False]
    assert diagnosis.reasons["lock_in"] == "no mass to take a share of in layers [2]"
    assert diagnosis.rows_without_mass.tolist() == [0, 0, 1, 0]
    assert "rows without mass, left out of the means: layer 2: 1" in str(diagnosis)


def test_a_trace_of_a_question_alone_is_refused():
    with pytest.raises(
        TraceError, match="1 question steps and no thinking or summary step: nothing to diagnose"
    ):
        diagnose(random_saliency("Q", 0))


def test_a_map_without_any_mass_is_refused():
    with pytest.raises(GradientError, match="zero everywhere: no share can be stated. Check the objective"):
        diagnose(make_saliency("QTTS", torch.zeros(2, 4, 4)))


@pytest.mark.parametrize("options", [{"window": -1}, {"recent": 0}])
def test_settings_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match="expected window >= 0 and recent >= 1"):
        diagnose(random_saliency("QTTS", 0), **options)


def test_bands_average_the_outer_quarters():
    diagnosis = make_diagnosis(
        {"lock_in": [1, 2, 3, 4, 5, 6, 7, 8], "self_share": [8, 7, 6, 5, 4, 3, 2, math.nan]}
    )
    assert diagnosis.band("shallow")["lock_in"] == 1.5
    assert diagnosis.band("deep")["lock_in"] == 7.5
    assert diagnosis.band("deep")["self_share"] == 2
    assert diagnosis.headline["lock_in shallow"] == 1.5 and diagnosis.headline["self_share deep"] == 2


def test_a_band_without_stored_layers_has_no_mean():
    diagnosis = make_diagnosis({"lock_in": [1, 2]}, layers=(3, 4), n_layers=8)
    assert math.isnan(diagnosis.band("shallow")["lock_in"])


def test_an_unknown_band_is_refused():
    diagnosis = make_diagnosis({"lock_in": [1, 2]})
    with pytest.raises(Exception, match="middle"):
        diagnosis.band("middle")


def test_the_table_has_a_row_a_layer_and_marks_the_bands():
    table = str(diagnose(random_saliency("QTTTS", 0, n_layers=8)))
    lines = table.splitlines()
    rows = [line.split() for line in lines if line.split() and line.split()[-1].replace(".", "").isdigit()]
    assert [row[0] for row in rows] == ["shallow", "shallow", "2", "3", "4", "5", "deep", "deep"]
    assert [len(row) for row in rows] == [12, 12, 11, 11, 11, 11, 12, 12]
    assert max(len(line) for line in lines) <= 120
    assert "decay_slope" in lines[-1] and "1 question, 3 thinking, 1 summary steps" in lines[0]


def test_the_notebook_view_escapes_what_it_shows():
    html = make_diagnosis({"lock_in": [0.1]}, model_name="<script>alert(1)</script>")._repr_html_()
    assert "<script>" not in html and "&lt;script&gt;" in html
    assert html.count("<tr>") == 2


def test_the_data_frame_has_one_column_a_metric():
    frame = diagnose(random_saliency("QTTS", 0)).to_dataframe()
    assert list(frame.columns) == ["layer", *LAYER_METRICS]
    assert frame["layer"].tolist() == [0, 1, 2, 3]


def test_a_missing_pandas_is_named_with_its_install_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'stepflow-tl\[dataframes\]'"):
        make_diagnosis({"lock_in": [0.1]}).to_dataframe()


def test_json_gives_back_every_number_and_no_bare_nan():
    diagnosis = diagnose(random_saliency("QTT", 0), window=1)
    text = json.dumps(diagnosis.to_json(), allow_nan=False)
    again = Diagnosis.from_json(json.loads(text))
    assert again.to_json() == diagnosis.to_json()
    for name in LAYER_METRICS:
        torch.testing.assert_close(
            getattr(again, name), getattr(diagnosis, name), rtol=0, atol=0, equal_nan=True
        )
    assert str(again) == str(diagnosis) and math.isnan(again.decay_slope)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": "other"}, "not a diagnosis this stepflow_tl reads: schema 'other'"),
        ({"version": 99}, "version 99"),
        ({"lock_in": [0.1]}, "an inconsistent diagnosis"),
        ({"lock_in": "text"}, "an inconsistent diagnosis"),
        ({"layers": [0, 9]}, "an inconsistent diagnosis"),
    ],
)
def test_json_that_is_no_diagnosis_is_refused(change, message):
    data = make_diagnosis({"lock_in": [0.1, 0.2]}).to_json()
    with pytest.raises(ResultFileError, match=message):
        Diagnosis.from_json({**data, **change})
    del data["reasons"]
    with pytest.raises(ResultFileError, match="reasons"):
        Diagnosis.from_json(data)


def test_columns_must_match_the_layers():
    # jaxtyping is faster here; without it __post_init__ says the same.
    with pytest.raises((ValueError, TypeError), match="self_share"):
        make_diagnosis({"lock_in": [0.1, 0.2], "self_share": [0.1]})


def test_a_diagnosis_is_made_copied_and_changed_by_field_or_by_metric():
    diagnosis = make_diagnosis({"lock_in": [0.1, 0.2]})
    changed = replace(diagnosis, window=3, recency=torch.tensor([0.7, 0.8], dtype=torch.float64))
    assert changed.window == 3 and changed.recency.tolist() == [0.7, 0.8]
    assert changed.lock_in.tolist() == [0.1, 0.2] and diagnosis.recency.tolist() == [0.5, 0.5]
    assert pickle.loads(pickle.dumps(diagnosis)).to_json() == diagnosis.to_json()
    with pytest.raises(FrozenInstanceError):
        diagnosis.window = 4
    with pytest.raises(AttributeError, match="no attribute 'lockin'; its metrics are lock_in, context_reach"):
        diagnosis.lockin  # noqa: B018
    with pytest.raises(ValueError, match=r"there is no metric \['lockin'\]: expected some of lock_in"):
        replace(diagnosis, lockin=diagnosis.lock_in)
    alone = replace(diagnosis, metrics={"lock_in": diagnosis.lock_in})
    assert alone.lock_in.tolist() == [0.1, 0.2] and alone.self_share.isnan().all()
