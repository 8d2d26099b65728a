"""``python tools/imagenet.py ...`` is ``slak-mm imagenet ...``; --help says what it does."""

from slak_mm.cli import run_tool
from slak_mm.cli.commands.imagenet import main

if __name__ == '__main__':
    run_tool(main)
