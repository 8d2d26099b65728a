"""``python tools/benchmark.py ...`` is ``slak-mm benchmark ...``; --help says what it does."""

from slak_mm.cli import run_tool
from slak_mm.cli.commands.benchmark import main

if __name__ == '__main__':
    run_tool(main)
