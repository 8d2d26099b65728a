"""``python tools/demo.py ...`` is ``slak-mm demo ...``; --help says what it does."""

from slak_mm.cli import run_tool
from slak_mm.cli.commands.demo import main

if __name__ == '__main__':
    run_tool(main)
