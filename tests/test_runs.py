"Runs that are killed, damaged, short of disk, or started again with something else"
import builtins, errno, math, os, random, signal, subprocess, sys, textwrap
import pytest, torch
from pathlib import Path
from types import SimpleNamespace
from unittest import mock
from torch import nn
import mim_nb.runs as runs
from faults import Death, die, faults, kill, operations, refuse
from mim_nb.data import ImageSet
from mim_nb.files import remove_debris
from mim_nb.runs import (PoliteSignals, Stopped, append_row, find_ckpts, load_ckpt, read_log,
                         resume_run, save_ckpt, start_run)
from mim_nb.train import Recipe, fit

class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Dropout(.5), nn.Linear(8, 16))
    def forward(self, x): return SimpleNamespace(loss=(self.net(x)-x.flatten(1)).pow(2).mean(), logs={})

def small():
    torch.manual_seed(0)
    return Small()

def images(seed=0, n=48): return ImageSet(torch.randint(0, 256, (n,1,4,4), generator=torch.Generator().manual_seed(seed)).to(torch.uint8))
DATA = images()
KW = dict(epochs=1, batch_size=8, lr=1e-2, device='cpu', bar=False, save_every=2, log_every=3)
TIMES = 'images_per_second', 'waiting', 'save_seconds'

def plain(rows): return [{k: v for k,v in r.items() if k not in TIMES} for r in rows]
def same(a, b): return all(torch.equal(x, y) for x,y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
def names(folder): return sorted(p.name for p in Path(folder).iterdir())

@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    folder,m = tmp_path_factory.mktemp('whole'),small()
    return m,plain(fit(m, DATA, folder=folder, **KW)),plain(read_log(folder))

@pytest.fixture
def saved(tmp_path):
    "A folder with two checkpoints, and what made them"
    m = small()
    opt = torch.optim.AdamW(m.parameters())
    m(torch.rand(2,1,4,4)).loss.backward()
    opt.step()
    for step in (10, 20): save_ckpt(tmp_path, step, m, opt, {})
    return tmp_path,m,opt

# ---- killed after every operation

def go_on(folder):
    "Start a killed run again, as `mim_pretrain --resume` does"
    remove_debris(folder)
    m = small() if not find_ckpts(folder) else Small()
    return m,fit(m, DATA, folder=folder, resume=bool(find_ckpts(folder)), **KW)

def check_resumed(folder, undisturbed):
    m,rows = go_on(folder)
    whole,returned,logged = undisturbed
    assert same(m, whole) and plain(rows)==returned and plain(read_log(folder))==logged
    remove_debris(folder)
    assert set(names(folder))<={'last.ckpt', 'previous.ckpt', 'log.jsonl', 'new.ckpt'}

def test_killed_after_every_operation(tmp_path, undisturbed):
    (tmp_path/'count').mkdir()
    n = operations(tmp_path/'count', lambda: fit(small(), DATA, folder=tmp_path/'count', **KW))
    assert n>=30
    for at in range(1, n+1):
        folder = tmp_path/str(at)
        folder.mkdir()
        begun,there = [],[]
        def counted(*args):
            begun.append(args[1])
            save_ckpt(*args)
        def watch():
            if there: assert (folder/'last.ckpt').exists()
            elif (folder/'last.ckpt').exists(): there.append(True)
        with mock.patch('mim_nb.train.save_ckpt', counted), faults(folder, at, die, watch), pytest.raises(Death):
            fit(small(), DATA, folder=folder, **KW)
        if len(begun)>1: assert load_ckpt(folder)['step']>=begun[-2] and (folder/'last.ckpt').exists()
        check_resumed(folder, undisturbed)

@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
def test_killed_in_earnest(tmp_path, undisturbed):
    (tmp_path/'count').mkdir()
    n = operations(tmp_path/'count', lambda: fit(small(), DATA, folder=tmp_path/'count', **KW))
    for at in (2, n//3, n//2, n//2+2, n-3, n-1):
        folder = tmp_path/str(at)
        folder.mkdir()
        child = os.fork()
        if not child:
            try:
                with faults(folder, at, kill): fit(small(), DATA, folder=folder, **KW)
            finally: os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])==-signal.SIGKILL
        check_resumed(folder, undisturbed)

def test_killed_before_the_first_checkpoint_and_started_again(tmp_path, undisturbed):
    def cut(m, x, y):
        if len(read_log(tmp_path))==1: raise Death
        return m(x)
    with pytest.raises(Death): fit(small(), DATA, folder=tmp_path, forward=cut, **KW|dict(save_every=6))
    assert len(read_log(tmp_path))==1 and not find_ckpts(tmp_path)
    m = small()
    fit(m, DATA, folder=tmp_path, **KW)
    assert same(m, undisturbed[0]) and plain(read_log(tmp_path))==undisturbed[2]

