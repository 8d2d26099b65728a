"""Commands, configs and links of the documentation."""

import re
import shlex
import sys
from pathlib import Path

import pytest
from conftest import load_tool

from slak_mm import config_path
from slak_mm.__main__ import MODULES

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob('*.md'), *ROOT.glob('docs/*.md')])


def shell_commands():
    """Every command of the shell blocks, with comments and line continuations resolved."""
    for page in PAGES:
        for block in re.findall(r'^```shell\n(.*?)^```', page.read_text(), re.MULTILINE | re.DOTALL):
            variables = {}
            for line in block.replace('\\\n', ' ').splitlines():
                assignment = re.fullmatch(r'(\w+)="(.*)"', line)
                if assignment:
                    variables[f'${assignment[1]}'] = assignment[2]
                elif line.strip() and not line.startswith(('#', ' ')):
                    for name, value in variables.items():
                        line = re.sub(re.escape(name) + r'\b', value, line)
                    yield pytest.param(line.strip(), id=f'{page.stem}: {line.strip()[:60]}')


@pytest.mark.parametrize('line', shell_commands())
def test_commands_are_understood_by_their_tools(line, monkeypatch):
    words = shlex.split(line, comments=True)
    while '=' in words[0]:  # variables in front of a command
        words.pop(0)
    place = next((i for i, word in enumerate(words) if re.fullmatch(r'tools/\w+\.py|slak-mm|slak_mm', word)), None)
    if place is not None and words[place].endswith('.py'):
        monkeypatch.setattr(sys, 'argv', words[place:])
        load_tool(Path(words[place]).stem).parse_args()
    elif place is not None:
        command, *arguments = words[place + 1 :]
        if not {'--help', '--version'} & {command, *arguments}:
            monkeypatch.setattr(sys, 'argv', [command, *arguments])
            config = getattr(load_tool(MODULES[command]).parse_args(), 'config', '')
            assert not re.fullmatch('[a-z0-9_]+', config) or config_path(config)
    elif words[0] == 'make':
        targets = [word for word in words[1:] if '=' not in word]
        assert all(re.search(rf'^{target}:', (ROOT / 'Makefile').read_text(), re.MULTILINE) for target in targets)
    else:
        assert words[0] in ('pip', 'pre-commit'), line


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.stem)
def test_links_and_configs_exist(page):
    text = page.read_text()
    headings = {
        path: {re.sub(r'[^\w\- ]', '', title.lower()).replace(' ', '-') for title in titles}
        for path, titles in ((path, re.findall(r'^#+ (.*)', path.read_text(), re.MULTILINE)) for path in PAGES)
    }
    for link in re.findall(r'\]\(([^)\s]+)\)', text):
        if link.startswith(('http://', 'https://')):
            continue
        name, _, anchor = link.partition('#')
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert not anchor or anchor in headings[target], link
    for config in re.findall(r'configs/\w+\.py', text):
        assert (ROOT / config).is_file(), config


def test_readme_is_short_and_names_every_page():
    readme = (ROOT / 'README.md').read_text()
    assert len(readme.splitlines()) <= 160
    assert {f'docs/{page.name}' for page in ROOT.glob('docs/*.md')} - {'docs/adding-a-family.md'} <= set(
        re.findall(r'docs/[\w-]+\.md', readme)
    )
