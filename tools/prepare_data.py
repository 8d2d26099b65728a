"""``python tools/prepare_data.py ...`` is ``slak-mm data ...``; --help says what it does."""

from slak_mm.cli import run_tool
from slak_mm.cli.commands.prepare_data import main

if __name__ == '__main__':
    run_tool(main)
