"""Formats aligned text blocks and durations for the other reports."""


def describe(items: dict[str, str]) -> str:
    """Returns `items` as two aligned columns, one line per name.

    The lines of a multi-line value are aligned in the second column. Units belong in
    the values ("1.2 GiB"). An empty dictionary yields the empty string.
    """
    width = max((len(name) for name in items), default=0)
    lines = []
    for name, value in items.items():
        first, *rest = value.splitlines() or [""]
        lines.append(f"{name:<{width}}  {first}".rstrip())
        lines.extend(f"{'':<{width}}  {line}".rstrip() for line in rest)
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """Returns `seconds` (finite, not negative) as h:mm:ss, e.g. "0:01:23"."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
