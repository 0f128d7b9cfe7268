"""Measurements as tables: every number in its place, once."""

from __future__ import annotations

from sae_transformers.evaluation.results import Measurement, SuiteResult
from sae_transformers.hub_cards.result_tables import result_tables


def tables(*measurements: Measurement):
    return result_tables(SuiteResult("s", {}, measurements))


def test_metrics_of_the_same_methods_share_a_table() -> None:
    methods = ["none", "ours (raise)", "ours (lower)"]
    better = ["", "higher", "lower"]
    scores = [Measurement("score", i, of, n=8, better=better[i]) for i, of in enumerate(methods)]
    perplexity = [Measurement("perplexity", 10 + i, of, i, 20, n=8, better="lower") for i, of in enumerate(methods)]
    ratio = [Measurement("ratio", 1.5, "ours (raise)", n=8, note="chosen")]
    (table,) = tables(*scores, *perplexity, *ratio)
    assert (table.corner, table.head, table.n) == ("of", ["score", "perplexity ↓", "ratio"], "n = 8")
    assert table.rows == [
        ("none", ["0", "10 (0 to 20)", ""]),
        ("ours (raise)", ["1", "11 (1 to 20)", "1.5"]),
        ("ours (lower)", ["2", "12 (2 to 20)", ""]),
    ]
    assert table.notes == ["ours (raise): chosen"]


def test_many_metrics_of_one_method_are_rows() -> None:
    (table,) = tables(Measurement("a", 1.0, n=3, better="higher"), Measurement("b", None, n=4, seeds=2))
    assert (table.corner, table.head, table.n) == ("metric", ["value"], "")
    assert table.rows == [("a ↑", ["1, n = 3"]), ("b", ["-, n = 4, 2 seeds"])]


def test_data_and_methods_that_have_little_in_common_are_kept_apart() -> None:
    found = tables(
        Measurement("a", 1.0, "x", data="one"), Measurement("a", 2.0, "x", data="two"),
        *(Measurement("b", 3.0, f"{i}", data="one") for i in range(4)), Measurement("c", 4.0, "0", data="one"),
    )  # fmt: skip
    assert [(table.data, table.metrics, len(table.methods)) for table in found] == [
        ("one", ["a"], 1), ("two", ["a"], 1), ("one", ["b"], 4), ("one", ["c"], 1),
    ]  # fmt: skip


def test_no_number_is_lost() -> None:
    given = [Measurement(m, i, f"method {i}", data=d) for m in "abc" for i in range(3) for d in ("p", "q")]
    given = [one for one in given if (one.metric, one.method) != ("c", "method 1")]
    cells = [one for table in tables(*given) for one in table.cells.values()]
    assert sorted(map(repr, cells)) == sorted(map(repr, given))
