# Faster R-CNN + SLaK-T, VOC 2007 and 2012 trainval, tested on VOC 2007: the recipe of VOC 2007 on
# more data. 36 epochs are 3.3 times as many iterations; for as many, add --max-iters 11304.
_base_ = './faster_rcnn_slak_t_voc07.py'

train_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type='ConcatDataset',
        # VOCDataset notes its year there, and all else must be equal.
        ignore_keys=['dataset_type'],
        datasets=[
            dict(
                type='VOCDataset',
                data_root='data/VOCdevkit/',
                ann_file=f'VOC{year}/ImageSets/Main/trainval.txt',
                data_prefix=dict(sub_data_root=f'VOC{year}/'),
                filter_cfg=dict(filter_empty_gt=True, min_size=32),
                pipeline=pipeline,
            )
            for year, pipeline in [(2007, _base_.train_pipeline), (2012, _base_.train_pipeline)]
        ],
    )
)
