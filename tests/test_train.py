"What a notebook can't show of the loop: killed processes, a full disk, ranges of settings"
import json, math, os, signal, subprocess, sys, textwrap
import pytest, torch
from types import SimpleNamespace
from hypothesis import given, settings, strategies as st
from torch import nn
from mim_nb.data import ImageSet
from mim_nb.methods import create
from mim_nb.runs import _write_ckpt
from mim_nb.step import Step
from mim_nb.tokenizers import DVAE
from mim_nb.runs import Stopped, load_ckpt, read_log, save_ckpt
from mim_nb.train import fit, lr_at, param_groups
from mim_nb.step import recompute_blocks, step_seed
from mim_nb.files import write_whole

@given(steps=st.integers(1, 5000), warm=st.floats(0, 1), lr=st.floats(1e-6, 1), low=st.floats(0, 1))
def test_learning_rate_stays_in_bounds(steps, warm, lr, low):
    warmup,min_lr = int(steps*warm),lr*low
    rates = [lr_at(i, steps, warmup, lr, min_lr) for i in range(steps)]
    assert all(0<=r<=lr*(1+1e-9) for r in rates)
    assert rates[:warmup]==sorted(rates[:warmup]) and rates[warmup:]==sorted(rates[warmup:], reverse=True)
    assert all(r>=min_lr*(1-1e-9) for r in rates[warmup:])

@given(st.lists(st.tuples(st.integers(0, 2**40), st.integers(0, 2**40), st.integers(0, 4096)), unique=True, min_size=2, max_size=20))
def test_step_seeds_differ_and_fit_a_generator(keys):
    seeds = [step_seed(*k) for k in keys]
    assert len(set(seeds))==len(keys)
    for s in seeds: torch.Generator().manual_seed(s)

class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Dropout(.5), nn.Linear(8, 16))
    def forward(self, x): return SimpleNamespace(loss=(self.net(x)-x.flatten(1)).pow(2).mean(), logs={})

def small(): torch.manual_seed(0); return Small()
DATA = ImageSet(torch.randint(0, 256, (64,1,4,4), generator=torch.Generator().manual_seed(0)).to(torch.uint8))
KW = dict(epochs=3, batch_size=8, lr=1e-2, device='cpu', bar=False)

def same(a, b): return all(torch.equal(x, y) for x,y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))

@pytest.fixture(scope='module')
def whole():
    m = small(); fit(m, DATA, **KW)
    return m

class PowerCut(BaseException): pass

@settings(max_examples=12, deadline=None)
@given(cut=st.integers(0, 23), save_every=st.integers(1, 10))
def test_cut_at_any_step_and_resumed_gives_the_same_bits(whole, tmp_path_factory, cut, save_every):
    folder,seen = tmp_path_factory.mktemp('run'),0
    def forward(m, x, y):
        nonlocal seen
        if seen==cut: raise PowerCut
        seen += 1
        return m(x)
    with pytest.raises(PowerCut): fit(small(), DATA, folder=folder, save_every=save_every, forward=forward, **KW)
    m = Small() if (folder/'last.ckpt').exists() else small()
    rows = fit(m, DATA, folder=folder, save_every=save_every, resume=(folder/'last.ckpt').exists(), **KW)
    assert same(m, whole)
    assert [r['step'] for r in rows]==sorted({r['step'] for r in rows}) and rows[-1]['step']==24

def test_fit_leaves_the_global_generator_alone():
    m = small()
    torch.manual_seed(5); expected = torch.rand(3)
    torch.manual_seed(5); fit(m, DATA, **KW)
    assert torch.equal(torch.rand(3), expected)

def test_other_seed_other_result(whole):
    m = small(); fit(m, DATA, **KW, seed=1)
    assert not same(m, whole)

@pytest.mark.parametrize('crash', ['before the first rename', 'between the renames'])
def test_crash_while_saving(tmp_path, crash):
    m = small(); opt = torch.optim.AdamW(param_groups(m, .05))
    for step in (1, 2): save_ckpt(tmp_path, step, m, opt, {})
    (tmp_path/'new.ckpt').write_bytes(b'half')
    if crash=='between the renames': os.replace(tmp_path/'last.ckpt', tmp_path/'previous.ckpt')
    assert load_ckpt(tmp_path)['step']==2
    save_ckpt(tmp_path, 3, m, opt, {})
    assert load_ckpt(tmp_path)['step']==3

def test_checkpoint_with_code_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self): return os.mkdir, (str(tmp_path/'pwned'),)
    torch.save(dict(step=1, settings={}, model={}, opt=Evil()), tmp_path/'last.ckpt')
    with pytest.raises(ValueError, match='no checkpoint in .* can be read'): load_ckpt(tmp_path)
    assert not (tmp_path/'pwned').exists()

