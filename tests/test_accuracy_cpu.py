"""The accuracy benchmark: its emulations are LMDeploy's own kernels, and what it chooses, compares and judges."""
import math

import pytest
import torch
from helpers import frobenius

from lmdeploy_kvq import FORMATS

pytest.importorskip('transformers', minversion='5')
import accuracy_cpu
import emulations
from transformers import LlamaConfig, LlamaForCausalLM

LMDEPLOY = {8: (emulations.asymmetric(8, torch.float32), ) * 2, 4: (emulations.asymmetric(4, torch.float32), ) * 2,
            42: (emulations.lloyd_max(3, True, torch.float32), emulations.lloyd_max(2, kept=torch.float32))}


@pytest.mark.parametrize('policy', LMDEPLOY)
def test_lmdeploys_formats_are_its_kernels(device, policy):
    """What its fill and flatten kernels make of rows, with scales in fp32: the interpreter cuts bf16."""
    from lmdeploy.messages import QuantPolicy
    from lmdeploy.pytorch.kernels.cuda.fill_kv_cache import fill_kv_cache
    from lmdeploy.pytorch.kernels.cuda.flatten_kv_cache import flatten_kv_cache
    from lmdeploy.pytorch.kernels.cuda.turbo_quant import hadamard_rotate_inv
    tokens, heads, dim, page = 20, 2, 64, 16
    generator = torch.Generator().manual_seed(0)
    key, value = torch.randn(2, tokens, heads, dim, generator=generator).to(device)
    key = key * torch.logspace(-1, 1, dim, device=device)
    sizes = {8: (dim, dim), 4: (dim // 2, dim // 2), 42: (dim // 2, dim // 4)}[policy]
    pages = [torch.zeros(3, page, heads, size, dtype=torch.uint8, device=device) for size in sizes]
    kept = [torch.zeros(3, page, heads, 1 if policy == 42 and i else 2, device=device) for i in range(2)]
    lens, table = torch.tensor([tokens], device=device), torch.tensor([[1, 2]], device=device)
    scales = {'k_scales_zeros': kept[0], 'v_scales_zeros': kept[1], 'quant_policy': QuantPolicy(policy)}
    fill_kv_cache(key, value, *pages, torch.zeros_like(lens), lens, lens, tokens, table, **scales)
    read = flatten_kv_cache(*pages, lens, table, out_dtype=torch.float32, **scales)
    for got, rows, emulated in zip(read, (key, value), LMDEPLOY[policy], strict=True):
        got = got[:, :tokens].transpose(0, 1)
        got = (hadamard_rotate_inv(got) if policy == 42 else got).cpu()
        expected = emulated(rows.cpu())
        assert frobenius(got, expected) < 1e-5 < 1e-3 < frobenius(expected, rows.cpu())


def test_every_emulation_keeps_rows_near_their_size():
    rows = torch.randn(500, 3, 64, generator=torch.Generator().manual_seed(1))
    limits = {8: 0.02, 4: 0.12, 3: 0.2, 2: 0.37}
    for emulation in emulations.EMULATIONS:
        for store, bits in zip((emulation.key, emulation.value), emulation.bits, strict=True):
            assert 0 < frobenius(store(rows), rows) < limits[bits], emulation.name
        assert emulation.bits_per_element(128) < 9


def test_it_measures_a_model():
    """Every contender on a small model: nothing is lost without quantization, and int8 loses least."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, head_dim=32,
                         num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2)
    model = LlamaForCausalLM(config).eval()
    pieces = [(domain, torch.randint(0, 64, (48, ), generator=torch.Generator().manual_seed(seed)).tolist())
              for seed, domain in enumerate(accuracy_cpu.DOMAINS * 2)]
    found = list(accuracy_cpu.contenders(32, {}))
    assert {c.name for c in found if c.owner == accuracy_cpu.OURS} == {fmt.name for fmt in FORMATS}
    rows = accuracy_cpu.compare(model, pieces, found)
    assert len(rows) == 2 * (1 + len(found)) and all(row['passages'] == 2 for row in rows)
    assert all(row['mean_kl'] == 0 and row['top1_agreement'] == 1 for row in rows if row['owner'] == 'transformers')
    kl = {(row['owner'], row['format']): row['mean_kl'] for row in rows if row['domain'] == 'prose'}
    ours = {name: value for (owner, name), value in kl.items() if owner == accuracy_cpu.OURS}
    assert min(ours, key=ours.get) == 'int8_per_token_head' and all(math.isfinite(x) and x > 0 for x in ours.values())


def test_calibrated_files_serve_the_contenders(tmp_path):
    config = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, head_dim=16,
                         num_attention_heads=4, num_key_value_heads=2)
    model, ids = LlamaForCausalLM(config).eval(), list(range(60))
    files = accuracy_cpu.calibrate(model, [ids], tmp_path)
    kinds = {c.transform for c in accuracy_cpu.contenders(16, files) if c.name == 'int4_per_token_head'
             and c.owner == accuracy_cpu.OURS}
    assert kinds == {'hadamard', *files}
    for contender in accuracy_cpu.contenders(16, files):
        if contender.transform in files:
            with torch.inference_mode():
                assert accuracy_cpu.measure(model, ids, contender.make(), None)[0].isfinite().all()


def test_verdicts_take_the_worse_domain():
    rows = [{'owner': owner, 'format': name, 'transform': kind, 'domain': domain, 'mean_kl': kl}
            for ours, transform, limit, theirs, other in accuracy_cpu.TARGETS
            for domain, share in zip(accuracy_cpu.DOMAINS, (0.5, 1.01 if ours.startswith('int2') else 0.99))
            for owner, name, kind, kl in ((accuracy_cpu.OURS, ours, transform, share * limit * 0.2),
                                          (theirs, other, 'none', 0.2))]
    found = {(line['format'], line['transform']): line['verdict'] for line in accuracy_cpu.verdicts(rows)}
    assert found.pop(('int2_per_token_head', 'balanced')) == 'missed' and set(found.values()) == {'met'}


def test_passages_are_not_calibrated_on():
    class Words:
        def encode(self, text):
            return [hash(word) for word in text.split()]

    train, test = accuracy_cpu.choose(Words(), 256, 4)
    assert [domain for domain, _ in test] == [d for d in accuracy_cpu.DOMAINS for _ in range(4)]
    assert train and not any(ids in train for _, ids in test)
    with pytest.raises(SystemExit, match='too few'):
        accuracy_cpu.choose(Words(), 4096, 4)


def test_what_a_gain_through_the_engine_is():
    """scripts/transform_gain.py: calibrated below Hadamard, where that is above twice the floor of bf16."""
    import transform_gain

    from lmdeploy_kvq.transforms import KINDS

    def rows(hadamard, calibrated):
        return [{'format': 'none again', 'transform': '', 'mean_kl': 0.01},
                *({'format': fmt.name, 'transform': kind, 'mean_kl': hadamard if kind == 'hadamard' else calibrated}
                  for fmt in transform_gain.TAKING for kind in ('hadamard', *KINDS))]

    assert transform_gain.verdicts(rows(0.1, 0.05)) == transform_gain.verdicts(rows(0.015, 0.02)) == []
    assert len(transform_gain.verdicts(rows(0.1, 0.1))) == len(transform_gain.TAKING) * len(KINDS)
