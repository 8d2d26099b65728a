"""``python tools/cost.py ...`` is ``slak-mm cost ...``; --help says what it does."""

from slak_mm.cli import run_tool
from slak_mm.cli.commands.cost import main

if __name__ == '__main__':
    run_tool(main)
