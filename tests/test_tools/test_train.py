"""``tools/train.py`` as a user runs it."""

import re
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
from mmengine.config import Config

from slak_mm.checkpoints import to_official

ROOT = Path(__file__).resolve().parents[2]
REAL_ADE = ROOT.parent / 'shared' / 'data' / 'ade' / 'ADEChallengeData2016'


@pytest.fixture
def small(demo_data):
    """Arguments for some hundredths of a second per iteration."""
    return ['--data-root', demo_data, '--crop-size', '64', '--batch-size', '2', '--num-workers', '0', '--seed', '5']


def load(path):
    return torch.load(path, map_location='cpu', weights_only=False)


def assert_same_run(ours, theirs):
    """Weights, buffers, optimizer and schedules have the same bits."""
    assert ours['meta']['iter'] == theirs['meta']['iter']
    assert ours['state_dict'].keys() == theirs['state_dict'].keys()
    for key, value in ours['state_dict'].items():
        assert torch.equal(value, theirs['state_dict'][key]), key
    states = ours['optimizer']['state'], theirs['optimizer']['state']
    assert states[0].keys() == states[1].keys() and states[0]
    for index, state in states[0].items():
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(states[1][index][name])), (index, name)
    assert ours['param_schedulers'] == theirs['param_schedulers']


# ---------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    'arguments,message',
    [
        (['nowhere/upernet.py'], 'no config file "nowhere/upernet.py"'),
        ([str(ROOT / 'configs/upernet_slak_x_ade20k.py')], 'Did you mean .*upernet_slak_t_ade20k.py'),
        (['TTA_CONFIG'], 'for testing only'),
        (['CONFIG'], r'slak_t_in1k_300e(?s:.*)--from-scratch'),
        (['CONFIG', '--from-scratch'], 'data/ade/ADEChallengeData2016" does not exist.*--data-root'),
        (['CONFIG', '--from-scratch', '--data-root', '/nowhere'], '"/nowhere" does not exist'),
        (['CONFIG', '--from-scratch', '--amp'], 'needs a GPU'),
        (['CONFIG', '--resume', '/nowhere.pth'], '/nowhere.pth'),
        (['CONFIG', '--launcher', 'pytorch'], 'torchrun'),
        (['CONFIG', '--launcher', 'slurm'], 'srun'),
        (
            ['CONFIG', '--from-scratch', '--cfg-options', 'model.backbone.drop_path_rate.x=1'],
            '--cfg-options does not fit',
        ),
        (
            ['CONFIG', '--data-root', 'DATA', '--cfg-options', 'model.backbone.init_cfg=None'],
            'names no pretrained weights.*--from-scratch',
        ),
        (
            ['CONFIG', '--data-root', 'DATA', '--from-scratch', '--cfg-options', 'model.backbone.arch=huge'],
            "no arch 'huge'",
        ),
        (
            ['CONFIG', '--data-root', 'DATA', '--from-scratch', '--cfg-options', 'model.decode_head.type=NoHead'],
            'NoHead',
        ),
        *(
            (['CONFIG', '--data-root', 'DATA', '--from-scratch', '--cfg-options', f'train_cfg.{setting}'], message)
            for setting, message in (
                ('val_interval=0', 'val_interval must be a number from 1, got 0; .*val_evaluator'),
                ('dynamic_intervals=[(2,0)]', r'dynamic_intervals\[0\] must be'),
                ('max_iters=-1', 'max_iters must be a number from 1, got -1'),
            )
        ),
    ],
)
def test_one_readable_sentence(
    call_tool, config_path, tta_config_path, demo_data, tmp_path, monkeypatch, arguments, message
):
    if torch.cuda.is_available() and '--amp' in arguments:
        pytest.skip('mixed precision works on this machine')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('SLAK_MM_CACHE', str(tmp_path / 'cache'))
    # A download must not be tried: an address that refuses connections at once.
    for variable in ('http_proxy', 'https_proxy', 'HTTP_PROXY', 'HTTPS_PROXY'):
        monkeypatch.setenv(variable, 'http://127.0.0.1:9')
    for variable in ('RANK', 'SLURM_PROCID'):
        monkeypatch.delenv(variable, raising=False)
    known = dict(CONFIG=config_path, TTA_CONFIG=tta_config_path, DATA=demo_data)
    result = call_tool('train', *[known.get(word, word) for word in arguments])
    assert result.code == 1
    error = result.err[result.err.index('error: ') :]
    assert re.search(message, error), error
    assert 'Traceback' not in result.err
    assert len(error.strip().splitlines()) <= 6


