"""``tools/train.py`` as a user runs it."""

import re
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
from conftest import TINY_SLAK_BACKBONE, assert_same, load, officially_named
from mmengine.config import Config
from mmengine.registry import MODELS

from slak_mm.checkpoints import to_official

ROOT = Path(__file__).resolve().parents[2]
REAL_ADE = ROOT.parent / 'shared' / 'data' / 'ade' / 'ADEChallengeData2016'


def assert_same_run(ours, theirs):
    """Weights, buffers, optimizer and schedules have the same bits."""
    assert ours['meta']['iter'] == theirs['meta']['iter']
    for key in ('state_dict', 'optimizer', 'param_schedulers'):
        assert_same(ours[key], theirs[key], key)


SCRATCH = ['--from-scratch', '--cfg-options']
DATA = ['--data-root', 'DATA']


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
        (['CONFIG', *SCRATCH, 'model.backbone.drop_path_rate.x=1'], '--cfg-options does not fit'),
        (['CONFIG', *DATA, '--cfg-options', 'model.backbone.init_cfg=None'], 'names no .* weights.*--from-scratch'),
        (['CONFIG', *DATA, *SCRATCH, 'model.backbone.arch=huge'], "no arch 'huge'"),
        (['CONFIG', *DATA, *SCRATCH, 'model.decode_head.type=NoHead'], 'NoHead'),
        (['CONFIG', *SCRATCH, 'train_cfg.val_interval=0'], 'val_interval must be .* from 1, got 0; .*val_evaluator'),
        (['CONFIG', *SCRATCH, 'train_cfg.dynamic_intervals=[(2,0)]'], r'dynamic_intervals\[0\] must be'),
        (['CONFIG', *SCRATCH, 'train_cfg.max_iters=-1'], 'max_iters must be a number from 1, got -1'),
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
    result = call_tool('train', *[known.get(word, word) for word in arguments], code=1)
    error = result.err[result.err.index('error: ') :]
    assert re.search(message, error), error
    assert len(error.strip().splitlines()) <= 6


@pytest.mark.parametrize(
    'arguments',
    [
        *('--crop-size 0', '--crop-size 1x2x3', '--batch-size 0', '--max-iters x', '--num-workers -1'),
        *('--sparse half', '--sparsity 1', '--sparsity 0.', '--cfg-options novalue', "--cfg-options a={'b':(1,2)}"),
    ],
)
def test_wrong_arguments_get_the_usage(call_tool, config_path, arguments):
    assert 'usage:' in call_tool('train', config_path, arguments, code=2).err


def test_batch_norm_on_one_image_is_explained(train):
    assert 'raise --batch-size' in train('--batch-size 1 --from-scratch --max-iters 1', code=1).err


def test_unreadable_image_is_named(train, tmp_path):
    for split in ('training', 'validation'):
        for kind, suffix in (('images', 'jpg'), ('annotations', 'png')):
            path = tmp_path / 'data' / kind / split / f'broken.{suffix}'
            path.parent.mkdir(parents=True)
            path.write_bytes(b'no image')
    result = train('--data-root', tmp_path / 'data', '--from-scratch --max-iters 1', code=1)
    assert re.search(r'error: The image .*broken.jpg cannot be read', result.err)


