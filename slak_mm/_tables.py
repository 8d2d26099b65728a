"""Tables as text."""

from collections.abc import Sequence

__all__ = ['table']


def table(rows: Sequence[Sequence[str]], markdown: bool = True) -> str:
    """Align the columns of a table, whose first row is the header.

    Args:
        rows: Cells of each row, all rows of one length.
        markdown: Markdown, with all columns to the left; else bare columns, with all but the first to the right.
    """
    widths = [max(map(len, column)) for column in zip(*rows)]
    if not markdown:
        return '\n'.join(
            '  '.join(cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(row, widths)))
            for row in rows
        )
    header, *lines = ('| ' + ' | '.join(map(str.ljust, row, widths)) + ' |' for row in rows)
    return '\n'.join([header, '|' + '|'.join('-' * (width + 2) for width in widths) + '|', *lines])