@pytest.mark.parametrize(
    'arguments',
    [
        ['--crop-size', '0'],
        ['--crop-size', '1x2x3'],
        ['--batch-size', '0'],
        ['--max-iters', 'x'],
        ['--num-workers', '-1'],
        ['--cfg-options', 'novalue'],
        ['--cfg-options', "a={'b':(1,2)}"],
    ],
)
def test_wrong_arguments_get_the_usage(call_tool, config_path, arguments):
    result = call_tool('train', config_path, *arguments)
    assert result.code == 2 and 'usage:' in result.err


def test_debug_shows_the_traceback(call_tool, config_path):
    result = call_tool('train', 'nowhere.py', '--debug')
    assert result.code == 1 and 'Traceback' in result.err


def test_batch_norm_on_one_image_is_explained(call_tool, config_path, small, tiny, tmp_path):
    result = call_tool(
        'train',
        config_path,
        *small,
        '--batch-size',
        '1',
        '--from-scratch',
        '--max-iters',
        '1',
        '--work-dir',
        tmp_path / 'w',
        '--cfg-options',
        *tiny,
    )
    assert result.code == 1 and 'raise --batch-size' in result.err


def test_unreadable_image_is_named(call_tool, config_path, small, tiny, tmp_path):
    for split in ('training', 'validation'):
        for kind, suffix in (('images', 'jpg'), ('annotations', 'png')):
            path = tmp_path / 'data' / kind / split / f'broken.{suffix}'
            path.parent.mkdir(parents=True)
            path.write_bytes(b'no image')
    result = call_tool(
        'train',
        config_path,
        *small,
        '--data-root',
        tmp_path / 'data',
        '--from-scratch',
        '--max-iters',
        '1',
        '--work-dir',
        tmp_path / 'w',
        '--cfg-options',
        *tiny,
    )
    assert result.code == 1
    assert re.search(r'error: The image .*broken.jpg cannot be read', result.err)


# ----------------------------------------------------------------------------------------- runs


def test_trains_saves_and_tests(call_tool, config_path, small, tiny, tmp_path, demo_data):
    work_dir = tmp_path / 'work'
    result = call_tool(
        'train',
        config_path,
        *small,
        '--from-scratch',
        '--max-iters',
        '20',
        '--work-dir',
        work_dir,
        '--cfg-options',
        *tiny,
        'train_cfg.val_interval=20',
        'default_hooks.checkpoint.interval=20',
        'optim_wrapper.optimizer.lr=0.01',
    )
    assert result.code == 0, result.text
    assert 'FROM SCRATCH' in result.text and 'slak_t_in1k_300e' in result.text
    losses = [float(loss) for loss in re.findall(r'Iter\(train\).* loss: ([\d.]+)', result.text)]
    assert len(losses) == 10 and losses[-1] < 0.8 * losses[0]
    assert re.search(r'Iter\(train\).*eta: \d', result.text)
    checkpoint = load(work_dir / 'iter_20.pth')
    assert checkpoint['meta']['seed'] == 5
    dumped = Config.fromfile(next((work_dir).glob('*.py')))
    assert dumped.train_dataloader.dataset.data_root == demo_data

    trained = re.search(r'Iter\(val\) .*mIoU: ([\d.]+)', result.text)[1]
    tested = call_tool(
        'test',
        config_path,
        work_dir / 'iter_20.pth',
        '--data-root',
        demo_data,
        '--crop-size',
        '64',
        '--num-workers',
        '0',
        '--work-dir',
        tmp_path / 'test',
        '--out',
        tmp_path / 'labels',
        '--show-dir',
        tmp_path / 'shown',
        '--cfg-options',
        *tiny,
    )
    assert tested.code == 0, tested.text
    assert f'mIoU: {trained}' in tested.text
    assert len(list((tmp_path / 'labels').glob('*.png'))) == 2
    assert len(list((tmp_path / 'shown').rglob('*.png'))) == 2

    # The same weights as the official code in mmseg 0.x saved them.
    official = {
        f'backbone.{key}': value
        for key, value in to_official(
            {key[9:]: value for key, value in checkpoint['state_dict'].items() if key.startswith('backbone.')}
        ).items()
    }
    official.update({key: value for key, value in checkpoint['state_dict'].items() if not key.startswith('backbone.')})
    torch.save(dict(meta=dict(CLASSES=('wall', 'building')), state_dict=official), tmp_path / 'official.pth')
    again = call_tool(
        'test',
        config_path,
        tmp_path / 'official.pth',
        '--data-root',
        demo_data,
        '--crop-size',
        '64',
        '--num-workers',
        '0',
        '--work-dir',
        tmp_path / 'test',
        '--cfg-options',
        *tiny,
    )
    assert again.code == 0, again.text
    assert f'mIoU: {trained}' in again.text

    # Fine-tuning from these weights by the runner's own `load_from`.
    onward = call_tool(
        'train',
        config_path,
        *small,
        '--max-iters',
        '1',
        '--work-dir',
        tmp_path / 'onward',
        '--cfg-options',
        *tiny,
        f'load_from={tmp_path / "official.pth"}',
        'model.backbone.init_cfg=None',
        'optim_wrapper.optimizer.lr=0.',
    )
    assert onward.code == 0, onward.text
    tuned = load(tmp_path / 'onward' / 'iter_1.pth')['state_dict']
    for key, value in checkpoint['state_dict'].items():
        if 'running' not in key and 'tracked' not in key:
            assert torch.equal(value, tuned[key]), key