def test_two_names_of_one_file(saved):
    "A kill after the link: both names are one file, which a rename would leave alone"
    folder,m,opt = saved
    os.remove(folder/'previous.ckpt')
    os.link(folder/'last.ckpt', folder/'previous.ckpt')
    save_ckpt(folder, 30, m, opt, {})
    assert names(folder)==['last.ckpt', 'previous.ckpt'] and load_ckpt(folder)['step']==30
    (folder/'last.ckpt').unlink()
    assert load_ckpt(folder)['step']==20

@pytest.mark.parametrize('number', [errno.EPERM, errno.ENOTSUP])
def test_file_systems_without_links(saved, number):
    folder,m,opt = saved
    def no_link(*args, **kw): raise OSError(number, os.strerror(number))
    with mock.patch('os.link', no_link): save_ckpt(folder, 30, m, opt, {})
    (folder/'last.ckpt').write_bytes(b'')
    assert names(folder)==['last.ckpt', 'previous.ckpt'] and load_ckpt(folder)['step']==20

def test_resumed_from_any_of_three(saved):
    folder,m,opt = saved
    os.rename(folder/'last.ckpt', folder/'new.ckpt')
    assert load_ckpt(folder)['step']==20
    (folder/'new.ckpt').unlink()
    assert load_ckpt(folder)['step']==10

def test_a_full_disk_after_a_kill_loses_nothing(saved):
    folder,m,opt = saved
    os.rename(folder/'last.ckpt', folder/'new.ckpt')
    os.rename(folder/'previous.ckpt', folder/'last.ckpt')
    n = 8
    for at in range(1, n):
        with faults(folder, at, refuse(errno.ENOSPC)), pytest.raises(OSError): save_ckpt(folder, 20, m, opt, {})
        assert load_ckpt(folder)['step']==20

# ---- damaged

