"""The commands of :mod:`slak_mm.__main__`, one module each with ``parse_args`` and ``main``."""
