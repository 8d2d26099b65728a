"""The sub-commands of ``slak-mm benchmark``, one module each, and what they share.

A sub-command is a module with two functions::

    add_parser(commands)            adds its parser, with ``set_defaults(run=run)``
    run(args) -> Iterator[str]      measures, and yields the lines of its report as they come

What a user can cause, and a result that disagrees with its reference, is a
:class:`~benchmarks.common.BenchmarkError`.
"""
