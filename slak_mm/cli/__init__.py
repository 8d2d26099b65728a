"""The command line: changes to configs by topic, and errors that name options."""

from slak_mm._config import datasets_of, framework, model_of, type_name

from .annotations import check_annotations
from .arguments import (
    ArgumentParser,
    KeyValuePairs,
    add_config_arguments,
    add_override_arguments,
    add_size_arguments,
    check_output,
    crop_size,
    image_size,
    img_scale,
    non_negative_int,
    output_file,
    output_folder,
    positive_int,
    share,
)
from .config import apply_overrides, load_config, tests_boxes_alone, use_test_time_augmentation
from .data import check_data, dataset_class, set_batch_size, set_data_root, set_num_workers
from .device import adapt_to_device, set_amp
from .errors import ConfigOverrideError, reason
from .launch import build_model, build_runner, init_distributed, own_work_dir
from .run import leave_process_group, run_tool
from .schedule import set_max_iters
from .size import set_crop_size, set_img_scale
from .sparse import SPARSE_CHOICES, masks_from_scratch, set_sparse, set_sparsity
from .weights import check_weights, named_weights, prepare_resume, remove_weights

__all__ = [
    'SPARSE_CHOICES',
    'ArgumentParser',
    'ConfigOverrideError',
    'KeyValuePairs',
    'adapt_to_device',
    'add_config_arguments',
    'add_override_arguments',
    'add_size_arguments',
    'apply_overrides',
    'build_model',
    'build_runner',
    'check_annotations',
    'check_data',
    'check_output',
    'check_weights',
    'crop_size',
    'dataset_class',
    'datasets_of',
    'framework',
    'image_size',
    'img_scale',
    'init_distributed',
    'leave_process_group',
    'load_config',
    'masks_from_scratch',
    'model_of',
    'named_weights',
    'non_negative_int',
    'output_file',
    'output_folder',
    'own_work_dir',
    'positive_int',
    'prepare_resume',
    'reason',
    'remove_weights',
    'run_tool',
    'set_amp',
    'set_batch_size',
    'set_crop_size',
    'set_data_root',
    'set_img_scale',
    'set_max_iters',
    'set_num_workers',
    'set_sparse',
    'set_sparsity',
    'share',
    'tests_boxes_alone',
    'type_name',
    'use_test_time_augmentation',
]