def damaged(data, rng):
    "1,000 single flipped bits and 100 zeroed pages"
    for _ in range(1000):
        bad,bit = bytearray(data),rng.randrange(len(data)*8)
        bad[bit//8] ^= 1<<bit%8
        yield bad
    for _ in range(100):
        bad,at = bytearray(data),rng.randrange(0, len(data), 64)
        bad[at:at+4096] = bytes(len(bad[at:at+4096]))
        yield bad

def test_every_damage_is_noticed(saved, capsys):
    folder,_,_ = saved
    last = folder/'last.ckpt'
    data = last.read_bytes()
    n = 0
    for bad in damaged(data, random.Random(0)):
        if bad==data: continue
        last.write_bytes(bad)
        assert load_ckpt(folder)['step']==10
        said = capsys.readouterr().out
        assert said.startswith('last.ckpt cannot be used (') and 'damaged' in said and 'falling back to previous.ckpt' in said
        n += 1
    assert n>=1080

def test_both_are_damaged(saved):
    folder,_,_ = saved
    for f in find_ckpts(folder): f.write_bytes(f.read_bytes()[:-1])
    with pytest.raises(ValueError, match='no checkpoint in .* can be read: start again'): load_ckpt(folder)

def test_checkpoints_of_version_0_1_are_refused(saved, capsys):
    folder,m,opt = saved
    torch.save(dict(step=30, settings={}, model=m.state_dict(), opt=opt.state_dict()), folder/'last.ckpt')
    assert load_ckpt(folder)['step']==10
    assert 'last.ckpt cannot be used (it has no checksum: it was damaged, or made before version 0.2)' in capsys.readouterr().out

@pytest.mark.parametrize('state', [7, [], dict(step=1), dict(step='1', settings={}, model={}, opt={}), dict(step=1, settings=[], model={}, opt={})])
def test_checkpoints_of_other_kinds(tmp_path, state):
    runs._write_ckpt(tmp_path/'last.ckpt', state)
    with pytest.raises(ValueError, match='no checkpoint in .* can be read'): load_ckpt(tmp_path)

@pytest.mark.parametrize('other', [nn.Linear(2, 2), nn.Linear(16, 8)])
def test_checkpoints_of_another_network(saved, other):
    folder,_,_ = saved
    with pytest.raises(ValueError, match='belongs to another network') as e: resume_run(folder, other, torch.optim.AdamW(other.parameters()), {})
    assert '\n' not in str(e.value)

def test_log_rows_that_are_none(tmp_path):
    rows = [b'{"step": 1, "loss": 2.0}', b'7', b'null', b'[1]', b'"step"', b'{"loss": 1}', b'{"step": "1"}', b'\xff\xfe', b'['*100_000, b'{"step": 2, "lo']
    (tmp_path/'log.jsonl').write_bytes(b'\n'.join(rows))
    assert read_log(tmp_path)==[dict(step=1, loss=2.)]

# ---- a full disk

@pytest.mark.parametrize('number,said', [(errno.ENOSPC, 'the disk is full.*free some space'), (errno.EACCES, 'this user may not write there')])
def test_no_room_at_every_operation(saved, number, said):
    folder,m,opt = saved
    n = operations(folder, lambda: save_ckpt(folder, 20, m, opt, {}))
    assert n>=7
    for at in range(1, n+1):
        before = load_ckpt(folder)['step']
        with faults(folder, at, refuse(number)), pytest.raises(OSError, match=said) as e: save_ckpt(folder, before+1, m, opt, {})
        assert ('free some space' in str(e.value))==(number==errno.ENOSPC) and '\n' not in str(e.value)
        assert names(folder)==['last.ckpt', 'previous.ckpt'] and load_ckpt(folder)['step']>=before
        (folder/'last.ckpt').rename(folder/'held')
        assert load_ckpt(folder)['step']>=before-1
        (folder/'held').rename(folder/'last.ckpt')

def test_what_torch_says_of_a_full_disk(saved):
    folder,m,opt = saved
    def full(*args): raise RuntimeError('[enforce fail at inline_container.cc:672] . unexpected pos 46 vs 0')
    with mock.patch('torch.save', full), pytest.raises(OSError, match='could not save step 30 in .*: the disk is full'): save_ckpt(folder, 30, m, opt, {})
    assert names(folder)==['last.ckpt', 'previous.ckpt'] and load_ckpt(folder)['step']==20

def test_no_room_for_a_row(tmp_path):
    append_row(tmp_path, dict(step=1))
    class Full:
        def __init__(self, f): self.f = f
        def __enter__(self): return self
        def __exit__(self, *_): self.f.close()
        def __getattr__(self, k): return getattr(self.f, k)
        def write(self, line): return self.f.write(line[:5])
    real = builtins.open
    with mock.patch('builtins.open', lambda *args, **kw: Full(real(*args, **kw))), pytest.raises(OSError, match='log.jsonl: the disk is full'): append_row(tmp_path, dict(step=2))
    append_row(tmp_path, dict(step=3))
    assert (tmp_path/'log.jsonl').read_text()=='{"step": 1}\n{"step": 3}\n'

@pytest.mark.parametrize('at', range(1, 12))
def test_training_on_a_full_disk_goes_on_when_there_is_room(tmp_path, undisturbed, at):
    with faults(tmp_path, 3*at, refuse(errno.ENOSPC)), pytest.raises(OSError, match='the disk is full'): fit(small(), DATA, folder=tmp_path, **KW)
    assert not [n for n in names(tmp_path) if n.endswith('.tmp')]
    check_resumed(tmp_path, undisturbed)

# ---- started again with something else

def begin(folder, **kw):
    def forward(m, x, y):
        if find_ckpts(folder): os.kill(os.getpid(), signal.SIGTERM)
        return m(x)
    with pytest.raises(Stopped): fit(small(), DATA, folder=folder, forward=forward, **KW|kw)

@pytest.mark.parametrize('kw,said', [
    (dict(data=images(1)), r'\(as many images, but not the same ones\)'), (dict(accumulate=2), 'accumulate was 1 and is now 2'),
    (dict(seed=1), 'seed was 0 and is now 1'), (dict(lr=.1), 'lr was 0.01 and is now 0.1'), (dict(data=images(n=40)), 'images was 48 and is now 40'),
    (dict(betas=(.9,.95)), 'betas was'), (dict(data=ImageSet(DATA.images, torch.zeros(48).long())), 'not the same ones')])
def test_what_a_resumed_run_must_share(tmp_path, kw, said):
    begin(tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=said): fit(Small(), kw.pop('data', DATA), folder=tmp_path, resume=True, **KW|kw)
    assert before=={p: p.read_bytes() for p in tmp_path.iterdir()}

def test_another_number_of_processes(tmp_path):
    begin(tmp_path)
    with mock.patch('mim_nb.train.ranks', lambda: (0, 2)), pytest.raises(ValueError, match='processes was 1 and is now 2'):
        fit(Small(), DATA, folder=tmp_path, resume=True, **KW)

def test_a_finished_run_is_not_overwritten(tmp_path):
    fit(small(), DATA, folder=tmp_path, **KW)
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(FileExistsError, match='already holds the checkpoints of a run'): fit(small(), DATA, folder=tmp_path, **KW)
    with pytest.raises(FileExistsError): start_run(tmp_path)
    assert before=={p: p.read_bytes() for p in tmp_path.iterdir()}

# ---- not finite

class Root(Small):
    "The square root of 0 has an infinite slope: the loss is fine, and the gradient is NaN"
    progress = 0.
    def forward(self, x):
        out = super().forward(x)
        if self.progress>=.5: out.loss = out.loss + (self.net[1].weight*0).sum().sqrt()
        return out

def test_a_bad_gradient_ends_the_run_before_it_is_saved(tmp_path):
    torch.manual_seed(0)
    with pytest.raises(FloatingPointError, match='the gradient became nan between steps 4 and 4') as e: fit(Root(), DATA, folder=tmp_path, **KW|dict(save_every=1))
    assert str(tmp_path) in str(e.value)
    ckpt = load_ckpt(tmp_path)
    assert ckpt['step']==3 and all(v.isfinite().all() for v in ckpt['model'].values())
    with pytest.raises(FloatingPointError, match='the gradient became'): fit(Root(), DATA, **KW|dict(clip=None))

def test_bad_weights_are_not_saved(tmp_path):
    def spoil(m, x, y):
        if find_ckpts(tmp_path):
            with torch.no_grad(): m.spare[0] = math.inf
        return m(x)
    m = small()
    m.spare = nn.Parameter(torch.zeros(2))
    with pytest.raises(FloatingPointError, match='the weights became infinite or NaN by step 4'): fit(m, DATA, folder=tmp_path, forward=spoil, **KW)
    assert load_ckpt(tmp_path)['step']==2

# ---- signals and output

def test_a_closed_terminal_is_a_polite_stop(tmp_path, monkeypatch):
    old = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    def forward(m, x, y):
        os.kill(os.getpid(), signal.SIGHUP)
        return m(x)
    try:
        with pytest.raises(Stopped, match='stopped at step 1 of 6, saved in') as e: fit(small(), DATA, folder=tmp_path, forward=forward, **KW)
        assert e.value.signum==signal.SIGHUP and load_ckpt(tmp_path)['step']==1
        assert signal.getsignal(signal.SIGHUP)==signal.SIG_DFL
    finally: signal.signal(signal.SIGHUP, old)

def test_nohup_goes_on():
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with PoliteSignals() as polite: os.kill(os.getpid(), signal.SIGHUP)
        assert polite.signum is None and signal.getsignal(signal.SIGHUP)==signal.SIG_IGN
    finally: signal.signal(signal.SIGHUP, old)

def test_a_closed_pipe_does_not_end_a_run(tmp_path):
    "The reader of our output leaves after one line, as `head -1` does"
    code = f'''
        import sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_runs import *
        print('hello', flush=True)
        sys.stdin.read()
        fit(small(), DATA, folder={str(tmp_path)!r}, **KW|dict(bar=True))
        print('the end')
    '''
    p = subprocess.Popen([sys.executable, '-c', textwrap.dedent(code)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert p.stdout.readline()=='hello\n'
    p.stdout.close()
    p.stdin.close()
    error = p.stderr.read()
    p.stderr.close()
    assert p.wait()==0, error
    assert load_ckpt(tmp_path)['step']==6 and 'BrokenPipe' not in error

# ---- settings that cannot work

BAD = dict(log_every=(0, -1, 2.5, True), seed=(-1, 1.5), save_every=(-1, 2.5), epochs=(0, -1, math.inf, math.nan, '3'), lr=(0, -1., math.nan, math.inf),
           batch_size=(0, -8, 2.5), accumulate=(0, -1, 1.5), weight_decay=(-.1, math.nan), clip=(0, -1., math.nan), betas=((1., .9), (.9, -1)), warmup_epochs=(-1, math.nan), min_lr=(-1., math.inf), workers=(-1,))

@pytest.mark.parametrize('name,value', [(k, v) for k,o in BAD.items() for v in o])
def test_settings_that_cannot_work(tmp_path, name, value):
    with pytest.raises(ValueError, match=name) as e: fit(small(), DATA, folder=tmp_path, **KW|{name: value})
    assert '\n' not in str(e.value) and not names(tmp_path)

def test_settings_by_name():
    with pytest.raises(ValueError, match="did you mean 'epochs'"): fit(small(), DATA, epoch=3)
    a,b = small(),small()
    fit(a, DATA, **KW)
    fit(b, DATA, Recipe(epochs=1, batch_size=8, lr=1e-2), device='cpu', bar=False)
    assert same(a, b)
    with pytest.raises(TypeError, match='epochs'): fit(a, DATA, 3, epochs=4)
