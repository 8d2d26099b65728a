"""Export for deployment, as ONNX, TorchScript or an exported program.

Branches and norms of the backbone are folded first. The file takes images that are normalized as
the config's data preprocessor does it, and gives the class scores of a segmentor at the size of
the image, or with ``--part backbone`` the maps of the backbone. It is compared with the network
before it is kept, and it needs this package no more.

Examples:
    slak-mm export upernet_slak_t_ade20k checkpoint.pth --format onnx --size 512x512
    slak-mm export cascade_mask_rcnn_slak_t_coco checkpoint.pth --part backbone --dynamic size
"""

import argparse
from pathlib import Path

from mmengine.config import Config
from torch import nn

from slak_mm import cli, load_pretrained, switch_to_deploy
from slak_mm.checkpoints import read_checkpoint
from slak_mm.engine.hooks import load_whole_model
from slak_mm.export import SUFFIXES, SegmentationScores, export


def parse_args() -> argparse.Namespace:
    parser = cli.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add('config', help=cli.CONFIG_HELP)
    add('checkpoint', help='file, address or zoo name')
    add('--format', choices=list(SUFFIXES), default='onnx', help='(default: %(default)s)')
    part = 'default: the model of a segmentation config, else the backbone'
    add('--part', choices=['model', 'backbone'], help=part)
    add('--size', type=cli.crop_size, default=(512, 512), metavar='HxW', help='of the images (default: 512x512)')
    varies = 'what may vary later: the number of images (default), or height and width too, in multiples of 32'
    add('--dynamic', choices=['none', 'batch', 'size'], default='batch', help=varies)
    add('--out', type=cli.output_file, help='file to write (default: named like the config, in the current folder)')
    cli.add_cfg_options(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    cfg = cli.load_config(args.config)
    cli.apply_overrides(cfg, args)
    is_segmentor = cli.framework(cfg) == 'mmseg'
    part = args.part or ('model' if is_segmentor else 'backbone')
    if part == 'model' and not is_segmentor:
        raise cli.ConfigOverrideError('Detectors choose boxes by rules that no graph holds: export --part backbone.')
    network = build(cfg, args.checkpoint, part)
    name = Path(cfg.filename).stem + ('' if part == 'model' else '_backbone')
    out = Path(args.out or name + SUFFIXES[args.format])
    difference = export(network, out, args.format, args.size, args.dynamic)
    megabytes = out.stat().st_size / 2**20
    print(f'{out}: {megabytes:.1f} MiB, differs from the network by {difference:.1e} of the largest value')


def build(cfg: Config, source: str, part: str) -> nn.Module:
    """The network with its weights, folded, in eval mode and on the CPU."""
    cli.adapt_to_device(cfg, has_gpu=lambda: False)
    node = cli.model_of(cfg)
    network = cli.build_model(cfg, node if part == 'model' else node.backbone)
    if part == 'backbone':
        load_pretrained(network, source)
    else:
        load_whole_model(network, read_checkpoint(source), source)
    switch_to_deploy(network.eval())
    return SegmentationScores(network) if part == 'model' else network
