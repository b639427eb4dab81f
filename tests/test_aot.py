"""Every kernel of every format, compiled for every supported GPU generation on a machine without a GPU."""
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from aot_compile import CASES, FIRST_AND_HOPPER, crowded, everything, plain
from helpers import by_name, clean_environment, python

import lmdeploy_kvq as kvq
from lmdeploy_kvq.kernels.workspace import default_config

HERE = Path(__file__).parent
CAPABILITIES = [80, 89, 90, 100]
SHARED_LIMIT = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Shared memory that one thread block may use, bytes (CUDA programming guide, compute capabilities)."""

MMA = re.compile(r'mma\.sync\.\S+|wgmma\.mma_async\.\S+|tcgen05\.mma\.\S+')
E4M3_TO_FP16 = 'cvt.rn.f16x2.e4m3x2'
ACCESS = re.compile(r'(?P<wait>griddepcontrol\.wait)|(?P<combine>ld\.global\.cg)|(?P<read>ld\.global)|'
                    r'(?P<write>st\.global)|(?P<copy>cp\.async\.c[ag])|(?P<count>atom\.)|(?P<barrier>bar\.sync)')
QUERIES = re.compile(r'(?P<queries>ld\.global\.(?:v4\.b32|b16)\s)|(?P<ask>prefetch\.global)|(?P<barrier>bar\.sync)|'
                     r'(?P<copy>cp\.async\.c[ag])')
NARROW_LOAD = re.compile(r'ld\.global\S*\.[bus]8\s')


@pytest.fixture(scope='module')
def compiled(tmp_path_factory):
    """``compiled(capability, fmt, kernel)``: a kernel's compilations; one process per capability, two at a time.

    Programs of one warp, which have nothing to wait for each other with, are apart: ``alone=True``.
    """
    folder = tmp_path_factory.mktemp('aot')
    script = HERE / 'aot_compile.py'
    running, waiting, results = {}, list(CAPABILITIES), {}
    while running or waiting:
        while waiting and len(running) < 2:
            capability = waiting.pop(0)
            running[capability] = subprocess.Popen(
                [sys.executable, str(script), str(capability), str(folder / f'{capability}.json')],
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=clean_environment())
        capability, process = next(iter(running.items()))
        output, _ = process.communicate(timeout=600)
        del running[capability]
        assert process.returncode == 0, f'sm_{capability}:\n{output[-5000:]}'
        results[capability] = json.loads((folder / f'{capability}.json').read_text())

    def find(capability: int, fmt: kvq.KVFormat, kernel: str, alone: bool = False) -> list[dict]:
        return [r for r in results[capability] if (r['format'], r['kernel']) == (fmt.name, f'_{kernel}_kernel')
                and alone == (r['case'] == crowded.__name__)]

    return find


def uses(fmt: kvq.KVFormat, codec: str) -> bool:
    return codec in (fmt.key.codec.name, fmt.value.codec.name)


EACH = pytest.mark.parametrize('capability', CAPABILITIES)
FORMATS = pytest.mark.parametrize('fmt', kvq.FORMATS, ids=by_name)


@pytest.mark.parametrize('kernel, launches', [('fill', 3), ('flatten', 3), ('decode', 2), ('merge', 2)])
@EACH
@FORMATS
def test_every_kernel_compiles(compiled, fmt, capability, kernel, launches):
    """To machine code for that GPU, within its shared memory."""
    found = compiled(capability, fmt, kernel)
    assert len(found) == (launches if capability in FIRST_AND_HOPPER else 1)
    for result in found:
        assert re.search(rf'^\.target sm_{capability}a?\b', result['ptx'], re.MULTILINE)
        assert result['cubin'] > 0 and 0 <= result['shared'] <= SHARED_LIMIT[capability]


@EACH
@FORMATS
def test_a_multiprocessor_holds_as_many_decode_programs_as_it_is_given(compiled, fmt, capability, monkeypatch):
    """What the launcher counts on: one wave.

    65,536 registers; 1 KiB of the shared memory is the driver's for each program. The H200's is what was measured.
    """
    from lmdeploy_kvq.kernels import workspace
    cases = (plain, everything, crowded) if capability in FIRST_AND_HOPPER else (plain, )
    found = compiled(capability, fmt, 'decode') + compiled(capability, fmt, 'decode', alone=True)
    for result, case in zip(found, cases, strict=True):
        block_size, dims = CASES[case]
        cache, batch = kvq.PagedCache.allocate(fmt, 1, block_size, 8, *dims, device='cpu'), 64 if case is crowded else 4
        monkeypatch.setattr(workspace, 'shared_memory', lambda device: 1 << 30)
        wanted = default_config(cache, result['block_m'], batch, grid_heads=8).occupancy
        monkeypatch.setattr(workspace, 'shared_memory', lambda device: SHARED_LIMIT[capability] + 1024)
        config = default_config(cache, result['block_m'], batch, grid_heads=8)
        fit = (SHARED_LIMIT[capability] + 1024) // (result['shared'] + 1024)
        assert config.occupancy == min(fit, wanted) and wanted * config.num_warps in (8, 12)
        assert (config.num_warps == 1) == (case is crowded) and config.num_warps == result['num_warps']
        assert config.occupancy * 32 * result['num_warps'] * (result['maxnreg'] or 255) <= 65536


@EACH
@FORMATS
def test_decode_runs_on_fp16_tensor_cores(compiled, fmt, capability):
    """fp16 operands and fp32 accumulation for both products, whatever the codes and the query's dtype are.

    Behind all results, what is left is to rotate outputs back: a matrix is fp16 too, the Hadamard matrix tf32.
    """
    rotated = fmt.value.rotation is not None
    for result in compiled(capability, fmt, 'decode'):
        attention, _, rest = result['ptx'].rpartition('ld.global.cg')
        products, back = MMA.findall(attention), MMA.findall(rest)
        wanted = 'f32.tf32.tf32' if result['case'] == 'plain' else 'f32.f16.f16'
        assert len(products) >= 2 and bool(back) == rotated
        assert all('f32.f16.f16' in name or 'kind::f16' in name for name in products)
        assert all(wanted in name for name in back)


@EACH
@FORMATS
def test_fp8_is_converted_by_hardware_only_where_there_is_any(compiled, fmt, capability):
    for kernel in ('decode', 'flatten'):
        for result in compiled(capability, fmt, kernel):
            assert (E4M3_TO_FP16 in result['ptx']) == (uses(fmt, 'e4m3') and capability >= 89)
    for result in compiled(capability, fmt, 'fill'):
        assert capability >= 89 or not re.search(r'cvt\.\S*e[45]m[32]x2', result['ptx'])


@EACH
@FORMATS
def test_fill_rounds_once(compiled, fmt, capability):
    """fp32 to fp8 in one step: through fp16 (Triton's cast on sm_89) values near a tie round to the wrong code."""
    for result in compiled(capability, fmt, 'fill'):
        assert not re.search(r'cvt\.\S*e[45]m[32]x2\.f16x2', result['ptx'])


@EACH
@FORMATS
def test_codes_become_fp16_without_a_detour(compiled, fmt, capability):
    """No integer-to-float conversion and no fp8 through fp32 or bf16: fp16 holds every code exactly."""
    for result in compiled(capability, fmt, 'decode'):
        assert not re.search(r'cvt\.rn\.(b?f16\.[us]\d+|f32\.[us](8|16))\b', result['ptx'])
        assert 'cvt.rn.bf16x2.e4m3x2' not in result['ptx']


@EACH
@FORMATS
def test_decode_never_loads_single_bytes(compiled, fmt, capability):
    """One page-table read per tile and token-contiguous V keep the loads of a full page wide."""
    for result in compiled(capability, fmt, 'decode'):
        if result['case'] == 'plain':
            assert not NARROW_LOAD.search(result['ptx'])


@pytest.mark.parametrize('kernel', ['fill', 'decode'])
@FORMATS
def test_launches_are_chained_from_hopper_on(compiled, fmt, kernel):
    """Programmatic dependent launch: sm_90 and newer only. None lets the next one start before it has ended."""
    for capability in CAPABILITIES:
        for result in compiled(capability, fmt, kernel):
            assert ('griddepcontrol.wait' in result['ptx']) == (capability >= 90)
            assert 'griddepcontrol.launch_dependents' not in result['ptx']


def order(ptx: str, access: re.Pattern = ACCESS) -> list[str]:
    """What a program does to global memory, and its barriers, in order: by the names of :data:`ACCESS`."""
    return [next(name for name, text in found.groupdict().items() if text) for found in access.finditer(ptx)]


@EACH
def test_merging_reads_everywhere_before_it_writes_in_place(compiled, capability):
    """Every warp reads log-sum-exps, and one replaces them: without a barrier, a late warp takes new ones for old."""
    for result in compiled(capability, kvq.FORMATS[0], 'merge'):
        steps = order(result['ptx'])
        assert steps[-2:] == ['barrier', 'write'] and 'read' not in steps[steps.index('write'):]


@EACH
@FORMATS
def test_lanes_that_add_up_have_the_same_sum(compiled, fmt, capability):
    """A product that a lane adds to another lane's is rounded first. Fused, each lane would have its own unrounded, and
    which of them goes on through shared memory is chance: compute-sanitizer's racecheck found that in combining."""
    made = re.compile(r'\s*(?:@%p\d+ )?([\w.]+)\s+(%\w+)')
    for kernel in ('fill', 'flatten', 'decode', 'merge'):
        for result in compiled(capability, fmt, kernel):
            by = {found[2]: found[1] for found in map(made.match, result['ptx'].splitlines()) if found}
            crossing = re.findall(r'shfl\.sync\.bfly\.b32\s+%\w+(?:\|%p\d+)?, (%\w+)', result['ptx'])
            assert crossing or kernel != 'decode'
            assert not [register for register in crossing if by.get(register, '').startswith('mul')]


@EACH
@FORMATS
def test_results_are_left_counted_and_combined_one_after_the_other(compiled, fmt, capability):
    """All warps have left theirs before one of them counts it; none reads others' before that; none replaces one before
    all have read it. compute-sanitizer's racecheck does not look at global memory."""
    for result in compiled(capability, fmt, 'decode'):
        steps = order(result['ptx'])
        at = steps.index('count')
        assert steps.count('count') == 1 and 'write' in steps[:at]
        assert steps[at - 1] == steps[at + 1] == 'barrier'
        combining = steps[at + 2:]
        last = len(combining) - combining[::-1].index('combine')
        assert combining[last] == 'barrier' and combining[:last].count('write') <= 1, 'the counter'


@EACH
@FORMATS
def test_reads_that_do_not_need_each_other_are_under_way_together(compiled, fmt, capability):
    """Where a barrier follows, reads are waited for: parts of queries, the first tile, and results with statistics."""
    for result in compiled(capability, fmt, 'decode'):
        steps = order(result['ptx'], QUERIES)
        steps = steps[steps.index('queries'):steps.index('copy')]
        first = steps.index('barrier')
        assert set(steps[:first]) == {'queries', 'ask'} and not set(steps[first:]) & {'queries', 'ask'}
        steps = order(result['ptx'])
        combining = steps[steps.index('combine'):len(steps) - steps[::-1].index('combine')]
        assert set(combining) == {'combine'}


@pytest.mark.parametrize('kernel, allowed', [('fill', set()), ('decode', {'read', 'barrier'})])
@FORMATS
def test_what_is_done_before_the_kernel_before_has_ended(compiled, fmt, kernel, allowed):
    """Fill waits for it at once. Decode reads lengths, pages' numbers and static scales, and asks for a tile."""
    for capability in CAPABILITIES:
        for result in compiled(capability, fmt, kernel) if capability >= 90 else ():
            steps = order(result['ptx'])
            assert set(steps[:steps.index('wait')]) <= allowed


def test_few_kernels_are_compiled_for_the_batches_of_a_server():
    """A server captures graphs for all sizes of a batch before it answers; to compile takes a second or two each.

    Tokens of less than 128 bytes have launch parameters of their own for many sequences.
    """
    found = json.loads(python('import json, aot; print(json.dumps(aot.compilations_of_a_server()))',
                              PYTHONPATH=f'{HERE}:{HERE.parent}').stdout)
    assert set(found) == {fmt.name for fmt in kvq.FORMATS}
    for name, counts in found.items():
        few = sum(row.codec.bits for row in (kvq.get_format(name).key, kvq.get_format(name).value)) < 8
        assert counts['_decode_kernel'] == 3 + few and counts['_fill_kernel'] <= 3
