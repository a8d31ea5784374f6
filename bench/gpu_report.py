"""The figures of `lowmem gpu-check` as one table, for a terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from rich.table import Table

COLUMNS = ("part", "what", "ms", "floor", "x floor", "refresh", "result")
Row = tuple[str, ...]


def rows(figures: dict[str, Any]) -> list[Row]:
    """All rows of the table."""
    return [
        *_ceilings(figures.get("rates", {})),
        *_correct(figures.get("correctness", [])),
        *map(_time, figures.get("times", [])),
        *map(_step, figures.get("steps", [])),
        *map(_target, figures.get("targets", [])),
        *map(_graph, figures.get("graphs", [])),
        *_train(figures.get("train")),
    ]


def table(figures: dict[str, Any]) -> Table:
    """The table for a terminal."""
    found = Table()
    for column in COLUMNS:
        found.add_column(column, justify="left" if column in ("part", "what", "result") else "right", overflow="fold")
    previous = ""
    for row in rows(figures):
        if previous not in ("", row[0]):
            found.add_section()
        previous = row[0]
        found.add_row(*row)
    return found


def markdown(figures: dict[str, Any]) -> str:
    """The table in Markdown, under a line that says where the figures are from."""
    lines = [COLUMNS, ("---", "---", "---:", "---:", "---:", "---:", "---"), *rows(figures)]
    text = "".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |\n" for line in lines)
    return f"{title(figures)}\n\n{text}"


def title(figures: dict[str, Any]) -> str:
    """Device, versions, and a warning where times mean nothing."""
    versions = ", ".join(f"{name} {number}" for name, number in figures["versions"].items())
    warning = ". Interpreted on a CPU: times mean nothing" if figures["interpreted"] else ""
    return f"{figures['device']}, {versions}, {figures['seconds']:.0f} s{warning}"


def _ceilings(rates: dict[str, float]) -> Iterator[Row]:
    for name, rate in rates.items():
        unit = f"{rate / 1e9:,.4g} GB/s" if name == "copy" else f"{rate / 1e12:,.4g} TFLOP/s"
        yield ("ceiling", name, "", "", "", "", unit)


def _correct(cases: Iterable[dict[str, Any]]) -> Iterator[Row]:
    """One row an operation, and one for everything that is wrong."""
    by_op: dict[str, list[dict[str, Any]]] = {}
    for case in cases:
        by_op.setdefault(case["op"], []).append(case)
    for op, found in by_op.items():
        states = [case["status"] for case in found]
        checked = [case for case in found if case["status"] in ("right", "wrong", "error")]
        if not checked:
            yield ("kernel", op, "", "", "", "", found[0].get("reason", states[0]))
            continue
        closest = max((case.get("share", 0.0) for case in checked), default=0.0)
        text = f"{states.count('right')} of {len(checked)} cases right, largest error {closest:.2g} of its tolerance"
        left = states.count("skipped")
        yield ("kernel", op, "", "", "", "", text + (f", {left} without time" if left else ""))
        for case in checked:
            if case["status"] != "right":
                yield ("kernel", f"{op} {case['name']}", "", "", "", "", f"{case['status']}: {case['reason']}")


def _time(row: dict[str, Any]) -> Row:
    what = f"{row['op']} {row['name']}, {row['implementation']}"
    return ("time", what, *_numbers(row), "", _result(row) or f"bound by {row['bound']}")


def _step(row: dict[str, Any]) -> Row:
    what = f"{row['optimizer']}, {row['model']}, rank {row['rank']}"
    if _result(row):
        return ("step", what, "", "", "", "", _result(row))
    refresh = f"{row['refresh_ms']:,.1f}" if row.get("refresh_ms") else "-"
    result = f"{row['layers_ms']:,.2f} layers + {row['rest_ms']:,.2f} rest, state {row['state_bytes'] / 1e9:,.2f} GB"
    return ("step", what, *_numbers(row), refresh, result)


def _target(record: dict[str, Any]) -> Row:
    what = f"{record['ours']}, {record['model']}: at most {record['most']:g}x {record['theirs']}"
    if "missing" in record:
        return ("target", what, "", "", "", "", record["missing"])
    return ("target", what, "", "", "", "", f"{record['ratio']:.3f}x: {'met' if record['met'] else 'NOT MET'}")


def _graph(row: dict[str, Any]) -> Row:
    what = f"{row['optimizer']}, {row['model']}, rank {row['rank']}"
    if _result(row):
        return ("graph", what, "", "", "", "", _result(row))
    faster = row["eager_ms"] / row["ms"]
    result = (
        f"{row['eager_ms']:,.3f} ms without, {faster:.2f}x; {row['replays']} replays, {row['difference']:.1e} apart"
    )
    return ("graph", what, f"{row['ms']:,.3f}", "", "", "", result)


def _numbers(row: dict[str, Any]) -> Row:
    if "ms" not in row:
        return ("", "", "")
    return (f"{row['ms']:,.3f}", f"{row['floor_ms']:,.3f}", f"{row['over_floor']:.2f}")


def _result(row: dict[str, Any]) -> str:
    return next((f"{kind}: {row[kind]}"[:160] for kind in ("error", "missing", "skipped") if kind in row), "")


def _train(figures: dict[str, Any] | None) -> Iterator[Row]:
    if figures is None:
        return
    if _result(figures):
        yield ("train", "memory test", "", "", "", "", _result(figures))
        return
    losses, cap = figures["losses"], figures["cap"]
    what = f"{figures['model']}, rank {figures['rank']}, {len(losses)} steps of {figures['batch']}x{figures['length']}"
    peak, reserved = figures["peak_bytes"], figures["peak_reserved_bytes"]
    memory = "" if peak is None else f", peak {peak / 1e9:.2f} GB ({reserved / 1e9:.2f} reserved) of {cap:.0f}"
    text = f"loss {losses[0]:.2f} to {losses[-1]:.2f}{memory}, state {figures['state_bytes'] / 1e9:.2f} GB"
    verdict = figures["failed"]
    text += f"; FAILED: {verdict}" if verdict else ""
    yield ("train", what, f"{1e3 * figures['step_s']:,.0f}", "", "", f"{1e3 * figures['slowest_step_s']:,.0f}", text)