def test_checkpoint_with_code_and_a_checksum_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self): return os.mkdir, (str(tmp_path/'pwned'),)
    _write_ckpt(tmp_path/'last.ckpt', dict(step=1, settings={}, model={}, opt=Evil()))
    with pytest.raises(ValueError, match='no checkpoint in .* can be read'): load_ckpt(tmp_path)
    assert not (tmp_path/'pwned').exists()

def test_disk_full_while_saving(tmp_path):
    "A limit on the size of files stands in for a full disk: writing fails in the middle"
    code = f'''
        import resource, sys
        sys.path.insert(0, {str(os.path.dirname(__file__))!r})
        from test_train import *
        folder = {str(tmp_path)!r}
        fit(small(), DATA, folder=folder, **KW)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        m = small(); opt = torch.optim.AdamW(param_groups(m, .05))
        try: save_ckpt(folder, 99, m, opt, {{}})
        except OSError as e: assert 'untouched' in str(e) and 'free some space' in str(e), e
        else: raise SystemExit('the write did not fail')
        assert load_ckpt(folder)['step']==24
        assert not os.path.exists(folder+'/new.ckpt')
    '''
    r = subprocess.run([sys.executable, '-c', textwrap.dedent(code)], capture_output=True, text=True, timeout=120)
    assert r.returncode==0, r.stderr

def test_write_whole_cleans_up(tmp_path):
    with pytest.raises(OSError, match='untouched'): write_whole(tmp_path/'none'/'a', lambda f: f.write(b'x'))
    write_whole(tmp_path/'a', lambda f: f.write(b'x'))
    assert [p.name for p in tmp_path.iterdir()]==['a']

def test_log_survives_half_a_line(tmp_path):
    (tmp_path/'log.jsonl').write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert read_log(tmp_path)==[dict(step=1, loss=2.)]
    assert read_log(tmp_path/'nowhere')==[]

def test_log_lines_are_json_without_nan(tmp_path):
    fit(small(), DATA, folder=tmp_path, **KW)
    for l in (tmp_path/'log.jsonl').read_text().splitlines():
        assert all(math.isfinite(v) for v in json.loads(l, parse_constant=lambda c: pytest.fail(c)).values())

def test_every_signal_saves_and_stops(tmp_path):
    for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        folder = tmp_path/str(int(s)); folder.mkdir()
        def forward(m, x, y):
            if not (folder/'last.ckpt').exists(): os.kill(os.getpid(), s)
            return m(x)
        with pytest.raises(Stopped, match='stopped at step 1 of 24') as e: fit(small(), DATA, folder=folder, forward=forward, **KW)
        assert e.value.signum==s and load_ckpt(folder)['step']==1

def test_a_cluster_may_say_it_twice(tmp_path):
    "Once to the process itself, and once more by way of torchrun"
    def forward(m, x, y):
        for s in (signal.SIGUSR1, signal.SIGUSR1, signal.SIGTERM): os.kill(os.getpid(), s)
        return m(x)
    with pytest.raises(Stopped, match='saved in'): fit(small(), DATA, folder=tmp_path, forward=forward, **KW)
    def impatient(m, x, y):
        for _ in range(2): os.kill(os.getpid(), signal.SIGINT)
        return m(x)
    with pytest.raises(KeyboardInterrupt) as e: fit(small(), DATA, forward=impatient, **KW)
    assert not isinstance(e.value, Stopped)

METHODS = {n: dict(img_size=16, patch_size=4, in_chans=1, embed_dim=16, num_heads=1, depth=2, drop_path=.2) for n in ('beit', 'mcbeit', 'mae', 'deepmim', 'saim')} | \
    dict(mixmim=dict(img_size=16, patch_size=2, in_chans=1, embed_dim=16, depths=(1,1), num_heads=(1,2), window=None, drop_path=.2))

def grads(name, on):
    "Gradients of one step, and the bytes that wait for the backward pass"
    m = made(name)
    kept = {}
    def pack(t): kept[t.data_ptr()] = t.numel()*t.element_size(); return t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), recompute_blocks(m, on): loss = m(torch.rand(4,1,16,16)).loss
    with recompute_blocks(m, on): pass
    loss.backward()
    return {n: p.grad for n,p in m.named_parameters() if p.grad is not None},sum(kept.values())

def made(name, **kw):
    torch.manual_seed(0)
    m = create(name, 'tiny', **METHODS[name]|kw).train()
    if 'beit' in name: m.set_tokenizer(DVAE(16, 4, 1, m.head.out_features, width=16, depth=1))
    return m

