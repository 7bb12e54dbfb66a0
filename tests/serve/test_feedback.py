"""Who gets which variant, how sure results are, and what the file keeps."""

import stat
import threading
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_serve.errors import ConfigError, FeedbackError
from qlora_serve.serve.api.feedback_log import FeedbackLog
from qlora_serve.serve.feedback import intervals
from qlora_serve.serve.feedback.experiment import make_experiment, named_splits, parse_variant
from qlora_serve.serve.feedback.export import Wanted, export_rows
from qlora_serve.serve.feedback.intervals import Sample
from qlora_serve.serve.feedback.results import experiment_results, standings
from qlora_serve.serve.feedback.store import Answered, FeedbackStore, Said


def test_a_user_keeps_the_variant_and_shares_are_kept() -> None:
    split = make_experiment("tone", {"base": 2, "a": 1, "b@0.5": 1})
    assert dict(split.shares) == {"base": 0.5, "a": 0.25, "b@0.5": 0.25}
    assert split.models == ("base", "a", "b")
    users = [f"user {number}" for number in range(4000)]
    first = {user: split.assign(user) for user in users}
    assert all(split.assign(user) == variant for user, variant in first.items())
    counts = Counter(first.values())
    for label, share in split.shares:  # five standard deviations
        assert abs(counts[label] - 4000 * share) < 5 * (4000 * share * (1 - share)) ** 0.5
    other = make_experiment("other", {"base": 2, "a": 1, "b@0.5": 1})
    assert any(other.assign(user) != first[user] for user in users), "experiments are independent"


def test_only_as_many_users_move_as_must() -> None:
    before = make_experiment("x", {"a": 0.5, "b": 0.5})
    after = make_experiment("x", {"a": 0.75, "b": 0.25})
    users = [str(number) for number in range(2000)]
    moved = [(before.assign(user), after.assign(user)) for user in users]
    assert all(pair != ("a", "b") for pair in moved)
    assert 0.2 < moved.count(("b", "a")) / len(users) < 0.3
    drawn = Counter(before.assign(None) for _ in range(2000))
    assert 800 < drawn["a"] < 1200


def test_flags_are_read_or_refused() -> None:
    found = named_splits(["tone=base:0.5,medical:v2:0.5", "x=a@0.5:1"])
    assert found == {"tone": {"base": 0.5, "medical:v2": 0.5}, "x": {"a@0.5": 1.0}}
    assert parse_variant("medical:v2@-1") == ("medical:v2", -1.0)
    for wrong in ("tone", "tone=", "=a:1", "tone=a", "tone=a:x", "tone=:1", "t=a:1,a:1"):
        with pytest.raises(ValueError, match=r"expected NAME=|given twice"):
            named_splits([wrong])
    for weights in ({}, {"a": 0}, {"a": -1}, {"a": float("nan")}, {"a@x": 1}, {"@1": 1}):
        with pytest.raises(ConfigError, match="experiment 'x'"):
            make_experiment("x", weights)


def _ones(ones: int, count: int) -> Sample:
    return Sample([1.0] * ones + [0.0] * (count - ones), range(count))


@pytest.mark.parametrize(
    ("ones", "count", "low", "high"),
    # Newcombe 1998, Statistics in Medicine 17:857, table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611),
     (1, 29, 0.0061, 0.1718)],
)  # fmt: skip
def test_rates_have_the_published_intervals(ones, count, low, high) -> None:
    found = intervals.rate(_ones(ones, count))
    assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(
    ("one", "other", "low", "high"),
    # Newcombe 1998, Statistics in Medicine 17:873, table II, method 10.
    [((56, 70), (48, 80), 0.0524, 0.3339), ((9, 10), (3, 10), 0.1705, 0.8090),
     ((10, 10), (0, 10), 0.6075, 1.0)],
)  # fmt: skip
def test_differences_have_the_published_intervals(one, other, low, high) -> None:
    found = intervals.rate_difference(_ones(*one), _ones(*other))
    assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)


