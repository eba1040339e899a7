"The authors' tokenizers against their numbers, and files that would do harm if they were run"
import copyreg, io, json, os, pickle, re, subprocess, sys, types, warnings, zipfile
from pathlib import Path
import pytest, torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from mim_nb import pickles
from mim_nb import authors_tokenizers as at, pickles
from mim_nb.authors_tokenizers import DalleTokenizer, PublishedTokenizer, VQGANTokenizer
from mim_nb.pickles import read_pickled
from mim_nb.beit import BEiT

PARITY = Path(__file__).parent/'parity'

def close(a, b): return (a-b).abs().max() <= 1e-5*b.abs().max()

def ours(cls, name):
    for pattern,to in cls.official:
        if m := re.fullmatch(pattern, name): return to and m.expand(to)

def reference(cls, name, **kw):
    fix = load_file(PARITY/f'{name}.safetensors')
    w = {ours(cls, k.removeprefix('weights/')): v for k,v in fix.items() if k.startswith('weights/')}
    t = cls(**cls.official_sizes(w), **kw).eval(); t.load_state_dict(w)
    return t,fix

def test_dalle():
    t,fix = reference(DalleTokenizer, 'dalle_encoder_a', img_size=64)
    with torch.no_grad(): z = t.logits(fix['in/pixels'])
    assert close(z, fix['out/z'].flatten(2).mT) and torch.equal(t.ids(fix['in/pixels']), fix['out/indices'].flatten(1))

def test_vqgan():
    t,fix = reference(VQGANTokenizer, 'vqgan_encoder_a', img_size=32); x = fix['in/images']/2+.5
    with torch.no_grad():
        assert close(t.encoder(2*x-1), fix['out/h'])
        assert close(t.logits(x), fix['out/logits'].flatten(2).mT) and torch.equal(t.ids(x), fix['out/indices'].flatten(1))

@pytest.mark.parametrize('cls,name,size', [(DalleTokenizer, 'dalle_encoder_a', 64), (VQGANTokenizer, 'vqgan_encoder_a', 32)])
def test_every_weight_matters(cls, name, size):
    "Nudge any weight of the encoder, and the logits move; a norm or a softmax cancels some biases"
    t,fix = reference(cls, name, img_size=size)
    x = fix['in/pixels'] if 'in/pixels' in fix else fix['in/images']/2+.5
    with torch.no_grad():
        z = t.logits(x)
        for n,p in t.named_parameters():
            if 'embed' in n or n.endswith(('.k.bias', 'down.0.block.0.conv1.bias')): continue
            old = p.clone(); p.add_(torch.randn_like(p)*.1*p.abs().max().clamp(min=.01))
            moved = not close(t.logits(x), z); p.copy_(old)
            assert moved, n

def test_full_size():
    full = json.loads((PARITY/'fullsize_dalle_encoder.json').read_text())
    with torch.device('meta'): dalle,vqgan = DalleTokenizer(),VQGANTokenizer()
    assert {n: list(p.shape) for n,p in dalle.encoder.named_parameters(prefix='encoder')}=={ours(DalleTokenizer, k): s for k,s in full['state_dict'].items()}
    assert sum(p.numel() for p in dalle.encoder.parameters())==full['counts']['parameters']
    assert dalle.grid==vqgan.grid==(14,14) and vqgan.encoder.down[3].attn[1].q.weight.shape==(512,512,1,1)

SMALL = {DalleTokenizer: dict(img_size=32, width=16, blocks=1, vocab_size=40, decoder=24),
         VQGANTokenizer: dict(img_size=32, width=32, mult=(1,2,2,1), blocks=1, attn=(1,3), z=16, vocab_size=40)}

@pytest.mark.parametrize('cls', SMALL)
@pytest.mark.parametrize('chans', [1, 3])
def test_interface(cls, chans):
    t = cls(**SMALL[cls]); x = torch.rand(2, chans, 28, 28)
    assert t.vocab_size==40 and t.grid==(4,4)
    assert t.logits(x).shape==(2,16,40) and torch.equal(t.ids(x), t.logits(x).argmax(-1))
    painted = t.decode(t.ids(x))
    assert painted.shape==(2,3,32,32) and painted.min()>=0 and painted.max()<=1
    sizes = cls.official_sizes(t.state_dict())
    assert {k: SMALL[cls][k] for k in sizes if k in SMALL[cls]}=={k: v for k,v in sizes.items() if k in SMALL[cls]}