@pytest.mark.parametrize('name', METHODS)
def test_a_step_draws_as_the_method_itself_does(name):
    "Mask, target, dropped paths: the same numbers in the same order, to the bit"
    a,b = made(name),made(name)
    x = torch.randint(0, 256, (4,1,16,16), dtype=torch.uint8)
    torch.manual_seed(step_seed(3, 7))
    out = a(x/255)
    out.loss.backward()
    logs = Step(b, torch.optim.SGD(b.parameters(), lr=0.), seed=3)(7, x, torch.zeros(4))
    assert torch.equal(logs['loss'], out.loss.detach()) and logs.keys()=={'loss', 'grad_norm', *out.logs}
    norm = torch.stack([p.grad.norm() for p in a.parameters() if p.grad is not None]).norm()
    assert abs(logs['grad_norm']-norm)<1e-5*norm

def test_a_step_marks_its_five_parts():
    m,n = made('mae'),[]
    step = Step(m, torch.optim.AdamW(m.parameters()))
    step(0, torch.zeros(4,1,16,16, dtype=torch.uint8), torch.zeros(4), lambda: n.append(next(m.parameters()).grad is not None))
    assert n==[False, False, False, True, False]

def test_a_step_takes_images_of_the_right_size_only():
    m = made('mae')
    with pytest.raises(ValueError, match='takes images of shape'): Step(m, torch.optim.AdamW(m.parameters()))(0, torch.zeros(4,1,8,8, dtype=torch.uint8), torch.zeros(4))

@pytest.mark.parametrize('name', METHODS)
def test_checkpointing_gives_the_same_gradients(name):
    (a,much),(b,less) = grads(name, False),grads(name, True)
    assert a.keys()==b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert less<much

def test_checkpointing_leaves_no_trace():
    m = create('mae', 'tiny'); before = {k for b in m.modules() for k in vars(b)}
    fit(m, ImageSet(torch.zeros(4,1,28,28, dtype=torch.uint8)), epochs=1, batch_size=2, device='cpu', bar=False, checkpointing=True)
    assert {k for b in m.modules() for k in vars(b)}==before

def test_compiled_steps_leave_no_prefix(whole, tmp_path):
    m = small(); fit(m, DATA, folder=tmp_path, compile=dict(backend='aot_eager'), **KW)
    assert m.state_dict().keys()==load_ckpt(tmp_path)['model'].keys()==whole.state_dict().keys()
    assert same(m, whole)

def test_out_of_memory_names_the_knobs():
    def forward(m, x, y): raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has…')
    with pytest.raises(torch.OutOfMemoryError, match='too small for 4 images at a time.*--accumulate.*--checkpointing.*--batch.*--preset') as e:
        fit(small(), DATA, forward=forward, accumulate=2, **KW)
    assert '\n' not in str(e.value)

def test_turns_that_do_not_divide():
    with pytest.raises(ValueError, match='a batch of 8 images cannot be cut into 3 equal slices'): fit(small(), DATA, accumulate=3, **KW)

def test_turns_resume_to_the_same_bits(tmp_path):
    kw = dict(KW, accumulate=2, save_every=5)
    whole = small(); fit(whole, DATA, **kw)
    def forward(m, x, y):
        if (tmp_path/'last.ckpt').exists(): raise PowerCut
        return m(x)
    with pytest.raises(PowerCut): fit(small(), DATA, folder=tmp_path, forward=forward, **kw)
    m = Small(); fit(m, DATA, folder=tmp_path, resume=True, **kw)
    assert same(m, whole)

def test_tensorboard_is_optional(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', None)
    with pytest.raises(ImportError, match='pip install tensorboard'): fit(small(), DATA, folder=tmp_path, tensorboard=True, **KW)
    seen = []
    class SummaryWriter:
        def __init__(self, folder, purge_step): seen.append((folder, purge_step))
        def add_scalar(self, *args): seen.append(args)
        def flush(self): pass
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', SimpleNamespace(SummaryWriter=SummaryWriter))
    rows = fit(small(), DATA, folder=tmp_path, tensorboard=True, **KW)
    assert seen[0]==(str(tmp_path), 0) and ('loss', rows[-1]['loss'], 24) in seen

def test_rows_say_where_the_time_went(tmp_path):
    rows = fit(small(), DATA, folder=tmp_path, **KW)
    assert all(0<=r['waiting']<=1 for r in rows) and [r['step'] for r in rows if 'save_seconds' in r]==[10, 20]      # the rows that follow the checkpoints of steps 8 and 16

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_cuda_trains_and_resumes(tmp_path):
    kw = dict(KW, device='cuda')
    rows = fit(small(), DATA, folder=tmp_path, **kw)
    assert rows[-1]['loss']<rows[0]['loss']
    assert fit(Small(), DATA, folder=tmp_path, resume=True, **kw)==rows
