"""The choice among measured backends, with stand-ins for a GPU's backends and clock."""

from types import SimpleNamespace

import pytest
import torch

from slak_mm.ops.backends import measured, reference


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.setattr(measured, '_choices', {})
    monkeypatch.setattr(measured, '_excluded', {})
    monkeypatch.setattr(measured, 'may_measure', lambda device: True)
    monkeypatch.delenv('SLAK_MM_AUTOTUNE', raising=False)


def stand_in(factor=1.0, error=None, calls=None):
    """A backend whose results are those of reference times a factor."""

    def forward(*args):
        if calls is not None:
            calls.append(args[0].shape)
        if error is not None:
            raise error
        return tuple(factor * y for y in reference.forward(*args))

    return SimpleNamespace(forward=forward, backward=reference.backward)


@pytest.fixture
def choose(monkeypatch):
    def choose(candidates, seconds, size=8, operation='forward'):
        times = iter(seconds)
        monkeypatch.setattr(measured, '_seconds', lambda run: next(times))
        x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
        kernels = [torch.ones(3, 7, 3), torch.ones(3, 3, 7)]
        return measured.fastest({**candidates, 'reference': reference}, x, kernels, operation)

    return choose


def test_the_fastest_is_taken_and_remembered(choose):
    calls = []
    candidates = dict(fast=stand_in(calls=calls), slow=stand_in())
    assert choose(candidates, [1.0, 3.0, 2.0]) == 'fast'
    asked = len(calls)
    # Another size of the same class; the clock would say otherwise, and is not asked.
    assert choose(candidates, [], size=7) == 'fast' and len(calls) == asked
    assert choose(candidates, [3.0, 2.0, 1.0], size=20) == 'reference'
    assert choose(candidates, [3.0, 1.0, 2.0], operation='backward') == 'slow'


def test_a_wrong_or_failing_backend_is_left_out_with_one_warning(choose, caplog):
    candidates = dict(wrong=stand_in(1.1), broken=stand_in(error=RuntimeError('no kernel image')))
    assert choose(candidates, [2.0]) == 'reference'
    assert [record.levelname for record in caplog.records] == ['WARNING'] * 2
    assert "'wrong'" in caplog.text and 'differs from that of reference' in caplog.text
    assert "'broken'" in caplog.text and 'no kernel image' in caplog.text
    assert choose(candidates, [], size=40) == 'reference' and len(caplog.records) == 2


def test_no_result_is_no_agreement(choose):
    assert choose(dict(bad=stand_in(float('nan'))), [2.0]) == 'reference'


@pytest.mark.parametrize('place', [0, 1])
def test_no_agreement_in_one_of_the_results(choose, place, caplog):
    def forward(*args):
        results = list(reference.forward(*args))
        results[place] = results[place] * float('nan')
        return tuple(results)

    candidates = dict(bad=SimpleNamespace(forward=forward, backward=reference.backward))
    assert choose(candidates, [1.0, 2.0]) == 'reference'
    assert 'by nan for an input' in caplog.text


def test_what_asks_for_determinism_measures_nothing(choose, monkeypatch):
    candidates = dict(fast=stand_in())
    monkeypatch.setenv('SLAK_MM_AUTOTUNE', '0')
    assert choose(candidates, []) == 'reference'
    monkeypatch.delenv('SLAK_MM_AUTOTUNE')
    monkeypatch.setattr(torch.backends.cudnn, 'deterministic', True)
    assert choose(candidates, []) == 'reference'


def test_block_sizes_that_fail_are_passed_over(monkeypatch):
    times = iter([3.0, 1.0, 2.0])
    monkeypatch.setattr(measured, '_seconds', lambda run: next(times))

    def run(choice):
        if choice == 'large':
            raise RuntimeError('out of shared memory')

    assert measured.fastest_of(run, ['large', 'a', 'b', 'c'], torch.device('cpu')) == 'b'
    with pytest.raises(RuntimeError, match='out of shared memory'):
        measured.fastest_of(run, ['large'], torch.device('cpu'))