@pytest.mark.parametrize('cls', SMALL)
def test_gives_targets(cls):
    "Any of them can teach BEiT, if the grid and the vocabulary agree"
    t = cls(**SMALL[cls])
    m = BEiT(28, 7, 1, 32, 1, 1, vocab_size=40, tokenizer=t)
    m(torch.rand(2,1,28,28)).loss.backward()
    assert all(not p.requires_grad and p.grad is None for p in t.parameters())
    with pytest.raises(ValueError, match='4x4 tokens and the encoder has 7x7'): BEiT(28, 4, 1, 32, 1, 1, vocab_size=40, tokenizer=t)
    with pytest.raises(ValueError, match='vocab_size=40'): BEiT(28, 7, 1, 32, 1, 1, vocab_size=41, tokenizer=t)

# files -------------------------------------------------------------------------------------------------

def archive(path, pkl, **records):
    "A zip archive as torch.save makes it, with this pickle"
    with zipfile.ZipFile(path, 'w') as z:
        z.writestr('archive/data.pkl', pkl)
        for k,v in records.items(): z.writestr(f'archive/data/{k}', v)
    return path

class Evil:
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.mkdir, (str(self.path),)

def module(evil):
    theirs = sys.modules['dall_e'] = types.ModuleType('dall_e')
    class Conv2d(nn.Module):
        def __init__(self, *shape): super().__init__(); self.w,self.b = nn.Parameter(torch.randn(shape)),nn.Parameter(torch.randn(shape[0]))
    theirs.Conv2d,Conv2d.__module__,Conv2d.__qualname__ = Conv2d,'dall_e','Conv2d'
    m = nn.Module(); m.blocks = nn.Sequential(); m.blocks.add_module('input', Conv2d(4,3,7,7)); m.blocks.add_module('relu', nn.ReLU())
    m.register_buffer('steps', torch.arange(5)); m.half = nn.Linear(2,2).bfloat16(); m.guest = evil
    return m

@pytest.mark.parametrize('zipped', [True, False])
def test_pickled_module(tmp_path, zipped):
    m = module(Evil(tmp_path/'pwned'))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        torch.save(m, tmp_path/'m.pkl', _use_new_zipfile_serialization=zipped)
    del sys.modules['dall_e']
    w = read_pickled(tmp_path/'m.pkl')
    assert w.keys()==m.state_dict().keys() and all(torch.equal(v, w[k]) and v.dtype==w[k].dtype for k,v in m.state_dict().items())
    assert not (tmp_path/'pwned').exists()

def test_views_share_a_storage(tmp_path):
    x = torch.arange(24.).reshape(4,6)
    torch.save(dict(a=x[1:3].T, b=x[:,::2], c=torch.tensor(7), d=torch.zeros(0), e=torch.tensor([True,False])), tmp_path/'x.pt')
    w = read_pickled(tmp_path/'x.pt')
    assert torch.equal(w['a'], x[1:3].T) and torch.equal(w['b'], x[:,::2]) and w['c']==7 and w['d'].numel()==0 and w['e'].tolist()==[True,False]

def harmful(path):
    "Programs in pickle's language that make the folder `path` when they are run, in as many ways as there are"
    p = str(path).encode()
    text,call = b'S"'+p+b'"\n', b'cposix\nmkdir\n'
    return dict(
        reduce=call+b'('+text+b'tR.', inst=b'('+text+b'iposix\nmkdir\n.', obj=b'('+call+text+b'o.', stack_global=pickle.dumps(Evil(path), 4), protocol5=pickle.dumps(Evil(path), 5),
        newobj=b'\x80\x02'+call+b'('+text+b't\x81.', extension=b'\x80\x02\x82\x42('+text+b'tR.',
        builtin=b'cbuiltins\neval\n(S"__import__(\'os\').mkdir(\''+p+b'\')"\ntR.', getattr=b'cbuiltins\ngetattr\n(cos\npath\nS"os"\ntR.',
        dotted=b'\x80\x04\x8c\x02os\x8c\x0apath.mkdir\x93('+text+b'tR.')

