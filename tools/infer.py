"""``python tools/infer.py ...`` is ``slak-mm infer ...``; --help says what it does."""

from slak_mm.cli import run_tool
from slak_mm.cli.commands.infer import main

if __name__ == '__main__':
    run_tool(main)
