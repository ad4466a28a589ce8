"""Two results are held against each other, record by record."""

import json

from bench_cases import a_result, times
from benchmarks import compare


def test_compare_says_what_exceeds_the_spread(tmp_path, capsys):
    a = a_result({"mine": times(1, 2, 3), "theirs": times(1, 2, 3), "third": times(4, 5, 6)})
    b = a_result({"mine": times(3.5, 4, 5), "theirs": times(2, 3, 4), "third": times(1, 2, 3)})
    changes = compare.compare(a, b)
    assert [(c.ratio, c.verdict) for c in changes] == [
        (2.0, "slower"),
        (1.5, "within the spread"),
        (0.4, "faster"),
    ]
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, result in zip(paths, (a, b), strict=True):
        path.write_text(json.dumps(result))
    assert compare.main([str(p) for p in paths]) == 1
    assert "2.00×  slower" in capsys.readouterr().out
    assert compare.main([str(paths[0])] * 2) == 0
    assert compare.main([str(tmp_path / "absent.json"), str(paths[0])]) == 2


def test_how_a_case_was_timed_does_not_make_it_another_and_nothing_in_common_is_said(tmp_path, capsys):
    a, b = (a_result({"mine": times(1, 2, 3)}) for _ in range(2))
    for record in b["records"]:
        record |= {"clock": "wall", "commit": "1234567"}
    assert [c.ratio for c in compare.compare(a, b)] == [1.0]
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, result in zip(paths, (a, {**b, "records": []}), strict=True):
        path.write_text(json.dumps(result))
    assert compare.main([str(p) for p in paths]) == 2
    assert "no timed case in common" in capsys.readouterr().err