def test_means_have_students_intervals() -> None:
    table = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 10: 2.228, 30: 2.042, 120: 1.980}
    for freedom, quantile in table.items():
        assert intervals.t_quantile(freedom) == pytest.approx(quantile, rel=2e-3)
    found = intervals.mean(Sample([1, 2, 3, 4, 5], range(5)))
    assert (found.value, found.low, found.high) == pytest.approx((3, 1.0368, 4.9632), rel=1e-3)
    assert intervals.mean(Sample([1.0], [0])).low is None
    apart = intervals.mean_difference(Sample([3.0, 4, 5], range(3)), Sample([1.0, 2, 3], range(3)))
    assert apart.value == 2
    assert apart.low < 2 < apart.high


def test_answers_of_one_user_count_less_than_those_of_many() -> None:
    values = [1.0, 1, 1, 1, 0, 0, 1, 1, 0, 0, 0, 0]
    many = intervals.rate(Sample(values, range(12)))
    few = intervals.rate(Sample(values, [0, 0, 0, 0, 1, 1, 2, 2, 3, 3, 3, 3]))
    assert few.value == many.value
    assert few.high - few.low > 1.3 * (many.high - many.low)
    agreeing = intervals.rate(Sample([1.0] * 100, [number % 4 for number in range(100)]))
    assert agreeing.low == pytest.approx(intervals.rate(_ones(4, 4)).low)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5)), min_size=1, max_size=40))
def test_intervals_hold_their_value(pairs) -> None:
    sample = Sample([float(one) for one, _ in pairs], [cluster for _, cluster in pairs])
    found = intervals.rate(sample)
    assert 0 <= found.low <= found.value + 1e-12
    assert found.value - 1e-12 <= found.high <= 1


def _answered(number: int, **fields) -> Answered:
    given = {
        "id": f"a{number}", "choice": 0, "kind": "experiment", "source": "tone", "variant": "base",
        "models": ("base",), "identity": "", "key": "", "user": None,
        "prompt": {"messages": [{"role": "user", "content": f"question {number}"}], "tools": []},
        "answer": {"role": "assistant", "content": f"answer {number}"}, "finish_reason": "stop",
        "tokens": 5, "seconds": 0.5,
    }  # fmt: skip
    return Answered(**(given | fields))


def test_the_file_outlives_the_server_and_belongs_to_its_owner(tmp_path) -> None:
    path = tmp_path / "new" / "feedback.sqlite"
    store = FeedbackStore(path)
    store.add([_answered(0), _answered(1, variant="a", models=("a",), identity="i1", user="u")])
    store.say(Said("a0", vote="down"), None)
    store.say(Said("a1", vote="up", score=4.5), None)
    store.begin(make_experiment("later", {"base": 1, "a": 1}, "http"))
    store.close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    again = FeedbackStore(path)
    assert [one.name for one in again.begun()] == ["later"]
    base, other = experiment_results(again, "tone", {"base": 0.5, "a": 0.5})
    assert (base["answers"], base["up"], base["down"], base["mean_score"]) == (1, 0, 1, None)
    assert base["difference_from_first"] is None
    assert (other["up"], other["users"], other["identities"]) == (1, 1, ["i1"])
    assert other["mean_score"] == {"value": 4.5, "low": None, "high": None}
    assert other["difference_from_first"]["up_rate"]["value"] == 1
    assert again.say(Said("a1", vote="none"), None)["vote"] is None
    assert experiment_results(again, "tone", {})[1]["up_rate"] is None
    again.end("later")
    assert again.begun() == []
    path.write_text("not a database, and long enough to be seen as none " * 50)
    with pytest.raises(ConfigError, match="feedback file"):
        FeedbackStore(path)


