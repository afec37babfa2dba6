"""Tables of names and numbers."""

from rich.console import Console

from cmpe_se.utils.tables import number_table


def test_names_to_the_left_and_numbers_to_the_right():
    table = number_table("top-1", "p", title="runs")
    table.add_row("plain", "90.12", "")
    table.add_row("folded_3x3", "9.5", "<0.001")
    console = Console(width=80)
    with console.capture() as shown:
        console.print(table)
    lines = [line.rstrip() for line in shown.get().splitlines()]
    assert any(line.endswith("top-1        p") for line in lines)
    assert any(line.strip().startswith("plain") and "90.12" in line for line in lines)
    assert any(line.strip().startswith("folded_3x3     9.5   <0.001") for line in lines)
