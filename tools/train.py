"""``python tools/train.py ...`` is ``slak-mm train ...``; --help says what it does."""

from slak_mm.cli import run_tool
from slak_mm.cli.commands.train import main

if __name__ == '__main__':
    run_tool(main)
