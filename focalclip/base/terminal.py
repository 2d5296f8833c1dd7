"""Numbers, tables and lists as they are printed on a terminal."""

import textwrap
from collections.abc import Mapping, Sequence

WIDTH = 110  # columns


def percent(fraction: float) -> str:
    """One decimal; two below one percent, where chance levels are."""
    return f"{100 * fraction:.1f}" if abs(fraction) >= 0.01 or fraction == 0 else f"{100 * fraction:.2f}"


def signed(fraction: float) -> str:
    """Percentage points with their sign."""
    return f"{round(100 * fraction, 1) + 0.0:+.1f}"  # never -0.0


def span(interval: tuple[float, float]) -> str:
    """An interval in percent."""
    return f"{percent(interval[0])} - {percent(interval[1])}"


def some(names: Sequence[str], total: int, shown: int = 3) -> str:
    """How many, and the first few by name."""
    return f"{len(names)} of {total:,}: " + ", ".join(names[:shown]) + (" ..." if names[shown:] else "")


def aligned(rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> list[str]:
    """Rows as lines, a rule under the first; the columns ``left`` begin together, the others end together."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    lines.insert(1, "-" * (sum(widths) + 2 * (len(widths) - 1)))
    return lines


def listing(title: str, items: Mapping[str, str]) -> str:
    """A title, and one hanging paragraph per item; empty without items."""
    if not items:
        return ""
    width = max(len(name) for name in items) + 4
    lines = [
        textwrap.fill(
            text, max(WIDTH, width + 60), initial_indent=f"  {name}".ljust(width), subsequent_indent=" " * width,
            break_long_words=False, break_on_hyphens=False,
        )
        for name, text in items.items()
    ]  # fmt: skip
    return "\n".join([f"{title}:", *lines])


def model_heading(what: str, model: Mapping[str, object]) -> str:
    """What was measured of which model: source, weights, precision and device, as far as they are known."""
    names = [what, str(model.get("source", "")), f"weights {str(model.get('sha256', ''))[:12]}"]
    return " · ".join([name for name in names if name] + [f"{model.get('precision')} on {model.get('device')}"])
