"""``python tools/test.py ...`` is ``slak-mm test ...``; --help says what it does."""

from slak_mm.cli import run_tool
from slak_mm.cli.commands.test import main

if __name__ == '__main__':
    run_tool(main)
