"""Errors of the checkpoint code.

Every error is raised before anything in a model is overwritten, and its message is meant to be
shown to the user as it is: it names the file, says what is wrong and what to do.
"""

from __future__ import annotations

from collections.abc import Iterable


def shown(value: object, limit: int = 100) -> str:
    """A name or text from a file as it may be printed: control characters escaped, and cut.

    Args:
        value: What the file has. Of anything but texts, numbers and lists of numbers only the type is named.
        limit: Characters at most. Defaults to 100.
    """
    if isinstance(value, (list, tuple)) and all(isinstance(item, int) for item in value[:limit]):
        value = str(value[:limit])
    elif value is not None and not isinstance(value, (str, int, float)):
        value = f'<{type(value).__name__}>'
    text = str(value)
    return escaped(text) if len(text) <= limit else f'{escaped(text[:limit])}... ({len(text)} characters)'


def escaped(text: str, keep: str = '') -> str:
    """A text with its control characters escaped, except those to keep."""
    return ''.join(c if c.isprintable() or c in keep else c.encode('unicode_escape').decode() for c in text)


class CheckpointError(RuntimeError):
    """Base class of everything that can go wrong with a checkpoint."""


class CheckpointNotFound(CheckpointError):
    """The file is neither here nor could it be fetched."""


class CheckpointUnreadable(CheckpointError):
    """The file is there, but it is not an intact checkpoint."""


class UnsafeCheckpoint(CheckpointError):
    """The file asks for Python code to be run while it is read.

    Attributes:
        global_name: The dotted name the file asked for, '' where torch did not say it.
    """

    def __init__(self, message: str, global_name: str = '') -> None:
        super().__init__(message)
        self.global_name = global_name


class CheckpointMismatch(CheckpointError):
    """The checkpoint does not fit the model. All arguments but the message are kept as attributes.

    Args:
        message: One sentence that says what was compared.
        missing: Keys the model has and the checkpoint has not.
        unexpected: Keys the checkpoint has and the model has not.
        shape_mismatches: ``(key, shape in the checkpoint, shape in the model)``.
        causes: Likely causes, the most telling first, each with its remedy.
    """

    #: How many keys of each kind the message shows.
    num_shown = 4

    def __init__(
        self,
        message: str,
        missing: Iterable[str] = (),
        unexpected: Iterable[str] = (),
        shape_mismatches: Iterable[tuple[str, tuple[int, ...], tuple[int, ...]]] = (),
        causes: Iterable[str] = (),
    ) -> None:
        self.missing = list(missing)
        self.unexpected = list(unexpected)
        self.shape_mismatches = list(shape_mismatches)
        self.causes = list(causes)
        lines = [message, *(f'Likely cause: {cause}' for cause in self.causes)]
        shapes = [f'{key} {list(theirs)}, the model has {list(ours)}' for key, theirs, ours in self.shape_mismatches]
        for title, entries in (
            ('missing in the checkpoint', self.missing),
            ('unexpected in the checkpoint', self.unexpected),
            ('of another shape', shapes),
        ):
            if entries:
                more = len(entries) - self.num_shown
                names = [*map(shown, entries[: self.num_shown]), *([f'and {more} more'] if more > 0 else [])]
                lines.append(f'{len(entries)} {title}: {"; ".join(names)}')
        super().__init__('\n'.join([*lines, 'Nothing was loaded.']))