def test_pretrained_weights_arrive(call_tool, config_path, small, tiny, tmp_path):
    """``init_cfg`` of the config, with official names, into the backbone and nowhere else."""
    from mmengine.registry import MODELS

    torch.manual_seed(3)
    backbone = MODELS.build(
        dict(
            type='SLaK',
            arch=dict(depths=(1, 1, 1, 1), dims=(8, 16, 24, 32)),
            width_factor=1.0,
            kernel_sizes=(7, 7, 7, 7),
            small_kernel=3,
            norm_cfg=dict(type='BN'),
            out_norm=False,
        )
    )
    torch.save(dict(model=to_official(backbone.state_dict())), tmp_path / 'in1k.pth')
    result = call_tool(
        'train',
        config_path,
        *small,
        '--max-iters',
        '1',
        '--sparse',
        'off',
        '--work-dir',
        tmp_path / 'w',
        '--cfg-options',
        *tiny,
        'optim_wrapper.optimizer.lr=0.',
        f'model.backbone.init_cfg.checkpoint={tmp_path / "in1k.pth"}',
    )
    assert result.code == 0, result.text
    saved = load(tmp_path / 'w' / 'iter_1.pth')['state_dict']
    for key, value in backbone.state_dict().items():
        if 'running' not in key and 'tracked' not in key:
            assert torch.equal(value, saved[f'backbone.{key}']), key


def test_auto_scale_lr(call_tool, config_path, small, tiny, tmp_path):
    result = call_tool(
        'train',
        config_path,
        *small,
        '--from-scratch',
        '--auto-scale-lr',
        '--max-iters',
        '2',
        '--work-dir',
        tmp_path / 'w',
        '--cfg-options',
        *tiny,
    )
    assert result.code == 0, result.text
    # A batch of 2 for a rate that is meant for 16.
    group = load(tmp_path / 'w' / 'iter_2.pth')['optimizer']['param_groups'][-1]
    assert group['initial_lr'] == pytest.approx(1e-4 * 2 / 16)


@pytest.mark.skipif(not REAL_ADE.is_dir(), reason=f'{REAL_ADE} is not there')
def test_real_images(call_tool, config_path, tiny, tmp_path):
    common = ['--data-root', REAL_ADE, '--crop-size', '64', '--num-workers', '0', '--work-dir', tmp_path / 'w']
    result = call_tool(
        'train',
        config_path,
        *common,
        '--batch-size',
        '2',
        '--from-scratch',
        '--max-iters',
        '2',
        '--cfg-options',
        *tiny,
        'train_cfg.val_interval=2',
    )
    assert result.code == 0, result.text
    result = call_tool('test', config_path, tmp_path / 'w' / 'iter_2.pth', *common, '--cfg-options', *tiny)
    assert result.code == 0 and 'mIoU' in result.text


def test_detection_configs(call_tool, coco_data, tmp_path):
    """A config of mmdet's, in epochs, with mmdet's own backbone."""
    pytest.importorskip('mmcv._ext', reason="detection needs mmcv's compiled operators")
    import mmdet

    config = Path(mmdet.__file__).parent / '.mim/configs/retinanet/retinanet_r18_fpn_1x_coco.py'
    sizes = [
        f'{loader}_dataloader.dataset.pipeline.{place}.scale=(96,64)'
        for loader, place in (('train', 2), ('val', 1), ('test', 1))
    ]
    # Untrained, it is sure of nothing: keep all boxes.
    sizes.append('model.test_cfg.score_thr=0.')
    common = ['--data-root', coco_data, '--num-workers', '0', '--work-dir', tmp_path / 'w']
    result = call_tool(
        'train',
        config,
        *common,
        '--from-scratch',
        '--max-iters',
        '2',
        '--batch-size',
        '2',
        '--seed',
        '1',
        '--cfg-options',
        *sizes,
    )
    assert result.code == 0, result.text
    assert 'torchvision://resnet18' in result.text and 'Iter(train) [2/2]' in result.text
    result = call_tool(
        'test', config, tmp_path / 'w' / 'iter_2.pth', *common, '--out', tmp_path / 'out.pkl', '--cfg-options', *sizes
    )
    assert result.code == 0, result.text
    assert 'bbox_mAP' in result.text and (tmp_path / 'out.pkl').is_file()
    result = call_tool(
        'infer',
        config,
        tmp_path / 'w' / 'iter_2.pth',
        f'{coco_data}/val2017',
        '--out-dir',
        tmp_path / 'drawn',
        '--device',
        'cpu',
        '--score-thr',
        '0.01',
        '--cfg-options',
        *sizes,
    )
    assert result.code == 0, result.text
    assert len(list((tmp_path / 'drawn').glob('*.png'))) == 3


