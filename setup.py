"""Packaging of slak_mm.

Installing the package must not change an OpenMMLab installation that is already there. mmengine and
onedl-mmengine are two distributions of one import name, and so are mmcv and onedl-mmcv, mmdet and
onedl-mmdetection, mmsegmentation and onedl-mmsegmentation: requiring either would overwrite the
other. Hence nothing is required, and each stack is an extra to choose where there is none yet.
"""

import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


class BuildPy(build_py):
    """Adds the configs, their index and the tools as ``slak_mm/.mim``, where OpenMMLab's packages have theirs.

    They are copied into the build folder. An editable install gets links to those of the checkout.
    """

    def run(self):
        """Build the package with its configs and tools."""
        target = Path(self.build_lib) / 'slak_mm'
        if getattr(self, 'editable_mode', False):
            super().run()
            self._link()
            return
        # Files of an earlier build that have since been removed would travel along.
        shutil.rmtree(target, ignore_errors=True)
        super().run()
        for source, name in self._mim_files():
            destination = target / '.mim' / name
            destination.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, destination)

    def get_outputs(self, include_bytecode=1):
        """List what was built."""
        outputs = super().get_outputs(include_bytecode)
        if not getattr(self, 'editable_mode', False):
            folder = Path(self.build_lib) / 'slak_mm' / '.mim'
            outputs += [str(folder / name) for _, name in self._mim_files()]
        return outputs

    @staticmethod
    def _link():
        folder = ROOT / 'slak_mm' / '.mim'
        folder.mkdir(exist_ok=True)
        for name in ('configs', 'model-index.yml', 'tools'):
            (folder / name).unlink(missing_ok=True)
            (folder / name).symlink_to(Path('..', '..', name))

    @staticmethod
    def _mim_files():
        names = [ROOT / 'model-index.yml']
        names += [
            path for pattern in ('configs/**/*.py', 'configs/*.yml', 'tools/**/*.py') for path in ROOT.glob(pattern)
        ]
        # Set-up and benchmarks of a checkout have no place in an installed package.
        checkout_only = ('setup_env.py', 'benchmark.py')
        return [(path, path.relative_to(ROOT)) for path in sorted(names) if path.name not in checkout_only]


def read_version():
    """Version of the package, which is not imported for it."""
    text = (ROOT / 'slak_mm' / 'version.py').read_text(encoding='utf-8')
    return re.search(r"^__version__ = '([^']+)'", text, re.MULTILINE)[1]


def read_readme():
    """Long description on the package index."""
    path = ROOT / 'README.md'
    return path.read_text(encoding='utf-8') if path.exists() else ''


setup(
    name='slak-mm',
    version=read_version(),
    description=('Large-kernel backbones (SLaK, ShiftWise) for OpenMMLab: segmentation and detection'),
    long_description=read_readme(),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    license_files=['LICENSE'],
    keywords=[
        'SLaK',
        'ShiftWise',
        'large kernels',
        'sparse training',
        'semantic segmentation',
        'object detection',
        'OpenMMLab',
    ],
    classifiers=[
        'Development Status :: 4 - Beta',
        'Operating System :: OS Independent',
        'Programming Language :: Python :: 3',
        'Programming Language :: Python :: 3.10',
        'Programming Language :: Python :: 3.11',
        'Programming Language :: Python :: 3.12',
        'Topic :: Scientific/Engineering :: Image Recognition',
    ],
    python_requires='>=3.10',
    packages=find_packages(include=['slak_mm', 'slak_mm.*']),
    package_data={'slak_mm': ['py.typed'], 'slak_mm.ops.csrc': ['*.cpp']},
    include_package_data=True,
    zip_safe=False,
    cmdclass={'build_py': BuildPy},
    install_requires=[],
    # Ranges that are known to work; the exact versions of the default environment are in
    # requirements/. pip builds onedl-mmcv without its compiled operators, which segmentation does
    # not need: see README.md for detection.
    extras_require={
        'onedl': [
            'onedl-mmengine>=0.10.12,<0.11',
            'onedl-mmcv>=2.3.6,<2.4',
            'onedl-mmdetection>=3.5.1,<3.6',
            'onedl-mmsegmentation>=1.4.2,<1.5',
            'torch>=2.4',
            'torchvision',
        ],
        'openmmlab': [
            'mmengine>=0.10.5,<0.11',
            'mmcv>=2.0.1,<2.2',
            'mmdet>=3.3,<3.4',
            'mmsegmentation>=1.2.2,<1.3',
            'torch>=2.1',
            'torchvision',
            # mmsegmentation 1.2 imports these two without declaring them; its numpy is below 2.
            'ftfy',
            'regex',
            'numpy<2',
        ],
        # hf://owner/repo/file, and the format that most files of the hub are in
        'hub': ['huggingface-hub>=0.20', 'safetensors>=0.4'],
        'dev': ['timm>=1.0', 'pytest>=8', 'hypothesis>=6.100', 'ruff>=0.9', 'mypy>=1.11'],
        # tools/export.py --format onnx
        'export': ['onnx>=1.16', 'onnxscript>=0.5', 'onnxruntime>=1.18'],
    },
)
