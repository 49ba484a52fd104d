"""The table of benchmarks.gpu."""

from typing import Any

from benchmarks.gpu.plan import TARGETS

Run = dict[str, Any]  # see benchmarks/gpu/runs.py
Row = dict[str, Any]
COLUMNS = ("", "s", "tokens/s", "pairs/s", "MFU", "peak GB", "compile s", "torch", "good", "stretch", "of stretch", "")
LEGEND = """s: median seconds of a step or call. tokens/s: real tokens, without padding. MFU: counts model FLOPs of real
tokens only; recomputation is excluded. peak: of the allocator. torch: tokens/s of torch on the same texts, and the
speed-up of nomic_jax over it. good, stretch: published targets for an H200."""


def markdown(runs: list[Run]) -> str:
    """The tables of all runs as Markdown, the newest first."""
    return f"# One GPU\n\n{LEGEND}\n" + "".join(f"\n{section(run)}" for run in reversed(runs))


def section(run: Run) -> str:
    """A run: machine, date and commit, versions, commands and the table."""
    here, parts = run["machine"], run["parts"]
    rows = [row for part in parts.values() for row in part["rows"]]
    ours = {row["key"]: row for row in rows if row.get("key")}
    targets = {} if run["tiny"] else TARGETS
    peers: dict[str, list[Row]] = {}
    for row in rows:
        if "beside" in row:
            peers.setdefault(row["beside"], []).append(row)
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for row in rows:
        # A torch row has a line of its own only if the nomic_jax row is missing.
        if "beside" not in row or row["beside"] not in ours:
            lines.append(f"| {' | '.join(cells(row, ours, peers.get(row.get('key', ''), []), targets))} |")
    versions = ", ".join(f"{name} {version}" for name, version in here["versions"].items())
    commands = ", ".join(dict.fromkeys(f"`{part['command']}`" for part in parts.values()))
    notes = [run.get("note", ""), "Small sizes, not representative of speed." if run["tiny"] else ""]
    return (
        f"## {here['gpu']}; {run['date']}, commit {run['commit']}\n\nPython {here['python']}, {versions}.\n{commands}\n"
        + "".join(f"\n{note}\n" for note in notes if note)
        + "\n"
        + "\n".join(lines)
        + "\n"
    )


def cells(row: Row, ours: dict[str, Row], beside: list[Row], targets: dict[str, tuple]) -> list[str]:
    if "status" in row:
        return [row["name"], *[""] * 10, row["status"]]
    notes = [row.get("attention"), row.get("note"), loss_of(row, beside), compared(row, ours)]
    if row.get("planned_gb"):
        notes.append(f"planned {row['planned_gb']:.3g} GB")
    if row.get("estimated_s"):
        notes.append(f"launch.plan estimates {row['estimated_s']:.4g} s for this program")
    if row.get("filled"):
        notes.append(f"{row['filled']:.1%} text")
    if row.get("failed"):
        notes.insert(0, "FAILED")
    return [
        row["name"] if "beside" not in row else f"{row['how']}, {row['beside']}",
        number(row.get("step_s"), 4),
        number(row.get("tokens_per_s")),
        number(row.get("pairs_per_s")),
        f"{row['mfu']:.1%}" if row.get("mfu") else "-",
        number(row.get("peak_gb"), 1),
        number(row.get("compile_s"), 1),
        "; ".join(peer(row, other) for other in beside) or "-",
        *against_targets(row, targets),
        "; ".join(note for note in notes if note),
    ]


def against_targets(row: Row, targets: dict[str, tuple]) -> tuple[str, str, str]:
    if row.get("key") not in targets:
        return "", "", ""
    figure, good, stretch = targets[row["key"]]
    reached = row.get(figure)
    share = "-" if reached is None else f"{stretch / reached if figure == 'step_s' else reached / stretch:.0%}"
    unit = {"tokens_per_s": "tokens/s", "pairs_per_s": "pairs/s", "step_s": "s", "mfu": "MFU"}[figure]
    written = "{:.0%} {}" if figure == "mfu" else "{:,} {}"
    return written.format(good, unit), written.format(stretch, unit), share


def number(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def peer(row: Row, other: Row) -> str:
    how = "" if other["how"] == "torch" else f"{other['how']} "
    difference = other.get("difference")
    off = "" if difference is None else f", vectors differ by {difference:.1e}"
    return f"{how}{other['tokens_per_s']:,.0f} ({other['step_s'] / row['step_s']:.2f}x{off})"


def loss_of(row: Row, beside: list[Row]) -> str:
    """The losses of the first step, if torch has one to compare."""
    losses = [other["loss"] for other in beside if "loss" in other]
    return f"first loss {row['loss']:.4f}, torch {losses[0]:.4f}" if losses and "loss" in row else ""


def compared(row: Row, ours: dict[str, Row]) -> str:
    base = ours.get(row.get("compare", ""))
    if base is None or "tokens_per_s" not in base or "tokens_per_s" not in row:
        return ""
    return f"{row['tokens_per_s'] / base['tokens_per_s']:.3f} of the speed of {base['key']}"
