"""Put a checkpoint into a model, strictly, with a report of what was done."""

from __future__ import annotations

import copy
import logging
import os
import re
import warnings
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from .errors import CheckpointError, CheckpointMismatch
from .families import FamilyMember, describe, find_roots, known_backbones
from .formats import ConversionNotes, convert_state_dict, with_metadata
from .reader import log_report, read_checkpoint
from .unwrap import Unwrapped, unwrap, unwrap_model
from .values import check_dense, check_values
from .variants import Variant, likely_causes

_HEAD = 'classification head and final norm'
_STEM = 'downsample_layers.0.0.weight'
# In the metadata of a backbone's part of a state dict that :func:`_convert_for` has made.
_CONVERTED = 'slak_mm_converted'
# Name, shape in the checkpoint, shape in the model.
_Shapes = tuple[str, tuple[int, ...], tuple[int, ...]]

# Left in a state dict by data preprocessors of release candidates, and by the EMA hook of
# mmdet 2.x, which kept its average as flat buffers beside the weights.
_HARMLESS = (
    (re.compile(r'^data_preprocessor\.(mean|std)$'), 'constants of the data preprocessor'),
    (re.compile(r'^ema_\w+$'), 'moving average as mmdet 2.x keeps it'),
)

# Causes of a mismatch that no argument of the backbone explains; the first that applies is said.
_REST = (
    "strict=False, of load_pretrained or StrictCheckpointHook, loads all that fits, and prefix='backbone.' the "
    'backbone only'
)
_OTHER_CAUSES = (
    (
        lambda mismatch: mismatch.is_in_heads and mismatch.classes,
        'the backbone fits, but the heads are for another number of classes ({0.classes[0]} in the checkpoint, '
        f'{{0.classes[1]}} in the model); {_REST}',
    ),
    (
        lambda mismatch: mismatch.is_in_heads,
        f'the backbone fits, but the checkpoint is of a model with other heads ({{0.groups}}); {_REST}',
    ),
    (
        lambda mismatch: mismatch.is_in_norms,
        'the model returns other stages, or has output norms where the checkpoint has none: set out_indices '
        'and out_norm',
    ),
    # Alike as far as constructor arguments go.
    (lambda mismatch: mismatch.is_incomplete, 'the checkpoint is incomplete, some tensors are not in it'),
)


@dataclass
class LoadReport:
    """How every tensor of a checkpoint and of a model was used.

    Attributes:
        source: Path, address or name the checkpoint came from.
        format: Spelling of the names, see :func:`detect_format`.
        wrapper: Entry of the checkpoint that was read, '' for a bare state dict.
        variant: The backbone in words.
        loaded: Tensors of the model that were taken from the checkpoint.
        converted: Name in the checkpoint -> name in the model, where they differ by more than a prefix.
        dropped: Name in the checkpoint -> why it was left out.
        newly_initialized: Tensors of the model that the checkpoint cannot have and that keep the values they had.
        missing: Tensors of the model the checkpoint should have; not with ``strict=True``.
        mismatched: Tensors left out because of their shape; not with ``strict=True``.
        zeros: Weights of the backbone with two or more dimensions -> number of exact zeros, number of elements.
        is_ema: Whether the weights are a moving average.
        remarks: Sentences on what was fitted to the model without a change of the computed function.
        other_copy: What is said of a second copy of the weights in the checkpoint that was
            not taken, '' if there is none.
    """

    source: str
    format: str = ''
    wrapper: str = ''
    variant: str = ''
    loaded: list[str] = field(default_factory=list)
    converted: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    newly_initialized: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    zeros: dict[str, tuple[int, int]] = field(default_factory=dict)
    is_ema: bool = False
    remarks: list[str] = field(default_factory=list)
    other_copy: str = ''

    @property
    def sparsity(self) -> dict[str, float]:
        """Fraction of exact zeros of each weight in :attr:`zeros`."""
        return {key: zeros / total for key, (zeros, total) in self.zeros.items()}

    def __str__(self) -> str:
        copy_taken = f'under {self.wrapper}' if self.wrapper else 'bare state dict'
        copy_taken += ', moving average' if self.is_ema else ''
        lines = [
            f'Loaded {len(self.loaded)} tensors from {self.source}',
            f'  format        {self.format} ({copy_taken})',
            f'  backbone      {self.variant}',
        ]
        if self.converted:
            old, new = next(iter(self.converted.items()))
            lines.append(f'  converted     {len(self.converted)} names, such as {old} -> {new}')
        lines += [f'  fitted        {remark}' for remark in self.remarks]
        for reason, count in Counter(self.dropped.values()).items():
            keys = [key for key, why in self.dropped.items() if why == reason]
            lines.append(f'  dropped       {count}: {_groups(keys)} ({reason})')
        for title, keys in (
            ('new values', self.newly_initialized),
            ('MISSING', self.missing),
            ('OTHER SHAPE', self.mismatched),
        ):
            if keys:
                lines.append(f'  {title:<13} {len(keys)}: {_groups(keys)}')
        if self.zeros:
            zeros, total = map(sum, zip(*self.zeros.values()))
            # A single zero happens by chance; sparse training leaves far more than 1%.
            sparse = [f for f in self.sparsity.values() if f >= 0.01]
            detail = f', {len(sparse)} of {len(self.zeros)} layers sparse, at most {max(sparse):.1%}' if sparse else ''
            share = f'{zeros / total:.2%} of {total / 1e6:.1f}M weights of the backbone'
            lines.append(f'  zeros         {share}{detail}')
        if self.other_copy:
            lines.append(f'  second copy   {self.other_copy}')
        return '\n'.join(lines)


