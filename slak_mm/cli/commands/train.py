"""Train a segmentor or detector.

The config is a file, or the name of one of this package's. Logs, checkpoints and the config as it was used go to the
work dir. An interrupted run goes on exactly where it was with --resume.

Examples:
    slak-mm train upernet_slak_t_ade20k --data-root data/ADEChallengeData2016
    slak-mm train my_config.py --resume --vis tensorboard
    torchrun --nproc_per_node 8 -m slak_mm train upernet_slak_t_ade20k --launcher pytorch --amp
"""

import argparse
import logging

from mmengine.config import Config
from mmengine.logging import print_log

from slak_mm import cli


def parse_args() -> argparse.Namespace:
    parser = cli.ArgumentParser(description=__doc__)
    cli.add_config_arguments(parser)
    add = parser.add_argument
    resume = 'go on from a checkpoint of an earlier run (default: the newest of the work dir)'
    add('--resume', nargs='?', const='auto', metavar='CHECKPOINT', help=resume)
    add('--from-scratch', action='store_true', help='start from random weights, whatever the config names')
    sparse = (
        'sparse training: static keeps the masks, set, rigl and momentum change them, slak_t, slak_s, slak_b and '
        'shiftwise are the published trainings, off is dense (default: as the config says)'
    )
    add('--sparse', choices=cli.SPARSE_CHOICES, metavar='HOW', help=sparse)
    sparsity = 'share of weights to set to zero, instead of those that are zero'
    add('--sparsity', type=cli.share, metavar='S', help=sparsity)
    add('--amp', action='store_true', help='mixed precision (GPU only)')
    add('--auto-scale-lr', action='store_true', help='scale the learning rate with the batch of all processes')
    add('--seed', type=cli.non_negative_int, help='(default: a random one)')
    add('--deterministic', action='store_true', help='deterministic GPU kernels, where there are any; slower')
    vis = f'log to {", ".join(cli.VIS_BACKENDS)}, too; several are separated by commas, or the option is repeated'
    add('--vis', type=cli.vis_backends, action='extend', metavar='NAME', help=vis)
    cli.add_override_arguments(parser, training=True)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    cfg = cli.load_config(args.config)
    if cli.model_of(cfg) is not cfg.model:
        raise cli.ConfigOverrideError(
            f'{args.config} is for testing only (its model is test-time augmentation); train with the config that it '
            'inherits from.'
        )
    cli.apply_overrides(cfg, args)
    if args.auto_scale_lr:
        if 'base_batch_size' not in (cfg.get('auto_scale_lr') or {}):
            raise cli.ConfigOverrideError(
                '--auto-scale-lr needs auto_scale_lr.base_batch_size in the config: the batch that its learning '
                'rate is meant for.'
            )
        cfg.auto_scale_lr.enable = True
    if args.seed is not None or args.deterministic:
        randomness = dict(cfg.get('randomness') or {}, deterministic=args.deterministic)
        cfg.randomness = dict(randomness, seed=args.seed if args.seed is not None else randomness.get('seed'))
    cli.init_distributed(cfg, args)

    with cli.own_work_dir(cfg):
        train(cfg, args)


def train(cfg: Config, args: argparse.Namespace) -> None:
    """Train in a work dir that no other process trains in."""
    resume = args.resume or cfg.get('resume')
    if resume is True:
        resume = cfg.get('load_from') or 'auto'
    resumed = cli.prepare_resume(cfg, resume) if resume else None
    removed: list[tuple[str, str]] = []
    if resumed is None:
        if args.from_scratch:
            removed = cli.remove_weights(cfg)
            cli.masks_from_scratch(cfg)
        else:
            cli.check_weights(cfg, args.config)
    cli.check_data(cfg, ('train_dataloader', 'val_dataloader'))
    cli.check_annotations(cfg, ('train_dataloader', 'val_dataloader'))

    if args.vis:
        cli.place_vis(cfg, resumed is not None)

    runner = cli.build_runner(cfg, ['train', 'val'])
    if args.from_scratch and resumed is None:
        left_out = ', '.join(f'{source} ({place})' for place, source in removed) or 'none named'
        text = f'FROM SCRATCH: training starts from RANDOM weights; left out: {left_out}.'
        print_log(text, logger='current', level=logging.WARNING)
    runner.train()
