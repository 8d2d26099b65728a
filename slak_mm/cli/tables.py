"""Tables as text."""

from collections.abc import Sequence

__all__ = ['table']


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lay out a Markdown table whose columns are aligned as plain text too.

    Args:
        rows: Cells of each row, all rows of one length; the first is the header.

    Returns:
        The lines.
    """
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ['| ' + ' | '.join(text.ljust(width) for text, width in zip(row, widths)) + ' |' for row in rows]
    return [lines[0], '|' + '|'.join('-' * (width + 2) for width in widths) + '|', *lines[1:]]
