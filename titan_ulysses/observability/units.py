"""Formats bytes and seconds in the unit in which they are easiest to read."""

from __future__ import annotations


def unit_of(size: float) -> tuple[float, str]:
    """Return the unit in which `size` bytes are easiest to read: (bytes per unit, name)."""
    units = ((2.0**30, "GiB"), (2.0**20, "MiB"), (2.0**10, "KiB"))
    return next((unit for unit in units if size >= 0.1 * unit[0]), (1.0, "bytes"))


def size_text(size: float) -> str:
    """Format bytes as "31.87 GiB", "512.0 MiB" or "16 bytes"."""
    unit, name = unit_of(size)
    value = size / unit
    if unit == 1:
        return f"{value:.0f} {name}"
    return f"{value:,.1f} {name}" if value >= 100 else f"{value:.2f} {name}"


def time_unit_of(seconds: float) -> tuple[float, str]:
    """Return the unit in which `seconds` are easiest to read: (seconds per unit, name)."""
    units = ((3600.0, "h"), (60.0, "min"), (1.0, "s"))
    return next(
        (unit for unit in units if seconds >= 2 * unit[0]),
        (1e-3, "ms") if seconds < 1 else (1.0, "s"),
    )


def time_text(seconds: float) -> str:
    """Format seconds as "2 h 41 min", "2 min 26 s", "34.5 s" or "37.1 ms"."""
    if seconds >= 7200:
        return f"{seconds // 3600:,.0f} h {seconds % 3600 // 60:.0f} min"
    if seconds >= 120:
        return f"{seconds // 60:.0f} min {seconds % 60:.0f} s"
    if seconds >= 1:
        return f"{seconds:.1f} s"
    return f"{1e3 * seconds:.3g} ms" if seconds >= 1e-5 else "less than 0.01 ms"