def load_pretrained(
    model: nn.Module,
    source: str | os.PathLike | Mapping[str, Any],
    strict: bool = True,
    *,
    prefix: str | None = None,
    use_ema: bool = False,
) -> LoadReport:
    """Load official, converted or own weights into a backbone, or a model that contains one.

    What the checkpoint holds decides: a backbone alone (ImageNet weights) goes into the backbone of the model, the
    rest of which keeps its values; a whole segmentor or detector goes into a whole model and must match everywhere; a
    whole model's checkpoint gives a bare backbone its part. The classification head and the norm before it are
    dropped, and the output norms of the stages keep their values where the checkpoint has none, as ImageNet
    checkpoints. Everything is checked before the first value is overwritten. Values are copied into the model's
    tensors, which keep their dtype and device.

    Args:
        model: A backbone of this project, or any model, wrapped or not, that contains exactly one.
        source: A path, an address, a zoo name, or a checkpoint already read; see :func:`read_checkpoint`.
        strict: Whether every tensor must find its place. If ``False``, what matches is loaded and the rest is listed
            in a logged warning. Defaults to ``True``.
        prefix: Take only the tensors below this prefix, as the backbone. Defaults to ``None``, which finds it.
        use_ema: Whether to take the moving average of the weights, which official checkpoints may hold under
            ``model_ema`` and which the official downstream code never uses. Defaults to ``False``.

    Returns:
        What was loaded, converted, dropped and left new; it is logged as well.

    Raises:
        CheckpointNotFound: There is no such file.
        CheckpointUnreadable: It is not an intact checkpoint.
        UnsafeCheckpoint: It wants to run code.
        CheckpointMismatch: It does not fit; says which keys and the likely cause.
        CheckpointError: The model contains no backbone of this project.
    """
    checkpoint = read_checkpoint(source)
    label = 'a mapping' if isinstance(source, Mapping) else os.fspath(source)
    planner = _Planner(model, label, strict)
    weights = planner.plan(unwrap(checkpoint, 'ema' if use_ema else 'model'), prefix)
    with torch.no_grad():
        planner.model.load_state_dict(weights, strict=False)
    return _logged(planner.report)