@pytest.mark.parametrize('kind', harmful('x'))
def test_nothing_runs(tmp_path, kind):
    pkl = harmful(tmp_path/'pwned')[kind]
    copyreg.add_extension('posix', 'mkdir', 0x42)
    try:
        o = pickles.TensorReader(io.BytesIO(pkl), 0).load()
        assert isinstance(o, pickles.Inert)
        for content in (pkl, pickle.dumps(0)[:-1]+b'0'+pkl):
            with pytest.raises(ValueError, match='cannot be read as a pickled module'): read_pickled(archive(tmp_path/'evil.pkl', content))
        (tmp_path/'raw.pkl').write_bytes(pkl)
        with pytest.raises(ValueError, match='cannot be read as a pickled module'): read_pickled(tmp_path/'raw.pkl')
    finally: copyreg.remove_extension('posix', 'mkdir', 0x42)
    assert not (tmp_path/'pwned').exists()

def test_these_programs_are_harmful(tmp_path):
    "The same programs do harm when pickle runs them, or the test above would mean nothing"
    for kind in ('reduce', 'inst', 'obj', 'stack_global', 'builtin'):
        pickle.loads(harmful(tmp_path/kind)[kind])
        assert (tmp_path/kind).is_dir(), kind

@pytest.mark.parametrize('what', ['torch._utils\n_rebuild_tensor_v2', 'collections\nOrderedDict', 'torch\nFloatStorage', 'torch\nSize', 'mim_nb.pickles\nInert', 'no\nsuch'])
def test_nothing_lasting_can_be_changed(tmp_path, what):
    "BUILD may set attributes of what a file was given: none of it is shared"
    import collections
    shared = [torch._utils._rebuild_tensor_v2, collections.OrderedDict, torch.float32, torch.Size, tuple, pickles.Inert, pickles._view, pickles._param, pickles._typed, pickles._ordered]
    before = [(dict(vars(o)) if hasattr(o, '__dict__') else {}, getattr(o, '__defaults__', None)) for o in shared]
    for state in (b"(N}S'__defaults__'\nI1\nstb", b"(N}S'evil'\nI1\nstb", b"}S'evil'\nI1\nsb", b"(N}S'__call__'\ncos\nsystem\nstb"):
        with pytest.raises(ValueError): read_pickled(archive(tmp_path/'b.pkl', b'c'+what.encode()+b'\n'+state+b'.'))
    assert before==[(dict(vars(o)) if hasattr(o, '__dict__') else {}, getattr(o, '__defaults__', None)) for o in shared]

def test_a_process_that_reads_an_evil_file_starts_nothing(tmp_path):
    "Python's own audit hook sees every import, file and process: after the file is open there must be none"
    torch.save(dict(w=torch.ones(2), x=Evil(tmp_path/'pwned')), tmp_path/'evil.ckpt')
    code = '''
import sys, torch
from mim_nb.pickles import read_pickled
from pathlib import Path
path = Path(sys.argv[1]); read_pickled(path)                  # once, so that whatever is imported lazily is there
seen = []
sys.addaudithook(lambda e, a: seen.append((e, str(a[:1]))) if e.split('.')[0] in ('os', 'subprocess', 'shutil', 'socket', 'exec', 'import', 'ctypes') else None)
w = read_pickled(path)
assert w['w'].tolist()==[1,1] and [e for e in seen if e[0] not in ('os.stat',)]==[], seen
'''
    subprocess.run([sys.executable, '-c', code, str(tmp_path/'evil.ckpt')], check=True, timeout=120, cwd=tmp_path)
    assert not (tmp_path/'pwned').exists()

