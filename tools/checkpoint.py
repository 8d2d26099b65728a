"""``python tools/checkpoint.py ...`` is ``slak-mm checkpoint ...``; --help says what it does."""

from slak_mm.cli import run_tool
from slak_mm.cli.commands.checkpoint import main

if __name__ == '__main__':
    run_tool(main)
