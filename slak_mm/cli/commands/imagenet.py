"""ImageNet accuracy of a checkpoint with its head, beside the published one.

The cheapest check of weights before they are built upon. The network is found from the tensors of the checkpoint.
Images are prepared as the published accuracy was measured: for most, the center of 224 pixels of an image whose
shorter side is 256.

Examples:
    slak-mm imagenet slak_t_in1k_300e --data imagenet/val
    slak-mm imagenet checkpoint-best.pth --data imagenet/val --use-ema --amp
    slak-mm imagenet convnext_tiny.fb_in1k --data imagenet/val
    slak-mm imagenet slak_t_in1k_300e --data images --labels val.txt
"""

import argparse
import json
from pathlib import Path

import torch

from slak_mm import cli
from slak_mm._files import replacing
from slak_mm.cli import ConfigOverrideError


def parse_args() -> argparse.Namespace:
    parser = cli.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add('checkpoint', metavar='CHECKPOINT_OR_NAME', help='file, address or zoo name, or a timm model with its weights')
    add('--data', required=True, help='folder with one folder per class, or with images that --labels knows')
    add('--labels', metavar='FILE', help='lines of an image name and its class, a number from 0 or a WordNet id')
    add('--model', metavar='NAME', help='timm name of the network in a file (default: found from its tensors)')
    add('--use-ema', action='store_true', help='take the moving average of the weights in the checkpoint')
    add('--size', type=cli.image_size, metavar='HxW', help="of the images (default: the network's)")
    crop = "side of the center that is cut out, as a fraction of the resized image (default: the network's)"
    add('--crop-pct', type=crop_pct, metavar='FRACTION', help=crop)
    add('--batch-size', type=cli.positive_int, default=64, help='(default: %(default)s)')
    add('--workers', type=cli.non_negative_int, default=2, help='processes that read images (default: %(default)s)')
    add('--device', default='cuda:0' if torch.cuda.is_available() else 'cpu', help='(default: %(default)s)')
    add('--amp', action='store_true', help='mixed precision: float16 on a GPU, bfloat16 on a CPU')
    add('--deploy', action='store_true', help='fold branches and norms first')
    add('--json', type=cli.output_file, metavar='OUT', help='write all figures to this file')
    return parser.parse_args()


def crop_pct(text: str) -> float:
    """Argument type: a fraction from 0, excluded, to 1."""
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f'must be above 0 and at most 1, got {text}')
    return value


def main() -> None:
    args = parse_args()
    try:
        from slak_mm.cli import imagenet
    except ImportError as error:
        raise ConfigOverrideError(f'This needs timm and tqdm, pip install "slak-mm[timm]": {error}.') from error
    device = cli.usable_device(args.device)
    for path in filter(None, (args.data, args.labels)):  # before a download
        if not Path(path).exists():
            raise ConfigOverrideError(f'There is no {path}.')
    network = imagenet.load_network(args.checkpoint, args.model, args.use_ema)
    labels = Path(args.labels) if args.labels else None
    images = imagenet.LabelledImages(Path(args.data), network.model.num_classes, labels)
    config = imagenet.data_config(network.model, args.size, args.crop_pct)
    model = imagenet.fold(network.model) if args.deploy else network.model
    size = 'x'.join(map(str, config['input_size'][1:]))
    print(f'{args.checkpoint} ({network.name}): {len(images):,} images, {size}, crop {config["crop_pct"]:g}, {device}')
    result = imagenet.evaluate(model, images, config, device, args.batch_size, args.workers, args.amp)
    sentence, is_within = imagenet.verdict(network, result)
    print(f'top-1 {result["top1"]:.2f} %, top-5 {result["top5"]:.2f} %, {result["images_per_second"]:.1f} images/s')
    print(sentence)
    if args.json:
        record = dict(
            checkpoint=args.checkpoint, network=network.name, use_ema=args.use_ema, deploy=args.deploy, amp=args.amp
        )
        record |= dict(config, **result, published=network.published, is_within_0_1=is_within)
        with replacing(Path(args.json)) as part:
            part.write_text(json.dumps(record, indent=1) + '\n')
