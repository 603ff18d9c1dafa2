"""Titles are true: each sentence follows from the numbers it is made of."""

import numpy as np
import pytest

from jobs import findings


def record(**changes):
    report = {"read": 1000, "embedded": 90, "left": 0, "dead": 1, "padding": 0.0}
    planned = {"documents": 90, "tokens": 1000, "seconds": 100.0}
    base = {"status": "published", "seconds": 95.0, "embedding_s": 80.0, "tokens": 1100, "published": 3}
    return {**base, "report": report, "planned": planned, **changes}


def test_headlines():
    assert findings.headline(None) == "No run has written to this table yet"
    assert findings.headline(record()) == "90 documents embedded in 1\u00a0min\u00a035\u00a0s, and readers see them"
    assert findings.headline(record(status="unchanged")) == "Nothing to embed: 1,000 documents are up to date"
    assert findings.headline({"status": "running"}) == "A run is at work"
    assert findings.headline({"status": "failed", "error": "no disk"}) == "The newest run failed: no disk"
    assert findings.headline({"status": "odd"}) == "The newest run ended as odd"
    assert findings.headline(record(status="unpublished", reasons=["collapse: all"])) == "Not published: collapse: all"


@pytest.mark.parametrize(
    "speeds, sentence",
    [
        ([4100.0], "The only run with work embedded 4.1k tokens a second"),
        ([4000.0, 4000.0, 4100.0], "4.1k tokens a second, as the nights before"),
        ([4000.0, 4000.0, 5000.0], "5k tokens a second, 25% faster than usual"),
        ([4000.0, 9000.0, 4000.0, 1000.0], "1k tokens a second, 75% slower than usual"),
    ],
)
def test_speed_of_nights(speeds, sentence):
    assert findings.speed_of_nights(speeds) == sentence


def test_rates_are_read_off_at_even_distances_and_lose_nothing():
    rows = [[0.0, 0, 0], [10.0, 5, 1000], [10.0, 9, 3000], [40.0, 20, 9000]]
    seconds, values = findings.rates({"timeline": {"rows": rows}})
    assert seconds[-1] == 40
    assert np.isclose(np.diff([0, *seconds]) @ values, 9000)
    assert findings.rates({}) is None
    assert findings.rates({"timeline": {"rows": [[0.0, 0, 0]]}}) is None


def test_the_course_of_a_run_does_not_count_its_start():
    rows = [[0.0, 0, 0]] + [[20.0 + s, s, 100 * s] for s in range(1, 81)]
    steady = {"timeline": {"rows": rows}}
    assert findings.course(steady, *findings.rates(steady)) == "First vectors after 21.0 s, then steady to the end"
    for row in rows[60:]:
        row[2] = 5900 + (row[2] - 5900) // 10
    assert "at times only" in findings.course(steady, *findings.rates(steady))
    few = {"timeline": {"rows": [[0.0, 0, 0], [8.0, 4, 100]]}}
    assert findings.course(few, *findings.rates(few)) == "The vectors arrived in 1 part, the first after 8.0 s"


def test_lengths():
    sentence, median = findings.lengths(record(lengths=[[64, 10], [91, 10], [128, 20], [182, 40]]))
    assert median == pytest.approx(128 * 2**0.5)
    assert sentence == "Half of the documents have under 180 tokens; no position was padding"
    wasteful = record(lengths=[[64, 2]], report={"padding": 0.25})
    assert "25.0% of the positions were padding" in findings.lengths(wasteful)[0]


def test_plan_and_outcome():
    assert findings.outcome(record(planned=None)) == []
    assert findings.outcome(record()) == [("documents", 90, 90), ("tokens", 1000, 1100), ("seconds", 100, 80)]
    assert findings.plan_and_outcome(record(embedding_s=104)).endswith(
        "planned documents were embedded, in the time foreseen"
    )
    short = record(planned={"documents": 120, "tokens": None, "seconds": None})
    assert findings.plan_and_outcome(short) == (
        "90 of 120 planned documents were embedded; a first run foresees no time"
    )
    assert findings.plan_and_outcome(record()).endswith("in 1 min 20 s where 1 min 40 s were foreseen")


def test_labels_are_days_or_times_of_one_day():
    starts = ("2026-11-27T01:00:05Z", "2026-11-27T13:30:00Z", "2026-11-28T01:00:00Z")
    records = [{"started": start} for start in starts]
    assert findings.labels_of(records) == ["27 Nov", "27 Nov", "28 Nov"]
    assert findings.labels_of(records[:2]) == ["01:00", "13:30"]
    assert findings.labels_of(records[:1]) == ["27 Nov"]


def test_gates_of_vectors():
    seen = {"rows": 9, "not_finite": 1, "odd_length": 2, "identical": 0.25, "dead_dimensions": 0.0}
    first = findings.gate_rows({"gates": {"vectors": seen}})[0]  # as earlier versions wrote it
    assert first == ["vectors", "3 bad of 9 vectors", "0", "passed"]
    seen |= {"disagreeing": 4}
    refused = {"gates": {"vectors": seen}, "reasons": ["vectors: of 9"]}
    assert findings.gate_rows(refused)[0] == ["vectors", "7 bad of 9 vectors", "0", "refused"]
    wrong = findings.gate_rows({"gates": {"vectors": {}}, "reasons": ["vectors: the column vector is"]})
    assert wrong == [["vectors", "a column of another type", "none", "refused"]]


def test_gates():
    gates = {"max_dead": {"dead": 3, "most": 10}, "canaries": {"distance": 0.5, "bound": 1e-3}}
    rows = findings.gate_rows({"gates": gates, "reasons": ["canaries: embedded again"]})
    assert [(row[0], row[-1]) for row in rows] == [("max_dead", "passed"), ("canaries", "refused")]
    assert findings.gate_rows({}) == []


def test_the_newest_attempt_is_not_one_that_found_another_at_work():
    records = [record(), {"status": "crashed"}, {"status": "busy"}]
    assert findings.newest(records) == {"status": "crashed"}
    assert findings.newest_with_work(records) == record()
    assert findings.newest([]) is None