# ---------------------------------------------------------------------------------------- resume


def test_killed_and_resumed_is_the_same_run(call_tool, start_tool, config_path, small, tiny, tmp_path):
    arguments = [
        config_path,
        *small,
        '--max-iters',
        '12',
        '--cfg-options',
        *tiny,
        'default_hooks.checkpoint.interval=3',
        'train_cfg.val_interval=5',
    ]
    whole = start_tool('train', *arguments, '--work-dir', tmp_path / 'whole', '--from-scratch')
    killed = start_tool('train', *arguments, '--work-dir', tmp_path / 'killed', '--from-scratch')
    last = tmp_path / 'killed' / 'last_checkpoint'
    deadline = time.monotonic() + 120
    while not last.is_file() and killed.poll() is None:
        assert time.monotonic() < deadline, 'no checkpoint within two minutes'
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    output, _ = whole.communicate(timeout=120)
    assert whole.returncode == 0, output
    assert not (tmp_path / 'killed' / 'iter_12.pth').is_file(), 'ended before it was killed'

    # Another number of data workers and no seed: neither changes what the run does.
    arguments[arguments.index('--num-workers') + 1] = '2'
    position = arguments.index('--seed')
    del arguments[position : position + 2]
    resumed = start_tool('train', *arguments, '--work-dir', tmp_path / 'killed', '--resume')
    output, _ = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, output
    assert 'resumed epoch: 0, iter: ' in output
    assert_same_run(load(tmp_path / 'whole' / 'iter_12.pth'), load(tmp_path / 'killed' / 'iter_12.pth'))


def test_resume_without_a_checkpoint(call_tool, config_path, small, tiny, tmp_path):
    arguments = [
        config_path,
        *small,
        '--max-iters',
        '1',
        '--work-dir',
        tmp_path / 'w',
        '--resume',
        '--cfg-options',
        *tiny,
    ]
    result = call_tool('train', *arguments, '--from-scratch')
    assert result.code == 0, result.text
    assert 'no checkpoint, training starts at the beginning' in result.text
    # mmengine's own setting takes the same way: past a damaged file and a pointer to nowhere.
    (tmp_path / 'w' / 'last_checkpoint').write_text('/nowhere/iter_3.pth')
    (tmp_path / 'w' / 'iter_3.pth').write_bytes(b'x')
    onward = [value for value in arguments if value != '--resume']
    onward[onward.index('--max-iters') + 1] = '2'
    result = call_tool('train', *onward, 'resume=True')
    assert result.code == 0 and re.search('goes on from .*iter_1.pth.*Passed over.*iter_3.pth', result.text), (
        result.text
    )
    assert load(tmp_path / 'w' / 'iter_2.pth')['meta']['iter'] == 2
    assert next(tmp_path.glob('w/earlier_*/iter_3.pth')).read_bytes() == b'x'
    # A file with weights only is no run to resume.
    state = load(tmp_path / 'w' / 'iter_1.pth')['state_dict']
    torch.save(dict(state_dict=state), tmp_path / 'weights.pth')
    arguments[arguments.index('--resume') + 1 : arguments.index('--resume') + 1] = [tmp_path / 'weights.pth']
    result = call_tool('train', *arguments)
    assert result.code == 1 and 'nothing to resume' in result.text


# ----------------------------------------------------------------------------------- distributed


def free_port():
    with socket.socket() as listener:
        listener.bind(('127.0.0.1', 0))
        return listener.getsockname()[1]


def test_two_processes_on_the_cpu(start_tool, config_path, small, tiny, tmp_path):
    process = start_tool(
        'train',
        config_path,
        *small,
        '--from-scratch',
        '--max-iters',
        '2',
        '--launcher',
        'pytorch',
        '--work-dir',
        tmp_path / 'w',
        '--cfg-options',
        *tiny,
        'train_cfg.val_interval=2',
        launcher=['-m', 'torch.distributed.run', '--nproc_per_node=2', f'--master_port={free_port()}'],
    )
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    # Both processes share the two validation images.
    assert 'Iter(train) [2/2]' in output and 'Iter(val) [1/1]' in output
    assert 'mIoU' in output
    assert (tmp_path / 'w' / 'iter_2.pth').is_file()
