"""The partner's CSV: every form that spreadsheets write, and a clear message for each line that cannot be used."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.errors import BadExpected
from app.reconcile.expected import Expected, parse, read

ORDER = "00000000-0000-4000-8000-000000000001"


@pytest.mark.parametrize(
    "text",
    [
        f"orderId,reference\n{ORDER},CM-1\n",
        f"orderId;reference\r\n{ORDER};CM-1\r\n",
        f"Order ID\tBuyFromOrderReference\n{{{ORDER.upper()}}}\tCM-1",
        f'\n\n"order_id","note, of ours","sellToOrderReference"\n{ORDER},"a;b","CM-1"\n\n',
        f"orderId;note, of ours;reference\n{ORDER};x;CM-1\n",
    ],
)
def test_separators_quotes_column_names_and_blank_lines_may_vary(text: str) -> None:
    (found,) = parse(text)

    assert (found.order_id, found.references) == (ORDER, ("CM-1",))


def test_one_column_is_enough_and_lines_are_numbered_as_in_an_editor() -> None:
    text = f'reference,orderId\nCM-1,\n"two\nlines",{ORDER}\n,{ORDER}\n'

    assert [(one.line, one.order_id) for one in parse(text)] == [(2, ""), (3, ORDER), (5, ORDER)]
    assert parse("buyFromOrderReference,sellToOrderReference\nCM-1,WEB-1\n") == [Expected(2, "", ("CM-1", "WEB-1"))]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "is empty"),
        (" \n\n", "is empty"),
        ("a,b\n1,2\n", "line 1: names no column orderId or reference"),
        ("orderId\nnot-a-guid\n", "line 2: orderId 'not-a-guid' is not a GUID"),
        ("orderId,reference,x\n,,1\n", "line 2: has neither an orderId nor a reference"),
        ('orderId\n"open\n', "line 2: is not CSV (unexpected end of data)"),
    ],
)
def test_a_problem_names_its_line(text: str, problem: str) -> None:
    with pytest.raises(BadExpected, match="^" + problem.replace("(", r"\(").replace(")", r"\)") + "$"):
        parse(text)


def test_at_most_ten_bad_lines_are_listed() -> None:
    with pytest.raises(BadExpected) as refused:
        parse("orderId\n" + "bad\n" * 25)

    assert str(refused.value).splitlines()[9:] == ["line 11: orderId 'bad' is not a GUID", "and 15 more lines"]


def test_a_byte_order_mark_is_ignored(tmp_path: Path) -> None:
    file = tmp_path / "orders.csv"
    file.write_text(f"orderId\n{ORDER}\n", encoding="utf-8-sig")

    assert [one.order_id for one in read(file)] == [ORDER]


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "orders.csv"
    with pytest.raises(BadExpected, match=r"orders.csv: cannot be read \(FileNotFoundError\)"):
        read(file)
    file.write_bytes("orderId\nÄ".encode("utf-16"))
    with pytest.raises(BadExpected, match=r"orders.csv: is not UTF-8"):
        read(file)
