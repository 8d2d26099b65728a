#!/usr/bin/env python
"""Look into checkpoints, convert their names, and list the published ones.

Examples:
    python tools/checkpoint.py inspect slak_t_in1k_300e.pth --picture sparsity.png
    python tools/checkpoint.py finalize work_dirs/upernet_slak_t_ade20k/iter_160000.pth slak_t.pth
    python tools/checkpoint.py convert ours.pth official.pth --to official
    python tools/checkpoint.py convert slak_t.pth slak_t.safetensors
    python tools/checkpoint.py zoo --verify
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image

from slak_mm import checkpoints, cli
from slak_mm._tables import table
from slak_mm.checkpoints import CheckpointError, read_checkpoint, write_checkpoint
from slak_mm.checkpoints.errors import shown
from slak_mm.engine.sparsity_hook import SPARSITY_KEY, finalize_checkpoint, saved_masks
from slak_mm.sparsity.picture import LayerSparsity, draw_sparsity, layer_sparsity


def parse_args() -> argparse.Namespace:
    parser = cli.ArgumentParser(description=__doc__.split('\n\n')[0])
    commands = parser.add_subparsers(dest='command', required=True)
    source = dict(help='path, address (http, hf://owner/repo/file) or zoo name')
    out = dict(type=cli.output_file, help='file to write; .safetensors writes that format')
    force = dict(action='store_true', help='replace an existing file')
    what = 'what a checkpoint holds: format, variant, shapes and zeros per layer'
    inspect = commands.add_parser('inspect', help=what)
    inspect.add_argument('checkpoint', **source)
    inspect.add_argument('--ema', action='store_true', help='look at the moving average')
    picture = 'draw the non-zero weights of each layer, and of each tap of the large kernels'
    inspect.add_argument('--picture', type=cli.output_file, metavar='FILE.png', help=picture)
    inspect.set_defaults(run=run_inspect)
    convert = commands.add_parser('convert', help='rename the tensors and write a new file')
    convert.add_argument('checkpoint', **source)
    convert.add_argument('out', **out)
    spellings = (name for family in checkpoints.FAMILIES.values() for name in family.spellings)
    names = ['ours', 'official', *dict.fromkeys(spellings)]
    convert.add_argument('--to', choices=names, default='ours', help='whose names to write (default: ours)')
    convert.add_argument('--ema', action='store_true', help='take the moving average')
    convert.add_argument('--force', **force)
    convert.set_defaults(run=run_convert)
    final = commands.add_parser('finalize', help='write the weights alone, with the zeros of sparse training checked')
    final.add_argument('checkpoint', help='path of a training checkpoint')
    final.add_argument('out', **out)
    final.add_argument('--force', **force)
    final.set_defaults(run=run_finalize)
    zoo = commands.add_parser('zoo', help='published checkpoints, and which are in the cache')
    verify = 'hash every file of the cache and compare it with its first use and with the zoo'
    zoo.add_argument('--verify', action='store_true', help=verify)
    zoo.set_defaults(run=run_zoo)
    return parser.parse_args()


def run_inspect(args: argparse.Namespace) -> None:
    """Print what a checkpoint holds."""
    checkpoint = read_checkpoint(args.checkpoint)
    taken = checkpoints.unwrap(checkpoint, 'ema' if args.ema else 'model')
    print(f'file        {args.checkpoint}')
    if taken.wrapper:
        print(f'entries     {", ".join(map(shown, checkpoint))}')
    place = f'under {taken.wrapper}' if taken.wrapper else 'in a bare state dict'
    print(f'weights     {len(taken.state_dict)} tensors {place}{", moving average" * taken.is_ema}')
    print(f'second copy {taken.other_copy or "none"}')
    masks = saved_masks(checkpoint)
    if masks:
        state = checkpoint[SPARSITY_KEY]
        settings = state.get('settings')
        mode = settings.get('mode') if isinstance(settings, Mapping) else settings
        print(
            f'sparsity    {len(masks)} masks (mode {shown(mode)}, changed {shown(state.get("updates"))} times in '
            f'{shown(state.get("step"))} steps)'
        )
    roots = checkpoints.find_roots(taken.state_dict)
    for root in roots:
        part = {k[len(root) :]: v for k, v in taken.state_dict.items() if k.startswith(root)}
        ours, notes = checkpoints.convert_state_dict(part)
        print(f'\nbackbone    {root.rstrip(".") or "(the whole file)"}')
        print(f'format      {notes.format}')
        print(f'variant     {checkpoints.describe(ours)}')
        if notes.unrecognized:
            print(f'unknown     {len(notes.unrecognized)} names: {", ".join(notes.unrecognized[:4])}')
        print_sparsity(part, {k[len(root) :]: v for k, v in masks.items() if k.startswith(root)})
    if not roots:
        print(f'\nbackbone    none of {checkpoints.known_backbones()}; all weights of the file:')
        print_sparsity(taken.state_dict, masks)
    if args.picture:
        root = (roots or [''])[0]
        parts = {k[len(root) :]: v for k, v in taken.state_dict.items() if k.startswith(root)}
        try:
            picture = draw_sparsity(parts, Path(args.checkpoint).name)
        except ValueError as error:
            raise CheckpointError(str(error)) from error
        try:
            Image.fromarray(picture).save(args.picture)
        except ValueError as error:
            raise CheckpointError(f'{args.picture} has no suffix of a picture format; use one such as .png.') from error
        print(f'\npicture     {args.picture}')


def print_sparsity(state_dict: Mapping[str, torch.Tensor], masks: Mapping[str, torch.Tensor]) -> None:
    """Print the zeros of each weight, and what its mask keeps where there is one."""
    layers = layer_sparsity(state_dict)
    sparsity, total = of_all(layers)
    rows = [['weight', 'shape', 'zeros', 'pruned by its mask']]
    for layer in layers:
        pruned = f'{1 - float(masks[layer.name].float().mean()):.2%}' if layer.name in masks else '-'
        rows.append([layer.name, 'x'.join(map(str, layer.shape)), f'{layer.sparsity:.2%}', pruned])
    rows.append(['all of these', f'{total}', f'{sparsity:.2%}', ''])
    print(table(rows if masks else [row[:3] for row in rows]))


def of_all(layers: Sequence[LayerSparsity]) -> tuple[float, int]:
    """Fraction of zeros among the weights of all layers, and the number of weights."""
    total = sum(layer.total for layer in layers)
    return sum(layer.zeros for layer in layers) / max(total, 1), total


def refuse_existing(args: argparse.Namespace) -> None:
    """Replace a file only if asked to."""
    if Path(args.out).exists() and not args.force:
        raise CheckpointError(f'{args.out} exists already; --force replaces it.')


def run_finalize(args: argparse.Namespace) -> None:
    """Write the weights of a training checkpoint, without the state of the run."""
    refuse_existing(args)
    checkpoint = read_checkpoint(args.checkpoint)
    final = finalize_checkpoint(checkpoint)
    path = write_checkpoint(final, args.out, args.force)
    sparsity, total = of_all(layer_sparsity(final['state_dict']))
    print(f'Wrote {len(final["state_dict"])} tensors to {path}; {sparsity:.2%} of {total} weights are zero.')


def run_convert(args: argparse.Namespace) -> None:
    """Write a checkpoint with other names."""
    refuse_existing(args)
    converted = checkpoints.convert_checkpoint(read_checkpoint(args.checkpoint), args.to, args.ema)
    path = write_checkpoint(converted, args.out, args.force)
    wrapper, weights = next(iter(converted.items()))
    print(f'Wrote {len(weights)} tensors under {wrapper} to {path} (names: {args.to}).')


def run_zoo(args: argparse.Namespace) -> None:
    """Print the table of published checkpoints, or of what became of the files in the cache."""
    if args.verify:
        verify_cache()
        return
    rows = checkpoints.zoo_table()
    cached = ['in the cache', *('yes' if checkpoints.cached_path(name).is_file() else 'no' for name in checkpoints.ZOO)]
    print(table([[row[0], here, *row[1:]] for row, here in zip(rows, cached)]))
    print('\nFigures as published by the source; none of them was measured here.')
    print(f'Cache: {checkpoints.cache_dir()}\nA file fetched by hand goes there as <name>.pth.')


def verify_cache() -> None:
    """Hash the files of the cache and print what became of them.

    Raises:
        CheckpointError: Some are other files than they were.
    """
    rows, changed = [['file', 'MB', 'sha256', 'is']], 0
    for path in checkpoints.cached_files(checkpoints.cache_dir()):
        hashes = checkpoints.hashes_of(path, path, checkpoints.ZOO.get(path.stem))
        megabytes = f'{path.stat().st_size / 1e6:.1f}' if hashes.found else '-'
        rows.append([path.name, megabytes, hashes.found or '-', hashes.verdict])
        changed += bool(hashes.found) and not hashes.is_same
    print(table(rows) if rows[1:] else 'The cache is empty.')
    print(f'\nCache: {checkpoints.cache_dir()}')
    if changed:
        raise CheckpointError(
            f'{changed} of {len(rows) - 1} files are not what they were: delete them to get them again, or, for a file '
            'that you have replaced on purpose, its .sha256.'
        )


def main() -> None:
    args = parse_args()
    args.run(args)


if __name__ == '__main__':
    cli.run_tool(main)