def prepare_checkpoint(
    model: nn.Module,
    checkpoint: dict[str, Any],
    strict: bool = True,
    *,
    source: str = 'the checkpoint',
    require_heads: bool = False,
) -> LoadReport:
    """Turn a checkpoint that a framework has read into one that it can load into ``model``.

    For mmengine's ``after_load_checkpoint``: ``checkpoint['state_dict']`` is replaced by the converted, checked
    weights and ``checkpoint['ema_state_dict']``, where mmengine's EMAHook wrote one, by its converted form. The model
    is not touched. Rules and errors are those of :func:`load_pretrained`.

    Args:
        model: The model it is meant for.
        checkpoint: The content of the file; changed in place, unless an error is raised.
        strict: As in :func:`load_pretrained`. Defaults to ``True``.
        source: Name of the file for messages. Defaults to 'the checkpoint'.
        require_heads: Whether to refuse a checkpoint that holds only a backbone, as for testing, where untrained
            heads are of no use. Defaults to ``False``.

    Returns:
        What will be loaded; it is logged as well.
    """
    taken = unwrap(checkpoint)
    planner = _Planner(model, source, strict)
    weights = planner.plan(taken, None, require_heads)
    average = checkpoint.get('ema_state_dict')
    if isinstance(average, Mapping):
        average = planner.convert_average(average, weights)
    for key in [taken.wrapper] if taken.wrapper else [k for k, v in checkpoint.items() if isinstance(v, Tensor)]:
        del checkpoint[key]
    checkpoint['state_dict'] = weights
    if average is not None:
        checkpoint['ema_state_dict'] = average
    return _logged(planner.report)


def prepare_state_dict(backbone: nn.Module, state_dict: Mapping[str, Any], strict: bool = True) -> Mapping[str, Any]:
    """Convert and check what a backbone's ``load_state_dict`` was given, by our or official names.

    Raises:
        CheckpointError: It does not fit, or holds values that mean nothing to the backbone.
    """
    metadata = getattr(state_dict, '_metadata', None) or {}
    return state_dict if metadata.get('', {}).get(_CONVERTED) else _fit_exactly(backbone, state_dict, '', strict)


def convert_on_load(
    backbone: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Mapping[str, Any], *_: Any
) -> None:
    """Convert a backbone's part of a whole model's state dict; a hook that runs before it is loaded.

    Names that are missing or left over are found by the caller, who alone knows what is allowed.

    Raises:
        CheckpointError: As :func:`prepare_state_dict`.
    """
    if local_metadata.get(_CONVERTED):
        return
    own = {key: value for key, value in state_dict.items() if key.startswith(prefix)}
    converted = _fit_exactly(backbone, own, prefix, strict=False)
    for key in own:
        del state_dict[key]
    state_dict.update(converted)


def _fit_exactly(backbone: Any, state_dict: Mapping[str, Any], prefix: str, strict: bool) -> dict[str, Any]:
    label = 'The state dict'
    check_dense(state_dict, label)
    converted, _ = _convert_for(backbone, state_dict, prefix)
    expected = backbone.state_dict(prefix=prefix)
    shapes = _other_shapes(converted, expected)
    missing = [key for key in expected if key not in converted and not key.endswith('.num_batches_tracked')]
    unexpected = [key for key in converted if key not in expected]
    if shapes or (strict and (missing or unexpected)):
        causes = likely_causes(describe(_below(converted, prefix)), describe(backbone.state_dict()))
        raise CheckpointMismatch(
            f'{label} does not fit {type(backbone).__name__}.', missing, unexpected, shapes, causes
        )
    check_values(converted, expected, label)
    return converted


def _convert_for(
    backbone: FamilyMember, state_dict: Mapping[str, Any], prefix: str
) -> tuple[dict[str, Any], ConversionNotes]:
    """The conversion that every way of loading goes through, once.

    Returns:
        Tensors by our names, marked so that the backbone does not convert them again, and what was done.

    Raises:
        CheckpointMismatch: A tensor cannot belong to the backbone.
    """
    converted, notes = convert_state_dict(state_dict, prefix, backbone.family.name)
    for key in [key for key in converted if key.startswith(prefix)]:
        if reason := backbone.why_unused(key[len(prefix) :]):
            notes.dropped[key] = reason
            del converted[key]
    notes.remarks += backbone.complete_state_dict(converted, prefix)
    result = OrderedDict(converted)
    metadata = OrderedDict(getattr(state_dict, '_metadata', None) or {})
    metadata[prefix[:-1]] = {**metadata.get(prefix[:-1], {}), _CONVERTED: True}
    result._metadata = metadata  # type: ignore[attr-defined]
    return result, notes


