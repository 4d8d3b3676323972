import pytest

from lakd_jax.report import summary, table

ROWS = [
    table.Row("resnet56 (teacher)", 0.9341, None, 10_000, 855_770, None, None),
    table.Row("resnet20, LAKD", 0.92, 0.9215, 10_000, 272_474, 3723.4, 12345.6),
    table.Row("resnet8 | CE", 1.0, 0.0, 10_000, 78_042, 59.6, 999.0, note="seed 1"),
]


def test_render_is_aligned_and_shows_every_value():
    text, _, footer = table.render(ROWS).rpartition("\n\n")
    assert text.splitlines() == [
        "| network / method   | last % | best-on-minival % | parameters | train time "
        "| images/s | note   |",
        "| :----------------- | -----: | ----------------: | ---------: | ---------: "
        "| -------: | :----- |",
        "| resnet56 (teacher) |  93.41 |                 - |    855,770 |          - "
        "|        - |        |",
        "| resnet20, LAKD     |  92.00 |             92.15 |    272,474 |    1:02:03 "
        "|   12,346 |        |",
        "| resnet8 \\| CE      | 100.00 |              0.00 |     78,042 |    0:01:00 "
        "|      999 | seed 1 |",
    ]
    assert footer == "Accuracy on 10,000 test images."


def test_no_note_no_column():
    lines = table.render(ROWS[:2]).splitlines()
    assert "note" not in lines[0]
    assert len({len(line) for line in lines[:4]}) == 1


def test_grid_escapes_and_aligns_any_columns():
    text = table.grid(("a", "b"), [("x|y", "1"), ("z", "22")], [0])
    assert text.splitlines() == [
        "| a    |  b |",
        "| :--- | -: |",
        "| x\\|y |  1 |",
        "| z    | 22 |",
    ]


def test_no_rows_leave_the_header():
    assert len(table.render([]).splitlines()) == 2
    assert len(table.render_seeds([]).splitlines()) == 2


def test_seeds_are_grouped_by_name():
    rows = [
        table.Row("LAKD", 0.91, 0.92, 360, 1000, 10.0, 100.0),
        table.Row("KD", 0.90, None, 360, 1000, 20.0, None),
        table.Row("LAKD", 0.93, None, 360, 1000, 20.0, 300.0),
        table.Row("LAKD", 0.92, 0.93, 360, 1000, 30.0, 200.0),
    ]
    lines = table.render_seeds(rows).splitlines()
    cells = [[c.strip() for c in line.split("|")[1:-1]] for line in lines[2:4]]
    lakd = ["LAKD", "92.00 +- 1.00 (3)", "92.50 +- 0.71 (2)", "1,000", "0:00:20", "200"]
    assert cells == [lakd, ["KD", "90.00 (1)", "-", "1,000", "0:00:20", "-"]]
    assert len({len(line) for line in lines[:4]}) == 1


def test_summarise():
    assert table.summarise([1.0, 3.0]) == (2.0, pytest.approx(2**0.5), 2)
    assert table.summarise([4.0]) == (4.0, None, 1)
    with pytest.raises(ValueError, match="empty"):
        table.summarise([])


def test_describe_aligns_and_continues_long_values():
    text = summary.describe(
        {"student": "resnet20", "memory": "1.2 GiB\nof 80", "x": ""}
    )
    assert text == "student  resnet20\nmemory   1.2 GiB\n         of 80\nx"
    assert summary.describe({}) == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00:00"), (59.6, "0:01:00"), (3599.4, "0:59:59"), (360_000, "100:00:00")],
)
def test_duration(seconds, text):
    assert summary.duration(seconds) == text
