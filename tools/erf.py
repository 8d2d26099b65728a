"""``python tools/erf.py ...`` is ``slak-mm erf ...``; --help says what it does."""

from slak_mm.cli import run_tool
from slak_mm.cli.commands.erf import main

if __name__ == '__main__':
    run_tool(main)
