"""Evaluate a checkpoint.

The metrics are those of the config's test_evaluator, on the data of its test_dataloader.

Examples:
    slak-mm test upernet_slak_t_ade20k work_dirs/upernet_slak_t_ade20k/iter_160000.pth --tta
    slak-mm test upernet_slak_t_ade20k checkpoint.pth --show-dir pictures --out label_maps
    torchrun --nproc_per_node 8 -m slak_mm test my_config.py checkpoint.pth --launcher pytorch
"""

import argparse
from typing import Any

import torch
from mmengine.config import Config

from slak_mm import cli
from slak_mm.checkpoints import read_checkpoint
from slak_mm.engine.hooks import load_whole_model, unwrap_model


def parse_args() -> argparse.Namespace:
    parser = cli.ArgumentParser(description=__doc__)
    cli.add_config_arguments(parser)
    parser.add_argument('checkpoint', help='file, address or zoo name; official checkpoints are converted')
    parser.add_argument('--tta', action='store_true', help='multi-scale and flip')
    out = 'save the predictions: a folder for label maps (segmentation), a .pkl file (detection)'
    parser.add_argument('--out', help=out)
    parser.add_argument('--show-dir', type=cli.output_folder, help='save pictures of the predictions to this folder')
    cli.add_override_arguments(parser, training=False)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    cfg = cli.load_config(args.config)
    cli.apply_overrides(cfg, args)
    if args.tta:
        cli.use_test_time_augmentation(cfg)
    boxes_alone = cli.tests_boxes_alone(cfg)
    if args.show_dir:
        save_pictures(cfg, args.show_dir)
    if args.out:
        save_predictions(cfg, args.out)
    cli.init_distributed(cfg, args)
    cli.check_data(cfg, ('test_dataloader',))
    cli.check_annotations(cfg, ('test_dataloader',))
    checkpoint = read_checkpoint(args.checkpoint)
    # All weights come from the checkpoint.
    cli.remove_weights(cfg)
    cfg.resume = False
    training = 'train_cfg train_dataloader optim_wrapper param_scheduler auto_scale_lr'
    for key in f'{training} val_cfg val_dataloader val_evaluator'.split():
        cfg.pop(key, None)

    runner = cli.build_runner(cfg, ['test'])
    load_whole_model(runner.model, checkpoint, args.checkpoint)
    model: Any = unwrap_model(runner.model)
    if boxes_alone:
        model.roi_head.mask_head = None
    if args.compile:  # mmengine compiles the training step alone
        model.forward = torch.compile(model.forward, **(cfg.compile if isinstance(cfg.compile, dict) else {}))
    runner.test()


def save_pictures(cfg: Config, folder: str) -> None:
    """Let the framework's visualization hook save pictures."""
    hook = (cfg.get('default_hooks') or {}).get('visualization')
    if hook is None or cfg.get('visualizer') is None:
        raise cli.ConfigOverrideError('--show-dir needs a config with a visualizer and default_hooks.visualization.')
    hook.draw = True
    hook.interval = 1
    cfg.visualizer.save_dir = folder


def save_predictions(cfg: Config, out: str) -> None:
    """Let the evaluator save what the model predicts."""
    evaluators = cfg.test_evaluator if isinstance(cfg.test_evaluator, list) else [cfg.test_evaluator]
    if cli.framework(cfg) == 'mmdet':
        if not out.endswith(('.pkl', '.pickle')):
            raise cli.ConfigOverrideError(f'--out of a detection config must be a .pkl file, got "{out}".')
        cli.check_output(out, is_folder=False)
        evaluators.append(dict(type='mmdet.DumpDetResults', out_file_path=out))
    else:
        cli.check_output(out, is_folder=True)
        for evaluator in evaluators:
            if cli.type_name(evaluator) == 'IoUMetric':
                evaluator.update(output_dir=out, keep_results=True)
    cfg.test_evaluator = evaluators