def test_trains_saves_and_tests(call_tool, train, config_path, tiny, tmp_path, demo_data):
    options = ['train_cfg.val_interval=20', 'default_hooks.checkpoint.interval=20', 'optim_wrapper.optimizer.lr=0.01']
    result = train('--from-scratch --max-iters 20', options=options, code=0)
    assert 'FROM SCRATCH' in result.text and 'slak_t_in1k_300e' in result.text
    losses = [float(loss) for loss in re.findall(r'Iter\(train\).* loss: ([\d.]+)', result.text)]
    assert len(losses) == 10 and losses[-1] < 0.8 * losses[0]
    assert re.search(r'Iter\(train\).*eta: \d', result.text)
    checkpoint = load(tmp_path / 'work' / 'iter_20.pth')
    assert checkpoint['meta']['seed'] == 5
    dumped = Config.fromfile(next((tmp_path / 'work').glob('*.py')))
    assert dumped.train_dataloader.dataset.data_root == demo_data

    trained = re.search(r'Iter\(val\) .*mIoU: ([\d.]+)', result.text)[1]
    common = ['--data-root', demo_data, '--crop-size 64 --num-workers 0', '--work-dir', tmp_path / 'test']
    outputs = ['--out', tmp_path / 'labels', '--show-dir', tmp_path / 'shown', '--cfg-options', *tiny]
    tested = call_tool('test', config_path, tmp_path / 'work' / 'iter_20.pth', *common, *outputs, code=0)
    assert f'mIoU: {trained}' in tested.text
    assert len(list((tmp_path / 'labels').glob('*.png'))) == 2
    assert len(list((tmp_path / 'shown').rglob('*.png'))) == 2

    # The same weights as the official code in mmseg 0.x saved them.
    meta, official = dict(CLASSES=('wall', 'building')), officially_named(checkpoint['state_dict'])
    torch.save(dict(meta=meta, state_dict=official), tmp_path / 'official.pth')
    again = call_tool('test', config_path, tmp_path / 'official.pth', *common, '--cfg-options', *tiny, code=0)
    assert f'mIoU: {trained}' in again.text

    # Fine-tuning from these weights by the runner's own `load_from`.
    options = [f'load_from={tmp_path / "official.pth"}', 'model.backbone.init_cfg=None']
    train('--max-iters 1', work='onward', options=[*options, 'optim_wrapper.optimizer.lr=0.'], code=0)
    tuned = load(tmp_path / 'onward' / 'iter_1.pth')['state_dict']
    for key, value in checkpoint['state_dict'].items():
        if 'running' not in key and 'tracked' not in key:
            assert torch.equal(value, tuned[key]), key


def test_pretrained_weights_arrive(train, tmp_path):
    """``init_cfg`` of the config, with official names, into the backbone and nowhere else."""
    torch.manual_seed(3)
    backbone = MODELS.build(TINY_SLAK_BACKBONE)
    torch.save(dict(model=to_official(backbone.state_dict())), tmp_path / 'in1k.pth')
    weights = f'model.backbone.init_cfg.checkpoint={tmp_path / "in1k.pth"}'
    train('--max-iters 1 --sparse off', options=['optim_wrapper.optimizer.lr=0.', weights], code=0)
    saved = load(tmp_path / 'work' / 'iter_1.pth')['state_dict']
    for key, value in backbone.state_dict().items():
        if 'running' not in key and 'tracked' not in key:
            assert torch.equal(value, saved[f'backbone.{key}']), key


def test_auto_scale_lr(train, tmp_path):
    train('--from-scratch --auto-scale-lr --max-iters 2', code=0)
    # A batch of 2 for a rate that is meant for 16.
    group = load(tmp_path / 'work' / 'iter_2.pth')['optimizer']['param_groups'][-1]
    assert group['initial_lr'] == pytest.approx(1e-4 * 2 / 16)


@pytest.mark.skipif(not REAL_ADE.is_dir(), reason=f'{REAL_ADE} is not there')
def test_real_images(call_tool, train, config_path, tiny, tmp_path):
    data = ['--data-root', REAL_ADE, '--crop-size 64 --num-workers 0']
    train(*data, '--from-scratch --max-iters 2', options=['train_cfg.val_interval=2'], code=0)
    common = [*data, '--work-dir', tmp_path / 'w', '--cfg-options', *tiny]
    assert 'mIoU' in call_tool('test', config_path, tmp_path / 'work' / 'iter_2.pth', *common, code=0).text


def test_detection_configs(call_tool, demo_coco, tmp_path):
    """A config of mmdet's, in epochs, with mmdet's own backbone."""
    pytest.importorskip('mmcv._ext', reason="detection needs mmcv's compiled operators")
    import mmdet

    config = Path(mmdet.__file__).parent / '.mim/configs/retinanet/retinanet_r18_fpn_1x_coco.py'
    pipelines = [f'{name}_dataloader.dataset.pipeline' for name in ('train', 'val', 'test')]
    options = ['--cfg-options', *(f'{name}.{2 - (number > 0)}.scale=(96,64)' for number, name in enumerate(pipelines))]
    options.append('model.test_cfg.score_thr=0.')  # untrained, it is sure of nothing: keep all boxes
    common = ['--data-root', demo_coco, '--num-workers 0', '--work-dir', tmp_path / 'w']
    scratch = '--from-scratch --max-iters 2 --batch-size 2 --seed 1'
    result = call_tool('train', config, *common, scratch, *options, code=0)
    assert 'torchvision://resnet18' in result.text and 'Iter(train) [2/2]' in result.text
    weights, out = tmp_path / 'w' / 'iter_2.pth', ['--out', tmp_path / 'out.pkl']
    result = call_tool('test', config, weights, *common, *out, *options, code=0)
    assert 'bbox_mAP' in result.text and (tmp_path / 'out.pkl').is_file()
    out = ['--out-dir', tmp_path / 'drawn', '--device cpu --score-thr 0.01']
    call_tool('infer', config, weights, f'{demo_coco}/val2017', *out, *options, code=0)
    assert len(list((tmp_path / 'drawn').glob('*.png'))) == 2