def load_foreign(model: nn.Module, checkpoint: Mapping[str, Any], label: str, dry: bool = False) -> None:
    """Load a model without a backbone of this package strictly, or leave it as it is.

    Its loading hooks may rename, so that PyTorch compares, on a copy without memory first.

    Args:
        model: A framework's own model.
        checkpoint: Content of a checkpoint file.
        label: Name of the file for messages.
        dry: Whether to check only. Defaults to ``False``.

    Raises:
        CheckpointError: It does not fit, or holds values that mean nothing to the model.
    """
    weights = unwrap(checkpoint).state_dict
    check_dense(weights, label)
    check_values(weights, model.state_dict(), label)
    for target in (_skeleton(model), None if dry else model):
        if target is None:
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')  # torch warns that copying to meta does nothing
                target.load_state_dict(weights, strict=True)
        except RuntimeError as error:
            lines = [line.strip() for line in str(error).splitlines()[1:]]
            raise CheckpointMismatch(f'{label} does not fit {type(model).__name__}: {" ".join(lines)[:600]}') from error


def find_backbones(model: nn.Module) -> list[tuple[str, Any]]:
    """Dotted name ('' for the module itself) and module of each backbone of this project in a model."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, FamilyMember)]


class _Planner:
    """Works out what would be loaded, and refuses what does not fit. Changes nothing."""

    def __init__(self, model: nn.Module, label: str, strict: bool) -> None:
        self.model = unwrap_model(model)
        self.label, self.strict = label, strict
        self.backbones = [(name + '.' if name else '', module) for name, module in find_backbones(self.model)]
        self.kind = type(self.model).__name__
        if not self.backbones:
            raise CheckpointError(f'{self.kind} contains no backbone of slak_mm to load weights into.')
        self.expected = {key: value for key, value in self.model.state_dict().items() if isinstance(value, Tensor)}
        if any(value.is_meta for value in self.expected.values()):
            raise CheckpointError(
                f'{self.kind} is on the meta device, where nothing can be loaded: call to_empty(device=...) first.'
            )
        self.report = LoadReport(label)
        self.causes: list[str] = []

    def plan(self, taken: Unwrapped, prefix: str | None, require_heads: bool = False) -> dict[str, Tensor]:
        """What is to be loaded by the model's names; :attr:`report` describes it."""
        report = self.report
        report.wrapper, report.is_ema, report.other_copy = taken.wrapper, taken.is_ema, taken.other_copy
        source, roots = self._source(taken, prefix)
        # A whole model is to go on as it was, or to be tested: with the images that it had.
        adapt = not require_heads
        if prefix is None and self._is_whole(source, roots):
            candidate = source
            for name, backbone in self.backbones:
                candidate, _ = self._fit(candidate, name, backbone, name, True, adapt)
        else:
            root = self._root(source, roots)
            name, backbone = self.backbones[0]
            part = {name + key: value for key, value in _below(source, root).items()}
            candidate, theirs = self._fit(part, name, backbone, root, False, adapt)
            outside = [key for key in self.expected if not self._is_backbone(key)]
            norms = [key for key in self.expected if re.match(re.escape(name) + r'norm\d+\.', key)]
            report.newly_initialized += [*([] if theirs.output_norms else norms), *outside]
            if require_heads and outside:
                raise CheckpointMismatch(
                    f'{self.label} holds only a backbone, and {self.kind} has more to it ({_groups(outside)}): give '
                    'the checkpoint of a trained model.',
                    missing=outside,
                )
        self._settle(candidate, *self._compare(candidate))
        check_values(candidate, self.expected, self.label)
        report.loaded = [key for key in candidate if key in self.expected]
        report.zeros = {
            key: (value.numel() - int(torch.count_nonzero(value)), value.numel())
            for key, value in candidate.items()
            if key in self.expected and self._is_backbone(key) and value.dim() >= 2 and value.is_floating_point()
        }
        return candidate

    # The source

    def _source(self, taken: Unwrapped, prefix: str | None) -> tuple[dict[str, Tensor], list[str]]:
        source, dropped = taken.state_dict, self.report.dropped
        if prefix is not None:
            prefix = prefix if prefix.endswith('.') or not prefix else prefix + '.'
            inside = _below(source, prefix)
            if not inside:
                raise CheckpointMismatch(
                    f'{self.label} has no tensors below the prefix {prefix!r}; it has {_groups(source)}.'
                )
            dropped.update((key, 'not below the given prefix') for key in source if not key.startswith(prefix))
            source = inside
        for pattern, reason in _HARMLESS:
            dropped.update((key, reason) for key in source if key not in self.expected and pattern.match(key))
        source = with_metadata({k: v for k, v in source.items() if k not in dropped}, source)
        check_dense(source, self.label)
        roots = find_roots(source)
        if not roots:
            self._refuse(unexpected=source, causes=[f'it holds no {known_backbones()} backbone, but {_groups(source)}'])
        return source, roots

    def _is_whole(self, source: Mapping[str, Tensor], roots: list[str]) -> bool:
        """Whether the source has heads which the model should have too."""
        rest = [key for key in source if not key.startswith(tuple(roots))]
        if self.backbones[0][0] == '' or not rest:
            return False
        # mmpretrain's classifiers keep their head outside the backbone.
        if all(key.startswith('head.') for key in rest) and not any(key.startswith('head.') for key in self.expected):
            self.report.dropped.update((key, _HEAD) for key in rest)
            return False
        absent = [name.rstrip('.') for name, _ in self.backbones if name not in roots]
        if absent:
            theirs = ', '.join(root.rstrip('.') for root in roots) or 'nothing'
            cause = f'the backbone is called {", ".join(absent)} in the model and {theirs} in the checkpoint'
            self._refuse(unexpected=rest, causes=[f'{cause}; prefix= takes the backbone only'])
        return True

    def _root(self, source: Mapping[str, Tensor], roots: list[str]) -> str:
        """Prefix of the one backbone of the source that goes into the one of the model."""
        if len(self.backbones) > 1:
            names = ', '.join(name.rstrip('.') for name, _ in self.backbones)
            raise CheckpointMismatch(
                f'{self.kind} contains {len(self.backbones)} backbones ({names}) and {self.label} holds one: load it '
                'into each of them by itself.'
            )
        root = next(r for r in ('', 'backbone.', *roots) if r in roots)
        if len(roots) > 1 and root not in ('', 'backbone.'):
            raise CheckpointMismatch(
                f'{self.label} holds {len(roots)} backbones ({", ".join(roots)}): name one with prefix=.'
            )
        for key in source:
            if not key.startswith(root):
                self.report.dropped.setdefault(key, 'not part of the backbone')
        return root

    def _fit(
        self, source: Mapping[str, Tensor], prefix: str, backbone: Any, root: str, whole: bool, adapt: bool
    ) -> tuple[dict[str, Tensor], Variant]:
        """Convert the part of one backbone, and drop what it has no use for.

        Args:
            source: Tensors, those of the backbone below ``prefix``.
            prefix: Of the backbone's names in the model.
            backbone: The backbone.
            root: The prefix that it had in the checkpoint.
            whole: Whether a whole model is loaded.
            adapt: Whether the stem may be fitted to other images.
        """
        candidate, notes = _convert_for(backbone, source, prefix)
        theirs = describe(_below(candidate, prefix))
        self.report.format, self.report.variant = notes.format, str(theirs)
        old_names = {new: root + old[len(prefix) :] for old, new in notes.renamed.items()}
        self.report.converted.update((old, new) for new, old in old_names.items())
        for key in [key for key in candidate if key.startswith(prefix) and key not in self.expected]:
            if reason := _why_dropped(key[len(prefix) :], whole):
                del candidate[key]
                notes.dropped[key] = reason
        for key, reason in notes.dropped.items():
            self._drop(old_names.get(key, root + key[len(prefix) :]), reason)
        self.report.remarks += notes.remarks
        if adapt:
            self.report.remarks += _adapt_stem(candidate, self.expected, prefix + _STEM)
        part, ours = describe(_below(candidate, prefix)), describe(backbone.state_dict())
        causes = likely_causes(part, ours)
        self.causes += causes
        # Loading the tensors that happen to fit would be of no use to anybody.
        if part.deploy != ours.deploy or part.family not in (ours.family, 'unknown'):
            self._refuse(causes=causes, part=f' (its {prefix.rstrip(".")})' if prefix else '')
        return candidate, theirs

    def _drop(self, key: str, reason: str) -> None:
        self.report.dropped[key] = reason
        self.report.converted.pop(key, None)

    # The comparison

    def _compare(self, candidate: Mapping[str, Tensor]) -> tuple[list[str], list[str], list[_Shapes]]:
        """Names that are missing and unexpected, and tensors of another shape."""
        shapes = _other_shapes(candidate, self.expected)
        missing = [key for key in self.expected if key not in candidate]
        unexpected = [key for key in candidate if key not in self.expected]
        new = set(self.report.newly_initialized)
        if not shapes and (unexpected or set(missing) - new):
            # Heads may rename tensors of older versions in their own loading hooks.
            missing, unexpected = _dry_run(self.model, candidate) or (missing, unexpected)
        # Batch norms of very old checkpoints have no counter; the model's stays.
        missing = [key for key in missing if key not in new and not key.endswith('.num_batches_tracked')]
        return missing, unexpected, shapes

    def _settle(
        self, candidate: dict[str, Tensor], missing: list[str], unexpected: list[str], shapes: list[_Shapes]
    ) -> None:
        """Refuse what does not fit, or without ``strict`` reduce the candidate to what does."""
        if not (missing or unexpected or shapes):
            return
        others = [shape[0] for shape in shapes]
        old_names = {new: old for old, new in self.report.converted.items()}
        unexpected_old = [old_names.get(key, key) for key in unexpected]
        if self.strict or not any(k in self.expected and k not in others for k in candidate if self._is_backbone(k)):
            causes = self.causes or self._other_causes(missing, unexpected, shapes)
            self._refuse(missing, unexpected_old, shapes, causes)
        for key in [*unexpected, *others]:
            del candidate[key]
        self.report.missing, self.report.mismatched = missing, others
        for key in unexpected_old:
            self._drop(key, 'not in the model')

    def _other_causes(self, missing: list[str], unexpected: list[str], shapes: list[_Shapes]) -> list[str]:
        """Causes outside the backbone's constructor arguments."""
        affected = [*missing, *unexpected, *(shape[0] for shape in shapes)]
        classes = [(s[1][0], s[2][0]) for s in shapes if len(s[1]) == len(s[2]) > 0 and s[1][1:] == s[2][1:]]
        mismatch = SimpleNamespace(
            is_in_heads=not any(map(self._is_backbone, affected)),
            classes=classes[0] if classes and len(shapes) == len(affected) else None,
            groups=_groups(affected),
            is_in_norms=all(re.search(r'(^|\.)norm\d+\.\w+$', key) for key in affected),
            is_incomplete=not unexpected and not shapes,
        )
        return [sentence.format(mismatch) for applies, sentence in _OTHER_CAUSES if applies(mismatch)][:1]

    def _refuse(
        self,
        missing: Iterable[str] = (),
        unexpected: Iterable[str] = (),
        shapes: Iterable[_Shapes] = (),
        causes: Iterable[str] = (),
        part: str = '',
    ) -> NoReturn:
        raise CheckpointMismatch(f'{self.label} does not fit {self.kind}{part}.', missing, unexpected, shapes, causes)

    def _is_backbone(self, key: str) -> bool:
        return key.startswith(tuple(prefix for prefix, _ in self.backbones))

    def convert_average(self, average: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Convert the copy of the weights that mmengine's EMAHook stores below ``module.``."""
        check_dense(average, self.label)
        converted: dict[str, Tensor] = dict(average)
        for prefix, backbone in self.backbones:
            converted, _ = _convert_for(backbone, converted, f'module.{prefix}')
        expected = {'module.' + key: value for key, value in self.expected.items()}
        missing = sorted({'module.' + key for key in weights} - converted.keys())
        shapes = _other_shapes(converted, expected)
        if self.strict and (missing or shapes):
            raise CheckpointMismatch(
                f'The two copies of the weights in {self.label} (state_dict and ema_state_dict) are not of one model.',
                missing=missing,
                shape_mismatches=shapes,
            )
        check_values(converted, expected, f'{self.label} (its ema_state_dict)')
        return converted


def _below(state_dict: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return OrderedDict((k[len(prefix) :], v) for k, v in state_dict.items() if k.startswith(prefix))


def _other_shapes(state_dict: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[_Shapes]:
    """Name, shape and expected shape where these differ."""
    return [
        (key, tuple(value.shape), tuple(expected[key].shape))
        for key, value in state_dict.items()
        if key in expected and value.shape != expected[key].shape
    ]


def _why_dropped(key: str, whole: bool) -> str:
    """Why a backbone can do without a tensor that it does not have; '' if it cannot."""
    if key.startswith(('head.', 'norm.')):
        return _HEAD
    if key.endswith('.num_batches_tracked'):
        return 'counter of a batch norm that the model does not have'
    unused_norm = re.match(r'norm\d+\.', key) and not whole
    return 'output norm of a stage that the model does not return' if unused_norm else ''


def _adapt_stem(state_dict: dict[str, Tensor], expected: Mapping[str, Tensor], key: str) -> list[str]:
    """Fit the first convolution of a network for RGB to other images, in place.

    As timm's ``in_chans``: the sum of the three for a single channel; else they are repeated, and
    scaled so that the sum over channels which are alike stays.

    Returns:
        A sentence on what was done, if anything was.
    """
    weight, channels = state_dict.get(key), expected[key].shape[1]
    if weight is None or weight.dim() != 4 or weight.shape[1] != 3 or channels == 3:
        return []
    exact = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if channels == 1:
        exact, how = exact.sum(1, keepdim=True), 'summed for images of one channel'
    else:
        exact = exact.repeat(1, -(-channels // 3), 1, 1)[:, :channels] * (3 / channels)
        how = f'repeated for images of {channels} channels and scaled by 3/{channels}'
    state_dict[key] = exact.to(weight.dtype)
    return [f'the 3 channels of the first convolution were {how}']


def _skeleton(model: nn.Module) -> nn.Module | None:
    """A copy of a model whose tensors have shapes but no memory; None if it cannot be copied."""
    memo: dict[int, Any] = {
        id(t): nn.Parameter(torch.empty_like(t, device='meta'), t.requires_grad)
        if isinstance(t, nn.Parameter)
        else torch.empty_like(t, device='meta')
        for t in (*model.parameters(), *model.buffers())
    }
    try:
        return copy.deepcopy(model, memo)
    except Exception:  # noqa: BLE001 - not every third-party head can be copied
        return None


def _dry_run(model: nn.Module, state_dict: Mapping[str, Tensor]) -> tuple[list[str], list[str]] | None:
    """What ``load_state_dict`` would find missing and unexpected, all loading hooks included.

    Returns:
        ``None`` if the model cannot be copied or shapes differ; names alone decide then.
    """
    skeleton = _skeleton(model)
    if skeleton is None:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # torch warns that copying to meta does nothing
            found = skeleton.load_state_dict(state_dict, strict=False)
    except Exception:  # noqa: BLE001 - third-party loading hooks
        return None
    return list(found.missing_keys), list(found.unexpected_keys)


def _groups(keys: Iterable[str]) -> str:
    """Names shortened to their first parts, such as `decode_head.* (54), norm0.weight`."""
    by_top: dict[str, list[str]] = {}
    for key in keys:
        parts = key.split('.')
        depth = 2 if parts[0] == 'backbone' and len(parts) > 2 else 1
        by_top.setdefault('.'.join(parts[:depth]), []).append(key)
    texts = [members[0] if len(members) == 1 else f'{top}.* ({len(members)})' for top, members in by_top.items()]
    return ', '.join(texts[:6]) + (f' and {len(texts) - 6} more' if len(texts) > 6 else '')


def _logged(report: LoadReport) -> LoadReport:
    complete = not (report.missing or report.mismatched)
    log_report(str(report), logging.INFO if complete else logging.WARNING)
    return report
