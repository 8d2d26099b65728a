"""The command line: changes to configs by topic, and errors that name options."""

# ruff: noqa: F401
from slak_mm._config import datasets_of, framework, model_of, type_name

from .annotations import check_annotations
from .arguments import (
    CONFIG_HELP,
    EXIT_CODES,
    ArgumentParser,
    KeyValuePairs,
    add_cfg_options,
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
from .device import adapt_to_device, set_amp, set_compile, usable_device
from .errors import ConfigOverrideError, reason
from .launch import build_model, build_runner, init_distributed, own_work_dir
from .run import leave_process_group, run_tool
from .schedule import set_max_iters
from .size import set_crop_size, set_img_scale
from .sparse import SPARSE_CHOICES, masks_from_scratch, set_sparse, set_sparsity
from .vis import VIS_BACKENDS, place_vis, vis_backends
from .weights import check_weights, named_weights, prepare_resume, remove_weights
