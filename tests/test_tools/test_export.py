"""``tools/export.py`` on the tiny segmentor."""

import pytest
import torch

from slak_mm.export import export


@pytest.fixture(scope='module')
def checkpoint(build_tiny, tmp_path_factory):
    model = build_tiny()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    path = tmp_path_factory.mktemp('weights') / 'tiny.pth'
    torch.save(dict(state_dict=model.state_dict()), path)
    return path


@pytest.fixture
def run(call_tool, config_path, checkpoint, tiny):
    def run(*arguments, code=0):
        arguments = [config_path, checkpoint, '--size 64x96', *arguments, '--cfg-options', *tiny]
        return call_tool('export', *arguments, code=code)

    return run


def test_scores_of_a_segmentor(run, build_tiny, checkpoint, tmp_path):
    """What mmsegmentation computes in its whole-image mode, by the model in training form."""
    out = tmp_path / 'deep' / 'scores.pt'
    result = run('--format torchscript', '--out', out)
    assert f'{out}: ' in result.out and 'of the largest value' in result.out
    model = build_tiny().eval()
    model.load_state_dict(torch.load(checkpoint)['state_dict'])
    x = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = model.encode_decode(x, [dict(ori_shape=(64, 96), img_shape=(64, 96), pad_shape=(64, 96))])
        got = torch.jit.load(str(out))(x)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4 * float(want.abs().max()))


def test_maps_of_the_backbone(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run('--format exported-program --part backbone --dynamic size')
    program = torch.export.load('upernet_slak_t_ade20k_backbone.pt2').module()
    assert [tuple(y.shape) for y in program(torch.zeros(3, 3, 96, 128))] == [
        (3, c, 96 // s, 128 // s) for c, s in zip((8, 16, 24, 32), (4, 8, 16, 32))
    ]


def test_images_have_the_channels_of_the_network(tmp_path):
    assert export(torch.nn.Conv2d(4, 2, 1), tmp_path / 'x.pt', 'torchscript', size=(32, 32)) < 1e-6


def test_what_cannot_be_exported(run, call_tool, config_path, tmp_path):
    result = run('--format torchscript --dynamic size --size 50', '--out', tmp_path / 'x.pt', code=1)
    assert 'multiples of 32, from 64 on; 50x50 is not' in result.err
    assert 'none.pth' in call_tool('export', config_path, tmp_path / 'none.pth', code=1).err
    assert not list(tmp_path.iterdir())