def test_lying_files(tmp_path):
    "A pickle may claim storages that the file does not have"
    rebuild = b"ctorch._utils\n_rebuild_tensor_v2\n((S'storage'\nctorch\nFloatStorage\nS'0'\nS'cpu'\n%stQI0\n(%sI1\nttR."
    good = archive(tmp_path/'good.pkl', b'}S"x"\n'+(rebuild % (b'I2\n', b'I2\nt('))[:-1]+b's.', **{'0': torch.ones(2).numpy().tobytes()})
    assert read_pickled(good)['x'].tolist()==[1,1]
    for numel,size in ((b'I2\n', b'I9\nt('), (b'I1000000000000\n', b'I2\nt('), (b'I-1\n', b'I1\nt('), (b'I3\n', b'I2\nt('), (b'S"x"\n', b'I2\nt(')):
        bad = archive(tmp_path/'bad.pkl', b'}S"x"\n'+(rebuild % (numel, size))[:-1]+b's.', **{'0': torch.ones(2).numpy().tobytes()})
        with pytest.raises(ValueError, match='cannot be read as a pickled module'): read_pickled(bad)

@pytest.fixture(scope='module')
def files(tmp_path_factory):
    tmp = tmp_path_factory.mktemp('files')
    for z in (True, False): torch.save(dict(state_dict=dict(a=torch.ones(3), b=torch.arange(4)), n=1), tmp/f'{z}.pt', _use_new_zipfile_serialization=z)
    return tmp

@settings(max_examples=60, deadline=None)
@given(st.booleans(), st.integers(0, 2**30), st.integers(1, 8), st.booleans())
def test_damaged_files_end_with_a_sentence(files, zipped, seed, n, cut):
    data,g = bytearray((files/f'{zipped}.pt').read_bytes()),torch.Generator().manual_seed(seed)
    for i in torch.randint(len(data), (n,), generator=g): data[i] = int(torch.randint(256, (1,), generator=g))
    if cut: data = data[:int(torch.randint(len(data), (1,), generator=g))]
    (files/'damaged.pt').write_bytes(data)
    try: read_pickled(files/'damaged.pt')
    except ValueError as e: assert 'cannot be read' in str(e)

def test_missing_and_wrong_files(tmp_path):
    with pytest.raises(FileNotFoundError, match='cdn.openai.com.*mim_pretrain trains'): DalleTokenizer.read(tmp_path/'encoder.pkl')
    with pytest.raises(FileNotFoundError, match='encoder.pkl.*215 MB'): DalleTokenizer.read(tmp_path)
    with pytest.raises(FileNotFoundError, match='376 MB'): VQGANTokenizer.read(tmp_path/'last.ckpt')
    torch.save([1,2], tmp_path/'list.pt')
    with pytest.raises(ValueError, match='neither a module nor a dict'): VQGANTokenizer.read(tmp_path/'list.pt')

def test_both_of_dalles_files(tmp_path):
    t = DalleTokenizer(**SMALL[DalleTokenizer])
    theirs = lambda m: {'blocks.'+re.sub('weight$', 'w', re.sub('bias$', 'b', k)): v for k,v in m.state_dict().items()}
    torch.save(theirs(t.encoder), tmp_path/'encoder.pkl')
    assert {ours(DalleTokenizer, k) for k in DalleTokenizer.read(tmp_path)}=={k for k in t.state_dict() if k.startswith('encoder')}
    torch.save(theirs(t.decoder), tmp_path/'decoder.pkl')
    for path in (tmp_path, tmp_path/'encoder.pkl'): assert {ours(DalleTokenizer, k) for k in DalleTokenizer.read(path)}==t.state_dict().keys()
    save_file(theirs(t.encoder), tmp_path/'dalle.safetensors')
    assert DalleTokenizer.read(tmp_path/'dalle.safetensors').keys()>=theirs(t.encoder).keys()

def test_one_import_for_all_tokenizers():
    from mim_nb.tokenizers import DVAE, DalleTokenizer as D, VQGANTokenizer as V
    assert (D,V)==(DalleTokenizer,VQGANTokenizer) and all(hasattr(c, n) for c in (DVAE,D,V) for n in ('logits', 'ids', 'decode'))