def test_killed_and_resumed_is_the_same_run(start_tool, config_path, small, tiny, tmp_path):
    options = ['--cfg-options', *tiny, 'default_hooks.checkpoint.interval=3', 'train_cfg.val_interval=5']
    arguments = [config_path, *small, '--max-iters', '12', *options]
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


def test_resume_without_a_checkpoint(train, tmp_path):
    result = train('--max-iters 1 --resume --from-scratch', work='w', code=0)
    assert 'no checkpoint, training starts at the beginning' in result.text
    # mmengine's own setting takes the same way: past a damaged file and a pointer to nowhere.
    (tmp_path / 'w' / 'last_checkpoint').write_text('/nowhere/iter_3.pth')
    (tmp_path / 'w' / 'iter_3.pth').write_bytes(b'x')
    result = train('--max-iters 2', work='w', options=['resume=True'], code=0)
    assert re.search('goes on from .*iter_1.pth.*Passed over.*iter_3.pth', result.text), result.text
    assert load(tmp_path / 'w' / 'iter_2.pth')['meta']['iter'] == 2
    assert next(tmp_path.glob('w/earlier_*/iter_3.pth')).read_bytes() == b'x'
    # A file with weights only is no run to resume.
    state = load(tmp_path / 'w' / 'iter_1.pth')['state_dict']
    torch.save(dict(state_dict=state), tmp_path / 'weights.pth')
    assert 'nothing to resume' in train('--resume', tmp_path / 'weights.pth', '--max-iters 1', work='w', code=1).text


def free_port():
    with socket.socket() as listener:
        listener.bind(('127.0.0.1', 0))
        return listener.getsockname()[1]


@pytest.mark.parametrize('as_module', [False, True])
def test_two_processes_on_the_cpu(start_tool, config_path, small, tiny, tmp_path, as_module):
    arguments = [config_path, *small, '--from-scratch --max-iters 2 --launcher pytorch', '--work-dir', tmp_path / 'w']
    launcher = ['-m', 'torch.distributed.run', '--nproc_per_node=2', f'--master_port={free_port()}']
    options = ['--cfg-options', *tiny, 'train_cfg.val_interval=2']
    process = start_tool('train', *arguments, *options, launcher=launcher, as_module=as_module)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    # Both processes share the two validation images.
    assert 'Iter(train) [2/2]' in output and 'Iter(val) [1/1]' in output
    assert 'mIoU' in output
    assert (tmp_path / 'w' / 'iter_2.pth').is_file()


def test_tensorboard_has_one_run_across_a_resumption(train, tmp_path):
    """Both halves write to one folder, and a new run in the same work dir does not."""
    reader = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator')
    options = ['default_hooks.logger.interval=1', 'default_hooks.checkpoint.interval=2']

    def steps(folder):
        events = reader.EventAccumulator(str(folder))
        events.Reload()
        return [event.step for event in events.Scalars('loss')]

    train('--from-scratch --max-iters 2 --vis tensorboard', options=options, code=0)
    (run,) = (tmp_path / 'work' / 'vis').iterdir()
    assert steps(run) == [1, 2]
    train('--resume --max-iters 4 --vis tensorboard', options=options, code=0)
    assert steps(run) == [1, 2, 3, 4]
    train('--from-scratch --max-iters 1 --vis tensorboard', options=options, code=0)
    assert sorted(len(steps(folder)) for folder in (tmp_path / 'work' / 'vis').iterdir()) == [1, 4]
