"""What Triton makes of a kernel, without a GPU."""

import os
import re
import subprocess
import tempfile

import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

DUMP = os.path.join(os.path.dirname(nvidia.__file__), 'bin', 'cuobjdump')


def check(function, capability, types, *, aligned=(), warps=8, wide=True, **constants):
    """Compile a kernel and look for loads of 16 bytes (``wide``), registers that are spilled, and shared memory.

    ``types`` are those of parameters that are neither constants nor ``i32``; pointers, and the parameters named in
    ``aligned``, are multiples of 16.
    """
    names = function.arg_names
    signature = {n: 'constexpr' if n in constants else types.get(n, 'i32') for n in names}
    multiples = [i for i, n in enumerate(names) if signature[n].startswith('*') or n in aligned]
    source = ASTSource(
        fn=function,
        signature=signature,
        attrs={(i,): [['tt.divisibility', 16]] for i in multiples},
        constexprs={(names.index(name),): value for name, value in constants.items()},
    )
    compiled = triton.compile(source, target=GPUTarget('cuda', capability, 32), options=dict(num_warps=warps))
    loads = re.sub(r'L1::[a-z_]*[.]', '', compiled.asm['ptx'])
    assert not wide or 'ld.global.v4.b32' in loads, f'{function.__name__}: narrow loads'
    assert compiled.metadata.shared <= 48 << 10, function.__name__
    if os.path.exists(DUMP):
        with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
            file.write(compiled.asm['cubin'])
            file.flush()
            usage = subprocess.run([DUMP, '-res-usage', file.name], capture_output=True, text=True).stdout
        assert 'STACK:0' in usage and 'LOCAL:0' in usage, f'{function.__name__}: registers are spilled: {usage}'
