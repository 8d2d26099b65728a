"""``python tools/curves.py ...`` is ``slak-mm curves ...``; --help says what it does."""

from slak_mm.cli import run_tool
from slak_mm.cli.commands.curves import main

if __name__ == '__main__':
    run_tool(main)
