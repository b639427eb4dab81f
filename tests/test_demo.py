"""The demo's server half, against a stand-in for LMDeploy's server; the CPU half on a tiny random model."""
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parent.parent / 'scripts'

FAKE = '''
import json, subprocess, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
mode, pids, args = sys.argv[1], sys.argv[2], sys.argv[3:]
stubborn = 'import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)'
worker = subprocess.Popen([sys.executable, '-c', stubborn])
open(pids, 'w').write(str(worker.pid))
print('starting', args, flush=True)
if mode == 'dies':
    sys.exit('no GPU today')
print("2026-01-01 - lmdeploy - INFO - base.py:439 - Building CacheEngine with config: \\\\nCacheConfig("
      "max_batches=256, block_size=64, num_cpu_blocks=0, num_gpu_blocks=1000, kernel_block_size=32).", flush=True)
class Handler(BaseHTTPRequestHandler):
    def answer(self, reply, code=200):
        body = json.dumps(reply).encode()
        self.send_response(code); self.send_header('Content-Length', str(len(body))); self.end_headers()
        self.wfile.write(body)
    def do_GET(self):
        self.answer({'data': [{'id': 'the-model'}]})
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
        if mode == 'refuses':
            return self.answer({'message': 'out of order'}, 400)
        assert asked['model'] == 'the-model'
        self.answer({'choices': [{'message': {'content': ' Paris. '}}],
                     'usage': {'completion_tokens': asked['max_tokens']}})
    def log_message(self, *args): pass
ThreadingHTTPServer.request_queue_size = 128
ThreadingHTTPServer(('127.0.0.1', int(args[args.index('--server-port') + 1])), Handler).serve_forever()
'''


@pytest.fixture
def demo(monkeypatch, tmp_path):
    """Import the demo with a stand-in server; ``demo.stand_in(mode)`` chooses what it does."""
    pytest.importorskip('transformers', minversion='5')
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import demo
    import server
    monkeypatch.setattr('tempfile.tempdir', str(tmp_path))
    (tmp_path / 'fake.py').write_text(FAKE)
    demo.pids = tmp_path / 'worker'

    def stand_in(mode):
        monkeypatch.setattr(server, 'lmdeploy_command',
                            lambda: [sys.executable, str(tmp_path / 'fake.py'), mode, str(demo.pids)])

    demo.stand_in = stand_in
    return demo


@pytest.fixture
def model(tmp_path):
    """A folder with the config.json of SmolLM2's shape."""
    from transformers import LlamaConfig
    LlamaConfig(num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, hidden_size=576, head_dim=64
                ).save_pretrained(tmp_path / 'model')
    return str(tmp_path / 'model')


def worker_gone(demo):
    pid = demo.pids.read_text()
    for _ in range(50):
        try:
            state = Path(f'/proc/{pid}/stat').read_text().rsplit(')', 1)[1].split()[0]
        except OSError:
            return True
        if state == 'Z':  # dead, and not yet collected by whoever inherited it
            return True
        time.sleep(0.1)
    return False


def test_server_demo(demo, model, capsys):
    demo.stand_in('works')
    demo.demo_gpu(model, 'FP8_per_token_head')
    out = capsys.readouterr().out
    assert '--quant-policy fp8_per_token_head' in out
    assert demo.QUESTION in out and 'Paris.' in out
    assert f'({demo.REQUESTS * demo.TOKENS:,} tokens in' in out
    # 1,000 blocks of 64, in pages of 32: 12,480 bytes per token (padding included) against 23,040
    for number in ('64,000', '12,480', '23,040', '34,666', '1.85 times'):
        assert number in out
    assert 'computed' in out and not list(Path(demo.pids).parent.glob('lmdeploy-*.log'))
    assert all(len(line) <= 100 for line in out.splitlines() if 'server answers' not in line)
    assert worker_gone(demo)


@pytest.mark.parametrize('mode, message', [('dies', 'no GPU today'), ('refuses', 'out of order')])
def test_server_is_stopped_after_errors(demo, model, mode, message):
    demo.stand_in(mode)
    with pytest.raises(RuntimeError, match=message):
        demo.demo_gpu(model, 'fp8')
    assert worker_gone(demo)


def test_server_is_stopped_by_ctrl_c(demo, model, monkeypatch):
    demo.stand_in('works')

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo.Server, 'ask', interrupt)
    with pytest.raises(KeyboardInterrupt):
        demo.demo_gpu(model, 'fp8')
    assert worker_gone(demo)


def test_transformers_demo(demo, tmp_path, capsys):
    """Every format gets a row; the model is random and its tokenizer made up on the spot."""
    import tokenizers
    import torch
    import transformers

    from lmdeploy_kvq import FORMATS, capacity
    torch.manual_seed(0)
    words = tokenizers.ByteLevelBPETokenizer()
    words.train_from_iterator([(SCRIPTS.parent / 'lmdeploy_kvq/data/prose.txt').read_text()], vocab_size=300,
                              special_tokens=['<end>'], show_progress=False)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words._tokenizer, eos_token='<end>')
    tokenizer.chat_template = '{% for message in messages %}{{ message.content }}{% endfor %}'
    tokenizer.save_pretrained(tmp_path)
    config = transformers.LlamaConfig(vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                                      num_attention_heads=4, num_key_value_heads=2, head_dim=32)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    demo.demo_cpu(str(tmp_path), 50)
    out = capsys.readouterr().out
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.startswith('  ') and '%' in line}
    assert list(rows) == ['none', *(fmt.name for fmt in FORMATS)]
    shape = capacity.CacheShape(2, 2, 32)
    for name, (size, share, perplexity, divergence) in rows.items():
        fmt = None if name == 'none' else name
        assert size == f'{capacity.bytes_per_token(fmt, shape):,.0f}' and share.endswith('%')
        assert 250 < float(perplexity) < 360  # it knows nothing: about the size of its vocabulary
        assert (float(divergence) == 0) == (fmt is None) or float(divergence) < 0.001
    assert demo.QUESTION in out and '50 tokens of English prose' in out and out.count('answering') == len(rows)
    assert all(len(line) <= 100 for line in out.splitlines() if 'loading' not in line)


def test_mistakes_are_sentences(tmp_path):
    def run(*args, **env):
        return subprocess.run([sys.executable, str(SCRIPTS / 'demo.py'), *args], check=False, capture_output=True,
                              text=True, timeout=120, env={**os.environ, 'HF_HUB_OFFLINE': '1', **env})

    done = run('--cpu', str(tmp_path / 'nowhere'))
    assert done.returncode == 2 and 'there is no folder' in done.stderr and 'Traceback' not in done.stderr
    done = run('--quant-policy', 'fp9')
    assert done.returncode == 1 and 'fp8_per_token_head (116)' in done.stderr and 'Traceback' not in done.stderr
    done = run('no-such/model', '--cpu')
    assert done.returncode == 1 and 'Traceback' not in done.stderr
    done = run('--tokens', '1')
    assert done.returncode == 2 and 'at least 2' in done.stderr