def test_only_the_keys_own_answers_and_only_one_best(tmp_path) -> None:
    store = FeedbackStore(None)
    compared = {"kind": "comparison", "source": "cmp-1", "key": "k1"}
    store.add([_answered(n, variant=name, models=(name,), **compared)
               for n, name in enumerate(("base", "a", "b"))])  # fmt: skip
    store.add([_answered(9)])
    for said, key in ((Said("a0", vote="best"), "k2"), (Said("nobody", score=1), None),
                      (Said("a0", 1, score=1), None)):  # fmt: skip
        with pytest.raises(FeedbackError, match="no answer with id"):
            store.say(said, key)
    with pytest.raises(FeedbackError, match="comparison"):
        store.say(Said("a9", vote="best"), None)
    store.say(Said("a0", vote="best"), "k1")
    store.say(Said("a2", vote="best"), None)
    found = {one["variant"]: (one["best"], one["of"]) for one in standings(store, None, bool)}
    assert found == {"b": (1, 1), "base": (0, 1), "a": (0, 1)}
    assert standings(store, "k2", bool) == []
    assert standings(store, None, lambda name: name != "a") == [], "who is hidden stays hidden"


def test_what_was_handed_over_is_written_before_the_end(tmp_path) -> None:
    log = FeedbackLog(tmp_path / "feedback.sqlite")
    log.record([_answered(0)])
    log.close()
    log.close()
    assert [row["id"] for row in FeedbackStore(tmp_path / "feedback.sqlite").rows(["id"])] == ["a0"]


def test_memory_forgets_the_oldest(monkeypatch) -> None:
    monkeypatch.setattr("qlora_serve.serve.feedback.store._KEPT_IN_MEMORY", 3)
    store = FeedbackStore(None)
    for number in range(10):
        store.add([_answered(number)])
    assert [row["id"] for row in store.rows(["id"])] == ["a7", "a8", "a9"]
    monkeypatch.setattr("qlora_serve.serve.feedback.store._BYTES_IN_MEMORY", 1000)
    store.add(
        [_answered(10, prompt={"text": "x" * 500}), _answered(11, prompt={"text": "y" * 500})]
    )
    assert [row["id"] for row in store.rows(["id"])] == ["a11"]


def test_several_processes_may_write_one_file(tmp_path) -> None:
    path = tmp_path / "feedback.sqlite"
    stores = [FeedbackStore(path) for _ in range(4)]

    def write(place: int) -> None:
        for number in range(50):
            stores[place].add([_answered(place * 1000 + number)])
            stores[place].say(Said(f"a{place * 1000 + number}", vote="up"), None)

    threads = [threading.Thread(target=write, args=(place,)) for place in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert experiment_results(stores[0], "tone", {})[0]["up"] == 200


def test_export_leaves_out_what_teaches_nothing() -> None:
    store = FeedbackStore(None)
    store.add([
        _answered(0),
        _answered(1, finish_reason="length"),
        _answered(2, answer={"role": "assistant", "content": " "}),
        _answered(3, variant="a", prompt={"text": "Once"}, answer={"text": " upon a time"}),
        _answered(4, kind="comparison", source="cmp-1"),
        _answered(5, source="other"),
    ])  # fmt: skip
    store.say(Said("a4", vote="best"), None)
    store.say(Said("a5", score=3.0), None)

    def ids(**wanted) -> list[str]:
        return [row["id"] for row in export_rows(store, Wanted(**wanted))]

    assert ids() == ["a0", "a4", "a5"]
    assert ids(cut=True) == ["a0", "a1", "a4", "a5"]
    assert ids(experiment="tone") == ["a0"]
    assert ids(vote="best") == ["a4"]
    assert ids(min_score=3) == ["a5"]
    assert ids(min_score=3.5) == []
    assert ids(form="text") == ["a3"]
    assert ids(variant="a", form="text") == ["a3"]
    [row] = export_rows(store, Wanted(form="text"))
    assert row["text"] == "Once upon a time"
