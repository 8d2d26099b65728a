"""``python tools/export.py ...`` is ``slak-mm export ...``; --help says what it does."""

from slak_mm.cli import run_tool
from slak_mm.cli.commands.export import main

if __name__ == '__main__':
    run_tool(main)
